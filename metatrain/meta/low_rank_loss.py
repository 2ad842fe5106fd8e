"""The query loss after low-rank adaptation as one autograd function, chunk by chunk.

Promises: the same total, losses and gradients as adapting by plain autograd, with at most one chunk's intermediate
results alive. Gradients are taken in the forward pass and only scaled in the backward, so that a chunk is reversed
while it is still in cache.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metatrain.meta.losses import EventLoss, mean_over_events
from metatrain.meta.low_rank_chunk import Buffers, Chunk, Sizes
from metatrain.meta.low_rank_elementwise import LossDerivatives
from metatrain.meta.low_rank_form import LinearForm
from metatrain.meta.low_rank_layers import Gradients
from metatrain.meta.low_rank_program import Window, Workspace
from metatrain.meta.low_rank_rows import RowFeature

#: Recorded chunks kept: batches come in few shapes where they are bucketed, and each holds some thousand small views.
PROGRAMS = 64


@dataclass(frozen=True)
class Problem:
    """What the tensors of one call mean.

    The inputs given to `AdaptedLoss` are those of `Buffers.inputs`; after them come the rates [K, N] and the
    parameters, named by `names`.
    """

    form: LinearForm
    names: tuple[str, ...]
    rate_names: tuple[str, ...]
    adapted: frozenset[str]
    loss: EventLoss  # of a query event
    outer: LossDerivatives  # of the same
    inner: LossDerivatives  # of a support event
    order: int
    inputs: int
    skips: bool  # whether the head's fixed inputs are others than the first layer's
    rows: tuple[RowFeature, ...]
    chunk: int
    differentiate: bool  # the gradient mode of the caller


class Recording(NamedTuple):
    """A recorded chunk with what it reads and writes."""

    buffers: Buffers
    found: Gradients
    chunk: Chunk
    windows: list[Window]  # one an input


class Recordings(threading.local):
    """Workspaces and recorded chunks, a thread its own. Not state: copies and pickles start without."""

    def __init__(self) -> None:
        self._workspaces: dict[tuple[torch.dtype, torch.device], Workspace] = {}
        self._chunks: OrderedDict[object, tuple[int, Recording]] = OrderedDict()

    def workspace(self, like: Tensor) -> Workspace:
        """The workspace for tensors of that type and place."""
        key = (like.dtype, like.device)
        if key not in self._workspaces:
            self._workspaces[key] = Workspace(like)
        return self._workspaces[key]

    def get(self, key: object, generation: int) -> Recording | None:
        """The chunk recorded for it, if its buffers are still those of the workspace."""
        held = self._chunks.get(key)
        if held is None or held[0] != generation:
            return None
        self._chunks.move_to_end(key)
        return held[1]

    def put(self, key: object, generation: int, recording: Recording) -> None:
        """Keep it; forget what is stale, and the least recently used."""
        for other in [k for k, held in self._chunks.items() if held[0] != generation]:
            del self._chunks[other]
        self._chunks[key] = (generation, recording)
        while len(self._chunks) > PROGRAMS:
            self._chunks.popitem(last=False)

    def __deepcopy__(self, memo: object) -> Recordings:
        return Recordings()

    def __reduce__(self) -> tuple[type[Recordings], tuple[()]]:
        return Recordings, ()


class AdaptedLoss(torch.autograd.Function):
    """(labels_s, weights_s, labels_q, mask_q, counts, inputs…, rates, parameters…) → total, after [T], before [T].

    `counts` [T] is what each task counts in the total.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, problem: Problem, recordings: Recordings, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        labels_s, weights_s, labels_q, mask_q, counts = tensors[:5]
        inputs, (rates, *values) = tensors[5 : 5 + problem.inputs], tensors[5 + problem.inputs :]
        needs = [need and problem.differentiate for need in ctx.needs_input_grad[7:]]
        an_event_T1 = (counts / mask_q.sum(-1).clamp(min=1.0)).unsqueeze(-1)
        needs_x = any(needs[: 4 if problem.skips else 2])
        # One transfer for all rates: as Python numbers they go into the products for free.
        steps = [dict(zip(problem.rate_names, row, strict=True)) for row in rates.tolist()]
        tasks = len(labels_s)
        # Chunks of one size, the last filled up with tasks of no weight: one recording serves them all.
        size = -(-tasks // -(-tasks // problem.chunk)) if tasks else 1
        sizes = Sizes(
            size,
            labels_s.shape[1],
            labels_q.shape[1],
            inputs[0].shape[2],
            inputs[2].shape[2] if problem.skips else 0,
            problem.rows,
            problem.adapted,
            problem.order,
            len(steps),
            needs_x,
            needs[problem.inputs],
            any(needs),
        )
        ws = recordings.workspace(inputs[0])
        key = (problem.form, problem.names, sizes, ws)
        recorded = recordings.get(key, ws.generation)
        chunk: Chunk | None = None
        windows: list[Window] = []
        if recorded is None:
            buffers, found = _buffers(ws, problem, sizes, values, rates)
        else:
            buffers, found, chunk, windows = recorded
            chunk.forward.fill_in(steps)
            chunk.backward.fill_in(steps)
        parameters = {name: ws(f"parameter.{name}", *v.shape) for name, v in zip(problem.names, values, strict=True)}
        for buffer, value in zip(parameters.values(), values, strict=True):
            buffer.copy_(value)
        for gradient in (*found.of.values(), found.rates):
            gradient.zero_()
        d_inputs = [torch.empty_like(x) if wanted else None for x, wanted in zip(inputs, sizes.differ, strict=True)]
        scores_before, scores = torch.empty_like(labels_q), torch.empty_like(labels_q)
        for start in range(0, tasks, size):
            part = slice(start, start + size)
            _copy(buffers.labels, labels_s[part])
            _copy(buffers.weights, weights_s[part])
            whole_chunk = start + size <= tasks
            for number, x in enumerate(inputs):
                if windows and whole_chunk:
                    windows[number].move(x[part])
                elif windows:
                    windows[number].move(windows[number].buffer)
                    _copy(windows[number].buffer, x[part])
                else:
                    _copy(buffers.inputs[number], x[part])
            if chunk is None:
                chunk = Chunk(ws, problem.form, parameters, steps, problem.inner, sizes, buffers, found)
            else:
                chunk.forward.replay()
            count = len(labels_q[part])
            scores_before[part], scores[part] = chunk.before[:count], chunk.after[:count]
            if not sizes.reverses:
                continue
            d_s = torch.empty_like(labels_q[part])
            problem.outer.slope(scores[part], labels_q[part], d_s)
            _copy(buffers.d_scores, d_s.mul_(mask_q[part]).mul_(an_event_T1[part]))
            if chunk.backward.empty:
                chunk.record_backward()
            else:
                chunk.backward.replay()
            for whole, d_x in zip(d_inputs, buffers.d_inputs, strict=True):
                if whole is not None and d_x is not None:
                    whole[part] = d_x[:count]
        for window in windows:
            window.move(window.buffer)  # or the recording would keep the batch alive
        if chunk is not None and recorded is None:
            windows = [Window(buffer, [chunk.forward, chunk.backward]) for buffer in buffers.inputs]
            recordings.put(key, ws.generation, Recording(buffers, found, chunk, windows))
        after = mean_over_events(problem.loss(scores, labels_q), mask_q)
        before = mean_over_events(problem.loss(scores_before, labels_q), mask_q)
        if sizes.reverses:
            own = [found.rates.to(rates.dtype, copy=True), *(gradient.clone() for gradient in found.of.values())]
            ctx.found = [*d_inputs, *own]
        ctx.mark_non_differentiable(after, before)
        return (counts * after).sum(), after, before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # Not in place: a graph may be retained and go backward again.
        needs = ctx.needs_input_grad[7:]
        scaled = [g * by_total if need and g is not None else None for g, need in zip(ctx.found, needs, strict=True)]
        return None, None, None, None, None, None, None, *scaled


def _buffers(
    ws: Workspace, problem: Problem, sizes: Sizes, values: list[Tensor], rates: Tensor
) -> tuple[Buffers, Gradients]:
    tasks, support, query = sizes.tasks, sizes.support, sizes.query
    wanted = enumerate(zip(sizes.shapes, sizes.differ, strict=True))
    buffers = Buffers(
        [ws(f"in.{i}", *shape) for i, shape in enumerate(sizes.shapes)],
        [ws(f"d_in.{i}", *shape) if differ else None for i, (shape, differ) in wanted],
        ws("in.labels", tasks, support),
        ws("in.weights", tasks, support),
        ws("in.d_scores", tasks, query),
    )
    of = {name: ws(f"d_parameter.{name}", *v.shape) for name, v in zip(problem.names, values, strict=True)}
    return buffers, Gradients(of, ws("d_rates", *rates.shape), problem.rate_names, sizes.rates_differ)


def _copy(buffer: Tensor, x: Tensor) -> None:
    count = len(x)
    if count == len(buffer):
        buffer.copy_(x)
    else:
        buffer[:count] = x
        buffer[count:] = 0
