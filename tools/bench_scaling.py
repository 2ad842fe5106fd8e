"""Measure how preparing and training scale: from one worker to several, and from a thousand users to a million.

    python tools/bench_scaling.py [RECIPE] [--workers 1 2] [--users 1000 10000 100000] [--json FILE]

`--workers`: strong is the same global batch for any number of workers, weak the same number of tasks a worker. The
rates of bench_train.py: `steps alone` are the workers' steps without readers, beside Ray's processes. Blocked is the
share of their time in which a worker's thread did not compute, because it waited for another rank or another process
had its core. Then the same steps without Ray (bench_ranks.py), as on a machine with cores to spare, in short turns; and
beside them as many processes that exchange nothing: what the machine gives, where cores share memory and a host.

`--users`: items grow in proportion, or are `--items`, for all sizes the same: tables and the catalogue grow with the
items, nothing should with the users. Row groups have 512 tasks, as a large dataset's have by default. Each stage's
time, and the peak memory of each kind of process: what it shares with others (Ray's object store) left out. `tables`
is what the embedding tables and their optimizer's state take in a worker. The time of training is one epoch's, the
start of Ray's workers and validation included; the rate is that of the steps. Processes grow in their first minutes,
until their allocators have seen what there is to see: `--equal-steps` trains every size for as many steps as the
largest one's epoch has, so that what is left of a difference is the users'.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_common import OF_ITS_OWN, PeakMemory, changed, synthetic_recipe, write_json
from bench_ranks import Team
from bench_train import bench

from metatrain import storage
from metatrain.config import Config
from metatrain.data.dataset import TaskDataset
from metatrain.data.prepare import prepare
from metatrain.model.build import build_model
from metatrain.train.launch import launch
from metatrain.train.worker import Seat, Training

RESULT = "rates.json"
TITLES = ("workers", "tasks/step", "tasks/s", "speed-up", "steps alone", "blocked")
#: Steps without Ray until the next number of workers has its turn: short, for a shared machine changes within seconds.
IN_A_TURN = 10


def over_workers(config: Config, counts: list[int], steps: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of weak and strong scaling."""
    prepare(config.prepare, config.data.dataset, progress=False, overwrite=True)
    tasks = config.data.tasks_per_step
    base = counts[0]
    sizes = [("one", base, tasks), *(("strong", n, tasks) for n in counts[1:])]
    sizes += [("weak", n, tasks * n // base) for n in counts[1:]]
    configs = [changed(config, data={"tasks_per_step": per_step}) for _, _, per_step in sizes]
    print("\n{:>8} {:>8} {:>11} {:>10} {:>9} {:>12} {:>8}".format("", *TITLES))
    # In turns: a busy machine slows all alike, and ratios are taken within a turn.
    ours = [[bench(sized, n, steps, 1) for (_, n, _), sized in zip(sizes, configs, strict=True)] for _ in range(rounds)]
    rows: list[dict[str, Any]] = []
    for number, (kind, workers, per_step) in enumerate(sizes):
        row: dict[str, Any] = {"scaling": kind}
        row |= {name: round(statistics.median(turn[number][name] for turn in ours), 4) for name in ours[0][number]}
        rows.append(row)
        for name in ("loop", "ceiling"):
            rates = [turn[number][f"{name}_tasks_per_second"] / turn[0][f"{name}_tasks_per_second"] for turn in ours]
            row[f"{name}_speed_up"] = round(statistics.median(rates), 3)
        print(
            f"{kind:>8} {workers:>8} {per_step:>11} {row['loop_tasks_per_second']:>10,.0f} "
            f"{row['loop_speed_up']:>8.2f}x {row['ceiling_speed_up']:>11.2f}x "
            f"{row['ceiling_blocked_ms'] / row['ceiling_step_ms']:>8.1%}",
            flush=True,
        )
    without_ray(sizes, configs, rows, steps, rounds)
    return rows


def without_ray(
    sizes: list[tuple[str, int, int]], configs: list[Config], rows: list[dict[str, Any]], steps: int, rounds: int
) -> None:
    """Adds to the rows the same steps without Ray, and those of as many processes that exchange nothing."""
    joined = [Team(config, n, IN_A_TURN) for (_, n, _), config in zip(sizes, configs, strict=True)]
    alone = [
        Team(changed(config, data={"tasks_per_step": size // n}), n, IN_A_TURN, apart=True)
        for (_, n, size), config in zip(sizes[1:], configs[1:], strict=True)
    ]
    turns = max(1, rounds * steps // IN_A_TURN)
    rates = [[team.turn() for team in (*joined, *alone)] for _ in range(turns)]
    for team in (*joined, *alone):
        team.close()
    print(f"\nwithout Ray, {turns} turns of {IN_A_TURN} steps")
    print("{:>8} {:>8} {:>11} {:>10} {:>9} {:>19}".format("", *TITLES[:4], "exchanging nothing"))
    for number, ((kind, workers, per_step), row) in enumerate(zip(sizes, rows, strict=True)):
        rate = statistics.median(turn[number] for turn in rates)
        row["without_ray_tasks_per_second"] = round(rate, 1)
        row["without_ray_speed_up"] = round(statistics.median(turn[number] / turn[0] for turn in rates), 3)
        print(f"{kind:>8} {workers:>8} {per_step:>11} {rate:>10,.0f} {row['without_ray_speed_up']:>8.2f}x", end="")
        if number:
            beside = len(sizes) + number - 1
            row["apart_speed_up"] = round(statistics.median(turn[beside] / turn[0] for turn in rates), 3)
            print(f" {row['apart_speed_up']:>18.2f}x", end="")
        print(flush=True)


def trained(config: Config, seat: Seat) -> None:
    """What every worker does: trains, and rank 0 keeps the curves' rates."""
    told: list[dict[str, Any]] = []

    def tell(message: dict[str, Any]) -> None:
        told.append(message)
        seat.tell(message)

    training = Training(config, Seat(seat.rank, seat.world_size, seat.device, tell))
    try:
        training.run()
    finally:
        training.close()
    if seat.rank == 0:
        lines = [line for line in told if "speed/tasks_per_second" in line][1:]  # the first holds the start
        rates = {name: [line[name] for line in lines] for name in ("speed/tasks_per_second", "time/wait")}
        storage.write_atomic(storage.join(config.run_url, RESULT), json.dumps(rates))


def over_users(
    recipe: str, users: list[int], items: int, workers: int, folder: str, equal_steps: bool
) -> list[dict[str, Any]]:
    """Rows of one epoch of training over so many users each, or of as many epochs as the largest's steps are."""
    rows = []
    for count in users:
        config = changed(
            synthetic_recipe(recipe, count, folder, items),
            run={"name": f"scaling-{time.time_ns()}"},
            prepare={"row_group_tasks": 512},
            train={"workers": workers, "epochs": max(users) // count if equal_steps else 1},
        )
        row: dict[str, Any] = {"users": count, "items": config.prepare.synthetic.items, "workers": workers}
        with PeakMemory() as memory:
            row["prepare_seconds"] = _alone(_prepare, config)
        row |= _megabytes("prepare", memory)
        manifest = TaskDataset.open(config.data.dataset).manifest
        with PeakMemory() as memory:
            row["train_seconds"] = _alone(_train, config)
        memory.peaks["driver"] = memory.peaks.pop(OF_ITS_OWN)
        row |= _megabytes("train", memory)
        rates = json.loads(storage.read_text(storage.join(config.run_url, RESULT)))
        row["events"] = sum(manifest.events.values())
        for name, values in rates.items():
            middle = sorted(values)[len(values) // 2] if values else math.nan
            row[name.replace("/", "_")] = round(middle, 4)
        row["tables_mb"] = round(_table_bytes(config) / workers / 1e6, 1)
        rows.append(row)
        print(f"\n{count:,} users, {row['items']:,} items, {row['events']:,} events; {workers} worker(s)")
        print(f"  prepare {row['prepare_seconds']:>8.1f} s   train {row['train_seconds']:>8.1f} s   ", end="")
        print(f"{row['speed_tasks_per_second']:,.0f} tasks/s, {row['time_wait']:.1%} waiting, ", end="")
        print(f"tables {row['tables_mb']:,.0f} MB a worker")
        for name, value in row.items():
            if name.endswith("peak_mb"):
                print(f"  {name.removesuffix(' peak_mb'):<36} {value:>8,.0f} MB", flush=True)
    return rows


def _alone(work: Callable[[Config], None], config: Config) -> float:
    """Seconds of the work in a process of its own: what one leaves behind in an allocator is not the next one's."""
    begun = time.perf_counter()
    alone = multiprocessing.get_context("spawn").Process(target=work, args=(config,))
    alone.start()
    alone.join()
    if alone.exitcode:
        raise SystemExit(f"{work.__name__} failed, with status {alone.exitcode}")
    return round(time.perf_counter() - begun, 1)


def _prepare(config: Config) -> None:
    prepare(config.prepare, config.data.dataset, progress=False, overwrite=True)


def _train(config: Config) -> None:
    launch(config, work=trained)


def _megabytes(stage: str, memory: PeakMemory) -> dict[str, float]:
    return {f"{stage}: {role} peak_mb": round(size / 1e6, 1) for role, size in sorted(memory.peaks.items())}


def _table_bytes(config: Config) -> int:
    """Of all tables with their fused optimizer's state."""
    schema = TaskDataset.open(config.data.dataset).schema
    total = 0
    for spec in build_model(schema, config, tables_device="meta").tables.specs:
        state = {"sgd": 0, "rowwise_adagrad": 1, "adagrad": spec.width}[config.train.optimizer.table]
        total += spec.rows * (spec.width + state) * torch.float32.itemsize
    return total


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipe = Path(__file__).resolve().parents[1] / "configs" / "million-users-maml.yaml"
    parser.add_argument("recipe", nargs="?", default=str(recipe))
    parser.add_argument("--workers", type=int, nargs="*", default=[])
    parser.add_argument("--users", type=int, nargs="*", default=[])
    parser.add_argument("--items", type=int, default=0, help="for --users; default: in the recipe's proportion")
    parser.add_argument("--equal-steps", action="store_true", help="for --users: as many steps as the largest's epoch")
    parser.add_argument("--bench-users", type=int, default=20_000, help="users of the dataset for --workers")
    parser.add_argument("--train-workers", type=int, default=2, help="workers for --users")
    parser.add_argument("--steps", type=int, default=110, help="of a round, for --workers")
    parser.add_argument("--rounds", type=int, default=3, help="for --workers")
    parser.add_argument("--folder", help="for datasets and runs; default: one that goes afterwards")
    parser.add_argument("--json", type=Path, help="write machine, versions, configuration and rows there")
    options = parser.parse_args()
    if not options.workers and not options.users:
        options.workers, options.users = [1, 2], [1000, 10_000, 100_000]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="metatrain-bench-") as temporary:
        folder = options.folder or temporary
        if options.workers:
            config = synthetic_recipe(options.recipe, options.bench_users, folder)
            rows += over_workers(config, options.workers, options.steps, options.rounds)
        if options.users:
            rows += over_users(
                options.recipe, options.users, options.items, options.train_workers, folder, options.equal_steps
            )
        write_json(options.json, options, rows)


if __name__ == "__main__":
    # By its module's name: see bench_train.py.
    import bench_scaling

    bench_scaling.main()
