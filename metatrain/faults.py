"""Faults on purpose: a plan of kills, errors and delays that fire at named points of the program, each once.

Without a plan a point costs one look at a global. With the environment variable METATRAIN_FAULTS a process reads a
plan as it starts::

    {"faults": [
      {"id": "a", "at": "train.backward", "rank": 1, "step": 12, "action": "kill"},
      {"id": "b", "at": "storage.write", "path": "COMMITTED", "action": "error", "errno": "ENOSPC", "times": 2},
      {"id": "c", "at": "reader.read", "epoch": 1, "skip": 3, "action": "delay", "seconds": 2.5}]}

A fault fires at the first passage of its point that fits: at its step or a later one, of its rank, with its text in the
path. It fires once (`times`) among all processes and restarts that share the plan's folder: who fires it first makes
the file `fired/ID-N.json` beside the plan, which also tells when, where and by whom.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from metatrain.errors import ConfigError

#: Names a plan's file.
VARIABLE = "METATRAIN_FAULTS"

#: Where faults may fire. `epoch` and `step` of `reader.read` are of the plan; other steps are of the whole run.
POINTS = (
    "train.read",  # as a step's batch comes from the readers
    "train.lookup",  # before a step asks for its rows
    "train.backward",  # between a step's loss and its backward pass, which updates the tables
    "train.update",  # after the backward pass, before dense parameters change
    "checkpoint.copy",  # before the local copy
    "checkpoint.copied",  # after it, before a byte is written
    "checkpoint.write",  # between files
    "checkpoint.metadata",  # before metadata is written
    "checkpoint.commit",  # before the marker is written
    "checkpoint.committed",  # after that, before old ones are removed
    "checkpoint.prune",  # between removals
    "reader.read",  # in a reader, before it makes batches; `step` is the last of them
    "storage.open",
    "storage.write",
    "storage.read",
)

#: kill: SIGKILL to this process. freeze: SIGSTOP to it, all threads. hang: this thread sleeps for ever. delay: it
#: sleeps `seconds`. error: OSError of `errno`. truncate: the point's local file is cut to half.
Action = Literal["kill", "freeze", "hang", "delay", "error", "truncate"]


@dataclass(frozen=True)
class Fault:
    """One line of a plan. What is None, fits anything."""

    at: str
    action: Action
    #: From this step on: the first passage fires it.
    step: int | None = None
    epoch: int | None = None
    rank: int | None = None
    #: A part of the path.
    path: str | None = None
    #: Passages in a process that fit and are let go before one fires.
    skip: int = 0
    #: How often it fires in all.
    times: int = 1
    seconds: float = 0.0
    errno: str = "EIO"
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    def __post_init__(self) -> None:
        known = {"at": POINTS, "action": get_args(Action), "errno": tuple(errno.errorcode.values())}
        for name, values in known.items():
            if (value := getattr(self, name)) not in values:
                raise ConfigError(
                    f"A fault has an unknown `{name}`.",
                    where=f"fault {self.id}",
                    got=value,
                    remedy=f"Known: {', '.join(values)}.",
                )


class _Plan:
    """The faults of a plan's file, and what this process knows of their state."""

    def __init__(self, path: str) -> None:
        self.folder = Path(path).absolute().parent / "fired"
        self.faults = read_plan(path)
        self.folder.mkdir(exist_ok=True)
        self._passed = {fault.id: 0 for fault in self.faults}
        self._place: dict[str, Any] = {"step": None, "rank": None}

    def at(self, name: str, given: dict[str, Any]) -> None:
        # Storage doesn't know of steps and ranks: they are where this process was last.
        self._place.update({k: v for k, v in given.items() if k in self._place and v is not None})
        place = {**given, **self._place}
        for fault in self.faults:
            if fault.at == name and _fits(fault, place):
                self._passed[fault.id] += 1
                if self._passed[fault.id] > fault.skip and self._claim(fault, place):
                    _fire(fault, place["path"])

    def _claim(self, fault: Fault, place: dict[str, Any]) -> bool:
        """Whether this passage is the one that fires it."""
        record = {
            **asdict(fault),
            "place": place,
            "time": time.time(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        for n in range(fault.times):
            with contextlib.suppress(FileExistsError), open(self.folder / f"{fault.id}-{n}.json", "x") as file:
                json.dump(record, file)
                return True
        return False


def _fits(fault: Fault, place: dict[str, Any]) -> bool:
    equal = all(getattr(fault, name) in (None, place[name]) for name in ("rank", "epoch"))
    reached = fault.step is None or (place["step"] is not None and place["step"] >= fault.step)
    return equal and reached and (fault.path is None or fault.path in (place["path"] or ""))


def _fire(fault: Fault, path: str | None) -> None:
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            _sleep_for_ever()
        case "delay":
            time.sleep(fault.seconds)
        case "error":
            number = getattr(errno, fault.errno)
            raise OSError(number, f"{os.strerror(number)} (a fault on purpose)", path)
        case "truncate":
            if path is None or not os.path.isfile(path):
                raise ConfigError(
                    "A fault would truncate what is no local file.",
                    where=f"fault {fault.id}, at {fault.at}",
                    got=path,
                    remedy="Truncate at points that are given a file: storage.read, checkpoint.write.",
                )
            os.truncate(path, os.path.getsize(path) // 2)


def _sleep_for_ever() -> NoReturn:
    while True:
        time.sleep(3600)


_plan: _Plan | None = None


def point(
    name: str,
    *,
    step: int | None = None,
    epoch: int | None = None,
    rank: int | None = None,
    path: str | None = None,
) -> None:
    """A place where a fault of the plan may fire: nothing at all without a plan.

    Args:
        name: One of `POINTS`.
        step: Where this process is. Default, as of `rank`: what it said last.
        epoch: Likewise, of readers.
        rank: Which worker this is.
        path: The file or folder at hand.

    Raises:
        OSError: A planned one.
    """
    if _plan is not None:
        _plan.at(name, {"step": step, "epoch": epoch, "rank": rank, "path": path})


def activate(path: str | None) -> None:
    """Follows the plan in this file from now on; None: no plan.

    Raises:
        ConfigError: No plan can be read from there.
    """
    global _plan
    _plan = _Plan(path) if path else None


def refresh() -> None:
    """Reads the environment's plan again, where there is one: a process of Ray's may live longer than a plan."""
    if path := os.environ.get(VARIABLE):
        activate(path)


def read_plan(path: str) -> list[Fault]:
    """The faults of a plan's file.

    Raises:
        ConfigError: No such file, or a fault that is none.
    """
    known = {f.name for f in fields(Fault)}
    try:
        faults = json.loads(Path(path).read_text())["faults"]
        if unknown := {key for fault in faults for key in fault} - known:
            raise ValueError(f"unknown keys {sorted(unknown)}")
        return [Fault(**fault) for fault in faults]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"The plan of faults cannot be read: {error}",
            where=path,
            remedy=f'Unset {VARIABLE}, or write {{"faults": […]}} there; keys of a fault: {", ".join(sorted(known))}.',
        ) from error


def write_plan(path: str, faults: Sequence[Fault]) -> None:
    """Writes a plan, whole or not at all, in place of one that may be there; what has fired stays fired by its id."""
    Path(path).parent.joinpath("fired").mkdir(parents=True, exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    Path(temporary).write_text(json.dumps({"faults": [asdict(fault) for fault in faults]}, indent=1))
    os.replace(temporary, path)


def fired(path: str) -> list[dict[str, Any]]:
    """What has fired of the plan in this file, in order: the fault's fields, `place`, `time` (Unix), `pid`, `host`."""
    ids = {fault.id for fault in read_plan(path)}
    records = []
    for file in Path(path).parent.joinpath("fired").glob("*.json"):
        with contextlib.suppress(ValueError):  # being written by a process that is about to fire it
            if (record := json.loads(file.read_text()))["id"] in ids:
                records.append(record)
    return sorted(records, key=lambda record: record["time"])


refresh()
