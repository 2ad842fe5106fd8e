"""Parts that several base learners are made of: hidden layers, towers from features to vectors, a user's taste.

All work on any leading axes and are pure functions of their parameters, so they serve under torch.func as they are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metatrain.meta.layout import ITEM, Columns
from metatrain.model.learners.mlp import activation_of


def is_id(column: Columns) -> bool:
    """Whether these are the columns of the item's own id."""
    return column.feature == ITEM and column.owner == "item"


def is_content(column: Columns) -> bool:
    """Whether these say what an event is about: an item's features but for its id, and the event's own."""
    return column.owner != "task" and not is_id(column)


class Hidden(nn.Module):
    """Linear layers, each followed by the activation: [..., I] → [..., `width`]; without layers, the input itself.

    Parameters: `layers.N.weight`, `layers.N.bias`.

    Raises:
        ValueError: An unknown activation.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], activation: str) -> None:
        super().__init__()
        self.width = hidden[-1] if hidden else inputs
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise([inputs, *hidden]))
        self._activation = activation_of(activation)

    def forward(self, x: Tensor) -> Tensor:
        """What the last layer gives."""
        for layer in self.layers:
            x = self._activation(layer(x))
        return x


class Tower(nn.Module):
    """A vector from features, a linear map plus an MLP: [..., I] → [..., D]. All-zero features need not give zero.

    Parameters: `linear.weight`; with hidden layers `hidden.layers.N.*` and `out.*`.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], width: int, activation: str) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width, bias=False)
        self.hidden = Hidden(inputs, hidden, activation) if hidden else None
        self.out = nn.Linear(self.hidden.width, width) if self.hidden is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """The vector."""
        linear = self.linear(x)
        return linear if self.hidden is None or self.out is None else linear + self.out(self.hidden(x))


class Taste(nn.Module):
    """A task's side of a product with items' vectors v [..., D]: b·v + c(t) + (p + P(t))·v.

    t are the task's features, P and c a tower over them. Parameters: `vector` (p) and `bias`, what all tasks share of
    a user; `tower`, where tasks have features; `popularity` (b), an item's bias read off its vector.

    Args:
        width: D.
        features: Width of t; 0: tasks have none.
        hidden, activation: Of the tower.
    """

    def __init__(self, width: int, features: int, hidden: Sequence[int], activation: str) -> None:
        super().__init__()
        self.vector, self.bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(1))
        self.popularity = nn.Linear(width, 1, bias=False)
        self.tower = Tower(features, hidden, width + 1, activation) if features else None

    def forward(self, v: Tensor, t: Tensor, share: Tensor | float = 1.0) -> Tensor:
        """Scores [..., E, 1].

        Args:
            v: Items' vectors [..., E, D].
            t: The task's features in every event [..., E, features].
            share: Factor of the task's bias alone; whoever scales v scales the rest.
        """
        vector, bias = self.vector, self.bias
        if self.tower is not None:
            own = self.tower(t)
            vector, bias = vector + own[..., :-1], bias + own[..., -1:]
        return self.popularity(v) + (vector * v).sum(-1, keepdim=True) + share * bias


def head(inputs: int) -> nn.Linear:
    """A linear layer to one score, small at the start.

    Small, not zero: with a zero head the first inner step would leave all that is below it where it is.
    """
    layer = nn.Linear(inputs, 1)
    nn.init.normal_(layer.weight, std=0.1 / math.sqrt(inputs))
    nn.init.zeros_(layer.bias)
    return layer


def shifted(score: Tensor, offset: Tensor) -> Tensor:
    """Scores [..., E, 1] → [..., E] with the offset added, in the offset's own type.

    bfloat16 would round a mean rating of 3.53 to 3.53125.
    """
    return score.squeeze(-1).to(offset.dtype) + offset
