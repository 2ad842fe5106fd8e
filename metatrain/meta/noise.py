"""Normal noise that is a function of a task's labels alone, for methods that sample.

Promises: the same task with the same support and query gets the same noise on any rank, in any bucket, at any world
size and in a resumed run, since nothing draws from a generator; the order of events says nothing. Labels are what it
is a function of because they are read from outside and exact: a hash of anything computed would turn the last bit's
rounding into other noise. Tasks with the same labels get the same noise; those of an epoch differ, and a task whose
support and query change from epoch to epoch gets other noise in each.

Symbols: T tasks, E events (padded), W width of the noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metatrain.meta.episode import Examples

_GOLDEN = 0x9E3779B97F4A7C15
_SUPPORT, _QUERY = 1, 2


def label_noise(support: Examples, query: Examples, width: int) -> Tensor:
    """Nearly normal numbers of mean 0 and deviation 1 for each task: [T, W], in the labels' type.

    Each is the sum of four uniform ones, so within 3.5 deviations; made of integers and one product, so that every
    device gives the same.
    """
    key = _of_labels(support, _SUPPORT) + _of_labels(query, _QUERY)
    counters = torch.arange(width, device=key.device) * _signed(_GOLDEN)
    hashes = _mixed(_mixed(key).unsqueeze(-1) + counters)
    parts = torch.stack([_shifted(hashes, 16 * part) & 0xFFFF for part in range(4)]).sum(0)
    return (parts - 2 * 0xFFFF).to(support.labels.dtype) * (math.sqrt(3.0) / 2**16)


def _of_labels(examples: Examples, salt: int) -> Tensor:
    """A number for the labels of each task's events, whatever their order: int64 [T]."""
    # 0 is added for the sake of -0, which has other bits.
    bits = (examples.labels.double() + 0.0).view(torch.int64)
    # A sum of integers wraps around, and doesn't depend on the order.
    return (_mixed(_mixed(bits) + salt) * (examples.mask > 0)).sum(-1)


def _mixed(state: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection that looks random."""
    state = state + _signed(_GOLDEN)
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shifted(state, 31)


def _signed(number: int) -> int:
    """The int64 with the bits of a number below 2**64."""
    return number - 2**64 if number >= 2**63 else number


def _shifted(state: Tensor, bits: int) -> Tensor:
    """A shift to the right that brings in zeros, as for unsigned numbers."""
    return (state >> bits) & ((1 << (64 - bits)) - 1) if bits else state
