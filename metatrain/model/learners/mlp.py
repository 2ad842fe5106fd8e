"""An MLP base learner whose head also sees its inputs: a linear model beside the MLP.

A head that adapts over the inputs folds a new task in as a factorisation would; the hidden layers add what is not
linear. At the start every score is near `offset`: the labels' mean, or its logit where scores are logits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, relu, silu

from metatrain.meta.low_rank_form import LinearForm, LinearNames, NormNames

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": relu, "gelu": gelu, "tanh": torch.tanh, "silu": silu}


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """The elementwise function of that name: relu, gelu, tanh or silu.

    Raises:
        ValueError: An unknown name.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


class LayerNorm(nn.LayerNorm):
    """Layer normalisation that may adapt: gain and bias come after the fused operation, not into it.

    With a gain a task, torch.func's gradient of the gradient through the fused gain is wrong (torch 2.13, and
    pytorch/functorch issue 534): the inner backward's batching rule loses a part of it.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Same as torch's."""
        return layer_norm(input, self.normalized_shape, eps=self.eps) * self.weight + self.bias


class MLP(nn.Module):
    """Scores events from their inputs.

    Parameters are `layers.N.weight`, `layers.N.bias`, `head.weight` and `head.bias`, with norms `norms.N.weight` (the
    gain) and `norms.N.bias`; the buffer `offset` is added to every score.

    Args:
        inputs: Width of an event's input.
        hidden: Widths of the hidden layers; empty: the head alone, a linear model.
        activation: relu, gelu, tanh or silu.
        skip: Whether the head sees the inputs beside the last hidden layer.
        offset: Score of an event about which nothing is known.
        norm: none, or layer: a layer normalisation between each hidden layer and its activation.

    Raises:
        ValueError: An unknown activation or norm.
    """

    offset: Tensor
    #: Patterns of the parameters that make scores of what the rest represents.
    head_parameters = ("head.*",)

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
        skip: bool = True,
        offset: float = 0.0,
        norm: str = "none",
    ) -> None:
        super().__init__()
        if norm not in ("none", "layer"):
            raise ValueError(f"unknown norm {norm!r}: none, layer")
        widths = [inputs, *hidden]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))
        self.norms = nn.ModuleList(LayerNorm(width) for width in hidden if norm == "layer")
        self._skip = skip and bool(hidden)
        #: Width of what the head reads.
        self.represented = seen = widths[-1] + (inputs if self._skip else 0)
        self.head = nn.Linear(seen, 1)
        # Small, not zero: with a zero head the first inner step would leave all that is below it where it is.
        nn.init.normal_(self.head.weight, std=0.1 / math.sqrt(seen))
        nn.init.zeros_(self.head.bias)
        self._activation, self._activation_name = activation_of(activation), activation
        self.register_buffer("offset", torch.tensor(float(offset)))

    def linear_form(self) -> LinearForm:
        """The layers by name, for the low-rank engine."""
        hidden = tuple(LinearNames(f"layers.{n}.weight", f"layers.{n}.bias") for n in range(len(self.layers)))
        head = LinearNames("head.weight", "head.bias")
        norms = tuple(
            NormNames(f"norms.{n}.weight", f"norms.{n}.bias", norm.eps)
            for n, norm in enumerate(self.norms)
            if isinstance(norm, LayerNorm)
        )
        return LinearForm(hidden, head, self._activation_name, self._skip, "offset", norms)

    def represent(self, x: Tensor) -> Tensor:
        """What the head reads of inputs [..., E, F]: [..., E, H]."""
        h = x
        for number, layer in enumerate(self.layers):
            h = layer(h)
            if self.norms:
                h = self.norms[number](h)
            h = self._activation(h)
        return torch.cat([h, x.to(h.dtype)], dim=-1) if self._skip else h

    def score(self, represented: Tensor, x: Tensor) -> Tensor:
        """Scores [..., E] of what `represent` gave."""
        # The offset is added in its own type: bfloat16 would round a mean rating of 3.53 to 3.53125.
        return self.head(represented).squeeze(-1).to(self.offset.dtype) + self.offset

    def forward(self, x: Tensor) -> Tensor:
        """Scores [..., E] of inputs [..., E, F]."""
        return self.score(self.represent(x), x)
