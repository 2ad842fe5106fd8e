"""Adapted embedding rows in the low-rank form: events read them pooled, and they move by the events' gradients.

With P_s [S, R] the pooling of the support (row e holds the weights of event e's slots, a mean over those in use), an
event reads r = P rows, and a step takes rowsₖ₊₁ = rowsₖ - βₖ P_sᵀ ρₖ, with ρ the support loss's gradient at r. So

    rₖ = r₀ - (P P_sᵀ) Bₖ        Bₖ = Σⱼ βⱼ ρⱼ

which is the form of the first layer's weights: K = P P_sᵀ, events by events, never changes, and the rows themselves are
not needed before the end. Reverse: d_ρ = β d_B, d_β = ⟨d_B, ρ⟩, d_B -= Kᵀ d_r, d_r₀ += d_r. Plain autograd takes r₀
from the rows. Conventions as in `low_rank_layers`; D is the width of all adapted features together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metatrain.meta.engine import Tensors, rows_key
from metatrain.meta.episode import Slots
from metatrain.meta.low_rank_layers import Gradients
from metatrain.meta.low_rank_program import Program, Rate, Workspace, add_product_sum


class RowFeature(NamedTuple):
    """One adapted feature: the name of its rate, and its embedding width."""

    rate: str
    width: int


class PooledRows(NamedTuple):
    """Adapted rows as the events see them before the first step."""

    features: tuple[RowFeature, ...]  # in name order, as their columns are
    support: Tensor  # r₀ [T, S, D], differentiable to the rows
    query: Tensor  # r₀ [T, Q, D]
    kernels: list[Tensor]  # of each feature: P_s P_sᵀ [T, S, S], then P_q P_sᵀ [T, Q, S]


def pooling(slots: Slots, rows: Tensor) -> Tensor:
    """P [T, E, R]: what an event reads is P rows, the mean over its slots in use; zero where it has none."""
    weights = (slots.mask / slots.mask.sum(-1, keepdim=True).clamp(min=1.0)).to(rows.dtype)
    return rows.new_zeros(*slots.index.shape[:2], rows.shape[1]).scatter_add_(2, slots.index, weights)


def pool(rows: Tensors, support: dict[str, Slots], query: dict[str, Slots]) -> PooledRows:
    """The rows of all features, [T, R, D] each, as the events of both sides read them."""
    features, of_support, of_query, kernels = [], [], [], []
    for name in sorted(rows):
        p_s, p_q = pooling(support[name], rows[name]), pooling(query[name], rows[name])
        features.append(RowFeature(rows_key(name), rows[name].shape[2]))
        of_support.append(p_s @ rows[name])
        of_query.append(p_q @ rows[name])
        kernels += [p_s @ p_s.mT, p_q @ p_s.mT]
    return PooledRows(tuple(features), torch.cat(of_support, -1), torch.cat(of_query, -1), kernels)


class _Moving(NamedTuple):
    """One feature of a chunk's tasks."""

    rate: str
    columns: slice  # of r
    of_support: Tensor  # its kernels
    of_query: Tensor
    b: Tensor  # B [T, S, width], in a piece of its own: batched products into columns go one task at a time
    d_b: Tensor


class Rows:
    """The adapted rows of a chunk's tasks, pooled.

    Args:
        r_s, r_q: r₀ of support and query.
        kernels: As `PooledRows` has them.
    """

    def __init__(
        self,
        p: Program,
        ws: Workspace,
        features: tuple[RowFeature, ...],
        r_s: Tensor,
        r_q: Tensor,
        kernels: list[Tensor],
    ) -> None:
        self._p, self._ws, self._r_s, self._r_q = p, ws, r_s, r_q
        self._features: list[_Moving] = []
        end = 0
        for number, feature in enumerate(features):
            shape, start, end = (*r_s.shape[:2], feature.width), end, end + feature.width
            b, d_b = ws(f"rows.b{number}", *shape), ws(f"rows.d_b{number}", *shape)
            of_support, of_query = kernels[2 * number : 2 * number + 2]
            self._features.append(_Moving(feature.rate, slice(start, end), of_support, of_query, b, d_b))
        self._rho: list[Tensor] = []

    def _moved(self, name: str, start: Tensor, kernels: list[Tensor]) -> Tensor:
        """r₀ - K B of all features."""
        parts = []
        for number, (feature, kernel) in enumerate(zip(self._features, kernels, strict=True)):
            shape = (*start.shape[:2], feature.b.shape[2])
            part = self._ws(f"rows.part{number}" if len(kernels) > 1 else f"rows.{name}", *shape)
            self._p(torch.baddbmm, start[..., feature.columns], kernel, feature.b, alpha=-1, out=part)
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        r = self._ws(f"rows.{name}", *start.shape)
        self._p(torch.cat, parts, -1, out=r)
        return r

    def forward(self, k: int) -> Tensor:
        """r [T, S, D] before step k."""
        return self._moved(f"r{k}", self._r_s, [f.of_support for f in self._features]) if k else self._r_s

    def update(self, k: int, rho: Tensor) -> None:
        """Take step k, from the support loss's gradient at r."""
        for feature in self._features:
            step, rate = rho[..., feature.columns], Rate(k, feature.rate)
            if k:
                self._p(feature.b.add_, step, alpha=rate)
            else:
                self._p(torch.mul, step, other=rate, out=feature.b)
        self._rho.append(rho)

    def before(self) -> Tensor:
        """r [T, Q, D] of the initial rows."""
        return self._r_q

    def query(self) -> Tensor:
        """r [T, Q, D] after the last step."""
        return self._moved("r_q", self._r_q, [f.of_query for f in self._features]) if self._rho else self._r_q

    def reverse_query(self, p: Program, d_r: Tensor) -> None:
        """Begin the reverse, from the adjoint of `query`."""
        self._p = p
        self._d_r_q, self._d_r_s = d_r, None
        self._d_rho = self._ws("rows.d_rho", *self._r_s.shape)
        if self._rho:
            for f in self._features:
                p(torch.baddbmm, f.d_b, f.of_query.mT, d_r[..., f.columns], beta=0, alpha=-1, out=f.d_b)

    def reverse_rates(self, k: int, found: Gradients) -> None:
        """Step k's derivative in the rates."""
        for f in self._features if found.learned else ():
            terms = self._d_rho[..., f.columns]  # free until the adjoint of ρ is written there
            self._p(add_product_sum, found.rate(k, f.rate), terms, f.d_b, self._rho[k][..., f.columns], 1.0)

    def reverse_backward(self, k: int, found: Gradients) -> Tensor:
        """From step k's update: the adjoint of ρ [T, S, D]."""
        self.reverse_rates(k, found)
        for f in self._features:
            self._p(torch.mul, f.d_b, other=Rate(k, f.rate), out=self._d_rho[..., f.columns])
        return self._d_rho

    def reverse_forward(self, k: int, d_r: Tensor) -> None:
        """Take in the adjoint of `forward(k)`."""
        p = self._p
        if self._d_r_s is None:
            self._d_r_s = self._ws("rows.d_r_s", *d_r.shape)
            p(self._d_r_s.copy_, d_r)
        else:
            p(self._d_r_s.add_, d_r)
        if k:
            for f in self._features:
                p(f.d_b.baddbmm_, f.of_support.mT, d_r[..., f.columns], alpha=-1)

    def finish(self, d_r_s: Tensor, d_r_q: Tensor) -> None:
        """Hand over the adjoints of r₀."""
        self._p(d_r_q.copy_, self._d_r_q)
        if self._d_r_s is None:
            self._p(d_r_s.zero_)
        else:
            self._p(d_r_s.copy_, self._d_r_s)
