"""The query loss after low-rank adaptation as one autograd function, chunk by chunk.

Promises: the same total, losses and gradients as adapting by plain autograd, with at most one chunk's intermediate
results alive. Gradients are taken in the forward pass and only scaled in the backward, so that a chunk is reversed
while it is still in cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metatrain.meta.losses import EventLoss, mean_over_events
from metatrain.meta.low_rank_chunk import Chunk, Inputs
from metatrain.meta.low_rank_elementwise import LossDerivatives
from metatrain.meta.low_rank_form import LinearForm
from metatrain.meta.low_rank_layers import Gradients, Workspace


@dataclass(frozen=True)
class Problem:
    """What the tensors of one call mean.

    `inputs` of the tensors given to `AdaptedLoss` are first_s, first_q and, where they are others, skip_s and skip_q;
    after them come the rates [K, N] and the parameters, named by `names`.
    """

    form: LinearForm
    names: tuple[str, ...]
    rate_names: tuple[str, ...]
    adapted: frozenset[str]
    loss: EventLoss
    inner: LossDerivatives
    order: int
    inputs: int
    chunk: int
    workspace: Callable[[Tensor], Workspace]


class AdaptedLoss(torch.autograd.Function):
    """(labels_s, weights_s, labels_q, mask_q, inputs…, rates, parameters…) → total, after [T], before [T]."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        labels_s, weights_s, labels_q, mask_q = tensors[:4]
        inputs, (rates, *values) = tensors[4 : 4 + problem.inputs], tensors[4 + problem.inputs :]
        parameters = dict(zip(problem.names, values, strict=True))
        needs = ctx.needs_input_grad[5:]
        needs_x = needs[: problem.inputs]
        d_inputs = [torch.empty_like(x) if any(needs_x) else None for x in inputs]
        found = Gradients(parameters, rates, list(problem.rate_names), bool(needs[problem.inputs]))
        # One transfer for all rates: as Python numbers they go into the products for free.
        steps = [dict(zip(problem.rate_names, row, strict=True)) for row in rates.tolist()]
        ws = problem.workspace(inputs[0])
        before, after = torch.empty_like(labels_q[:, 0]), torch.empty_like(labels_q[:, 0])
        for start in range(0, len(labels_s), problem.chunk):
            part = slice(start, start + problem.chunk)
            given = [x[part] for x in inputs]
            skip = given[2:] if problem.inputs > 2 else given if problem.form.skip else [None, None]
            chunk = Chunk(
                ws,
                problem.form,
                parameters,
                problem.adapted,
                steps,
                problem.inner,
                problem.order,
                Inputs(given[0], given[1], skip[0], skip[1], labels_s[part], weights_s[part]),
                any(needs_x),
            )
            scores_before, scores = chunk.forward()
            before[part] = mean_over_events(problem.loss(scores_before, labels_q[part]), mask_q[part])
            with torch.set_grad_enabled(any(needs)):
                scores = scores.detach().requires_grad_(any(needs))
                losses = mean_over_events(problem.loss(scores, labels_q[part]), mask_q[part])
            after[part] = losses.detach()
            if not any(needs):
                continue
            (d_s,) = torch.autograd.grad(losses, scores, torch.ones_like(losses))
            wanted = [None if d is None else d[part] for d in d_inputs]
            chunk.reverse(d_s, found, tuple((*wanted, None, None)[:4]))
        ctx.found = (d_inputs, found)
        ctx.mark_non_differentiable(after, before)
        return after.sum(), after, before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d_inputs, found = ctx.found
        ctx.found = None
        gradients = [*d_inputs, found.rates, *found.of.values()]
        for gradient, need in zip(gradients, ctx.needs_input_grad[5:], strict=True):
            if need:
                gradient.mul_(by_total)
        needed = [g if need else None for g, need in zip(gradients, ctx.needs_input_grad[5:], strict=True)]
        return None, None, None, None, None, *needed


def without_prefix(form: LinearForm, layers: int) -> LinearForm:
    """The form above its first `layers` hidden layers."""
    return replace(form, hidden=form.hidden[layers:])
