"""One partition's rows as tasks. Pure functions over Arrow tables: no Ray."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from metatrain.config import FeatureSource, PrepareConfig
from metatrain.data.hashing import hash_text
from metatrain.data.prepare_items import ItemIndex
from metatrain.data.prepare_pieces import Gathered
from metatrain.data.prepare_sort import grouped_order
from metatrain.errors import SourceError


@dataclass(frozen=True)
class Grouped:
    """One partition: its tasks, their events behind one another, and what was left out."""

    tasks: pa.Table  # key, events (int64: how many), first (int64: time of the first), split, title, task:NAME
    events: pa.Table  # item (int32: catalogue row), label, timestamp, event:NAME
    skipped: dict[str, int]


def group(rows: Gathered, index: ItemIndex, config: PrepareConfig, features: tuple[FeatureSource, ...]) -> Grouped:
    """A partition's rows as tasks. Events are in time order, ties in the log's; tasks are in the order of a hash.

    Raises:
        SourceError: A user has two rows in the user table or the split file.
    """
    task = config.task  # "user", or "item": what stands for users here
    skipped: dict[str, int] = {}
    events = rows.events
    times = events["timestamp"].to_numpy()
    encoded = _whole(events["key"]).dictionary_encode()
    # A dictionary's order is that of first appearance in this partition's rows; a hash's is the key's own.
    place = np.lexsort(
        (pc.rank(encoded.dictionary, tiebreaker="first").to_numpy(), hash_text(encoded.dictionary, "order"))
    )
    rank = np.empty(len(place), dtype=np.int64)
    rank[place] = np.arange(len(place))
    keys, user = encoded.dictionary.take(pa.array(place)), rank[encoded.indices.to_numpy()]
    held = np.bincount(user, minlength=len(keys))
    order = grouped_order(user, times)
    first = times[order[np.cumsum(held) - held]] if len(order) else np.zeros(0, np.int64)
    counts = held.copy()
    whose = pc.index_in(_whole(rows.left_out["key"]), value_set=keys).to_numpy(zero_copy_only=False)
    np.add.at(counts, whose, rows.left_out["left_out"].to_numpy())
    np.minimum.at(first, whose, rows.left_out["first"].to_numpy())

    from_end = np.repeat(np.cumsum(held), held) - np.arange(len(order))  # 1 for a user's last event
    enough = counts >= config.min_events
    kept = (from_end <= config.max_events) & np.repeat(enough, held)
    _count(skipped, f"{task}s with fewer than {config.min_events} events", int((~enough).sum()))
    _count(skipped, f"events of {task}s with fewer than {config.min_events}", int(counts[~enough].sum()))
    _count(
        skipped,
        f"oldest events beyond {config.max_events} of {'a user' if task == 'user' else 'an item'}",
        int(np.maximum(counts[enough] - config.max_events, 0).sum()),
    )

    order = pa.array(order if kept.all() else order[kept])
    columns = {name: events[name].take(order) for name in ("label", "timestamp")}
    columns["item"] = pa.chunked_array([index.rows(_whole(events["item"].take(order)))])
    columns |= {f"event:{f.name}": events[f"event:{f.name}"].take(order) for f in features if f.level == "event"}
    mask = pa.array(enough)
    keys = keys.filter(mask)
    tasks = {
        "key": keys,
        "events": pa.array(np.minimum(counts[enough], config.max_events)),
        "first": pa.array(first[enough]),
    }
    users, given = rows.users, rows.given
    row = _rows_of(keys, users, f"the {task} table")
    _count(skipped, f"rows of the {task} table without events", users.num_rows - _matching(users, encoded.dictionary))
    if config.user_split.file:
        tasks["split"] = given["split"].take(_rows_of(keys, given, str(config.user_split.file)))
        _count(skipped, "rows of the split file without events", given.num_rows - _matching(given, encoded.dictionary))
    else:
        tasks["split"] = users["split"].take(row)
    if "title" in users.column_names:
        tasks["title"] = users["title"].take(row)
    tasks |= {f"task:{f.name}": users[f"task:{f.name}"].take(row) for f in features if f.level == "task"}
    return Grouped(pa.table(tasks), pa.table(columns), skipped)


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


def _whole(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
