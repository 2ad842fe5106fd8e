"""TaskBatch: tasks as flat columns, the same fields for numpy arrays (readers) and tensors (workers).

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

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Array = Any  # np.ndarray on the reader's side, torch.Tensor on the worker's


@dataclass(frozen=True)
class Ragged:
    """A multi-valued feature: `values` of all rows behind one another, `lengths` of each row."""

    values: Array
    lengths: Array


#: A feature's column: ids [n] (categorical), Ragged (multi), numbers [n] (numeric), numbers [n, width] (vector).
Column = Array | Ragged


@dataclass(frozen=True)
class TaskBatch:
    """Tasks of one step, or of a part of it. Built by `data.reader`, consumed by `model`."""

    tasks: Array  # int64 [T]
    support_lengths: Array  # int64 [T]
    query_lengths: Array  # int64 [T]
    items: Array  # int64 [U]
    event_items: Array  # int64 [N]
    labels: Array  # float32 [N]
    timestamps: Array  # int64 [N]
    task_features: dict[str, Column] = field(default_factory=dict)  # n = T
    item_features: dict[str, Column] = field(default_factory=dict)  # n = U
    event_features: dict[str, Column] = field(default_factory=dict)  # n = N
    skipped: int = 0  # tasks of the plan that had too few events for the episode's bounds

    @property
    def size(self) -> int:
        """Number of tasks, T."""
        return int(self.tasks.shape[0])

    def tensors(self, device: torch.device | str = "cpu") -> TaskBatch:
        """The same batch as tensors on a device; integers become int64. No copy on the CPU where none is needed."""
        import torch  # here: a reader's process makes no tensor, and starts without torch's seconds and megabytes

        def convert(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: convert(column) for name, column in value.items()}
            if isinstance(value, Ragged):
                return Ragged(convert(value.values), convert(value.lengths))
            if isinstance(value, np.ndarray):
                # Arrays from Ray's object store are read-only, which torch cannot express: copy those.
                array = value if value.flags.writeable else value.copy()
                tensor = torch.from_numpy(array)
                return (tensor if tensor.is_floating_point() else tensor.long()).to(device, non_blocking=True)
            return value

        return replace(self, **{f.name: convert(getattr(self, f.name)) for f in fields(self)})
