"""The query loss after low-rank adaptation as one autograd function.

Promises: the same total, losses and gradients as adapting by plain autograd. Gradients are taken in the forward pass,
while what they need is in cache, and only scaled in the backward: task by task by kernels of our own (`low_rank_tasks`)
where there are some, else chunk by chunk by torch (`low_rank_chunks`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from metatrain.meta.losses import mean_over_events
from metatrain.meta.low_rank_chunk import Sizes
from metatrain.meta.low_rank_chunks import Recordings, by_chunks
from metatrain.meta.low_rank_problem import Given, Problem
from metatrain.meta.low_rank_tasks import Translations, by_tasks


class AdaptedLoss(Function):
    """(labels_s, weights_s, labels_q, mask_q, counts, inputs…, rates, parameters…) → total, after [T], before [T].

    `counts` [T] is what each task counts in the total.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, problem: Problem, recordings: Recordings, translations: Translations, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        labels_s, weights_s, labels_q, mask_q, counts = tensors[:5]
        inputs, (rates, *values) = tensors[5 : 5 + problem.inputs], tensors[5 + problem.inputs :]
        needs = [need and problem.differentiate for need in ctx.needs_input_grad[8:]]
        weights_q = mask_q * (counts / mask_q.sum(-1).clamp(min=1.0)).unsqueeze(-1)
        given = Given(labels_s, weights_s, labels_q, weights_q, inputs, rates, tuple(values))
        sizes = Sizes(
            len(labels_s),
            labels_s.shape[1],
            labels_q.shape[1],
            inputs[0].shape[2],
            inputs[2].shape[2] if problem.skips else 0,
            problem.rows,
            problem.adapted,
            problem.order,
            len(rates),
            any(needs[: 4 if problem.skips else 2]),
            needs[problem.inputs],
            any(needs),
        )
        found = by_tasks(problem, translations, sizes, given) or by_chunks(problem, recordings, sizes, given)
        after = mean_over_events(problem.loss(found.after, labels_q), mask_q)
        before = mean_over_events(problem.loss(found.before, labels_q), mask_q)
        if sizes.reverses:
            ctx.found = [*found.d_inputs, *found.gradients]
        ctx.mark_non_differentiable(after, before)
        return (counts * after).sum(), after, before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # Not in place: a graph may be retained and go backward again.
        needs = ctx.needs_input_grad[8:]
        scaled = [g * by_total if need and g is not None else None for g, need in zip(ctx.found, needs, strict=True)]
        return None, None, None, None, None, None, None, None, *scaled
