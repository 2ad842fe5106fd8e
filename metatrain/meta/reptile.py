"""Reptile: the start is pulled towards where each task's own steps lead.

Nichol, Achiam and Schulman 2018, "On First-Order Meta-Learning Algorithms": a task takes k steps of SGD from the start
θ to φ, and θ - φ serves the outer optimizer as a gradient. Divided by the inner rate α, as the paper finds most natural
for adaptive optimizers, it is the sum of the k inner gradients: g = (θ - φ)/α. No gradient is taken through the steps,
and none of a query loss.

How it goes through the one backward that trains tables and parameters alike, and where it departs from the paper:

- `total` has the query losses' value, so curves say what they say of other methods, and the gradient below: it is the
  value plus a term s - stop(s), which is 0.
- What adapts gets Σ over tasks of (θ - φ)/α, adapted embedding rows too. What doesn't adapt has no φ: other parameters
  and the inputs, which are embeddings, get the first-order gradient of a loss at φ.
- The paper knows no query: a task's steps see all its data. So they do with `sees: all`, in training alone, and the
  loss at φ is that of all the task's events. With `sees: support` steps see the support, and the loss at φ is the
  query's, which what doesn't adapt then learns to generalise by (as in FOMAML); what adapts never sees the query.
- In use a task adapts on its support, whatever `sees` is. So does the loss that is reported: with `sees: all` the inner
  loop runs twice, or the curve would be that of events already seen.
- Every step is on all of the task's events; the paper draws minibatches. The paper's analysis, that (θ - φ)/α also has
  the term by which MAML's gradient exceeds that of joint training, holds of either; with one step it is joint training.

Symbols: T tasks, S and Q support and query events (padded), R rows of an adapted feature in a task, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from metatrain.meta.engine import FastWeights, Tensors
from metatrain.meta.episode import Episodes, Examples, Sizes, Slots
from metatrain.meta.learner import QueryLoss
from metatrain.meta.low_rank_choice import EngineName
from metatrain.meta.maml import MAML
from metatrain.meta.memory import Plan


class Reptile(MAML):
    """Reptile around any base learner.

    Args:
        learner, steps, adapt, adapt_rows, chunk, memory, loss, inner_loss, huber_delta, precision, engine: See `MAML`.
        rate: The inner rate α, also what the pull is divided by.
        sees: What a task's steps see in training: all its events, or its support.

    Raises:
        ValueError: No steps, a `sees` that is unknown, a rate that isn't positive; or see `MAML`.
    """

    def __init__(
        self,
        learner: nn.Module,
        *,
        steps: int = 5,
        rate: float = 0.01,
        adapt: Iterable[str] = ("*",),
        adapt_rows: Iterable[str] = (),
        chunk: int = 0,
        memory: int = 1 << 30,
        loss: str = "squared",
        inner_loss: str | None = None,
        huber_delta: float = 1.0,
        precision: torch.dtype | None = None,
        engine: EngineName = "auto",
        sees: Literal["support", "all"] = "all",
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}: nothing is learned but from where they lead")
        if not rate > 0:
            raise ValueError(f"rate must be above 0, got {rate}: the way that steps took is divided by it")
        if sees not in ("support", "all"):
            raise ValueError(f"unknown sees {sees!r}: support, all")
        super().__init__(
            learner,
            order=1,
            steps=steps,
            rate=rate,
            adapt=adapt,
            adapt_rows=adapt_rows,
            chunk=chunk,
            memory=memory,
            keep=0,
            loss=loss,
            inner_loss=inner_loss,
            huber_delta=huber_delta,
            precision=precision,
            engine=engine,
        )
        if not self.rate_names:
            raise ValueError("nothing adapts, so nothing is pulled: name parameters in adapt, or adapt_rows")
        self.sees = sees

    def plan(self, sizes: Sizes) -> Plan:
        """See `MAML.plan`."""
        return super().plan(sizes._replace(support=self._seen(sizes)))

    def _counted_seconds(self, sizes: Sizes) -> float:
        at_all = self._engine.seconds(self.adapted, self.steps, sizes._replace(support=self._seen(sizes)))
        return at_all + (self._engine.seconds(self.adapted, self.steps, sizes) if self.sees == "all" else 0.0)

    def _seen(self, sizes: Sizes) -> int:
        return sizes.support + (sizes.query if self.sees == "all" else 0)

    def _fuses(self, episodes: Episodes) -> bool:
        return False  # every task's weights are held, by either engine

    def _query_loss(self, parameters: Tensors, rates: Tensor, episodes: Episodes, keep: int) -> QueryLoss:
        support, query, rows = episodes.support, episodes.query, episodes.rows
        steps = self._step_rates(rates)
        with torch.no_grad():
            fast = self._engine.adapt(parameters, self.adapted, steps, support, rows)
            after = self._losses(parameters, fast, query)
            before = self._losses(parameters, FastWeights({}, rows), query)
        if not torch.is_grad_enabled():
            return QueryLoss(episodes.summed(after), after, before)
        seen = query
        if self.sees == "all":
            seen = joined(support, query)
            with torch.no_grad():
                fast = self._engine.adapt(parameters, self.adapted, steps, seen, rows)
        rate = rates[0, 0]
        pulled = episodes.summed(self._losses(parameters, fast, seen))
        for name, weight in fast.weights.items():
            theta = parameters[name]
            # Differences first: the sum of T weights would swallow them.
            pulled = pulled + (episodes.summed(theta.detach() - weight) / rate * theta).sum()
        for name, own in rows.items():
            pulled = pulled + (episodes.weighed(own.detach() - fast.rows[name]) / rate * own).sum()
        return QueryLoss(episodes.summed(after) + (pulled - pulled.detach()), after, before)

    def _losses(self, parameters: Tensors, fast: FastWeights, examples: Examples) -> Tensor:
        return self.task_losses(self._engine.predict(parameters, fast, examples), examples)


def joined(first: Examples, second: Examples) -> Examples:
    """The events of both, `first`'s padding between: [T, S, …] and [T, Q, …] → [T, S + Q, …]."""
    slots = {}
    for name, one in first.slots.items():
        other = second.slots[name]
        longest = max(one.index.shape[-1], other.index.shape[-1])
        both = [[pad(t, (0, longest - t.shape[-1])) for t in of] for of in (one, other)]
        slots[name] = Slots(*(torch.cat(parts, 1) for parts in zip(*both, strict=True)))
    return Examples(
        torch.cat([first.x, second.x], 1),
        slots,
        torch.cat([first.labels, second.labels], 1),
        torch.cat([first.mask, second.mask], 1),
    )
