"""The columns of a head whose inputs change between steps: a vector a task. Conventions as in `low_rank_layers`."""

from __future__ import annotations

import torch
from torch import Tensor

from metatrain.meta.low_rank_layers import Gradients, Linear
from metatrain.meta.low_rank_program import Program, Rate, Workspace


class Vector:
    """z vₖᵀ, with vₖ₊₁ = vₖ - α e z, over the last hidden layer's outputs or over adapted rows, [T, E, H].

    Args:
        layer: Those columns of the head's weight, [1, H].
    """

    def __init__(self, p: Program, ws: Workspace, name: str, layer: Linear, tasks: int) -> None:
        self._p, self._ws, self._id, self._layer, self._width = p, ws, name, layer, layer.weight.shape[1]
        v = ws(f"{name}.v0", tasks, 1, self._width)
        p(v.copy_, layer.weight.expand(tasks, 1, self._width))
        self._v = [v]
        self._z: list[Tensor] = []
        self._d_g: Tensor | None = None

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        return self._ws(f"{self._id}.{name}", like.shape[0], like.shape[1], self._width)

    def forward(self, k: int, z: Tensor, s: Tensor, onto: bool) -> None:
        """Put the part of the scores before step k into s [T, S], or add it."""
        self._z.append(z)
        dots(self._p, self._ws, z, self._v[k], s, onto)

    def backward(self, k: int, e: Tensor) -> Tensor:
        """The support loss's gradient at z: e ⊗ vₖ, [T, S, H]."""
        g = self._buffer(f"g{k}", e)
        self._p(torch.mul, e.unsqueeze(2), self._v[k], out=g)
        return g

    def update(self, k: int, e: Tensor) -> None:
        """Take step k."""
        v = self._v[k]
        if self._layer.adapts_weight:
            v = self._ws(f"{self._id}.v{k + 1}", *v.shape)
            minus = -Rate(k, self._layer.weight_name)
            self._p(torch.baddbmm, self._v[k], e.unsqueeze(1), self._z[k], alpha=minus, out=v)
        self._v.append(v)

    def before(self, z: Tensor, s: Tensor, onto: bool) -> None:
        """Put the part of the scores [T, Q] with the shared parameters into s, or add it."""
        dots(self._p, self._ws, z, self._v[0], s, onto)

    def query(self, z: Tensor, s: Tensor, onto: bool) -> None:
        """Put the part of the scores [T, Q] after the last step into s, or add it."""
        self._z_q = z
        dots(self._p, self._ws, z, self._v[-1], s, onto)

    def reverse_query(self, p: Program, d_s: Tensor) -> Tensor:
        """Begin the reverse, from the adjoint of `query`: returns that of z [T, Q, H]."""
        self._p = p
        z = self._z_q
        self._d_v = self._ws(f"{self._id}.d_v", *self._v[0].shape)
        p(torch.bmm, d_s.unsqueeze(1), z, out=self._d_v)
        d_z = self._buffer("d_z_q", d_s)
        p(torch.mul, d_s.unsqueeze(2), self._v[-1], out=d_z)
        return d_z

    def along(self, k: int, into: Tensor) -> None:
        """Subtract z d_vᵀ, which gives both d_e and d_α of step k's update."""
        product = self._ws("head.product", *into.shape)
        dots(self._p, self._ws, self._z[k], self._d_v, product)
        self._p(into.sub_, product)

    def reverse_backward(self, k: int, d_g: Tensor, d_e: Tensor) -> None:
        """Add to the adjoint of e what comes through that of `backward(k)`."""
        self._d_g = d_g
        dots(self._p, self._ws, d_g, self._v[k], d_e, onto=True)

    def reverse_forward(self, k: int, d_s: Tensor, e: Tensor) -> Tensor:
        """From the adjoint of `forward(k)` and step k's update: the adjoint of z [T, S, H]."""
        p, ws, layer = self._p, self._ws, self._layer
        d_z = self._buffer("d_z", d_s)
        if layer.adapts_weight:
            # d_s ⊗ vₖ - α e ⊗ d_v as one product of inner width 2.
            columns, rows = ws("head.columns", *d_s.shape, 2), ws("head.rows", len(d_s), 2, self._width)
            p(columns[..., 0].copy_, d_s)
            p(columns[..., 1].zero_)
            p(columns[..., 1].add_, e, alpha=-Rate(k, layer.weight_name))
            p(torch.cat, [self._v[k], self._d_v], 1, out=rows)
            p(torch.bmm, columns, rows, out=d_z)
        else:
            p(torch.mul, d_s.unsqueeze(2), self._v[k], out=d_z)
        p(self._d_v.baddbmm_, d_s.unsqueeze(1), self._z[k])
        if self._d_g is not None:
            p(self._d_v.baddbmm_, e.unsqueeze(1), self._d_g)
        return d_z

    def finish(self, found: Gradients) -> None:
        """Add up the shared weight's adjoint."""
        total = self._ws("head.d_weight", self._width)
        self._p(torch.sum, self._d_v, (0, 1), out=total)
        self._p(found.weight(self._layer)[0].add_, total)


def dots(p: Program, ws: Workspace, a: Tensor, b: Tensor, out: Tensor, onto: bool = False) -> None:
    """Put Σ a ⊙ b over the last axis into `out`, or add it: [T, A, B], [T, 1, B] → [T, A].

    A batched product of width 1 is slower.
    """
    terms = ws("head.terms", *a.shape)
    p(torch.mul, a, b, out=terms)
    if not onto:
        p(torch.sum, terms, -1, out=out)
        return
    total = ws("head.total", *out.shape)
    p(torch.sum, terms, -1, out=total)
    p(out.add_, total)
