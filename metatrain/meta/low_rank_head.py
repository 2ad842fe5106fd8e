"""The head of a base learner: one score from the last hidden layer, from adapted rows, and from fixed inputs.

Same conventions as `low_rank_layers`. s = z vᵀ + x uᵀ + r tᵀ + c + offset, with (v, u, t) one weight tensor: v and t
are kept a task (they are vectors, `low_rank_vector`), x uᵀ through the inputs' Gram matrix:
x uₖᵀ = x u₀ᵀ - (x x_sᵀ) aₖ, a [T, S] the sum of α e.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metatrain.meta.low_rank_layers import Gradients, Gram, Linear, flat
from metatrain.meta.low_rank_program import Program, Rate, Workspace, add_product_sum
from metatrain.meta.low_rank_vector import Vector, dots

#: What changes between steps: the last hidden layer's outputs and the adapted rows, where the head sees them.
Moving = tuple[Tensor | None, Tensor | None]


class Head:
    """See the module.

    Args:
        layer: The head's parameters, weight [1, H + I + D].
        hidden: H, 0 without hidden layers.
        sizes: T, S, Q.
        x_s, x_q: The fixed inputs seen directly, [T, E, I]; None: the head sees the last hidden layer alone.
        gram: Of those inputs, where the weight adapts.
        rows: D, the width of the adapted rows seen directly.
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
        rows: int,
    ) -> None:
        self._p, self._ws, self._layer, self._gram = p, ws, layer, gram
        self._tasks, self._events, self._queries = sizes
        self._x_s, self._x_q, self._offset = x_s, x_q, offset
        seen = layer.weight.shape[1] - rows
        self._fixed = layer.part(hidden, seen - hidden, bias=False)
        self._base_s = self._against("base_s", x_s)
        self._base_q = self._against("base_q", x_q)
        self._vectors = [
            Vector(p, ws, f"head.{name}", layer.part(start, width, bias=False), self._tasks) if width else None
            for name, start, width in (("z", 0, hidden), ("r", seen, rows))
        ]
        self._c: list[Tensor | None] = [layer.bias]
        self._a: list[Tensor] = []
        self._e: list[Tensor] = []
        self._e_sum: list[Tensor] = []
        self._d_base_s: Tensor | None = None

    def _against(self, name: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        base = self._ws(f"head.{name}", x.shape[0], x.shape[1])
        self._p(torch.mv, flat(x), self._fixed.weight[0], out=base.view(-1))
        return base

    def _complete(self, s: Tensor, c: Tensor | None, base: Tensor | None, begun: bool) -> None:
        """Add to the moving inputs' part of the scores, where there is one, the others."""
        if base is not None:
            self._p(s.add_ if begun else s.copy_, base)
        if c is not None:
            self._p(s.add_, c)
        if self._offset is not None:
            self._p(s.add_, self._offset)

    def _pairs(self, moving: Moving) -> list[tuple[Vector, Tensor, bool]]:
        """The vectors with their inputs, and whether another came before."""
        pairs = [(v, z) for v, z in zip(self._vectors, moving, strict=True) if v is not None and z is not None]
        return [(v, z, number > 0) for number, (v, z) in enumerate(pairs)]

    def forward(self, k: int, moving: Moving) -> Tensor:
        """Scores [T, S] before step k."""
        s = self._ws(f"head.s{k}", self._tasks, self._events)
        pairs = self._pairs(moving)
        for vector, z, onto in pairs:
            vector.forward(k, z, s, onto)
        self._complete(s, self._c[k], self._base_s, bool(pairs))
        if self._gram is not None and self._gram.support is not None and k:
            self._subtract_product(s, self._gram.support, self._a[k - 1])
        return s

    def _subtract_product(self, s: Tensor, matrix: Tensor, vector: Tensor) -> None:
        product = self._ws("head.product", *s.shape)
        dots(self._p, self._ws, matrix, vector.unsqueeze(1), product)
        self._p(s.sub_, product)

    def backward(self, k: int, e: Tensor) -> Moving:
        """The support loss's gradients at what moves, [T, S, H] and [T, S, D]."""
        z, r = (None if vector is None else vector.backward(k, e) for vector in self._vectors)
        return z, r

    def update(self, k: int, e: Tensor) -> None:
        """Take step k."""
        p, ws, layer, c = self._p, self._ws, self._layer, self._c[k]
        for vector in self._vectors:
            if vector is not None:
                vector.update(k, e)
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
        self._c.append(c)

    def before(self, moving: Moving) -> Tensor:
        """Scores [T, Q] with the shared parameters."""
        s = self._ws("head.before", self._tasks, self._queries)
        pairs = self._pairs(moving)
        for vector, z, onto in pairs:
            vector.before(z, s, onto)
        self._complete(s, self._layer.bias, self._base_q, bool(pairs))
        return s

    def query(self, moving: Moving) -> Tensor:
        """Scores [T, Q] after the last step."""
        s = self._ws("head.s_q", self._tasks, self._queries)
        pairs = self._pairs(moving)
        for vector, z, onto in pairs:
            vector.query(z, s, onto)
        self._complete(s, self._c[-1], self._base_q, bool(pairs))
        if self._gram is not None and self._a:
            self._subtract_product(s, self._gram.query, self._a[-1])
        return s

    def reverse_query(self, p: Program, d_s: Tensor) -> Moving:
        """Begin the reverse, from the adjoint of `query`: returns those of what moves."""
        self._p = p
        ws = self._ws
        self._d_base_q = d_s
        self._d_c = ws("head.d_c", self._tasks, 1)
        p(torch.sum, d_s, 1, keepdim=True, out=self._d_c)
        if self._gram is not None and self._a:
            self._d_a = ws("head.d_a", self._tasks, self._events)
            dots(p, ws, self._gram.query.mT, d_s.unsqueeze(1), self._d_a)
            p(self._d_a.neg_)
            if self._gram.d_query is not None:
                p(self._gram.d_query.addcmul_, d_s.unsqueeze(2), self._a[-1].unsqueeze(1), value=-1)
        z, r = (None if vector is None else vector.reverse_query(p, d_s) for vector in self._vectors)
        return z, r

    def reverse_backward(self, k: int, d_g: Moving, found: Gradients) -> Tensor:
        """From the adjoints of `backward(k)` and step k's update: the adjoint of e [T, S]."""
        p, layer = self._p, self._layer
        d_e = self._ws("head.d_e", self._tasks, self._events)
        self._moved(k, d_e, found)
        if layer.adapts_bias and layer.bias_name is not None:
            p(d_e.sub_, self._d_c, alpha=Rate(k, layer.bias_name))
        for vector, d, _ in self._pairs(d_g):
            vector.reverse_backward(k, d, d_e)
        return d_e

    def _moved(self, k: int, d_e: Tensor, found: Gradients) -> None:
        """d_e through the weight's update, and the derivative in the rates."""
        p, layer, e = self._p, self._layer, self._e[k]
        p(d_e.zero_)
        if layer.adapts_weight:
            along = self._ws("head.along", *d_e.shape)
            if self._gram is not None:
                p(along.copy_, self._d_a)
            else:
                p(along.zero_)
            for vector in self._vectors:
                if vector is not None:
                    vector.along(k, along)
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

    def reverse_forward(self, k: int, d_s: Tensor) -> Moving:
        """From the adjoint of `forward(k)` and step k's update: the adjoints of what moves."""
        p, ws = self._p, self._ws
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
            dots(p, ws, self._gram.support, d_s.unsqueeze(1), product)
            p(self._d_a.sub_, product)
            if self._gram.d_support is not None:
                p(self._gram.d_support.addcmul_, d_s.unsqueeze(2), self._a[k - 1].unsqueeze(1), value=-1)
        e = self._e[k]
        z, r = (None if vector is None else vector.reverse_forward(k, d_s, e) for vector in self._vectors)
        return z, r

    def finish(self, found: Gradients, d_x_s: Tensor | None, d_x_q: Tensor | None, fresh: bool) -> None:
        """Add up the shared parameters' adjoints, and add the inputs', less the Gram matrix's part.

        Args:
            fresh: The inputs' adjoints hold nothing yet.
        """
        p, layer = self._p, self._layer
        for vector in self._vectors:
            if vector is not None:
                vector.finish(found)
        if layer.bias_name is not None:
            total = self._ws("head.d_bias", 1)
            p(torch.sum, self._d_c, 0, out=total)
            p(found.of[layer.bias_name].add_, total)
        for d_s, x, d_x in ((self._d_base_q, self._x_q, d_x_q), (self._d_base_s, self._x_s, d_x_s)):
            if d_x is not None and fresh:
                p(d_x.zero_)
            if d_s is None or x is None:
                continue
            p(found.weight(self._fixed)[0].addmv_, flat(x).t(), d_s.view(-1))
            if d_x is not None:
                p(d_x.addcmul_, d_s.unsqueeze(2), self._fixed.weight[0])
