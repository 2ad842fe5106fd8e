"""What an inner loop holds at once, counted from shapes, and how many tasks and steps a budget of bytes allows.

Promises: a pure function of shapes and settings, never of the machine: a resumed run takes the same chunks, and so
sums in the same order. The count is within half as much again of the measured peak (tests/meta/test_memory.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from torch import nn

from metatrain.meta.low_rank_cost import Shapes

#: Chunks of fewer tasks spend their time in calls: then steps are computed again before chunks get smaller.
FEWEST_TASKS = 16


@dataclass(frozen=True)
class Loop:
    """An inner loop's settings, as far as they decide memory."""

    adapted: int  # weights that adapt
    ins: int  # numbers that an event's matrices read: the sum of their input widths
    outs: int  # and write
    steps: int
    order: int
    learned: bool  # whether the rates are
    gains: int = 0  # numbers of an event that normalisations write
    own_start: bool = False  # whether each task starts from weights of its own

    @classmethod
    def of(
        cls,
        learner: nn.Module,
        adapted: tuple[str, ...],
        steps: int,
        order: int,
        learned: bool,
        own_start: bool = False,
    ) -> Loop:
        """The loop around a base learner."""
        parameters = dict(learner.named_parameters())
        matrices = [p for p in parameters.values() if p.dim() >= 2]
        return cls(
            sum(parameters[name].numel() for name in adapted),
            sum(p.numel() // p.shape[0] for p in matrices),
            sum(p.shape[0] for p in matrices),
            steps,
            order,
            learned,
            sum(p.numel() for name, p in parameters.items() if p.dim() == 1 and name.endswith("weight")),
            own_start,
        )


def task_bytes(loop: Loop, support: int, query: int, rows: int = 0, itemsize: int = 4, keep: int = 0) -> int:
    """Peak bytes of a task's share of the query loss and its gradient by vmap.

    Weights, gradients and activations are counted with the factors at which measured peaks lie: what autograd keeps of
    a step, and what a reverse adds.

    Args:
        loop: The settings.
        support, query: Padded events of a task.
        rows: Numbers in a task's adapted rows.
        itemsize: Bytes of a number.
        keep: Steps of which intermediate results are kept at a time; 0: all.
    """
    weights = loop.adapted + rows
    kept = min(keep or loop.steps, loop.steps)
    if loop.order == 2:
        step = weights * (1.4 + loop.learned) + support * (1.3 * loop.ins + 0.6 * loop.outs + 4.3 * loop.gains)
        once = 1.4 * weights + support * (0.6 * loop.ins + 1.1 * loop.outs)
    else:
        step = weights * (0.1 + 0.7 * loop.learned) + support * 0.1 * loop.ins
        once = 3.7 * weights + support * (loop.ins + 0.3 * loop.outs + 4.2 * loop.gains)
    once += query * (1.5 * loop.ins + 0.7 * loop.outs)
    if loop.own_start and loop.order == 2:  # in first order it is gone where the peak is
        once += loop.adapted
    boundaries = weights * (-(-loop.steps // kept) + 1) if kept < loop.steps else 0
    return max(1, int((kept * step + once + boundaries) * itemsize))


def low_rank_bytes(s: Shapes, bends: bool = True) -> int:
    """A task's share of the low-rank engine's buffers, which it keeps between calls.

    What grows with the steps are outputs, slopes and gradients of each layer, and the weights above the first.

    Args:
        s: One call's shapes.
        bends: Whether the activation has a second derivative.
    """
    second, width, events = s.order == 2, sum(s.hidden), s.support + s.query
    above = (s.row_width, *s.hidden) if s.rows else s.hidden
    weights = sum(i * o for i, o in pairwise(above)) if s.moves else 0
    own_skip = s.skip if s.below else 0  # the head reads other inputs than the lowest layer that adapts
    step = s.support * (width * (3.8 + (2.7 if second and bends else 0)) + 4 + 4 * s.row_width) + weights
    once = weights + s.support * width * (3.5 if second else 0.5) + 6 * s.query * width
    if s.norm:
        step, once = step + 2.6 * s.support * width, once + 3 * s.support * width
    once += events * (1.9 * (s.inputs + own_skip) + 4 * s.support * (2 if own_skip else 1) + 5 * s.row_width)
    return max(1, int((s.steps * step + once) * s.itemsize))


class Plan(NamedTuple):
    """How a batch is taken: see `plan`."""

    chunk: int  # tasks at a time
    keep: int  # steps kept at a time; 0: all
    bytes: int  # counted peak
    reason: str


def plan(
    loop: Loop,
    tasks: int,
    support: int,
    query: int,
    budget: int,
    *,
    rows: int = 0,
    itemsize: int = 4,
    chunk: int = 0,
    keep: int | Literal["auto"] = "auto",
) -> Plan:
    """The largest chunk that fits the budget; where that is only a few tasks, steps are computed again.

    Args:
        loop, support, query, rows, itemsize: See `task_bytes`.
        tasks: Of the batch.
        budget: Bytes. Where not even one task fits, one is taken all the same.
        chunk: Tasks at a time, decided by the user; 0: by the budget.
        keep: Steps kept at a time, decided by the user.
    """

    def bytes_of(kept: int) -> int:
        return task_bytes(loop, support, query, rows, itemsize, kept)

    def fitting(kept: int) -> int:
        return min(tasks, chunk or max(1, budget // bytes_of(kept)))

    kept = 0 if keep == "auto" else keep
    reason = ""
    needed = min(tasks, chunk or FEWEST_TASKS)
    if keep == "auto" and loop.steps > 1 and bytes_of(0) * needed > budget:
        least = min(range(1, loop.steps + 1), key=bytes_of)
        # Computing again costs a third more: it must be worth it.
        if least < loop.steps and bytes_of(least) < 0.75 * bytes_of(0):
            kept, reason = least, f", {least} of {loop.steps} steps kept at a time"
    taken = max(1, fitting(kept))
    counted = taken * bytes_of(kept)
    why = "asked for" if chunk else f"of {bytes_of(kept) / 2**20:.3g} MiB each, in {budget / 2**20:.0f} MiB"
    return Plan(taken, kept, counted, f"{taken} of {tasks} tasks at a time ({why}){reason}")
