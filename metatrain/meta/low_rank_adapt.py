"""Fast weights by the low-rank form, in plain autograd: differentiable to everything, and as short as the mathematics.

It serves where weights a task are wanted in the end (prediction, recommendation), and is the reference beside which
the hand-written reverse of `low_rank_chunk` is tested. Symbols: T tasks, S support events, k inner step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from metatrain.meta.engine import FastWeights, Tensors, rows_key
from metatrain.meta.episode import Examples
from metatrain.meta.losses import EventLoss
from metatrain.meta.low_rank_elementwise import ACTIVATIONS
from metatrain.meta.low_rank_form import LinearForm, LinearNames, NormNames
from metatrain.meta.low_rank_rows import pooling


class _Layer:
    """A linear layer with factors: W₀ - Σ α δᵀ z, and b₀ - Σ β Σ δ."""

    def __init__(self, names: LinearNames, parameters: Tensors, adapted: frozenset[str]) -> None:
        self.names = names
        self._weight = parameters[names.weight]
        self._bias = None if names.bias is None else parameters[names.bias]
        self._adapts = (names.weight in adapted, names.bias in adapted)
        self._inputs: list[Tensor] = []
        self._deltas: list[Tensor] = []
        self._scaled: list[Tensor] = []  # α δ
        self._moved: Tensor | None = None  # Σ β Σ δ [T, 1, O]
        self._steps: list[dict[str, Tensor]] = []

    def forward(self, z: Tensor) -> Tensor:
        out = functional.linear(z, self._weight, self._bias)
        if self._scaled:
            out = out - (z @ torch.cat(self._inputs, 1).mT) @ torch.cat(self._scaled, 1)
        return out if self._moved is None else out - self._moved

    def backward(self, delta: Tensor, columns: slice = slice(None)) -> Tensor:
        """The gradient at those columns of the inputs."""
        out = delta @ self._weight[:, columns]
        if self._scaled:
            out = out - (delta @ torch.cat(self._scaled, 1).mT) @ torch.cat(self._inputs, 1)[..., columns]
        return out

    def update(self, z: Tensor, delta: Tensor, rates: dict[str, Tensor], constant: bool) -> None:
        self._steps.append(rates)
        self._inputs.append(z)
        self._deltas.append(delta)
        if self._adapts[0]:
            rate = rates[self.names.weight]
            self._scaled.append(delta * (rate.detach() if constant else rate))
        if self._adapts[1] and self.names.bias is not None:
            rate = rates[self.names.bias]
            step = delta.sum(1, keepdim=True) * (rate.detach() if constant else rate)
            self._moved = step if self._moved is None else self._moved + step

    def fast_weights(self, parameters: Tensors) -> Tensors:
        """The adapted parameters, by the rates themselves: in first order they are all that is differentiable."""
        found = {}
        if self._adapts[0]:
            scaled = [d * r[self.names.weight] for d, r in zip(self._deltas, self._steps, strict=True)]
            found[self.names.weight] = parameters[self.names.weight] - torch.cat(scaled, 1).mT @ torch.cat(
                self._inputs, 1
            )
        name = self.names.bias
        if self._adapts[1] and name is not None:
            sums = [d.sum(1) * r[name] for d, r in zip(self._deltas, self._steps, strict=True)]
            found[name] = parameters[name] - torch.stack(sums).sum(0)
        return found


class _Norm:
    """A layer normalisation whose gain and bias, where they adapt, are [T, 1, O] from the first step on."""

    def __init__(self, names: NormNames, parameters: Tensors, adapted: frozenset[str]) -> None:
        self._epsilon = names.epsilon
        self._names = (names.weight, names.bias)
        self._now = {name: parameters[name] for name in self._names}
        self._gradients: dict[str, list[Tensor]] = {name: [] for name in self._names if name in adapted}

    def _normalised(self, h: Tensor) -> Tensor:
        return functional.layer_norm(h, h.shape[-1:], eps=self._epsilon)

    def forward(self, h: Tensor) -> Tensor:
        gain, bias = (self._now[name] for name in self._names)
        return self._normalised(h) * gain + bias

    def backward(self, h: Tensor, g: Tensor) -> Tensor:
        """The gradient at h, from that at the output."""
        return _pull(self._normalised, h, g * self._now[self._names[0]])

    def update(self, h: Tensor, g: Tensor, rates: dict[str, Tensor], constant: bool) -> None:
        for name, terms in zip(self._names, (g * self._normalised(h), g), strict=True):
            if name in self._gradients:
                self._gradients[name].append(terms.sum(1, keepdim=True))
                rate = rates[name].detach() if constant else rates[name]
                self._now[name] = self._now[name] - self._gradients[name][-1] * rate

    def fast_weights(self, parameters: Tensors, rates: list[dict[str, Tensor]]) -> Tensors:
        """As `_Layer.fast_weights`."""
        found = {}
        for name, gradients in self._gradients.items():
            by = [gradient * step[name] for gradient, step in zip(gradients, rates, strict=True)]
            found[name] = parameters[name] - torch.stack(by).sum(0).squeeze(1)
        return found


def adapt(
    form: LinearForm,
    parameters: Tensors,
    adapted: tuple[str, ...],
    rates: list[dict[str, Tensor]],
    support: Examples,
    rows: Tensors,
    loss: EventLoss,
    order: int,
) -> FastWeights:
    """What adapts, [T, *shape], after `rates`' steps (at least one) on each task's mean support loss."""
    constant = order == 1
    inner = {name: p.detach() for name, p in parameters.items()} if constant else parameters
    fixed = support.x.detach() if constant else support.x
    pools = {name: pooling(support.slots[name], rows[name]) for name in sorted(rows)}
    steps_of_rows: dict[str, list[Tensor]] = {name: [] for name in pools}
    now = {name: rows[name].detach() if constant else rows[name] for name in pools}
    own = slice(fixed.shape[2], None)  # the rows' columns among the inputs
    which = frozenset(adapted)
    hidden = [_Layer(names, inner, which) for names in form.hidden]
    norms = [_Norm(names, inner, which) for names in form.norms]
    head = _Layer(form.head, inner, which)
    function = ACTIVATIONS[form.activation].function
    weights = support.mask / support.mask.sum(-1, keepdim=True).clamp(min=1.0)
    with torch.enable_grad() if not constant and torch.is_grad_enabled() else torch.no_grad():
        for step in rates:
            x = torch.cat([fixed, *(pools[name] @ now[name] for name in pools)], -1)
            hs, ys, zs = [], [], [x]
            for i, layer in enumerate(hidden):
                hs.append(layer.forward(zs[-1]))
                ys.append(norms[i].forward(hs[-1]) if norms else hs[-1])
                zs.append(function(ys[-1]))
            seen = torch.cat([zs[-1], x], -1) if form.skip else zs[-1]
            s = head.forward(seen).squeeze(-1)
            if form.offset is not None:
                s = s + inner[form.offset]
            delta = _pull(lambda at: loss(at, support.labels) * weights, s, torch.ones_like(s)).unsqueeze(-1)
            deltas = [delta]
            below = head.backward(delta, slice(zs[-1].shape[-1]))
            for i in range(len(hidden) - 1, -1, -1):
                deltas.append(_pull(function, ys[i], below))
                if norms:
                    g = deltas.pop()
                    deltas.append(norms[i].backward(hs[i], g))
                    norms[i].update(hs[i], g, step, constant)
                below = hidden[i].backward(deltas[-1]) if i else below
            deltas.reverse()
            if rows:
                rho = hidden[0].backward(deltas[0], own) if hidden else below[..., own]
                if form.skip:
                    rho = rho + head.backward(delta, slice(zs[-1].shape[-1] + own.start, None))
                widths = [rows[name].shape[2] for name in pools]
                for (name, p), gradient in zip(pools.items(), rho.split(widths, -1), strict=True):
                    steps_of_rows[name].append(p.mT @ gradient)
                    rate = step[rows_key(name)]
                    now[name] = now[name] - steps_of_rows[name][-1] * (rate.detach() if constant else rate)
            for layer, z, d in zip([*hidden, head], [*zs[: len(hidden)], seen], deltas, strict=True):
                layer.update(z, d, step, constant)
    found: Tensors = {}
    for layer in (*hidden, head):
        found |= layer.fast_weights(parameters)
    for norm in norms:
        found |= norm.fast_weights(parameters, rates)
    moved: Tensors = {}
    for name, gradients in steps_of_rows.items():
        by = [gradient * step[rows_key(name)] for gradient, step in zip(gradients, rates, strict=True)]
        moved[name] = rows[name] - torch.stack(by).sum(0)
    return FastWeights({name: found[name] for name in adapted}, moved)


def _pull(function: Callable[[Tensor], Tensor], at: Tensor, by: Tensor) -> Tensor:
    """The elementwise function's derivative at `at`, times `by`; differentiable where they are."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        point = at if at.requires_grad and differentiable else at.detach().requires_grad_()
        (found,) = torch.autograd.grad(function(point), point, by, create_graph=differentiable)
    return found
