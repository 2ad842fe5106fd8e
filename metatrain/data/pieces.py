"""From pieces of shuffle windows to the batches of consecutive steps, each column by one concatenation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain, pairwise
from typing import Any

import numpy as np

from metatrain.data.batch import Column, TaskBatch, TaskBatches
from metatrain.data.columns import Stored, concatenate, cut, take
from metatrain.data.windows import Window


class Pieces:
    """Which consecutive tasks of which windows make each of `steps` steps."""

    def __init__(self, steps: int) -> None:
        self._windows: list[Window] = []
        # Of each step: the number of a window, the tasks in it, and their events. Slices are made once for all columns.
        self._of_step: list[list[tuple[int, slice, slice]]] = [[] for _ in range(steps)]
        self._tasks, self._events, self._skipped = (np.zeros(steps, np.int64) for _ in range(3))

    def add(self, window: Window, bounds: np.ndarray) -> None:
        """The i-th step takes the window's places from bounds[i] to bounds[i + 1]: int64 [steps + 1]."""
        number = len(self._windows)
        self._windows.append(window)
        tasks = window.tasks_before[bounds]
        events = window.events_before[tasks]
        taken = np.diff(tasks)
        self._tasks += taken
        self._events += np.diff(events)
        self._skipped += np.diff(bounds) - taken
        edges = zip(tasks.tolist(), events.tolist(), strict=True)
        for own, ((task, event), (task_end, event_end)) in zip(self._of_step, pairwise(edges), strict=True):
            if task < task_end:
                own.append((number, slice(task, task_end), slice(event, event_end)))

    def keys(self) -> np.ndarray:
        """The tasks' keys in the order of the batches: str [T]."""
        found = [(self._windows[number].keys, tasks) for number, tasks, _ in chain.from_iterable(self._of_step)]
        parts = [keys[tasks].to_numpy(zero_copy_only=False) for keys, tasks in found if keys is not None]
        return np.concatenate([np.zeros(0, object), *parts])

    def joined(
        self, empty: Callable[[], Window], place: np.ndarray, item_features: Mapping[str, Stored]
    ) -> TaskBatches:
        """The steps' batches.

        Args:
            empty: Gives a window without a task, for columns of the right types where the steps have none.
            place: Scratch, int64 [catalogue rows].
            item_features: The catalogue's columns.
        """
        windows, pieces = self._windows, list(chain.from_iterable(self._of_step))
        if not pieces:
            windows, pieces = [empty()], [(0, slice(0, 0), slice(0, 0))]
        first = windows[0]
        tasks, events = [(p[0], p[1]) for p in pieces], [(p[0], p[2]) for p in pieces]

        def join(rows: list[tuple[int, slice]], of: Callable[[Window], Stored]) -> Any:
            columns: list[Any] = [of(window) for window in windows]
            if isinstance(columns[0], np.ndarray):  # one step of the loop a piece, so it is kept short
                return np.concatenate([columns[number][part] for number, part in rows])
            return concatenate([cut(columns[number], part) for number, part in rows])

        def features(rows: list[tuple[int, slice]], of: Callable[[Window], dict[str, Stored]]) -> dict[str, Column]:
            return {name: join(rows, lambda window, name=name: of(window)[name]) for name in of(first)}

        event_bounds = _bounds(self._events)
        items, event_items, item_bounds = _looked_up(join(events, lambda w: w.items), event_bounds, place)
        columns = TaskBatch(
            tasks=join(tasks, lambda w: w.tasks),
            support_lengths=join(tasks, lambda w: w.support_lengths),
            query_lengths=join(tasks, lambda w: w.query_lengths),
            items=items,
            event_items=event_items,
            labels=join(events, lambda w: w.labels),
            timestamps=join(events, lambda w: w.timestamps),
            task_features=features(tasks, lambda w: w.task_features),
            item_features={name: take(column, items) for name, column in item_features.items()},
            event_features=features(events, lambda w: w.event_features),
            skipped=int(self._skipped.sum()),
        )
        return TaskBatches(columns, tuple(self._skipped.tolist()), _bounds(self._tasks), item_bounds, event_bounds)


def _bounds(lengths: np.ndarray) -> tuple[int, ...]:
    return (0, *np.cumsum(lengths).tolist())


def _looked_up(
    rows: np.ndarray, bounds: tuple[int, ...], place: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Each step's distinct catalogue rows, ascending; the events' positions in them; and where each step's begin.

    As np.unique with its inverse, through a place for each row of the catalogue: sorting numbers alone is several
    times as quick as sorting them with their positions.
    """
    every = rows.astype(np.int64)  # numpy would widen an index anew at each use
    ascending = rows.copy()
    for start, stop in pairwise(bounds):
        ascending[start:stop].sort()
    new = np.empty(len(rows), bool)
    np.not_equal(ascending[1:], ascending[:-1], out=new[1:])
    new[[start for start, stop in pairwise(bounds) if start < stop]] = True
    first = np.flatnonzero(new)
    items = ascending[first].astype(np.int64)
    item_bounds = np.searchsorted(first, bounds).tolist()
    positions, count = np.empty_like(every), np.arange(int(np.diff(item_bounds).max(initial=0)))
    for (start, stop), (low, high) in zip(pairwise(bounds), pairwise(item_bounds), strict=True):
        place[items[low:high]] = count[: high - low]
        place.take(every[start:stop], out=positions[start:stop], mode="clip")  # "raise" would go through a buffer
    return items, positions, tuple(item_bounds)
