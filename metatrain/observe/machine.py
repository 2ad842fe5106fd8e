"""What this process may use of the machine: CPUs and memory as its control group allows, and the NVIDIA driver."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path


def has_nvidia_driver() -> bool:
    """Whether the NVIDIA driver's library loads: what the gpu flavour of FBGEMM needs to be imported."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def cpu_count(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """CPUs this process may use: of its affinity, at most the control group's quota (version 2, or 1)."""
    limits = [float(len(os.sched_getaffinity(0)))]
    quota, _, period = _text(cgroup / "cpu.max").partition(" ")
    if not quota:
        quota, period = _text(cgroup / "cpu/cpu.cfs_quota_us"), _text(cgroup / "cpu/cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit():  # "max" and "-1" are no limit
        limits.append(int(quota) / int(period))
    return min(limits)


def memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory this process may use: the machine's, at most the control group's limit (version 2, or 1)."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [
        int(text) for name in ("memory.max", "memory/memory.limit_in_bytes") if (text := _text(cgroup / name)).isdigit()
    ]
    return min(limits)


def resident_bytes() -> int:
    """Memory of this process that is in RAM now, what it shares with others included."""
    pages = _text(Path("/proc/self/statm")).split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else 0


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
