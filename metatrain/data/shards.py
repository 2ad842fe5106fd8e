"""The shards of one split, read by row group: what is read is what the manifest says, or an error names the file."""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from metatrain import storage
from metatrain.data.columns import alike
from metatrain.data.manifest import Shard
from metatrain.data.parquet import open_parquet
from metatrain.errors import ShardError
from metatrain.retries import retried

Result = TypeVar("Result")

#: Parquet files kept open, and the row groups that their footers may have together: parsed, one takes some 6 KiB.
#: Opening a file again for each row group would be a tenth of a reader's time.
OPEN_FILES, OPEN_ROW_GROUPS = 256, 2048

#: What mends a shard.
REMEDY = "Copy the shard again from where it was made, or prepare the dataset again."

_BLOCK_BYTES = 1 << 22


class Shards:
    """The row groups of these shards, numbered through in their order.

    Not safe for several threads at once.

    Args:
        dataset_url: The dataset.
        shards: Its shards, or some of them.
        types: What columns must be; those of other names may be anything.
    """

    def __init__(
        self, dataset_url: str, shards: Sequence[Shard], types: Mapping[str, pa.DataType] | None = None
    ) -> None:
        self.url, self._shards, self._types = dataset_url, tuple(shards), dict(types or {})
        self._local = storage.is_local(dataset_url)
        #: Tasks in each row group: int64 [G].
        self.row_groups = row_groups(shards)
        self._first_group = np.cumsum([0, *(len(s.row_groups) for s in shards)])
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        #: Columns → the schema that the last table of them was to have: one that has it needs no closer look.
        self._right: dict[tuple[str, ...], pa.Schema] = {}

    def read(self, row_groups: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """These columns of these row groups in this order, every column in one chunk.

        Raises:
            ShardError: A shard that is missing, broken, or not as the manifest says.
        """
        pairs = zip(self._shard_of(row_groups).tolist(), row_groups.tolist(), strict=True)
        tables = []
        for shard, own in itertools.groupby(pairs, lambda pair: pair[0]):
            inside = [group - int(self._first_group[shard]) for _, group in own]
            tables.append(self._read(shard, inside, tuple(columns)))
        return pa.concat_tables(tables).combine_chunks()

    def by_shard(self, row_groups: np.ndarray) -> Iterator[tuple[Shard, np.ndarray]]:
        """These row groups, shard by shard."""
        shard_of = self._shard_of(row_groups)
        for shard in np.unique(shard_of):
            yield self._shards[shard], row_groups[shard_of == shard]

    def in_shards(self, paths: Collection[str]) -> np.ndarray:
        """Which row groups lie in the shards of these paths: bool [G]."""
        chosen = np.array([shard.path in paths for shard in self._shards], bool)
        return np.repeat(chosen, np.diff(self._first_group))

    def close(self) -> None:
        """Closes the open files."""
        while self._open:
            self._open.popitem()[1].close(force=True)

    def _shard_of(self, row_groups: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first_group, row_groups, side="right") - 1

    def _read(self, shard: int, inside: list[int], columns: tuple[str, ...]) -> pa.Table:
        def read() -> pa.Table:
            # One thread: a node runs many readers, and each read-ahead works beside its own trainer.
            return self._file(shard).read_row_groups(inside, columns=columns, use_threads=False)

        table = self._attempt(shard, read)
        wanted = self._right.get(columns)
        if wanted is not None and table.schema.equals(wanted):
            return table
        wanted = self._right[columns] = self._wanted(shard, table.schema, columns)
        table = table.select(columns)
        # Writers differ in how they name a list's values, and whether they may be null: only the types count.
        return table if table.schema.equals(wanted) else self._attempt(shard, lambda: table.cast(wanted))

    def _wanted(self, shard: int, found: pa.Schema, columns: tuple[str, ...]) -> pa.Schema:
        """What a table of this schema is to be made to.

        Raises:
            ShardError: It lacks columns, or they are of other types.
        """
        wrong = ""
        if sorted(found.names) != sorted(columns):
            absent = sorted(set(columns).difference(found.names))
            wrong = f"it lacks {', '.join(absent)}" if absent else "a name has several columns"
        else:
            wanted = pa.schema([(name, self._types.get(name, found.field(name).type)) for name in columns])
            for name in columns:
                if not alike(found.field(name).type, wanted.field(name).type):
                    wrong = f"{name} is {found.field(name).type}, not {wanted.field(name).type}"
        if wrong:
            raise shard_error(self.url, self._shards[shard], "A shard lacks columns that the schema has.", got=wrong)
        return wanted

    def _file(self, shard: int) -> pq.ParquetFile:
        known = self._open.get(shard)
        if known is not None:
            self._open.move_to_end(shard)
            return known
        path = storage.join(self.url, self._shards[shard].path)
        # Reading a whole row group in one request pays where requests are slow; from a disk its threads only cost.
        file = open_parquet(_source(path), page_checksum_verification=True, pre_buffer=not self._local)
        found = tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
        if found != self._shards[shard].row_groups:
            file.close(force=True)
            raise shard_error(
                self.url,
                self._shards[shard],
                "A shard's row groups are not those of the manifest.",
                got=f"{len(found)} row groups with {sum(found)} tasks; the manifest says "
                f"{len(self._shards[shard].row_groups)} with {self._shards[shard].tasks}",
            )
        self._open[shard] = file
        groups = sum(len(self._shards[number].row_groups) for number in self._open)
        while len(self._open) > 1 and (len(self._open) > OPEN_FILES or groups > OPEN_ROW_GROUPS):
            oldest, passed = self._open.popitem(last=False)
            groups -= len(self._shards[oldest].row_groups)
            passed.close(force=True)
        return file

    def _attempt(self, shard: int, call: Callable[[], Result]) -> Result:
        """Tries a read, again where the store may have failed; what stays broken is the shard's fault."""
        try:
            # pyarrow reports broken bytes as OSError too, which on a disk no other try can mend.
            return call() if self._local else retried(call)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            reason = str(error) or type(error).__name__
            what = f"A shard cannot be read as Parquet: {reason}"
            raise shard_error(self.url, self._shards[shard], what) from error


def shard_error(dataset_url: str, shard: Shard, what: str, got: object = None, column: str = "") -> ShardError:
    """What is wrong with a shard, or with a column of it."""
    url = storage.join(dataset_url, shard.path)
    return ShardError(
        what, path=shard.path, where=f"column {column} of {url}" if column else url, got=got, remedy=REMEDY
    )


def row_groups(shards: Sequence[Shard]) -> np.ndarray:
    """Tasks in each row group of these shards: what an `EpochPlan` is made from: int64 [G]."""
    return np.asarray(list(itertools.chain.from_iterable(s.row_groups for s in shards)), np.int64)


def wrong_sizes(dataset_url: str, shards: Sequence[Shard]) -> Iterator[ShardError]:
    """Shards that are missing or of another size than the manifest says: one listing a folder, no file is opened."""
    for folder, inside in itertools.groupby(sorted(shards, key=lambda s: s.path), lambda s: s.path.rpartition("/")[0]):
        sizes = storage.file_sizes(storage.join(dataset_url, folder))
        for shard in inside:
            found = sizes.get(shard.path.rpartition("/")[2])
            if found is None:
                yield shard_error(dataset_url, shard, "A shard of the manifest is missing.")
            elif found != shard.bytes:
                yield shard_error(
                    dataset_url,
                    shard,
                    "A shard is truncated or was changed: its size is not the manifest's.",
                    got=f"{found} bytes; the manifest says {shard.bytes}",
                )


def check_sizes(dataset_url: str, shards: Sequence[Shard]) -> None:
    """Compares the size of each shard with the manifest.

    Raises:
        ShardError: A shard is missing, or of another size (truncated, or of another preparation).
    """
    for error in wrong_sizes(dataset_url, shards):
        raise error


def check_content(dataset_url: str, shard: Shard, told: Callable[[int], object] = lambda _: None) -> None:
    """Reads a shard and compares its checksum with the manifest.

    Args:
        dataset_url: The dataset.
        shard: Which shard.
        told: Is told of bytes as they are read.

    Raises:
        ShardError: The content has changed since the shard was prepared.
    """
    digest = hashlib.sha256()
    with storage.open_file(storage.join(dataset_url, shard.path)) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            told(len(block))
    if digest.hexdigest() != shard.sha256:
        raise shard_error(
            dataset_url,
            shard,
            "A shard's content has changed since it was prepared: its checksum is not the manifest's.",
            got=f"sha256 {digest.hexdigest()}; the manifest says {shard.sha256}",
        )


def _source(path: str) -> object:
    """A local path as it is, so that pyarrow reads it outside of Python; else a file of the URL's store."""
    return storage.filesystem(path)[1] if storage.is_local(path) else storage.open_file(path)
