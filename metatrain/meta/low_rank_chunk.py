"""One chunk of tasks through the low-rank inner loop and back, written out by hand and recorded as two programs.

Promises: the exact meta-gradient (first or second order) of the scores after adaptation, from the adjoint of those
scores; nothing of the size of a weight a task for the first layer; buffers of the workspace alone, so that a chunk's
working set stays in cache. `low_rank` has the mathematics, `low_rank_layers` the products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metatrain.meta.low_rank_elementwise import ACTIVATIONS, LossDerivatives
from metatrain.meta.low_rank_form import LinearForm, LinearNames
from metatrain.meta.low_rank_head import Head
from metatrain.meta.low_rank_hidden import HiddenLayer
from metatrain.meta.low_rank_layers import FirstLayer, Gradients, Gram, Linear
from metatrain.meta.low_rank_program import Program, Workspace


@dataclass(frozen=True)
class Sizes:
    """Shapes and settings that a recorded chunk is for."""

    tasks: int
    support: int
    query: int
    first: int  # width of what the lowest layer that adapts reads
    skip: int  # width of what the head reads beside, where that is another tensor; 0: the same, or nothing
    adapted: frozenset[str]
    order: int
    steps: int
    inputs_differ: bool  # whether the inputs' gradients are wanted
    rates_differ: bool
    reverses: bool  # whether any gradient is wanted


@dataclass(frozen=True)
class Buffers:
    """What a chunk reads and writes, at fixed places; T, S, Q and widths as `Sizes` has them."""

    inputs: list[Tensor]  # first_s, first_q and, where they are others, skip_s, skip_q
    d_inputs: list[Tensor]  # their adjoints; empty where not wanted
    labels: Tensor  # [T, S]
    weights: Tensor  # [T, S]: mask / number of events
    d_scores: Tensor  # [T, Q]: adjoint of the adapted scores


@dataclass
class _Step:
    """What the reverse needs of an inner step."""

    slopes: list[Tensor]
    curvatures: list[Tensor | None]
    gradients: list[Tensor]  # at each layer's output, before the activation's slope
    loss_curvature: Tensor


class Chunk:
    """The inner loop of T tasks, recorded at construction from what `buffers` hold then.

    Args:
        ws: Where intermediate results go.
        form: The base learner, without the hidden layers below the lowest that adapts.
        parameters: Its shared parameters, at fixed places.
        rates: One entry a step: parameter name → rate.
        loss: Derivatives of the support's event loss.
        found: Is added to by the reverse.

    Attributes:
        before, after: Scores [T, Q] with the shared parameters, and after adaptation.
        forward, backward: The recorded programs. `forward` has run.
    """

    def __init__(
        self,
        ws: Workspace,
        form: LinearForm,
        parameters: dict[str, Tensor],
        rates: list[dict[str, float]],
        loss: LossDerivatives,
        sizes: Sizes,
        buffers: Buffers,
        found: Gradients,
    ) -> None:
        self._ws, self._loss, self._sizes, self._buffers, self._found = ws, loss, sizes, buffers, found
        self._activation = ACTIVATIONS[form.activation]
        self.forward, self.backward = Program(rates), Program(rates)
        self._form(form, parameters)
        self._curvature_weights: Tensor | None = None
        if not callable(loss.curvature):
            self._curvature_weights = ws("loss.curvature", sizes.tasks, sizes.support)
            self.forward(torch.mul, buffers.weights, loss.curvature, out=self._curvature_weights)
        self._steps = [self._step(k) for k in range(sizes.steps)]
        self.after, self.before = self._query()

    def _form(self, form: LinearForm, parameters: dict[str, Tensor]) -> None:
        p, ws, sizes = self.forward, self._ws, self._sizes
        given = self._buffers.inputs
        first_s, first_q = given[:2]
        seen: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
        if form.skip or not form.hidden:
            seen = (given[2], given[3]) if len(given) > 2 else (first_s, first_q)
        head = self._linear(form.head, parameters)
        hidden = [self._linear(names, parameters) for names in form.hidden]
        same = seen[0] is first_s
        needs_first = bool(hidden and hidden[0].adapts_weight) or (same and head.adapts_weight)
        self._gram = Gram(p, ws, "gram", first_s, first_q, sizes.steps, sizes.inputs_differ) if needs_first else None
        skip_gram = self._gram if head.adapts_weight and same else None
        self._skip_gram = None
        if seen[0] is not None and seen[1] is not None and not same and head.adapts_weight:
            skip_gram = self._skip_gram = Gram(p, ws, "skip_gram", *seen, sizes.steps, sizes.inputs_differ)
        self._first: FirstLayer | None = None
        if hidden:
            gram = self._gram if hidden[0].adapts_weight else None
            self._first = FirstLayer(p, ws, hidden[0], first_s, first_q, gram, sizes.steps)
        self._hidden = [
            HiddenLayer(p, ws, number, layer, sizes.steps, sizes.query) for number, layer in enumerate(hidden[1:])
        ]
        offset = None if form.offset is None else parameters[form.offset]
        width = len(hidden[-1].weight) if hidden else 0
        self._head = Head(p, ws, head, offset, width, (sizes.tasks, sizes.support, sizes.query), *seen, skip_gram)

    def _linear(self, names: LinearNames, parameters: dict[str, Tensor]) -> Linear:
        adapted = self._sizes.adapted if self._sizes.steps else frozenset()
        bias = None if names.bias is None else parameters[names.bias]
        return Linear(
            names.weight, names.bias, parameters[names.weight], bias, names.weight in adapted, names.bias in adapted
        )

    def _activate(self, name: str, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """h becomes the activation's value; slope and curvature are returned."""
        slope = self._ws(f"slope.{name}", *h.shape)
        bends = not self._activation.straight and self._sizes.order == 2
        curvature = self._ws(f"curvature.{name}", *h.shape) if bends else None
        self.forward(self._activation.evaluate, h, slope, curvature)
        return slope, curvature

    def _step(self, k: int) -> _Step:
        p, buffers, shape = self.forward, self._buffers, (self._sizes.tasks, self._sizes.support)
        slopes: list[Tensor] = []
        curvatures: list[Tensor | None] = []
        z = None
        if self._first is not None:
            z = self._first.forward(k)
            for i in range(len(self._hidden) + 1):
                slope, curvature = self._activate(f"{k}.{i}", z)
                slopes.append(slope)
                curvatures.append(curvature)
                if i < len(self._hidden):
                    z = self._hidden[i].forward(k, z)
        s = self._head.forward(k, z)
        e = self._ws(f"e{k}", *shape)
        p(self._loss.slope, s, buffers.labels, e)
        p(e.mul_, buffers.weights)
        loss_curvature = self._curvature_weights
        if loss_curvature is None:
            curvature_of = self._loss.curvature
            assert callable(curvature_of)
            loss_curvature = self._ws(f"loss.curvature{k}", *shape)
            p(curvature_of, s, buffers.labels, loss_curvature)
            p(loss_curvature.mul_, buffers.weights)
        gradients: list[Tensor] = []
        deltas: list[Tensor] = []
        if self._first is not None:
            g = self._head.backward(k, e)
            for i in range(len(slopes) - 1, -1, -1):
                gradients.insert(0, g)
                delta = g
                if curvatures[i] is None:
                    p(g.mul_, slopes[i])
                else:
                    delta = self._ws(f"delta{k}.{i}", *g.shape)
                    p(torch.mul, g, slopes[i], out=delta)
                deltas.insert(0, delta)
                if i:
                    g = self._hidden[i - 1].backward(k, delta)
            self._first.update(k, deltas[0])
            for layer, delta in zip(self._hidden, deltas[1:], strict=True):
                layer.update(k, delta)
        self._head.update(k, e)
        return _Step(slopes, curvatures, gradients, loss_curvature)

    def _query(self) -> tuple[Tensor, Tensor]:
        z = None
        self._slopes_q: list[Tensor] = []
        if self._first is not None:
            z = self._first.query()
            self._slopes_q.append(self._activate("q0", z)[0])
            for i, layer in enumerate(self._hidden):
                z = layer.query(z)
                self._slopes_q.append(self._activate(f"q{i + 1}", z)[0])
        after = self._head.query(z)
        z = None
        if self._first is not None:
            z = self._first.base_q
            self._activate("unused", z)
            for layer in self._hidden:
                z = layer.before(z)
                self._activate("unused", z)
        return after, self._head.before(z)

    def record_backward(self) -> None:
        """Run and record the reverse, from `buffers.d_scores`."""
        p, found, sizes = self.backward, self._found, self._sizes
        d_z = self._head.reverse_query(p, self._buffers.d_scores)
        if self._first is not None:
            assert d_z is not None
            for i in range(len(self._hidden) - 1, -1, -1):
                p(d_z.mul_, self._slopes_q[i + 1])
                d_z = self._hidden[i].reverse_query(p, d_z, found)
            p(d_z.mul_, self._slopes_q[0])
            self._first.reverse_query(p, d_z)
        for k in range(sizes.steps - 1, -1, -1):
            if sizes.order == 2:
                self._reverse_step(k)
                continue
            self._head.reverse_rates(k, found)
            if self._first is not None:
                self._first.reverse_rates(k, found)
            for layer in self._hidden:
                layer.reverse_rates(k, found)
        self._finish()

    def _reverse_step(self, k: int) -> None:
        p, found, step = self.backward, self._found, self._steps[k]
        through_slopes: list[Tensor | None] = []  # what the inner backward gives each layer's h
        d_g = None
        if self._first is not None:
            d_delta = self._first.reverse_update(k, found)
            for i, (slope, curvature) in enumerate(zip(step.slopes, step.curvatures, strict=True)):
                through = None
                if curvature is not None:
                    through = self._ws(f"through{i}", *d_delta.shape)
                    p(torch.mul, d_delta, step.gradients[i], out=through)
                    p(through.mul_, curvature)
                through_slopes.append(through)
                p(d_delta.mul_, slope)
                d_g = d_delta
                if i < len(self._hidden):
                    d_delta = self._hidden[i].reverse_backward(k, d_g, found)
        d_e = self._head.reverse_backward(k, d_g, found)
        d_s = d_e
        p(d_s.mul_, step.loss_curvature)
        d_z = self._head.reverse_forward(k, d_s)
        if self._first is not None:
            assert d_z is not None
            for i in range(len(step.slopes) - 1, -1, -1):
                p(d_z.mul_, step.slopes[i])
                through = through_slopes[i]
                if through is not None:
                    p(d_z.add_, through)
                if i:
                    d_z = self._hidden[i - 1].reverse_forward(k, d_z, found)
            self._first.reverse_forward(k, d_z)

    def _finish(self) -> None:
        p, found = self.backward, self._found
        first_s, first_q, skip_s, skip_q = (*self._buffers.d_inputs, None, None, None, None)[:4]
        own = skip_q is not None  # the head's inputs are another tensor than the first layer's
        if self._first is not None:
            self._first.finish(found, first_s, first_q)
            for layer in self._hidden:
                layer.finish(found)
        into = (skip_s, skip_q) if own else (first_s, first_q)
        self._head.finish(found, *into, fresh=own or self._first is None)
        second = self._sizes.order == 2 and self._sizes.steps > 0
        for gram, s, q in ((self._gram, first_s, first_q), (self._skip_gram, skip_s, skip_q)):
            if gram is not None and q is not None:
                gram.into_inputs(p, s if second else None, q)
