"""The reader's kernels: `kernels.cpp`, built for this machine's processor, as functions.

What a reader does with every event of every step is done there; where it cannot be built, numpy does the same.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np

from metatrain import compiled


class RUNS(ctypes.Structure):
    """Runs of rows, as the kernels take them."""

    _fields_ = (
        ("sizes", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        ("which", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    )


@functools.cache  # asked for each column of each batch
def kernels() -> ctypes.CDLL | None:
    """The library, built where it is not yet; None: there is none, and numpy serves."""
    return compiled.loaded(_SOURCE) if compiled.wanted() else None


def address(array: np.ndarray) -> int:
    """Where an array's numbers are."""
    return array.__array_interface__["data"][0]  # a third of the time that array.ctypes.data takes


def _bind(library: ctypes.CDLL) -> None:
    pointer, number, runs = ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(RUNS)
    for name, *types in (
        ("gather", pointer, number, number, pointer, runs),
        ("lengths", pointer, number, pointer, pointer, pointer, runs),
        ("take", pointer, number, pointer, number, pointer, number, number),
        ("take_lengths", pointer, pointer, pointer, number, number, pointer, number, number),
        ("take_values", pointer, number, pointer, pointer, pointer, number, number),
        ("all_below", pointer, number, number),
        ("all_finite", pointer, number),
        ("draw", pointer, number, *[pointer] * 5, number),
        ("distinct_words", number),
        ("distinct", pointer, runs, number, number, pointer, pointer, pointer, pointer, number, pointer),
    ):
        function = getattr(library, f"metatrain_{name}")
        function.argtypes, function.restype = types, number


_SOURCE = compiled.Source(
    Path(__file__).with_name("kernels.cpp"),
    "reader's kernels",
    _bind,
    "readers put batches together by numpy, at two thirds of the speed, at a third where episodes are random",
    # Calls take microseconds, a window's some milliseconds: a reader that gave the interpreter's lock up for each would
    # wait for its read-ahead.
    library=ctypes.PyDLL,
)
