"""The lowest layer that adapts: its fixed inputs are the same in every step. Conventions as in `low_rank_layers`."""

from __future__ import annotations

import torch
from torch import Tensor

from metatrain.meta.low_rank_hidden import HiddenLayer
from metatrain.meta.low_rank_layers import Gradients, Gram, Linear, flat, linear
from metatrain.meta.low_rank_products import accumulate, multiply
from metatrain.meta.low_rank_program import Program, Rate, Workspace, add_product_sum


class FirstLayer:
    """A layer over fixed inputs, which never has a weight a task for them; adapted rows come in beside them.

    hₖ = x W₀ᵀ + b₀ - [x x_sᵀ, 1] Aₖ + rₖ Vₖᵀ, where the rows of A [T, S + 1, O] sum α δ over the steps, and β Σ δ.
    Without `gram` the weight stays, and A is its last row alone; where the bias stays too, there is no A.

    Args:
        layer: The columns that read x, and the bias.
        rows: The columns that read adapted rows, V; None: no rows adapt.
    """

    def __init__(
        self,
        p: Program,
        ws: Workspace,
        layer: Linear,
        x_s: Tensor,
        x_q: Tensor,
        gram: Gram | None,
        steps: int,
        rows: HiddenLayer | None,
    ) -> None:
        self._p, self._ws, self._layer, self._gram, self._of_rows = p, ws, layer, gram, rows
        (self._tasks, self._events, _), self._queries = x_s.shape, x_q.shape[1]
        self._x_s, self._x_q = x_s, x_q
        self._out = len(layer.weight)
        self._rows = self._events if gram is not None else 0
        self._steps, self._adapts = steps, gram is not None or layer.adapts_bias
        self._kernel_s: Tensor | None = None
        self._base_s = ws("first.base_s", self._tasks, self._events, self._out)
        self._base_q = ws("first.base_q", self._tasks, self._queries, self._out)
        linear(p, x_s, layer.weight, layer.bias, self._base_s)
        linear(p, x_q, layer.weight, layer.bias, self._base_q)
        if self._adapts:
            # Without moved weights to meet, the support's kernel is never read.
            if steps > 1:
                self._kernel_s = self._kernel("s", None if gram is None else gram.support, self._events)
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

    def forward(self, k: int, r: Tensor | None) -> Tensor:
        """h [T, S, O] before step k, from the adapted rows r [T, S, D]."""
        h = self._base_s  # no later step reads it, where there is one step alone
        if self._steps > 1:
            h = self._ws(f"first.h{k}", self._tasks, self._events, self._out)
            if k and self._kernel_s is not None:
                self._p(torch.baddbmm, self._base_s, self._kernel_s, self._a[k - 1], alpha=-1, out=h)
            else:
                self._p(h.copy_, self._base_s)
        if self._of_rows is not None and r is not None:
            self._of_rows.forward(k, r, onto=h)
        return h

    def backward(self, k: int, delta: Tensor) -> Tensor | None:
        """The support loss's gradient at the rows, [T, S, D]; that at x is not needed."""
        return None if self._of_rows is None else self._of_rows.backward(k, delta)

    def update(self, k: int, delta: Tensor) -> None:
        """Take step k."""
        p, layer, rows = self._p, self._layer, self._rows
        if self._of_rows is not None:
            self._of_rows.update(k, delta)
        if not self._adapts:
            return
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

    def query(self, r: Tensor | None) -> Tensor:
        """h [T, Q, O] after the last step."""
        h = self._ws("first.h_q", self._tasks, self._queries, self._out)
        if self._a:
            self._p(torch.baddbmm, self._base_q, self._kernel_q, self._a[-1], alpha=-1, out=h)
        else:
            self._p(h.copy_, self._base_q)
        if self._of_rows is not None and r is not None:
            self._of_rows.query(r, onto=h)
        return h

    def before(self, r: Tensor | None) -> Tensor:
        """h [T, Q, O] with the shared parameters. Comes after `query`: it is written over what that reads."""
        if self._of_rows is not None and r is not None:
            self._of_rows.before(r, onto=self._base_q)
        return self._base_q

    def reverse_query(self, p: Program, d_h: Tensor, found: Gradients) -> Tensor | None:
        """Begin the reverse, from the adjoint of `query`: returns that of r [T, Q, D]."""
        self._p = p
        self._d_base_q, self._d_base_s = d_h, None
        self._scratch = self._ws("first.d_delta", self._tasks, self._events, self._out)
        if self._a:
            self._d_a = self._ws("first.d_a", *self._a[-1].shape)
            p(torch.baddbmm, self._d_a, self._kernel_q.mT, d_h, beta=0, alpha=-1, out=self._d_a)
            if self._gram is not None and self._gram.d_query is not None:
                p(self._gram.d_query.baddbmm_, d_h, self._a[-1][:, : self._rows].mT, alpha=-1)
        return None if self._of_rows is None else self._of_rows.reverse_query(p, d_h, found)

    def reverse_backward(self, k: int, d_rho: Tensor | None, found: Gradients) -> Tensor:
        """From the adjoint of `backward(k)` and step k's update: the adjoint of δ [T, S, O]."""
        p, layer, rows = self._p, self._layer, self._rows
        self._rates(k, found)
        if self._of_rows is not None and d_rho is not None:
            d_delta = self._of_rows.reverse_backward(k, d_rho, found)
            if rows:
                p(d_delta.add_, self._d_a[:, :rows], alpha=Rate(k, layer.weight_name))
        else:
            d_delta = self._scratch
            if rows:
                p(torch.mul, self._d_a[:, :rows], other=Rate(k, layer.weight_name), out=d_delta)
            else:
                p(d_delta.zero_)
        if layer.adapts_bias and layer.bias_name is not None:
            p(d_delta.add_, self._d_a[:, rows:], alpha=Rate(k, layer.bias_name))
        return d_delta

    def reverse_rates(self, k: int, found: Gradients) -> None:
        """Step k's derivative in the rates alone, for the first order."""
        self._rates(k, found)
        if self._of_rows is not None:
            self._of_rows.reverse_rates(k, found)

    def _rates(self, k: int, found: Gradients) -> None:
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

    def reverse_forward(self, k: int, d_h: Tensor, found: Gradients) -> Tensor | None:
        """From the adjoint of `forward(k)`: that of r [T, S, D]."""
        p = self._p
        if self._d_base_s is None:
            self._d_base_s = self._ws("first.d_base_s", self._tasks, self._events, self._out)
            p(self._d_base_s.copy_, d_h)
        else:
            p(self._d_base_s.add_, d_h)
        if k and self._kernel_s is not None:
            p(self._d_a.baddbmm_, self._kernel_s.mT, d_h, alpha=-1)
            if self._gram is not None and self._gram.d_support is not None:
                p(self._gram.d_support.baddbmm_, d_h, self._a[k - 1][:, : self._rows].mT, alpha=-1)
        return None if self._of_rows is None else self._of_rows.reverse_forward(k, d_h, found)

    def finish(self, found: Gradients, d_x_s: Tensor | None, d_x_q: Tensor | None) -> None:
        """Add up the shared parameters' adjoints; set the inputs', less the Gram matrix's part."""
        layer = self._layer
        if self._of_rows is not None:
            self._of_rows.finish(found)
        pairs = [(self._d_base_q, self._x_q, d_x_q)]
        if self._d_base_s is not None:
            pairs.append((self._d_base_s, self._x_s, d_x_s))
        elif d_x_s is not None:
            self._p(d_x_s.zero_)
        for d_h, x, _ in pairs:
            self._p(accumulate, found.weight(layer), flat(d_h).t(), flat(x))
        for number, (d_h, _, d_x) in enumerate(pairs):
            rows = flat(d_h)
            if layer.bias_name is not None:
                total = self._ws(f"first.d_bias{number}", self._out)
                self._p(torch.sum, rows, 0, out=total)
                self._p(found.of[layer.bias_name].add_, total)
            if d_x is not None:
                self._p(multiply, rows, layer.weight, out=flat(d_x))
