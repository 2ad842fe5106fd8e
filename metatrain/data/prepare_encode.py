"""Statistics and vocabularies of raw columns, and raw columns as what the dataset stores. No Ray.

Partial statistics of any pieces merge to the same whole, so partitions are counted apart.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from metatrain.config import FeatureSource
from metatrain.data.distinct import DistinctValues, sharing
from metatrain.data.hashing import hash_text
from metatrain.data.schema import ITEM_FEATURE, Feature, Kind, Level
from metatrain.errors import SourceError


@dataclass(frozen=True)
class Moments:
    """Count, mean, sum of squared deviations and range of some numbers."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    least: float = math.inf
    greatest: float = -math.inf

    @staticmethod
    def of(values: np.ndarray) -> Moments:
        """Of an array."""
        if not len(values):
            return Moments()
        v = values.astype(np.float64)
        mean = float(v.mean())
        return Moments(len(v), mean, float(((v - mean) ** 2).sum()), float(v.min()), float(v.max()))

    def with_(self, other: Moments) -> Moments:
        """Of both together (Chan et al. 1979: no large sums cancel)."""
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * other.count / count
        squares = self.squares + other.squares + delta * delta * self.count * other.count / count
        return Moments(count, mean, squares, min(self.least, other.least), max(self.greatest, other.greatest))

    @property
    def deviation(self) -> float:
        """Standard deviation; 1 where all numbers are equal, so that one may divide by it."""
        deviation = math.sqrt(self.squares / self.count) if self.count else 0.0
        return deviation if deviation > 1e-12 else 1.0


@dataclass
class Statistics:
    """What training users' rows say of the raw columns: values counted by table, moments by feature; of tables of hash
    buckets, about how many values there are."""

    values: dict[str, Counter[str]] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    hashed: dict[str, DistinctValues] = field(default_factory=dict)

    def add(self, feature: FeatureSource, column: pa.Array | pa.ChunkedArray) -> None:
        """Counts a raw column. What needs no statistics (vectors, the items' own table) is let be."""
        if feature.kind == "numeric":
            known = _whole(pc.drop_null(column)).to_numpy(zero_copy_only=False)
            self.moments[feature.name] = self.moments.get(feature.name, Moments()).with_(Moments.of(known))
        elif feature.kind in ("categorical", "multi") and table_of(feature) != ITEM_FEATURE:
            flat = _whole(column).flatten() if feature.kind == "multi" else _whole(column)
            if feature.buckets:
                distinct = pc.unique(pc.drop_null(flat)).cast(pa.string())
                self.hashed.setdefault(table_of(feature), DistinctValues()).add(hash_text(distinct, "distinct"))
                return
            found = pc.value_counts(pc.drop_null(flat))
            counts = self.values.setdefault(table_of(feature), Counter())
            # One round for each distinct value, not for each row.
            counts.update(dict(zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True)))

    def merge(self, other: Statistics) -> None:
        """Adds another's counts."""
        for table, counts in other.values.items():
            self.values.setdefault(table, Counter()).update(counts)
        for name, moments in other.moments.items():
            self.moments[name] = self.moments.get(name, Moments()).with_(moments)
        for table, sketch in other.hashed.items():
            self.hashed.setdefault(table, DistinctValues()).merge(sketch)

    def collisions(self, features: Iterable[Feature]) -> dict[str, dict[str, float]]:
        """Of each table of hash buckets: about how many values training users have, its buckets, and the share of
        values that share their row with another."""
        buckets = {str(f.table): f.buckets - 1 for f in features if f.buckets}  # row 0 is for what is missing
        found = {table: (sketch.estimate(), buckets[table]) for table, sketch in sorted(self.hashed.items())}
        return {
            table: {"values": values, "buckets": count, "sharing": round(sharing(values, count), 4)}
            for table, (values, count) in found.items()
        }


def table_of(feature: FeatureSource) -> str:
    """The embedding table of a feature: as named, or its own."""
    return feature.table or feature.name


def vocabularies(features: Iterable[FeatureSource], statistics: Statistics, items: pa.Array) -> dict[str, pa.Array]:
    """The vocabulary of every table that has one: the commonest value first, ties in the order of the text.

    Args:
        items: Keys of the items that have training events: the vocabulary of the items' own table.
    """
    result = {ITEM_FEATURE: items}
    least: dict[str, int] = {}
    for f in features:
        if f.kind in ("categorical", "multi") and not f.buckets and table_of(f) != ITEM_FEATURE:
            least[table_of(f)] = max(least.get(table_of(f), 1), f.min_count)
    for table, count in least.items():
        counts = statistics.values.get(table, Counter())
        kept = sorted((v for v, n in counts.items() if n >= count), key=lambda v: (-counts[v], v))
        result[table] = pa.array(kept, type=pa.string())
    return result


def stored_feature(f: FeatureSource, statistics: Statistics, vocabulary: Mapping[str, pa.Array]) -> Feature:
    """The feature as the schema describes it."""
    level, kind = Level(f.level), Kind(f.kind)
    if kind is Kind.NUMERIC:
        moments = statistics.moments.get(f.name, Moments())
        return Feature(name=f.name, level=level, kind=kind, mean=moments.mean, deviation=moments.deviation)
    if kind is Kind.VECTOR:
        return Feature(name=f.name, level=level, kind=kind, width=f.width)
    table = table_of(f)
    rows = f.buckets if f.buckets else len(vocabulary[table]) + 1
    return Feature(
        name=f.name, level=level, kind=kind, table=table, rows=max(rows, 2), width=f.width, buckets=f.buckets
    )


def encode(feature: Feature, column: pa.Array | pa.ChunkedArray, vocabulary: pa.Array | None) -> pa.Array:
    """A raw column as stored: ids, lists of ids, standardised numbers, or vectors.

    A multi-valued feature keeps the values that are known: an unknown one would only thin out the others' mean.

    Raises:
        SourceError: A vector of another length, or a number that isn't finite.
    """
    array = _whole(column)
    if feature.kind is Kind.CATEGORICAL:
        return pa.array(_ids(feature, array, vocabulary))
    if feature.kind is Kind.MULTI:
        ids = _ids(feature, array.flatten(), vocabulary)
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        known = np.concatenate([[0], np.cumsum(ids > 0)])
        offsets = known[np.concatenate([[0], np.cumsum(lengths)])]
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(ids[ids > 0]))
    if feature.kind is Kind.NUMERIC:
        numbers = pc.fill_null(array.cast(pa.float64()), feature.mean).to_numpy(zero_copy_only=False)
        with np.errstate(over="ignore"):
            result = ((numbers - feature.mean) / feature.deviation).astype(np.float32)
        if not np.isfinite(result).all():
            raise SourceError(
                "A number is too far from the others to be stored.",
                where=f"feature {feature.name}",
                got=float(numbers[~np.isfinite(result)][0]),
                remedy="Mend the number.",
            )
        return pa.array(result)
    return _vectors(feature, array)


def as_lists(column: pa.Array, offsets: np.ndarray) -> pa.Array:
    """An encoded event column as one list a task."""
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), column)


def _ids(feature: Feature, values: pa.Array, vocabulary: pa.Array | None) -> np.ndarray:
    if feature.buckets:
        bucket = 1 + (hash_text(values, str(feature.table)) % np.uint64(feature.buckets - 1)).astype(np.int32)
        return np.where(pc.is_valid(values).to_numpy(zero_copy_only=False), bucket, 0).astype(np.int32)
    known = pc.index_in(values, value_set=vocabulary, skip_nulls=True)
    return pc.fill_null(pc.add(known, 1), 0).to_numpy(zero_copy_only=False).astype(np.int32)


def _vectors(feature: Feature, array: pa.Array) -> pa.Array:
    width = feature.width or 0
    missing = pc.is_null(array).to_numpy(zero_copy_only=False)
    lengths = pc.fill_null(pc.list_value_length(array), width).to_numpy(zero_copy_only=False)
    if (lengths != width).any():
        i = int(np.flatnonzero(lengths != width)[0])
        raise SourceError(
            "A vector has another length than its feature.",
            where=f"feature {feature.name}, width {width}",
            got=f"{lengths[i]} numbers",
            remedy="Set the feature's `width` to the vectors' length.",
        )
    result = np.zeros((len(array), width), dtype=np.float32)  # a missing vector is 0
    result[~missing] = pc.fill_null(array.flatten(), np.nan).to_numpy(zero_copy_only=False).reshape(-1, width)
    if not np.isfinite(result).all():
        raise SourceError(
            "A vector holds a number that isn't finite.", where=f"feature {feature.name}", remedy="Mend the vector."
        )
    return pa.FixedSizeListArray.from_arrays(pa.array(result.ravel()), width)


def _whole(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
