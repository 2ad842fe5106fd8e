"""What a worker says of itself while it trains, and what it is asked for: plain memory between two of its threads.

The training thread says which stage of which step it begins. Another thread (`supervise.heart`) carries that to where
all workers are watched, and brings back what is asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable

#: Stages of a worker, as they are named where it hangs. Every rank goes through the same ones in the same order.
STAGES = ("start", "restore", "read", "forward", "backward", "update", "log", "validate", "checkpoint", "end")


class Pulse:
    """Where a worker is.

    Attributes:
        step: Steps of the run that are done.
        stage: One of `STAGES`.
        count: Stages begun so far: of ranks that wait for each other, the one with the least is waited for.
        first: The time (Unix) of each stage's first beginning.
        on_enter: Told of each stage that begins, where somebody follows: a profile.
    """

    def __init__(self) -> None:
        self.step, self.stage, self.count = 0, STAGES[0], 0
        self.first: dict[str, float] = {}
        self.on_enter: Callable[[str], None] | None = None
        self._since = time.monotonic()

    def enter(self, stage: str, step: int | None = None) -> None:
        """Says that a stage begins; takes less than a microsecond."""
        if step is not None:
            self.step = step
        self.stage = stage
        self.count += 1
        self._since = time.monotonic()
        if stage not in self.first:
            self.first[stage] = time.time()
        if self.on_enter is not None:
            self.on_enter(stage)

    def go_on(self) -> None:
        """Says that a long stage has come further."""
        self._since = time.monotonic()

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last stage began, or has come further."""
        return time.monotonic() - self._since


class Asked:
    """Checkpoints that rank 0 is asked to make at once: the group is to change, a node is to be taken away."""

    def __init__(self) -> None:
        self._asked = self._met = 0
        self._whole: dict[int, Callable[[], object]] = {}
        #: What for, of the last one.
        self.reason = ""

    def ask(self, reason: str, whole: Callable[[], object] = lambda: None) -> None:
        """From another thread: a checkpoint is wanted. `whole` is called when it is there."""
        self.reason = reason
        self._whole[self._asked + 1] = whole
        self._asked += 1

    @property
    def pending(self) -> int:
        """The number of the last wish, where it is not met; 0 where all are."""
        return self._asked if self._asked > self._met else 0

    def meet(self, number: int) -> None:
        """A checkpoint from after wish `number` is whole."""
        for met in range(self._met + 1, number + 1):
            self._whole.pop(met)()
        self._met = max(self._met, number)
