"""Raw rows on their way from the log's order to that of partitions of users, through files. No Ray.

A task reads a piece of the log and writes a file for each run of about `RUN_ROWS` rows: an Arrow file whose p-th
record batch holds the rows of partition p, in the log's order. Who gathers a partition reads its batch of every file.
So neither side holds more than its own rows, and a task that runs twice writes the same files twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from metatrain import storage
from metatrain.config import FeatureSource, PrepareConfig
from metatrain.data.hashing import fingerprint
from metatrain.data.prepare_rows import Reading, RowKind, read_rows, row_schema
from metatrain.data.prepare_sort import grouped_order

STAGING = "staging"
#: Rows that are partitioned at a time: bounds what the reading task holds.
RUN_ROWS = 1 << 20
#: Users are told apart by so many bits of their fingerprint to find the few that may have too many events.
_HEAVY_BITS = 16
#: The stream of fingerprints that deals users to partitions.
_PARTITION_SALT = 0x70617274


@dataclass(frozen=True)
class Run:
    """One file of partitioned rows."""

    name: str
    rows: np.ndarray  # int32 [partitions]


@dataclass(frozen=True)
class Piece:
    """What a task has made of a piece of the log."""

    kind: RowKind
    number: int
    runs: tuple[Run, ...]
    #: Users of whom this piece had too many events: what was left out of them.
    capped: tuple[Run, ...]
    #: Files of the items that the events name.
    items: tuple[str, ...]
    bad: int


@dataclass(frozen=True)
class Gathered:
    """All rows of a partition."""

    events: pa.Table  # in the log's order; items as fingerprints
    left_out: pa.Table  # of users with too many events, by piece: key, left_out (how many), first (time)
    users: pa.Table  # the user table's rows
    given: pa.Table  # the split file's rows


@dataclass(frozen=True)
class Partitioning:
    """How a log is cut: what every reading task knows."""

    url: str
    config: PrepareConfig
    features: tuple[FeatureSource, ...]
    partitions: int
    #: Of the fingerprints that stand for items: another one where two items' were the same.
    salt: int = 0

    def stage(self, reading: Reading) -> Piece:
        """Reads a piece of the log and writes its rows by partition.

        Raises:
            SourceError: What reading it raises.
        """
        runs, capped, items = [], [], []

        def flush(tables: list[pa.Table]) -> None:
            rows = pa.concat_tables(tables).combine_chunks()
            tables.clear()
            name = f"{reading.kind.value}-{reading.number:06d}-{len(runs):04d}"
            owner = fingerprint(rows["key"], _PARTITION_SALT)
            if reading.kind is RowKind.EVENT:
                rows, seen = _with_fingerprints(rows, self.salt)
                write_arrow(self._path(f"{name}.items"), [seen])
                items.append(f"{name}.items")
                rows, owner, left_out = _newest(rows, owner, self.config.max_events)
                if left_out is not None:
                    owners = fingerprint(left_out["key"], _PARTITION_SALT)
                    capped.append(self._write_partitioned(f"{name}.capped", left_out, owners))
            runs.append(self._write_partitioned(name, rows, owner))

        held, bad = [], 0
        for table, wrong in read_rows(reading, self.config, self.features):
            bad += wrong
            if table.num_rows:
                held.append(table)
            if sum(t.num_rows for t in held) >= RUN_ROWS:
                flush(held)
        if held:
            flush(held)
        return Piece(reading.kind, reading.number, tuple(runs), tuple(capped), tuple(items), bad)

    def items(self, name: str) -> pa.Table:
        """The items of a file that a `Piece` names: fingerprint, key, first (time)."""
        with open_arrow(self._path(name)) as reader:
            return reader.read_all()

    def gather(self, partition: int, pieces: Sequence[Piece]) -> Gathered:
        """A partition's rows of all pieces.

        However many events a user has, memory holds a few times `max_events` of them.
        """
        pieces = sorted(pieces, key=lambda p: p.number)  # the log's order, which settles ties of time
        events, left_out = self._events(partition, [p for p in pieces if p.kind is RowKind.EVENT])
        users, given = (
            pa.concat_tables([row_schema(kind, self.features, self.config).empty_table(), *self._rows(partition, runs)])
            for kind in (RowKind.TASK, RowKind.GIVEN)
            for runs in [[run for p in pieces if p.kind is kind for run in p.runs]]
        )
        return Gathered(events, left_out, users, given)

    def _events(self, partition: int, pieces: Sequence[Piece]) -> tuple[pa.Table, pa.Table]:
        schema = row_schema(RowKind.EVENT, self.features, self.config)
        schema = schema.set(schema.get_field_index("item"), pa.field("item", pa.uint64()))
        held, rows, room = [schema.empty_table()], 0, 2 * RUN_ROWS
        left_out = [_LEFT_OUT.empty_table(), *self._rows(partition, [run for p in pieces for run in p.capped])]
        for table in self._rows(partition, [run for p in pieces for run in p.runs]):
            held.append(table)
            rows += table.num_rows
            if rows > room:
                together = pa.concat_tables(held).combine_chunks()
                together, _, more = _newest(together, fingerprint(together["key"]), self.config.max_events)
                left_out += [] if more is None else [more]
                held, rows = [together], together.num_rows
                room = max(room, 2 * rows)
        return pa.concat_tables(held).combine_chunks(), pa.concat_tables(left_out).combine_chunks()

    def _rows(self, partition: int, runs: Sequence[Run]) -> Iterator[pa.Table]:
        for run in runs:
            if run.rows[partition]:
                with open_arrow(self._path(run.name)) as reader:
                    yield pa.Table.from_batches([reader.get_batch(partition)])

    def _path(self, name: str) -> str:
        return storage.join(self.url, STAGING, "pieces", f"{name}.arrow")

    def _write_partitioned(self, name: str, rows: pa.Table, owner: np.ndarray) -> Run:
        # Sixteen bits are sorted by radix, several times as quickly.
        number = (owner % np.uint64(self.partitions)).astype(np.uint16 if self.partitions <= 1 << 16 else np.int64)
        counts = np.bincount(number, minlength=self.partitions).astype(np.int32)
        if self.partitions > 1:
            rows = rows.take(pa.array(np.argsort(number, kind="stable")))  # stable: each partition in the log's order
        starts = np.cumsum(counts) - counts
        batches = [rows.slice(a, n) for a, n in zip(starts.tolist(), counts.tolist(), strict=True)]
        write_arrow(self._path(name), batches)
        return Run(name, counts)


#: Columns of what was left out of users with too many events.
_LEFT_OUT = pa.schema([("key", pa.string()), ("left_out", pa.int64()), ("first", pa.int64())])


def write_arrow(url: str, tables: Sequence[pa.Table]) -> None:
    """Stages tables of one schema as the record batches of an Arrow file."""
    schema = tables[0].schema

    def write() -> None:
        # Written through: held in memory, a file would double what its task holds.
        with storage.open_atomic(url) as file, pa.ipc.new_file(file, schema) as writer:
            for table in tables:
                batches = table.combine_chunks().to_batches()
                writer.write_batch(batches[0] if batches else pa.RecordBatch.from_pylist([], schema=schema))

    storage.retried(write)


def open_arrow(url: str) -> pa.ipc.RecordBatchFileReader:
    """Opens a staged file; on a disk nothing is read before it is used."""
    if storage.is_local(url):
        return pa.ipc.open_file(pa.memory_map(storage.filesystem(url)[1]))
    return pa.ipc.open_file(storage.open_file(url))


def _with_fingerprints(events: pa.Table, salt: int) -> tuple[pa.Table, pa.Table]:
    """Events with fingerprints in place of items' keys, and the items: fingerprint, key, first (time)."""
    encoded = events["item"].combine_chunks().dictionary_encode()
    marks, codes = fingerprint(encoded.dictionary, salt), encoded.indices.to_numpy()
    first = np.full(len(marks), np.iinfo(np.int64).max)
    np.minimum.at(first, codes, events["timestamp"].to_numpy())
    events = events.set_column(events.column_names.index("item"), "item", pa.array(marks[codes]))
    return events, pa.table({"fingerprint": marks, "key": encoded.dictionary, "first": first})


def _newest(events: pa.Table, marks: np.ndarray, most: int) -> tuple[pa.Table, np.ndarray, pa.Table | None]:
    """Leaves out the oldest events of users with more than `most`.

    Args:
        events: In the log's order, which stays.
        marks: Any hash of each event's user.

    Returns:
        The events that stay and their hashes; of each such user what was left out (`_LEFT_OUT`).
    """
    if len(marks) <= most:
        return events, marks, None
    # Users that share a bucket look like one with more events: it costs a look, no event.
    bucket = (marks & np.uint64((1 << _HEAVY_BITS) - 1)).astype(np.int64)
    suspects = np.flatnonzero((np.bincount(bucket) > most)[bucket])
    if not len(suspects):
        return events, marks, None
    few = events.select(["key", "timestamp"]).take(pa.array(suspects))
    encoded, times = few["key"].combine_chunks().dictionary_encode(), few["timestamp"].to_numpy()
    user = encoded.indices.to_numpy()
    counts = np.bincount(user)
    order = grouped_order(user, times)
    from_end = np.repeat(np.cumsum(counts), counts) - np.arange(len(order))
    gone = suspects[order[from_end > most]]
    if not len(gone):
        return events, marks, None
    keep = np.ones(len(marks), dtype=bool)
    keep[gone] = False
    heavy = np.flatnonzero(counts > most)
    first = times[order[np.cumsum(counts) - counts]]
    left_out = pa.table(
        [encoded.dictionary.take(pa.array(heavy)), counts[heavy] - most, first[heavy]],
        schema=_LEFT_OUT,
    )
    return events.filter(pa.array(keep)), marks[keep], left_out
