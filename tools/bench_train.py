"""Measure training end to end: where a worker's time goes, and how near it comes to its step alone.

    python tools/bench_train.py [RECIPE] [--workers 1 2] [--users 200000] [--json FILE]

The workers are the product's own, launched by Ray Train with their readers. They train in rounds, and between them
take the same step on batches that are in memory already, in the same process: the ceiling. A round of training holds
one checkpoint, as every 100 steps do by default. Medians over the rounds are shown.

`blocked` is the part of the ceiling's time in which the worker's thread did not compute: the exchanges between ranks
and the wait for slower ones. It is known where a worker has one CPU thread.

RECIPE is one of the synthetic source. A dataset with fewer users is prepared for it, in a folder of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_common import changed, synthetic_recipe, write_json
from bench_ranks import RESIDENT

from metatrain import storage
from metatrain.config import Config
from metatrain.data.batch import TaskBatch
from metatrain.data.prepare import prepare
from metatrain.observe.laps import STAGES, Laps
from metatrain.train.launch import launch
from metatrain.train.step import OuterLoop
from metatrain.train.worker import Seat, Training

RESULT = "bench.json"


class BlockedLaps(Laps):
    """Laps that also tell how long this thread did not compute."""

    def __init__(self) -> None:
        self.blocked, self._wall, self._cpu = 0.0, time.perf_counter(), time.thread_time()
        super().__init__()

    def lap(self, stage: str) -> None:
        """As `Laps.lap`."""
        wall, cpu = time.perf_counter(), time.thread_time()
        self.blocked += max(0.0, (wall - self._wall) - (cpu - self._cpu))
        self._wall, self._cpu = wall, cpu
        super().lap(stage)


def measure(config: Config, seat: Seat, steps: int, rounds: int) -> None:
    """What every worker does: rounds of the ceiling and of training, in turns. Rank 0 writes the result."""
    told: list[dict[str, Any]] = []
    training = Training(config, Seat(seat.rank, seat.world_size, seat.device, told.append))
    try:
        resident = [b.tensors(seat.device) for b in islice(training.stream.batches(0), RESIDENT)]
        found = []
        for number in range(rounds + 1):
            ceiling = _ceiling(training, resident, steps)
            loop = _loop(training, told, steps)
            if number:  # the first one warms up
                found.append({"ceiling": ceiling, "loop": loop})
        if seat.rank == 0:
            storage.write_atomic(storage.join(config.run_url, RESULT), json.dumps(found))
    finally:
        training.close()


def _ceiling(training: Training, resident: list[TaskBatch], steps: int) -> dict[str, float]:
    """Steps on batches in memory."""
    seat, laps = training.seat, BlockedLaps()
    outer = OuterLoop(training.distributed, training.optimizer, training.config, training.last, seat.world_size, laps)
    batches = [resident[i % len(resident)] for i in range(steps)]
    counts = torch.tensor([sum(b.size for b in batches), sum(b.labels.shape[0] for b in batches)], dtype=torch.float64)
    dist.all_reduce(counts)
    laps.take()
    laps.blocked, begun = 0.0, time.perf_counter()
    for i, batch in enumerate(batches):
        outer.step(batch, i, batches[i + 1] if i + 1 < steps else None)
    dist.barrier()
    seconds = time.perf_counter() - begun
    stages = {name: of_stage / steps for name, of_stage in laps.take().items()}
    tasks, events = counts.tolist()
    return {
        "tasks_per_second": tasks / seconds,
        "events_per_second": events / seconds,
        "step": seconds / steps,
        "blocked": laps.blocked / steps,
        **stages,
    }


def _loop(training: Training, told: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """Steps as a run takes them: batches from readers, curves, a checkpoint."""
    told.clear()
    first = training.cursor.total
    training.last = first + steps
    dist.barrier()
    training.laps.lap("rest")  # the ceiling's time is of no stage here
    training.totals.restart()
    training.run()
    lines = [line for line in told if "speed/step_seconds" in line]
    if not lines:  # only rank 0 is told
        return {}
    # An epoch's end has a line of its own, of fewer steps.
    ends = [first, *(line["step"] for line in lines)]
    shares = [
        line["speed/step_seconds"] * (end - begin) for line, (begin, end) in zip(lines, pairwise(ends), strict=True)
    ]
    seconds = sum(shares)

    def whole(name: str) -> float:
        return sum(line[name] * share for line, share in zip(lines, shares, strict=True))

    return {
        "tasks_per_second": whole("speed/tasks_per_second") / seconds,
        "events_per_second": whole("speed/events_per_second") / seconds,
        "step": seconds / steps,
        **{name: whole(f"time/{name}") / steps for name in STAGES},
    }


def bench(config: Config, workers: int, steps: int, rounds: int) -> dict[str, float]:
    """A row: medians over the rounds, times in milliseconds a step."""
    config = changed(
        config,
        run={"name": f"bench-{time.time_ns()}"},
        train={
            "workers": workers,
            "epochs": 1_000,  # more than the steps need; every epoch is planned at the start
            "max_steps": 0,
            "validate_every": 0,
            "max_failures": 0,
            "checkpoint": {"every_steps": steps - config.train.log_every},
        },
    )
    launch(config, work=functools.partial(measure, steps=steps, rounds=rounds))
    found = json.loads(storage.read_text(storage.join(config.run_url, RESULT)))
    row: dict[str, float] = {
        "workers": workers,
        "threads_per_worker": config.train.threads_per_worker,
        "tasks_per_step": config.data.tasks_per_step,
    }
    for kind in ("loop", "ceiling"):
        for name in found[0][kind]:
            value = statistics.median(one[kind][name] for one in found)
            rate = name.endswith("_per_second")
            row[f"{kind}_{name}" if rate else f"{kind}_{name}_ms"] = round(value if rate else 1e3 * value, 3)
    ratios = [one["loop"]["tasks_per_second"] / one["ceiling"]["tasks_per_second"] for one in found]
    row["share_of_ceiling"] = round(statistics.median(ratios), 4)
    row["wait_share"] = round(statistics.median(one["loop"]["wait"] / one["loop"]["step"] for one in found), 4)
    return row


def show(row: dict[str, float]) -> None:
    """Prints a row as a table."""
    print(f"\n{row['workers']} worker(s), {row['tasks_per_step']} tasks a step")
    print(f"  {'':<18} {'training':>10} {'share':>7} {'ceiling':>10}")
    for name in ("tasks_per_second", "events_per_second"):
        print(f"  {name:<18} {row[f'loop_{name}']:>10,.0f} {'':>7} {row[f'ceiling_{name}']:>10,.0f}")
    for name in ("step", *STAGES):
        loop, ceiling = row[f"loop_{name}_ms"], row[f"ceiling_{name}_ms"]
        print(f"  {name + ' ms':<18} {loop:>10.2f} {loop / row['loop_step_ms']:>7.1%} {ceiling:>10.2f}")
    if row["threads_per_worker"] == 1:
        print(f"  {'blocked ms':<18} {'':>18} {row['ceiling_blocked_ms']:>10.2f}")
    print(f"  training reaches {row['share_of_ceiling']:.1%} of the ceiling; {row['wait_share']:.1%} waiting for data")


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipe = Path(__file__).resolve().parents[1] / "configs" / "million-users-maml.yaml"
    parser.add_argument("recipe", nargs="?", default=str(recipe))
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    parser.add_argument("--users", type=int, default=200_000, help="of the dataset: an epoch's start is no step")
    parser.add_argument("--tasks-per-step", type=int, help="default: the recipe's")
    parser.add_argument("--steps", type=int, default=110, help="of a round; a multiple of the recipe's log_every")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="for the dataset and the runs; default: one that goes afterwards")
    parser.add_argument("--json", type=Path, help="write machine, versions, configuration and rows there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="metatrain-bench-") as temporary:
        config = synthetic_recipe(options.recipe, options.users, options.folder or temporary)
        if options.steps % config.train.log_every:
            parser.error(f"--steps {options.steps} is not a multiple of log_every {config.train.log_every}")
        if options.tasks_per_step:
            config = changed(config, data={"tasks_per_step": options.tasks_per_step})
        prepare(config.prepare, config.data.dataset, progress=False, overwrite=True)
        rows = []
        for workers in options.workers:
            rows.append(bench(config, workers, options.steps, options.rounds))
            show(rows[-1])
        write_json(options.json, options, rows)


if __name__ == "__main__":
    # By its module's name, the workers import what they run; out of `__main__` it would be copied, and cannot be.
    import bench_train

    bench_train.main()
