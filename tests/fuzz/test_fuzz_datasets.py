"""Mutated datasets: the manifest, the shards' bytes, and shards, catalogues and vocabularies of other columns."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metatrain.config import EpisodeConfig
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import ItemSet, Split, read_manifest
from metatrain.data.quarantine import read_quarantine
from metatrain.data.reader import iterate
from metatrain.data.verify import verify
from metatrain.errors import DatasetError, MetatrainError, ShardError
from tests.data.damage import replace_shard, shard_of
from tests.data.tiny_dataset import write_tiny_dataset
from tests.fuzz.mutations import altered, columns, fuzzed, mutated, read_or_refused

EPISODE = EpisodeConfig(support_max=5, query_max=3)


@functools.cache
def pristine(folder: str) -> dict[str, bytes]:
    """A small dataset's files, by path."""
    write_tiny_dataset(folder, users=12, items=8, validation=3, test=3, new_items=2, max_events=6, shards=2)
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return pristine(str(tmp_path_factory.mktemp("pristine")))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("mutated"))


def restored(url: str, files: dict[str, bytes]) -> str:
    shutil.rmtree(url, ignore_errors=True)
    for path, content in files.items():
        file = Path(url) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return url


def read_all(url: str) -> None:
    """Reads all tasks of all splits as training and evaluation do, and checks what must hold of whatever is read."""
    dataset = TaskDataset.open(url)
    for split in Split:
        counted = 0
        for batch in (
            iterate(dataset, split, ItemSet.ALL, EPISODE, tasks_per_batch=4) if dataset.manifest.of(split) else ()
        ):
            counted += batch.size + batch.skipped
            assert ((batch.items >= 0) & (batch.items < dataset.manifest.items)).all()
            assert len(batch.labels) == (batch.support_lengths + batch.query_lengths).sum()
            assert np.isfinite(batch.labels).all()
            batch.tensors()
        assert counted == dataset.manifest.tasks.get(split, 0), "tasks were lost in silence"


def whole(url: str) -> None:
    """Everything that a dataset is opened for."""
    dataset = TaskDataset.open(url)
    _ = dataset.catalogue
    for table in {str(f.table) for f in dataset.schema.features if f.embedded}:
        dataset.vocabulary(table)
    read_all(url)


@fuzzed(60)
@given(data=st.data())
def test_a_mutated_manifest_text(files: dict[str, bytes], url: str, data: st.DataObject):
    restored(url, files)
    (Path(url) / "manifest.json").write_bytes(data.draw(mutated(files["manifest.json"])))
    read_or_refused(lambda: whole(url), DatasetError)
    read_or_refused(lambda: verify(url, progress=False).table(), DatasetError)


@fuzzed(60)
@given(data=st.data())
def test_an_altered_manifest(files: dict[str, bytes], url: str, data: st.DataObject):
    restored(url, files)
    changed = data.draw(altered(json.loads(files["manifest.json"])))
    (Path(url) / "manifest.json").write_text(json.dumps(changed))
    read_or_refused(lambda: whole(url), DatasetError)
    read_or_refused(lambda: verify(url, progress=False).table(), DatasetError)


@fuzzed(60)
@given(data=st.data())
def test_any_changed_byte_of_any_file_is_found_by_verify(files: dict[str, bytes], url: str, data: st.DataObject):
    restored(url, files)
    path = data.draw(st.sampled_from(sorted(set(files) - {"manifest.json"})))
    content = data.draw(mutated(files[path]))
    (Path(url) / path).write_bytes(content)
    found = verify(url, progress=False)
    assert found.whole == (content == files[path])
    assert {file.path for file in found.files if file.error} == ({path} if content != files[path] else set())


@fuzzed(80)
@given(data=st.data(), fits=st.booleans())
def test_mutated_shards_are_read_or_refused(files: dict[str, bytes], url: str, data: st.DataObject, fits: bool):
    """`fits`: size and checksum in the manifest are those of the mutated file."""
    restored(url, files)
    shard, path = shard_of(url)
    content = data.draw(mutated(files[shard.path]))
    if fits:
        replace_shard(url, shard, content)
        read_or_refused(lambda: verify(url, progress=False).table(), DatasetError)
    else:
        path.write_bytes(content)
    read_or_refused(lambda: read_all(url), ShardError)


def with_odd_column(data: st.DataObject, table: pa.Table) -> pa.Table:
    """One column of another type or other values, there twice, or not there."""
    name = data.draw(st.sampled_from(table.column_names))
    place = table.column_names.index(name)
    change = data.draw(st.sampled_from(["values", "values", "values", "type", "type", "drop", "twice", "rename"]))
    if change == "drop":
        return table.drop_columns([name])
    if change == "twice":
        return table.append_column(name, table[name])
    if change == "rename":
        return table.rename_columns({name: data.draw(st.sampled_from([*table.column_names, "", "x"]))})
    kind = table.schema.field(name).type if change == "values" else None
    return table.set_column(place, name, data.draw(columns(table.num_rows, kind)))


def as_parquet(table: pa.Table, row_group: int) -> bytes | None:
    """The file, or None where Parquet knows no such type."""
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(table, sink, row_group_size=row_group, write_page_checksum=True)
    except (pa.ArrowException, NotImplementedError):
        return None
    return sink.getvalue().to_pybytes()


@fuzzed(120)
@given(data=st.data())
def test_shards_with_other_columns(files: dict[str, bytes], url: str, data: st.DataObject):
    restored(url, files)
    shard, path = shard_of(url)
    content = as_parquet(with_odd_column(data, pq.read_table(path)), shard.row_groups[0])
    if content is None:
        return
    replace_shard(url, shard, content)
    read_or_refused(lambda: read_all(url), ShardError)
    found = verify(url, progress=False)
    found.table()
    assert set(found.bad_shards) <= {shard.path}
    if found.whole:
        read_all(url)


@fuzzed(120)
@given(data=st.data())
def test_catalogues_and_vocabularies_with_other_columns(files: dict[str, bytes], url: str, data: st.DataObject):
    restored(url, files)
    name = data.draw(st.sampled_from(["catalogue.parquet", "vocabularies/word.parquet", "vocabularies/item.parquet"]))
    content = as_parquet(with_odd_column(data, pq.read_table(Path(url) / name)), 100)
    if content is None:
        return
    (Path(url) / name).write_bytes(content)
    raw: dict[str, Any] = json.loads(files["manifest.json"])
    checksum = hashlib.sha256(content).hexdigest()
    if name == "catalogue.parquet":
        raw["catalogue_sha256"] = checksum
    else:
        raw["vocabularies_sha256"][Path(name).stem] = checksum
    (Path(url) / "manifest.json").write_text(json.dumps(raw))
    read_or_refused(lambda: whole(url), DatasetError)
    verify(url, progress=False).table()


@fuzzed(60)
@given(data=st.data())
def test_lists_of_quarantined_shards(files: dict[str, bytes], url: str, data: st.DataObject):
    restored(url, files)
    dataset = TaskDataset.open(url)
    shard = read_manifest(url).of(Split.TRAIN)[0]
    entry = {"path": shard.path, "why": "x", "tasks": 1, "events": 2, "since_step": 3, "found": "now"}
    document = {"version": 1, "dataset": dataset.fingerprint, "shards": [entry]}
    changed = json.dumps(data.draw(altered(document))).encode()
    (Path(url) / "quarantine.json").write_bytes(data.draw(st.just(changed) | mutated(changed)))
    found = read_or_refused(lambda: read_quarantine(url, dataset), MetatrainError)
    if found is not None:
        assert found.paths <= {s.path for s in dataset.manifest.of(Split.TRAIN)}
        found.told()
        found.markdown()
