"""Reads the batches of an epoch plan: `read(epoch, step, lanes)` gives the same batch whoever asks, and in any order.

A reader keeps the open shuffle windows of the lanes it reads: memory is bounded by them, whatever the number of
tasks. It has no state that the plan cannot rebuild. Between Parquet and the batch nothing loops over tasks or events.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from metatrain.config import DataConfig, EpisodeConfig
from metatrain.data.assemble import batch_from_events, concatenate_batches, features_of
from metatrain.data.batch import TaskBatch
from metatrain.data.columns import Stored, concatenate, stored, take
from metatrain.data.dataset import TaskDataset
from metatrain.data.episodes import split_events
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.plan import EpochPlan, Slice
from metatrain.data.schema import Level
from metatrain.data.shards import Shards, check_sizes, row_groups
from metatrain.data.windows import Window, Windows

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
        read_ahead: Whether a thread reads a lane's next window while the open one is used.
        verify: Whether the sizes of the split's shards are compared with the manifest now.

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
        read_ahead: bool = False,
        verify: bool = True,
    ) -> None:
        self.dataset = TaskDataset.open(dataset) if isinstance(dataset, str) else dataset
        self.items, self.episode, self.seed = items, episode, seed
        shards = self.dataset.manifest.of(split)
        if verify:
            check_sizes(self.dataset.url, shards)
        sizes = row_groups(shards)

        def plan(epoch: int) -> EpochPlan:
            return EpochPlan(
                sizes,
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
        self._plan(0)
        split_events(np.zeros(0, np.int64), episode, seed, 0, np.zeros(0, np.int64))
        wanted = features_of(self.dataset.schema, features)
        catalogue = self.dataset.catalogue
        self._item_features = {f.name: stored(catalogue.features[f.name]) for f in wanted[Level.ITEM]}
        counts = None if items is ItemSet.ALL else np.asarray(catalogue.new) == (items is ItemSet.NEW)
        opened = Shards(self.dataset.url, shards)
        self._windows = Windows(opened, wanted, len(catalogue.new), counts, keys=keys, ahead=read_ahead)

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

        Tasks with too few or too many events for the episode's bounds are left out, and counted in `skipped`.
        """
        return self.read_keyed(epoch, step, lanes)[0]

    def read_keyed(self, epoch: int, step: int, lanes: Sequence[int]) -> tuple[TaskBatch, np.ndarray]:
        """The same, and the tasks' keys: str [T] (none of a reader made without `keys`)."""
        plan = self._plan(epoch)
        slices = [piece for lane in lanes for piece in plan.slices(lane, step)]
        if slices:
            return self._batch(epoch, slices, [self._windows.of(plan, piece) for piece in slices])
        none = np.zeros(0, np.int64)
        return self._batch(epoch, [Slice(0, 0, none, none, plan.positions([], step))], [self._windows.empty])

    def close(self) -> None:
        """Closes files and ends the read-ahead."""
        self._windows.close()

    def _batch(self, epoch: int, slices: list[Slice], windows: list[Window]) -> tuple[TaskBatch, np.ndarray]:
        rows = [piece.rows for piece in slices]
        starts = np.concatenate([w.offsets[r] for w, r in zip(windows, rows, strict=True)])
        ends = np.concatenate([w.offsets[r + 1] for w, r in zip(windows, rows, strict=True)])
        ordinals = np.concatenate([piece.positions.ordinal for piece in slices])
        chosen = split_events(ends - starts, self.episode, self.seed, epoch, ordinals, starts)
        # The chosen tasks and their events are in the slices' order: cut them where the slices end.
        cuts = np.searchsorted(chosen.tasks, np.cumsum([len(r) for r in rows])[:-1])
        events_before = np.concatenate([[0], np.cumsum(chosen.support_lengths + chosen.query_lengths)])
        tasks = np.split(np.concatenate(rows)[chosen.tasks], cuts)
        events = np.split(chosen.events, events_before[cuts])
        first = windows[0]
        items, event_items = np.unique(_taken([w.items for w in windows], events), return_inverse=True)
        batch = TaskBatch(
            tasks=ordinals[chosen.tasks],
            support_lengths=chosen.support_lengths,
            query_lengths=chosen.query_lengths,
            items=items.astype(np.int64),
            event_items=event_items,
            labels=_taken([w.labels for w in windows], events),
            timestamps=_taken([w.timestamps for w in windows], events),
            task_features={n: _taken([w.task_features[n] for w in windows], tasks) for n in first.task_features},
            item_features={n: take(column, items) for n, column in self._item_features.items()},
            event_features={n: _taken([w.event_features[n] for w in windows], events) for n in first.event_features},
            skipped=chosen.skipped,
        )
        found = [w.keys.take(pa.array(r)) for w, r in zip(windows, tasks, strict=True) if w.keys is not None]
        return batch, np.concatenate([np.zeros(0, object), *(k.to_numpy(zero_copy_only=False) for k in found)])


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
    )
    try:
        for step in range(reader.steps(epoch)):
            yield reader.read_keyed(epoch, step, [0]) if keys else reader.read(epoch, step, [0])
    finally:
        reader.close()


def _taken(columns: Sequence[Stored], rows: Sequence[np.ndarray]) -> Any:
    """The rows of each window's column, behind one another."""
    return concatenate([take(column, r) for column, r in zip(columns, rows, strict=True)])
