"""Activations and event losses with the first and second derivatives that a hand-written backward needs.

Each is checked against autograd in the tests. Kinks take the value that torch's autograd takes: the derivative of relu
and of the absolute value is 0 at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metatrain.meta.losses import EventLoss


class Activated(NamedTuple):
    """An activation and its derivatives at one input."""

    value: Tensor
    slope: Tensor
    curvature: Tensor | None  # None: zero everywhere


@dataclass(frozen=True)
class Activation:
    """An elementwise function and how it is evaluated with its derivatives.

    `evaluate(h, slope)` may overwrite h and use `slope`, both buffers of one shape, for its results.
    """

    function: Callable[[Tensor], Tensor]
    evaluate: Callable[[Tensor, Tensor], Activated]
    operations: int  # passes over memory, for the cost model


def _relu(h: Tensor, slope: Tensor) -> Activated:
    value = torch.relu_(h)
    # sign is the quickest of the ways to make the 0/1 mask here: comparing into floats takes twice, into bools five
    # times as long, and threshold_backward is not vectorised.
    return Activated(value, torch.sign(value, out=slope), None)


def _tanh(h: Tensor, slope: Tensor) -> Activated:
    value = torch.tanh_(h)
    torch.mul(value, value, out=slope).neg_().add_(1)
    return Activated(value, slope, (value * slope).mul_(-2))


def _silu(h: Tensor, slope: Tensor) -> Activated:
    sigmoid = torch.sigmoid(h)
    value = h * sigmoid
    falling = sigmoid * (1 - sigmoid)
    torch.mul(h, falling, out=slope).add_(sigmoid)
    return Activated(value, slope, falling * (2 + h * (1 - 2 * sigmoid)))


def _gelu(h: Tensor, slope: Tensor) -> Activated:
    cumulative = torch.special.ndtr(h)
    density = torch.exp(h.square().mul_(-0.5)).mul_(1 / math.sqrt(2 * math.pi))
    torch.mul(h, density, out=slope).add_(cumulative)
    return Activated(h * cumulative, slope, density * (2 - h.square()))


ACTIVATIONS = {
    "relu": Activation(F.relu, _relu, 2),
    "tanh": Activation(torch.tanh, _tanh, 5),
    "silu": Activation(F.silu, _silu, 10),
    "gelu": Activation(F.gelu, _gelu, 10),
}


@dataclass(frozen=True)
class LossDerivatives:
    """Derivatives of an event loss in the score, elementwise.

    `slope(scores, labels)`: the first. `curvature(scores, labels)`: the second, or a number where it is constant.
    """

    slope: Callable[[Tensor, Tensor], Tensor]
    curvature: Callable[[Tensor, Tensor], Tensor | float]


def loss_derivatives(loss: str | EventLoss, huber_delta: float = 1.0) -> LossDerivatives:
    """Those of the named loss of `losses.event_loss`; of any other elementwise loss, by autograd.

    Raises:
        ValueError: An unknown name.
    """
    if not isinstance(loss, str):
        return _by_autograd(loss)
    if loss == "squared":
        return LossDerivatives(lambda s, y: (s - y).mul_(2), lambda s, y: 2.0)
    if loss == "absolute":
        return LossDerivatives(lambda s, y: (s - y).sign_(), lambda s, y: 0.0)
    if loss == "huber":
        return LossDerivatives(
            lambda s, y: (s - y).clamp_(-huber_delta, huber_delta), lambda s, y: ((s - y).abs_() < huber_delta).to(s.dtype)
        )
    if loss == "binary_cross_entropy":

        def curvature(s: Tensor, y: Tensor) -> Tensor:
            p = torch.sigmoid(s)
            return p * (1 - p)

        return LossDerivatives(lambda s, y: torch.sigmoid(s).sub_(y), curvature)
    raise ValueError(f"unknown loss {loss!r}: squared, absolute, huber or binary_cross_entropy")


def _by_autograd(loss: EventLoss) -> LossDerivatives:
    def slope(s: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            at = s.detach().requires_grad_()
            return torch.autograd.grad(loss(at, y).sum(), at)[0]

    def curvature(s: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            at = s.detach().requires_grad_()
            (first,) = torch.autograd.grad(loss(at, y).sum(), at, create_graph=True)
            if not first.requires_grad:
                return torch.zeros_like(s)
            (second,) = torch.autograd.grad(first.sum(), at, allow_unused=True)
            return torch.zeros_like(s) if second is None else second

    return LossDerivatives(slope, curvature)
