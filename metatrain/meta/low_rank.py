"""The low-rank inner-loop engine: MAML's exact meta-gradient without a weight matrix a task where inputs are wide.

Serves base learners made of linear layers, biases, layer normalisation and elementwise activations
(`low_rank_form.LinearForm`); refuses others with the reason (`CannotServe`).

**Forward.** A linear layer is h = z Wᵀ + b. With δ the support loss's gradient at h, a step of SGD takes
Wₖ₊₁ = Wₖ - αₖ δₖᵀ zₖ. So at step k

    z Wₖᵀ = z W₀ᵀ - Σⱼ (z zⱼᵀ) αⱼ δⱼ        δ Wₖ = δ W₀ - Σⱼ (δ δⱼᵀ) αⱼ zⱼ

one large product that all tasks share, and small ones of support by support. What follows from it:

- *The lowest layer that adapts, and a head that sees the inputs.* The inputs never change, so neither do their inner
  products G = x x_sᵀ, and the sum collapses: h = x W₀ᵀ - G A with A = Σ αⱼ δⱼ. Neither work nor memory grows with the
  steps, and the width of the input enters only through two products a call.
- *Hidden layers.* Their inputs change, so factors pile up: from the second step on, with S support events, k S
  factors cost more than a weight matrix a task of the layers' small widths. They get one, `Wₖ`, from step 1 on; step
  0 shares W₀, and the last step, which would be used by the query alone, stays as factors.
- *The head.* One vector a task.
- *Adapted embedding rows.* An event reads r = P rows, the mean over its slots, and rowsₖ₊₁ = rowsₖ - β P_sᵀ ρ with
  ρ the gradient at r: so r = r₀ - K B with K = P P_sᵀ and B = Σ βⱼ ρⱼ, the first layer's form once more, and K
  never changes. The inputs are [x, r]. The columns of the first layer that read r are a hidden layer (their inputs
  change), those of the head a vector a task; both add to what the columns of x give. The gradient at x is never needed.

**Reverse.** Written d_q for the derivative of the query loss in q, from the last step to the first:

    Wₖ₊₁ = Wₖ - α δᵀ z          d_δ  = -α z d_Wᵀ,   d_z = -α δ d_W,   d_α = -⟨z d_Wᵀ, δ⟩
    δ = g ⊙ f'(h), g = δ⁺ W⁺    d_g  = d_δ ⊙ f'(h),  d_h = d_δ ⊙ g ⊙ f''(h),  d_δ⁺ += d_g W⁺ᵀ,  d_W⁺ += δ⁺ᵀ d_g
    e = l'(s, y) w              d_s  = d_e l''(s, y) w
    z = f(h), h = z⁻ Wᵀ         d_h += d_z ⊙ f'(h),  d_z⁻ += d_h W,  d_W += d_hᵀ z⁻
    A₊ = A + α δ, h = hₒ - G A  d_δ  = α d_A,  d_A -= Gᵀ d_h,  d_G -= d_h Aᵀ,  d_hₒ += d_h
    B₊ = B + β ρ, r = r₀ - K B  d_ρ  = β d_B,  d_β = ⟨d_B, ρ⟩,  d_B -= Kᵀ d_r,  d_r₀ += d_r
    ρ = δ V                     d_δ += d_ρ Vᵀ,  d_V += δᵀ d_ρ

(⁺ the layer above, ⁻ the one below; V the columns that read r.) d_hₒ gathers over all steps and meets the inputs in
one product at the end, d_W₀ = d_hₒᵀ x; d_x = d_hₒ W₀ + (d_G + d_Gᵀ) x. From d_r₀ plain autograd goes on to the rows,
by Pᵀ. In first order the support's part is constant: only d_α and d_β are taken. Where layers are normalised, f is of
what the normalisation makes of h, and `low_rank_norm` has its part.

**Memory.** Gradients are taken in the forward pass, while what they need is in cache, in buffers kept between calls
(fresh large tensors cost more in page faults than the arithmetic they hold): on CPUs task by task by kernels of our
own, which hold one task's buffers a thread (`low_rank_tasks`); elsewhere chunk by chunk by torch, some megabytes an
engine and thread (`memory.low_rank_bytes`). Of a step, outputs, slopes, gradients and the weights above the first layer
are kept: a chunk of many steps has fewer tasks, and steps are never computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metatrain.meta import low_rank_adapt
from metatrain.meta.engine import FastWeights, Tensors, VmapEngine
from metatrain.meta.episode import Episodes, Examples
from metatrain.meta.losses import EventLoss, event_loss
from metatrain.meta.low_rank_chunks import Recordings
from metatrain.meta.low_rank_cost import Shapes
from metatrain.meta.low_rank_elementwise import ACTIVATIONS, loss_derivatives
from metatrain.meta.low_rank_form import CannotServe, describe
from metatrain.meta.low_rank_loss import AdaptedLoss
from metatrain.meta.low_rank_problem import Problem
from metatrain.meta.low_rank_rows import RowFeature, pool
from metatrain.meta.low_rank_tasks import Translations
from metatrain.meta.memory import low_rank_bytes

__all__ = ["AdaptedLosses", "CannotServe", "LowRankEngine"]

#: A chunk's working set: within the last-level cache's share of a process.
CHUNK_BYTES = 48 << 20


class AdaptedLosses(NamedTuple):
    """The query losses of T tasks."""

    total: Tensor  # scalar to differentiate: the sum over tasks of each one's mean query loss after adaptation
    after: Tensor  # [T], detached: each task's mean query loss after adaptation
    before: Tensor  # [T], detached: the same with the shared parameters


class LowRankEngine:
    """An `Engine` for learners with a linear form, and the whole query loss in one function.

    Args:
        learner: Maps inputs [..., E, F] to scores [..., E].
        loss: Loss of a support event: a name of `losses.event_loss`, or any elementwise function.
        order: 2, or 1 for first-order MAML.
        huber_delta: For the loss of that name.
        chunk: Most tasks taken at a time; 0: as many as `CHUNK_BYTES` holds.
        memory: Bytes that a chunk may hold, where few tasks are more than `CHUNK_BYTES`.

    Raises:
        CannotServe: The learner has no linear form.
    """

    def __init__(
        self,
        learner: nn.Module,
        loss: str | EventLoss,
        order: int = 2,
        huber_delta: float = 1.0,
        chunk: int = 0,
        memory: int = 1 << 30,
    ) -> None:
        self.form = describe(learner)
        #: Outputs of the hidden layers.
        self.widths = tuple(learner.get_parameter(names.weight).shape[0] for names in self.form.hidden)
        self._order, self._chunk, self._memory, self._huber_delta = order, chunk, memory, huber_delta
        self._loss = event_loss(loss, huber_delta) if isinstance(loss, str) else loss
        self._derivatives = loss_derivatives(loss, huber_delta)
        self._vmap = VmapEngine(learner, self._loss, order)
        self._recordings, self._translations = Recordings(), Translations()

    def adapt(
        self,
        parameters: Tensors,
        adapted: tuple[str, ...],
        rates: list[dict[str, Tensor]],
        support: Examples,
        rows: Tensors,
    ) -> FastWeights:
        """See `Engine.adapt`."""
        if not rates or not (adapted or rows):
            return self._vmap.adapt(parameters, adapted, rates, support, rows)
        lowest = self.lowest(adapted, rows)
        return low_rank_adapt.adapt(
            self.form, parameters, adapted, rates, support, rows, self._loss, self._order, lowest
        )

    def predict(self, parameters: Tensors, fast: FastWeights, examples: Examples) -> Tensor:
        """See `Engine.predict`."""
        return self._vmap.predict(parameters, fast, examples)

    def query_loss(
        self,
        parameters: Tensors,
        adapted: tuple[str, ...],
        rates: list[dict[str, Tensor]],
        episodes: Episodes,
        loss: str | EventLoss,
    ) -> AdaptedLosses:
        """The tasks' query losses before and after adaptation; `total` is differentiable once, to all that is given.

        Args:
            parameters, adapted, rates: See `Engine.adapt`.
            episodes: Support and query.
            loss: Of a query event: a name, which spares autograd, or any elementwise function.
        """
        support, query, form = episodes.support, episodes.query, self.form
        lowest = self.lowest(adapted, episodes.rows)
        # Layers below the lowest that adapts are the same in every step: plain autograd takes them once.
        inputs = [form.prefix(parameters, x, lowest) for x in (support.x, query.x)]
        if form.skip and lowest == len(form.hidden):
            inputs = [torch.cat([z, x], -1) for z, x in zip(inputs, (support.x, query.x), strict=True)]
        skips = form.skip and 0 < lowest < len(form.hidden)
        if skips:
            inputs += [support.x, query.x]
        features: tuple[RowFeature, ...] = ()
        if episodes.rows:
            pooled = pool(episodes.rows, support.slots, query.slots)
            features = pooled.features
            inputs += [pooled.support, pooled.query, *pooled.kernels]
        above = form.above(lowest)
        names = tuple(name for name in parameters if name in above.names)
        rate_names = tuple(rates[0]) if rates else ()
        table = torch.stack([step[name] for step in rates for name in rate_names]) if rate_names else torch.zeros(0)
        problem = Problem(
            above,
            names,
            rate_names,
            frozenset(adapted),
            event_loss(loss, self._huber_delta) if isinstance(loss, str) else loss,
            loss_derivatives(loss, self._huber_delta),
            self._derivatives,
            self._order,
            len(inputs),
            skips,
            features,
            self._chunk_for(adapted, episodes, len(rates)),
            torch.is_grad_enabled(),
        )
        weights = support.mask / support.mask.sum(-1, keepdim=True).clamp(min=1.0)
        result = AdaptedLoss.apply(
            problem,
            self._recordings,
            self._translations,
            support.labels,
            weights,
            query.labels,
            query.mask,
            episodes.weighed(torch.ones_like(query.labels[:, 0])),
            *(x.contiguous() for x in inputs),
            table.view(len(rates), len(rate_names)),
            *(parameters[name] for name in names),
        )
        return AdaptedLosses(*result)

    def lowest(self, adapted: tuple[str, ...], rows: Mapping[str, object]) -> int:
        """Which hidden layer is the lowest whose output adapts; the number of hidden layers where none does."""
        if rows:
            return 0
        layers = range(len(self.form.hidden))
        return next((i for i in layers if self.form.layer_parameters(i) & set(adapted)), len(layers))

    def shapes(
        self,
        adapted: tuple[str, ...],
        steps: int,
        events: tuple[int, int, int],
        inputs: int,
        rows: Mapping[str, tuple[int, int]],
        differentiable: bool,
        itemsize: int,
    ) -> Shapes:
        """One call's shapes.

        Args:
            adapted: Names of the parameters that adapt.
            steps: Inner steps.
            events: T, S and Q, padded.
            inputs: Width of the learner's input but for the adapted features.
            rows: Adapted feature → rows of a task, padded, and embedding width.
            differentiable: Whether the inputs' gradient is wanted.
            itemsize: Bytes of a number.
        """
        lowest = self.lowest(adapted, rows)
        reads = (inputs, *self.widths)
        wide, skip = reads[lowest], inputs if self.form.skip else 0
        if lowest == len(self.widths):
            wide, skip = wide + skip, 0
        return Shapes(
            *events,
            wide,
            self.widths[lowest:],
            skip,
            steps,
            self._order,
            differentiable,
            itemsize,
            reads[: lowest + 1] if lowest else (),
            tuple(rows[name] for name in sorted(rows)),
            not rows or any(names.weight in adapted for names in self.form.hidden),
            bool(self.form.norms),
        )

    def task_bytes(self, shapes: Shapes) -> int:
        """A task's share of a chunk's buffers."""
        return low_rank_bytes(shapes, not ACTIVATIONS[self.form.activation].straight)

    def _chunk_for(self, adapted: tuple[str, ...], episodes: Episodes, steps: int) -> int:
        support = episodes.support
        tasks, events, inputs = support.x.shape
        of_rows = {name: (own.shape[1], own.shape[2]) for name, own in episodes.rows.items()}
        sizes = (tasks, events, episodes.query.labels.shape[1])
        a_task = self.task_bytes(
            self.shapes(adapted, steps, sizes, inputs, of_rows, support.x.requires_grad, support.x.element_size())
        )
        # Below a few tasks the calls' own time would outweigh what the cache saves.
        fit = max(min(16, self._memory // a_task), min(256, CHUNK_BYTES // a_task), 1)
        return min(fit, self._chunk) if self._chunk else fit
