"""Content-based scores: an item is what its features say and never its id, so new items and old ones score alike.

    score = offset + b·v + c(t) + (p + P(t))·v        v = L content + MLP(content)

Content-based recommendation as of Lops, de Gemmis and Semeraro 2011, "Content-based Recommender Systems: State of the
Art and Trends", with two towers of layers in place of profiles of keywords: v is the item's vector, t are the task's
features, p + P(t) is the user's vector, c(t) the user's bias and b·v the item's. An event's own features are content
too. A task is known better by adapting `user.vector` and `user.bias`, or by a regression over v.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metatrain.meta.layout import Layout
from metatrain.model.learners.layers import Taste, Tower, is_content, shifted


class ContentBased(nn.Module):
    """Scores events by the product of what a task's and what an item's features say.

    Parameters: `item` (a `layers.Tower`: L and the MLP), `user` (a `layers.Taste`: p, P, c and b).

    Args:
        inputs: Width of an event's input.
        layout: Whose its columns are.
        hidden: Widths of the hidden layers of both towers; empty: both are linear.
        activation: relu, gelu, tanh or silu.
        offset: Score of an event about which nothing is known.
        width: D, the width of an item's vector.

    Raises:
        ValueError: Items have no features but their id, or the width is no width.
    """

    #: What a method that tells the head from the rest takes for the head: patterns over the parameters' names.
    head_parameters = ("user.vector", "user.bias")

    offset: Tensor
    content_columns: Tensor
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
    ) -> None:
        super().__init__()
        if not any(is_content(c) and c.owner == "item" for c in layout.features):
            raise ValueError(
                "content-based scores need features of items beside their id, and there are none: add to "
                "model.features, or choose factorisation"
            )
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        #: D, the width of an item's vector.
        self.represented = width
        self.of_items = not len(layout.of("event"))
        self.register_buffer("content_columns", layout.where(is_content), persistent=False)
        self.register_buffer("task_columns", layout.of("task"), persistent=False)
        self.register_buffer("offset", torch.tensor(float(offset)))
        self.item = Tower(len(self.content_columns), hidden, width, activation)
        self.user = Taste(width, len(self.task_columns), hidden, activation)

    def represent(self, x: Tensor) -> Tensor:
        """The items' vectors of inputs [..., E, F]: [..., E, D]."""
        return self.item(x[..., self.content_columns])

    def score(self, represented: Tensor, x: Tensor) -> Tensor:
        """Scores [..., E] of items' vectors, for the tasks of the inputs that they are of."""
        return shifted(self.user(represented, x[..., self.task_columns]), self.offset)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [..., E] of inputs [..., E, F]."""
        return self.score(self.represent(x), x)
