"""The head of a base learner: one score from the last hidden layer, and from inputs that don't change between steps.

Same conventions as `low_rank_layers`. s = z vᵀ + x uᵀ + c + offset, with (v, u) one weight tensor: v is kept a task
(it is a vector), x uᵀ through the inputs' Gram matrix: x uₖᵀ = x u₀ᵀ - (x x_sᵀ) aₖ, a [T, S] the sum of α e.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metatrain.meta.low_rank_layers import Gradients, Gram, Linear
from metatrain.meta.low_rank_program import Program, Rate, Workspace, add_product_sum


class Head:
    """See the module.

    Args:
        layer: The head's parameters, weight [1, H + I].
        hidden: H, 0 without hidden layers.
        sizes: T, S, Q.
        x_s, x_q: The inputs seen directly, [T, E, I]; None: the head sees the last hidden layer alone.
        gram: Of those inputs, where the weight adapts.
    """

    def __init__(
        self,
        p: Program,
        ws: Workspace,
        layer: Linear,
        offset: Tensor | None,
        hidden: int,
        sizes: tuple[int, int, int],
        x_s: Tensor | None,
        x_q: Tensor | None,
        gram: Gram | None,
    ) -> None:
        self._p, self._ws, self._layer, self._hidden, self._gram = p, ws, layer, hidden, gram
        self._tasks, self._events, self._queries = sizes
        self._x_s, self._x_q, self._offset = x_s, x_q, offset
        self._u = layer.weight[0, hidden:]
        self._base_s = self._against("base_s", x_s)
        self._base_q = self._against("base_q", x_q)
        v = ws("head.v0", self._tasks, 1, hidden)
        p(v.copy_, layer.weight[:, :hidden].expand(self._tasks, 1, hidden))
        self._v = [v]
        self._c: list[Tensor | None] = [layer.bias]
        self._a: list[Tensor] = []
        self._z: list[Tensor | None] = []
        self._e: list[Tensor] = []
        self._e_sum: list[Tensor] = []
        self._d_base_s: Tensor | None = None

    def _against(self, name: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        base = self._ws(f"head.{name}", x.shape[0], x.shape[1])
        self._p(torch.mv, x.view(-1, x.shape[2]), self._u, out=base.view(-1))
        return base

    def _dots(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Σ a ⊙ b over the last axis: [T, A, B], [T, 1, B] → [T, A]. A batched product of width 1 is slower."""
        terms = self._ws("head.terms", *a.shape)
        self._p(torch.mul, a, b, out=terms)
        self._p(torch.sum, terms, -1, out=out)

    def _scores(
        self, z: Tensor | None, v: Tensor, c: Tensor | None, base: Tensor | None, name: str, events: int
    ) -> Tensor:
        s = self._ws(f"head.{name}", self._tasks, events)
        if z is not None:
            self._dots(z, v, s)
        if base is not None:
            self._p(s.copy_ if z is None else s.add_, base)
        if c is not None:
            self._p(s.add_, c)
        if self._offset is not None:
            self._p(s.add_, self._offset)
        return s

    def forward(self, k: int, z: Tensor | None) -> Tensor:
        """Scores [T, S] before step k."""
        self._z.append(z)
        s = self._scores(z, self._v[k], self._c[k], self._base_s, f"s{k}", self._events)
        if self._gram is not None and self._gram.support is not None and k:
            self._subtract_product(s, self._gram.support, self._a[k - 1])
        return s

    def _subtract_product(self, s: Tensor, matrix: Tensor, vector: Tensor) -> None:
        product = self._ws("head.product", *s.shape)
        self._dots(matrix, vector.unsqueeze(1), product)
        self._p(s.sub_, product)

    def backward(self, k: int, e: Tensor) -> Tensor:
        """The support loss's gradient at z: e ⊗ vₖ, [T, S, H]."""
        g = self._ws(f"head.g{k}", self._tasks, self._events, self._hidden)
        self._p(torch.mul, e.unsqueeze(2), self._v[k], out=g)
        return g

    def update(self, k: int, e: Tensor) -> None:
        """Take step k."""
        p, ws, layer = self._p, self._ws, self._layer
        z, v, c = self._z[k], self._v[k], self._c[k]
        if layer.adapts_weight:
            if z is not None:
                moved = ws(f"head.v{k + 1}", *v.shape)
                p(torch.baddbmm, v, e.unsqueeze(1), z, alpha=-Rate(k, layer.weight_name), out=moved)
                v = moved
            if self._gram is not None:
                a = ws(f"head.a{k}", *e.shape)
                if k == 0:
                    p(a.zero_)
                p(torch.add, self._a[k - 1] if k else a, e, alpha=Rate(k, layer.weight_name), out=a)
                self._a.append(a)
        if layer.adapts_bias and layer.bias_name is not None:
            total = ws(f"head.sum{k}", self._tasks, 1)
            p(torch.sum, e, 1, keepdim=True, out=total)
            self._e_sum.append(total)
            lowered = ws(f"head.c{k + 1}", self._tasks, 1)
            p(torch.sub, c, total, alpha=Rate(k, layer.bias_name), out=lowered)
            c = lowered
        self._e.append(e)
        self._v.append(v)
        self._c.append(c)

    def before(self, z: Tensor | None) -> Tensor:
        """Scores [T, Q] with the shared parameters."""
        return self._scores(z, self._v[0], self._layer.bias, self._base_q, "before", self._queries)

    def query(self, z: Tensor | None) -> Tensor:
        """Scores [T, Q] after the last step."""
        self._z_q = z
        s = self._scores(z, self._v[-1], self._c[-1], self._base_q, "s_q", self._queries)
        if self._gram is not None and self._a:
            self._subtract_product(s, self._gram.query, self._a[-1])
        return s

    def reverse_query(self, p: Program, d_s: Tensor) -> Tensor | None:
        """Begin the reverse, from the adjoint of `query`: returns that of z [T, Q, H]."""
        self._p = p
        ws, z = self._ws, self._z_q
        self._d_base_q = d_s
        self._d_c = ws("head.d_c", self._tasks, 1)
        p(torch.sum, d_s, 1, keepdim=True, out=self._d_c)
        if self._gram is not None and self._a:
            self._d_a = ws("head.d_a", self._tasks, self._events)
            self._dots(self._gram.query.mT, d_s.unsqueeze(1), self._d_a)
            p(self._d_a.neg_)
            if self._gram.d_query is not None:
                p(self._gram.d_query.addcmul_, d_s.unsqueeze(2), self._a[-1].unsqueeze(1), value=-1)
        if z is None:
            return None
        self._d_v = ws("head.d_v", self._tasks, 1, self._hidden)
        p(torch.bmm, d_s.unsqueeze(1), z, out=self._d_v)
        d_z = ws("head.d_z_q", *z.shape)
        p(torch.mul, d_s.unsqueeze(2), self._v[-1], out=d_z)
        return d_z

    def reverse_backward(self, k: int, d_g: Tensor | None, found: Gradients) -> Tensor:
        """From the adjoint of `backward(k)` and step k's update: the adjoint of e [T, S]."""
        p, layer = self._p, self._layer
        self._d_g = d_g
        d_e = self._ws("head.d_e", self._tasks, self._events)
        self._moved(k, d_e, found)
        if layer.adapts_bias and layer.bias_name is not None:
            p(d_e.sub_, self._d_c, alpha=Rate(k, layer.bias_name))
        if d_g is not None:
            product = self._ws("head.product", *d_e.shape)
            self._dots(d_g, self._v[k], product)
            p(d_e.add_, product)
        return d_e

    def _moved(self, k: int, d_e: Tensor, found: Gradients) -> None:
        """d_e through the weight's update, and the derivative in the rates."""
        p, layer, e, z = self._p, self._layer, self._e[k], self._z[k]
        along = self._ws("head.along", *d_e.shape)
        p(d_e.zero_)
        if layer.adapts_weight:
            p(along.zero_)
            if z is not None:
                self._dots(z, self._d_v, along)
                p(along.neg_)
            if self._gram is not None:
                p(along.add_, self._d_a)
            p(d_e.add_, along, alpha=Rate(k, layer.weight_name))
            if found.learned:
                scratch = self._ws("head.product", *d_e.shape)
                p(add_product_sum, found.rate(k, layer.weight_name), scratch, along, e, 1.0)
        if found.learned and layer.adapts_bias and layer.bias_name is not None:
            scratch = self._ws("head.scratch_sum", self._tasks, 1)
            p(add_product_sum, found.rate(k, layer.bias_name), scratch, self._d_c, self._e_sum[k], -1.0)

    def reverse_rates(self, k: int, found: Gradients) -> None:
        """Step k's derivative in the rates alone, for the first order."""
        if found.learned:
            self._moved(k, self._ws("head.d_e", self._tasks, self._events), found)

    def reverse_forward(self, k: int, d_s: Tensor) -> Tensor | None:
        """From the adjoint of `forward(k)` and step k's update: the adjoint of z [T, S, H]."""
        p, ws, layer = self._p, self._ws, self._layer
        e, z, d_g = self._e[k], self._z[k], self._d_g
        total = ws("head.scratch_sum", self._tasks, 1)
        p(torch.sum, d_s, 1, keepdim=True, out=total)
        p(self._d_c.add_, total)
        if self._x_s is not None:
            if self._d_base_s is None:
                self._d_base_s = ws("head.d_base_s", *d_s.shape)
                p(self._d_base_s.copy_, d_s)
            else:
                p(self._d_base_s.add_, d_s)
        if self._gram is not None and self._gram.support is not None and k:
            product = ws("head.product", *d_s.shape)
            self._dots(self._gram.support, d_s.unsqueeze(1), product)
            p(self._d_a.sub_, product)
            if self._gram.d_support is not None:
                p(self._gram.d_support.addcmul_, d_s.unsqueeze(2), self._a[k - 1].unsqueeze(1), value=-1)
        if z is None:
            return None
        d_z = ws("head.d_z", *z.shape)
        if layer.adapts_weight:
            # d_s ⊗ vₖ - α e ⊗ d_v as one product of inner width 2.
            columns, rows = ws("head.columns", *d_s.shape, 2), ws("head.rows", self._tasks, 2, self._hidden)
            p(columns[..., 0].copy_, d_s)
            p(columns[..., 1].zero_)
            p(columns[..., 1].add_, e, alpha=-Rate(k, layer.weight_name))
            p(torch.cat, [self._v[k], self._d_v], 1, out=rows)
            p(torch.bmm, columns, rows, out=d_z)
        else:
            p(torch.mul, d_s.unsqueeze(2), self._v[k], out=d_z)
        p(self._d_v.baddbmm_, d_s.unsqueeze(1), z)
        if d_g is not None:
            p(self._d_v.baddbmm_, e.unsqueeze(1), d_g)
        return d_z

    def finish(self, found: Gradients, d_x_s: Tensor | None, d_x_q: Tensor | None, fresh: bool) -> None:
        """Add up the shared parameters' adjoints, and add the inputs', less the Gram matrix's part.

        Args:
            fresh: The inputs' adjoints hold nothing yet.
        """
        p, layer, into = self._p, self._layer, found.of[self._layer.weight_name]
        if self._hidden:
            total = self._ws("head.d_weight", self._hidden)
            p(torch.sum, self._d_v, (0, 1), out=total)
            p(into[0, : self._hidden].add_, total)
        if layer.bias_name is not None:
            total = self._ws("head.d_bias", 1)
            p(torch.sum, self._d_c, 0, out=total)
            p(found.of[layer.bias_name].add_, total)
        for d_s, x, d_x in ((self._d_base_q, self._x_q, d_x_q), (self._d_base_s, self._x_s, d_x_s)):
            if d_x is not None and fresh:
                p(d_x.zero_)
            if d_s is None or x is None:
                continue
            p(into[0, self._hidden :].addmv_, x.view(-1, x.shape[2]).t(), d_s.view(-1))
            if d_x is not None:
                p(d_x.addcmul_, d_s.unsqueeze(2), self._u)
