"""The epoch plan: which tasks make the global batch of a step, a pure function of (row-group sizes, seed, epoch, step).

It never depends on the number of workers or readers, nor on what was read before. An epoch goes into lanes:

- the row groups are shuffled, then dealt one by one to the lane that has the fewest tasks so far;
- `window` consecutive row groups of a lane are a shuffle window: their tasks are permuted among themselves, so that
  a reader holds one window a lane and reads each row group once an epoch;
- with b = tasks_per_step / lanes, a lane gives the step s the tasks [s·b, (s+1)·b) of its own sequence, and the
  global batch is the lanes' parts in the order of the lanes. Near the epoch's end parts are short, then empty.

Row groups 0 to 5 of sizes 2, two lanes, window 2, tasks_per_step 4, where `5.1` is row 1 of row group 5::

    lane 0   | 5.1 2.0 2.1 5.0 | 0.1 0.0 |        step 0:  5.1 2.0  3.0 1.1
    lane 1   | 3.0 1.1 3.1 1.0 | 4.0 4.1 |        step 1:  2.1 5.0  3.1 1.0    step 2:  0.1 0.0  4.0 4.1
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from metatrain.data import randomness
from metatrain.errors import ConfigError

# Tags that keep the plan's draws apart from one another and from the episodes'.
_DEAL, _WINDOW = 1, 2


class Positions(NamedTuple):
    """Where tasks are, in the order of the batch."""

    row_group: np.ndarray  # int64 [b]: number of the row group in the split
    row: np.ndarray  # int64 [b]: row in the row group
    ordinal: np.ndarray  # int64 [b]: number of the task in the split


@dataclass(frozen=True)
class Stretch:
    """What a lane gives to consecutive steps out of one window: tasks bounds[i] to bounds[i + 1] to the i-th."""

    lane: int
    window: int
    bounds: np.ndarray  # int64 [steps + 1]: places in the window's order


class WindowTasks(NamedTuple):
    """A shuffle window's tasks in the order in which the lane gives them."""

    row_groups: np.ndarray  # int64 [w]: the window's row groups, in the order in which they are read
    rows: np.ndarray  # int64 [n]: rows of the window, its row groups put behind one another
    positions: Positions  # [n]


@dataclass(frozen=True)
class Slice:
    """Tasks of a lane's part of a step that lie in one shuffle window."""

    lane: int
    window: int
    row_groups: np.ndarray  # int64 [w]: the window's row groups
    rows: np.ndarray  # int64 [n]: rows of the window, its row groups put behind one another
    positions: Positions  # [n]


class EpochPlan:
    """The plan of one epoch.

    Args:
        row_groups: Tasks in each row group of the split, in the manifest's order: int64 [G].
        seed: Seed of the run.
        epoch: Number of the epoch: another is another shuffle.
        lanes: Logical streams.
        tasks_per_step: Tasks in a global batch, a multiple of `lanes`.
        window: Row groups in a shuffle window.
        shuffle: False: row groups and tasks in their stored order.

    Raises:
        ConfigError: `tasks_per_step` is not a multiple of `lanes`, or a number is not positive.
    """

    def __init__(
        self,
        row_groups: np.ndarray,
        *,
        seed: int,
        epoch: int,
        lanes: int,
        tasks_per_step: int,
        window: int,
        shuffle: bool = True,
    ) -> None:
        if min(lanes, tasks_per_step, window) < 1 or tasks_per_step % lanes:
            raise ConfigError(
                "tasks_per_step must be a positive multiple of lanes, and the shuffle window at least 1.",
                got=f"tasks_per_step {tasks_per_step}, lanes {lanes}, window {window}",
                remedy="Change data.tasks_per_step, data.lanes or data.shuffle_row_groups.",
            )
        self.seed, self.epoch, self.lanes, self.window, self.shuffle = seed, epoch, lanes, window, shuffle
        self.tasks_per_lane = tasks_per_step // lanes
        self._sizes = np.asarray(row_groups, np.int64)
        self._first_ordinal = _starts(self._sizes)
        order = np.arange(len(self._sizes))
        if shuffle:
            order = randomness.permutation(len(self._sizes), _DEAL, seed, epoch)
        lane_of_dealt = _deal(self._sizes[order], lanes)
        by_lane = np.argsort(lane_of_dealt, kind="stable")
        #: Row groups lane after lane, each in the order it was dealt; `_lane_groups[l]` is where lane l begins.
        self._dealt = order[by_lane]
        self._lane_groups = np.searchsorted(lane_of_dealt[by_lane], np.arange(lanes + 1))
        self._tasks_before = _starts(self._sizes[self._dealt])
        self._newest: dict[int, tuple[int, WindowTasks]] = {}  # lane → its newest window, for `slices`

    @property
    def lane_tasks(self) -> np.ndarray:
        """Tasks of each lane: int64 [lanes]."""
        return np.diff(self._tasks_before[self._lane_groups])

    @property
    def steps(self) -> int:
        """Steps of the epoch: after them every lane is empty."""
        return int(-(-self.lane_tasks.max() // self.tasks_per_lane))

    def positions(self, lanes: Sequence[int], step: int) -> Positions:
        """The tasks that these lanes give to a step, lane after lane."""
        none = Positions(*[np.zeros(0, np.int64)] * 3)
        parts = [none, *(piece.positions for lane in lanes for piece in self.slices(lane, step))]
        return Positions(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def slices(self, lane: int, step: int) -> list[Slice]:
        """A lane's part of a step, cut where shuffle windows end. O(log G), and O(window) at a window's first use."""
        pieces = []
        for stretch in self.stretches(lane, step):
            tasks = self._window(lane, stretch.window)
            cut = slice(*stretch.bounds.tolist())
            positions = Positions(*(column[cut] for column in tasks.positions))
            pieces.append(Slice(lane, stretch.window, tasks.row_groups, tasks.rows[cut], positions))
        return pieces

    def stretches(self, lane: int, step: int, steps: int = 1) -> list[Stretch]:
        """What a lane gives to `steps` steps from `step` on, cut where shuffle windows end. O(log G + windows met)."""
        first_group, end_group = int(self._lane_groups[lane]), int(self._lane_groups[lane + 1])
        # In tasks, counted over all lanes behind one another, as `_tasks_before` is.
        lane_start = int(self._tasks_before[first_group])
        edges = lane_start + np.arange(step, step + steps + 1) * self.tasks_per_lane
        start, stop = int(edges[0]), min(int(edges[-1]), int(self._tasks_before[end_group]))
        found = []
        while start < stop:
            group = int(np.searchsorted(self._tasks_before, start, side="right")) - 1
            window = (group - first_group) // self.window
            low, high = self._groups(lane, window)
            base, end = int(self._tasks_before[low]), int(self._tasks_before[high])
            found.append(
                Stretch(lane, window, np.minimum(np.maximum(edges, base), end) - base)
            )  # np.clip takes thrice as long
            start = end
        return found

    def window_tasks(self, lane: int, window: int) -> WindowTasks:
        """The tasks of a lane's window. O(tasks of the window)."""
        low, high = self._groups(lane, window)
        before = self._tasks_before[low : high + 1] - self._tasks_before[low]
        rows = np.arange(before[-1])
        if self.shuffle:
            rows = randomness.permutation(len(rows), _WINDOW, self.seed, self.epoch, lane, window)
        which = np.repeat(np.arange(high - low), np.diff(before))[rows]
        row_group, row = self._dealt[low + which], rows - before[which]
        return WindowTasks(self._dealt[low:high], rows, Positions(row_group, row, self._first_ordinal[row_group] + row))

    def windows(self, lane: int) -> int:
        """Number of a lane's windows."""
        return int(-(-(self._lane_groups[lane + 1] - self._lane_groups[lane]) // self.window))

    def _groups(self, lane: int, window: int) -> tuple[int, int]:
        """Where in `_dealt` a window's row groups begin and end."""
        low = int(self._lane_groups[lane]) + window * self.window
        return low, min(low + self.window, int(self._lane_groups[lane + 1]))

    def _window(self, lane: int, window: int) -> WindowTasks:
        known = self._newest.get(lane)
        if known is None or known[0] != window:
            known = (window, self.window_tasks(lane, window))
            self._newest[lane] = known
        return known[1]


def lanes_of(lanes: Sequence[int], parts: int, index: int) -> list[int]:
    """The lanes of worker (or reader) `index` of `parts`: contiguous, so that parts in order make the global batch."""
    return [int(lane) for lane in np.array_split(np.asarray(lanes, np.int64), parts)[index]]


def _starts(sizes: np.ndarray) -> np.ndarray:
    """Where each of consecutive segments begins, and where the last one ends: int64 [n + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])


def _deal(sizes: np.ndarray, lanes: int) -> np.ndarray:
    """The lane of each row group, dealt in this order to the lane with the fewest tasks (the first of equals)."""
    if len(sizes) and (sizes == sizes[0]).all() and sizes[0] > 0:
        return np.arange(len(sizes)) % lanes  # what the heap below gives, at once
    heap = [(0, lane) for lane in range(lanes)]
    dealt = np.empty(len(sizes), np.int64)
    for i, size in enumerate(sizes.tolist()):  # about a second for a million row groups
        tasks, lane = heap[0]
        dealt[i] = lane
        heapq.heapreplace(heap, (tasks + size, lane))
    return dealt
