"""A hybrid of collaborative filtering and content: what an item's id knows, mixed with what its features say.

    score = offset + α CF + (1 − α) CB

A weighted hybrid in the words of Burke 2002, "Hybrid Recommender Systems: Survey and Experiments". CF is a
factorisation over the id's embedding e, with biases: b·e + c(t) + (p + P t)·e; CB is the content-based learner's score
(content.py). t are the task's features.

    α = sigmoid(`alpha_logit` + g·e)   and 0 where e is all zero

`alpha_logit` is one number: with `meta.adapt: [alpha_logit]` each task adapts its own α. The gate g, zero at the start,
makes α an item's too. It is there for unknown items. A base learner sees an item's embedding and not its id, and an
unknown id has a row like others (row 0), so that an item is unknown can't be read off the input directly. But all
unknown ids share that one row, which `model.id_dropout` trains: the gate learns to close on it, and the score is then
content's alone. Without id dropout that row is seen only where training has items outside the vocabulary. A vector that
is all zero means that there is no row at all, and that is visible: α is 0, exactly.

Symbols: E events, F width of the input, D of the id's embedding, C of a content vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metatrain.meta.layout import Layout
from metatrain.model.learners.content import ContentBased
from metatrain.model.learners.layers import Taste, is_id, shifted


class Hybrid(nn.Module):
    """Scores events by a learned mixture of a factorisation and a content-based model.

    Parameters: `alpha_logit` [1]; `gate.weight` (g); `collaborative` (a `layers.Taste` over the id's embedding);
    `content` (a `ContentBased`).

    Args:
        inputs: Width of an event's input.
        layout: Whose its columns are.
        hidden: Widths of the hidden layers of content's towers; empty: they are linear.
        activation: relu, gelu, tanh or silu.
        offset: Score of an event about which nothing is known.
        width: C, the width of a content vector.
        alpha: α at the start, between 0 and 1.
        gate: Whether α also depends on the item's embedding.

    Raises:
        ValueError: There is no item id or no content to mix, or α is not between 0 and 1.
    """

    #: What a method that tells the head from the rest takes for the head: patterns over the parameters' names.
    head_parameters = ("collaborative.vector", "collaborative.bias", "content.user.vector", "content.user.bias")

    offset: Tensor
    id_columns: Tensor
    task_columns: Tensor

    def __init__(
        self,
        inputs: int,
        *,
        layout: Layout,
        hidden: Sequence[int] = (64,),
        activation: str = "relu",
        offset: float = 0.0,
        width: int = 32,
        alpha: float = 0.5,
        gate: bool = True,
    ) -> None:
        super().__init__()
        id_columns = layout.where(is_id)
        if not len(id_columns):
            raise ValueError(
                "a hybrid needs the item's id beside its content, and there is none: add it to model.features, or "
                "choose content"
            )
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must be between 0 and 1, both excluded, got {alpha}")
        self.register_buffer("id_columns", id_columns, persistent=False)
        self.register_buffer("task_columns", layout.of("task"), persistent=False)
        self.register_buffer("offset", torch.tensor(float(offset)))
        self.collaborative = Taste(len(id_columns), len(self.task_columns), (), activation)
        self.content = ContentBased(inputs, layout=layout, hidden=hidden, activation=activation, width=width)
        self.alpha_logit = nn.Parameter(torch.tensor([math.log(alpha / (1 - alpha))]))
        self.gate = nn.Linear(len(id_columns), 1, bias=False) if gate else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
        #: D + C, of the representation.
        self.represented = len(id_columns) + width

    def alpha(self, x: Tensor) -> Tensor:
        """α of inputs [..., E, F]: [..., E, 1]."""
        e = x[..., self.id_columns]
        logit = self.alpha_logit if self.gate is None else self.alpha_logit + self.gate(e)
        return torch.sigmoid(logit) * (e != 0).any(-1, keepdim=True)

    def represent(self, x: Tensor) -> Tensor:
        """The items' vectors as they are mixed, α e and (1 − α) v, of inputs [..., E, F]: [..., E, D + C].

        A regression over these trusts an id as far as the mixture does.
        """
        alpha = self.alpha(x)
        return torch.cat([alpha * x[..., self.id_columns], (1 - alpha) * self.content.represent(x)], dim=-1)

    def score(self, represented: Tensor, x: Tensor) -> Tensor:
        """Scores [..., E] of what `represent` gave, for the tasks of the inputs that they are of."""
        alpha, t, of_id = self.alpha(x), x[..., self.task_columns], len(self.id_columns)
        # Both parts are linear in their vector, so a mixed vector gives a mixed score; their biases are mixed here.
        collaborative = self.collaborative(represented[..., :of_id], t, alpha)
        return shifted(collaborative + self.content.user(represented[..., of_id:], t, 1 - alpha), self.offset)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [..., E] of inputs [..., E, F]."""
        return self.score(self.represent(x), x)
