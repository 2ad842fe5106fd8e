"""Builds `low_rank_kernels.cpp` for this machine's processor, once, and loads it.

Promises: a library is built by the first process that needs it, in some seconds, and kept in ~/.cache/metatrain, or the
folder that METATRAIN_CACHE names, under a name of all that it depends on: the source, the compiler, the processor's
features. Processes may build at the same time. Where there is no C++ compiler, or METATRAIN_KERNELS is 0, there are no
kernels, and the log says so once: `low_rank` then runs by torch, with the same results up to rounding.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from metatrain.meta.low_rank_translate import BASE, OPERATION

_log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("low_rank_kernels.cpp")
_NUMBERS = {torch.float32: "float", torch.float64: "double"}
#: Arithmetic keeps NaN and infinity, and may add in another order, as vectors do.
_FLAGS = (
    *("-std=c++17", "-O2", "-ftree-vectorize", "-fopenmp-simd", "-shared", "-fPIC", "-pthread"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
)
#: Seconds after which a compiler that does not end is given up.
_PATIENCE = 120


def kernels(dtype: torch.dtype, device: torch.device) -> ctypes.CDLL | None:
    """The kernels for tensors of that type and place, built where they are not yet; None: there are none."""
    if device.type != "cpu" or dtype not in _NUMBERS or os.environ.get("METATRAIN_KERNELS") == "0":
        return None
    return _loaded(_NUMBERS[dtype])


def compiler() -> list[str] | None:
    """The C++ compiler that kernels are built by: CXX, or the first of c++, g++ and clang++ that is there."""
    asked = shlex.split(os.environ.get("CXX", ""))
    commands = [asked] if asked else [["c++"], ["g++"], ["clang++"]]
    return next((command for command in commands if shutil.which(command[0])), None)


@functools.cache
def _loaded(number: str) -> ctypes.CDLL | None:
    by = compiler()
    if by is None:
        _log.warning(
            "no C++ compiler is here (%s): the low-rank inner loop runs by torch, at a quarter to a half of the speed; "
            "install one, or set CXX to it (METATRAIN_KERNELS=0: not to look)",
            os.environ.get("CXX") or "c++, g++ or clang++",
        )
        return None
    try:
        return _library(by, number)
    except (OSError, RuntimeError, subprocess.SubprocessError, AttributeError) as error:
        output = getattr(error, "stderr", None) or str(error)
        _log.warning(
            "the low-rank kernels could not be built by %s, so the inner loop runs by torch, at a quarter to a half "
            "of the speed (METATRAIN_KERNELS=0: not to try): %s",
            shlex.join(by),
            output.strip()[-2000:],
        )
        return None


def _library(by: list[str], number: str) -> ctypes.CDLL:
    flags = [*_FLAGS, *_for_this_processor(), f"-DNUMBER={number}"]
    of = "\n".join([*flags, _output([*by, "--version"]), _features()])
    name = f"low_rank_{number}_{hashlib.sha256(_SOURCE.read_bytes() + of.encode()).hexdigest()[:16]}.so"
    place = Path(os.environ.get("METATRAIN_CACHE") or Path.home() / ".cache" / "metatrain") / "kernels" / name
    if place.exists():
        with contextlib.suppress(OSError):  # cut short, or of another system's libraries: built again
            return _open(place)
    with tempfile.TemporaryDirectory(prefix="metatrain-kernels-") as folder:
        made, start = Path(folder) / name, time.monotonic()
        vectors = ["-lmvec"] if (platform.machine(), platform.libc_ver()[0]) == ("x86_64", "glibc") else []
        _output([*by, *flags, "-o", str(made), str(_SOURCE), *vectors, "-lm"])
        library = _open(made)  # whose file may go: it is mapped
        _log.info("low-rank kernels built by %s in %.1f s", shlex.join(by), time.monotonic() - start)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            # Beside it first: others may build, or read, at the same time.
            with tempfile.TemporaryDirectory(dir=place.parent) as beside:
                Path(shutil.copy(made, beside)).replace(place)
        except OSError as error:
            _log.info("they are not kept for other processes: %s", error)
    return library


def _output(command: list[str]) -> str:
    options = {"capture_output": True, "encoding": "utf-8", "errors": "replace", "timeout": _PATIENCE, "check": True}
    return subprocess.run(command, **options).stdout


def _open(place: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(place))
    library.metatrain_operation_bytes.restype = ctypes.c_int64
    if library.metatrain_operation_bytes() != ctypes.sizeof(OPERATION):
        raise OSError(f"{place} is of another layout")
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.metatrain_run.argtypes = [
        ctypes.POINTER(OPERATION), count, ctypes.POINTER(BASE), count, pointer, count, count, count, pointer, count,
    ]  # fmt: skip
    library.metatrain_run.restype = count
    return library


def _for_this_processor() -> list[str]:
    if platform.machine() == "x86_64":
        return ["-march=native", "-mprefer-vector-width=512"]
    return ["-mcpu=native"]


def _features() -> str:
    """What `native` stands for: machines of one cluster may share a home folder and not a processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kept)}))
