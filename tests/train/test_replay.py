"""The step that a run ended on, replayed by one process: what it names, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from metatrain import storage
from metatrain.cli import main
from metatrain.config import Config, to_yaml
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.reader import BatchReader
from metatrain.errors import CheckpointError, TrainingError
from metatrain.model.build import build_model
from metatrain.model.sharding import distribute
from metatrain.train import not_finite
from metatrain.train.guard import Guard
from metatrain.train.not_finite import BadStep, coordinates
from metatrain.train.outer import DenseOptimizer
from metatrain.train.replay import replay
from metatrain.train.step import OuterLoop
from tests.train.bad_dataset import write_bad_dataset
from tests.train.runs import recipe

KEY = "user17"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that ended on a bad step without a checkpoint before it, as a worker leaves it."""
    folder = tmp_path_factory.mktemp("replay")
    write_bad_dataset(str(folder / "dataset"), KEY, users=80)
    config = recipe(str(folder / "dataset"), str(folder / "runs"), "bad")
    storage.write_atomic(storage.join(config.run_url, "config.yaml"), to_yaml(config))
    dataset = TaskDataset.open(config.data.dataset)
    bad = BadStep(
        total=_first_bad(config, dataset),
        epoch=0,
        step=0,
        found=20,
        checkpoint=None,
        seed=config.train.seed,
        lanes=config.data.lanes,
        tasks_per_step=config.data.tasks_per_step,
        world_size=2,
        dataset=dataset.url,
        fingerprint=dataset.fingerprint,
    )
    reader = _reader(config, dataset)
    epoch, step = coordinates(bad.total, [reader.steps(epoch) for epoch in range(config.train.epochs)])
    not_finite.keep(config.run_url, bad.model_copy(update={"epoch": epoch, "step": step}))
    return config


def _reader(config: Config, dataset: TaskDataset) -> BatchReader:
    return BatchReader.from_config(dataset, config.data, Split.TRAIN, ItemSet.EXISTING, config.data.episode, 0)


def _first_bad(config: Config, dataset: TaskDataset) -> int:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        distributed = distribute(build_model(dataset.schema, config, tables_device="meta"), config.train.optimizer)
        optimizer = DenseOptimizer(distributed.dense_parameters(), config.train.optimizer)
        guard, reader = Guard(config.train, torch.device("cpu")), _reader(config, dataset)
        loop = OuterLoop(distributed, optimizer, config, 20, 1, guard=guard)
        for step in range(reader.steps(0)):
            loop.step(reader.read(0, step, range(config.data.lanes)).tensors(), step)
        first = guard.first_bad()
        assert first is not None
        return first
    finally:
        dist.destroy_process_group()


def test_a_replay_names_the_task_and_what_is_first_not_finite(run: Config) -> None:
    seen = replay(run.run_url)
    assert seen.tasks == [KEY]
    assert seen.first is not None
    assert seen.first.what == "losses before adaptation, their sum"
    labels: Any = next(found for found in seen.found if found.what == "batch: labels")
    assert (labels.not_finite, labels.most) == (0, pytest.approx(3e38))
    assert [line.step for line in seen.lines] == list(range(1, seen.bad.total + 2))
    assert not dist.is_initialized()
    text = seen.text()
    assert f"its tasks: {KEY}" in text
    assert "first not finite: losses before adaptation" in text


def test_the_command_prints_it(run: Config, capsys: pytest.CaptureFixture[str]) -> None:
    main(["replay", run.run_url, "--format", "json"])
    assert json.loads(capsys.readouterr().out)["tasks"] == [KEY]


def test_what_cannot_be_replayed_is_refused(run: Config, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nothing to replay"):
        replay(str(tmp_path))
    bad = not_finite.read(run.run_url)
    for change, error, words in (
        ({"checkpoint": 3}, CheckpointError, "not there any more"),
        ({"lanes": 2}, TrainingError, "batches are others"),
        ({"fingerprint": "another"}, TrainingError, "batches are others"),
    ):
        other = storage.join(str(tmp_path), "other")
        storage.write_atomic(storage.join(other, "config.yaml"), to_yaml(run))
        not_finite.keep(other, bad.model_copy(update=change))
        with pytest.raises(error, match=words):
            replay(other)
