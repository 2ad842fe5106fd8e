"""Shuffle windows: the row groups a lane has open, decoded once, their episodes drawn, and laid in the plan's order.

What a lane gives to a step is then a contiguous piece of every column. At most one window a lane is open (two while
a batch spans both; and, reading ahead, the next one).
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from metatrain.config import EpisodeConfig
from metatrain.data.columns import Stored, stored, take
from metatrain.data.decoded import Decoder
from metatrain.data.episodes import split_events
from metatrain.data.plan import EpochPlan, Positions, WindowTasks
from metatrain.data.shards import Shards
from metatrain.errors import DatasetError


@dataclass(frozen=True)
class Window:
    """The tasks of one shuffle window in the plan's order: n places, K of them with an episode, N chosen events."""

    tasks_before: np.ndarray  # int64 [n + 1]: tasks with an episode before each place
    events_before: np.ndarray  # int64 [K + 1]: chosen events before each task
    tasks: np.ndarray  # int64 [K]: ordinals in the split
    support_lengths: np.ndarray  # int64 [K]
    query_lengths: np.ndarray  # int64 [K]
    items: np.ndarray  # int [N]: catalogue rows; a task's support, then its query
    labels: np.ndarray  # float32 [N]
    timestamps: np.ndarray  # int64 [N]
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
    """

    def __init__(self, shards: Shards, decoder: Decoder, episode: EpisodeConfig, seed: int, *, ahead: bool) -> None:
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
        if not len(self._shards.row_groups):
            raise DatasetError(
                "This split has no task.",
                where=self._shards.url,
                remedy="Prepare the dataset with a larger share for it (prepare.user_split).",
            )
        first, none = np.zeros(1, np.int64), np.zeros(0, np.int64)
        with self._reading:
            table = self._shards.read(first, self._decoder.names)
        tasks = WindowTasks(first, none, Positions(none, none, none))
        return self._arranged(table.slice(0, 0), tasks, 0)

    def close(self) -> None:
        """Closes windows and files, and ends the read-ahead."""
        if self._ahead:
            self._ahead.shutdown(wait=True, cancel_futures=True)
        self._open.clear()
        self._shards.close()

    def _load(self, plan: EpochPlan, lane: int, window: int) -> Window:
        tasks = plan.window_tasks(lane, window)
        with self._reading:  # the read-ahead thread shares the open files
            table = self._shards.read(tasks.row_groups, self._decoder.names)
        return self._arranged(table, tasks, plan.epoch)

    def _arranged(self, table: pa.Table, tasks: WindowTasks, epoch: int) -> Window:
        """The chosen events in the plan's order: the one gather that the window's columns go through."""
        decoded = self._decoder(table, self._shards.place, tasks.row_groups)
        starts, ends = decoded.offsets[tasks.rows], decoded.offsets[tasks.rows + 1]
        ordinals = tasks.positions.ordinal
        chosen = split_events(ends - starts, self._episode, self._seed, epoch, ordinals, starts)
        rows = tasks.rows[chosen.tasks]
        events = chosen.events if decoded.counted is None else decoded.counted[chosen.events]
        chosen_before = np.zeros(len(tasks.rows), np.int64)
        chosen_before[chosen.tasks] = 1
        return Window(
            tasks_before=_starts(chosen_before),
            events_before=_starts(chosen.support_lengths + chosen.query_lengths),
            tasks=ordinals[chosen.tasks],
            support_lengths=chosen.support_lengths,
            query_lengths=chosen.query_lengths,
            items=decoded.items[events],
            labels=decoded.labels[events],
            timestamps=decoded.timestamps[events],
            task_features={name: stored(take(column, rows)) for name, column in decoded.task_features.items()},
            event_features={name: stored(take(column, events)) for name, column in decoded.event_features.items()},
            keys=None if decoded.keys is None else decoded.keys.to_numpy(zero_copy_only=False)[rows],
        )


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where each of consecutive segments begins, and where the last one ends: int64 [n + 1]."""
    found = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=found[1:])
    return found
