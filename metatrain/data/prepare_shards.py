"""A partition's way from staged to written: split, counted, encoded, published as one Parquet file a split. No Ray.

Between grouping and the shards a partition waits on disk, in OUT/staging: statistics need all partitions before any
can be encoded, and what waits on disk takes no memory.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from metatrain import storage
from metatrain.config import FeatureSource, PrepareConfig
from metatrain.data.manifest import Shard, Split
from metatrain.data.prepare_encode import Moments, Statistics, as_lists, encode
from metatrain.data.prepare_group import Grouped
from metatrain.data.prepare_pieces import STAGING, open_arrow, write_arrow
from metatrain.data.prepare_splits import LEFT_OUT, SPLITS, Thresholds, user_splits
from metatrain.data.schema import Level, Schema


@dataclass(frozen=True)
class Staged:
    """One staged partition."""

    url: str
    number: int
    tasks: int
    skipped: dict[str, int] = field(default_factory=dict)

    def _path(self, table: str) -> str:
        return storage.join(self.url, STAGING, f"{self.number:05d}.{table}.arrow")

    def table(self, name: str) -> pa.Table:
        """Reads `tasks` or `events`."""
        with open_arrow(self._path(name)) as reader:
            return reader.read_all()

    def first_times(self) -> np.ndarray:
        """When each of its users came."""
        return self.table("tasks")["first"].to_numpy()

    @staticmethod
    def write(url: str, number: int, grouped: Grouped) -> Staged:
        """Stages a partition."""
        staged = Staged(url, number, grouped.tasks.num_rows, grouped.skipped)
        for name in ("tasks", "events"):
            write_arrow(staged._path(name), [getattr(grouped, name)])
        return staged


@dataclass
class Counts:
    """What one partition says before encoding."""

    statistics: Statistics
    labels: Moments
    training_events: np.ndarray  # int64, by catalogue row
    tasks: dict[Split, int]
    left_out: int


class Totals:
    """What all partitions say, added in any order; it holds little of each."""

    def __init__(self, items: int) -> None:
        self.training_events = np.zeros(items, np.int64)
        self.tasks = dict.fromkeys(SPLITS, 0)
        self.left_out = 0
        self._values = Statistics()
        self._moments: dict[int, tuple[Moments, dict[str, Moments]]] = {}

    def add(self, number: int, counts: Counts) -> None:
        """Adds partition `number`."""
        self.training_events += counts.training_events
        self.left_out += counts.left_out
        for split, n in counts.tasks.items():
            self.tasks[split] += n
        self._values.merge(Statistics(values=counts.statistics.values, hashed=counts.statistics.hashed))
        self._moments[number] = (counts.labels, counts.statistics.moments)

    def statistics(self) -> tuple[Statistics, Moments]:
        """Of all partitions, and the labels' moments."""
        labels, result = Moments(), Statistics(values=self._values.values, hashed=self._values.hashed)
        for number in sorted(self._moments):  # sums of floating-point numbers depend on their order
            own, moments = self._moments[number]
            labels = labels.with_(own)
            result.merge(Statistics(moments=moments))
        return result, labels


@dataclass(frozen=True)
class Encoding:
    """All that encoding needs, the same for every partition."""

    schema: Schema
    vocabulary: dict[str, pa.Array]
    row_group_tasks: int


def count(
    tasks: pa.Table,
    events: pa.Table,
    new: np.ndarray,
    config: PrepareConfig,
    features: tuple[FeatureSource, ...],
    thresholds: Thresholds | None,
) -> Counts:
    """Statistics of a partition: of training users, and of their events on existing items, alone.

    Args:
        new: Which catalogue rows are new items.
    """
    code = user_splits(tasks, config.user_split, thresholds)
    training = code == SPLITS.index(Split.TRAIN)
    rows = events["item"].to_numpy()
    taught = np.repeat(training, tasks["events"].to_numpy()) & ~new[rows]
    statistics = Statistics()
    for f in features:
        table, mask = (tasks, training) if f.level == "task" else (events, taught)
        if f.level != "item":
            statistics.add(f, table[f"{f.level}:{f.name}"].filter(pa.array(mask)))
    return Counts(
        statistics=statistics,
        labels=Moments.of(events["label"].to_numpy()[taught]),
        training_events=np.bincount(rows[taught], minlength=len(new)),
        tasks={split: int((code == i).sum()) for i, split in enumerate(SPLITS)},
        left_out=int((code == LEFT_OUT).sum()),
    )


def write_shards(
    staged: Staged, config: PrepareConfig, thresholds: Thresholds | None, encoding: Encoding
) -> list[Shard]:
    """Encodes a partition and publishes a file for each split that has tasks in it."""
    tasks, events = staged.table("tasks"), staged.table("events")
    code = user_splits(tasks, config.user_split, thresholds)
    lengths = tasks["events"].to_numpy()
    shards = []
    for i, split in enumerate(SPLITS):
        chosen = code == i
        if not chosen.any():
            continue
        mask, event_mask = pa.array(chosen), np.repeat(chosen, lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths[chosen])])
        picked, own = events.filter(pa.array(event_mask)), tasks.filter(mask)
        columns: dict[str, pa.Array | pa.ChunkedArray] = {
            "key": own["key"],
            "items": as_lists(picked["item"].combine_chunks(), offsets),
            "labels": as_lists(picked["label"].combine_chunks(), offsets),
            "timestamps": as_lists(picked["timestamp"].combine_chunks(), offsets),
        }
        if "title" in own.column_names:
            columns["title"] = own["title"]
        for f in encoding.schema.features:
            raw = f"{f.level.value}:{f.name}"
            if f.level is Level.TASK:
                columns[raw] = encode(f, own[raw], encoding.vocabulary.get(str(f.table)))
            elif f.level is Level.EVENT:
                columns[raw] = as_lists(encode(f, picked[raw], encoding.vocabulary.get(str(f.table))), offsets)
        path = storage.join("shards", split.value, f"{staged.number:05d}.parquet")
        shards.append(_publish(staged.url, path, split, pa.table(columns), int(offsets[-1]), encoding.row_group_tasks))
    return shards


def _publish(url: str, path: str, split: Split, table: pa.Table, events: int, group: int) -> Shard:
    data = parquet_bytes(table, group)
    storage.write_atomic(storage.join(url, path), memoryview(data))
    groups = tuple(min(group, table.num_rows - start) for start in range(0, table.num_rows, group))
    return Shard(
        path=path,
        split=split,
        row_groups=groups,
        events=events,
        bytes=data.size,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def parquet_bytes(table: pa.Table, row_group: int | None = None) -> pa.Buffer:
    """A table as a Parquet file, in row groups of exactly `row_group` rows but the last; each page with a checksum."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=row_group or max(table.num_rows, 1),
        compression="zstd",
        # Ids, times and labels hardly repeat inside a row group: dictionaries take twice the time, and more room.
        use_dictionary=False,
        # Without the checksums most flipped bits decode to other values, and would be trained on.
        write_page_checksum=True,
    )
    return sink.getvalue()
