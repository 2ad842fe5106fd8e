"""Where a worker's time goes: laps of one clock, summed by stage.

Every moment belongs to exactly one stage, so the stages add up to the whole. A lap costs a microsecond.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch

#: The stages of a training step, in their order. `exchange` is the wait for the ids and rows of other ranks, and so for
#: slower ranks; `backward` holds the exchanges of gradients.
STAGES: tuple[str, ...] = ("wait", "copy", "lookup", "exchange", "assemble", "inner_loop", "backward", "update", "rest")

# Marks kept before they are summed: a bound, however seldom somebody asks.
_MARKS_KEPT = 4096


class Laps:
    """A stopwatch for one thread.

    On a GPU, whose work is done later than it is asked for, the marks are events in its stream: a stage is the time
    that the GPU spent on it, or idle before its first work.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._marks: list[tuple[str, Any]] = []
        self.lap("rest")

    def lap(self, stage: str) -> None:
        """Says that the time since the last lap was `stage`, one of `STAGES`."""
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((stage, now))
        if len(self._marks) > _MARKS_KEPT:
            self._sum()

    def take(self) -> dict[str, float]:
        """Seconds of each stage since the last call."""
        self._sum()
        seconds, self._seconds = self._seconds, dict.fromkeys(STAGES, 0.0)
        return seconds

    def _sum(self) -> None:
        if self._cuda:
            self._marks[-1][1].synchronize()
        for (_, begun), (stage, ended) in pairwise(self._marks):
            self._seconds[stage] += begun.elapsed_time(ended) / 1e3 if self._cuda else ended - begun
        del self._marks[:-1]
