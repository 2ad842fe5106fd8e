"""Layer normalisation with fast gain and bias, its inner backward, and the hand-written reverse of both.

Conventions as in `low_rank_layers`. y = γ n + β with n = (h - μ) s over the last axis, s = 1 / √(variance + ε). With ⟨⟩
the mean over that axis, J q = s (q - ⟨q⟩ - n ⟨n q⟩) is the derivative of n, symmetric. Given g at y:

    q = γ g, δ = J q, c = ⟨n q⟩         d_q = J d_δ,  d_h = -s (⟨d_δ δ⟩ n + c d_q + ⟨n d_δ⟩ δ)
                                        d_g = γ d_q,  d_γ += Σ g d_q
    γ₊ = γ - α Σ g n, β₊ = β - α' Σ g   d_g -= α n d_γ + α' d_β,  d_n = -α g d_γ,  d_α = -⟨d_γ, Σ g n⟩
    y = γ n + β                         d_n += γ d_y,  d_γ += Σ n d_y,  d_β += Σ d_y,  d_h += J d_n

(Σ over events.) d_h of the first line is the derivative of J itself: that of s, and that of n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metatrain.meta.low_rank_form import NormNames
from metatrain.meta.low_rank_layers import Gradients
from metatrain.meta.low_rank_program import Program, Rate, Workspace, add_product_sum


@dataclass
class _Normalised:
    """One normalised tensor: n [T, E, O] and s [T, E, 1]; of an inner step, what its reverse needs besides."""

    n: Tensor
    scale: Tensor
    gradient: Tensor | None = None  # g
    delta: Tensor | None = None  # δ
    along: Tensor | None = None  # c


class _Shift:
    """The gain or the bias: shared [O], and a task's own [T, 1, O] from step 1 on where it adapts."""

    def __init__(self, name: str, shared: Tensor, adapts: bool) -> None:
        self.name, self.adapts = name, adapts
        self.at = [shared]  # before each step
        self.gradients: list[Tensor] = []  # the support loss's, of each step


class Norm:
    """The normalisation above one linear layer.

    Args:
        names: Its parameters' names.
        parameters: The shared parameters.
        adapted: Which of them adapt.
    """

    def __init__(
        self,
        p: Program,
        ws: Workspace,
        name: str,
        names: NormNames,
        parameters: dict[str, Tensor],
        adapted: frozenset[str],
    ) -> None:
        self._p, self._ws, self._id, self._epsilon = p, ws, name, names.epsilon
        self._gain, self._bias = (_Shift(n, parameters[n], n in adapted) for n in (names.weight, names.bias))
        self._steps: list[_Normalised] = []

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        return self._ws(f"{self._id}.{name}", *like.shape)

    def _column(self, name: str, like: Tensor) -> Tensor:
        return self._ws(f"{self._id}.{name}", *like.shape[:2], 1)

    def _row(self, name: str, like: Tensor) -> Tensor:
        return self._ws(f"{self._id}.{name}", like.shape[0], 1, like.shape[2])

    def _normalise(self, name: str, h: Tensor, gain: Tensor, bias: Tensor) -> _Normalised:
        """h becomes y."""
        p, n, scale = self._p, self._buffer(f"n.{name}", h), self._column(f"scale.{name}", h)
        p(torch.mean, h, -1, keepdim=True, out=scale)
        p(torch.sub, h, scale, out=n)
        p(torch.mul, n, n, out=h)
        p(torch.mean, h, -1, keepdim=True, out=scale)
        p(scale.add_, self._epsilon)
        p(scale.rsqrt_)
        p(n.mul_, scale)
        p(torch.addcmul, bias, n, gain, out=h)
        return _Normalised(n, scale)

    def _mean_of_product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        product = self._buffer("product", a)
        self._p(torch.mul, a, b, out=product)
        self._p(torch.mean, product, -1, keepdim=True, out=out)

    def _derivative(self, at: _Normalised, q: Tensor, along: Tensor) -> None:
        """q becomes J q, and `along` ⟨n q⟩."""
        p, mean = self._p, self._column("mean", q)
        self._mean_of_product(at.n, q, along)
        p(torch.mean, q, -1, keepdim=True, out=mean)
        p(q.sub_, mean)
        p(q.addcmul_, at.n, along, value=-1)
        p(q.mul_, at.scale)

    def _sum(self, a: Tensor, b: Tensor | None, out: Tensor) -> None:
        """Σ a ⊙ b over events."""
        if b is not None:
            product = self._buffer("product", a)
            self._p(torch.mul, a, b, out=product)
            a = product
        self._p(torch.sum, a, 1, keepdim=True, out=out)

    def forward(self, k: int, h: Tensor) -> Tensor:
        """y before step k, in place of h."""
        self._steps.append(self._normalise(str(k), h, self._gain.at[k], self._bias.at[k]))
        return h

    def backward(self, k: int, g: Tensor) -> Tensor:
        """δ from the support loss's gradient at y, which is kept; takes step k too."""
        p, at = self._p, self._steps[k]
        at.gradient, at.delta, at.along = g, self._buffer(f"delta{k}", g), self._column(f"along{k}", g)
        p(torch.mul, g, self._gain.at[k], out=at.delta)
        self._derivative(at, at.delta, at.along)
        for shift, factor in ((self._gain, at.n), (self._bias, None)):
            moved = shift.at[k]
            if shift.adapts:
                total = self._row(f"sum{k}.{shift.name}", g)
                self._sum(g, factor, total)
                shift.gradients.append(total)
                moved = self._row(f"at{k + 1}.{shift.name}", g)
                p(torch.sub, shift.at[k], total, alpha=Rate(k, shift.name), out=moved)
            shift.at.append(moved)
        return at.delta

    def before(self, h: Tensor) -> Tensor:
        """y with the shared parameters, in place of h."""
        self._normalise("unused", h, self._gain.at[0], self._bias.at[0])
        return h

    def query(self, h: Tensor) -> Tensor:
        """y after the last step, in place of h."""
        self._at_query = self._normalise("q", h, self._gain.at[-1], self._bias.at[-1])
        return h

    def reverse_query(self, p: Program, d_y: Tensor) -> Tensor:
        """Begin the reverse: the adjoint of h, in place of that of y."""
        self._p, at = p, self._at_query
        self._d_gain, self._d_bias = self._row("d_gain", d_y), self._row("d_bias", d_y)
        self._sum(d_y, at.n, self._d_gain)
        self._sum(d_y, None, self._d_bias)
        p(d_y.mul_, self._gain.at[-1])
        self._derivative(at, d_y, self._column("unused", d_y))
        return d_y

    def reverse_backward(self, k: int, d_delta: Tensor, found: Gradients) -> Tensor:
        """From the adjoint of δ and step k's update: the adjoint of g, in another place."""
        p, at, gain = self._p, self._steps[k], self._gain
        assert at.gradient is not None
        assert at.delta is not None
        self.reverse_rates(k, found)
        self._through = through = self._buffer("through", d_delta)  # to h, past g
        mean, along = self._column("mean_of_delta", d_delta), self._column("along_delta", d_delta)
        self._mean_of_product(d_delta, at.delta, mean)
        d_q = d_delta
        self._derivative(at, d_q, along)
        p(torch.mul, at.n, mean, out=through)
        p(through.addcmul_, d_q, at.along)
        p(through.addcmul_, at.delta, along)
        p(through.mul_, at.scale)
        p(through.neg_)
        d_g = self._buffer("d_g", d_q)
        p(torch.mul, d_q, gain.at[k], out=d_g)
        if gain.adapts:
            # To n through the step; d_γ is still that of the gain after it.
            self._d_n = self._buffer("d_n", d_q)
            step = self._row("step", d_q)
            p(torch.mul, self._d_gain, other=-Rate(k, gain.name), out=step)
            p(d_g.addcmul_, at.n, step)
            p(torch.mul, at.gradient, step, out=self._d_n)
        if self._bias.adapts:
            p(d_g.sub_, self._d_bias, alpha=Rate(k, self._bias.name))
        self._add(self._d_gain, at.gradient, d_q)
        return d_g

    def _add(self, into: Tensor, a: Tensor, b: Tensor | None) -> None:
        total = self._ws(f"{self._id}.total", *into.shape)
        self._sum(a, b, total)
        self._p(into.add_, total)

    def reverse_rates(self, k: int, found: Gradients) -> None:
        """Step k's derivative in the rates."""
        for shift, d_shift in ((self._gain, self._d_gain), (self._bias, self._d_bias)):
            if shift.adapts and found.learned:
                scratch = self._ws(f"{self._id}.total", *d_shift.shape)
                self._p(add_product_sum, found.rate(k, shift.name), scratch, d_shift, shift.gradients[k], -1.0)

    def reverse_forward(self, k: int, d_y: Tensor) -> Tensor:
        """From the adjoint of `forward(k)`: that of h, in place of that of y."""
        p, at = self._p, self._steps[k]
        self._add(self._d_gain, d_y, at.n)
        self._add(self._d_bias, d_y, None)
        p(d_y.mul_, self._gain.at[k])
        if self._gain.adapts:
            p(d_y.add_, self._d_n)
        self._derivative(at, d_y, self._column("unused", d_y))
        p(d_y.add_, self._through)
        return d_y

    def finish(self, found: Gradients) -> None:
        """Add up the shared parameters' adjoints."""
        for shift, d_shift in ((self._gain, self._d_gain), (self._bias, self._d_bias)):
            total = self._ws(f"{self._id}.d_shared", d_shift.shape[2])
            self._p(torch.sum, d_shift, (0, 1), out=total)
            self._p(found.of[shift.name].add_, total)
