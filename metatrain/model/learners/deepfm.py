"""DeepFM: a factorisation machine and an MLP over the same embeddings.

Guo, Tang, Ye, Li and He 2017, "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction". The score is
their equation 1 before the sigmoid, y_FM + y_DNN; y_FM is equation 2, a first-order term plus the inner products of all
pairs of fields; y_DNN is an MLP over the concatenated fields (equations 3 and 4).

    score = offset + w·x + Σ_{i<j} ⟨f_i, f_j⟩ + head·MLP([f_1, …, f_m])

Each feature of the layout is a field. Departures from the paper, for embeddings that come looked up: a feature whose
width is not `width` is projected to it by a matrix of its own (a numeric feature's projection is the paper's V), a
multi-valued feature is the mean of its embeddings, and the first-order weight of an id is read off its embedding (w·x)
in place of a table of its own.

Symbols: E events, F width of the input, m fields, K width of a field.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metatrain.meta.layout import Layout
from metatrain.model.learners.layers import Hidden, head, shifted


class DeepFM(nn.Module):
    """Scores events by first-order, pairwise and deep interactions of their features.

    Parameters: `linear` (w and a bias); `fields.N.weight` of the features that are projected; `deep.layers.N.*` and
    `head.*`, the MLP.

    Args:
        inputs: Width of an event's input.
        layout: Whose its columns are: each feature is a field.
        hidden: Widths of the MLP's hidden layers; empty: no deep part, a factorisation machine.
        activation: relu, gelu, tanh or silu.
        offset: Score of an event about which nothing is known.
        width: K. Features of that width are fields as they are.

    Raises:
        ValueError: There are fewer than two features to interact, or the width is no width.
    """

    offset: Tensor

    def __init__(
        self,
        inputs: int,
        *,
        layout: Layout,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
        offset: float = 0.0,
        width: int = 16,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self._columns = [slice(c.start, c.stop) for c in layout.features]
        if len(self._columns) < 2:
            raise ValueError(
                f"DeepFM is about interactions of features, and there is but {len(self._columns)}: add to "
                "model.features, or choose mlp"
            )
        widths = [columns.stop - columns.start for columns in self._columns]
        self.fields = nn.ModuleList(nn.Identity() if w == width else nn.Linear(w, width, bias=False) for w in widths)
        self.linear = head(inputs)
        self.deep = Hidden(len(widths) * width, hidden, activation) if hidden else None
        self.head = head(self.deep.width) if self.deep is not None else None
        #: What a method that tells the head from the rest takes for the head: patterns over the parameters' names.
        self.head_parameters = ("linear.*",) if self.head is None else ("linear.*", "head.*")
        self._width = width
        #: F + K, and the width of the last hidden layer.
        self.represented = inputs + width + (self.deep.width if self.deep is not None else 0)
        self.register_buffer("offset", torch.tensor(float(offset)))

    def represent(self, x: Tensor) -> Tensor:
        """What the score is linear in, of inputs [..., E, F]: [..., E, F + K + H].

        The input itself; each dimension's pairs of fields; the last hidden layer.
        """
        fields = [field(x[..., columns]) for field, columns in zip(self.fields, self._columns, strict=True)]
        # Σ_{i<j} f_i f_j = ½ ((Σ f)² − Σ f²): m products in place of m² / 2.
        # In the input's own type: the difference of squares loses half of bfloat16's digits.
        f_mK = torch.stack(fields, dim=-2).to(x.dtype)
        pairs = 0.5 * (f_mK.sum(-2).square() - f_mK.square().sum(-2))
        parts = [x, pairs]
        if self.deep is not None:
            parts.append(self.deep(f_mK.flatten(-2)).to(x.dtype))
        return torch.cat(parts, dim=-1)

    def score(self, represented: Tensor, x: Tensor) -> Tensor:
        """Scores [..., E] of what `represent` gave."""
        inputs, above = x.shape[-1], x.shape[-1] + self._width
        score = self.linear(represented[..., :inputs]) + represented[..., inputs:above].sum(-1, keepdim=True)
        if self.head is not None:
            score = score + self.head(represented[..., above:])
        return shifted(score, self.offset)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [..., E] of inputs [..., E, F]."""
        return self.score(self.represent(x), x)
