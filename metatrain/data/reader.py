"""Reads the batches of an epoch plan: `read(epoch, step, lanes)` gives the same batch whoever asks, and in any order.

A reader keeps the open shuffle windows of the lanes it reads: memory is bounded by them, whatever the number of
tasks. It has no state that the plan cannot rebuild. Between Parquet and the batch nothing loops over tasks or events.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from metatrain.config import DataConfig, EpisodeConfig
from metatrain.data.assemble import batch_from_events, concatenate_batches, features_of
from metatrain.data.batch import TaskBatch, TaskBatches
from metatrain.data.columns import stored
from metatrain.data.dataset import TaskDataset
from metatrain.data.decoded import Decoder
from metatrain.data.episodes import split_events
from metatrain.data.gather import LookUp
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.pieces import Pieces
from metatrain.data.plan import EpochPlan
from metatrain.data.schema import Level
from metatrain.data.shards import Shards, check_sizes, row_groups
from metatrain.data.windows import Windows

__all__ = ["BatchReader", "batch_from_events", "concatenate_batches", "iterate"]


class BatchReader:
    """The batches of one split. One thread at a time.

    Args:
        dataset: A task dataset, or its URL.
        split: Which tasks.
        items: Which events of a task count; the others are as if the task did not have them.
        episode: How events become support and query.
        seed: Seed of the plan and of the episodes.
        lanes_total: Lanes of the plan, all readers' together.
        tasks_per_step: Tasks in the global batch, a multiple of `lanes_total`.
        window: Row groups in a lane's shuffle window.
        shuffle: False: tasks in their stored order, dealt to the lanes.
        features: Names of the features to read. Default: all.
        keys: Whether `read_keyed` is used: the tasks' keys are read too.
        timestamps: Whether the events' times are read, a third of what an event takes. No learner sees them.
        read_ahead: Whether a thread reads a lane's next window while the open one is used.
        verify: Whether the sizes of the split's shards are compared with the manifest now.
        quarantined: Paths of shards that are not read: the plan is what it is, and their tasks count as skipped.

    Raises:
        DatasetError: No dataset, or a shard that is missing, truncated or not the manifest's (also from `read`).
        ConfigError: An unknown feature, or numbers that do not fit one another.
    """

    def __init__(
        self,
        dataset: TaskDataset | str,
        split: Split,
        items: ItemSet,
        episode: EpisodeConfig,
        *,
        seed: int,
        lanes_total: int,
        tasks_per_step: int,
        window: int,
        shuffle: bool = True,
        features: Sequence[str] | None = None,
        keys: bool = False,
        timestamps: bool = True,
        read_ahead: bool = False,
        verify: bool = True,
        quarantined: Collection[str] = (),
    ) -> None:
        self.dataset = TaskDataset.open(dataset) if isinstance(dataset, str) else dataset
        self.items, self.episode, self.seed = items, episode, seed
        shards = self.dataset.manifest.of(split)
        if verify:
            check_sizes(self.dataset.url, [s for s in shards if s.path not in quarantined])
        sizes = row_groups(shards)

        def plan(epoch: int, row_groups: np.ndarray = sizes) -> EpochPlan:
            return EpochPlan(
                row_groups,
                seed=seed,
                epoch=epoch,
                lanes=lanes_total,
                tasks_per_step=tasks_per_step,
                window=window,
                shuffle=shuffle,
            )

        # Two: an epoch's first steps are read while its predecessor's last ones are.
        self._plan = functools.lru_cache(maxsize=2)(plan)
        # Numbers that do not fit one another fail here, not at the first batch.
        plan(0, sizes[:0])
        split_events(np.zeros(0, np.int64), episode, seed, 0, np.zeros(0, np.int64))
        wanted = features_of(self.dataset.schema, features)
        catalogue = self.dataset.catalogue
        self._item_features = {f.name: stored(catalogue.features[f.name]) for f in wanted[Level.ITEM]}
        self._look_up = LookUp(len(catalogue))
        counts = None if items is ItemSet.ALL else np.asarray(catalogue.new) == (items is ItemSet.NEW)
        decoder = Decoder(wanted, len(catalogue), counts, keys=keys, timestamps=timestamps)
        self._windows = Windows(
            Shards(self.dataset.url, shards, decoder.types),
            decoder,
            episode,
            seed,
            ahead=read_ahead,
            quarantined=quarantined,
        )

    @classmethod
    def from_config(
        cls,
        dataset: TaskDataset | str,
        data: DataConfig,
        split: Split,
        items: ItemSet,
        episode: EpisodeConfig,
        seed: int,
        **options: Any,
    ) -> BatchReader:
        """A reader of the plan that the configuration describes; `options` are those of the constructor."""
        return cls(
            dataset,
            split,
            items,
            episode,
            seed=seed,
            lanes_total=data.lanes,
            tasks_per_step=data.tasks_per_step,
            window=data.shuffle_row_groups,
            **options,
        )

    def steps(self, epoch: int) -> int:
        """Steps of an epoch."""
        return self._plan(epoch).steps

    def read(self, epoch: int, step: int, lanes: Sequence[int]) -> TaskBatch:
        """The part of a step's global batch that these lanes give, in their order; possibly of no task.

        Tasks with too few or too many events for the episode's bounds, and those of quarantined shards, are left out
        and counted in `skipped`.
        """
        return next(iter(self.read_steps(epoch, step, 1, lanes)))

    def read_steps(self, epoch: int, step: int, steps: int, lanes: Sequence[int]) -> TaskBatches:
        """What `read` would give for `steps` consecutive steps of an epoch, at less cost a step."""
        return self._joined(epoch, step, steps, lanes)[0]

    def read_keyed(self, epoch: int, step: int, lanes: Sequence[int]) -> tuple[TaskBatch, np.ndarray]:
        """As `read`, and the tasks' keys: str [T] (none of a reader made without `keys`)."""
        batches, keys = self._joined(epoch, step, 1, lanes)
        return next(iter(batches)), keys

    def close(self) -> None:
        """Closes files and ends the read-ahead."""
        self._windows.close()

    def _joined(self, epoch: int, step: int, steps: int, lanes: Sequence[int]) -> tuple[TaskBatches, np.ndarray]:
        plan, pieces = self._plan(epoch), Pieces()
        for lane in lanes:
            for stretch in plan.stretches(lane, step, steps):
                pieces.add(self._windows.of(plan, lane, stretch.window), stretch.bounds)
        return pieces.joined(steps, lambda: self._windows.empty, self._look_up, self._item_features)


def iterate(
    dataset: TaskDataset | str,
    split: Split,
    items: ItemSet,
    episode: EpisodeConfig,
    *,
    seed: int = 0,
    epoch: int = 0,
    tasks_per_batch: int = 256,
    keys: bool = False,
    features: Sequence[str] | None = None,
    quarantined: Collection[str] = (),
) -> Iterator[Any]:
    """All tasks of a split once, in their stored order, read in this process: for evaluation and baselines.

    Yields:
        `TaskBatch`, or (`TaskBatch`, keys: str [T]) where `keys` is true. A batch may have no task, where all were
        skipped: the sum of `size` and `skipped` over the batches is the number of tasks in the split.
    """
    opened = TaskDataset.open(dataset) if isinstance(dataset, str) else dataset
    sizes = row_groups(opened.manifest.of(split))
    # As many row groups at a time as make a batch: small ones would mean many small gathers.
    window = max(1, -(-tasks_per_batch // max(1, int(sizes.max(initial=1)))))
    reader = BatchReader(
        opened,
        split,
        items,
        episode,
        seed=seed,
        lanes_total=1,
        tasks_per_step=tasks_per_batch,
        window=window,
        shuffle=False,
        features=features,
        keys=keys,
        quarantined=quarantined,
    )
    try:
        for step in range(reader.steps(epoch)):
            yield reader.read_keyed(epoch, step, [0]) if keys else reader.read(epoch, step, [0])
    finally:
        reader.close()
