"""Positions of consecutive segments, by numpy alone."""

from __future__ import annotations

import numpy as np


def segments(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The positions start, start + 1, … of each segment, behind one another: int64 [sum of lengths]."""
    if not lengths.all():
        some = lengths > 0
        starts, lengths = starts[some], lengths[some]
    ends = np.cumsum(lengths)
    found = np.repeat(starts - ends + lengths, lengths)
    found += counting(len(found))
    return found


# 0, 1, 2, …, kept from one use to the next: making it anew would take longer than all else in `segments`.
_numbers = np.arange(0)
_KEPT_NUMBERS = 1 << 20


def counting(n: int) -> np.ndarray:
    """0 to n - 1, not to be written to."""
    global _numbers
    numbers = _numbers
    if len(numbers) < n:
        numbers = np.arange(max(n, min(2 * n, _KEPT_NUMBERS)))
        if len(numbers) <= _KEPT_NUMBERS:
            _numbers = numbers
    return numbers[:n]
