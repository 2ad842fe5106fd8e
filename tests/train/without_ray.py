"""Training without Ray: the worker's loop on gloo ranks of `run_ranks`, each of which reads its own batches."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from metatrain import storage
from metatrain.config import Config, DataConfig, to_yaml
from metatrain.data.batch import TaskBatch
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.reader import BatchReader
from metatrain.errors import ShardError
from metatrain.train import worker
from metatrain.train.worker import Seat
from tests.distributed.ranks import run_ranks


class OwnStream:
    """The batches of a `TaskStream`, read in this process."""

    restarts = 0
    wait_seconds = 0.0

    def __init__(
        self,
        url: str,
        data: DataConfig,
        *,
        seed: int,
        lanes: Sequence[int],
        features: Sequence[str] | None,
        quarantined: Collection[str],
        **_: Any,
    ) -> None:
        self._lanes = lanes
        self._reader = BatchReader.from_config(
            url, data, Split.TRAIN, ItemSet.EXISTING, data.episode, seed, features=features, quarantined=quarantined
        )
        self.steps, self.close = self._reader.steps, self._reader.close

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[TaskBatch]:
        for step in range(start_step, self.steps(epoch)):
            yield self._reader.read(epoch, step, self._lanes)


def train_on_ranks(config: Config, world_size: int) -> None:
    """As `launch`, but for Ray.

    Raises:
        ShardError: Of the first rank that found a bad one.
    """
    storage.write_atomic(storage.join(config.run_url, "config.yaml"), to_yaml(config))
    for error in run_ranks(_train, world_size, config, seconds=300):
        if error is not None:
            raise error


def _train(rank: int, world_size: int, config: Config) -> ShardError | None:
    worker.TaskStream = OwnStream
    try:
        worker.train(config, Seat(rank, world_size, torch.device("cpu"), lambda message: None))
    except ShardError as error:
        return error
    return None
