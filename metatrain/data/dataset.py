"""TaskDataset: a prepared dataset opened for reading. The manifest is checked now, all else when it is asked for.

Whatever is read is checked against the manifest: a catalogue or a vocabulary that was changed or cut is refused,
never used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from metatrain import storage
from metatrain.data.batch import Column
from metatrain.data.columns import alike, cut, feature_column, stored_type
from metatrain.data.manifest import Manifest, read_manifest
from metatrain.data.parquet import read_parquet
from metatrain.data.schema import Level, Schema
from metatrain.errors import DatasetError

CATALOGUE = "catalogue.parquet"


@dataclass(frozen=True)
class Catalogue:
    """All items, one a row; a row's number is the item's id in the shards. I items.

    `features` holds each item feature's column: ids [I], `Ragged` over I rows, numbers [I] or [I, width].
    """

    new: np.ndarray  # bool [I]
    features: dict[str, Column]
    training_events: np.ndarray  # int64 [I]
    _index: pa.Array = field(repr=False)  # keys
    _titles: pa.Array = field(repr=False)

    # Only those who show items need their texts as objects, which take ten times the memory.
    @cached_property
    def keys(self) -> np.ndarray:
        """Keys: str objects [I]."""
        return self._index.to_numpy(zero_copy_only=False)

    @cached_property
    def titles(self) -> np.ndarray:
        """Titles: str objects or None [I]."""
        return self._titles.to_numpy(zero_copy_only=False)

    def __len__(self) -> int:
        """Number of items, I."""
        return len(self._index)

    def rows_of(self, keys: Sequence[str] | np.ndarray) -> np.ndarray:
        """Catalogue rows of item keys: int64 [n], -1 where an item is unknown."""
        wanted = pa.array([str(k) for k in keys], type=pa.string())
        return pc.fill_null(pc.index_in(wanted, value_set=self._index), -1).to_numpy().astype(np.int64)


class TaskDataset:
    """A task dataset at a URL. Picklable; holds no open file."""

    def __init__(self, url: str, manifest: Manifest) -> None:
        self.url, self.manifest = url, manifest

    @classmethod
    def open(cls, url: str) -> TaskDataset:
        """Opens a dataset.

        Raises:
            DatasetError: No dataset there, not one of ours, or of another version.
        """
        place = storage.absolute(url)
        return cls(place, read_manifest(place))

    def __reduce__(self):
        return TaskDataset, (self.url, self.manifest)

    @cached_property
    def fingerprint(self) -> str:
        """The identity of the content (see `Manifest.fingerprint`)."""
        return self.manifest.fingerprint

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
        table = self._table("catalogue", CATALOGUE, self.manifest.catalogue_sha256)
        level = self.schema.of(Level.ITEM)
        types = {
            "key": pa.string(),
            "title": pa.string(),
            "new": pa.bool_(),
            "training_events": pa.int64(),
            **{f"item:{f.name}": stored_type(f) for f in level},
        }
        columns = self._columns(table, types, path)
        features: dict[str, Column] = {}
        name = "key"
        try:
            for name in ("key", "new", "training_events"):
                if columns[name].null_count:
                    raise ValueError("values without nulls were expected")
            for f in level:
                name = f"item:{f.name}"
                features[f.name] = cut(feature_column(columns[name], f), 0, table.num_rows)
        except ValueError as error:
            raise self._wrong(f"column {name} of {path}", str(error)) from error
        if table.num_rows != self.manifest.items:
            raise self._wrong(path, f"{table.num_rows} rows; the manifest says {self.manifest.items}")
        return Catalogue(
            new=columns["new"].to_numpy(zero_copy_only=False),
            features=features,
            training_events=columns["training_events"].to_numpy(),
            _index=columns["key"],
            _titles=columns["title"],
        )

    def vocabulary(self, table: str) -> list[str]:
        """The values of an embedding table, by id from 1 on; empty for a table of hash buckets.

        Raises:
            DatasetError: No feature uses such a table, or its file is missing, or not that of the manifest.
        """
        features = [f for f in self.schema.features if f.table == table]
        if not features:
            known = sorted({str(f.table) for f in self.schema.features if f.table})
            raise DatasetError(
                "The dataset has no such table.", where=self.url, got=table, remedy=f"Tables: {', '.join(known)}."
            )
        if features[0].buckets:
            return []
        file = f"vocabularies/{table}.parquet"
        path = storage.join(self.url, file)
        found = self._table("vocabulary", file, self.manifest.vocabularies_sha256.get(table))
        values = self._columns(found, {"value": pa.string()}, path)["value"]
        if values.null_count or len(values) >= (features[0].rows or 0):
            wrong = f"{len(values)} values, {values.null_count} of them null, for {features[0].rows} rows"
            raise self._wrong(path, wrong)
        return values.to_pylist()

    def _columns(self, table: pa.Table, types: dict[str, pa.DataType], path: str) -> dict[str, pa.Array]:
        """The columns, each in one piece and of its type."""
        found = {}
        for name, kind in types.items():
            if table.column_names.count(name) != 1:
                raise self._wrong(path, f"{table.column_names.count(name)} columns `{name}`")
            if not alike(table[name].type, kind):
                raise self._wrong(path, f"{name} is {table[name].type}, not {kind}")
            found[name] = pa.concat_arrays(table[name].chunks) if table[name].num_chunks else pa.array([], kind)
        return found

    def _wrong(self, where: str, got: str) -> DatasetError:
        return DatasetError(
            "A file of the dataset is not what the manifest says.",
            where=where,
            got=got,
            remedy="Prepare the dataset again.",
        )

    def _table(self, what: str, file: str, checksum: str | None) -> pa.Table:
        path = storage.join(self.url, file)
        if not storage.exists(path):
            raise DatasetError("A file of the dataset is missing.", where=path, remedy="Prepare the dataset again.")
        data = storage.read_bytes(path)
        if (digest := hashlib.sha256(data).hexdigest()) != checksum:
            raise DatasetError(
                f"The {what} is not the one of this manifest: its checksum differs.",
                where=path,
                got=f"sha256 {digest}, expected {checksum}",
                remedy="Prepare the dataset again.",
            )
        try:
            return read_parquet(data)
        except (pa.ArrowException, OSError) as error:
            raise DatasetError(
                f"A file of the dataset cannot be read as Parquet: {error}",
                where=path,
                remedy="Prepare the dataset again.",
            ) from error
