"""Row groups as columns of numbers: decoded without a copy where Arrow allows it, and refused where they are wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from metatrain.data.columns import Stored, feature_column, jagged, numbers, stored, stored_type, take
from metatrain.data.gather import all_below, all_finite, take_rows
from metatrain.data.schema import Feature, Level


class ColumnError(ValueError):
    """A column that is not what the manifest says."""

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(column, reason)
        self.column, self.reason = column, reason


@dataclass(frozen=True)
class Decoded:
    """n tasks in their stored order, their E events of the item set behind one another."""

    offsets: np.ndarray  # int64 [n + 1]: events before each task
    items: np.ndarray  # int32 [E]: catalogue rows
    labels: np.ndarray  # float32 [E]
    timestamps: np.ndarray | None  # int64 [E]; None where they are not read
    task_features: dict[str, Stored]  # n rows
    event_features: dict[str, Stored]  # E rows
    keys: pa.Array | None  # [n]


class Decoder:
    """Decodes what is asked for of a split's row groups.

    Args:
        features: The features to read, by level.
        catalogue_rows: Items of the catalogue.
        counts: Whether an item is of the item set: bool [catalogue_rows]. None: all are.
        keys: Whether the tasks' keys are read.
        timestamps: Whether the events' times are read.
    """

    def __init__(
        self,
        features: dict[Level, tuple[Feature, ...]],
        catalogue_rows: int,
        counts: np.ndarray | None,
        *,
        keys: bool,
        timestamps: bool = True,
    ) -> None:
        self._features, self._catalogue_rows, self._keys, self._timestamps = features, catalogue_rows, keys, timestamps
        self._counts = None if counts is None or counts.all() else counts
        tasks, events = ([f.name for f in features[level]] for level in (Level.TASK, Level.EVENT))
        own = ["items", "labels", *(["timestamps"] if timestamps else []), *(["key"] if keys else [])]
        #: Columns of a shard to read.
        self.names = [*own, *(f"task:{name}" for name in tasks), *(f"event:{name}" for name in events)]
        #: What their types must be.
        self.types: dict[str, pa.DataType] = {
            "items": pa.list_(pa.int32()),
            "labels": pa.list_(pa.float32()),
            "timestamps": pa.list_(pa.int64()),
            **({"key": pa.string()} if keys else {}),
            **{f"task:{f.name}": stored_type(f) for f in features[Level.TASK]},
            **{f"event:{f.name}": pa.list_(stored_type(f)) for f in features[Level.EVENT]},
        }

    def __call__(self, table: pa.Table) -> Decoded:
        """The columns of some row groups.

        Raises:
            ColumnError: A column is not what the manifest says.
        """
        name = "items"
        try:
            offsets, values = jagged(_single(table[name]))
            items = numbers(values, "integer")
            if not all_below(items, self._catalogue_rows):
                raise ValueError(
                    f"catalogue rows below {self._catalogue_rows} were expected, not {items.min()} to {items.max()}"
                )
            timestamps = None
            if self._timestamps:
                name = "timestamps"
                timestamps = numbers(_values(table[name], offsets), "integer")
            name = "labels"
            labels = numbers(_values(table[name], offsets), "float")
            if not all_finite(labels):
                raise ValueError("finite numbers were expected")
            events: dict[str, Stored] = {}
            for feature in self._features[Level.EVENT]:
                name = f"event:{feature.name}"
                events[feature.name] = feature_column(_values(table[name], offsets), feature)
            tasks: dict[str, Stored] = {}
            for feature in self._features[Level.TASK]:
                name = f"task:{feature.name}"
                tasks[feature.name] = feature_column(_single(table[name]), feature)
            if self._keys:
                name = "key"
                if table[name].null_count:
                    raise ValueError("keys without nulls were expected")
        except ValueError as error:
            raise ColumnError(name, str(error)) from error
        counted = None if self._counts is None else np.flatnonzero(self._counts[items])
        if counted is not None and len(counted) < len(items):
            offsets = np.searchsorted(counted, offsets)
            items, labels = take_rows(items, counted), take_rows(labels, counted)
            timestamps = None if timestamps is None else take_rows(timestamps, counted)
            events = {name: stored(take(column, counted)) for name, column in events.items()}
        keys = _single(table["key"]) if self._keys else None
        return Decoded(offsets, items, labels, timestamps, tasks, events, keys)


def _single(column: pa.ChunkedArray) -> pa.Array:
    if not column.num_chunks:
        return pa.array([], column.type)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _values(column: pa.ChunkedArray, offsets: np.ndarray) -> pa.Array:
    """The values of an event column, whose lists must be as long as the tasks' items."""
    own, values = jagged(_single(column))
    if not np.array_equal(own, offsets):
        raise ValueError("lists of one task differ in length")
    return values
