"""From pieces of shuffle windows to the batches of consecutive steps, each column by one concatenation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from metatrain.data.batch import Column, TaskBatch, TaskBatches
from metatrain.data.columns import Stored, concatenate, cut, take
from metatrain.data.episodes import counting
from metatrain.data.windows import Window


class Pieces:
    """Which consecutive tasks of which windows make each of some consecutive steps."""

    def __init__(self) -> None:
        self._windows: list[Window] = []
        self._bounds: list[np.ndarray] = []  # of each window, int64 [S + 1]: its places from bounds[i] on go to step i

    def add(self, window: Window, bounds: np.ndarray) -> None:
        """The i-th step takes the window's places from bounds[i] to bounds[i + 1], behind what it has."""
        self._windows.append(window)
        self._bounds.append(bounds)

    def joined(
        self, steps: int, empty: Callable[[], Window], look_up: LookUp, item_features: Mapping[str, Stored]
    ) -> tuple[TaskBatches, np.ndarray]:
        """The steps' batches, and their tasks' keys: str [T] (none where keys are not read).

        Args:
            steps: Number of steps, S.
            empty: Gives a window without a task, for columns of the right types where the steps have none.
            look_up: The catalogue's.
            item_features: The catalogue's columns.
        """
        windows = self._windows or [empty()]
        places = np.array(self._bounds or [np.zeros(steps + 1, np.int64)])  # [windows, S + 1]
        task_edges = np.array([w.tasks_before[edges] for w, edges in zip(windows, places, strict=True)])
        event_edges = np.array([w.events_before[edges] for w, edges in zip(windows, task_edges, strict=True)])
        skipped = (np.diff(places) - np.diff(task_edges)).sum(0).tolist()
        task_bounds, event_bounds = _bounds(task_edges), _bounds(event_edges)
        tasks, events = _parts(task_edges), _parts(event_edges)

        def join(parts: _Parts, of: Callable[[Window], Any], dtype: Any = None) -> Any:
            columns: list[Any] = [of(window) for window in windows]
            if isinstance(columns[0], np.ndarray):  # one round a piece, so it is kept short
                pieces = [columns[number][start:stop] for number, start, stop in zip(*parts, strict=True)]
                return np.concatenate(pieces, dtype=dtype)
            return concatenate([cut(columns[number], start, stop) for number, start, stop in zip(*parts, strict=True)])

        def features(parts: _Parts, of: Callable[[Window], dict[str, Stored]]) -> dict[str, Column]:
            return {name: join(parts, lambda window, name=name: of(window)[name]) for name in of(windows[0])}

        # As indexes, which numpy would widen anew at each use.
        items, event_items, item_bounds = look_up(join(events, lambda w: w.items, np.int64), event_bounds)
        columns = TaskBatch(
            tasks=join(tasks, lambda w: w.tasks),
            support_lengths=join(tasks, lambda w: w.support_lengths),
            query_lengths=join(tasks, lambda w: w.query_lengths),
            items=items,
            event_items=event_items,
            labels=join(events, lambda w: w.labels),
            timestamps=None if windows[0].timestamps is None else join(events, lambda w: w.timestamps),
            task_features=features(tasks, lambda w: w.task_features),
            item_features={name: take(column, items) for name, column in item_features.items()},
            event_features=features(events, lambda w: w.event_features),
            skipped=sum(skipped),
        )
        keys = join(tasks, lambda w: w.keys) if windows[0].keys is not None else np.zeros(0, object)
        return TaskBatches(columns, tuple(skipped), task_bounds, item_bounds, event_bounds), keys


#: Pieces in the order of the batches: number of the window, first row, end. Lists of numbers, which the garbage
#: collector need not look through: a tuple a piece made it run for a tenth of the reader's time.
_Parts = tuple[list[int], list[int], list[int]]


def _parts(edges: np.ndarray) -> _Parts:
    """The pieces between the edges [windows, S + 1] of each window, step by step."""
    windows, steps = edges.shape[0], edges.shape[1] - 1
    starts, stops = edges[:, :-1].T.ravel(), edges[:, 1:].T.ravel()
    used = starts < stops
    used[0] |= not used.any()  # one piece without a row, for the columns' types
    return np.tile(np.arange(windows), steps)[used].tolist(), starts[used].tolist(), stops[used].tolist()


def _bounds(edges: np.ndarray) -> tuple[int, ...]:
    """Where each step's rows begin in the batches, and where the last one's end."""
    return (0, *np.cumsum(np.diff(edges).sum(0)).tolist())


#: Up to so many rows of the catalogue an event, looking through marks of them all takes less than sorting the events.
_MARKED_ROWS_AN_EVENT = 4


class LookUp:
    """Finds the distinct items of steps, as np.unique with its inverse would, at a fraction of its time.

    One thread at a time.
    """

    def __init__(self, catalogue_rows: int) -> None:
        self._place = np.empty(catalogue_rows, np.int64)  # of an item among the step's
        self._seen = np.zeros(catalogue_rows, bool)  # none is, between calls

    def __call__(self, rows: np.ndarray, bounds: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
        """Each step's distinct catalogue rows, ascending; the events' positions in them; where each step's begin.

        Args:
            rows: The events' catalogue rows: int64 [N].
            bounds: Where each step's events begin, and where the last one's end: [S + 1].
        """
        positions, items, item_bounds = np.empty_like(rows), [rows[:0]], [0]
        for start, stop in pairwise(bounds):
            own = rows[start:stop]
            distinct = self._marked(own) if len(self._seen) <= _MARKED_ROWS_AN_EVENT * len(own) else _sorted(own)
            self._place[distinct] = counting(len(distinct))
            self._place.take(own, out=positions[start:stop], mode="clip")  # "raise" would go through a buffer
            items.append(distinct)
            item_bounds.append(item_bounds[-1] + len(distinct))
        return np.concatenate(items), positions, tuple(item_bounds)

    def _marked(self, rows: np.ndarray) -> np.ndarray:
        self._seen[rows] = True
        distinct = np.flatnonzero(self._seen)
        self._seen[distinct] = False
        return distinct


def _sorted(rows: np.ndarray) -> np.ndarray:
    ascending = rows.astype(np.int32)  # a catalogue's rows fit, and sort in half the time
    ascending.sort()
    new = np.ones(len(rows), bool)
    np.not_equal(ascending[1:], ascending[:-1], out=new[1:])
    return ascending[np.flatnonzero(new)].astype(np.int64)  # a mask of numbers would take thrice as long
