"""The engine that picks an engine: low-rank where it serves and is counted cheaper, vmap elsewhere.

Promises: the choice depends on shapes and settings alone, so every rank and every run of one configuration chooses
alike; each new choice is logged with its reason: for training, whose speed it decides, as information; for what adapts
without training, to debug.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor, nn

from metatrain.meta.engine import FastWeights, Tensors, VmapEngine
from metatrain.meta.episode import Episodes, Examples, Sizes
from metatrain.meta.losses import event_loss, mean_over_events
from metatrain.meta.low_rank import AdaptedLosses, LowRankEngine
from metatrain.meta.low_rank_cost import (
    LOW_RANK_OVERHEAD,
    VMAP_OVERHEAD,
    Choice,
    Shapes,
    choose,
    low_rank_cost,
    vmap_cost,
)
from metatrain.meta.low_rank_form import CannotServe

_log = logging.getLogger(__name__)

EngineName = Literal["auto", "low_rank", "vmap"]


class ChoosingEngine:
    """An `Engine` over the two others.

    Args:
        learner: Maps inputs [..., E, F + ΣD] to scores [..., E].
        loss: Name of the support's event loss (see `losses.event_loss`).
        order: 2, or 1 for first-order MAML.
        huber_delta: For the Huber losses.
        precision: Type of the learner's products under torch.autocast; None: as its weights.
        chunk: Most tasks whose intermediate results are held at a time; 0: no bound but `memory`.
        memory: Bytes that the low-rank engine may hold at a time; of vmap the caller takes care.
        engine: "auto", or one of the two always.
        rates_a_weight: Whether rates are tensors of their parameters' shapes, in place of scalars.

    Raises:
        CannotServe: "low_rank" was asked for, and the learner has no linear form, or a precision is given, or rates
            are a weight's own.
    """

    def __init__(
        self,
        learner: nn.Module,
        loss: str,
        order: int = 2,
        huber_delta: float = 1.0,
        precision: torch.dtype | None = None,
        chunk: int = 0,
        memory: int = 1 << 30,
        engine: EngineName = "auto",
        *,
        rates_a_weight: bool = False,
    ) -> None:
        self._learner, self._asked, self._order, self._huber_delta = learner, engine, order, huber_delta
        self._vmap = VmapEngine(learner, event_loss(loss, huber_delta), order, precision)
        self._low_rank: LowRankEngine | None = None
        self._refusal = ""
        self._logged: set[tuple[int, str]] = set()
        try:
            # Also where it is not asked for: what a learner is made of tells what vmap costs.
            self._low_rank = LowRankEngine(learner, loss, order, huber_delta, chunk, memory)
        except CannotServe as reason:
            self._refusal = f"vmap: the low-rank form can't serve: {reason}"
            if engine == "low_rank":
                raise
        others = []
        if precision is not None:
            others.append(f"its products would run in {str(precision).removeprefix('torch.')}")
        if rates_a_weight:
            # Scaled weight by weight, δᵀ z is of full rank.
            others.append("every weight has a rate of its own; take engine auto or vmap")
        for reason in others:
            self._refusal = self._refusal or f"vmap: the low-rank form can't serve: {reason}"
            if engine == "low_rank":
                raise CannotServe(reason)
        if engine == "vmap":
            self._refusal = "vmap: it was asked for"

    def choice(self, adapted: tuple[str, ...], steps: int, support: Examples, query: Examples, rows: Tensors) -> Choice:
        """The engine for such a batch, and why."""
        if self._refusal or self._low_rank is None:
            return Choice("vmap", self._refusal)
        if self._asked == "low_rank":
            return Choice("low_rank", "low_rank: it was asked for")
        if not steps or not (adapted or rows):
            return Choice("vmap", "vmap: nothing adapts")
        return choose(self._shapes(adapted, steps, Sizes.of(support, query, rows)))

    def seconds(self, adapted: tuple[str, ...], steps: int, sizes: Sizes) -> float:
        """Counted time of a `query_loss` on tasks of such sizes, by the engine that would be chosen."""
        shapes, together = self._shapes(adapted, steps, sizes), min(sizes.tasks, 64)
        by_vmap = VMAP_OVERHEAD + sizes.tasks * vmap_cost(shapes).seconds(together)
        if self._refusal:
            return by_vmap
        by_low_rank = LOW_RANK_OVERHEAD + sizes.tasks * low_rank_cost(shapes).seconds(together)
        return by_low_rank if self._asked == "low_rank" else min(by_low_rank, by_vmap)

    def _shapes(self, adapted: tuple[str, ...], steps: int, sizes: Sizes) -> Shapes:
        tasks, support, query, inputs, rows, differentiable, itemsize = sizes
        of_rows = tuple(rows[name] for name in sorted(rows))
        if self._low_rank is None:
            # A learner of unknown make: a layer of as many weights.
            width = -(-sum(p.numel() for p in self._learner.parameters()) // max(inputs, 1))
            return Shapes(
                tasks, support, query, inputs, (width,), 0, steps, self._order, differentiable, itemsize, (), of_rows
            )
        return self._low_rank.shapes(adapted, steps, sizes[:3], inputs, rows, differentiable, itemsize)

    def _takes_low_rank(self, choice: Choice, level: int) -> bool:
        # One line for each engine and kind of reason: a stream of batches has many shapes.
        kind = choice.reason.split(" at ")[0].split(" µs")[0].rstrip("0123456789")
        if (level, kind) not in self._logged:
            self._logged.add((level, kind))
            _log.log(level, "inner loop by %s", choice.reason)
        return choice.engine == "low_rank"

    def adapt(
        self,
        parameters: Tensors,
        adapted: tuple[str, ...],
        rates: list[dict[str, Tensor]],
        support: Examples,
        rows: Tensors,
    ) -> FastWeights:
        """See `Engine.adapt`."""
        # Weights a task are the result here, and the shared query loss isn't taken: low-rank is chosen as for training.
        choice = self.choice(adapted, len(rates), support, support, rows)
        if self._takes_low_rank(choice, logging.DEBUG) and self._low_rank is not None:
            return self._low_rank.adapt(parameters, adapted, rates, support, rows)
        return self._vmap.adapt(parameters, adapted, rates, support, rows)

    def predict(self, parameters: Tensors, fast: FastWeights, examples: Examples) -> Tensor:
        """See `Engine.predict`."""
        return self._vmap.predict(parameters, fast, examples)

    def fuses(self, adapted: tuple[str, ...], steps: int, episodes: Episodes) -> bool:
        """Whether `query_loss` takes these tasks in chunks of its own, so that the caller need not."""
        return self.choice(adapted, steps, episodes.support, episodes.query, episodes.rows).engine == "low_rank"

    def query_loss(
        self,
        parameters: Tensors,
        adapted: tuple[str, ...],
        rates: list[dict[str, Tensor]],
        episodes: Episodes,
        loss: str,
        keep: int = 0,
    ) -> AdaptedLosses:
        """The tasks' query losses, see `LowRankEngine.query_loss`.

        Args:
            loss: Name of the query's event loss.
            keep: See `VmapEngine.adapt`.
        """
        choice = self.choice(adapted, len(rates), episodes.support, episodes.query, episodes.rows)
        if self._takes_low_rank(choice, logging.INFO) and self._low_rank is not None:
            return self._low_rank.query_loss(parameters, adapted, rates, episodes, loss)
        query, of_event = episodes.query, event_loss(loss, self._huber_delta)
        fast = self._vmap.adapt(parameters, adapted, rates, episodes.support, episodes.rows, keep)
        scores = self._vmap.predict(parameters, fast, query)
        after = mean_over_events(of_event(scores, query.labels), query.mask)
        with torch.no_grad():
            scores = self._vmap.predict(parameters, FastWeights({}, episodes.rows), query)
            before = mean_over_events(of_event(scores, query.labels), query.mask)
        return AdaptedLosses(episodes.summed(after), after.detach(), before)
