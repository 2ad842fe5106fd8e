"""Trains a job under a stream of random faults and checks that nothing was lost: the run ends, every task was trained
exactly once an epoch, and the weights are those of an undisturbed run.

python tools/chaos.py --minutes 10
python tools/chaos.py --minutes 10 --resize     nodes are lost and come back while training goes on: 2 → 1 → 2 workers
python tools/chaos.py --minutes 60 --mild       a soak: memory, files, shared memory and Ray's objects are watched

A Ray cluster of several nodes is started on this machine. The undisturbed run comes first: with it the tool takes about
twice `--minutes`. Exits with 1 where something was lost.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

# Beside this file.
from bench_common import write_json
from chaos_cluster import Command, Nodes, attempts_so_far, steps_so_far
from chaos_plan import HANG_SECONDS, Event, places, random_events
from chaos_resources import Sampler

from metatrain import faults
from metatrain.checkpoint import committed_steps, read_tensors
from metatrain.config import Config, validated
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.prepare import prepare
from metatrain.data.reader import BatchReader
from metatrain.faults import VARIABLE
from metatrain.train.audit import audit

#: Seconds for which a killed node is away; where its workers are to be missed, long enough to go on without them.
NODE_AWAY_SECONDS = 5.0
RESIZE_AWAY_SECONDS = 45.0
#: Of each node: room for a worker with its reader (1.5), not for two.
NODE_CPUS = 2
#: Share of a minute's training that is left where faults come, to choose the job's length.
TRAINING_SHARE = 0.5
#: Relative distance of a tensor, where the number of workers changed on the way.
TOLERANCE = 1e-5


def recipe(folder: Path, options: argparse.Namespace) -> Config:
    """A job of small steps, smooth so that rounding does not grow."""
    raw = {
        "run": {"storage": str(folder / "runs"), "name": "pilot"},
        "prepare": {
            "source": "synthetic",
            "synthetic": {"users": options.users, "items": 1000, "events_per_user": 20},
            "item_width": 8,
            "feature_width": 8,
        },
        "data": {"dataset": str(folder / "dataset"), "tasks_per_step": 64, "prefetch": 8},
        "model": {"hidden": [32], "activation": "tanh", "id_dropout": 0.1},
        "meta": {"steps": 2, "rate": 0.02, "adapt": ["head.*"]},
        "train": {
            "workers": options.workers,
            "epochs": 1000,
            "max_steps": 200,
            "audit": True,
            "validate_every": 10,
            "max_failures": -1,
            "hang_seconds": HANG_SECONDS,
            "resize_seconds": 5.0,
            "checkpoint": {"every_steps": options.checkpoint_steps, "full_every": 4},
        },
    }
    return validated(raw, where="tools/chaos.py")


def changed(config: Config, name: str, steps: int, resizable: bool = False) -> Config:
    """The same job under another name."""
    workers = (1, config.train.most_workers) if resizable else config.train.workers
    train = config.train.model_copy(update={"max_steps": steps, "workers": workers})
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name}), "train": train})


def steps_of_epochs(config: Config, steps: int) -> list[int]:
    """Steps of each epoch, up to so many in all."""
    reader = BatchReader.from_config(
        config.data.dataset, config.data, Split.TRAIN, ItemSet.EXISTING, config.data.episode, config.train.seed
    )
    found: list[int] = []
    while sum(found) < steps:
        found.append(min(reader.steps(len(found)), steps - sum(found)))
    reader.close()
    return found


def undisturbed(config: Config, folder: Path, nodes: Nodes, plan: str) -> float:
    """Trains without faults; returns the seconds between its first and last step."""
    command = Command(config, folder, nodes.address, plan)
    while not command.ended():
        if command.ends:
            command.kill()
            raise SystemExit(f"The undisturbed run of {config.run.name} failed:\n{command.tail()}")
        time.sleep(0.5)
    times = [line["time"] for attempt in attempts_so_far(config.run_url) for line in attempt.ranks[0].values()]
    return max(times) - min(times)


class Disturbed:
    """A run under a stream of faults: what was done to it from outside, and how it got over everything."""

    def __init__(self, config: Config, folder: Path, nodes: Nodes, plan: str, events: list[Event]) -> None:
        resizable = isinstance(config.train.workers, tuple)
        self._away = RESIZE_AWAY_SECONDS if resizable else NODE_AWAY_SECONDS
        self.config, self._nodes, self._plan, self.events = config, nodes, plan, events
        faults.write_plan(plan, [fault for event in events for fault in event.faults])
        self.command = Command(config, folder, nodes.address, plan)
        self._outside = [event for event in events if event.outside]
        self._times: dict[Event, float] = {}  # of what was done from outside
        self._returns: float | None = None  # when a node comes back

    def tick(self) -> bool:
        """Does what is due; whether the run is at its end."""
        if self._returns is not None and time.time() > self._returns:
            self._returns = None
            self._nodes.add()
        if self._outside and steps_so_far(self.config.run_url) >= self._outside[0].step and self._returns is None:
            event = self._outside.pop(0)
            self._times[event] = time.time()
            if event.outside == "node killed":
                self._nodes.kill()
                self._returns = time.time() + self._away
            else:
                self.command.kill()
        return self.command.ended()

    def rows(self) -> list[dict[str, Any]]:
        """What happened, in its order: when, what, and the longest pause between steps from then to the next fault."""
        done = self._finished_steps()
        times = {record["id"]: record for record in reversed(faults.fired(self._plan))}
        rows = []
        for event in self.events:
            records = [times[fault.id] for fault in event.faults if fault.id in times]
            when = self._times.get(event) or max((record["time"] for record in records), default=None)
            if when is None or len(records) < len(event.faults):
                rows.append({"kind": event.kind, "planned_step": event.step, "details": event.details, "seconds": None})
                continue
            rows.append(
                {
                    "kind": event.kind,
                    "planned_step": event.step,
                    "details": event.details,
                    "seconds": when - self.command.begun,
                }
            )
        rows.sort(key=lambda row: row["seconds"] or float("inf"))
        begins = [row["seconds"] for row in rows if row["seconds"] is not None]
        for row, begin, end in zip(rows, begins, [*begins[1:], float("inf")], strict=False):
            # What a reader has read ahead is trained after its death: the pause is not always the next step's.
            row["pause_seconds"], row["restart"] = _pause(done, self.command.begun + begin, self.command.begun + end)
        return rows

    def _finished_steps(self) -> list[tuple[float, int]]:
        """When all ranks had finished a step, and in which attempt, in that order."""
        found = []
        for attempt in attempts_so_far(self.config.run_url):
            lines = attempt.ranks.values()
            found += [(max(line[step]["time"] for line in lines), attempt.number) for step in attempt.steps]
        return sorted(found)


def _pause(done: list[tuple[float, int]], begin: float, end: float) -> tuple[float | None, bool]:
    """The longest time between two finished steps that lies in part between those times, and whether a new attempt
    came after one of those.

    Args:
        done: When steps were finished, and in which attempt.
        begin, end: The times of a fault and of the next. A pause counts from `begin` at the earliest.
    """
    pauses = [
        (after - max(before, begin), before_in != after_in)
        for (before, before_in), (after, after_in) in pairwise(done)
        if after > begin and before < end
    ]
    return (max(pauses)[0], any(restart for _, restart in pauses)) if pauses else (None, False)


def distance(one: Config, other: Config) -> tuple[str, float]:
    """The tensor of the last checkpoints that differs most, and by how much of its norm."""
    here, there = (read_tensors(config.run_url, committed_steps(config.run_url)[-1]) for config in (one, other))
    assert here.keys() == there.keys()

    def relative(name: str) -> float:
        if torch.equal(here[name], there[name]):
            return 0.0
        return float((here[name].double() - there[name].double()).norm() / here[name].double().norm().clamp(min=1e-6))

    worst = max(here, key=relative)
    return worst, relative(worst)


def lost(run: Disturbed, rows: list[dict[str, Any]], reference: Config | None, resized: bool) -> list[str]:
    """What was lost, or went otherwise than it should; nothing where the promises were kept.

    Args:
        run: The disturbed run.
        rows: Its faults.
        reference: The undisturbed run; None for a soak, which is ended by the clock.
        resized: Whether the number of workers was to change.
    """
    problems = []
    expected = sum(event.ends_the_command for event in run.events)
    if len(run.command.ends) > expected:
        problems.append(f"the command ended {len(run.command.ends)} times; {expected} were meant")
        problems += [f"  at {at:.0f} s, status {status}: {text[-400:]}" for at, status, text in run.command.ends]
    report = audit(run.config.run_url)
    print(f"audit:\n{report}")
    problems += report.problems
    if reference is None:
        return problems
    problems += [f"did not happen: {r['kind']} at step {r['planned_step']}" for r in rows if r["seconds"] is None]
    if committed_steps(run.config.run_url)[-1:] != committed_steps(reference.run_url)[-1:]:
        return [*problems, "the run did not come to its end"]
    if resized and len({attempt.world_size for attempt in report.attempts}) < 2:
        problems.append("the number of workers did not change on the way")
    name, relative = distance(reference, run.config)
    print(f"weights: largest relative difference {relative:.3g} ({name})")
    if relative > (TOLERANCE if resized else 0.0):
        problems.append(f"the weights differ from those of the undisturbed run: {name} by {relative:.3g} of its norm")
    return problems


def table(rows: list[dict[str, Any]]) -> str:
    """The faults, one a line."""
    lines = [f"{'at':>7} {'step':>6}  {'kind':<44} {'what':<44} {'pause':>9}"]
    for row in rows:
        at = f"{row['seconds']:5.1f} s" if row["seconds"] is not None else "never"
        pause = row.get("pause_seconds")
        shown = f"{pause:7.1f} s" if pause is not None else "-"
        lines.append(
            f"{at:>7} {row['planned_step']:>6}  {row['kind']:<44} {row['details']:<44} {shown:>9}"
            + ("  workers restarted" if row.get("restart") else "")
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="about how long the disturbed run is to take")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--faults", type=int, default=0, help="their number (default: 24, or 2 a minute if more)")
    parser.add_argument("--steps", type=int, default=0, help="of the job (default: by --minutes and a pilot run)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--users", type=int, default=4000)
    parser.add_argument("--checkpoint-steps", type=int, default=100)
    parser.add_argument("--resize", action="store_true", help="1 to `workers` workers, by the nodes that are there")
    parser.add_argument("--mild", action="store_true", help="only faults without a restart, and watch the resources")
    parser.add_argument("--folder", type=Path, help="keep everything there (default: a folder that is removed)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        return run(options, folder)


def run(options: argparse.Namespace, folder: Path) -> int:
    """The pilot, the undisturbed run, the disturbed one, and the verdict."""
    plan = str(folder / "faults" / "plan.json")
    faults.write_plan(plan, [])
    os.environ[VARIABLE] = plan  # what the nodes' processes inherit
    config = recipe(folder, options)
    prepare(config.prepare, config.data.dataset, progress=False)
    nodes = Nodes(options.workers, NODE_CPUS)
    try:
        steps = options.steps
        if not steps:
            seconds = undisturbed(config, folder, nodes, plan) / config.train.max_steps
            steps = int(60 * options.minutes * (1.0 if options.mild else TRAINING_SHARE) / seconds)
            print(f"pilot: {1000 * seconds:.1f} ms a step; the job has {steps} steps", flush=True)
        reference = None if options.mild else changed(config, "undisturbed", steps)
        if reference is not None:
            print(f"undisturbed: {undisturbed(reference, folder, nodes, plan):.0f} s", flush=True)
        there = places(steps_of_epochs(config, steps), options.workers)
        count = options.faults or max(24, round(2 * options.minutes))
        events = random_events(options.seed, count, there, options.mild, nodes=3 if options.resize else 1)
        # A soak is ended by the clock: its job is longer than the minutes.
        job = changed(config, "disturbed", 4 * steps if options.mild else steps, options.resize)
        disturbed = Disturbed(job, folder, nodes, plan, events)
        sampler = Sampler(os.getpid(), disturbed.command, nodes) if options.mild else None
        ends = time.monotonic() + 60 * (options.minutes if options.mild else 3 * options.minutes + 10)
        while not disturbed.tick() and time.monotonic() < ends:
            if sampler is not None:
                sampler.sample()
            time.sleep(0.5)
        took = time.time() - disturbed.command.begun
        disturbed.command.kill()
        rows = disturbed.rows()
        happened = [row for row in rows if row["seconds"] is not None]
        # The clock ends a soak before its stream does.
        print(table(happened if options.mild else rows))
        print(f"{len(happened)} faults of {len({row['kind'] for row in happened})} kinds in {took:.0f} s")
        problems = lost(disturbed, rows, reference, options.resize)
        if sampler is not None:
            print(sampler.report())
            problems += sampler.problems()
    finally:
        nodes.close()
    print("\n".join(["PROBLEMS", *problems]) if problems else "NOTHING LOST")
    resources = {} if sampler is None else sampler.slopes()
    write_json(options.json, options, [*rows, {"seconds": took, "problems": problems, "resources": resources}])
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
