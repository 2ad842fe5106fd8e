"""A dataset opened for reading: the catalogue, the vocabularies, and what is broken is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from metatrain.data.batch import Ragged
from metatrain.data.dataset import TaskDataset
from metatrain.data.schema import Kind, Level
from metatrain.errors import DatasetError


def test_the_catalogue_holds_every_item(tiny_dataset: Callable[..., str]):
    dataset = TaskDataset.open(tiny_dataset())
    catalogue = dataset.catalogue
    assert len(catalogue) == dataset.manifest.items
    assert catalogue.new.sum() == dataset.manifest.new_items
    np.testing.assert_array_equal(catalogue.rows_of(catalogue.keys[::-1]), np.arange(len(catalogue))[::-1])
    assert catalogue.rows_of(["no such item", catalogue.keys[1]]).tolist() == [-1, 1]
    assert catalogue.rows_of([]).tolist() == []
    for f in dataset.schema.of(Level.ITEM):
        column = catalogue.features[f.name]
        if f.kind is Kind.MULTI:
            assert isinstance(column, Ragged)
            assert column.lengths.sum() == len(column.values)
            assert len(column.lengths) == len(catalogue)
        else:
            assert len(column) == len(catalogue)


def test_a_dataset_survives_pickling_and_its_fingerprint_is_the_manifests(tiny_dataset: Callable[..., str]):
    dataset = TaskDataset.open(tiny_dataset())
    again = pickle.loads(pickle.dumps(dataset))
    assert (again.url, again.manifest, again.fingerprint) == (dataset.url, dataset.manifest, dataset.fingerprint)
    other = tiny_dataset(fresh=True)
    manifest = Path(other) / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert TaskDataset.open(other).fingerprint != dataset.fingerprint


def test_a_changed_or_missing_catalogue_is_refused(tiny_dataset: Callable[..., str]):
    url = tiny_dataset(fresh=True)
    path = Path(url) / "catalogue.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(DatasetError, match="checksum differs") as error:
        _ = TaskDataset.open(url).catalogue
    assert error.value.where == str(path)
    path.unlink()
    with pytest.raises(DatasetError, match="missing"):
        _ = TaskDataset.open(url).catalogue


def test_a_table_that_is_not_there_is_refused(tiny_dataset: Callable[..., str]):
    with pytest.raises(DatasetError, match="no such table"):
        TaskDataset.open(tiny_dataset()).vocabulary("nothing")


def test_no_manifest_is_no_dataset(tmp_path: Path):
    with pytest.raises(DatasetError, match="no manifest"):
        TaskDataset.open(str(tmp_path))
