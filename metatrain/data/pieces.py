"""From pieces of shuffle windows to the batches of consecutive steps: each column of them gathered in one go."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from metatrain.data.batch import Column, TaskBatch, TaskBatches
from metatrain.data.columns import Stored, gathered, take
from metatrain.data.gather import LookUp, Runs, gather
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
        tasks, events, event_bounds = _pieces(task_edges), _pieces(event_edges), _bounds(event_edges)

        def features(pieces: Runs, of: Callable[[Window], dict[str, Stored]]) -> dict[str, Column]:
            return {name: gathered([of(window)[name] for window in windows], pieces) for name in of(windows[0])}

        items, event_items, item_bounds = look_up([w.items for w in windows], events, steps)
        times = [w.timestamps for w in windows if w.timestamps is not None]
        columns = TaskBatch(
            tasks=gather([w.tasks for w in windows], tasks),
            support_lengths=gather([w.support_lengths for w in windows], tasks),
            query_lengths=gather([w.query_lengths for w in windows], tasks),
            items=items,
            event_items=event_items,
            labels=gather([w.labels for w in windows], events),
            timestamps=gather(times, events) if times else None,
            task_features=features(tasks, lambda w: w.task_features),
            item_features={name: take(column, items) for name, column in item_features.items()},
            event_features=features(events, lambda w: w.event_features),
            skipped=sum(skipped),
        )
        keys = [w.keys for w in windows if w.keys is not None]
        bounds = (tuple(own.tolist()) for own in (_bounds(task_edges), item_bounds, event_bounds))
        return TaskBatches(columns, tuple(skipped), *bounds), gather(keys, tasks) if keys else np.zeros(0, object)


def _pieces(edges: np.ndarray) -> Runs:
    """The pieces between the edges [windows, S + 1] of each window, step by step."""
    windows, steps = edges.shape[0], edges.shape[1] - 1
    lengths = np.diff(edges).T.ravel()
    return Runs(edges[:, :-1].T.ravel(), lengths, np.tile(np.arange(windows), steps))


def _bounds(edges: np.ndarray) -> np.ndarray:
    """Where each step's rows begin in the batches, and where the last one's end: int64 [S + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.diff(edges).sum(0))])
