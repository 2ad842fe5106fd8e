"""What the benchmarks share: the machine's description, the JSON they write, datasets to train on, peak memory."""

from __future__ import annotations

import argparse
import json
import os
import platform
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from metatrain import storage
from metatrain.config import Config, load_config

PACKAGES = ("torch", "torchrec", "fbgemm-gpu-cpu", "ray", "pyarrow", "numpy")


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Python's and the packages' versions; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_json(
    path: Path | None,
    options: argparse.Namespace,
    rows: Sequence[Mapping[str, Any]],
    found_versions: dict[str, str] | None = None,
) -> None:
    """Writes machine, versions, configuration and rows to `path`, where one is given."""
    if path is None:
        return
    machine = {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()}
    configuration = {
        k: v if isinstance(v, int | float | list | bool) else str(v) for k, v in vars(options).items() if v
    }
    document = {
        "machine": machine,
        "versions": found_versions or versions(),
        "configuration": configuration,
        "rows": list(rows),
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def changed(config: Config, **sections: Mapping[str, Any]) -> Config:
    """The configuration with some fields of some sections replaced, checked again."""
    raw = config.model_dump()
    for section, fields in sections.items():
        raw[section] = {**raw[section], **fields}
    return Config.model_validate(raw)


def synthetic_recipe(recipe: str, users: int, folder: str, items: int = 0) -> Config:
    """A recipe of the synthetic source with so many users, and items in the recipe's proportion where their number is
    not given; its dataset and runs in `folder`."""
    config = load_config(recipe)
    made = config.prepare.synthetic
    items = items or max(200, round(made.items * users / made.users))
    synthetic = made.model_copy(update={"users": users, "items": items})
    return changed(
        config,
        run={"storage": storage.join(folder, "runs")},
        prepare={"source": "synthetic", "synthetic": synthetic.model_dump()},
        data={"dataset": storage.join(folder, f"users-{users}-items-{items}")},
    )


#: The role of what Python's multiprocessing started.
OF_ITS_OWN = "a process of its own"


class PeakMemory:
    """Peak memory of this process and of all that descend from it, by what they are, while the block runs.

    Attributes:
        peaks: Role → greatest number of bytes of one process of it, without what it shares with others.
    """

    def __init__(self, seconds: float = 0.05) -> None:
        self.peaks: dict[str, int] = {}
        self._seconds, self._over = seconds, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self._seconds):
            for pid in descendants(os.getpid()):
                role, size = _role(pid), private_bytes(pid)
                self.peaks[role] = max(self.peaks.get(role, 0), size)


def descendants(root: int) -> list[int]:
    """A process and all that it started."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                text = Path("/proc", entry, "stat").read_text()
            except OSError:
                continue
            parents.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(entry))
    found, todo = [root], [root]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def _role(pid: int) -> str:
    """A Ray worker by what it runs, others by their program."""
    if pid == os.getpid():
        return "driver"
    try:
        command = Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "gone"
    if command.startswith("ray::"):
        name = command[len("ray::") :].split("(")[0].split(".")[0].strip()
        return "idle ray worker" if name.startswith("IDLE") else name
    return OF_ITS_OWN if "multiprocessing" in command else "ray services"


def private_bytes(pid: int) -> int:
    """Memory that a process shares with no other; 0 when it has ended."""
    try:
        for line in Path("/proc", str(pid), "status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
