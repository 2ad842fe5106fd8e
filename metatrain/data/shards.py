"""The shards of one split, read by row group: what is read is what the manifest says, or an error names the file."""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from metatrain import storage
from metatrain.data.manifest import Manifest, Shard
from metatrain.errors import DatasetError

Result = TypeVar("Result")

#: Parquet files kept open: each holds its parsed footer, which grows with its row groups.
OPEN_FILES = 32

#: What mends a shard.
REMEDY = "Copy the shard again from where it was made, or prepare the dataset again."


class Shards:
    """The row groups of these shards, numbered through in their order.

    Not safe for several threads at once.
    """

    def __init__(self, dataset_url: str, shards: Sequence[Shard]) -> None:
        self.url, self._shards = dataset_url, tuple(shards)
        self._local = storage.is_local(dataset_url)
        #: Tasks in each row group: int64 [G].
        self.row_groups = row_groups(shards)
        self._first_group = np.cumsum([0, *(len(s.row_groups) for s in shards)])
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()

    def read(self, row_groups: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """These columns of these row groups in this order, every column in one chunk.

        Raises:
            DatasetError: A shard that is missing, broken, or not as the manifest says.
        """
        shard_of = np.searchsorted(self._first_group, row_groups, side="right") - 1
        tables = []
        for shard, pairs in itertools.groupby(zip(shard_of.tolist(), row_groups.tolist(), strict=True), lambda p: p[0]):
            inside = [group - int(self._first_group[shard]) for _, group in pairs]
            tables.append(self._read(shard, inside, list(columns)))
        try:
            return pa.concat_tables(tables).combine_chunks()
        except pa.ArrowException as error:
            raise DatasetError(f"Shards differ in their columns: {error}", where=self.url, remedy=REMEDY) from error

    def place(self, row_groups: np.ndarray) -> str:
        """The files of these row groups, for messages."""
        shard_of = np.unique(np.searchsorted(self._first_group, row_groups, side="right") - 1)
        return ", ".join(storage.join(self.url, self._shards[s].path) for s in shard_of)

    def close(self) -> None:
        """Closes the open files."""
        while self._open:
            self._open.popitem()[1].close(force=True)

    def _read(self, shard: int, inside: list[int], columns: list[str]) -> pa.Table:
        path = storage.join(self.url, self._shards[shard].path)

        def read() -> pa.Table:
            # One thread: a node runs many readers, and each read-ahead works beside its own trainer.
            return self._file(shard).read_row_groups(inside, columns=columns, use_threads=False)

        table = _attempt(path, read, self._local)
        absent = sorted(set(columns).difference(table.column_names))
        if absent:
            raise DatasetError(
                "A shard lacks columns that the schema has.", where=path, got=", ".join(absent), remedy=REMEDY
            )
        return table

    def _file(self, shard: int) -> pq.ParquetFile:
        known = self._open.get(shard)
        if known is not None:
            self._open.move_to_end(shard)
            return known
        path = storage.join(self.url, self._shards[shard].path)
        # Reading a whole row group in one request pays where requests are slow; from a disk its threads only cost.
        file = pq.ParquetFile(_source(path), page_checksum_verification=True, pre_buffer=not self._local)
        found = tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
        if found != self._shards[shard].row_groups:
            file.close(force=True)
            raise DatasetError(
                "A shard's row groups are not those of the manifest.",
                where=path,
                got=f"{len(found)} row groups with {sum(found)} tasks; the manifest says "
                f"{len(self._shards[shard].row_groups)} with {self._shards[shard].tasks}",
                remedy=REMEDY,
            )
        self._open[shard] = file
        if len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)[1].close(force=True)
        return file


def row_groups(shards: Sequence[Shard]) -> np.ndarray:
    """Tasks in each row group of these shards: what an `EpochPlan` is made from: int64 [G]."""
    return np.asarray(list(itertools.chain.from_iterable(s.row_groups for s in shards)), np.int64)


def check_sizes(dataset_url: str, shards: Sequence[Shard]) -> None:
    """Compares the size of each shard with the manifest: one listing a folder, no file is opened.

    Raises:
        DatasetError: A shard is missing, or of another size (truncated, or of another preparation).
    """
    for folder, inside in itertools.groupby(sorted(shards, key=lambda s: s.path), lambda s: s.path.rpartition("/")[0]):
        sizes = storage.file_sizes(storage.join(dataset_url, folder))
        for shard in inside:
            path = storage.join(dataset_url, shard.path)
            found = sizes.get(shard.path.rpartition("/")[2])
            if found is None:
                raise DatasetError("A shard of the manifest is missing.", where=path, remedy=REMEDY)
            if found != shard.bytes:
                raise DatasetError(
                    "A shard is truncated or was changed: its size is not the manifest's.",
                    where=path,
                    got=f"{found} bytes; the manifest says {shard.bytes}",
                    remedy=REMEDY,
                )


def verify_shards(dataset_url: str, manifest: Manifest) -> int:
    """Reads every shard of every split and compares its checksum with the manifest. Returns the bytes read.

    Raises:
        DatasetError: A shard is missing, of another size, or its content has changed.
    """
    check_sizes(dataset_url, manifest.shards)
    for shard in manifest.shards:
        path = storage.join(dataset_url, shard.path)
        digest = hashlib.sha256()
        with storage.open_file(path) as file:
            while block := file.read(1 << 22):
                digest.update(block)
        if digest.hexdigest() != shard.sha256:
            raise DatasetError(
                "A shard's content has changed since it was prepared: its checksum is not the manifest's.",
                where=path,
                got=digest.hexdigest(),
                remedy=REMEDY,
            )
    return sum(shard.bytes for shard in manifest.shards)


def _source(path: str) -> object:
    """A local path as it is, so that pyarrow reads it outside of Python; else a file of the URL's store."""
    return storage.filesystem(path)[1] if storage.is_local(path) else storage.open_file(path)


def _attempt(path: str, call: Callable[[], Result], local: bool) -> Result:
    """Tries a read, again where the store may have failed; what stays broken is the shard's fault."""
    try:
        # pyarrow reports broken bytes as OSError too, which on a disk no other try can mend.
        return call() if local else storage.retried(call)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DatasetError(f"A shard cannot be read as Parquet: {error}", where=path, remedy=REMEDY) from error
