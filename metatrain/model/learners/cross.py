"""DCN-v2: layers that cross the input with itself, beside an MLP or below it.

Wang, Shivanna, Cheng, Jain, Lin, Hong and Chi 2021, "DCN V2: Improved Deep & Cross Network and Practical Lessons for
Web-scale Learning to Rank Systems", section "Cross Network". A cross layer is

    x_{l+1} = x_0 ⊙ (W_l x_l + b_l) + x_l,

so that after L layers every product of up to L + 1 inputs is there. `rank` makes W_l a product U_l V_lᵀ, as the paper's
"Cost-Effective Mixture of Low-Rank DCN" does with one expert and no gate.

    stacked     x → crosses → MLP → head
    parallel    x → crosses ┐
                x → MLP ────┴→ head

Symbols: E events, F width of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from metatrain.model.learners.layers import Hidden, head, shifted


class DeepCross(nn.Module):
    """Scores events by crosses of bounded degree and an MLP.

    Parameters: `crosses.N.weight` and `crosses.N.bias` (with `rank`: `crosses.N.0.weight` is Vᵀ, `crosses.N.1.weight`
    is U, `crosses.N.1.bias` is b); `deep.layers.N.*`; `head.*`.

    Args:
        inputs: Width of an event's input.
        hidden: Widths of the MLP's hidden layers; empty: the crosses alone.
        activation: relu, gelu, tanh or silu: of the MLP; crosses have none.
        offset: Score of an event about which nothing is known.
        crosses: Number of cross layers.
        structure: parallel, or stacked.
        rank: Of the cross layers' matrices; 0: they are full.

    Raises:
        ValueError: No cross layer, an unknown structure, or a rank that isn't less than the input's width.
    """

    #: What a method that tells the head from the rest takes for the head: patterns over the parameters' names.
    head_parameters = ("head.*",)

    offset: Tensor

    def __init__(
        self,
        inputs: int,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
        offset: float = 0.0,
        crosses: int = 2,
        structure: Literal["parallel", "stacked"] = "parallel",
        rank: int = 0,
    ) -> None:
        super().__init__()
        if crosses < 1:
            raise ValueError(f"crosses must be at least 1, got {crosses}; without any, choose mlp")
        if structure not in ("parallel", "stacked"):
            raise ValueError(f"unknown structure {structure!r}: parallel, stacked")
        if not 0 <= rank < inputs:
            raise ValueError(f"rank must be from 0 (full matrices) to below the input's width, {inputs}, got {rank}")
        self.crosses = nn.ModuleList(_matrix(inputs, rank) for _ in range(crosses))
        self.deep = Hidden(inputs, hidden, activation) if hidden else None
        self._parallel = structure == "parallel"
        #: Width of what the head reads.
        if self.deep is None:
            self.represented = inputs
        else:
            self.represented = self.deep.width + (inputs if self._parallel else 0)
        self.head = head(self.represented)
        self.register_buffer("offset", torch.tensor(float(offset)))

    def represent(self, x: Tensor) -> Tensor:
        """What the head reads of inputs [..., E, F]: [..., E, H]."""
        crossed = x
        for matrix in self.crosses:
            crossed = x * matrix(crossed) + crossed
        if self.deep is None:
            return crossed
        if not self._parallel:
            return self.deep(crossed)
        deep = self.deep(x)
        return torch.cat([crossed.to(deep.dtype), deep], dim=-1)

    def score(self, represented: Tensor, x: Tensor) -> Tensor:
        """Scores [..., E] of what `represent` gave."""
        return shifted(self.head(represented), self.offset)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [..., E] of inputs [..., E, F]."""
        return self.score(self.represent(x), x)


def _matrix(width: int, rank: int) -> nn.Module:
    """W x + b, or U Vᵀ x + b."""
    if not rank:
        return nn.Linear(width, width)
    return nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))
