"""Losses of single events, by the name that the configuration gives them. Torch alone."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import huber_loss, softplus

#: scores and labels of any one shape → a loss of each event, the same shape.
EventLoss = Callable[[Tensor, Tensor], Tensor]


def event_loss(name: str, huber_delta: float = 1.0) -> EventLoss:
    """The loss of that name: squared (without ½), absolute, huber, or binary_cross_entropy (scores are logits).

    Raises:
        ValueError: An unknown name.
    """
    if name == "squared":
        return lambda scores, labels: (scores - labels).square()
    if name == "absolute":
        return lambda scores, labels: (scores - labels).abs()
    if name == "huber":
        return lambda scores, labels: huber_loss(scores, labels, reduction="none", delta=huber_delta)
    if name == "binary_cross_entropy":
        # Smooth everywhere: forms with |score| have the wrong gradient at a score of exactly 0, where training starts.
        return lambda scores, labels: softplus(scores) - scores * labels
    raise ValueError(f"unknown loss {name!r}: squared, absolute, huber or binary_cross_entropy")


def mean_over_events(losses: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last axis where mask is 1; 0 where a task has no event: [..., E] → [...]."""
    return (losses * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
