"""`metatrain verify`: a whole dataset is found whole; any damage is found, and every bad file named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from metatrain.cli import main
from metatrain.data.manifest import Split, read_manifest
from metatrain.data.verify import verify
from metatrain.errors import DatasetError, ShardError
from tests.data.damage import edit_manifest, flip_byte, rewrite_shard, shard_of, with_values

Make = Callable[..., str]


def test_a_whole_dataset_is_found_whole(tiny_dataset: Make, capsys: pytest.CaptureFixture[str]):
    url = tiny_dataset()
    found = verify(url)
    assert found.whole
    manifest = read_manifest(url)
    assert {file.path for file in found.files} >= {shard.path for shard in manifest.shards}
    assert found.bytes == sum(shard.bytes for shard in manifest.shards)
    main(["verify", url])
    shown = capsys.readouterr().out
    assert f"{manifest.tasks[Split.TRAIN]}" in shown
    assert "whole: " in shown


def test_every_bad_file_is_named_and_the_command_exits_with_2(tiny_dataset: Make, capsys: pytest.CaptureFixture[str]):
    url = tiny_dataset(fresh=True)
    paths = [shard_of(url, split, 0)[1] for split in Split] + [shard_of(url)[1]]
    flip_byte(paths[0], 0.999)  # the last bytes: behind all pages
    os.truncate(paths[1], 100)
    paths[2].unlink()
    flip_byte(paths[3], 0.5)
    flip_byte(Path(url) / "catalogue.parquet")
    flip_byte(Path(url) / "vocabularies" / "zip.parquet")
    (Path(url) / "shards" / "train" / "stray.parquet").write_bytes(b"")
    found = verify(url)
    assert sorted(found.bad_shards) == sorted(str(path.relative_to(url)) for path in paths)
    assert {file.path for file in found.files if file.error} == {
        *found.bad_shards,
        "catalogue.parquet",
        "vocabularies/zip.parquet",
    }
    assert found.strangers == ("shards/train/stray.parquet",)
    with pytest.raises(SystemExit) as ended:
        main(["verify", url])
    assert ended.value.code == 2
    shown = capsys.readouterr().out
    assert all(str(path) in shown for path in paths)
    assert "6 to mend" in shown


def swapped(rows: list[list[int]]) -> list[list[int]]:
    return [sorted(row, reverse=True) for row in rows]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_values("timestamps", swapped), "not in time order"),
        (with_values("items", lambda rows: [[-1] * len(r) for r in rows]), "catalogue rows"),
        (with_values("labels", lambda rows: [r[1:] for r in rows]), "differ in length"),
        (with_values("key", lambda rows: [None] * len(rows)), "keys without nulls"),
        (with_values("task:age", lambda rows: [float("inf")] * len(rows)), "finite"),
        (with_values("event:gaze", lambda rows: [[[float("nan")] * 4] * len(r) for r in rows]), "finite"),
        (with_values("event:shade", lambda rows: [[9] * len(r) for r in rows]), "ids from 0 to"),
        (with_values("items", list, pa.list_(pa.int64())), "lacks columns"),
        (with_values("key", lambda rows: list(range(len(rows))), pa.int64()), "lacks columns"),
        (lambda t: t.append_column("labels", t["labels"]), "lacks columns"),
        (lambda t: t.drop_columns(["event:tags"]), "lacks columns"),
        (lambda t: t.slice(1), "row groups are not those"),
    ],
)
def test_a_shard_whose_checksum_fits_is_still_read(tiny_dataset: Make, change: Callable, says: str):
    url = tiny_dataset(fresh=True)
    shard, path = shard_of(url)
    rewrite_shard(url, shard, change)
    found = verify(url)
    [error] = [file.error for file in found.files if file.error]
    assert isinstance(error, ShardError)
    assert (error.path, says in error.what) == (shard.path, True)
    assert str(path) in str(error.where)
    assert found.bad_shards == (shard.path,)


def test_a_number_of_events_that_is_not_the_manifests_is_found(tiny_dataset: Make):
    url = tiny_dataset(fresh=True)
    shard, _ = shard_of(url)

    def fewer(table: pa.Table) -> pa.Table:
        for name in table.column_names:
            if pa.types.is_list(table.schema.field(name).type) and name != "task:likes":
                table = with_values(name, lambda rows: [r[:-1] for r in rows])(table)
        return table

    rewrite_shard(url, shard, fewer)
    [error] = [file.error for file in verify(url).files if file.error]
    assert "another number of events" in error.what


@pytest.mark.parametrize("split", [Split.TRAIN, Split.TEST])
def test_a_key_that_is_there_twice_is_found_in_one_split_and_in_two(tiny_dataset: Make, split: Split):
    url = tiny_dataset(fresh=True)
    first, _ = shard_of(url, Split.TRAIN, 0)
    other, path = shard_of(url, split, 1)
    rewrite_shard(url, other, with_values("key", lambda keys: ["user0", *keys[1:]]))
    found = verify(url)
    assert all(file.error is None for file in found.files)
    [error] = found.errors
    assert not found.whole
    assert ("several splits" in error.what) is (split is Split.TEST)
    assert "'user0'" in str(error.got)
    assert first.path in str(error.where)
    assert str(path) in str(error.where)


def test_a_catalogue_that_is_not_the_manifests_is_found(tiny_dataset: Make):
    url = tiny_dataset(fresh=True)
    edit_manifest(url, lambda raw: raw.update(new_items=raw["new_items"] + 1))
    [error] = [file.error for file in verify(url).files if file.error]
    assert "new items" in str(error.got)
    # Then what the shards' ids are inside of is the manifest's number, and no shard is blamed for the catalogue.
    edit_manifest(url, lambda raw: raw.update(items=raw["items"] + 1))
    found = verify(url)
    assert found.bad_shards == ()
    assert not found.whole


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw["shards"][0].update(path="../../etc/passwd"), "leaves the dataset's folder"),
        (lambda raw: raw["shards"][0].update(path="/etc/passwd"), "leaves the dataset's folder"),
        (lambda raw: raw["shards"][0].update(path="s3://elsewhere/x"), "leaves the dataset's folder"),
        (lambda raw: raw["shards"][0].update(path="shards/train/..\\..\\x"), "leaves the dataset's folder"),
        (lambda raw: raw["shards"].append(raw["shards"][0]), "listed twice"),
        (lambda raw: raw["shards"].pop(), "the split"),
        (lambda raw: raw["shards"][0].update(row_groups=[-1]), "greater than or equal to 0"),
        (lambda raw: raw["shards"][0].update(events=10**30), "less than"),
        (lambda raw: raw["schema_"].update(label_mean=None), "valid number"),
        (lambda raw: raw["schema_"]["features"][0].update(table="../../item"), "cannot be a file's name"),
    ],
)
def test_a_manifest_that_lies_is_refused(tiny_dataset: Make, change: Callable, says: str):
    url = tiny_dataset(fresh=True)
    edit_manifest(url, change)
    with pytest.raises(DatasetError, match="manifest cannot be used") as caught:
        verify(url)
    assert says in str(caught.value)
    assert "manifest.json" in str(caught.value.where)


def test_a_manifest_with_a_key_twice_is_refused(tiny_dataset: Make):
    url = tiny_dataset(fresh=True)
    path = Path(url) / "manifest.json"
    path.write_text(path.read_text().replace('"new_items"', '"items": 999, "new_items"'))
    with pytest.raises(DatasetError, match="'items' is given twice"):
        verify(url)


def test_a_shard_without_a_row_is_whole(tiny_dataset: Make):
    assert verify(tiny_dataset(test=0)).whole
