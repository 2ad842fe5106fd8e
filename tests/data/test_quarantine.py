"""Quarantined shards: the plan stays, their tasks are not there, all others are as they were; the list only grows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metatrain.config import DataConfig, EpisodeConfig
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import ItemSet, Split, read_manifest
from metatrain.data.quarantine import BadShards, Quarantine, quarantine, read_quarantine
from metatrain.data.reader import BatchReader, iterate
from metatrain.errors import CheckpointError, DatasetError, ShardError, StorageError
from tests.data.damage import flip_byte, shard_of
from tests.data.tiny_dataset import plain

Make = Callable[..., str]
EPISODE = EpisodeConfig(cut="uniform", support_max=5, query_max=3)


def by_task(batch: Any) -> dict[int, Any]:
    """What a batch says of each task."""
    ends = np.cumsum(batch.support_lengths + batch.query_lengths)
    found = {}
    for i, task in enumerate(batch.tasks.tolist()):
        events = slice(int(ends[i - 1]) if i else 0, int(ends[i]))
        found[task] = (
            int(batch.support_lengths[i]),
            batch.items[batch.event_items[events]].tolist(),
            batch.labels[events].tolist(),
            float(batch.task_features["age"][i]),
            batch.event_features["hour"][events].tolist(),
        )
    return found


@settings(max_examples=25, deadline=None)
@given(
    lost=st.sets(st.integers(0, 4), max_size=4),
    window=st.integers(1, 4),
    lanes=st.sampled_from([1, 2, 4]),
    ahead=st.booleans(),
)
def test_every_other_task_is_where_it_was_and_exactly_once(
    tiny_dataset: Make, lost: set[int], window: int, lanes: int, ahead: bool
):
    url = tiny_dataset(shards=5)
    shards = read_manifest(url).of(Split.TRAIN)
    paths = [shards[number].path for number in lost]
    bounds = np.cumsum([0, *(s.tasks for s in shards)])
    gone = {task for number in lost for task in range(bounds[number], bounds[number + 1])}
    settings = {"seed": 3, "lanes_total": lanes, "tasks_per_step": 8, "window": window, "read_ahead": ahead}
    whole = BatchReader(url, Split.TRAIN, ItemSet.EXISTING, EPISODE, **settings)
    without = BatchReader(url, Split.TRAIN, ItemSet.EXISTING, EPISODE, **settings, quarantined=paths)
    for epoch in range(2):
        seen: list[int] = []
        planned = 0
        assert without.steps(epoch) == whole.steps(epoch)
        for step in range(whole.steps(epoch)):
            before, after = (reader.read(epoch, step, range(lanes)) for reader in (whole, without))
            assert after.tasks.tolist() == [task for task in before.tasks.tolist() if task not in gone]
            assert by_task(after) == {task: told for task, told in by_task(before).items() if task not in gone}
            assert after.size + after.skipped == before.size + before.skipped
            seen += after.tasks.tolist()
            planned += after.size + after.skipped
        assert len(seen) == len(set(seen))
        assert planned == sum(s.tasks for s in shards)
    whole.close()
    without.close()


def test_without_a_quarantined_shard_nothing_of_it_is_read(tiny_dataset: Make):
    url = tiny_dataset(fresh=True)
    shard, path = shard_of(url)
    expected = [plain(b) for b in iterate(url, Split.TRAIN, ItemSet.ALL, EPISODE, quarantined=[shard.path])]
    path.unlink()
    assert [plain(b) for b in iterate(url, Split.TRAIN, ItemSet.ALL, EPISODE, quarantined=[shard.path])] == expected
    with pytest.raises(ShardError, match="missing"):
        list(iterate(url, Split.TRAIN, ItemSet.ALL, EPISODE))
    everything = [s.path for s in read_manifest(url).of(Split.TRAIN)]
    with pytest.raises(DatasetError, match="All shards of this split are quarantined"):
        list(iterate(url, Split.TRAIN, ItemSet.ALL, EPISODE, quarantined=everything))


def data(url: str, **options: Any) -> DataConfig:
    return DataConfig(dataset=url, **{"bad_shards": "quarantine", "quarantine_share": 0.5, **options})


def error_of(url: str, path: str) -> ShardError:
    return ShardError("It broke.", path=path, where=f"{url}/{path}", remedy="Mend it.")


def test_a_bad_shard_is_listed_with_what_is_lost(tiny_dataset: Make, tmp_path: Path):
    url, run = tiny_dataset(fresh=True, shards=6), str(tmp_path / "run")
    shard, path = shard_of(url)
    flip_byte(path)
    found = quarantine(run, data(url), error_of(url, shard.path), 20)
    assert read_quarantine(run, TaskDataset.open(url)) == found
    [entry] = json.loads((tmp_path / "run" / "quarantine.json").read_text())["shards"]
    assert (entry["path"], entry["tasks"], entry["events"]) == (shard.path, shard.tasks, shard.events)
    assert entry["since_step"] == 20
    assert "checksum" in entry["why"]
    assert f"{shard.tasks:,} tasks with {shard.events:,} events" in found.told()
    assert shard.path in found.markdown()
    with pytest.raises(ShardError, match="It broke"):  # met again, though it is on the list
        quarantine(run, data(url), error_of(url, shard.path), 30)


def test_what_must_not_be_quarantined_ends_the_run(tiny_dataset: Make, tmp_path: Path):
    url, run = tiny_dataset(fresh=True), str(tmp_path)
    shard, path = shard_of(url)
    with pytest.raises(StorageError, match="is whole"):
        quarantine(run, data(url), error_of(url, shard.path), 0)
    flip_byte(path)
    with pytest.raises(ShardError) as stopped:
        quarantine(run, data(url, bad_shards="stop"), error_of(url, shard.path), 0)
    assert "data.bad_shards: quarantine" in str(stopped.value)
    with pytest.raises(ShardError, match=r"more than `data.quarantine_share` \(0.1\) allows"):
        quarantine(run, data(url, quarantine_share=0.1), error_of(url, shard.path), 0)
    held_out, other = shard_of(url, Split.VALIDATION)
    flip_byte(other)
    with pytest.raises(ShardError, match="It broke"):
        quarantine(run, data(url), error_of(url, held_out.path), 0)
    assert not list(tmp_path.iterdir())


def test_a_run_is_started_again_without_each_bad_shard(tiny_dataset: Make, tmp_path: Path):
    url = tiny_dataset(fresh=True, shards=6)
    run, bad = str(tmp_path), [shard_of(url, number=n) for n in (1, 4)]
    for _, path in bad:
        flip_byte(path)
    shards = BadShards(run, data(url), lambda: 7)
    tries = []

    def train() -> int:
        known = shards.quarantine().paths
        tries.append(len(known))
        return sum(b.size for b in iterate(url, Split.TRAIN, ItemSet.ALL, EPISODE, quarantined=known))

    assert shards.spared(train) > 0
    assert tries == [0, 1, 2]
    assert {(s.path, s.since_step) for s in shards.quarantine().shards} == {(s.path, 7) for s, _ in bad}


def test_checksums_find_every_bad_shard_at_the_start_and_sizes_what_is_short(tiny_dataset: Make, tmp_path: Path):
    url = tiny_dataset(fresh=True, shards=6)
    bad = [shard_of(url, number=n) for n in (0, 3)]
    for _, path in bad:
        flip_byte(path)
    by_size = BadShards(str(tmp_path / "sizes"), data(url), lambda: 0)
    by_size.check({Split.TRAIN, Split.VALIDATION})
    assert not by_size.quarantine().shards
    by_content = BadShards(str(tmp_path / "checksums"), data(url, verify="checksums"), lambda: 0)
    by_content.check({Split.TRAIN, Split.VALIDATION})
    assert by_content.quarantine().paths == {shard.path for shard, _ in bad}
    bad[0][1].write_bytes(b"short")
    by_size.check({Split.TRAIN})
    assert by_size.quarantine().paths == {bad[0][0].path}
    flip_byte(shard_of(url, Split.VALIDATION)[1])
    with pytest.raises(ShardError, match="checksum"):
        by_content.check({Split.VALIDATION})


def test_the_list_may_only_grow():
    shards = [{"path": p, "why": "", "tasks": 1, "events": 1, "since_step": 0, "found": ""} for p in "ab"]
    found = Quarantine.model_validate({"shards": shards})
    found.check_grown(["a"], "run")
    with pytest.raises(CheckpointError, match="may only grow") as caught:
        found.check_grown(["c", "a"], "run")
    assert caught.value.got == "c"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read"),
        ('{"version": 1, "version": 1}', "given twice"),
        ('{"version": 2}', "cannot be used"),
        ('{"version": 1, "dataset": "other", "shards": []}', "another dataset"),
        ('{"version": 1, "shards": [{"path": "x"}]}', "cannot be used"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(tiny_dataset: Make, tmp_path: Path, content: str, says: str):
    (tmp_path / "quarantine.json").write_text(content)
    with pytest.raises(DatasetError, match=says) as caught:
        read_quarantine(str(tmp_path), TaskDataset.open(tiny_dataset()))
    assert "quarantine.json" in str(caught.value.where)
    assert caught.value.remedy


def test_a_list_names_training_shards_alone(tiny_dataset: Make, tmp_path: Path):
    dataset = TaskDataset.open(tiny_dataset())
    entry = {"path": "shards/test/part-00000.parquet", "why": "", "tasks": 1, "events": 1, "since_step": 0, "found": ""}
    content = {"version": 1, "dataset": dataset.fingerprint, "shards": [entry]}
    (tmp_path / "quarantine.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match="no training shard"):
        read_quarantine(str(tmp_path), dataset)
