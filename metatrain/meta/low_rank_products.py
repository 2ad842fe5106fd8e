"""Products of one large matrix with weights that all tasks share, by the quicker of the two libraries inside torch.

Promises: what `torch.mm`, `torch.addmm` and `Tensor.addmm_` give, up to rounding; which library multiplies depends on
the machine, the type and the shapes alone, so a run on one machine is the same bit for bit whenever it is repeated.

On AMD processors the Intel MKL that torch is built with keeps to AVX2, half of what a core with AVX-512 can do; oneDNN,
which is in torch as well, does not. Measured on one core of an AMD EPYC of family 26: 80 to 100 GFLOP/s by MKL, 150 to
215 by oneDNN for the same product, the copy of its result included (tools/bench_products.py).
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

#: Operations below which oneDNN's longer call (some 10 µs) costs more than it saves.
_WORTH_A_CALL = 4e6


def multiply(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """out = a b: [M, K], [K, N] → [M, N]."""
    if _by_onednn(a, b):
        out.copy_(_onednn(a, b, None))
    else:
        torch.mm(a, b, out=out)


def multiply_add(bias: Tensor, a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """out = a b + bias, with bias [N]."""
    if _by_onednn(a, b):
        out.copy_(_onednn(a, b, bias))
    else:
        torch.addmm(bias, a, b, out=out)


def accumulate(into: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0) -> None:
    """into = beta into + a b, with into [M, N]."""
    if not _by_onednn(a, b):
        into.addmm_(a, b, beta=beta)
    elif beta == 0:
        into.copy_(_onednn(a, b, None))
    else:
        into.mul_(beta).add_(_onednn(a, b, None)) if beta != 1 else into.add_(_onednn(a, b, None))


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    # The operation behind torch.compile's linear layers: x, weight [N, K], bias, and no function after it.
    return torch.ops.mkldnn._linear_pointwise.default(a, b.t(), bias, "none", [], "")


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    if a.dtype is not torch.float32 or a.device.type != "cpu" or not prefers_onednn():
        return False
    if not (b.is_contiguous() or b.t().is_contiguous()):
        return False  # weights with gaps between their rows take oneDNN a hundred times as long
    return 2.0 * a.shape[0] * a.shape[1] * b.shape[1] >= _WORTH_A_CALL


@functools.cache
def prefers_onednn() -> bool:
    """Whether this machine's float32 products on CPU run by oneDNN: an AMD processor with AVX-512, MKL in torch."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or "AuthenticAMD" not in _vendor():
        return False
    # Not a public operation: a torch without it, or with another meaning, is served by `torch.mm`.
    a, b, bias = torch.eye(3)[:2], torch.arange(12.0).view(3, 4), torch.ones(4)
    try:
        return torch.equal(_onednn(a, b, bias), torch.addmm(bias, a, b))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("vendor_id")), "")
