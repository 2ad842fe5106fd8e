"""How many readers keep up with a trainer, and how many steps may wait for it: found from what was measured.

Neither changes a batch: readers share out the lanes, and a batch is what the plan says of them.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

#: Calls of the readers between two decisions, and such as are not looked at after a change: files are opened then.
CALLS, UNTIMED = 8, 2
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

    def timed(self, steps: int, reading: float, training: float) -> None:
        """Takes a call's times.

        Args:
            steps: Steps in it.
            reading: Seconds of the slowest reader.
            training: Seconds that the worker spent on steps since the call before, without its wait for this one.
        """
        if self._untimed:
            self._untimed -= 1
        else:
            self._timed.append((reading / steps, training / steps))

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

    def ahead(self, prefetch: int) -> int:
        """Steps that may be in flight: `prefetch`, or fewer where their bytes would be too many. Two at the start."""
        if not self._step_bytes:
            return min(2, prefetch)
        return max(1, min(prefetch, self._memory // self._step_bytes))
