"""Rows on their way through the shuffle, and one partition of them as tasks. Pure functions over Arrow tables: no Ray.

Every row that the shuffle moves has the same columns, whatever table it came from (`kind`):

- EVENT  an event: `key`, `item`, `label`, `timestamp`, `order` (its place in the log), `event:NAME` raw features
- TASK   a row of the user table: `key`, `task:NAME` raw features, `split` where the split is a column of that table
- GIVEN  a row of a split file: `key`, `split`
- TALLY  rows that were skipped where they were read: `split` names the reason, `order` is their number

So a large user table or split file is partitioned like the events and never held whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from metatrain.config import FeatureSource, PrepareConfig
from metatrain.data.hashing import hash_text
from metatrain.data.sources.rawlog import Chunk, raw_type
from metatrain.errors import SourceError

#: A chunk's number takes the upper bits of `order`, a row's number in it the lower.
_ROW_BITS = 40


class RowKind(IntEnum):
    """Where a row came from."""

    EVENT = 0
    TASK = 1
    GIVEN = 2
    TALLY = 3


@dataclass(frozen=True)
class Reading:
    """A chunk to read, and what its rows become."""

    chunk: Chunk
    kind: RowKind
    number: int  # of the chunk in its table, which orders events of the same time


@dataclass(frozen=True)
class Grouped:
    """One partition: its tasks, their events behind one another, and what was left out."""

    tasks: pa.Table  # key, events (int64: how many), first (int64: time of the first), split, task:NAME
    events: pa.Table  # item (dictionary), label, timestamp, event:NAME
    items: pa.Table  # item, first (int64): every item of the partition's log and its first time
    skipped: dict[str, int]


def shuffle_schema(features: tuple[FeatureSource, ...]) -> pa.Schema:
    """The columns of every row that the shuffle moves."""
    fields = [
        ("partition", pa.int32()),
        ("kind", pa.int8()),
        ("key", pa.string()),
        ("order", pa.int64()),
        ("item", pa.string()),
        ("label", pa.float32()),
        ("timestamp", pa.int64()),
        ("split", pa.string()),
    ]
    fields += [(f"{f.level}:{f.name}", raw_type(f)) for f in features if f.level != "item"]
    return pa.schema(fields)


def read_rows(
    reading: Reading, config: PrepareConfig, features: tuple[FeatureSource, ...], partitions: int
) -> Iterator[pa.Table]:
    """A chunk's rows in the columns of `shuffle_schema`.

    Raises:
        SourceError: What the chunk raises.
    """
    schema = shuffle_schema(features)
    done = bad = 0
    for table, wrong in reading.chunk.read():
        bad += wrong
        if n := table.num_rows:
            columns = {"key": table["key"], "kind": pa.array(np.full(n, reading.kind, np.int8))}
            columns["order"] = pa.array(np.arange(done, done + n) + (reading.number << _ROW_BITS))
            columns["partition"] = _partition(table["key"], partitions)
            if reading.kind is RowKind.EVENT:
                columns |= {name: table[name] for name in ("item", "label", "timestamp")}
            if reading.kind is RowKind.TASK and config.user_split.column:
                columns["split"] = _column(table, config.user_split.column).cast(pa.string())
            if reading.kind is RowKind.GIVEN:
                columns["split"] = table["split"]
            level = {RowKind.EVENT: "event", RowKind.TASK: "task"}.get(reading.kind)
            columns |= {f"{level}:{f.name}": _column(table, f.name) for f in features if f.level == level}
            done += n
            yield _conformed(columns, n, schema)
    # Also where there is nothing to tell: an empty chunk still has the columns.
    yield tally("bad rows", bad, schema)


def tally(reason: str, number: int, schema: pa.Schema) -> pa.Table:
    """A row that carries a count of skipped rows, so that a task that runs twice is still counted once."""
    columns = {"partition": [0], "kind": [int(RowKind.TALLY)], "key": [""], "order": [number], "split": [reason]}
    return _conformed({name: pa.array(v, type=schema.field(name).type) for name, v in columns.items()}, 1, schema)


def group(rows: pa.Table, config: PrepareConfig, features: tuple[FeatureSource, ...]) -> Grouped:
    """A partition's rows as tasks. Events are in time order, ties in the log's; tasks are in the order of a hash.

    Raises:
        SourceError: A user has two rows in the user table or the split file.
    """
    kinds = rows["kind"].to_numpy()
    of = {kind: rows.filter(pa.array(kinds == kind)) for kind in RowKind}
    skipped: dict[str, int] = {}
    for reason, number in zip(
        of[RowKind.TALLY]["split"].to_pylist(), of[RowKind.TALLY]["order"].to_pylist(), strict=True
    ):
        _count(skipped, reason, number)
    events = of[RowKind.EVENT]
    times, labels_order = events["timestamp"].to_numpy(), events["order"].to_numpy()
    items = _first_times(events)

    encoded = _whole(events["key"]).dictionary_encode()
    # A dictionary's order is that of first appearance, which the shuffle doesn't promise; a hash's is fixed.
    keys, codes = encoded.dictionary, encoded.indices.to_numpy()
    place = np.lexsort((np.argsort(np.argsort(keys.to_numpy(zero_copy_only=False))), hash_text(keys, "order")))
    rank = np.empty(len(keys), dtype=np.int64)
    rank[place] = np.arange(len(keys))
    keys, user = keys.take(pa.array(place)), rank[codes]
    counts = np.bincount(user, minlength=len(keys))
    order = np.lexsort((labels_order, times, user))
    first = times[order[np.cumsum(counts) - counts]] if len(order) else np.zeros(0, np.int64)
    from_end = np.repeat(np.cumsum(counts), counts) - np.arange(len(order))  # 1 for a user's last event
    enough = counts >= config.min_events
    kept = (from_end <= config.max_events) & np.repeat(enough, counts)
    _count(skipped, f"users with fewer than {config.min_events} events", int((~enough).sum()))
    _count(skipped, f"events of users with fewer than {config.min_events}", int(counts[~enough].sum()))
    _count(
        skipped,
        f"oldest events beyond {config.max_events} of a user",
        int(np.maximum(counts[enough] - config.max_events, 0).sum()),
    )

    order = pa.array(order[kept])
    columns = {name: events[name].take(order) for name in ("label", "timestamp")}
    columns["item"] = _whole(events["item"]).take(order).dictionary_encode()
    columns |= {f"event:{f.name}": events[f"event:{f.name}"].take(order) for f in features if f.level == "event"}
    mask = pa.array(enough)
    keys = keys.filter(mask)
    tasks = {
        "key": keys,
        "events": pa.array(np.minimum(counts[enough], config.max_events)),
        "first": pa.array(first[enough]),
    }
    users, given = of[RowKind.TASK], of[RowKind.GIVEN]
    row = _rows_of(keys, users, "the user table")
    _count(skipped, "rows of the user table without events", users.num_rows - _matching(users, encoded.dictionary))
    if config.user_split.file:
        tasks["split"] = given["split"].take(_rows_of(keys, given, str(config.user_split.file)))
        _count(skipped, "rows of the split file without events", given.num_rows - _matching(given, encoded.dictionary))
    else:
        tasks["split"] = users["split"].take(row)
    tasks |= {f"task:{f.name}": users[f"task:{f.name}"].take(row) for f in features if f.level == "task"}
    return Grouped(pa.table(tasks), pa.table(columns), items, skipped)


def _partition(keys: pa.ChunkedArray, partitions: int) -> pa.Array:
    encoded = _whole(keys).dictionary_encode()
    of_key = (hash_text(encoded.dictionary, "partition") % np.uint64(partitions)).astype(np.int32)
    return pa.array(of_key[encoded.indices.to_numpy()])


def _first_times(events: pa.Table) -> pa.Table:
    found = (
        pa.table({"item": events["item"], "first": events["timestamp"]}).group_by("item").aggregate([("first", "min")])
    )
    return found.select(["item", "first_min"]).rename_columns(["item", "first"])


def _rows_of(keys: pa.Array, table: pa.Table, name: str) -> pa.Array:
    """For each key its row in a table, null where it has none."""
    column = _whole(table["key"])
    if len(pc.unique(column)) != len(column):
        counts = pc.value_counts(column)
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0].as_py()
        raise SourceError("A key has two rows.", where=name, got=twice, remedy="Keep one row a key.")
    return pc.index_in(keys, value_set=column)


def _matching(table: pa.Table, keys: pa.Array) -> int:
    return int(pc.sum(pc.is_in(table["key"], value_set=keys)).as_py() or 0)


def _count(skipped: dict[str, int], reason: str, number: int) -> None:
    if number:
        skipped[reason] = skipped.get(reason, 0) + number


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise SourceError(
            f"A column is missing: {name}.",
            where="the user table",
            got=", ".join(table.column_names),
            remedy="Check `prepare.user_split.column` and `prepare.features`.",
        )
    return table[name]


def _conformed(columns: dict[str, pa.Array | pa.ChunkedArray], n: int, schema: pa.Schema) -> pa.Table:
    return pa.table(
        [columns[f.name].cast(f.type) if f.name in columns else pa.nulls(n, f.type) for f in schema], schema=schema
    )


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
