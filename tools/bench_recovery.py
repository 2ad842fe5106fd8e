"""Measure recovery: seconds from the kill of a worker to the next trained step, and where they go.

    python tools/bench_recovery.py [RECIPE] [--workers 2] [--kills 3] [--users 5000] [--json FILE]

A run of the synthetic source trains on a local Ray. When it has stepped for a while, its last worker gets SIGKILL; when
it trains again, the next kill follows. Parts, by the clocks of this machine:

    detection   until Ray Train's controller has seen the failure
    processes   until the new workers enter the training function: Ray ends the group, places it anew, starts processes,
                imports torch, makes the process group, imports metatrain
    back-off    the wait before a restart that follows one without progress: 0 here
    model       until the tables and the model are made
    load        until the checkpoint is in them
    readers     until the readers are started and open
    first step  until the first step is done: the first batch, the choice of the inner loop's engine, the step
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_common import changed, descendants, synthetic_recipe, write_json

from metatrain.config import Config
from metatrain.data.prepare import prepare
from metatrain.train import watch
from metatrain.train.launch import launch

PARTS = ("detection", "processes", "back-off", "model", "load", "readers", "first step")
#: Steps between a restart and the next kill.
STEPS_BETWEEN = 40


class Recorder(watch.TrainingProgress):
    """Keeps the messages of a run, and shows them as usual."""

    def __init__(self) -> None:
        super().__init__()
        RECORDERS.append(self)
        self.messages: list[dict[str, Any]] = []

    def take(self, message: dict[str, Any]) -> None:
        """Takes one message."""
        self.messages.append(message)
        super().take(message)

    def seen(self, key: str) -> list[dict[str, Any]]:
        """The messages that have a key."""
        return [message for message in self.messages if key in message]


RECORDERS: list[Recorder] = []


def bench(config: Config, kills: int) -> list[dict[str, float]]:
    """Trains, kills `kills` times; the parts of each recovery in seconds."""
    killed: list[float] = []

    def kill_on() -> None:
        while not RECORDERS:
            time.sleep(0.1)
        recorder = RECORDERS[0]
        for n in range(kills):
            while len(recorder.seen("begun")) <= n:
                time.sleep(0.1)
            first = recorder.seen("begun")[n]["begun"]
            while not any(m["step"] >= first + STEPS_BETWEEN for m in recorder.seen("learning/loss_after")[-1:]):
                time.sleep(0.1)
            killed.append(time.time())
            os.kill(_workers()[-1], signal.SIGKILL)

    watch.TrainingProgress = Recorder  # pyright: ignore[reportAttributeAccessIssue]
    thread = threading.Thread(target=kill_on, daemon=True)
    thread.start()
    launch(config)
    thread.join()
    recorder = RECORDERS[0]
    failures = [m["at"] for m in recorder.seen("mark")]
    starts, begun = recorder.seen("start")[1:], recorder.seen("begun")[1:]
    return [_parts(*of_kill) for of_kill in zip(killed, failures, starts, begun, strict=True)]


def _parts(killed: float, failure: float, start: dict[str, Any], begun: dict[str, Any]) -> dict[str, float]:
    entered, first = start["at"], begun["first"]
    edges = [
        killed,
        failure,
        entered,
        entered + start["wait"],
        first["restore"],
        first["start"],
        first["read"],
        begun["at"],
    ]
    parts = {name: after - before for name, before, after in zip(PARTS, edges, edges[1:], strict=False)}
    return {**parts, "whole": begun["at"] - killed}


def _workers() -> list[int]:
    found = []
    for pid in sorted(descendants(os.getpid())):
        try:
            if Path("/proc", str(pid), "cmdline").read_bytes().startswith(b"ray::RayTrainWorker"):
                found.append(pid)
        except OSError:
            continue
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="configs/million-users.yaml")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--users", type=int, default=5000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = synthetic_recipe(options.recipe, options.users, folder)
        prepare(config.prepare, config.data.dataset)
        train = {
            "workers": options.workers,
            "epochs": 300,
            "max_steps": (options.kills + 2) * 4 * STEPS_BETWEEN,
            "max_failures": options.kills,
            "log_every": 5,
            "validate_every": 0,
            "checkpoint": {"every_steps": 20},
        }
        rows = bench(changed(config, train=train), options.kills)
    for row in rows:
        print("  ".join(f"{name} {seconds:.1f}" for name, seconds in row.items()))
    print("median  " + "  ".join(f"{n} {statistics.median(r[n] for r in rows):.1f}" for n in rows[0]))
    write_json(options.json, options, rows)


if __name__ == "__main__":
    main()
