"""TaskBatch: tasks as flat columns, the same fields for numpy arrays (readers) and tensors (workers, all int64).

Two tasks, the first with 3 support and 1 query event, the second with 2 and 2; items 4, 7, 9 in all::

    tasks            [ 17,      3 ]            ordinals in the split (see `EpochPlan`)
    support_lengths  [  3,      2 ]
    query_lengths    [  1,      2 ]
    items            [  4, 7, 9 ]              catalogue rows, unique, ascending: one lookup each
    event_items      [  0 2 1 | 2 | 1 0 | 0 2 ]  positions in `items`; a task's support, then its query
    labels           [  5 4 3 | 4 | 2 5 | 1 3 ]

Symbols: T tasks, N events (all tasks, support and query), U unique items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Array = Any  # np.ndarray on the reader's side, torch.Tensor on the worker's


@dataclass(frozen=True)
class Ragged:
    """A multi-valued feature: `values` of all rows behind one another, `lengths` of each row."""

    values: Array  # int32
    lengths: Array  # int32


#: A feature's column: ids [n] (categorical), Ragged (multi), numbers [n] (numeric), numbers [n, width] (vector).
Column = Array | Ragged


@dataclass(frozen=True)
class TaskBatch:
    """Tasks of one step, or of a part of it. Built by `data.reader`, consumed by `model`."""

    tasks: Array  # int64 [T]
    support_lengths: Array  # int64 [T]
    query_lengths: Array  # int64 [T]
    items: Array  # int32 [U]
    event_items: Array  # int32 [N]
    labels: Array  # float32 [N]
    timestamps: Array | None  # int64 [N]; None where they were not read, as in training
    task_features: dict[str, Column] = field(default_factory=dict)  # n = T
    item_features: dict[str, Column] = field(default_factory=dict)  # n = U
    event_features: dict[str, Column] = field(default_factory=dict)  # n = N
    skipped: int = 0  # tasks of the plan that had too few events for the episode's bounds

    @property
    def size(self) -> int:
        """Number of tasks, T."""
        return int(self.tasks.shape[0])

    def tensors(self, device: torch.device | str = "cpu") -> TaskBatch:
        """The same batch as tensors on a device; integers become int64. No copy on the CPU where none is needed.

        So the tensors may be the arrays' own memory, which a `TaskStream` shares with the object store: they must not
        be written to.
        """
        import torch  # here: a reader's process makes no tensor, and starts without torch's seconds and megabytes

        def convert(array: np.ndarray) -> torch.Tensor:
            tensor = torch.from_numpy(array if array.flags.writeable else np.asarray(_Unprotected(array)))
            return (tensor if tensor.is_floating_point() else tensor.long()).to(device, non_blocking=True)

        return self.mapped(convert)

    def mapped(self, change: Callable[[Any], Array]) -> TaskBatch:
        """The same batch with every array changed."""

        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: changed(column) for name, column in value.items()}
            if isinstance(value, Ragged):
                return Ragged(change(value.values), change(value.lengths))
            return value if value is None or isinstance(value, int) else change(value)

        return TaskBatch(**{f.name: changed(getattr(self, f.name)) for f in fields(self)})


class _Unprotected:
    """An array from Ray's object store as one that may be written to: torch knows no tensors that may not.

    Holds the array, whose memory the object store keeps for as long.
    """

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


@dataclass(frozen=True)
class TaskBatches:
    """The batches of consecutive steps as one array a column, so that they are made and sent in one go.

    Iterating gives the batches, whose columns are pieces of these: nothing is copied.
    """

    columns: TaskBatch  # of all steps, behind one another; `event_items` counts inside of its own step
    skipped: tuple[int, ...]  # of each of the S steps
    task_bounds: tuple[int, ...]  # [S + 1]: where each step's tasks begin, and where the last one's end
    item_bounds: tuple[int, ...]  # [S + 1]
    event_bounds: tuple[int, ...]  # [S + 1]

    def __len__(self) -> int:
        """Number of steps, S."""
        return len(self.skipped)

    @property
    def bytes(self) -> int:
        """Of all columns."""
        sizes: list[int] = []
        self.columns.mapped(lambda array: sizes.append(array.nbytes) or array)
        return sum(sizes)

    def __iter__(self) -> Iterator[TaskBatch]:
        """The steps' batches."""
        whole = self.columns
        tasks, items, events = (
            [slice(*pair) for pair in pairwise(b)] for b in (self.task_bounds, self.item_bounds, self.event_bounds)
        )
        features = zip(
            _of_steps(whole.task_features, tasks),
            _of_steps(whole.item_features, items),
            _of_steps(whole.event_features, events),
            strict=True,
        )
        for t, u, n, own, skipped in zip(tasks, items, events, features, self.skipped, strict=True):
            yield TaskBatch(
                whole.tasks[t],
                whole.support_lengths[t],
                whole.query_lengths[t],
                whole.items[u],
                whole.event_items[n],
                whole.labels[n],
                None if whole.timestamps is None else whole.timestamps[n],
                *own,
                skipped,
            )


def _of_steps(columns: dict[str, Column], steps: list[slice]) -> list[dict[str, Column]]:
    """The rows of each step."""
    pieces = [_cuts(column, steps) for column in columns.values()]
    return [dict(zip(columns, rows, strict=True)) for rows in zip(*pieces, strict=True)] or [{} for _ in steps]


def _cuts(column: Column, steps: list[slice]) -> list[Column]:
    if not isinstance(column, Ragged):
        return [column[rows] for rows in steps]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(column.lengths)])
    values = [
        slice(*pair)
        for pair in zip(*(offsets[[getattr(s, end) for s in steps]].tolist() for end in ("start", "stop")), strict=True)
    ]
    return [Ragged(column.values[own], column.lengths[rows]) for own, rows in zip(values, steps, strict=True)]
