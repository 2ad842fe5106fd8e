"""Solves one symmetric positive definite system a task, by Cholesky, with a backward pass that uses the factor again.

torch.linalg.solve factorises by LU, twice the work, and knows nothing of symmetry. Measured gain: see
`python tools/bench_closed_form.py`.

Symbols: T tasks, N unknowns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def solve(system: Tensor, right: Tensor) -> Tensor:
    """The x of `system` x = `right`: [T, N, N], [T, N] → [T, N]; differentiable once.

    Args:
        system: Symmetric positive definite. Only one triangle is read; the gradient is that of A⁻¹ b in all of A, so
            A must be symmetric by how it was made (XᵀX + I).
        right: Right-hand sides.

    A task whose system is not positive definite in its precision, or not finite, gets NaN, and no other task does:
    the training loop tells of a loss that is not finite, where an exception would blame nobody.
    """
    return _Solve.apply(system, right)  # type: ignore[return-value]


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, system: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
        factor, failed = torch.linalg.cholesky_ex(system)
        # Without a look at `failed` from Python, which would wait for a GPU.
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        diagonal.masked_fill_(failed.bool().unsqueeze(-1), torch.nan)
        x = _by_factor(factor, right)
        ctx.save_for_backward(factor, x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_x: Tensor) -> tuple[Tensor | None, Tensor]:  # type: ignore[override]
        factor, x = ctx.saved_tensors
        by_right = _by_factor(factor, by_x)
        by_system = -by_right.unsqueeze(-1) * x.unsqueeze(-2) if ctx.needs_input_grad[0] else None
        return by_system, by_right


def _by_factor(factor: Tensor, right: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ b. Two triangular solves: torch.cholesky_solve takes up to four times as long on many small systems."""
    half = torch.linalg.solve_triangular(factor, right.unsqueeze(-1), upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True).squeeze(-1)
