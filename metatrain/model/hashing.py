"""Counter-based randomness for tensors: a draw is a function of named integers alone, on any device and rank.

`hashed` gives the same numbers as `data.randomness.hashed`, as int64 with the bits of its uint64.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

#: The lower 16 bits of each half of a word.
_LOW_OF_HALVES = 0x0000FFFF0000FFFF


def hashed(*counters: int | Tensor) -> Tensor:
    """A uniform 64-bit number for each tuple of counters, which are broadcast: int64 of their common shape."""
    device = next((c.device for c in counters if isinstance(c, Tensor)), torch.device("cpu"))
    state = torch.zeros((), dtype=torch.int64, device=device)
    for counter in counters:
        # In place but for the first: fresh memory takes longer to get than a product takes to compute.
        state = (state ^ (_signed(counter) if isinstance(counter, int) else counter)).add_(_signed(0x9E3779B97F4A7C15))
        state.bitwise_xor_(_shifted(state, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
        state.bitwise_xor_(_shifted(state, 27)).mul_(_signed(0x94D049BB133111EB))
        state.bitwise_xor_(_shifted(state, 31))
    return state


def chosen(share: float, *counters: int | Tensor) -> Tensor:
    """Whether each tuple of counters falls into a share (0 to 1) of all: bool."""
    return _shifted(hashed(*counters), 11) < int(share * 2**53)


def normal(hashes: Tensor, deviation: float) -> Tensor:
    """Hashes as nearly normal numbers of mean 0: the sum of four uniform ones, within 3.5 deviations. float32.

    Made of integers and one product, so that every device gives the same bits.
    """
    # Two 16-bit numbers in each half of a word are added at once, then the halves.
    halves = (hashes >> 16).bitwise_and_(_LOW_OF_HALVES).add_(hashes & _LOW_OF_HALVES)
    parts = (halves >> 32).add_(halves).bitwise_and_(0x3FFFF)
    return parts.sub_(2 * 0xFFFF).to(torch.float32).mul_(deviation * math.sqrt(3.0) / 2**16)


def of_name(name: str) -> int:
    """A number for a name, the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def _signed(number: int) -> int:
    """The int64 with the bits of a number modulo 2**64."""
    number %= 2**64
    return number - 2**64 if number >= 2**63 else number


def _shifted(state: Tensor, bits: int) -> Tensor:
    """A shift to the right that brings in zeros, as for unsigned numbers."""
    return (state >> bits).bitwise_and_((1 << (64 - bits)) - 1) if bits else state
