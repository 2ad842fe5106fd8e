"""For `tools/chaos.py`: memory, open files, shared memory and Ray's objects of a job, sampled while it runs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

# Beside this file.
from bench_common import descendants, private_bytes
from chaos_cluster import Command, Nodes

SECONDS = 5.0
#: Share of the samples at the beginning that no slope is fitted to: caches fill, tables are touched.
WARM_UP = 0.2
#: By the unit: growth, over all the time that is fitted, that counts as flat.
FLAT = {"MiB": 16.0, "files": 4.0, "objects": 8.0}


class Sampler:
    """Takes samples of everything that descends from a process, by what it is.

    Args:
        root: The process that started all, itself left out.
        command: What trains.
        nodes: Ray's nodes.
    """

    def __init__(self, root: int, command: Command, nodes: Nodes) -> None:
        self._root, self._command, self._nodes = root, command, nodes
        self._due = 0.0
        self.samples: list[tuple[float, dict[str, float]]] = []

    def sample(self) -> None:
        """Takes a sample, where one is due."""
        if (now := time.monotonic()) < self._due:
            return
        self._due = now + SECONDS
        found: dict[str, float] = {"shared memory, MiB": 0.0}
        for pid in descendants(self._root):
            found["shared memory, MiB"] += _shared(pid) / 2**20
            if pid != self._root and (role := self._role(pid)):
                for name, value in ((f"{role}, MiB", private_bytes(pid) / 2**20), (f"{role}, files", _files(pid))):
                    found[name] = found.get(name, 0.0) + value
        objects, size = self._nodes.stores()
        found |= {"Ray's stores, objects": float(objects), "Ray's stores, MiB": size / 2**20}
        self.samples.append((now, found))

    def slopes(self) -> dict[str, dict[str, float]]:
        """Of each quantity: its median in the first and last fifth of the fitted time, and its slope an hour."""
        fitted = self.samples[int(WARM_UP * len(self.samples)) :]
        if len(fitted) < 10:
            return {}
        result = {}
        for name in sorted({name for _, found in fitted for name in found}):
            points = np.array([(at, found.get(name, 0.0)) for at, found in fitted])
            fifth = max(1, len(points) // 5)
            first, last = (float(np.median(part[:, 1])) for part in (points[:fifth], points[-fifth:]))
            result[name] = {"first": first, "last": last, "an hour": 3600 * _theil_sen(points)}
        return result

    def problems(self) -> list[str]:
        """What grew."""
        if not self.samples:
            return ["no resource was sampled"]
        hours = (self.samples[-1][0] - self.samples[0][0]) * (1 - WARM_UP) / 3600
        return [
            f"grows: {name}, from {at['first']:.1f} to {at['last']:.1f}, {at['an hour']:.1f} an hour"
            for name, at in self.slopes().items()
            if min(at["an hour"] * hours, at["last"] - at["first"]) > FLAT[name.rpartition(", ")[2]]
        ]

    def report(self) -> str:
        """The slopes, one a line."""
        lines = [f"{'resource':<28} {'first':>9} {'last':>9} {'an hour':>9}   ({len(self.samples)} samples)"]
        lines += [
            f"{name:<28} {at['first']:9.1f} {at['last']:9.1f} {at['an hour']:+9.2f}"
            for name, at in self.slopes().items()
        ]
        return "\n".join(lines)

    def _role(self, pid: int) -> str | None:
        if pid == self._command.process.pid:
            return "command"
        try:
            line = Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            return None
        if line.startswith("ray::"):
            name = line[len("ray::") :].split("(")[0].split(".")[0].split(":")[0].strip()
            return "idle" if name.startswith("IDLE") else name
        words = [word for word in line.split() if not word.startswith("-")]
        # A service of Ray's: a program, or Python with a file.
        named = next((word for word in words[1:2] if word.endswith(".py")), words[0]) if words else ""
        return f"Ray's {Path(named).stem}" if named else None


def _shared(pid: int) -> int:
    """A process's part of the shared memory that it has touched; 0 when it has ended."""
    try:
        for line in Path("/proc", str(pid), "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Shmem:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _files(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def _theil_sen(points: np.ndarray) -> float:
    """The median slope between two points: what a restart does to a few of them doesn't move it."""
    some = points[np.linspace(0, len(points) - 1, min(len(points), 400)).astype(int)]
    i, j = np.triu_indices(len(some), 1)
    return float(np.median((some[j, 1] - some[i, 1]) / (some[j, 0] - some[i, 0])))
