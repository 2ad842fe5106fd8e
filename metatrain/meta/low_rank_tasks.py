"""The low-rank query loss task by task, by kernels of our own: see `low_rank_translate` for how they get their program.

Promises: the results of `low_rank_chunks` up to rounding. As many threads as torch uses take blocks of tasks as they
come to them, and gradients are added up in the order of the blocks, whose number the batch and that of threads decide:
one number of threads gives one result. The interpreter is free while the kernels run.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections import OrderedDict
from dataclasses import replace

import torch
from torch import Tensor

from metatrain.meta.low_rank_build import kernels
from metatrain.meta.low_rank_chunk import Chunk, Sizes
from metatrain.meta.low_rank_problem import Found, Given, Problem, buffers_of, parameters_of
from metatrain.meta.low_rank_program import Program, Workspace
from metatrain.meta.low_rank_translate import CannotTranslate, Translation

_log = logging.getLogger(__name__)

#: Translations kept: batches come in few shapes where they are bucketed, and each holds some hundred kilobytes.
TRANSLATIONS = 256


class Translations:
    """Programs for the kernels, by what they are for. Not state: copies and pickles start without."""

    def __init__(self) -> None:
        self._held: OrderedDict[object, Translation | None] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, problem: Problem, sizes: Sizes, given: Given) -> tuple[ctypes.CDLL, Translation] | None:
        """Kernels and program; None where they do not serve."""
        like = given.inputs[0]
        # Without names, losses have no kernels; the kernels read numbers of one type.
        losses = [(loss.name, loss.delta) for loss in (problem.inner, problem.outer)]
        library = kernels(like.dtype, like.device)
        alike = all((x.dtype, x.device) == (like.dtype, like.device) for x in (*given.inputs, *given.values))
        if library is None or not alike or any(name is None for name, _ in losses):
            return None
        sizes = replace(sizes, tasks=1)
        key = (problem.form, problem.names, problem.rate_names, *losses, sizes, like.dtype)
        with self._lock:
            if key not in self._held:
                try:
                    self._held[key] = _translated(problem, sizes, given)
                except CannotTranslate as reason:
                    _log.info("this inner loop runs by torch, chunk by chunk: %s", reason)
                    self._held[key] = None
                while len(self._held) > TRANSLATIONS:
                    self._held.popitem(last=False)
            self._held.move_to_end(key)
            translation = self._held[key]
        return None if translation is None else (library, translation)

    def __deepcopy__(self, memo: object) -> Translations:
        return Translations()

    def __reduce__(self) -> tuple[type[Translations], tuple[()]]:
        return Translations, ()


def by_tasks(problem: Problem, translations: Translations, sizes: Sizes, given: Given) -> Found | None:
    """What is asked for; None where there are no kernels for it."""
    served = translations.get(problem, sizes, given)
    if served is None:
        return None
    library, translation = served
    like = given.inputs[0]
    before, after = (like.new_empty(given.labels_q.shape) for _ in range(2))
    wanted = [differs and sizes.reverses for differs in sizes.differ]
    d_inputs = [torch.empty_like(x) if want else None for x, want in zip(given.inputs, wanted, strict=True)]
    a_task = [
        *given.inputs,
        *(x.to(like.dtype).contiguous() for x in given[:4]),
        *(x for x in d_inputs if x is not None),
        before,
        after,
    ]
    gradients = translation.run(
        library,
        a_task,
        [value.contiguous() for value in given.values],
        given.rates.flatten().tolist(),
        torch.get_num_threads(),
    )
    return Found(before, after, d_inputs, [gradients[0].to(given.rates.dtype), *gradients[1:]])


def _translated(problem: Problem, sizes: Sizes, given: Given) -> Translation:
    ws = Workspace(given.inputs[0])
    steps = [dict.fromkeys(problem.rate_names, 0.0) for _ in range(sizes.steps)]

    def named(name: str) -> Tensor:
        return ws(name, 1, sizes.query)

    # Twice, for a buffer may have been replaced by a larger one while the first was recorded.
    for _ in range(2):
        parameters = parameters_of(ws, problem, given)
        buffers, found = buffers_of(ws, problem, sizes, given)
        labels_q, weights_q = named("in.labels_q"), named("in.weights_q")
        before, after = named("out.before"), named("out.after")
        for flat in ws.buffers():
            flat.zero_()
        chunk = Chunk(ws, problem.form, parameters, steps, problem.inner, sizes, buffers, found)
        between = Program(steps)
        between(before.copy_, chunk.before)
        between(after.copy_, chunk.after)
        if sizes.reverses:
            between(problem.outer.slope, chunk.after, labels_q, buffers.d_scores)
            between(buffers.d_scores.mul_, weights_q)
            chunk.record_backward()
    d_inputs = [d_x for d_x in buffers.d_inputs if d_x is not None] if sizes.reverses else []
    return Translation(
        [chunk.forward, between, chunk.backward],
        ws,
        [found.rates, *found.of.values()],
        [*buffers.inputs, buffers.labels, buffers.weights, labels_q, weights_q, *d_inputs, before, after],
        list(parameters.values()),
        problem.rate_names,
        [problem.inner, problem.outer],
    )
