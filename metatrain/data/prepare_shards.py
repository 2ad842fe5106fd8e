"""A partition's way from staged to written: split, counted, encoded, published as one Parquet file a split. No Ray.

Between the shuffle and the shards a partition waits on disk, in OUT/staging: statistics need all partitions before
any can be encoded, and what waits on disk takes no memory.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from metatrain import storage
from metatrain.config import FeatureSource, PrepareConfig
from metatrain.data.manifest import Shard, Split
from metatrain.data.prepare_encode import Moments, Statistics, as_lists, encode
from metatrain.data.prepare_rows import Grouped
from metatrain.data.prepare_splits import LEFT_OUT, SPLITS, Thresholds, user_splits
from metatrain.data.schema import Level, Schema

STAGING = "staging"


@dataclass(frozen=True)
class Staged:
    """One staged partition."""

    url: str
    number: int
    events: int
    tasks: int
    skipped: dict[str, int] = field(default_factory=dict)

    def _path(self, table: str) -> str:
        return storage.join(self.url, STAGING, f"{self.number:05d}.{table}.arrow")

    def table(self, name: str) -> pa.Table:
        """Reads `tasks`, `events` or `items`."""
        with storage.open_file(self._path(name)) as file, pa.ipc.open_file(file) as reader:
            return reader.read_all()

    def first_times(self) -> np.ndarray:
        """When each of its users came."""
        with storage.open_file(self._path("tasks")) as file, pa.ipc.open_file(file) as reader:
            column = reader.schema.get_field_index("first")
            return reader.read_all().column(column).to_numpy()

    @staticmethod
    def write(url: str, number: int, grouped: Grouped) -> Staged:
        """Stages a partition."""
        staged = Staged(url, number, grouped.events.num_rows, grouped.tasks.num_rows, grouped.skipped)
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        for name in ("tasks", "events", "items"):
            table: pa.Table = getattr(grouped, name).combine_chunks()
            sink = pa.BufferOutputStream()
            with pa.ipc.new_file(sink, table.schema, options=options) as writer:
                writer.write_table(table)
            storage.write_atomic(staged._path(name), sink.getvalue().to_pybytes())
        return staged


@dataclass(frozen=True)
class ItemIndex:
    """The catalogue's keys and which of them are new, as every partition needs them."""

    keys: pa.Array
    new: np.ndarray

    def rows(self, items: pa.ChunkedArray) -> np.ndarray:
        """Catalogue rows of a staged item column: int32 [n]."""
        encoded = items.combine_chunks()
        encoded = encoded.chunk(0) if isinstance(encoded, pa.ChunkedArray) else encoded
        if not len(encoded):
            return np.zeros(0, dtype=np.int32)
        row = pc.index_in(encoded.dictionary, value_set=self.keys).to_numpy(zero_copy_only=False).astype(np.int32)
        return row[encoded.indices.to_numpy()]


@dataclass
class Counts:
    """What one partition, or all, say before encoding."""

    statistics: Statistics = field(default_factory=Statistics)
    labels: Moments = field(default_factory=Moments)
    training_events: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # by catalogue row
    tasks: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    left_out: int = 0

    def merge(self, other: Counts) -> None:
        """Adds another partition's."""
        self.statistics.merge(other.statistics)
        self.labels = self.labels.with_(other.labels)
        self.training_events = self.training_events + other.training_events
        self.left_out += other.left_out
        for split, n in other.tasks.items():
            self.tasks[split] += n


@dataclass(frozen=True)
class Encoding:
    """All that encoding needs, the same for every partition."""

    schema: Schema
    vocabulary: dict[str, pa.Array]
    row_group_tasks: int


def count(
    staged: Staged,
    index: ItemIndex,
    config: PrepareConfig,
    features: tuple[FeatureSource, ...],
    thresholds: Thresholds | None,
) -> Counts:
    """Statistics of a partition: of training users, and of their events on existing items, alone."""
    tasks, events = staged.table("tasks"), staged.table("events")
    code = user_splits(tasks, config.user_split, thresholds)
    result = Counts(left_out=int((code == LEFT_OUT).sum()))
    for i, split in enumerate(SPLITS):
        result.tasks[split] = int((code == i).sum())
    training = code == SPLITS.index(Split.TRAIN)
    rows = index.rows(events["item"])
    taught = np.repeat(training, tasks["events"].to_numpy()) & ~index.new[rows]
    result.training_events = np.bincount(rows[taught], minlength=len(index.keys))
    result.labels = Moments.of(events["label"].to_numpy()[taught])
    for f in features:
        table, mask = (tasks, training) if f.level == "task" else (events, taught)
        if f.level != "item":
            result.statistics.add(f, table[f"{f.level}:{f.name}"].filter(pa.array(mask)))
    return result


def write_shards(
    staged: Staged, index: ItemIndex, config: PrepareConfig, thresholds: Thresholds | None, encoding: Encoding
) -> list[Shard]:
    """Encodes a partition and publishes a file for each split that has tasks in it."""
    tasks, events = staged.table("tasks"), staged.table("events")
    code = user_splits(tasks, config.user_split, thresholds)
    lengths = tasks["events"].to_numpy()
    items = index.rows(events["item"])
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
            "items": as_lists(pa.array(items[event_mask]), offsets),
            "labels": as_lists(picked["label"].combine_chunks(), offsets),
            "timestamps": as_lists(picked["timestamp"].combine_chunks(), offsets),
        }
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
    storage.write_atomic(storage.join(url, path), data)
    groups = tuple(min(group, table.num_rows - start) for start in range(0, table.num_rows, group))
    return Shard(
        path=path,
        split=split,
        row_groups=groups,
        events=events,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def parquet_bytes(table: pa.Table, row_group: int | None = None) -> bytes:
    """A table as a Parquet file, in row groups of exactly `row_group` rows but the last; each page with a checksum."""
    sink = pa.BufferOutputStream()
    size = row_group or max(table.num_rows, 1)
    # Without the checksums most flipped bits decode to other values, and would be trained on.
    pq.write_table(table, sink, row_group_size=size, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()
