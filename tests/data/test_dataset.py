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


def test_a_dataset_survives_pickling(tiny_dataset: Callable[..., str]):
    dataset = TaskDataset.open(tiny_dataset())
    again = pickle.loads(pickle.dumps(dataset))
    assert (again.url, again.manifest, again.fingerprint) == (dataset.url, dataset.manifest, dataset.fingerprint)


def test_a_fingerprint_is_of_the_content_alone(tiny_dataset: Callable[..., str]):
    manifest = TaskDataset.open(tiny_dataset()).manifest
    for told in (
        {"prepared_with": {"metatrain": "9.9", "config": {"path": "/elsewhere"}, "notes": ["from a cache"]}},
        {"facts": {"ratings": "/elsewhere/u.data"}, "name": "other"},
        {"shards": manifest.shards[::-1]},
    ):
        assert manifest.model_copy(update=told).fingerprint == manifest.fingerprint
    shard = manifest.shards[0].model_copy(update={"sha256": "0" * 64})
    vocabularies = manifest.vocabularies_sha256
    for held in (
        {"shards": (shard, *manifest.shards[1:])},
        {"shards": manifest.shards[1:]},
        {"catalogue_sha256": "0" * 64},
        {"vocabularies_sha256": vocabularies | {"word": vocabularies["zip"]}},
        {"schema_": manifest.schema_.model_copy(update={"label_mean": 2.0})},
    ):
        assert manifest.model_copy(update=held).fingerprint != manifest.fingerprint


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


def test_a_changed_or_missing_vocabulary_is_refused(tiny_dataset: Callable[..., str]):
    url = tiny_dataset(fresh=True)
    path, other = (Path(url) / "vocabularies" / f"{table}.parquet" for table in ("word", "zip"))
    path.write_bytes(other.read_bytes())  # as readable as the right one
    with pytest.raises(DatasetError, match="vocabulary is not the one of this manifest") as error:
        TaskDataset.open(url).vocabulary("word")
    assert error.value.where == str(path)
    path.unlink()
    with pytest.raises(DatasetError, match="missing"):
        TaskDataset.open(url).vocabulary("word")


def test_a_table_that_is_not_there_is_refused(tiny_dataset: Callable[..., str]):
    with pytest.raises(DatasetError, match="no such table"):
        TaskDataset.open(tiny_dataset()).vocabulary("nothing")


def test_no_manifest_is_no_dataset(tmp_path: Path):
    with pytest.raises(DatasetError, match="no manifest"):
        TaskDataset.open(str(tmp_path))
