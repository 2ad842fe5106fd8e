"""One chunk of tasks through the low-rank inner loop and back, written out by hand.

Promises: the exact meta-gradient (first or second order) of the scores after adaptation, from the adjoint of those
scores; nothing of the size of a weight a task for the first layer; buffers of the workspace alone, so that a chunk's
working set stays in cache. `low_rank` has the mathematics, `low_rank_layers` the products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metatrain.meta.low_rank_elementwise import ACTIVATIONS, Activated, LossDerivatives
from metatrain.meta.low_rank_form import LinearForm
from metatrain.meta.low_rank_head import Head
from metatrain.meta.low_rank_layers import FirstLayer, Gradients, Gram, HiddenLayer, Workspace


@dataclass(frozen=True)
class Inputs:
    """What a chunk reads. `first` feeds the lowest layer that adapts, `skip` the head; they may be one tensor.

    Support [T, S, width] and query [T, Q, width]; labels and weights [T, S], weights being mask / number of events.
    """

    first_s: Tensor
    first_q: Tensor
    skip_s: Tensor | None
    skip_q: Tensor | None
    labels: Tensor
    weights: Tensor


class Chunk:
    """The inner loop of T tasks: `forward`, then, once, `reverse`.

    Args:
        ws: Buffers; overwritten by the next chunk that is given the same.
        form: The base learner, without the hidden layers below the lowest that adapts (see `Inputs.first`).
        parameters: Its shared parameters, detached.
        adapted: Names of those that adapt.
        rates: One entry a step: parameter name → rate.
        loss: Derivatives of the support's event loss.
        order: 2, or 1 for first-order.
        inputs_differ: Whether the inputs' own gradients are wanted.
    """

    def __init__(
        self,
        ws: Workspace,
        form: LinearForm,
        parameters: Mapping[str, Tensor],
        adapted: frozenset[str],
        rates: list[dict[str, float]],
        loss: LossDerivatives,
        order: int,
        inputs: Inputs,
        inputs_differ: bool,
    ) -> None:
        self._ws, self._rates, self._loss, self._order, self._in = ws, rates, loss, order, inputs
        self._evaluate = ACTIVATIONS[form.activation].evaluate
        tasks, events, queries = len(inputs.labels), inputs.labels.shape[1], inputs.first_q.shape[1]
        value = parameters.__getitem__
        head = form.head
        head_adapts = (bool(rates) and head.weight in adapted, bool(rates) and head.bias in adapted)
        grams: dict[int, Gram] = {}

        def gram(name: str, x_s: Tensor, x_q: Tensor) -> Gram:
            # The first layer and the head's skip read the same inputs where the first layer adapts.
            if id(x_s) not in grams:
                grams[id(x_s)] = Gram(ws, name, x_s, x_q, inputs_differ)
            return grams[id(x_s)]

        self._first: FirstLayer | None = None
        self._hidden: list[HiddenLayer] = []
        if form.hidden:
            names = form.hidden[0]
            adapts = bool(rates) and names.weight in adapted
            self._first = FirstLayer(
                ws,
                (names.weight, names.bias),
                value(names.weight),
                None if names.bias is None else value(names.bias),
                inputs.first_s,
                inputs.first_q,
                gram("gram", inputs.first_s, inputs.first_q) if adapts else None,
                bool(rates) and names.bias in adapted,
            )
            for number, names in enumerate(form.hidden[1:]):
                weight = value(names.weight)
                self._hidden.append(
                    HiddenLayer(
                        ws,
                        number,
                        (names.weight, names.bias),
                        weight,
                        None if names.bias is None else value(names.bias),
                        (bool(rates) and names.weight in adapted, bool(rates) and names.bias in adapted),
                        len(rates),
                        fold_last=queries * sum(weight.shape) >= weight.numel(),
                    )
                )
        width = value(form.hidden[-1].weight).shape[0] if form.hidden else 0
        seen = (inputs.skip_s, inputs.skip_q) if form.hidden else (inputs.first_s, inputs.first_q)
        x_s, x_q = seen if form.skip or not form.hidden else (None, None)
        self._head = Head(
            ws,
            (head.weight, head.bias),
            value(head.weight),
            None if head.bias is None else value(head.bias),
            None if form.offset is None else value(form.offset),
            width,
            (tasks, events, queries),
            x_s,
            x_q,
            gram("skip", x_s, x_q) if x_s is not None and x_q is not None and head_adapts[0] else None,
            head_adapts,
        )
        self._grams = grams
        self._gram_inputs = {
            "first": grams.get(id(inputs.first_s)),
            "skip": None if inputs.skip_s is None or inputs.skip_s is inputs.first_s else grams.get(id(inputs.skip_s)),
        }
        self._width = width
        self._steps: list[tuple[list[Activated], list[Tensor], list[Tensor], Tensor | float]] = []

    def forward(self) -> tuple[Tensor, Tensor]:
        """Scores [T, Q] with the shared parameters, and after adaptation."""
        for k, rates in enumerate(self._rates):
            self._step(k, rates)
        last = self._rates[-1] if self._rates else None
        z = None
        self._acts_q: list[Activated] = []
        if self._first is not None:
            z = self._activate("q0", self._first.query(), self._acts_q)
            for i, layer in enumerate(self._hidden):
                z = self._activate(f"q{i + 1}", layer.query(z, last), self._acts_q)
        after = self._head.query(z)
        z = None
        if self._first is not None:
            z = self._activate("unused", self._first.base_q, [])
            for layer in self._hidden:
                z = self._activate("unused", layer.before(z), [])
        return self._head.before(z), after

    def _activate(self, name: str, h: Tensor, into: list[Activated]) -> Tensor:
        done = self._evaluate(h, self._ws(f"slope.{name}", *h.shape))
        into.append(done)
        return done.value

    def _step(self, k: int, rates: dict[str, float]) -> None:
        acts: list[Activated] = []
        gs: list[Tensor] = []
        z = None
        if self._first is not None:
            z = self._activate(f"{k}.0", self._first.forward(k), acts)
            for i, layer in enumerate(self._hidden):
                z = self._activate(f"{k}.{i + 1}", layer.forward(k, z), acts)
        s = self._head.forward(k, z)
        e = self._loss.slope(s, self._in.labels).mul_(self._in.weights)
        curvature = self._loss.curvature(s, self._in.labels)
        deltas: list[Tensor] = []
        if self._first is not None:
            g = self._head.backward(k, e, self._width)
            for i in range(len(acts) - 1, -1, -1):
                gs.append(g)
                delta = self._masked(f"delta{k}.{i}", g, acts[i])
                deltas.append(delta)
                if i:
                    g = self._hidden[i - 1].backward(k, delta)
            gs.reverse()
            deltas.reverse()
            self._first.update(k, deltas[0], rates)
            for layer, delta in zip(self._hidden, deltas[1:], strict=True):
                layer.update(k, delta, rates)
        self._head.update(k, e, rates)
        self._steps.append((acts, gs, deltas, curvature))

    def _masked(self, name: str, g: Tensor, act: Activated) -> Tensor:
        """g ⊙ slope; in place where g itself isn't needed again."""
        if act.curvature is None:
            return g.mul_(act.slope)
        return torch.mul(g, act.slope, out=self._ws(name, *g.shape))

    def reverse(self, d_s: Tensor, found: Gradients, d_x: tuple[Tensor | None, ...]) -> None:
        """From the adjoint of the adapted scores [T, Q].

        Args:
            found: Is added to: derivatives in the shared parameters and the rates.
            d_x: Adjoints of first_s, first_q, skip_s, skip_q to fill in (None where not wanted or the same tensor).
        """
        last = self._rates[-1] if self._rates else None
        d_z = self._head.reverse_query(d_s)
        if self._first is not None:
            assert d_z is not None
            for i in range(len(self._hidden) - 1, -1, -1):
                d_z = self._hidden[i].reverse_query(d_z.mul_(self._acts_q[i + 1].slope), last, found)
            self._first.reverse_query(d_z.mul_(self._acts_q[0].slope))
        for k in range(len(self._rates) - 1, -1, -1):
            if self._order == 2:
                self._reverse_step(k, self._rates[k], found)
                continue
            self._head.reverse_rates(k, self._rates[k], found)
            if self._first is not None:
                self._first.reverse_rates(k, found)
                for layer in self._hidden:
                    layer.reverse_rates(k, found)
        self._finish(found, d_x)

    def _reverse_step(self, k: int, rates: dict[str, float], found: Gradients) -> None:
        acts, gs, _, curvature = self._steps[k]
        d_h: list[Tensor | None] = []  # what the inner backward gives each layer's h, through the activation's slope
        d_g = None
        if self._first is not None:
            d_delta = self._first.reverse_update(k, rates, found)
            for i, act in enumerate(acts):
                if act.curvature is None:
                    d_h.append(None)
                else:
                    d_h.append((d_delta * gs[i]).mul_(act.curvature))
                d_g = d_delta.mul_(act.slope)
                if i < len(self._hidden):
                    d_delta = self._hidden[i].reverse_backward(k, d_g, rates, found)
        d_e = self._head.reverse_backward(k, d_g, rates, found)
        d_s = d_e.mul_(self._in.weights).mul_(curvature)
        d_z = self._head.reverse_forward(k, d_s, rates)
        if self._first is not None:
            assert d_z is not None
            for i in range(len(acts) - 1, -1, -1):
                d_z.mul_(acts[i].slope)
                through_slope = d_h[i]
                if through_slope is not None:
                    d_z.add_(through_slope)
                if i:
                    d_z = self._hidden[i - 1].reverse_forward(k, d_z, rates, found)
            self._first.reverse_forward(k, d_z)

    def _finish(self, found: Gradients, d_x: tuple[Tensor | None, ...]) -> None:
        support = self._order == 2 and bool(self._rates)
        first_s, first_q, skip_s, skip_q = d_x
        if self._first is None:
            skip_s, skip_q = first_s, first_q
        elif self._in.skip_s is self._in.first_s:
            skip_s, skip_q = first_s, first_q
        for into in d_x:
            if into is not None:
                into.zero_()
        if self._first is not None:
            self._first.finish(found, first_s, first_q)
            for layer in self._hidden:
                layer.finish(found)
        self._head.finish(found, skip_s, skip_q)
        for which, s, q in (("first", first_s, first_q), ("skip", skip_s, skip_q)):
            gram = self._gram_inputs[which]
            if gram is not None and q is not None:
                gram.into_inputs(s if support else None, q)
