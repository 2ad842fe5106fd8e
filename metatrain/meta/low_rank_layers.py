"""Linear layers with fast weights, their inner backward, and the hand-written reverse of both.

Promises: every product is one call over all tasks of a chunk, recorded in a `Program`, into a buffer of its workspace.

A layer is `h = z Wₖᵀ + bₖ` at inner step k, with `δ` the support loss's gradient at h; a step takes
`Wₖ₊₁ = Wₖ - α δᵀ z` and `bₖ₊₁ = bₖ - β Σ δ`. An adjoint, the query loss's derivative, is written `d_`:
`d_w` is that of Wₖ₊₁ on the way back. Symbols: T tasks of the chunk, S support, Q query, I input width, O output
width, K inner steps. `low_rank` has the mathematics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metatrain.meta.low_rank_products import accumulate, multiply, multiply_add
from metatrain.meta.low_rank_program import Program, Rate, Workspace, add_product_sum


@dataclass(frozen=True)
class Linear:
    """A linear layer's shared parameters, and which of them adapt."""

    weight_name: str
    bias_name: str | None
    weight: Tensor  # [O, I]
    bias: Tensor | None  # [O]
    adapts_weight: bool
    adapts_bias: bool


class Gradients:
    """Where the reverse adds what it finds: the shared parameters' adjoints by name, and the rates' [K, N]."""

    def __init__(self, of: dict[str, Tensor], rates: Tensor, names: tuple[str, ...], learned: bool) -> None:
        self.of, self.rates, self.learned = of, rates, learned
        self._column = {name: i for i, name in enumerate(names)}

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


class FirstLayer:
    """The lowest layer that adapts. Its inputs are the same in every step, so it never has a weight a task.

    hₖ = x W₀ᵀ + b₀ - [x x_sᵀ, 1] Aₖ, where the rows of A [T, S + 1, O] sum α δ over the steps, and β Σ δ. Without
    `gram` the weight stays, and A is its last row alone.
    """

    def __init__(
        self, p: Program, ws: Workspace, layer: Linear, x_s: Tensor, x_q: Tensor, gram: Gram | None, steps: int
    ) -> None:
        self._p, self._ws, self._layer, self._gram = p, ws, layer, gram
        (self._tasks, self._events, _), self._queries = x_s.shape, x_q.shape[1]
        self._x_s, self._x_q = x_s, x_q
        self._out = len(layer.weight)
        self._rows = self._events if gram is not None else 0
        self._base_s = ws("first.base_s", self._tasks, self._events, self._out)
        self.base_q = ws("first.base_q", self._tasks, self._queries, self._out)
        linear(p, x_s, layer.weight, layer.bias, self._base_s)
        linear(p, x_q, layer.weight, layer.bias, self.base_q)
        # Without moved weights to meet, the support's kernel is never read.
        self._kernel_s = None if steps < 2 else self._kernel("s", None if gram is None else gram.support, self._events)
        self._kernel_q = self._kernel("q", None if gram is None else gram.query, self._queries)
        self._keep = gram is not None and gram.d_query is not None
        self._a: list[Tensor] = []  # A after step k
        self._delta: list[Tensor] = []
        self._delta_sum: list[Tensor] = []

    def _kernel(self, name: str, products: Tensor | None, events: int) -> Tensor:
        if products is not None and not self._layer.adapts_bias:
            return products
        ones = self._ws(f"first.ones_{name}", self._tasks, events, 1)
        self._p(ones.fill_, 1)
        if products is None:
            return ones
        kernel = self._ws(f"first.kernel_{name}", self._tasks, events, self._events + 1)
        self._p(torch.cat, [products, ones], -1, out=kernel)
        return kernel

    def forward(self, k: int) -> Tensor:
        """h [T, S, O] before step k."""
        if self._kernel_s is None:
            return self._base_s  # no later step reads it
        h = self._ws(f"first.h{k}", self._tasks, self._events, self._out)
        if k == 0:
            self._p(h.copy_, self._base_s)
        else:
            self._p(torch.baddbmm, self._base_s, self._kernel_s, self._a[k - 1], alpha=-1, out=h)
        return h

    def update(self, k: int, delta: Tensor) -> None:
        """Take step k."""
        p, layer, rows = self._p, self._layer, self._rows
        a = self._ws(f"first.a{k if self._keep else 0}", self._tasks, rows + layer.adapts_bias, self._out)
        before = self._a[k - 1] if k else None
        if rows:
            self._move(before, slice(None, rows), delta, Rate(k, layer.weight_name), a)
        if layer.adapts_bias and layer.bias_name is not None:
            total = self._ws(f"first.sum{k}", self._tasks, 1, self._out)
            p(torch.sum, delta, 1, keepdim=True, out=total)
            self._move(before, slice(rows, None), total, Rate(k, layer.bias_name), a)
            self._delta_sum.append(total)
        self._a.append(a)
        self._delta.append(delta)

    def _move(self, before: Tensor | None, rows: slice, by: Tensor, rate: Rate, a: Tensor) -> None:
        if before is None:
            self._p(torch.mul, by, other=rate, out=a[:, rows])
        else:
            self._p(torch.add, before[:, rows], by, alpha=rate, out=a[:, rows])

    def query(self) -> Tensor:
        """h [T, Q, O] after the last step."""
        h = self._ws("first.h_q", self._tasks, self._queries, self._out)
        if self._a:
            self._p(torch.baddbmm, self.base_q, self._kernel_q, self._a[-1], alpha=-1, out=h)
        else:
            self._p(h.copy_, self.base_q)
        return h

    def reverse_query(self, p: Program, d_h: Tensor) -> None:
        """Begin the reverse, from the adjoint of `query`."""
        self._p = p
        self._d_base_q, self._d_base_s = d_h, None
        self._scratch = self._ws("first.d_delta", self._tasks, self._events, self._out)
        if self._a:
            self._d_a = self._ws("first.d_a", *self._a[-1].shape)
            p(torch.baddbmm, self._d_a, self._kernel_q.mT, d_h, beta=0, alpha=-1, out=self._d_a)
            if self._gram is not None and self._gram.d_query is not None:
                p(self._gram.d_query.baddbmm_, d_h, self._a[-1][:, : self._rows].mT, alpha=-1)

    def reverse_update(self, k: int, found: Gradients) -> Tensor:
        """The adjoint of δ at step k, [T, S, O]."""
        p, layer, rows = self._p, self._layer, self._rows
        self.reverse_rates(k, found)
        d_delta, d_rows, d_last = self._scratch, self._d_a[:, :rows], self._d_a[:, rows:]
        if rows:
            p(torch.mul, d_rows, other=Rate(k, layer.weight_name), out=d_delta)
        else:
            p(d_delta.zero_)
        if layer.adapts_bias and layer.bias_name is not None:
            p(d_delta.add_, d_last, alpha=Rate(k, layer.bias_name))
        return d_delta

    def reverse_rates(self, k: int, found: Gradients) -> None:
        """Step k's derivative in the rates."""
        if not found.learned:
            return
        layer, rows = self._layer, self._rows
        if rows:
            into = found.rate(k, layer.weight_name)
            self._p(add_product_sum, into, self._scratch, self._d_a[:, :rows], self._delta[k], 1.0)
        if layer.adapts_bias and layer.bias_name is not None:
            total = self._delta_sum[k]
            scratch = self._ws("first.scratch", *total.shape)
            self._p(add_product_sum, found.rate(k, layer.bias_name), scratch, self._d_a[:, rows:], total, 1.0)

    def reverse_forward(self, k: int, d_h: Tensor) -> None:
        """Take in the adjoint of `forward(k)`."""
        p = self._p
        if self._d_base_s is None:
            self._d_base_s = self._ws("first.d_base_s", self._tasks, self._events, self._out)
            p(self._d_base_s.copy_, d_h)
        else:
            p(self._d_base_s.add_, d_h)
        if k:
            assert self._kernel_s is not None
            p(self._d_a.baddbmm_, self._kernel_s.mT, d_h, alpha=-1)
            if self._gram is not None and self._gram.d_support is not None:
                p(self._gram.d_support.baddbmm_, d_h, self._a[k - 1][:, : self._rows].mT, alpha=-1)

    def finish(self, found: Gradients, d_x_s: Tensor | None, d_x_q: Tensor | None) -> None:
        """Add up the shared parameters' adjoints; set the inputs', less the Gram matrix's part."""
        layer = self._layer
        pairs = [(self._d_base_q, self._x_q, d_x_q)]
        if self._d_base_s is not None:
            pairs.append((self._d_base_s, self._x_s, d_x_s))
        elif d_x_s is not None:
            self._p(d_x_s.zero_)
        for number, (d_h, x, d_x) in enumerate(pairs):
            rows = flat(d_h)
            self._p(accumulate, found.of[layer.weight_name], rows.t(), flat(x))
            if layer.bias_name is not None:
                total = self._ws(f"first.d_bias{number}", self._out)
                self._p(torch.sum, rows, 0, out=total)
                self._p(found.of[layer.bias_name].add_, total)
            if d_x is not None:
                self._p(multiply, rows, layer.weight, out=flat(d_x))


def flat(x: Tensor) -> Tensor:
    """All tasks' events in one axis."""
    return x.view(-1, x.shape[-1])


def linear(p: Program, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """x Wᵀ + b with shared parameters: one product for all tasks."""
    if bias is None:
        p(multiply, flat(x), weight.t(), out=flat(out))
    else:
        p(multiply_add, bias, flat(x), weight.t(), out=flat(out))
