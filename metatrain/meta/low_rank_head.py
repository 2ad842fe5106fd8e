"""The head of a base learner: one score from the last hidden layer, and from inputs that don't change between steps.

Same conventions as `low_rank_layers`. s = z vᵀ + x uᵀ + c + offset, with (v, u) one weight tensor: v is kept a task
(it is a vector), x uᵀ through the inputs' Gram matrix: x uₖᵀ = x u₀ᵀ - (x x_sᵀ) aₖ, a [T, S] the sum of α e.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metatrain.meta.low_rank_layers import Gradients, Gram, Workspace


class Head:
    """See the module.

    Args:
        weight, bias: Shared parameters, weight [1, H + I].
        hidden: H, 0 without hidden layers.
        x_s, x_q: The inputs seen directly, [T, E, I]; None: the head sees the last hidden layer alone.
        gram: Of those inputs, where the weight adapts.
        adapts: Whether weight and bias adapt.
    """

    def __init__(
        self,
        ws: Workspace,
        names: tuple[str, str | None],
        weight: Tensor,
        bias: Tensor | None,
        offset: Tensor | None,
        hidden: int,
        sizes: tuple[int, int, int],
        x_s: Tensor | None,
        x_q: Tensor | None,
        gram: Gram | None,
        adapts: tuple[bool, bool],
    ) -> None:
        self._ws, self.names, self._hidden, self._gram = ws, names, hidden, gram
        self._tasks, self._events, self._queries = sizes
        self._adapts_weight, self._adapts_bias = adapts
        self._x_s, self._x_q = x_s, x_q
        self._weight, self._bias, self._offset = weight, bias, offset
        self._u = weight[0, hidden:]
        self._base_s = None if x_s is None else _against(x_s, self._u)
        self._base_q = None if x_q is None else _against(x_q, self._u)
        v = ws("head.v0", self._tasks, 1, hidden).copy_(weight[:, :hidden].expand(self._tasks, 1, hidden))
        self._v = [v]
        self._c: list[Tensor | None] = [bias]
        self._a: list[Tensor] = []
        self._z: list[Tensor | None] = []
        self._e: list[Tensor] = []

    def _scores(self, z: Tensor | None, v: Tensor, c: Tensor | None, base: Tensor | None, name: str, events: int) -> Tensor:
        s = self._ws(f"head.{name}", self._tasks, events)
        if z is None:
            assert base is not None
            s.copy_(base)
        else:
            torch.sum(torch.mul(z, v, out=self._ws("head.terms", *z.shape)), -1, out=s)
            if base is not None:
                s.add_(base)
        if c is not None:
            s.add_(c)
        return s if self._offset is None else s.add_(self._offset)

    def forward(self, k: int, z: Tensor | None) -> Tensor:
        """Scores [T, S] before step k."""
        self._z.append(z)
        s = self._scores(z, self._v[k], self._c[k], self._base_s, f"s{k}", self._events)
        if self._gram is not None and k:
            s.sub_(_times(self._gram.support, self._a[k - 1]))
        return s

    def backward(self, k: int, e: Tensor, width: int) -> Tensor:
        """The support loss's gradient at z: e ⊗ vₖ, [T, S, H]."""
        return torch.mul(e.unsqueeze(2), self._v[k], out=self._ws(f"head.g{k}", *e.shape, width))

    def update(self, k: int, e: Tensor, rates: dict[str, float]) -> None:
        """Take step k."""
        weight, bias = self.names
        z, v, c = self._z[k], self._v[k], self._c[k]
        if self._adapts_weight:
            if z is not None:
                out = self._ws(f"head.v{k + 1}", *v.shape)
                v = torch.baddbmm(v, e.unsqueeze(1), z, alpha=-rates[weight], out=out)
            if self._gram is not None:
                self._a.append(e * rates[weight] if not k else torch.add(self._a[k - 1], e, alpha=rates[weight]))
        if self._adapts_bias:
            assert bias is not None and c is not None
            c = torch.sub(c, e.sum(1, keepdim=True), alpha=rates[bias])
        self._e.append(e)
        self._v.append(v)
        self._c.append(c)

    def before(self, z: Tensor | None) -> Tensor:
        """Scores [T, Q] with the shared parameters."""
        return self._scores(z, self._v[0], self._bias, self._base_q, "before", self._queries)

    def query(self, z: Tensor | None) -> Tensor:
        """Scores [T, Q] after the last step."""
        self._z_q = z
        s = self._scores(z, self._v[-1], self._c[-1], self._base_q, "s_q", self._queries)
        if self._gram is not None and self._a:
            s.sub_(_times(self._gram.query, self._a[-1]))
        return s

    def reverse_query(self, d_s: Tensor) -> Tensor | None:
        """Begin the reverse, from the adjoint of `query`: returns that of z [T, Q, H]."""
        z = self._z_q
        self._d_base_q, self._d_base_s = d_s, None
        self._d_c = d_s.sum(1, keepdim=True)
        if self._gram is not None and self._a:
            self._d_a = _times(self._gram.query.mT, d_s).neg_()
            if self._gram.d_query is not None:
                self._gram.d_query.addcmul_(d_s.unsqueeze(2), self._a[-1].unsqueeze(1), value=-1)
        if z is None:
            return None
        self._d_v = torch.bmm(d_s.unsqueeze(1), z, out=self._ws("head.d_v", *self._v[0].shape))
        return torch.mul(d_s.unsqueeze(2), self._v[-1], out=self._ws("head.d_z_q", *z.shape))

    def reverse_backward(self, k: int, d_g: Tensor | None, rates: dict[str, float], found: Gradients) -> Tensor:
        """From the adjoint of `backward(k)` and step k's update: the adjoint of e [T, S]."""
        weight, bias = self.names
        self._d_g = d_g
        e, z = self._e[k], self._z[k]
        d_e = torch.zeros_like(e)
        if self._adapts_weight:
            if z is not None:
                d_e.sub_(torch.mul(z, self._d_v, out=self._ws("head.terms", *z.shape)).sum(-1))
            if self._gram is not None:
                d_e.add_(self._d_a)
            if found.learned:
                found.rate(k, weight, (d_e * e).sum())
            d_e.mul_(rates[weight])
        if self._adapts_bias:
            assert bias is not None
            if found.learned:
                found.rate(k, bias, -(self._d_c * e.sum(1, keepdim=True)).sum())
            d_e.sub_(self._d_c, alpha=rates[bias])
        if d_g is not None:
            d_e.add_(torch.mul(d_g, self._v[k], out=self._ws("head.terms", *d_g.shape)).sum(-1))
        return d_e

    def reverse_rates(self, k: int, rates: dict[str, float], found: Gradients) -> None:
        """Step k's derivative in the rates alone, for the first order."""
        if found.learned:
            self.reverse_backward(k, None, rates, found)

    def reverse_forward(self, k: int, d_s: Tensor, rates: dict[str, float]) -> Tensor | None:
        """From the adjoint of `forward(k)` and step k's update: the adjoint of z [T, S, H]."""
        e, z, d_g = self._e[k], self._z[k], self._d_g
        self._d_c = self._d_c + d_s.sum(1, keepdim=True)
        self._d_base_s = d_s if self._d_base_s is None else self._d_base_s + d_s
        if self._gram is not None and k:
            self._d_a.sub_(_times(self._gram.support, d_s))
            if self._gram.d_support is not None:
                self._gram.d_support.addcmul_(d_s.unsqueeze(2), self._a[k - 1].unsqueeze(1), value=-1)
        if z is None:
            return None
        d_z = self._ws("head.d_z", *z.shape)
        if self._adapts_weight:
            # d_s ⊗ vₖ - α e ⊗ d_v as one product of inner width 2.
            columns = torch.stack([d_s, e * -rates[self.names[0]]], -1)
            torch.bmm(columns, torch.cat([self._v[k], self._d_v], 1), out=d_z)
        else:
            torch.mul(d_s.unsqueeze(2), self._v[k], out=d_z)
        self._d_v.baddbmm_(d_s.unsqueeze(1), z)
        if d_g is not None:
            self._d_v.baddbmm_(e.unsqueeze(1), d_g)
        return d_z

    def finish(self, found: Gradients, d_x_s: Tensor | None, d_x_q: Tensor | None) -> None:
        """Add up the shared parameters' adjoints, and add the inputs', less the Gram matrix's part."""
        weight, bias = self.names
        if self._hidden:
            found.of[weight][0, : self._hidden].add_(self._d_v.sum((0, 1)))
        if bias is not None:
            found.of[bias].add_(self._d_c.sum())
        for d_s, x, d_x in ((self._d_base_q, self._x_q, d_x_q), (self._d_base_s, self._x_s, d_x_s)):
            if d_s is None or x is None:
                continue
            found.of[weight][0, self._hidden :].addmv_(x.view(-1, x.shape[2]).t(), d_s.reshape(-1))
            if d_x is not None:
                d_x.addcmul_(d_s.unsqueeze(2), self._u)


def _against(x: Tensor, u: Tensor) -> Tensor:
    return torch.mv(x.view(-1, x.shape[2]), u).view(x.shape[:2])


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """A matrix a task times a vector a task: [T, A, B], [T, B] → [T, A]. A batched product of width 1 is slower."""
    return (matrix * vector.unsqueeze(1)).sum(-1)
