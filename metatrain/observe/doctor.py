"""What this machine and environment are, and what is wrong with them: each check ends in a value, never in a raise.

The report is a list of checks, each ok, warn (works, but slower or not as meant) or fail (commands will not work),
the last two with a remedy. TorchRec, FBGEMM and Ray are tried in processes of their own: what breaks their import
must not break the report about it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from packaging.requirements import Requirement

from metatrain.observe.machine import cpu_count, has_nvidia_driver, memory_bytes

GIB = 2**30
#: Folder that FBGEMM's two flavours share, by the name of their distributions.
FLAVOURS = {"fbgemm-gpu": "gpu", "fbgemm-gpu-cpu": "cpu"}
_AGAIN = "In a clone: `rm -rf .venv`, then `make setup`. Elsewhere: see Installation in README.md."

_NO_KERNELS = (
    "On CPUs MAML's inner loop and what surrounds it go by torch, a few times slower, and readers by numpy: install a "
    "C++ compiler (g++ or clang++)."
)
_TRY_TABLES = "import fbgemm_gpu, torchrec"
_TRY_KERNELS = """
import sys, torch
from metatrain.data.kernels import kernels
from metatrain.meta import low_rank_build
from metatrain.model import picking
inner_loop = low_rank_build.kernels(torch.float32, torch.device("cpu"))
sys.exit(any(library is None for library in (kernels(), picking.kernels(), inner_loop)))
"""
_TRY_RAY = """
import ray
from metatrain.local_ray import local_ray
with local_ray(num_cpus=1, object_store_memory=100 * 2**20):
    print(ray.get(ray.remote(lambda: "started").remote()))
"""


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One thing examined: its name, the value found, how that is, and what to do where it is not well."""

    name: str
    value: str
    status: Status = Status.OK
    remedy: str | None = None


@dataclass(frozen=True)
class Report:
    """All checks, in the order of showing."""

    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether no check failed."""
        return all(check.status is not Status.FAIL for check in self.checks)

    def render(self) -> str:
        """A table, a line a check, a remedy under each that is not well; the verdict last."""
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            mark = check.status.upper() if check.status is Status.FAIL else check.status.value
            lines.append(f"{mark:<5} {check.name:<{width}}  {check.value}")
            if check.remedy:
                lines.append(f"{'':<5} {'':<{width}}  → {check.remedy}")
        counts = {status: sum(check.status is status for check in self.checks) for status in Status}
        lines += ["", f"{counts[Status.OK]} ok, {counts[Status.WARN]} to note, {counts[Status.FAIL]} to mend"]
        return "\n".join(lines)


def examine(folder: str = ".", try_ray: bool = True) -> Report:
    """Examines versions, FBGEMM's flavour, devices, Ray, and the machine's room.

    Args:
        folder: Where runs and datasets would be written: its disk is looked at.
        try_ray: Whether to start Ray for a moment (5 to 20 seconds), which alone proves that it can.
    """
    # Started first: they take seconds, in which the rest is looked at.
    tables, kernels = _start(_TRY_TABLES), _start(_TRY_KERNELS)
    ray = _start(_TRY_RAY) if try_ray else None
    versions = installed(("torch", "torchrec", *FLAVOURS, "ray"))
    driver = has_nvidia_driver()
    checks = [
        python_check(sys.version_info[:2], platform.python_version()),
        *requirement_checks(),
        _version_check("torch", versions["torch"]),
        *table_checks(versions, driver),
        device_check(driver),
        _version_check("Ray", versions["ray"]),
        cpu_check(cpu_count()),
        memory_check(memory_bytes()),
        disk_check("disk of this folder", folder),
        disk_check("disk of temporary files", tempfile.gettempdir()),
        shared_memory_check(Path("/dev/shm")),
        descriptor_check(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        _ended(tables, "FBGEMM and TorchRec", "both import", _AGAIN, seconds=120),
        _ended(kernels, "kernels", "built for this processor", _NO_KERNELS, seconds=180, bad=Status.WARN),
    ]
    if ray is not None:
        remedy = "See the last lines of /tmp/ray/session_latest/logs/; often no room in /dev/shm or in /tmp."
        checks.append(_ended(ray, "Ray starts here", "started, ran a task, stopped", remedy, seconds=120))
    return Report(tuple(checks))


# --- versions ------------------------------------------------------------------------------------------------------


def installed(names: tuple[str, ...]) -> dict[str, str | None]:
    """Version of each distribution, None where it is not installed. Imports none of them."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in names}


def python_check(version: tuple[int, int], text: str) -> Check:
    """Python must be 3.11: what the pinned wheels are chosen for."""
    if version == (3, 11):
        return Check("Python", text)
    return Check("Python", text, Status.FAIL, f"Use Python 3.11. {_AGAIN}")


def requirement_checks() -> list[Check]:
    """Whether the installed distributions are the ones that metatrain's metadata asks for."""
    try:
        texts = importlib.metadata.requires("metatrain") or []
        version = importlib.metadata.version("metatrain")
    except importlib.metadata.PackageNotFoundError:
        return [Check("metatrain", "not installed, run from its folder", Status.WARN, "Install it: `make setup`.")]
    wanted = [r for r in map(Requirement, texts) if r.marker is None or r.marker.evaluate({"extra": ""})]
    found = installed(tuple(r.name for r in wanted))
    wrong = [
        Check(r.name, found[r.name] or "not installed", Status.FAIL, f"metatrain needs {r}. {_AGAIN}")
        for r in wanted
        if found[r.name] is None or not r.specifier.contains(str(found[r.name]), prereleases=True)
    ]
    summary = f"{version}; {len(wanted) - len(wrong)} of {len(wanted)} requirements met"
    return [Check("metatrain", summary), *wrong]


def _version_check(name: str, version: str | None) -> Check:
    return Check(name, version) if version else Check(name, "not installed", Status.FAIL, _AGAIN)


def table_checks(versions: Mapping[str, str | None], driver: bool) -> list[Check]:
    """TorchRec and FBGEMM: exactly one flavour, one that this machine can import, and equal minors.

    Args:
        versions: Of torchrec, fbgemm-gpu and fbgemm-gpu-cpu, None where not installed.
        driver: Whether the NVIDIA driver's library is here.
    """
    torchrec = versions["torchrec"]
    flavours = {FLAVOURS[name]: version for name in FLAVOURS if (version := versions[name])}
    checks = [_version_check("TorchRec", torchrec)]
    if len(flavours) > 1:
        value = " and ".join(f"{flavour} {version}" for flavour, version in sorted(flavours.items()))
        remedy = f"The two flavours overwrite each other's files: keep one. {_AGAIN}"
        return [*checks, Check("FBGEMM", value, Status.FAIL, remedy)]
    if not flavours:
        return [*checks, Check("FBGEMM", "not installed", Status.FAIL, _AGAIN)]
    [(flavour, version)] = flavours.items()
    value = f"{version}, {flavour} flavour"
    if flavour == "gpu" and not driver:
        remedy = f"The gpu flavour needs the NVIDIA driver even to import: use fbgemm-gpu-cpu here. {_AGAIN}"
        checks.append(Check("FBGEMM", value, Status.FAIL, remedy))
    elif torchrec and _minor(torchrec) != _minor(version):
        remedy = f"The minors of TorchRec ({torchrec}) and FBGEMM must be equal. {_AGAIN}"
        checks.append(Check("FBGEMM", value, Status.FAIL, remedy))
    elif flavour == "cpu" and driver:
        remedy = f"The NVIDIA driver is here: the gpu flavour would use it. {_AGAIN}"
        checks.append(Check("FBGEMM", value, Status.WARN, remedy))
    else:
        checks.append(Check("FBGEMM", value))
    return checks


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])


# --- devices and room ----------------------------------------------------------------------------------------------


def device_check(driver: bool) -> Check:
    """The GPUs that torch can use; a driver that torch cannot use is worth a note."""
    try:
        import torch
    except Exception as error:  # a broken install raises anything: OSError, ImportError, RuntimeError
        return Check("devices", f"torch does not import: {error}", Status.FAIL, _AGAIN)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
        return Check("devices", f"{count} GPU: {names}; CUDA {torch.version.cuda}")
    if driver:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
        remedy = "Check `nvidia-smi`, CUDA_VISIBLE_DEVICES, and that torch is a CUDA build the driver can run."
        return Check("devices", f"CPU: torch, built for {built}, sees no GPU", Status.WARN, remedy)
    return Check("devices", "CPU")


def cpu_check(count: float) -> Check:
    """Two workers and their readers on less than two CPUs take turns."""
    if count < 2:
        return Check("CPUs", f"{count:g}", Status.WARN, "Use one worker (`--train.workers 1`), or more CPUs.")
    return Check("CPUs", f"{count:g}")


def memory_check(size: int) -> Check:
    """Ray and two workers take about 3 GiB before any data."""
    value = f"{size / GIB:.1f} GiB"
    if size < 4 * GIB:
        return Check("memory", value, Status.WARN, "At least 4 GiB are needed for two workers: use one, or give more.")
    return Check("memory", value)


def disk_check(name: str, folder: str) -> Check:
    """Free disk; Ray stops putting objects on a disk that is more than 95 % full."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return Check(name, f"{folder}: {error.strerror}", Status.FAIL, "Name a folder that exists and can be read.")
    value = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free ({os.path.abspath(folder)})"
    if usage.free < GIB:
        return Check(name, value, Status.FAIL, "Make room: at least 1 GiB.")
    if usage.free < usage.total * 0.05:
        return Check(name, value, Status.WARN, "More than 95 % full, where Ray stops spilling to disk: make room.")
    return Check(name, value)


def shared_memory_check(folder: Path) -> Check:
    """Room for Ray's object store, which carries the batches; too little and Ray takes a slow disk."""
    name = "shared memory"
    if not folder.is_dir():
        return Check(name, f"no {folder}", Status.WARN, "Ray will use the disk in its place, which is slow.")
    usage = shutil.disk_usage(folder)
    value = f"{usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB free ({folder})"
    if usage.free < GIB:
        remedy = "Ray will use the disk in its place, which is slow. In a container: `--shm-size=4g`."
        return Check(name, value, Status.WARN, remedy)
    return Check(name, value)


def descriptor_check(soft: int, hard: int) -> Check:
    """File descriptors: Ray raises the soft limit to the hard one by itself."""
    shown = ["no limit" if limit == resource.RLIM_INFINITY else str(limit) for limit in (soft, hard)]
    value = f"{shown[0]} (can be raised to {shown[1]})"
    if hard != resource.RLIM_INFINITY and hard < 4096:
        return Check("file descriptors", value, Status.WARN, "Raise the hard limit to 65536 (`ulimit -Hn`, as root).")
    return Check("file descriptors", value)


# --- trials in processes of their own ------------------------------------------------------------------------------


def _start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that what Ray starts can be ended with it
    )


def _ended(
    process: subprocess.Popen[str], name: str, well: str, remedy: str, seconds: float, bad: Status = Status.FAIL
) -> Check:
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Check(name, f"no answer after {seconds:g} seconds", bad, remedy)
    if process.returncode == 0:
        return Check(name, well)
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "no message")
    return Check(name, f"status {process.returncode}: {last.strip()[:300]}", bad, remedy)
