"""Readers that die or that read broken shards, in the middle of an epoch."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from typing import Any

import pytest
import ray

from metatrain.config import DataConfig, EpisodeConfig
from metatrain.data import stream as streaming
from metatrain.data.batch import TaskBatches
from metatrain.data.manifest import ItemSet, Split, read_manifest
from metatrain.data.reader import BatchReader
from metatrain.data.stream import TaskStream
from metatrain.errors import DatasetError, ShardError, TrainingError
from tests.data.tiny_dataset import plain, write_tiny_dataset

DATA = DataConfig(
    episode=EpisodeConfig(cut="uniform", support_max=5, query_max=3),
    lanes=4,
    tasks_per_step=8,
    shuffle_row_groups=2,
    prefetch=3,
    readers_per_worker=2,
)


pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("tiny"))
    write_tiny_dataset(folder)
    return folder


def undisturbed(url: str, epoch: int) -> list[Any]:
    with contextlib.closing(
        BatchReader.from_config(url, DATA, Split.TRAIN, ItemSet.EXISTING, DATA.episode, 3)
    ) as reader:
        return [plain(reader.read(epoch, step, range(DATA.lanes))) for step in range(reader.steps(epoch))]


def test_readers_that_die_are_replaced_where_the_trainer_stands(url: str, caplog):
    with contextlib.closing(TaskStream(url, DATA, seed=3, num_cpus=0.1)) as stream:
        found = []
        for epoch in range(2):
            for step, batch in enumerate(stream.batches(epoch)):
                found.append(plain(batch))
                if (epoch, step) == (0, 0):
                    os.kill(stream.pids()[1], signal.SIGKILL)
                elif (epoch, step) == (0, 4):
                    ray.kill(stream._actors[0])
                elif (epoch, step) == (1, 2):
                    for pid in stream.pids():
                        os.kill(pid, signal.SIGKILL)
        assert found == undisturbed(url, 0) + undisturbed(url, 1)
        assert stream.restarts == 4
        assert len([r for r in caplog.records if "another one goes on at epoch" in r.getMessage()]) == 4


def test_readers_that_keep_dying_end_the_run(url: str, monkeypatch):
    class Doomed(streaming.TaskReader):  # here, so that Ray sends it by value: the actor cannot import this file
        def read(self, epoch: int, step: int, steps: int, lanes: Sequence[int]) -> tuple[TaskBatches, float]:
            if step >= 1:
                os._exit(1)
            return super().read(epoch, step, steps, lanes)

    monkeypatch.setattr(streaming, "TaskReader", Doomed)
    monkeypatch.setattr(streaming, "DEATHS_IN_A_ROW", 2)
    # Without a step ahead: the reader is not asked for the deadly step before the first one has arrived.
    one = DATA.model_copy(update={"readers_per_worker": 1, "prefetch": 1})
    with contextlib.closing(TaskStream(url, one, seed=3, num_cpus=0.1)) as stream:
        batches = stream.batches(0)
        next(batches)
        with pytest.raises(TrainingError, match="keep dying") as caught:
            next(batches)
        assert stream.restarts == 2
        assert "epoch 0, step 1, lanes [0, 1, 2, 3]" in str(caught.value)
        assert caught.value.remedy


def test_a_reader_that_cannot_be_made_ends_the_run_with_its_reason(url: str, monkeypatch):
    class Stillborn(streaming.TaskReader):
        def __init__(self, *_: object) -> None:
            raise RuntimeError("no module of that name on this node")

    monkeypatch.setattr(streaming, "TaskReader", Stillborn)
    monkeypatch.setattr(streaming, "DEATHS_IN_A_ROW", 1)
    with pytest.raises(TrainingError, match="keep dying") as caught:
        TaskStream(url, DATA, seed=3, lanes=[0], num_cpus=0.1)
    assert "no module of that name" in str(caught.value)


def test_a_shard_garbled_in_mid_run_is_an_error_of_its_own_and_no_death(tmp_path):
    url = str(tmp_path)
    write_tiny_dataset(url)
    with contextlib.closing(TaskStream(url, DATA, seed=3, lanes=[0], num_cpus=0.1)) as stream:
        for shard in read_manifest(url).of(Split.TRAIN):
            path = os.path.join(url, shard.path)
            with open(path, "r+b") as file:
                content = file.read()
                file.seek(0)
                file.write(bytes(byte ^ 0xFF for byte in content))
        with pytest.raises(DatasetError, match="cannot be read as Parquet") as caught:
            list(stream.batches(0))
        assert type(caught.value) is ShardError
        assert caught.value.where
        assert caught.value.where.startswith(url)
        assert stream.restarts == 0


def test_a_truncated_shard_fails_before_a_reader_starts(tmp_path):
    url = str(tmp_path)
    write_tiny_dataset(url)
    path = os.path.join(url, read_manifest(url).of(Split.TRAIN)[0].path)
    os.truncate(path, 100)
    with pytest.raises(DatasetError, match="truncated") as caught:
        TaskStream(url, DATA, seed=3)
    assert caught.value.where == path


def test_a_reader_without_room_is_an_error_and_no_silent_wait(url: str, monkeypatch):
    monkeypatch.setattr(streaming, "START_SECONDS", 3.0)
    with pytest.raises(TrainingError, match="no CPU left") as caught:
        TaskStream(url, DATA, seed=3, num_cpus=64)
    assert "64 CPUs wanted" in str(caught.value)
