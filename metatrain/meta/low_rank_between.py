"""What lies between two linear layers: the activation, its derivative in the inner backward, and the reverse of both.

Same conventions as `low_rank_layers`: z = f(h), δ = g ⊙ f'(h) with g the support loss's gradient at z. Where the layer
is normalised (`low_rank_norm`), f is of what the normalisation makes of h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metatrain.meta.low_rank_elementwise import Activation
from metatrain.meta.low_rank_layers import Gradients
from metatrain.meta.low_rank_norm import Norm
from metatrain.meta.low_rank_program import Program, Workspace


class Between:
    """The activation above one hidden layer. Works in place where nothing needs what it replaces."""

    def __init__(
        self, p: Program, ws: Workspace, number: int, activation: Activation, order: int, norm: Norm | None
    ) -> None:
        self._p, self._ws, self._id, self._activation, self._norm = p, ws, f"between{number}", activation, norm
        self._bends = not activation.straight and order == 2
        self._slopes: list[Tensor] = []
        self._curvatures: list[Tensor | None] = []
        self._gradients: list[Tensor] = []

    def _activate(self, name: str, h: Tensor, bends: bool) -> tuple[Tensor, Tensor | None]:
        """h becomes the activation's value; slope and curvature are returned."""
        slope = self._ws(f"{self._id}.slope.{name}", *h.shape)
        curvature = self._ws(f"{self._id}.curvature.{name}", *h.shape) if bends else None
        self._p(self._activation.evaluate, h, slope, curvature)
        return slope, curvature

    def forward(self, k: int, h: Tensor) -> Tensor:
        """z before step k, in place of h."""
        if self._norm is not None:
            self._norm.forward(k, h)
        slope, curvature = self._activate(str(k), h, self._bends)
        self._slopes.append(slope)
        self._curvatures.append(curvature)
        return h

    def backward(self, k: int, g: Tensor) -> Tensor:
        """δ, the support loss's gradient at h, from that at z; takes the normalisation's step k."""
        self._gradients.append(g)
        delta = g
        if self._curvatures[k] is None:
            self._p(g.mul_, self._slopes[k])
        else:
            delta = self._ws(f"{self._id}.delta{k}", *g.shape)
            self._p(torch.mul, g, self._slopes[k], out=delta)
        return delta if self._norm is None else self._norm.backward(k, delta)

    def before(self, h: Tensor) -> Tensor:
        """z with the shared parameters, in place of h."""
        if self._norm is not None:
            self._norm.before(h)
        self._activate("unused", h, False)
        return h

    def query(self, h: Tensor) -> Tensor:
        """z after the last step, in place of h."""
        if self._norm is not None:
            self._norm.query(h)
        self._slope_q, _ = self._activate("q", h, False)
        return h

    def reverse_query(self, p: Program, d_z: Tensor) -> Tensor:
        """Begin the reverse: the adjoint of h, in place of that of z."""
        self._p = p
        p(d_z.mul_, self._slope_q)
        return d_z if self._norm is None else self._norm.reverse_query(p, d_z)

    def reverse_backward(self, k: int, d_delta: Tensor, found: Gradients) -> Tensor:
        """From the adjoint of δ and the normalisation's step k: the adjoint of g."""
        if self._norm is not None:
            d_delta = self._norm.reverse_backward(k, d_delta, found)
        curvature = self._curvatures[k]
        if curvature is not None:
            self._through = self._ws(f"{self._id}.through", *d_delta.shape)  # to h, past g
            self._p(torch.mul, d_delta, self._gradients[k], out=self._through)
            self._p(self._through.mul_, curvature)
        self._p(d_delta.mul_, self._slopes[k])
        return d_delta

    def reverse_forward(self, k: int, d_z: Tensor) -> Tensor:
        """The adjoint of h, in place of that of z."""
        self._p(d_z.mul_, self._slopes[k])
        if self._curvatures[k] is not None:
            self._p(d_z.add_, self._through)
        return d_z if self._norm is None else self._norm.reverse_forward(k, d_z)

    def reverse_rates(self, k: int, found: Gradients) -> None:
        """Step k's derivative in the normalisation's rates alone, for the first order."""
        if self._norm is not None:
            self._norm.reverse_rates(k, found)

    def finish(self, found: Gradients) -> None:
        """Add up the shared parameters' adjoints."""
        if self._norm is not None:
            self._norm.finish(found)
