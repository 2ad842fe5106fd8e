"""RUN/status.json: what a run is doing, published by the command that trains it, read by `metatrain status`.

The command writes it anew every few seconds while it lives. A file that is older is of a run that is not alive any
more, whatever it says.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from metatrain import storage
from metatrain.errors import StorageError

log = logging.getLogger("metatrain")

FILE = "status.json"
VERSION = 1
#: Between two writings while nothing special happens: on a disk, and on an object store, where each one costs.
SECONDS, SECONDS_ON_A_STORE = 5.0, 10.0
#: A living run's file is at most this old, slow stores and clocks that differ included.
STALE_SECONDS = 60.0
#: Faults that are kept, the last ones.
FAULTS_KEPT = 20

State = Literal["starting", "training", "finished", "failed", "interrupted"]


class Fault(BaseModel):
    """Something that went wrong and was mended, or ended the run."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    at: float  # seconds since the epoch
    what: str


class RunStatus(BaseModel):
    """What a run is doing. Times are seconds since the epoch, by the clock of the command that trains it."""

    # Of a later release's file what is known here is shown.
    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int = VERSION
    run: str
    state: State = "starting"
    why: str = ""
    written: float
    launched: float
    host: str
    pid: int
    epochs: int = 0
    workers: int = 0
    step: int = 0
    steps: int = 0
    epoch: int = 0
    #: When the last line of the curves came, and what it said.
    progressed: float | None = None
    step_seconds: float | None = None
    curves: dict[str, float] = {}
    validation_step: int | None = None
    validation_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    checkpoint_step: int | None = None
    checkpoint_at: float | None = None
    checkpoint_seconds: float | None = None
    checkpoint_loss: float | None = None
    #: How often the group of workers was started again, by this command and by those before it.
    restarts: int = 0
    faults: tuple[Fault, ...] = ()

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, at the rate of the last steps; None where no rate is known."""
        if self.step_seconds is None or not self.steps:
            return None
        return self.step_seconds * max(0, self.steps - self.step)


def read_status(run_url: str) -> RunStatus:
    """A run's status.

    Raises:
        StorageError: There is none, or it cannot be read.
    """
    path = storage.join(run_url, FILE)
    if not storage.exists(path):
        raise StorageError(
            "This run has told of no training.",
            where=path,
            remedy="Check the run's name and storage, or train it with `metatrain train`.",
        )
    try:
        return RunStatus.model_validate(json.loads(storage.read_bytes(path)))
    except (ValueError, ValidationError) as error:
        raise StorageError(
            f"The run's status cannot be read: {error}", where=path, remedy="Remove it; a training run writes it anew."
        ) from error


class StatusFile:
    """Publishes a run's status as messages of its workers come.

    A store that fails does not end training: it is told in the log once, and tried again.

    Args:
        run_url: The run's folder.
        epochs: Of the whole run.
        clock: For tests.
    """

    def __init__(self, run_url: str, epochs: int, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = storage.join(run_url, FILE), clock
        self._seconds = SECONDS if storage.is_local(run_url) else SECONDS_ON_A_STORE
        now = clock()
        before = self._before(run_url)
        kept = before.model_dump(include=_KEPT) if before else {}
        if before is not None and before.state in ("starting", "training"):
            fault = Fault(at=before.written, what="the command that trained the run ended without a word")
            kept["faults"] = (*before.faults, fault)[-FAULTS_KEPT:]
        self.status = RunStatus(
            run=run_url, written=now, launched=now, host=socket.gethostname(), pid=os.getpid(), epochs=epochs, **kept
        )
        self._starts = 0  # of the workers, by this command
        self._known = before is not None
        self._reader_restarts, self._due, self._failing = 0.0, 0.0, False
        self.tick()

    def take(self, message: dict[str, Any]) -> None:
        """Takes a message of the workers."""
        now, status = self._clock(), self.status
        if "start" in message:
            # Whoever trained the run before had started workers too.
            restarts = status.restarts + (self._known or self._starts > 0)
            self._known = False
            if self._starts:
                self._fault(f"the workers were started again, {message['start']} of them")
            self._starts += 1
            self._reader_restarts = 0.0
            self._set(restarts=restarts, workers=message["start"], state="training")
            self._due = now  # told at once: a command killed within seconds would take the count with it
        elif "validation_loss" in message:
            self._set(validation_step=message["step"], validation_loss=message["validation_loss"])
            if message["best"]:
                self._set(best_step=message["step"], best_loss=message["validation_loss"])
        elif "checkpoint" in message:
            self._set(
                checkpoint_step=message["checkpoint"],
                checkpoint_at=now,
                checkpoint_seconds=message["checkpoint_seconds"],
                checkpoint_loss=message["checkpoint_loss"],
            )
        elif "step" in message:
            self._line(message, now)
        elif "fault" in message:
            self._fault(message["fault"])

    def tick(self) -> None:
        """Writes the file if it is due. Call it often."""
        if (now := self._clock()) >= self._due:
            self._due = now + self._seconds
            self._write(now)

    def end(self, state: State, why: str = "") -> None:
        """Says how the command ended."""
        self._set(state=state, why=why)
        if why:
            self._fault(why)
        self._write(self._clock())

    def _line(self, message: dict[str, Any], now: float) -> None:
        # JSON has no number that is not finite; a loss is none where all steps of a line were skipped.
        curves = {name: value for name, value in message.items() if "/" in name and math.isfinite(value)}
        seconds = message["speed/step_seconds"]
        smoothed = self.status.step_seconds
        self._set(
            state="training",
            step=message["step"],
            steps=message["steps"],
            epoch=message["epoch"],
            progressed=now,
            curves=curves,
            # The run's folder remembers attempts of a command that was killed before it could tell of them.
            restarts=max(self.status.restarts, int(curves.get("speed/restarts", 0))),
            # The first line holds the warm-up: what comes after it counts for more.
            step_seconds=seconds if smoothed is None else 0.7 * smoothed + 0.3 * seconds,
        )
        died = curves.get("speed/reader_restarts", 0.0)
        if died > self._reader_restarts:
            self._fault(f"{died - self._reader_restarts:.0f} readers died and were replaced")
        self._reader_restarts = died

    def _fault(self, what: str) -> None:
        faults = (*self.status.faults, Fault(at=self._clock(), what=what))
        self._set(faults=faults[-FAULTS_KEPT:])

    def _set(self, **values: Any) -> None:
        self.status = self.status.model_copy(update=values)

    def _write(self, now: float) -> None:
        self._set(written=now)
        try:
            storage.write_atomic(self._path, self.status.model_dump_json(indent=1))
        except Exception as error:  # whatever a store's own package raises
            if not self._failing:
                log.warning("%s cannot be written for now: %s: %s", self._path, type(error).__name__, error)
            self._failing = True
        else:
            self._failing = False

    @staticmethod
    def _before(run_url: str) -> RunStatus | None:
        try:
            return read_status(run_url)
        except StorageError:
            return None  # there is none, or one that is of no use: it is written anew


#: Of what an earlier command told, this still holds.
_KEPT = {
    "step", "steps", "epoch", "workers", "validation_step", "validation_loss", "best_step", "best_loss",
    "checkpoint_step", "checkpoint_at", "checkpoint_seconds", "checkpoint_loss", "restarts", "faults",
}  # fmt: skip
