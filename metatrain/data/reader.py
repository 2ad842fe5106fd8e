"""Reads the batches of an epoch plan: `read(epoch, step, lanes)` gives the same batch whoever asks, and in any order.

A reader keeps the open shuffle window of each lane it reads (and, reading ahead, the next one): memory is bounded by
windows, whatever the number of tasks. It has no state that the plan cannot rebuild. Between Parquet and the batch
nothing loops over tasks or events.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from metatrain.config import EpisodeConfig
from metatrain.data.assemble import batch_from_events, concatenate_batches, features_of
from metatrain.data.batch import TaskBatch
from metatrain.data.columns import Stored, concatenate, feature_column, jagged, keep, numbers, stored, take
from metatrain.data.dataset import TaskDataset
from metatrain.data.episodes import split_events
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.plan import EpochPlan, Slice
from metatrain.data.schema import Level
from metatrain.data.shards import Shards, check_sizes, row_groups
from metatrain.errors import DatasetError

__all__ = ["BatchReader", "batch_from_events", "concatenate_batches", "iterate"]


@dataclass(frozen=True)
class Window:
    """The tasks of one shuffle window as columns: n tasks, E events of the item set behind one another."""

    offsets: np.ndarray  # int64 [n + 1]: events of a task
    items: np.ndarray  # int [E]: catalogue rows
    labels: np.ndarray  # float32 [E]
    timestamps: np.ndarray  # int64 [E]
    task_features: dict[str, Stored]  # n rows
    event_features: dict[str, Stored]  # E rows
    keys: pa.Array | None  # [n]


class BatchReader:
    """The batches of one split.

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
        self._features = features_of(self.dataset.schema, features)
        self._columns = ["items", "labels", "timestamps", *(["key"] if keys else [])]
        self._columns += [f"task:{f.name}" for f in self._features[Level.TASK]]
        self._columns += [f"event:{f.name}" for f in self._features[Level.EVENT]]
        self._shards = Shards(self.dataset.url, shards, self._columns)

        def plan(epoch: int) -> EpochPlan:
            return EpochPlan(
                self._shards.row_groups,
                seed=seed,
                epoch=epoch,
                lanes=lanes_total,
                tasks_per_step=tasks_per_step,
                window=window,
                shuffle=shuffle,
            )

        # Two: an epoch's first steps are read while its predecessor's last ones are.
        self._plan = functools.lru_cache(maxsize=2)(plan)
        self._plan(0)  # numbers that do not fit fail here
        catalogue = self.dataset.catalogue
        self._item_features = {f.name: stored(catalogue.features[f.name]) for f in self._features[Level.ITEM]}
        self._counts = None if items is ItemSet.ALL else catalogue.new == (items is ItemSet.NEW)
        self._catalogue_rows = len(catalogue.new)
        self._windows: dict[tuple[int, int, int], Window | Future[Window]] = {}
        self._ahead = ThreadPoolExecutor(1, "read-ahead") if read_ahead else None
        self._reading = threading.Lock()

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
        windows = [self._window(epoch, piece) for piece in slices]
        if not slices:  # columns of the right kinds and no row
            slices = [Slice(0, 0, np.zeros(0, np.int64), np.zeros(0, np.int64), plan.positions([], 0))]
            windows = [self._no_rows]
        return self._batch(epoch, slices, windows)

    def close(self) -> None:
        """Closes files and ends the read-ahead."""
        if self._ahead:
            self._ahead.shutdown(wait=True, cancel_futures=True)
        self._windows.clear()
        self._shards.close()

    def _batch(self, epoch: int, slices: list[Slice], windows: list[Window]) -> tuple[TaskBatch, np.ndarray]:
        rows = [piece.rows for piece in slices]
        starts = np.concatenate([w.offsets[r] for w, r in zip(windows, rows, strict=True)])
        ends = np.concatenate([w.offsets[r + 1] for w, r in zip(windows, rows, strict=True)])
        ordinals = np.concatenate([piece.positions.ordinal for piece in slices])
        chosen = split_events(ends - starts, self.episode, self.seed, epoch, ordinals, starts)
        # Both the chosen tasks and their events are in the slices' order: cut them where slices end.
        task_cuts = np.searchsorted(chosen.tasks, np.cumsum([len(r) for r in rows]))
        before = np.concatenate([[0], np.cumsum(chosen.support_lengths + chosen.query_lengths)])
        events = np.split(chosen.events, before[task_cuts[:-1]])
        picked = np.split(np.concatenate(rows)[chosen.tasks], task_cuts[:-1])
        items, event_items = np.unique(_picked([w.items for w in windows], events), return_inverse=True)
        items = items.astype(np.int64)
        batch = TaskBatch(
            tasks=ordinals[chosen.tasks],
            support_lengths=chosen.support_lengths,
            query_lengths=chosen.query_lengths,
            items=items,
            event_items=event_items,
            labels=_picked([w.labels for w in windows], events),
            timestamps=_picked([w.timestamps for w in windows], events),
            task_features={n: _picked([w.task_features[n] for w in windows], picked) for n in windows[0].task_features},
            item_features={name: take(column, items) for name, column in self._item_features.items()},
            event_features={
                n: _picked([w.event_features[n] for w in windows], events) for n in windows[0].event_features
            },
            skipped=chosen.skipped,
        )
        found = [w.keys.take(pa.array(r)) for w, r in zip(windows, picked, strict=True) if w.keys is not None]
        return batch, np.concatenate([np.zeros(0, object), *(k.to_numpy(zero_copy_only=False) for k in found)])

    def _window(self, epoch: int, piece: Slice) -> Window:
        mine = (epoch, piece.lane, piece.window)
        if mine not in self._windows:
            self._windows[mine] = self._load(piece.row_groups)
        found = self._windows[mine]
        if isinstance(found, Future):
            found = self._windows[mine] = found.result()
        following = (epoch, piece.lane, piece.window + 1)
        for stale in [k for k in self._windows if k[1] == piece.lane and k not in (mine, following)]:
            del self._windows[stale]
        if self._ahead and following not in self._windows:
            coming = self._plan(epoch).window_row_groups(piece.lane, piece.window + 1)
            if len(coming):
                self._windows[following] = self._ahead.submit(self._load, coming)
        return found

    def _load(self, groups: np.ndarray) -> Window:
        with self._reading:  # the read-ahead thread shares the open files
            table = self._shards.read(groups)
        return self._columns_of(table, groups)

    def _columns_of(self, table: pa.Table, groups: np.ndarray) -> Window:
        """A window's columns, with the events of other items left out.

        Raises:
            DatasetError: Types, lengths or ids that the manifest does not allow.
        """
        name = ""
        try:
            arrays = {name: _single(table[name]) for name in self._columns}
            name = "items"
            offsets, values = jagged(arrays[name])
            items = numbers(values, "integer")
            if len(items) and (items.min() < 0 or items.max() >= self._catalogue_rows):
                raise ValueError(
                    f"catalogue rows up to {self._catalogue_rows - 1} were expected, not {items.min()} to {items.max()}"
                )
            events: dict[str, Stored] = {}
            for name in ("labels", "timestamps"):
                events[name] = numbers(_list_of(arrays[name], offsets), "float" if name == "labels" else "integer")
            for feature in self._features[Level.EVENT]:
                name = f"event:{feature.name}"
                events[name] = feature_column(_list_of(arrays[name], offsets), feature)
            tasks = {}
            for feature in self._features[Level.TASK]:
                name = f"task:{feature.name}"
                tasks[feature.name] = feature_column(arrays[name], feature)
        except ValueError as error:
            raise DatasetError(
                f"A shard's column is not what the manifest says: {error}.",
                where=f"column {name} of {self._shards.place(groups)}",
                remedy="Copy the shard again from where it was made, or prepare the dataset again.",
            ) from error
        if self._counts is not None:
            counts = self._counts[items]
            offsets = np.concatenate([[0], np.cumsum(counts)])[offsets]
            items = items[counts]
            events = {name: keep(column, counts) for name, column in events.items()}
        labels, timestamps = events.pop("labels"), events.pop("timestamps")
        assert isinstance(labels, np.ndarray)
        assert isinstance(timestamps, np.ndarray)
        return Window(
            offsets,
            items,
            labels,
            timestamps,
            tasks,
            {name.removeprefix("event:"): column for name, column in events.items()},
            arrays.get("key"),
        )

    @functools.cached_property
    def _no_rows(self) -> Window:
        if not len(self._shards.row_groups):
            raise DatasetError(
                "This split has no task.",
                where=self.dataset.url,
                remedy="Prepare the dataset with a larger share for it (prepare.user_split).",
            )
        with self._reading:
            table = self._shards.read(np.zeros(1, np.int64))
        return self._columns_of(table.slice(0, 0), np.zeros(1, np.int64))


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
) -> Iterator:
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


def _picked(columns: Sequence[Stored], rows: Sequence[np.ndarray]) -> Any:
    """The rows of each window's column, behind one another."""
    return concatenate([take(column, r) for column, r in zip(columns, rows, strict=True)])


def _single(column: pa.ChunkedArray) -> pa.Array:
    if not column.num_chunks:
        return pa.array([], column.type)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _list_of(array: pa.Array, offsets: np.ndarray) -> pa.Array:
    """The values of an event column, whose lists must be as long as the tasks' items."""
    own, values = jagged(array)
    if not np.array_equal(own, offsets):
        raise ValueError("lists of one task differ in length")
    return values
