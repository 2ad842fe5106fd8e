"""Matrix factorisation with biases, new users folded in by ridge regression: the strongest of the baselines.

Fitted by alternating least squares. No loop over users, items or events: rows with like numbers of events are solved
together, padded, so that memory is bounded by a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from metatrain.evaluate.tasks import PaddedTasks
from metatrain.evaluate.training_events import TrainingEvents

Array = np.ndarray


@dataclass(frozen=True)
class Factorisation:
    """Biases and item factors; a task's bias and factor by ridge regression on its support, all tasks at once."""

    mean: float
    items: Array  # float64 [I]: biases
    factors: Array  # float64 [I, R]
    user_shrinkage: float
    regularisation: float
    name: str = "matrix factorisation fold-in"
    predicts: bool = True

    def scores(self, tasks: PaddedTasks) -> Array:
        residuals = np.where(
            tasks.support_mask, tasks.support_labels - self.mean - self.items[tasks.support_items], 0.0
        )
        x_TSR = self._inputs(tasks.support_items) * tasks.support_mask[..., None]
        penalty = np.diag([max(self.user_shrinkage, 1e-9), *[self.regularisation] * self.factors.shape[1]])
        gram = x_TSR.transpose(0, 2, 1) @ x_TSR + penalty
        users_TR = np.linalg.solve(gram, x_TSR.transpose(0, 2, 1) @ residuals[..., None])[..., 0]
        folded = np.einsum("tqr,tr->tq", self._inputs(tasks.query_items), users_TR)
        return self.mean + self.items[tasks.query_items] + folded

    def _inputs(self, items: Array) -> Array:
        return np.concatenate([np.ones((*items.shape, 1)), self.factors[items]], axis=-1)


def fit_factors(
    events: TrainingEvents, residuals: Array, rank: int, regularisation: float, rounds: int, seed: int
) -> Array:
    """Item factors [I, rank] by alternating least squares: Σ (r - p·q)² + λ (Σ|p|² + Σ|q|²)."""
    generator = np.random.default_rng(seed)
    items = generator.normal(0.0, 0.1, size=(events.item_count, rank))
    items[np.bincount(events.items, minlength=events.item_count) == 0] = 0.0
    values = residuals.astype(np.float32)
    by_item = np.argsort(events.items, kind="stable")
    user_side = _Rows.of(events.users, events.user_count)
    item_side = _Rows.of(events.items[by_item], events.item_count)
    partners, item_values = events.users[by_item], values[by_item]
    for _ in range(rounds):
        users = user_side.solve(items, events.items, values, regularisation)
        items = item_side.solve(users, partners, item_values, regularisation)
    return items


@dataclass(frozen=True)
class _Rows:
    """One side of the matrix: where each row's events lie, rows of like length together so that padding is bounded."""

    count: int
    groups: tuple[tuple[Array, Array, Array], ...]  # rows [B], starts [B], lengths [B]

    @classmethod
    def of(cls, rows: Array, count: int, block: int = 1 << 16) -> _Rows:
        lengths = np.bincount(rows, minlength=count)
        starts = np.cumsum(lengths) - lengths
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] > 0]
        # A block ends where its padded size would pass `block` events; lengths ascend, so padding stays small.
        groups, ordered = [], lengths[order]
        start = 0
        while start < len(order):
            padded = np.arange(1, len(order) - start + 1) * ordered[start:]
            stop = start + max(1, int(np.searchsorted(padded, block, side="right")))
            picked = order[start:stop]
            groups.append((picked, starts[picked], lengths[picked]))
            start = stop
        return cls(count, tuple(groups))

    def solve(self, other: Array, partners: Array, values: Array, regularisation: float) -> Array:
        """The rows' ridge solutions [count, R], given the other side's factors [., R]; 0 for a row without events."""
        rank = other.shape[1]
        solved = np.zeros((self.count, rank))
        other = other.astype(np.float32)
        for rows, starts, lengths in self.groups:
            columns = np.arange(int(lengths[-1]))[None, :]
            mask = columns < lengths[:, None]
            index = np.where(mask, starts[:, None] + columns, 0)
            x = other[partners[index]] * mask[..., None]
            gram = (x.transpose(0, 2, 1) @ x).astype(np.float64) + regularisation * np.eye(rank)
            right = x.transpose(0, 2, 1) @ (values[index] * mask)[..., None]
            solved[rows] = np.linalg.solve(gram, right.astype(np.float64))[..., 0]
        return solved
