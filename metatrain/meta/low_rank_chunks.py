"""The low-rank query loss by torch, chunk by chunk: on GPUs, and where there are no kernels (`low_rank_tasks`).

Promises: at most one chunk's intermediate results are alive, and a chunk is reversed while it is still in cache.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from metatrain.meta.low_rank_chunk import Buffers, Chunk, Sizes
from metatrain.meta.low_rank_layers import Gradients
from metatrain.meta.low_rank_problem import Found, Given, Problem, buffers_of, parameters_of
from metatrain.meta.low_rank_program import Window, Workspace

#: Recorded chunks kept: batches come in few shapes where they are bucketed, and each holds some thousand small views.
PROGRAMS = 64


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


def by_chunks(problem: Problem, recordings: Recordings, sizes: Sizes, given: Given) -> Found:
    """What is asked for. `sizes.tasks` is that of the call: chunks have fewer."""
    tasks, inputs = sizes.tasks, given.inputs
    # Chunks of one size, the last filled up with tasks of no weight: one recording serves them all.
    size = -(-tasks // -(-tasks // problem.chunk)) if tasks else 1
    sizes = replace(sizes, tasks=size)
    # One transfer for all rates: as Python numbers they go into the products for free.
    steps = [dict(zip(problem.rate_names, row, strict=True)) for row in given.rates.tolist()]
    ws = recordings.workspace(inputs[0])
    key = (problem.form, problem.names, problem.rate_names, sizes, ws)
    recorded = recordings.get(key, ws.generation)
    chunk: Chunk | None = None
    windows: list[Window] = []
    if recorded is None:
        buffers, found = buffers_of(ws, problem, sizes, given)
    else:
        buffers, found, chunk, windows = recorded
        chunk.forward.fill_in(steps)
        chunk.backward.fill_in(steps)
    parameters = parameters_of(ws, problem, given)
    for buffer, value in zip(parameters.values(), given.values, strict=True):
        buffer.copy_(value)
    for gradient in (*found.of.values(), found.rates):
        gradient.zero_()
    d_inputs = [torch.empty_like(x) if wanted else None for x, wanted in zip(inputs, sizes.differ, strict=True)]
    before, after = torch.empty_like(given.labels_q), torch.empty_like(given.labels_q)
    for start in range(0, tasks, size):
        part = slice(start, start + size)
        _copy(buffers.labels, given.labels_s[part])
        _copy(buffers.weights, given.weights_s[part])
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
        count = len(given.labels_q[part])
        before[part], after[part] = chunk.before[:count], chunk.after[:count]
        if not sizes.reverses:
            continue
        d_s = torch.empty_like(given.labels_q[part])
        problem.outer.slope(after[part], given.labels_q[part], d_s)
        _copy(buffers.d_scores, d_s.mul_(given.weights_q[part]))
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
    own = [found.rates.to(given.rates.dtype, copy=True), *(gradient.clone() for gradient in found.of.values())]
    return Found(before, after, d_inputs, own)


def _copy(buffer: Tensor, x: Tensor) -> None:
    count = len(x)
    if count == len(buffer):
        buffer.copy_(x)
    else:
        buffer[:count] = x
        buffer[count:] = 0
