"""What a meta-learner sees of a batch: padded tensors, torch alone.

Symbols: T tasks, E events (padded), F width of the fixed inputs, R rows of one adapted feature in a task (padded),
M ids of that feature in one event (padded), D embedding width, H width of a representation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Slots(NamedTuple):
    """Which of a task's adapted rows an event uses: positions into R, and a mask of the positions in use."""

    index: Tensor  # int64 [T, E, M]
    mask: Tensor  # float [T, E, M]


@dataclass(frozen=True)
class Examples:
    """Support or query of T tasks. Padding has `mask` 0 and must not change any result."""

    x: Tensor  # float [T, E, F]: every input that isn't adapted, concatenated
    slots: dict[str, Slots]  # adapted feature → the rows its events use
    labels: Tensor  # float [T, E]
    mask: Tensor  # float [T, E]: 1 for an event, 0 for padding
    #: float [T, E, H]: what the base learner represents the events by, where that was made once an item and not once an
    #: event (see `learner.MetaLearner.by_items`). `x` is then [T, 1, F], the task's columns and zeros.
    represented: Tensor | None = None

    def tasks(self, start: int, stop: int) -> Examples:
        """The tasks from `start` to `stop`."""
        return Examples(
            self.x[start:stop],
            {name: Slots(s.index[start:stop], s.mask[start:stop]) for name, s in self.slots.items()},
            self.labels[start:stop],
            self.mask[start:stop],
            None if self.represented is None else self.represented[start:stop],
        )


@dataclass(frozen=True)
class Episodes:
    """T tasks: support, query, and the embedding rows that each task may adapt."""

    support: Examples
    query: Examples
    rows: dict[str, Tensor]  # adapted feature → float [T, R, D], differentiable to the tables
    weights: Tensor | None = None  # float [T]: what each task counts in the meta-loss; None: 1 each

    @property
    def size(self) -> int:
        """Number of tasks, T."""
        return int(self.support.labels.shape[0])

    def weighed(self, of_tasks: Tensor) -> Tensor:
        """What is the tasks', [T, …], by what each task counts."""
        if self.weights is None:
            return of_tasks
        return of_tasks * self.weights.view(-1, *[1] * (of_tasks.dim() - 1))

    def summed(self, of_tasks: Tensor) -> Tensor:
        """The sum over tasks of what is theirs, by what each task counts: [T, …] → […]; of losses [T] a scalar."""
        return self.weighed(of_tasks).sum(0)


class Sizes(NamedTuple):
    """What of a batch decides the cost of its inner loop."""

    tasks: int
    support: int  # events of a task, padded
    query: int
    inputs: int  # width of the learner's input but for the adapted features
    rows: dict[str, tuple[int, int]]  # adapted feature → rows of a task, padded, and embedding width
    differentiable: bool = True
    itemsize: int = 4

    @classmethod
    def of(cls, support: Examples, query: Examples, rows: dict[str, Tensor]) -> Sizes:
        """Of tasks with such a support, query and initial rows."""
        x, shapes = support.x, {name: (own.shape[1], own.shape[2]) for name, own in rows.items()}
        tasks, events = support.labels.shape
        return cls(tasks, events, query.labels.shape[1], x.shape[2], shapes, x.requires_grad, x.element_size())


def gather_rows(rows: dict[str, Tensor], slots: dict[str, Slots]) -> list[Tensor]:
    """One task's adapted rows per event, pooled by their mean: rows [R, D], slots [E, M] → [E, D] a feature."""
    pooled = []
    for name in sorted(rows):
        index, mask = slots[name]
        picked = rows[name][index] * mask.unsqueeze(-1)
        pooled.append(picked.sum(-2) / mask.sum(-1, keepdim=True).clamp(min=1.0))
    return pooled


def concatenate(x: Tensor, rows: dict[str, Tensor], slots: dict[str, Slots]) -> Tensor:
    """A base learner's input for one task: fixed inputs, then the adapted features in name order: [E, F + ΣD]."""
    return torch.cat([x, *gather_rows(rows, slots)], dim=-1)


def inputs(examples: Examples, rows: dict[str, Tensor]) -> Tensor:
    """The base learner's inputs of all tasks at once, rows as they are: [T, E, F + ΣD]."""
    return torch.vmap(concatenate)(examples.x, rows, examples.slots) if rows else examples.x
