"""What the low-rank engine knows of a base learner: its linear layers, what lies between them, and the head.

A learner says so itself by a method `linear_form() -> LinearForm`. `describe` does not believe it: it compares the form
with the module on random inputs, so a subclass with another forward is refused, not mistaken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from metatrain.meta.low_rank_elementwise import ACTIVATIONS


class CannotServe(ValueError):  # noqa: N818 - not a failure: the reason for taking the vmap engine
    """The low-rank form does not exist for this learner or these settings; the message is the reason."""


@dataclass(frozen=True)
class LinearNames:
    """Names of one linear layer's parameters in the learner."""

    weight: str
    bias: str | None


@dataclass(frozen=True)
class NormNames:
    """Names of one layer normalisation's parameters, gain and bias, and what it adds to the variance."""

    weight: str
    bias: str
    epsilon: float


@dataclass(frozen=True)
class LinearForm:
    """score(x) = head([z_L, x] if skip else z_L) + offset, z_l = activation(norm_l(hidden_l(z_(l-1)))) and z_0 = x.

    `norms` has one of each hidden layer, or is empty.
    """

    hidden: tuple[LinearNames, ...]
    head: LinearNames
    activation: str = "relu"
    skip: bool = False
    offset: str | None = None
    norms: tuple[NormNames, ...] = ()

    def scores(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Scores [..., E] of inputs [..., E, F] by shared parameters: the form, written out."""
        z = self.prefix(parameters, x, len(self.hidden))
        if self.skip:
            z = torch.cat([z, x], dim=-1)
        bias = None if self.head.bias is None else parameters[self.head.bias]
        score = functional.linear(z, parameters[self.head.weight], bias).squeeze(-1)
        return score if self.offset is None else score + parameters[self.offset]

    def prefix(self, parameters: Mapping[str, Tensor], x: Tensor, layers: int) -> Tensor:
        """What the first `layers` hidden layers make of x."""
        activation = ACTIVATIONS[self.activation].function
        for number, names in enumerate(self.hidden[:layers]):
            bias = None if names.bias is None else parameters[names.bias]
            x = functional.linear(x, parameters[names.weight], bias)
            if self.norms:
                norm = self.norms[number]
                gain, shift = parameters[norm.weight], parameters[norm.bias]
                x = functional.layer_norm(x, gain.shape, gain, shift, norm.epsilon)
            x = activation(x)
        return x

    def layer_parameters(self, number: int) -> set[str]:
        """Names of all that a hidden layer has."""
        names = {self.hidden[number].weight, self.hidden[number].bias}
        if self.norms:
            names |= {self.norms[number].weight, self.norms[number].bias}
        return {name for name in names if name is not None}

    def above(self, layers: int) -> LinearForm:
        """The form without its first `layers` hidden layers."""
        return replace(self, hidden=self.hidden[layers:], norms=self.norms[layers:])

    @property
    def names(self) -> set[str]:
        """Names of all parameters and buffers."""
        found = {name for name in (self.head.weight, self.head.bias, self.offset) if name is not None}
        return found.union(*(self.layer_parameters(number) for number in range(len(self.hidden))))


def describe(learner: nn.Module) -> LinearForm:
    """The learner's linear form.

    Raises:
        CannotServe: It has none, or what it says of itself is not what it computes.
    """
    says = getattr(learner, "linear_form", None)
    if not callable(says):
        raise CannotServe(f"{type(learner).__name__} does not say which linear layers it is made of")
    form = says()
    assert isinstance(form, LinearForm)
    if form.hidden and form.activation not in ACTIVATIONS:
        raise CannotServe(f"the derivatives of its activation {form.activation!r} are not known")
    parameters = {**dict(learner.named_parameters()), **dict(learner.named_buffers())}
    if form.norms and len(form.norms) != len(form.hidden):
        raise CannotServe("only some of its hidden layers are normalised")
    unknown = [name for name, _ in learner.named_parameters() if name not in form.names]
    if unknown:
        raise CannotServe(f"parameters outside its linear layers: {', '.join(unknown)}")
    if form.skip and not form.hidden:
        raise CannotServe("without hidden layers, its head would see the inputs twice")
    if len(parameters[form.head.weight]) != 1:
        raise CannotServe("its head has more than one output")
    first = parameters[(form.hidden[0] if form.hidden else form.head).weight]
    if first.is_meta:
        return form
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, first.shape[1], generator=generator).to(first)
    with torch.no_grad():
        expected, got = learner(x), form.scores(parameters, x)
    if expected.shape != got.shape or not torch.allclose(expected, got, rtol=1e-4, atol=1e-4, equal_nan=True):
        raise CannotServe("its forward is not that of its linear layers")
    return form
