"""Builds C++ sources of this package for this machine's processor, once, and loads them.

Promises: a library is built by the first process that needs it, in some seconds, and kept in the cache folder under a
name of all that it depends on: the source, the compiler, the processor's features. Processes may build at the same
time. Where there is no C++ compiler, or METATRAIN_KERNELS is 0, there is no library: the log says once what is done
without, with the same results up to rounding.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from metatrain.cache import cache_folder

_log = logging.getLogger(__name__)

_FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC")
#: Seconds after which a compiler that does not end is given up.
_PATIENCE = 120


@dataclass(frozen=True)
class Source:
    """A C++ source, and what is done where it cannot be built."""

    path: Path
    name: str  # what the log calls it: "low-rank kernels"
    bind: Callable[[ctypes.CDLL], object]  # declares the functions; OSError: it is of another layout
    without: str  # "the low-rank inner loop runs by torch, at a quarter of the speed"
    flags: tuple[str, ...] = ()
    library: Callable[[str], ctypes.CDLL] = ctypes.CDLL  # ctypes.PyDLL: calls too short to give the interpreter up for


def wanted() -> bool:
    """Whether METATRAIN_KERNELS leaves compiled code switched on."""
    return os.environ.get("METATRAIN_KERNELS") != "0"


def compiler() -> list[str] | None:
    """The C++ compiler: CXX, or the first of c++, g++ and clang++ that is there."""
    asked = shlex.split(os.environ.get("CXX", ""))
    commands = [asked] if asked else [["c++"], ["g++"], ["clang++"]]
    return next((command for command in commands if shutil.which(command[0])), None)


@functools.cache
def loaded(source: Source) -> ctypes.CDLL | None:
    """The library, built where it is not yet; None where it cannot be, which is said once in the log."""
    by = compiler()
    if by is None:
        _log.warning(
            "no C++ compiler is here (%s): %s; install one, or set CXX to it (METATRAIN_KERNELS=0: not to look)",
            os.environ.get("CXX") or "c++, g++ or clang++",
            source.without,
        )
        return None
    try:
        return _library(source, by)
    except (OSError, RuntimeError, subprocess.SubprocessError, AttributeError) as error:
        output = getattr(error, "stderr", None) or str(error)
        _log.warning(
            "the %s could not be built by %s, so %s (METATRAIN_KERNELS=0: not to try): %s",
            source.name,
            shlex.join(by),
            source.without,
            output.strip()[-2000:],
        )
        return None


def _library(source: Source, by: Sequence[str]) -> ctypes.CDLL:
    flags = [*_FLAGS, *_for_this_processor(), *source.flags]
    of = "\n".join([*flags, _output([*by, "--version"]), features()])
    key = hashlib.sha256(source.path.read_bytes() + of.encode()).hexdigest()[:16]
    place = cache_folder() / "kernels" / f"{source.path.stem}_{key}.so"
    if place.exists():
        with contextlib.suppress(OSError):  # cut short, or of another system's libraries: built again
            return _open(source, place)
    with tempfile.TemporaryDirectory(prefix="metatrain-kernels-") as folder:
        made, start = Path(folder) / place.name, time.monotonic()
        vectors = ["-lmvec"] if (platform.machine(), platform.libc_ver()[0]) == ("x86_64", "glibc") else []
        _output([*by, *flags, "-o", str(made), str(source.path), *vectors, "-lm"])
        library = _open(source, made)  # whose file may go: it is mapped
        _log.info("%s built by %s in %.1f s", source.name, shlex.join(by), time.monotonic() - start)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            # Beside it first: others may build, or read, at the same time.
            with tempfile.TemporaryDirectory(dir=place.parent) as beside:
                Path(shutil.copy(made, beside)).replace(place)
        except OSError as error:
            _log.info("they are not kept for other processes: %s", error)
    return library


def _open(source: Source, place: Path) -> ctypes.CDLL:
    library = source.library(str(place))
    source.bind(library)
    return library


def _output(command: Sequence[str]) -> str:
    options = {"capture_output": True, "encoding": "utf-8", "errors": "replace", "timeout": _PATIENCE, "check": True}
    return subprocess.run(command, **options).stdout


def _for_this_processor() -> list[str]:
    if platform.machine() == "x86_64":
        return ["-march=native", "-mprefer-vector-width=512"]
    return ["-mcpu=native"]


def features() -> str:
    """What `native` stands for: machines of one cluster may share a home folder and not a processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kept)}))
