"""Factorisation with biases over id and content: an item's vector, a user's vector, and the product of both.

    score = offset + b·v + c·t + (p + P t)·v        v = id + L content + MLP(content)

v is the item's vector: its id's embedding where it is known, plus what its content says (an event's own features are
content too); t are the task's features, p the taste that all tasks share at the start. A task is known better by
adapting `taste` and `bias`, or by a regression over v.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from metatrain.meta.layout import Layout
from metatrain.model.learners.layers import is_content, is_id
from metatrain.model.learners.mlp import activation_of


class Factorisation(nn.Module):
    """Scores events by the product of a task's and an item's vector.

    Parameters: `taste` [D] and `bias` [1], what all tasks share of a user; `user`, from the task's features to their
    part of both; `content` and `layers.N`, from content to the item's vector; `popularity` (b).

    Args:
        inputs: Width of an event's input.
        layout: Whose its columns are.
        hidden: Widths of the MLP's hidden layers; empty: content enters linearly alone.
        activation: relu, gelu, tanh or silu.
        offset: Score of an event about which nothing is known.
        width: D where there is no id; with one it is the width of the id's embedding.

    Raises:
        ValueError: The input has neither an id nor content.
    """

    offset: Tensor
    id_columns: Tensor
    content_columns: Tensor
    task_columns: Tensor
    #: What a user is known by: the head over the items' vectors.
    head_parameters = ("taste", "bias")

    def __init__(
        self,
        inputs: int,
        *,
        layout: Layout,
        hidden: tuple[int, ...] = (64,),
        activation: str = "relu",
        offset: float = 0.0,
        width: int = 32,
    ) -> None:
        super().__init__()
        id_columns, content = layout.where(is_id), layout.where(is_content)
        if not (len(id_columns) or len(content)):
            raise ValueError("a factorisation needs the item's id or features of items: add to model.features")
        #: D, the width of an item's vector.
        self.represented = len(id_columns) or width
        self.of_items = not len(layout.of("event"))
        self.register_buffer("id_columns", id_columns, persistent=False)
        self.register_buffer("content_columns", content, persistent=False)
        self.register_buffer("task_columns", layout.of("task"), persistent=False)
        self.register_buffer("offset", torch.tensor(float(offset)))
        self.taste, self.bias = nn.Parameter(torch.zeros(self.represented)), nn.Parameter(torch.zeros(1))
        self.popularity = nn.Linear(self.represented, 1, bias=False)
        tasks = len(self.task_columns)
        self.user = nn.Linear(tasks, self.represented + 1, bias=False) if tasks else None
        self.content = nn.Linear(len(content), self.represented, bias=False) if len(content) else None
        widths = [len(content), *hidden, self.represented] if hidden and len(content) else []
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))
        self._activation = activation_of(activation)

    def represent(self, x: Tensor) -> Tensor:
        """The items' vectors of inputs [..., E, F]: [..., E, D]."""
        v = x[..., self.id_columns] if len(self.id_columns) else x.new_zeros(*x.shape[:-1], self.represented)
        if self.content is None:
            return v
        h = x[..., self.content_columns]
        v = v + self.content(h)
        for number, layer in enumerate(self.layers):
            h = layer(h if number == 0 else self._activation(h))
        return v + h if len(self.layers) else v

    def score(self, represented: Tensor, x: Tensor) -> Tensor:
        """Scores [..., E] of items' vectors, for the tasks of the inputs that they are of."""
        v, taste, bias = represented, self.taste, self.bias
        if self.user is not None:
            own = self.user(x[..., self.task_columns])
            taste, bias = taste + own[..., :-1], bias + own[..., -1:]
        score = self.popularity(v) + (taste * v).sum(-1, keepdim=True) + bias
        return score.squeeze(-1).to(self.offset.dtype) + self.offset

    def forward(self, x: Tensor) -> Tensor:
        """Scores [..., E] of inputs [..., E, F]."""
        return self.score(self.represent(x), x)
