"""Activations and event losses with the first and second derivatives that a hand-written backward needs.

Each is checked against autograd in the tests. Kinks take the value that torch's autograd takes: the derivative of relu
and of the absolute value is 0 at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from metatrain.meta.losses import EventLoss


@dataclass(frozen=True)
class Activation:
    """An elementwise function, and how it is evaluated with its derivatives.

    `evaluate(h, slope, curvature)` puts the function's value in place of h, its first derivative into `slope` and the
    second into `curvature`, all of one shape. `straight`: the second is zero everywhere, and not written.
    """

    function: Callable[[Tensor], Tensor]
    evaluate: Callable[[Tensor, Tensor, Tensor | None], object]
    straight: bool = False


def _relu(h: Tensor, slope: Tensor, curvature: Tensor | None) -> None:
    torch.relu_(h)
    # sign is the quickest of the ways to make the 0/1 mask here: comparing into floats takes twice, into bools five
    # times as long, and threshold_backward is not vectorised.
    torch.sign(h, out=slope)


def _tanh(h: Tensor, slope: Tensor, curvature: Tensor | None) -> None:
    torch.tanh_(h)
    torch.mul(h, h, out=slope).neg_().add_(1)
    if curvature is not None:
        torch.mul(h, slope, out=curvature).mul_(-2)


def _silu(h: Tensor, slope: Tensor, curvature: Tensor | None) -> None:
    sigmoid = torch.sigmoid(h)
    falling = sigmoid * (1 - sigmoid)
    torch.addcmul(sigmoid, h, falling, out=slope)
    if curvature is not None:
        torch.mul(falling, h * (1 - 2 * sigmoid) + 2, out=curvature)
    h.mul_(sigmoid)


def _gelu(h: Tensor, slope: Tensor, curvature: Tensor | None) -> None:
    cumulative = torch.special.ndtr(h)
    square = h.square()
    density = torch.exp(square * -0.5).mul_(1 / math.sqrt(2 * math.pi))
    torch.addcmul(cumulative, h, density, out=slope)
    if curvature is not None:
        torch.mul(density, square.neg_().add_(2), out=curvature)
    h.mul_(cumulative)


ACTIVATIONS = {
    "relu": Activation(functional.relu, _relu, straight=True),
    "tanh": Activation(torch.tanh, _tanh),
    "silu": Activation(functional.silu, _silu),
    "gelu": Activation(functional.gelu, _gelu),
}


@dataclass(frozen=True)
class LossDerivatives:
    """Derivatives of an event loss in the score, elementwise, into `out`.

    `slope(scores, labels, out)`: the first. `curvature`: the second, or a number where it is the same everywhere.
    `name` is the loss's own where it has one, and `delta` the width of a Huber loss's square.
    """

    slope: Callable[[Tensor, Tensor, Tensor], object]
    curvature: Callable[[Tensor, Tensor, Tensor], object] | float
    name: str | None = None
    delta: float = 1.0


def loss_derivatives(loss: str | EventLoss, huber_delta: float = 1.0) -> LossDerivatives:
    """Those of the named loss of `losses.event_loss`; of any other elementwise loss, by autograd.

    Raises:
        ValueError: An unknown name.
    """
    if not isinstance(loss, str):
        return _by_autograd(loss)
    if loss == "squared":
        return LossDerivatives(lambda s, y, out: torch.sub(s, y, out=out).mul_(2), 2.0, loss)
    if loss == "absolute":
        return LossDerivatives(lambda s, y, out: torch.sub(s, y, out=out).sign_(), 0.0, loss)
    if loss == "huber":
        return LossDerivatives(
            lambda s, y, out: torch.sub(s, y, out=out).clamp_(-huber_delta, huber_delta),
            lambda s, y, out: out.copy_((s - y).abs_() < huber_delta),
            loss,
            huber_delta,
        )
    if loss == "binary_cross_entropy":

        def curvature(s: Tensor, y: Tensor, out: Tensor) -> None:
            p = torch.sigmoid(s)
            torch.mul(p, 1 - p, out=out)

        return LossDerivatives(lambda s, y, out: torch.sigmoid(s, out=out).sub_(y), curvature, loss)
    raise ValueError(f"unknown loss {loss!r}: squared, absolute, huber or binary_cross_entropy")


def _by_autograd(loss: EventLoss) -> LossDerivatives:
    def slope(s: Tensor, y: Tensor, out: Tensor) -> None:
        with torch.enable_grad():
            at = s.detach().requires_grad_()
            (first,) = torch.autograd.grad(loss(at, y).sum(), at)
        out.copy_(first)

    def curvature(s: Tensor, y: Tensor, out: Tensor) -> None:
        out.zero_()
        with torch.enable_grad():
            at = s.detach().requires_grad_()
            (first,) = torch.autograd.grad(loss(at, y).sum(), at, create_graph=True)
            if first.requires_grad:
                (second,) = torch.autograd.grad(first.sum(), at, allow_unused=True)
                if second is not None:
                    out.copy_(second)

    return LossDerivatives(slope, curvature)
