"""TaskDataset: a prepared dataset opened for reading. The manifest is checked now, all else when it is asked for.

Whatever is read is checked against the manifest: a catalogue that was changed or cut is refused, never used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from metatrain import storage
from metatrain.data.batch import Column, Ragged
from metatrain.data.manifest import FILE, Manifest, read_manifest
from metatrain.data.schema import Kind, Level, Schema
from metatrain.errors import DatasetError

CATALOGUE = "catalogue.parquet"


@dataclass(frozen=True)
class Catalogue:
    """All items, one a row; a row's number is the item's id in the shards. I items.

    `features` holds each item feature's column: ids [I], `Ragged` over I rows, numbers [I] or [I, width].
    """

    keys: np.ndarray  # str objects [I]
    titles: np.ndarray  # str objects or None [I]
    new: np.ndarray  # bool [I]
    features: dict[str, Column]
    training_events: np.ndarray  # int64 [I]
    _index: pa.Array = field(repr=False)

    def __len__(self) -> int:
        """Number of items, I."""
        return len(self.keys)

    def rows_of(self, keys: Sequence[str] | np.ndarray) -> np.ndarray:
        """Catalogue rows of item keys: int64 [n], -1 where an item is unknown."""
        wanted = pa.array([str(k) for k in keys], type=pa.string())
        return pc.fill_null(pc.index_in(wanted, value_set=self._index), -1).to_numpy().astype(np.int64)


class TaskDataset:
    """A task dataset at a URL. Picklable; holds no open file."""

    def __init__(self, url: str, manifest: Manifest, fingerprint: str) -> None:
        self.url, self.manifest, self.fingerprint = url, manifest, fingerprint

    @classmethod
    def open(cls, url: str) -> TaskDataset:
        """Opens a dataset.

        Raises:
            DatasetError: No dataset there, not one of ours, or of another version.
        """
        place = storage.absolute(url)
        manifest = read_manifest(place)
        digest = hashlib.sha256(storage.read_bytes(storage.join(place, FILE))).hexdigest()
        return cls(place, manifest, digest)

    def __reduce__(self):
        return TaskDataset, (self.url, self.manifest, self.fingerprint)

    @property
    def schema(self) -> Schema:
        """Features and labels."""
        return self.manifest.schema_

    @cached_property
    def catalogue(self) -> Catalogue:
        """The items, read and checked at the first use.

        Raises:
            DatasetError: The file is missing, or is not the one that the manifest was written for.
        """
        path = storage.join(self.url, CATALOGUE)
        data = self._bytes(path)
        if (digest := hashlib.sha256(data).hexdigest()) != self.manifest.catalogue_sha256:
            raise DatasetError(
                "The catalogue is not the one of this manifest: its checksum differs.",
                where=path,
                got=f"sha256 {digest}, expected {self.manifest.catalogue_sha256}",
                remedy="Prepare the dataset again.",
            )
        table = pq.read_table(pa.BufferReader(data))
        features = {f.name: column_arrays(table[f"item:{f.name}"], f.kind) for f in self.schema.of(Level.ITEM)}
        keys = table["key"].combine_chunks()
        return Catalogue(
            keys=keys.to_numpy(zero_copy_only=False),
            titles=table["title"].combine_chunks().to_numpy(zero_copy_only=False),
            new=table["new"].to_numpy(),
            features=features,
            training_events=table["training_events"].to_numpy(),
            _index=keys,
        )

    def vocabulary(self, table: str) -> list[str]:
        """The values of an embedding table, by id from 1 on; empty for a table of hash buckets.

        Raises:
            DatasetError: No feature uses such a table, or its file is missing or broken.
        """
        features = [f for f in self.schema.features if f.table == table]
        if not features:
            known = sorted({str(f.table) for f in self.schema.features if f.table})
            raise DatasetError(
                "The dataset has no such table.", where=self.url, got=table, remedy=f"Tables: {', '.join(known)}."
            )
        if features[0].buckets:
            return []
        path = storage.join(self.url, "vocabularies", f"{table}.parquet")
        try:
            return pq.read_table(pa.BufferReader(self._bytes(path)))["value"].to_pylist()
        except (pa.ArrowInvalid, OSError, KeyError) as error:
            raise DatasetError(
                f"The vocabulary is broken: {error}.", where=path, remedy="Prepare the dataset again."
            ) from error

    def _bytes(self, path: str) -> bytes:
        if not storage.exists(path):
            raise DatasetError("A file of the dataset is missing.", where=path, remedy="Prepare the dataset again.")
        return storage.read_bytes(path)


def column_arrays(column: pa.Array | pa.ChunkedArray, kind: Kind) -> Column:
    """A stored feature column, one value a row, as numpy arrays."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if kind is Kind.MULTI:
        return Ragged(array.flatten().to_numpy(), pc.list_value_length(array).to_numpy().astype(np.int64))
    if kind is Kind.VECTOR:
        return array.flatten().to_numpy().reshape(len(array), -1)
    return array.to_numpy()
