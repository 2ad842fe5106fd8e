"""Shuffle windows: the row groups a lane has open, decoded once, their episodes drawn, and laid in the plan's order.

What a lane gives to a step is then a contiguous piece of every column. At most one window a lane is open (two while
a batch spans both; and, reading ahead, the next one).
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from metatrain.config import EpisodeConfig
from metatrain.data.columns import Stored, gathered, stored, take
from metatrain.data.decoded import ColumnError, Decoded, Decoder
from metatrain.data.episodes import split_events
from metatrain.data.gather import Runs
from metatrain.data.plan import EpochPlan, Positions, WindowTasks
from metatrain.data.shards import Shards, shard_error
from metatrain.errors import DatasetError


@dataclass(frozen=True)
class Window:
    """The tasks of one shuffle window in the plan's order: n places, K of them with an episode, N chosen events."""

    tasks_before: np.ndarray  # int64 [n + 1]: tasks with an episode before each place
    events_before: np.ndarray  # int64 [K + 1]: chosen events before each task
    tasks: np.ndarray  # int64 [K]: ordinals in the split
    support_lengths: np.ndarray  # int64 [K]
    query_lengths: np.ndarray  # int64 [K]
    items: np.ndarray  # int32 [N]: catalogue rows; a task's support, then its query
    labels: np.ndarray  # float32 [N]
    timestamps: np.ndarray | None  # int64 [N]; None where they are not read
    task_features: dict[str, Stored]  # K rows
    event_features: dict[str, Stored]  # N rows
    keys: np.ndarray | None  # str objects [K]


class Windows:
    """The open windows of one split.

    Args:
        shards: The split's row groups.
        decoder: What is read of them.
        episode: How events become support and query.
        seed: Seed of the episodes.
        ahead: Whether a thread reads a lane's next window while the open one is used.
        quarantined: Paths of shards that are not read: their places in the plan stay, without a task.
    """

    def __init__(
        self,
        shards: Shards,
        decoder: Decoder,
        episode: EpisodeConfig,
        seed: int,
        *,
        ahead: bool,
        quarantined: Collection[str] = (),
    ) -> None:
        self._lost = shards.in_shards(quarantined)
        self._shards, self._decoder, self._episode, self._seed = shards, decoder, episode, seed
        self._open: dict[tuple[int, int, int], Window | Future[Window]] = {}
        self._ahead = ThreadPoolExecutor(1, "read-ahead") if ahead else None
        self._reading = threading.Lock()

    def of(self, plan: EpochPlan, lane: int, window: int) -> Window:
        """A lane's window, read where it is not open; the lane's other windows are closed.

        Raises:
            DatasetError: A shard that is missing, broken, or not as the manifest says.
        """
        mine, following = ((plan.epoch, lane, number) for number in (window, window + 1))
        for passed in [key for key in self._open if key[1] == lane and key not in (mine, following)]:
            del self._open[passed]
        found = self._open.get(mine)
        if isinstance(found, Future):
            found = found.result()
        if found is None:
            found = self._load(plan, lane, window)
        self._open[mine] = found
        if self._ahead and following not in self._open and window + 1 < plan.windows(lane):
            self._open[following] = self._ahead.submit(self._load, plan, lane, window + 1)
        return found

    @cached_property
    def empty(self) -> Window:
        """Columns of the right types without a row."""
        there = np.flatnonzero(~self._lost)
        if not len(there):
            raise DatasetError(
                "This split has no task." if not self._lost.any() else "All shards of this split are quarantined.",
                where=self._shards.url,
                remedy="Prepare the dataset with a larger share for it (prepare.user_split)."
                if not self._lost.any()
                else "Copy the shards again from where they were made, or prepare the dataset again.",
            )
        none = np.zeros(0, np.int64)
        with self._reading:
            decoded = self._decoded(there[:1], empty=True)
        return self._arranged(decoded, WindowTasks(there[:1], none, Positions(none, none, none)), none, 0)

    def close(self) -> None:
        """Closes windows and files, and ends the read-ahead."""
        if self._ahead:
            self._ahead.shutdown(wait=True, cancel_futures=True)
        self._open.clear()
        self._shards.close()

    def _load(self, plan: EpochPlan, lane: int, window: int) -> Window:
        tasks = plan.window_tasks(lane, window)
        lost = self._lost[tasks.row_groups]
        if lost.all():
            # All its places are there, with no task.
            return replace(self.empty, tasks_before=np.zeros(len(tasks.rows) + 1, np.int64))
        with self._reading:  # the read-ahead thread shares the open files
            decoded = self._decoded(tasks.row_groups[~lost])
        rows = tasks.rows
        if lost.any():
            # Places of the plan stay what they are; rows are counted without the row groups that are not read.
            sizes = self._shards.row_groups[tasks.row_groups]
            before = _starts(sizes)[:-1] - _starts(np.where(lost, sizes, 0))[:-1]
            group = np.repeat(np.arange(len(sizes)), sizes)[rows]
            inside = rows - _starts(sizes)[group]
            rows = np.where(lost[group], -1, before[group] + inside)
        return self._arranged(decoded, tasks, rows, plan.epoch)

    def _decoded(self, row_groups: np.ndarray, empty: bool = False) -> Decoded:
        """The columns of row groups; `empty`: none of their rows.

        Raises:
            ShardError: Names the shard whose column is not what the manifest says.
        """

        def decoded(groups: np.ndarray) -> Decoded:
            table = self._shards.read(groups, self._decoder.names)
            return self._decoder(table.slice(0, 0) if empty else table)

        try:
            return decoded(row_groups)
        except ColumnError:
            for shard, own in self._shards.by_shard(row_groups):
                try:
                    decoded(own)
                except ColumnError as error:
                    what = f"A shard's column is not what the manifest says: {error.reason}."
                    raise shard_error(self._shards.url, shard, what, column=error.column) from error
            raise

    def _arranged(self, decoded: Decoded, tasks: WindowTasks, rows: np.ndarray, epoch: int) -> Window:
        """The chosen events in the plan's order: the one gather that the window's columns go through.

        Args:
            decoded: The tasks.
            tasks: The window's places.
            rows: Where each place's task is in `decoded`, -1 where it is not: int64 [n].
            epoch: Whose episodes.
        """
        starts, ends = decoded.offsets[rows], decoded.offsets[rows + 1]
        lengths = np.where(rows < 0, 0, ends - starts)  # no episode has no event: such a place gives no task
        ordinals = tasks.positions.ordinal
        chosen = split_events(lengths, self._episode, self._seed, epoch, ordinals, starts)
        chosen_before = np.zeros(len(lengths), np.int64)
        chosen_before[chosen.tasks] = 1
        rows = rows[chosen.tasks]
        sizes = chosen.support_lengths + chosen.query_lengths

        def events(column: Stored) -> Any:
            if chosen.drawn is None:
                return gathered([column], Runs(chosen.starts, sizes))
            return take(column, chosen.drawn)

        return Window(
            tasks_before=_starts(chosen_before),
            events_before=_starts(sizes),
            tasks=ordinals[chosen.tasks],
            support_lengths=chosen.support_lengths,
            query_lengths=chosen.query_lengths,
            items=events(decoded.items),
            labels=events(decoded.labels),
            timestamps=None if decoded.timestamps is None else events(decoded.timestamps),
            task_features={name: stored(take(column, rows)) for name, column in decoded.task_features.items()},
            event_features={name: stored(events(column)) for name, column in decoded.event_features.items()},
            keys=None if decoded.keys is None else decoded.keys.to_numpy(zero_copy_only=False)[rows],
        )


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where each of consecutive segments begins, and where the last one ends: int64 [n + 1]."""
    found = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=found[1:])
    return found
