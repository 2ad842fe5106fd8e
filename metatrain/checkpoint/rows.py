"""Rows of a table as a differential checkpoint stores them: exactly, or in fewer bits with a bounded error.

- exact: the bytes of the rows.
- bfloat16: rounded to the nearest; off by at most 2⁻⁸ of a number (those smaller than 10⁻³⁸ by at most 10⁻⁴⁰).
- int8: each row by its own 256 levels from its least to its greatest number (Check-N-Run, NSDI 2022, section 4.2); off
  by at most (greatest − least) / 510, and the rounding of float32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from metatrain.errors import CheckpointError

Encoding = Literal["exact", "bfloat16", "int8"]

# Rows quantised at a time: that needs some four temporaries of twice their size.
_AT_ONCE = 1 << 15


def encoded(rows: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor | None]:
    """Rows [n, D] as they are stored: the data, and for int8 a float32 [n, 2] of each row's least number and step.

    Raises:
        CheckpointError: A number that is not finite, which int8 has no place for.
    """
    if encoding == "exact" or not rows.is_floating_point():
        return rows, None
    if encoding == "bfloat16":
        return rows.to(torch.bfloat16), None
    levels = torch.empty(rows.shape, dtype=torch.uint8)
    scales = torch.empty(rows.shape[0], 2)
    for piece in range(0, rows.shape[0], _AT_ONCE):
        part = slice(piece, piece + _AT_ONCE)
        _quantise(rows[part], levels[part], scales[part])
    return levels, scales


def _quantise(rows: Tensor, levels: Tensor, scales: Tensor) -> None:
    flat = rows.flatten(1).double()  # the difference of two float32 may be too great for one
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    if not bool(torch.isfinite(low + high).all()):
        raise CheckpointError(
            "A table has numbers that are not finite: they cannot be stored in 8 bits.",
            remedy="Lower the tables' rate, or set `train.checkpoint.rows: exact`.",
        )
    step = ((high - low) / 255).float().double()  # as it is stored
    nearest = ((flat - low) / torch.where(step > 0, step, 1.0)).round_().clamp_(0, 255)
    levels.copy_(nearest.reshape(levels.shape))
    scales.copy_(torch.cat([low, step], 1))


def decoded(data: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows again, as `dtype`."""
    if scales is None:
        return data.to(dtype)
    low, step = scales.double().split(1, 1)
    return torch.addcmul(low, data.flatten(1).double(), step).to(dtype).reshape(data.shape)
