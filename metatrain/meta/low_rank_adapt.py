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


class _Fixed:
    """Columns of a weight over inputs x that never change: x Wₖᵀ = x W₀ᵀ - (x xᵀ) A, with A the sum of α δ."""

    def __init__(self, weight: Tensor, x: Tensor) -> None:
        self._weight, self._x, self._base = weight, x, functional.linear(x, weight)
        self._gram: Tensor | None = None  # x xᵀ, where a second step reads it
        self._a: Tensor | None = None
        self._deltas: list[Tensor] = []

    def forward(self, _: Tensor) -> Tensor:
        if self._a is None:
            return self._base
        self._gram = self._x @ self._x.mT if self._gram is None else self._gram
        return self._base - self._gram @ self._a

    def step(self, _: Tensor, delta: Tensor, rate: Tensor) -> None:
        self._deltas.append(delta)
        self._a = rate * delta if self._a is None else self._a + rate * delta

    def now(self) -> Tensor:
        return self._weight if self._a is None else self._weight - self._a.mT @ self._x

    def by_rates(self, weight: Tensor, rates: list[Tensor]) -> Tensor:
        """`now`, from that start and by those rates, differentiable to both alone."""
        a = torch.stack([rate * delta for rate, delta in zip(rates, self._deltas, strict=True)]).sum(0)
        return weight - a.mT @ self._x


class _Moving:
    """Columns over inputs that change from step to step: a weight a task from step 1 on."""

    def __init__(self, weight: Tensor) -> None:
        self._w = weight  # [O, I], then [T, O, I]
        self._taken: list[tuple[Tensor, Tensor]] = []

    def forward(self, z: Tensor) -> Tensor:
        return functional.linear(z, self._w) if self._w.dim() == 2 else z @ self._w.mT

    def backward(self, delta: Tensor) -> Tensor:
        return delta @ self._w

    def step(self, z: Tensor, delta: Tensor, rate: Tensor) -> None:
        self._taken.append((z, delta))
        self._w = self._w - (rate * delta).mT @ z

    def now(self) -> Tensor:
        return self._w

    def by_rates(self, weight: Tensor, rates: list[Tensor]) -> Tensor:
        """As of `_Fixed`."""
        scaled = [rate * delta for rate, (_, delta) in zip(rates, self._taken, strict=True)]
        return weight - torch.cat(scaled, 1).mT @ torch.cat([z for z, _ in self._taken], 1)


class _Layer:
    """A linear layer over several inputs side by side, some of which never change.

    Args:
        widths: Of the inputs, in the order of the weight's columns.
        fixed: What never changes, None where the input moves.
    """

    def __init__(
        self,
        names: LinearNames,
        parameters: Tensors,
        adapted: frozenset[str],
        widths: list[int],
        fixed: list[Tensor | None],
    ) -> None:
        self._names, self._widths = names, widths
        columns = parameters[names.weight].split(widths, 1)
        self.parts = [_Moving(w) if x is None else _Fixed(w, x) for w, x in zip(columns, fixed, strict=True)]
        self._bias = None if names.bias is None else parameters[names.bias]  # [O], then [T, 1, O]
        self._adapts = (names.weight in adapted, names.bias in adapted)
        self._sums: list[Tensor] = []

    def forward(self, inputs: list[Tensor]) -> Tensor:
        first, *others = (part.forward(z) for part, z in zip(self.parts, inputs, strict=True))
        out = sum(others, first)
        return out if self._bias is None else out + self._bias

    def backward(self, part: int, delta: Tensor) -> Tensor:
        """The gradient at an input that moves."""
        moving = self.parts[part]
        assert isinstance(moving, _Moving)
        return moving.backward(delta)

    def update(self, inputs: list[Tensor], delta: Tensor, rates: dict[str, Tensor]) -> None:
        if self._adapts[0]:
            for part, z in zip(self.parts, inputs, strict=True):
                part.step(z, delta, rates[self._names.weight])
        if self._adapts[1] and self._bias is not None and self._names.bias is not None:
            self._sums.append(delta.sum(1, keepdim=True))
            self._bias = self._bias - rates[self._names.bias] * self._sums[-1]

    def fast_weights(self, parameters: Tensors, rates: list[dict[str, Tensor]] | None) -> Tensors:
        """What adapts; with `rates`, written anew from these parameters by these rates."""
        found: Tensors = {}
        name = self._names.weight
        if self._adapts[0]:
            columns = [part.now() for part in self.parts]
            if rates is not None:
                starts, own = parameters[name].split(self._widths, 1), [step[name] for step in rates]
                columns = [part.by_rates(start, own) for part, start in zip(self.parts, starts, strict=True)]
            found[name] = torch.cat(columns, -1)
        name = self._names.bias
        if self._adapts[1] and self._bias is not None and name is not None:
            found[name] = self._bias.squeeze(1)
            if rates is not None:
                found[name] = parameters[name] - _weighted(self._sums, [step[name] for step in rates]).squeeze(1)
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

    def update(self, h: Tensor, g: Tensor, rates: dict[str, Tensor]) -> None:
        for name, terms in zip(self._names, (g * self._normalised(h), g), strict=True):
            if name in self._gradients:
                self._gradients[name].append(terms.sum(1, keepdim=True))
                self._now[name] = self._now[name] - rates[name] * self._gradients[name][-1]

    def fast_weights(self, parameters: Tensors, rates: list[dict[str, Tensor]] | None) -> Tensors:
        """As of `_Layer`."""
        if rates is None:
            return {name: self._now[name].squeeze(1) for name in self._gradients}
        return {
            name: parameters[name] - _weighted(gradients, [step[name] for step in rates]).squeeze(1)
            for name, gradients in self._gradients.items()
        }


def adapt(
    form: LinearForm,
    parameters: Tensors,
    adapted: tuple[str, ...],
    rates: list[dict[str, Tensor]],
    support: Examples,
    rows: Tensors,
    loss: EventLoss,
    order: int,
    lowest: int,
) -> FastWeights:
    """What adapts, [T, *shape], after `rates`' steps (at least one) on each task's mean support loss.

    Args:
        lowest: The lowest hidden layer whose output adapts.
    """
    constant = order == 1
    start, rates_taken, of_rows, x = parameters, rates, {name: rows[name] for name in sorted(rows)}, support.x
    if constant:
        start, of_rows, x = _detached(parameters), _detached(of_rows), x.detach()
        rates_taken = [_detached(step) for step in rates]
    pools = {name: pooling(support.slots[name], rows[name]) for name in of_rows}
    gradients: dict[str, list[Tensor]] = {name: [] for name in of_rows}
    row_widths = [row.shape[2] for row in of_rows.values()]
    with torch.enable_grad() if not constant and torch.is_grad_enabled() else torch.no_grad():
        below, form = form.prefix(start, x, lowest), form.above(lowest)
        hidden, norms, head = _layers(form, start, frozenset(adapted), below, x, sum(row_widths))
        function = ACTIVATIONS[form.activation].function
        weights = support.mask / support.mask.sum(-1, keepdim=True).clamp(min=1.0)
        for step in rates_taken:
            own = [torch.cat([pools[name] @ row for name, row in of_rows.items()], -1)] if rows else []
            inputs, hs, ys = [[below, *own]], [], []
            for i, layer in enumerate(hidden):
                hs.append(layer.forward(inputs[i]))
                ys.append(norms[i].forward(hs[i]) if norms else hs[i])
                inputs.append([function(ys[i])])
            if form.skip:
                inputs[-1] += [x, *own]
            s = head.forward(inputs[-1]).squeeze(-1)
            if form.offset is not None:
                s = s + start[form.offset]
            delta = _pull(lambda at: loss(at, support.labels) * weights, s, torch.ones_like(s)).unsqueeze(-1)
            rho = head.backward(-1, delta) if rows and (form.skip or not hidden) else None
            deltas, g = [delta], head.backward(0, delta) if hidden else delta
            for i in range(len(hidden) - 1, -1, -1):
                delta = _pull(function, ys[i], g)
                if norms:
                    g, delta = delta, norms[i].backward(hs[i], delta)
                    norms[i].update(hs[i], g, step)
                deltas.append(delta)
                g = hidden[i].backward(0, delta) if i else delta
            if rows and hidden:
                through = hidden[0].backward(-1, deltas[-1])
                rho = through if rho is None else rho + through
            for layer, z, d in zip([*hidden, head], inputs, reversed(deltas), strict=True):
                layer.update(z, d, step)
            if rho is not None:
                for name, part in zip(pools, rho.split(row_widths, -1), strict=True):
                    gradients[name].append(pools[name].mT @ part)
                    of_rows[name] = of_rows[name] - step[rows_key(name)] * gradients[name][-1]
    # In first order the starts and the rates are all that is differentiable: what adapts is written anew by them.
    again = rates if constant and torch.is_grad_enabled() else None
    found: Tensors = {}
    for layer in (*hidden, *norms, head):
        found |= layer.fast_weights(parameters, again)
    if again is not None:
        for name in of_rows:
            of_rows[name] = rows[name] - _weighted(gradients[name], [step[rows_key(name)] for step in again])
    return FastWeights({name: found[name] for name in adapted}, of_rows)


def _layers(
    form: LinearForm, parameters: Tensors, adapted: frozenset[str], below: Tensor, x: Tensor, rows: int
) -> tuple[list[_Layer], list[_Norm], _Layer]:
    """The layers over what never changes, `below` and, for a head that sees it, x, and over rows of that width."""
    own: tuple[list[int], list[Tensor | None]] = ([rows], [None]) if rows else ([], [])
    widths: list[int] = [below.shape[-1], *own[0]]
    fixed: list[Tensor | None] = [below, *own[1]]
    hidden = []
    for names in form.hidden:
        hidden.append(_Layer(names, parameters, adapted, widths, fixed))
        widths, fixed = [parameters[names.weight].shape[0]], [None]
    if form.skip:
        widths, fixed = [*widths, x.shape[-1], *own[0]], [*fixed, x, *own[1]]
    norms = [_Norm(names, parameters, adapted) for names in form.norms]
    return hidden, norms, _Layer(form.head, parameters, adapted, widths, fixed)


def _weighted(terms: list[Tensor], rates: list[Tensor]) -> Tensor:
    return torch.stack([rate * term for rate, term in zip(rates, terms, strict=True)]).sum(0)


def _detached(tensors: Tensors) -> Tensors:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _pull(function: Callable[[Tensor], Tensor], at: Tensor, by: Tensor) -> Tensor:
    """The elementwise function's derivative at `at`, times `by`; differentiable where they are."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        point = at if at.requires_grad and differentiable else at.detach().requires_grad_()
        (found,) = torch.autograd.grad(function(point), point, by, create_graph=differentiable)
    return found
