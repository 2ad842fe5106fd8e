"""One chunk of tasks through the low-rank inner loop and back, written out by hand and recorded as two programs.

Promises: the exact meta-gradient (first or second order) of the scores after adaptation, from the adjoint of those
scores; nothing of the size of a weight a task for the fixed inputs; buffers of the workspace alone, so that a chunk's
working set stays in cache. `low_rank` has the mathematics, `low_rank_layers` the products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metatrain.meta.low_rank_between import Between
from metatrain.meta.low_rank_elementwise import ACTIVATIONS, LossDerivatives
from metatrain.meta.low_rank_first import FirstLayer
from metatrain.meta.low_rank_form import LinearForm, LinearNames
from metatrain.meta.low_rank_head import Head, Moving
from metatrain.meta.low_rank_hidden import HiddenLayer
from metatrain.meta.low_rank_layers import Gradients, Gram, Linear
from metatrain.meta.low_rank_norm import Norm
from metatrain.meta.low_rank_program import Program, Workspace
from metatrain.meta.low_rank_rows import RowFeature, Rows


@dataclass(frozen=True)
class Sizes:
    """Shapes and settings that a recorded chunk is for."""

    tasks: int
    support: int
    query: int
    first: int  # width of the fixed inputs that the lowest layer that adapts reads
    skip: int  # width of what the head reads beside, where that is another tensor; 0: the same, or nothing
    rows: tuple[RowFeature, ...]  # adapted features, whose columns follow the fixed inputs'
    adapted: frozenset[str]
    order: int
    steps: int
    inputs_differ: bool  # whether the fixed inputs' gradients are wanted
    rates_differ: bool
    reverses: bool  # whether any gradient is wanted

    @property
    def row_width(self) -> int:
        """D, the width of all adapted features."""
        return sum(feature.width for feature in self.rows)

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """Of `Buffers.inputs`."""
        tasks, support, query, width = self.tasks, self.support, self.query, self.row_width
        found = [(tasks, events, self.first) for events in (support, query)]
        if self.skip:
            found += [(tasks, events, self.skip) for events in (support, query)]
        if self.rows:
            found += [(tasks, events, width) for events in (support, query)]
        return found + [(tasks, events, support) for _ in self.rows for events in (support, query)]

    @property
    def differ(self) -> list[bool]:
        """Which of `Buffers.inputs` have their gradients wanted."""
        fixed = [self.inputs_differ] * (4 if self.skip else 2)
        return fixed + [True] * (2 * bool(self.rows)) + [False] * (2 * len(self.rows))


@dataclass(frozen=True)
class Buffers:
    """What a chunk reads and writes, at fixed places; T, S, Q and widths as `Sizes` has them."""

    #: first_s, first_q; where they are others, skip_s, skip_q; where rows adapt, r_s, r_q and, of each feature, the
    #: kernels of `PooledRows`.
    inputs: list[Tensor]
    d_inputs: list[Tensor | None]  # their adjoints; None where not wanted
    labels: Tensor  # [T, S]
    weights: Tensor  # [T, S]: mask / number of events
    d_scores: Tensor  # [T, Q]: adjoint of the adapted scores


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
        self.forward, self.backward = Program(rates), Program(rates)
        self._form(form, parameters)
        self._curvature_weights: Tensor | None = None
        if not callable(loss.curvature):
            self._curvature_weights = ws("loss.curvature", sizes.tasks, sizes.support)
            self.forward(torch.mul, buffers.weights, loss.curvature, out=self._curvature_weights)
        self._loss_curvatures: list[Tensor] = []
        for k in range(sizes.steps):
            self._step(k)
        self.after, self.before = self._query()

    def _form(self, form: LinearForm, parameters: dict[str, Tensor]) -> None:
        p, ws, sizes = self.forward, self._ws, self._sizes
        given = self._buffers.inputs
        first_s, first_q = given[:2]
        seen: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
        if form.skip or not form.hidden:
            seen = (given[2], given[3]) if sizes.skip else (first_s, first_q)
        head = self._linear(form.head, parameters)
        hidden = [self._linear(names, parameters) for names in form.hidden]
        same = seen[0] is first_s
        needs_first = bool(hidden and hidden[0].adapts_weight) or (same and head.adapts_weight)
        self._gram = Gram(p, ws, "gram", first_s, first_q, sizes.steps, sizes.inputs_differ) if needs_first else None
        skip_gram = self._gram if head.adapts_weight and same else None
        self._skip_gram = None
        if seen[0] is not None and seen[1] is not None and not same and head.adapts_weight:
            skip_gram = self._skip_gram = Gram(p, ws, "skip_gram", *seen, sizes.steps, sizes.inputs_differ)
        self._rows: Rows | None = None
        if sizes.rows:
            start = 4 if sizes.skip else 2
            r_s, r_q, *kernels = given[start:]
            self._rows = Rows(p, ws, sizes.rows, r_s, r_q, kernels)
        self._first: FirstLayer | None = None
        if hidden:
            gram = self._gram if hidden[0].adapts_weight else None
            fixed, of_rows = hidden[0], None
            if sizes.rows:
                fixed = self._apart("fixed", hidden[0].part(0, sizes.first, bias=True))
                layer = self._apart("rows", hidden[0].part(sizes.first, sizes.row_width, bias=False))
                of_rows = HiddenLayer(p, ws, "first.rows", layer, sizes.steps, sizes.query)
            self._first = FirstLayer(p, ws, fixed, first_s, first_q, gram, sizes.steps, of_rows)
        self._hidden = [
            HiddenLayer(p, ws, f"hidden{i}", layer, sizes.steps, sizes.query) for i, layer in enumerate(hidden[1:])
        ]
        activation = ACTIVATIONS[form.activation]
        adapted = sizes.adapted if sizes.steps else frozenset()
        norms = [Norm(p, ws, f"norm{i}", names, parameters, adapted) for i, names in enumerate(form.norms)]
        self._between = [
            Between(p, ws, i, activation, sizes.order, norms[i] if norms else None) for i in range(len(hidden))
        ]
        offset = None if form.offset is None else parameters[form.offset]
        width = len(hidden[-1].weight) if hidden else 0
        self._head_sees_rows = bool(sizes.rows) and seen[0] is not None
        rows = sizes.row_width if self._head_sees_rows else 0
        self._head = Head(p, ws, head, offset, width, (sizes.tasks, sizes.support, sizes.query), *seen, skip_gram, rows)

    def _apart(self, name: str, part: Linear) -> Linear:
        """The columns in one piece: products with a matrix of longer rows can be a hundred times slower (oneDNN)."""
        if self._sizes.tasks == 1:
            return part  # a copy a task would cost as much as it saves; our kernels don't mind
        weight = self._ws(f"first.weight.{name}", *part.weight.shape)
        self.forward(weight.copy_, part.weight)
        return replace(part, weight=weight)

    def _linear(self, names: LinearNames, parameters: dict[str, Tensor]) -> Linear:
        adapted = self._sizes.adapted if self._sizes.steps else frozenset()
        bias = None if names.bias is None else parameters[names.bias]
        return Linear(
            names.weight, names.bias, parameters[names.weight], bias, names.weight in adapted, names.bias in adapted
        )

    def _moving(self, z: Tensor | None, r: Tensor | None) -> Moving:
        return z, r if self._head_sees_rows else None

    def _step(self, k: int) -> None:
        p, buffers, shape = self.forward, self._buffers, (self._sizes.tasks, self._sizes.support)
        r = None if self._rows is None else self._rows.forward(k)
        z = None
        if self._first is not None:
            z = self._between[0].forward(k, self._first.forward(k, r))
            for layer, between in zip(self._hidden, self._between[1:], strict=True):
                z = between.forward(k, layer.forward(k, z))
        s = self._head.forward(k, self._moving(z, r))
        e = self._ws(f"e{k}", *shape)
        p(self._loss.slope, s, buffers.labels, e)
        p(e.mul_, buffers.weights)
        curvature = self._curvature_weights
        if curvature is None:
            curvature_of = self._loss.curvature
            assert callable(curvature_of)
            curvature = self._ws(f"loss.curvature{k}", *shape)
            p(curvature_of, s, buffers.labels, curvature)
            p(curvature.mul_, buffers.weights)
        self._loss_curvatures.append(curvature)
        g, rho = self._head.backward(k, e)
        if self._first is not None:
            assert g is not None
            for i in range(len(self._hidden), 0, -1):
                delta = self._between[i].backward(k, g)
                g = self._hidden[i - 1].backward(k, delta)
                self._hidden[i - 1].update(k, delta)
            delta = self._between[0].backward(k, g)
            rho = _sum(p, self._first.backward(k, delta), rho)
            self._first.update(k, delta)
        self._head.update(k, e)
        if self._rows is not None:
            assert rho is not None
            self._rows.update(k, rho)

    def _query(self) -> tuple[Tensor, Tensor]:
        z, r = None, None if self._rows is None else self._rows.query()
        if self._first is not None:
            z = self._between[0].query(self._first.query(r))
            for layer, between in zip(self._hidden, self._between[1:], strict=True):
                z = between.query(layer.query(z))
        after = self._head.query(self._moving(z, r))
        z, r = None, None if self._rows is None else self._rows.before()
        if self._first is not None:
            z = self._between[0].before(self._first.before(r))
            for layer, between in zip(self._hidden, self._between[1:], strict=True):
                z = between.before(layer.before(z))
        return after, self._head.before(self._moving(z, r))

    def record_backward(self) -> None:
        """Run and record the reverse, from `buffers.d_scores`."""
        p, found, sizes = self.backward, self._found, self._sizes
        d_z, d_r = self._head.reverse_query(p, self._buffers.d_scores)
        if self._first is not None:
            assert d_z is not None
            for i in range(len(self._hidden), 0, -1):
                d_h = self._between[i].reverse_query(p, d_z)
                d_z = self._hidden[i - 1].reverse_query(p, d_h, found)
            d_h = self._between[0].reverse_query(p, d_z)
            d_r = _sum(p, self._first.reverse_query(p, d_h, found), d_r)
        if self._rows is not None:
            assert d_r is not None
            self._rows.reverse_query(p, d_r)
        reverse = self._reverse_step if sizes.order == 2 else self._reverse_rates
        for k in range(sizes.steps - 1, -1, -1):
            reverse(k)
        self._finish()

    def _reverse_rates(self, k: int) -> None:
        found = self._found
        self._head.reverse_rates(k, found)
        if self._first is not None:
            self._first.reverse_rates(k, found)
        for layer in (*self._hidden, *self._between):
            layer.reverse_rates(k, found)
        if self._rows is not None:
            self._rows.reverse_rates(k, found)

    def _reverse_step(self, k: int) -> None:
        p, found = self.backward, self._found
        d_rho = None if self._rows is None else self._rows.reverse_backward(k, found)
        d_g = None
        if self._first is not None:
            d_delta = self._first.reverse_backward(k, d_rho, found)
            d_g = self._between[0].reverse_backward(k, d_delta, found)
            for layer, between in zip(self._hidden, self._between[1:], strict=True):
                d_g = between.reverse_backward(k, layer.reverse_backward(k, d_g, found), found)
        d_s = self._head.reverse_backward(k, self._moving(d_g, d_rho), found)
        p(d_s.mul_, self._loss_curvatures[k])
        d_z, d_r = self._head.reverse_forward(k, d_s)
        if self._first is not None:
            assert d_z is not None
            for i in range(len(self._hidden), 0, -1):
                d_h = self._between[i].reverse_forward(k, d_z)
                d_z = self._hidden[i - 1].reverse_forward(k, d_h, found)
            d_h = self._between[0].reverse_forward(k, d_z)
            d_r = _sum(p, self._first.reverse_forward(k, d_h, found), d_r)
        if self._rows is not None:
            assert d_r is not None
            self._rows.reverse_forward(k, d_r)

    def _finish(self) -> None:
        p, found, sizes = self.backward, self._found, self._sizes
        first_s, first_q, *others = self._buffers.d_inputs
        skip_s, skip_q = others[:2] if sizes.skip else (None, None)
        if self._first is not None:
            self._first.finish(found, first_s, first_q)
            for layer in (*self._hidden, *self._between):
                layer.finish(found)
        into = (skip_s, skip_q) if sizes.skip else (first_s, first_q)
        self._head.finish(found, *into, fresh=bool(sizes.skip) or self._first is None)
        second = sizes.order == 2 and sizes.steps > 0
        for gram, s, q in ((self._gram, first_s, first_q), (self._skip_gram, skip_s, skip_q)):
            if gram is not None and q is not None:
                gram.into_inputs(p, s if second else None, q)
        if self._rows is not None:
            r_s, r_q = others[2 * bool(sizes.skip) :][:2]
            assert r_s is not None
            assert r_q is not None
            self._rows.finish(r_s, r_q)


def _sum(p: Program, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Their sum, in place of the first."""
    if a is not None and b is not None:
        p(a.add_, b)
    return b if a is None else a
