"""Training over quarantined shards, in one process without Ray: found in mid-run, gone on from the last checkpoint.

tests/faults/test_bad_shards.py does the same through Ray.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from metatrain import storage
from metatrain.checkpoint import committed_steps, read_marker
from metatrain.config import Config, DataConfig, to_yaml
from metatrain.data.batch import TaskBatch
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.quarantine import BadShards
from metatrain.data.reader import BatchReader
from metatrain.errors import ShardError
from metatrain.train import worker
from metatrain.train.audit import audit
from metatrain.train.worker import QUARANTINED, Seat
from tests.data.tiny_dataset import write_tiny_dataset
from tests.distributed.ranks import run_ranks
from tests.faults.test_bad_shards import garble, late_row_group, make_recipe
from tests.train.runs import assert_equal_states, curve, final_state

pytestmark = pytest.mark.timeout(300)


class _Stream:
    """A `TaskStream` that reads in this process."""

    def __init__(
        self,
        dataset_url: str,
        data: DataConfig,
        *,
        seed: int,
        lanes: Sequence[int],
        features: Sequence[str] | None,
        quarantined: Sequence[str],
        **_: Any,
    ) -> None:
        self._lanes = lanes
        self._reader = BatchReader.from_config(
            dataset_url,
            data,
            Split.TRAIN,
            ItemSet.EXISTING,
            data.episode,
            seed,
            features=features,
            quarantined=quarantined,
        )
        self.steps, self.close = self._reader.steps, self._reader.close

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[TaskBatch]:
        for step in range(start_step, self.steps(epoch)):
            yield self._reader.read(epoch, step, self._lanes)

    def __getattr__(self, name: str) -> Any:
        return 0  # what a stream counts


def _train(rank: int, world_size: int, config: Config) -> ShardError | None:
    worker.TaskStream = _Stream
    try:
        worker.train(config, Seat(rank, world_size, torch.device("cpu"), lambda message: None))
    except ShardError as error:
        return error
    return None


def train(config: Config) -> None:
    """As `launch`, but for Ray."""
    storage.write_atomic(storage.join(config.run_url, "config.yaml"), to_yaml(config))
    shards = BadShards(config.run_url, config.data, lambda: max(committed_steps(config.run_url), default=0))

    def attempt() -> None:
        [error] = run_ranks(_train, 1, config)
        if error is not None:
            raise error

    shards.spared(attempt)


def test_a_run_goes_on_without_the_shard_and_does_so_again_bit_for_bit(tmp_path: Path):
    url, whole = str(tmp_path / "dataset"), str(tmp_path / "whole")
    write_tiny_dataset(url, shards=16, users=480, validation=20)
    shutil.copytree(url, whole)
    config = make_recipe(url, tmp_path, "found", bad_shards="quarantine")
    shard, group, steps = late_row_group(url, config)
    garble(url, shard, group)
    train(config)
    [entry] = BadShards(config.run_url, config.data, lambda: 0).quarantine().shards
    assert (entry.path, entry.tasks, entry.events) == (shard.path, shard.tasks, shard.events)
    # Found when its window was wanted, and not before: the run went on from a checkpoint.
    assert 0 < entry.since_step < steps
    assert read_marker(config.run_url, committed_steps(config.run_url)[-1]).loop[QUARANTINED] == [shard.path]
    report = audit(config.run_url)
    assert report.exactly_once, str(report)
    assert report.whole_epochs == [0, 1]

    # Again, from the list alone, over a dataset that is whole: steps before with the shard, those after without it.
    again = make_recipe(whole, tmp_path, "again", bad_shards="stop")
    train(again.model_copy(update={"train": again.train.model_copy(update={"max_steps": entry.since_step})}))
    shutil.copy(Path(config.run_url) / "quarantine.json", again.run_url)
    train(again)
    assert_equal_states(final_state(config), final_state(again))
    assert curve(again, "learning/loss_after") == curve(config, "learning/loss_after")


def test_by_default_the_run_stops_with_the_shards_name(tmp_path: Path):
    url = str(tmp_path / "dataset")
    write_tiny_dataset(url, shards=16, users=480, validation=20)
    config = make_recipe(url, tmp_path, "stops")
    shard, group, _ = late_row_group(url, config)
    garble(url, shard, group)
    with pytest.raises(ShardError, match="cannot be read") as caught:
        train(config)
    assert caught.value.path == shard.path
    assert not (Path(config.run_url) / "quarantine.json").exists()
