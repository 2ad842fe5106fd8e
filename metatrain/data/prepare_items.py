"""The items of a log, found while it is read, as the catalogue's raw rows. No Ray.

Memory grows with the number of items, in the calling process and in each task.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from metatrain.config import PrepareConfig
from metatrain.data.hashing import fingerprint
from metatrain.data.sources import RawLog, raw_type
from metatrain.errors import SourceError

_NEVER = np.iinfo(np.int64).max


class SameFingerprintError(Exception):
    """Two items have one fingerprint: they must be told apart under another salt."""


@dataclass(frozen=True)
class ItemIndex:
    """What stands for the catalogue's items in staged rows, and which of them are new."""

    fingerprints: pa.Array  # uint64, by catalogue row
    new: np.ndarray

    def rows(self, items: pa.Array) -> pa.Array:
        """Catalogue rows of fingerprints: int32 [n]."""
        return pc.index_in(items, value_set=self.fingerprints)


class SeenItems:
    """Items that events name and the first time of each, gathered table by table, in any order."""

    def __init__(self) -> None:
        self._fingerprints = pa.array([], pa.uint64())
        self.keys = pa.array([], pa.string())
        self.first = np.zeros(0, np.int64)

    def add(self, items: pa.Table) -> None:
        """Adds a table of different items: fingerprint, key, first.

        Raises:
            SameFingerprintError: One of them has the fingerprint of another item.
        """
        marks, keys = (items[name].combine_chunks() for name in ("fingerprint", "key"))
        first = items["first"].to_numpy()
        known = pc.index_in(marks, value_set=self._fingerprints)
        old = pc.is_valid(known)
        place = known.drop_null()
        if not self.keys.take(place).equals(keys.filter(old)):
            raise SameFingerprintError
        at, mask = place.to_numpy(), old.to_numpy(zero_copy_only=False)
        self.first[at] = np.minimum(self.first[at], first[mask])
        fresh = pc.invert(old)
        self._fingerprints = pa.concat_arrays([self._fingerprints, marks.filter(fresh)])
        self.keys = pa.concat_arrays([self.keys, keys.filter(fresh)])
        self.first = np.concatenate([self.first, first[~mask]])


def raw_catalogue(raw: RawLog, config: PrepareConfig, seen: SeenItems) -> tuple[pa.Table, np.ndarray, int]:
    """All items: those of the item table in its order, then others that the log knows; their first times; and how many
    rows of the table could not be parsed and were skipped by choice.

    Raises:
        SourceError: An item has two rows in the item table.
    """
    fields = {"key": pa.string(), "title": pa.string()}
    fields |= {f.name: raw_type(f) for f in raw.features if f.level == "item"}
    read = [rows for chunk in raw.items or () for rows in chunk.read()]
    tables, bad = [rows.table for rows in read], sum(rows.bad for rows in read)
    extra = config.item_split.column
    if extra and extra not in fields and tables and extra in tables[0].column_names:
        fields[extra] = tables[0].schema.field(extra).type
    schema = pa.schema(list(fields.items()))
    known = pa.concat_tables([_titled(t).select(schema.names).cast(schema) for t in tables] or [schema.empty_table()])
    keys = known["key"].combine_chunks()
    if len(pc.unique(keys)) != len(keys):
        counts = pc.value_counts(keys)
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0].as_py()
        raise SourceError(
            f"{'An item' if config.catalogued == 'item' else 'A user'} has two rows.",
            where=(config.items if config.catalogued == "item" else config.users) or raw.name,
            got=twice,
            remedy=f"Keep one row {'an item' if config.catalogued == 'item' else 'a user'}.",
        )
    others = seen.keys.filter(pc.invert(pc.is_in(seen.keys, value_set=keys)))
    others = others.take(pc.sort_indices(others))
    rest = pa.table([others if f.name == "key" else pa.nulls(len(others), f.type) for f in schema], schema=schema)
    catalogue = pa.concat_tables([known, rest]).combine_chunks()
    row = pc.index_in(catalogue["key"].combine_chunks(), value_set=seen.keys)
    return catalogue, pc.fill_null(pa.array(seen.first).take(row), _NEVER).to_numpy(zero_copy_only=False), bad


def _titled(table: pa.Table) -> pa.Table:
    """With a column of titles, which a table of items may lack."""
    return table if "title" in table.column_names else table.append_column("title", pa.nulls(len(table), pa.string()))


def item_fingerprints(keys: pa.Array, salt: int) -> pa.Array:
    """What stands for the catalogue's items.

    Raises:
        SameFingerprintError: Two of them would be one.
    """
    marks = fingerprint(keys, salt)
    if len(np.unique(marks)) != len(marks):
        raise SameFingerprintError
    return pa.array(marks)
