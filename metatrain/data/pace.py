"""How many readers keep up with a trainer, how many steps they make in one call, and how many may wait for it: found
from what was measured.

Neither changes a batch: readers share out the lanes, and a batch is what the plan says of them.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Literal

#: Calls of the readers between two decisions, and such as are not looked at after a change: files are opened then.
CALLS, UNTIMED = 8, 2
#: Bytes of batches that a reader makes in one call, where they are many steps: a call takes a reader about as long as
#: some hundred tasks do, however small it is.
CALL_BYTES = 16 << 20
#: With `prefetch: auto`, the least steps to work ahead, and the most calls in flight: a call ends with its epoch.
LEAST_AHEAD = MOST_CALLS = 16
# Readers are to need less than this share of the trainer's time, so that a slow batch leaves no gap.
_SHARE = 0.8


class Pace:
    """What is known of a worker's readers and of the time that the worker itself takes.

    Args:
        readers: Readers that there are.
        most: Readers that there may be.
        memory: Bytes of batches that may wait for the worker.
    """

    def __init__(self, readers: int, most: int, memory: int) -> None:
        self._readers, self._most, self._memory = readers, max(readers, most), memory
        self._step_bytes = 0
        self._restart()

    def _restart(self) -> None:
        self._untimed = UNTIMED
        self._timed: deque[tuple[float, float]] = deque(maxlen=CALLS)

    def sized(self, steps: int, size: int) -> None:
        """Takes the bytes of a call's batches, of all readers together."""
        self._step_bytes = max(self._step_bytes, size // max(1, steps))

    def timed(self, steps: int, reading: float, trained: int, training: float) -> None:
        """Takes a call's times.

        Args:
            steps: Steps in it.
            reading: Seconds of the slowest reader.
            trained: Steps of the call before.
            training: Seconds that the worker spent on those, without its wait for this call.
        """
        if self._untimed:
            self._untimed -= 1
        else:
            self._timed.append((reading / steps, training / trained))

    def wanted(self) -> int:
        """Readers that would keep up, at most so many as may be; as many as there are until enough was measured."""
        if len(self._timed) < CALLS:
            return self._readers
        reading, training = (median(values) for values in zip(*self._timed, strict=True))
        needed = math.ceil(self._readers * reading / (_SHARE * training)) if training > 0 else self._most
        return min(self._most, max(self._readers, needed))

    def now(self, readers: int) -> None:
        """There are so many readers from here on: what was timed before does not count any more."""
        self._readers = readers
        self._restart()

    def no_more(self) -> None:
        """There is no room for more readers than there are."""
        self._most = self._readers

    def ahead(self, prefetch: int | Literal["auto"]) -> int:
        """Steps that may be in flight: `prefetch`, or fewer where their bytes would be too many. Two at the start."""
        if not self._step_bytes:
            return 2 if prefetch == "auto" else min(2, prefetch)
        wanted = max(LEAST_AHEAD, 2 * self._large()) if prefetch == "auto" else prefetch
        return max(1, min(wanted, self._memory // self._step_bytes))

    def call(self, prefetch: int | Literal["auto"], before: int) -> int:
        """Steps of a call, at most half of those in flight, so that readers work while the worker uses what they made.

        Args:
            prefetch: As for `ahead`.
            before: Steps of the call before, 0 at a new place: a call has at most twice as many, so that the first
                batches don't wait for a large one.
        """
        return max(1, min(self.ahead(prefetch) // 2, self._large(), 2 * before))

    def _large(self) -> int:
        return max(1, CALL_BYTES * self._readers // max(1, self._step_bytes))
