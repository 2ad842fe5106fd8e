"""Finding and killing processes of a run, by their titles, among the descendants of one process. Linux alone."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def _parents() -> dict[int, int]:
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # The name in brackets may hold spaces: fields count from behind it.
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it ended meanwhile
    return parents


def descendants(ancestor: int) -> set[int]:
    """Ids of all processes below one."""
    parents, found = _parents(), {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {ancestor}


def titled(ancestor: int, part: str) -> list[int]:
    """Descendants whose command line holds `part`, oldest first."""
    found = []
    for pid in sorted(descendants(ancestor)):
        try:
            if part in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace"):
                found.append(pid)
        except OSError:
            continue
    return found


def kill(pid: int) -> None:
    """`kill -9`."""
    os.kill(pid, signal.SIGKILL)


def alive(pids: set[int]) -> set[int]:
    """Those that still run (a zombie doesn't)."""
    running = set()
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                running.add(pid)
        except OSError:
            continue
    return running


def wait_for(condition, seconds: float, what: str):
    """Polls until `condition()` is truthy; returns it. AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds} s for {what}")
