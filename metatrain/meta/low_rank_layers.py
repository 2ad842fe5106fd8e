"""Linear layers with fast weights, their inner backward, and the hand-written reverse of both.

Promises: every product is one call over all tasks of a chunk, recorded in a `Program`, into a buffer of its workspace.

A layer is `h = z Wₖᵀ + bₖ` at inner step k, with `δ` the support loss's gradient at h; a step takes
`Wₖ₊₁ = Wₖ - α δᵀ z` and `bₖ₊₁ = bₖ - β Σ δ`. An adjoint, the query loss's derivative, is written `d_`:
`d_w` is that of Wₖ₊₁ on the way back. Symbols: T tasks of the chunk, S support, Q query, I input width, O output
width, K inner steps. `low_rank` has the mathematics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metatrain.meta.low_rank_products import multiply, multiply_add
from metatrain.meta.low_rank_program import Program, Workspace


@dataclass(frozen=True)
class Linear:
    """A linear layer's shared parameters, or some columns of its weight, and which of them adapt."""

    weight_name: str
    bias_name: str | None
    weight: Tensor  # [O, I]
    bias: Tensor | None  # [O]
    adapts_weight: bool
    adapts_bias: bool
    start: int = 0  # which column of the named parameter is the first of `weight`

    def part(self, start: int, width: int, bias: bool) -> Linear:
        """So many columns of the whole weight from that one on, with the bias or without."""
        part = replace(self, weight=self.weight[:, start : start + width], start=start)
        return part if bias else replace(part, bias_name=None, bias=None, adapts_bias=False)


class Gradients:
    """Where the reverse adds what it finds: the shared parameters' adjoints by name, and the rates' [K, N]."""

    def __init__(self, of: dict[str, Tensor], rates: Tensor, names: tuple[str, ...], learned: bool) -> None:
        self.of, self.rates, self.learned = of, rates, learned
        self._column = {name: i for i, name in enumerate(names)}

    def weight(self, layer: Linear) -> Tensor:
        """The adjoint of a layer's shared weight."""
        return self.of[layer.weight_name][:, layer.start : layer.start + layer.weight.shape[1]]

    def rate(self, step: int, name: str) -> Tensor:
        """The adjoint of one rate, without axes."""
        return self.rates[step, self._column[name]]


class Gram:
    """Inner products of inputs that don't change between steps: they are all that adaptation needs of the inputs.

    `support` is x_s x_sᵀ [T, S, S], `query` is x_q x_sᵀ [T, Q, S]; with `differentiable`, their adjoints beside.
    With one step `support` is None: no support event meets weights that have moved.
    """

    def __init__(
        self, p: Program, ws: Workspace, name: str, x_s: Tensor, x_q: Tensor, steps: int, differentiable: bool
    ) -> None:
        (tasks, events, _), queries = x_s.shape, x_q.shape[1]
        self.x_s, self.x_q = x_s, x_q
        self.support = ws(f"{name}.ss", tasks, events, events) if steps > 1 else None
        self.query = ws(f"{name}.qs", tasks, queries, events)
        p(torch.bmm, x_q, x_s.mT, out=self.query)
        self.d_query = ws(f"{name}.d_qs", tasks, queries, events) if differentiable else None
        self.d_support: Tensor | None = None
        if self.support is not None:
            p(torch.bmm, x_s, x_s.mT, out=self.support)
            if differentiable:
                self.d_support = ws(f"{name}.d_ss", tasks, events, events)
                self._both = ws(f"{name}.both", tasks, events, events)
                p(self.d_support.zero_)
        if self.d_query is not None:
            p(self.d_query.zero_)

    def into_inputs(self, p: Program, d_s: Tensor | None, d_q: Tensor) -> None:
        """Add the adjoints of the inputs; d_s None: the support's inputs are constants (first order)."""
        if self.d_query is None:
            return
        p(d_q.baddbmm_, self.d_query, self.x_s)
        if d_s is not None:
            p(d_s.baddbmm_, self.d_query.mT, self.x_q)
            if self.d_support is not None:
                p(torch.add, self.d_support, self.d_support.mT, out=self._both)
                p(d_s.baddbmm_, self._both, self.x_s)


def flat(x: Tensor) -> Tensor:
    """All tasks' events in one axis."""
    return x.view(x.shape[0] * x.shape[1], x.shape[2])


def linear(p: Program, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """x Wᵀ + b with shared parameters: one product for all tasks."""
    if bias is None:
        p(multiply, flat(x), weight.t(), out=flat(out))
    else:
        p(multiply_add, bias, flat(x), weight.t(), out=flat(out))
