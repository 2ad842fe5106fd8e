"""The kernels of `low_rank_kernels.cpp` for a type of numbers, where `metatrain.compiled` can build them."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from metatrain import compiled
from metatrain.meta.low_rank_translate import BASE, OPERATION

_NUMBERS = {torch.float32: "float", torch.float64: "double"}
#: Arithmetic keeps NaN and infinity, and may add in another order, as vectors do.
_FLAGS = (
    *("-ftree-vectorize", "-fopenmp-simd", "-pthread"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
)


def kernels(dtype: torch.dtype, device: torch.device) -> ctypes.CDLL | None:
    """The kernels for tensors of that type and place, built where they are not yet; None: there are none."""
    if device.type != "cpu" or dtype not in _NUMBERS or not compiled.wanted():
        return None
    return compiled.loaded(_SOURCES[dtype])


def _bind(library: ctypes.CDLL) -> None:
    library.metatrain_operation_bytes.restype = ctypes.c_int64
    if library.metatrain_operation_bytes() != ctypes.sizeof(OPERATION):
        raise OSError("the low-rank kernels are of another layout")
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.metatrain_run.argtypes = [
        ctypes.POINTER(OPERATION), count, ctypes.POINTER(BASE), count, pointer, count, count, count, pointer, count,
    ]  # fmt: skip
    library.metatrain_run.restype = count


_SOURCES = {
    dtype: compiled.Source(
        Path(__file__).with_name("low_rank_kernels.cpp"),
        "low-rank kernels",
        _bind,
        "the low-rank inner loop runs by torch, at a quarter to a half of the speed",
        (*_FLAGS, f"-DNUMBER={number}"),
    )
    for dtype, number in _NUMBERS.items()
}
