"""Whether a machine's cores are its own while something is measured.

    python tools/bench_quiet.py [--seconds 10]

The cores of a virtual machine are often threads of cores that it shares with other machines: what runs there makes them
slower by half, comes and goes within milliseconds, and shows in none of the system's counts. It shows in the speed of
simple arithmetic, which is sampled here on every core, 1 % of its time. Alone, the tool shows what it finds.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from metatrain import compiled

#: Of the greatest speed seen: from here on a core is this machine's alone.
WHOLE = 0.85
_MICROSECONDS = 3000
#: Some samples of each core.
_LEAST_SECONDS = 0.02


class Quiet:
    """Samples the cores' speed while the block runs.

    Raises:
        SystemExit: There is no C++ compiler.
    """

    def __init__(self) -> None:
        if compiled.loaded(_SOURCE) is None:
            raise SystemExit("watching the cores takes a C++ compiler")
        self._folder = tempfile.TemporaryDirectory(prefix="metatrain-quiet-")
        self._file = Path(self._folder.name, "samples")
        self._file.touch()

    def __enter__(self) -> Quiet:
        self._process = subprocess.Popen([sys.executable, __file__, "--into", str(self._file)])
        while not self._file.stat().st_size:
            if self._process.poll() is not None:
                raise SystemExit("the process that watches the cores ended")
            time.sleep(0.01)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()

    def share(self, begin: float, end: float) -> float:
        """Share of the samples between two times of `time.monotonic` in which a core was at full speed: of the core
        that had the least of it. Short times are looked at with what came before; without samples it is 0."""
        samples, begin = self._samples(), min(begin, end - _LEAST_SECONDS)
        within = samples[(samples[:, 0] >= begin) & (samples[:, 0] < end)]
        whole = WHOLE * np.quantile(samples[:, 2], 0.99)
        shares = [(within[within[:, 1] == core, 2] >= whole) for core in np.unique(samples[:, 1])]
        return min(float(core.mean()) if len(core) else 0.0 for core in shares)

    def _samples(self) -> np.ndarray:
        raw = self._file.read_bytes()
        return np.frombuffer(raw[: len(raw) // 24 * 24], np.float64).reshape(-1, 3)


def _bind(library: ctypes.CDLL) -> None:
    library.metatrain_watch.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.c_int64), ctypes.c_int64, ctypes.c_int64]
    library.metatrain_watch.restype = ctypes.c_int64


_SOURCE = compiled.Source(
    Path(__file__).with_name("core_speed.cpp"), "watch of the cores", _bind, "the cores are not watched", ("-pthread",)
)


def main() -> None:
    """Parse the command line; watch, and show or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--into", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.into:
        cores = sorted(os.sched_getaffinity(0))
        library = compiled.loaded(_SOURCE)
        assert library is not None
        library.metatrain_watch(options.into.encode(), (ctypes.c_int64 * len(cores))(*cores), len(cores), _MICROSECONDS)
        return
    with Quiet() as quiet:
        while options.seconds > 0:
            begun = time.monotonic()
            time.sleep(min(1.0, options.seconds))
            options.seconds -= 1.0
            print(f"alone {quiet.share(begun, time.monotonic()):.0%} of the time", flush=True)


if __name__ == "__main__":
    main()
