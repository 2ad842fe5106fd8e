"""Count what workers do and send in a step: weak scaling on as many simulated nodes as you like, whatever the cores.

    python tools/bench_traffic.py [RECIPE] [--workers 1 2 4 8] [--tasks-per-worker 512] [--sharding row_wise]

Each worker is a process with one thread, joined to the others by gloo as nodes would be; it reads its lanes itself. The
same steps as in training are taken. With more workers than cores seconds say nothing, so what is shown is work: tasks,
ids, and CPU time of a worker; and bytes that a worker sends to the others in a step, by kind:

    sizes, lengths, ids   the exchange of ids: how many, and which
    rows, gradients       looked-up rows there, their gradients back
    sums                  counts of tasks, gradients of data-parallel tables, and what else the step itself reduces
    dense                 gradients of dense parameters

Of what is reduced, sent is what a ring sends of it. All that is shown beside what the model predicts
(`projection.step_bytes`), from the number of distinct ids that were looked up.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_common import changed, synthetic_recipe, write_json
from bench_ranks import on_ranks, rank_of
from projection import step_bytes

from metatrain.config import Config
from metatrain.data.prepare import prepare
from metatrain.model.tables import Tables

WARM_UP = 2
KINDS = ("sizes", "lengths", "ids", "rows", "gradients", "sums", "dense")


class Traffic:
    """Counts the bytes that this rank sends to others, by kind, from when it is made."""

    def __init__(self) -> None:
        from torchrec.distributed import dist_data

        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.keys: dict[str, int] = {}
        self.ids = 0
        self._labels: list[str] = []
        self._backward = False
        exchange, reduce, backward = dist.all_to_all_single, dist.all_reduce, torch.Tensor.backward
        tensors, request = dist_data.KJTAllToAllTensorsAwaitable.__init__, Tables.request

        names = ("output", "input", "output_split_sizes", "input_split_sizes")

        def all_to_all_single(*args: Any, **options: Any) -> Any:
            called = dict(zip(names, args, strict=False)) | options
            given, splits = called["input"], called.get("input_split_sizes")
            mine = (splits or [given.shape[0] // dist.get_world_size()] * dist.get_world_size())[dist.get_rank()]
            row = given[0].numel() * given.element_size() if given.shape[0] else 0
            self._count(self._kind(given), (given.shape[0] - mine) * row)
            return exchange(*args, **options)

        def all_reduce(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
            self._count("dense" if self._backward else "sums", tensor.numel() * tensor.element_size())
            return reduce(tensor, *args, **options)

        def labelled(this: Any, *args: Any, **options: Any) -> None:
            self._labels = ["ids" if label == "values" else label for label in options.get("labels", args[6:7])]
            tensors(this, *args, **options)
            self._labels = []

        def backwards(this: torch.Tensor, *args: Any, **options: Any) -> None:
            self._backward = True
            backward(this, *args, **options)
            self._backward = False

        def requested(this: Tables, ids: Any) -> Any:
            found = request(this, ids)
            self.keys = {name: keys.numel() for name, keys in found.keys.items()}
            self.ids = sum(found.sizes.values())
            return found

        for owner, name, counting in (
            (dist, "all_to_all_single", all_to_all_single),
            (dist, "all_reduce", all_reduce),
            (dist_data.KJTAllToAllTensorsAwaitable, "__init__", labelled),
            (torch.Tensor, "backward", backwards),
            (Tables, "request", requested),
        ):
            setattr(owner, name, counting)

    def take(self) -> dict[str, Counter[str]]:
        """What was sent, and by how many calls, since the last call of this."""
        found = {"sent": self.sent, "calls": self.calls}
        self.sent, self.calls = Counter(), Counter()
        return found

    def _kind(self, given: torch.Tensor) -> str:
        if given.is_floating_point():
            return "gradients" if self._backward else "rows"
        return self._labels.pop(0) if self._labels else "sizes"

    def _count(self, kind: str, size: int) -> None:
        self.sent[kind] += size
        self.calls[kind] += 1


def counting(rank: int, world_size: int, folder: str, config: Config, steps: int) -> list[dict[str, float]]:
    """What every worker does: takes steps and counts. Its rows."""
    traffic, rows = Traffic(), []
    with rank_of(config, rank, world_size, folder) as this:
        for step in range(WARM_UP + steps):
            batch = this.read(step)
            traffic.take()
            begun = time.thread_time()
            this.loop.step(batch, step)
            seconds = time.thread_time() - begun
            counted = traffic.take()
            keys = {name: count for name, count in traffic.keys.items() if name in this.widths}
            ring = 2 * (world_size - 1) / world_size
            for kind in ("sums", "dense"):
                counted["sent"][kind] = int(ring * counted["sent"][kind])
            predicted = step_bytes(
                [(this.widths[n], count) for n, count in keys.items()], world_size, this.dense_numbers
            )
            row: dict[str, float] = {"tasks": batch.size, "events": batch.labels.shape[0], "cpu_ms": 1e3 * seconds}
            row |= {"ids": traffic.ids, "distinct_ids": sum(traffic.keys.values())}
            row |= {f"{kind}_bytes": counted["sent"][kind] for kind in KINDS}
            row |= {f"{kind}_predicted": predicted[kind] for kind in predicted}
            row["calls"] = sum(counted["calls"].values())
            rows.append(row)
    return rows[WARM_UP:]


def counted(config: Config, workers: int, steps: int) -> dict[str, float]:
    """The mean worker's mean step."""
    ranks = on_ranks(counting, workers, config, steps)
    rows = [row for of_rank in ranks for row in of_rank]
    mean = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    mean["rows_most"] = max(statistics.fmean(row["rows_bytes"] for row in of_rank) for of_rank in ranks)
    return {"workers": workers, **{name: round(value, 1) for name, value in mean.items()}}


def show(rows: list[dict[str, float]]) -> None:
    """Prints the table of work, and that of bytes beside the model's."""
    print("\na worker's step:", "  ".join(f"{row['workers']:>9} worker(s)" for row in rows))
    for name in ("tasks", "events", "ids", "distinct_ids", "cpu_ms", "calls"):
        print(f"{name:<16}", "  ".join(f"{row[name]:>19,.0f}" for row in rows))
    print("\nkB sent, counted (predicted)")
    for kind in KINDS:
        cells = []
        for row in rows:
            predicted = f"({row[f'{kind}_predicted'] / 1e3:,.1f})" if f"{kind}_predicted" in row else ""
            cells.append(f"{row[f'{kind}_bytes'] / 1e3:>9,.1f} {predicted:>9}")
        print(f"{kind:<16}", "  ".join(cells))
    totals = [(sum(row[f"{k}_bytes"] for k in KINDS), sum(row.get(f"{k}_predicted", 0) for k in KINDS)) for row in rows]
    print(f"{'busiest: rows':<16}", "  ".join(f"{row['rows_most'] / 1e3:>9,.1f} {'':>9}" for row in rows))
    print(f"{'all':<16}", "  ".join(f"{c / 1e3:>9,.1f} {f'({p / 1e3:,.1f})':>9}" for c, p in totals))


def main() -> None:
    """Parse the command line, count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipe = Path(__file__).resolve().parents[1] / "configs" / "million-users-maml.yaml"
    parser.add_argument("recipe", nargs="?", default=str(recipe))
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tasks-per-worker", type=int, default=512)
    parser.add_argument("--users", type=int, default=20_000, help="of the synthetic dataset")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--sharding", default="row_wise", help="of all tables")
    parser.add_argument("--folder", help="for the dataset; default: one that goes afterwards")
    parser.add_argument("--json", type=Path, help="write machine, versions, configuration and rows there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="metatrain-bench-") as temporary:
        config = synthetic_recipe(options.recipe, options.users, options.folder or temporary)
        prepare(config.prepare, config.data.dataset, progress=False, overwrite=True)
        rows = []
        for workers in options.workers:
            tasks = options.tasks_per_worker * workers
            config = changed(
                config,
                data={"tasks_per_step": tasks, "lanes": max(config.data.lanes, workers)},
                model={"tables": {"*": {"sharding": options.sharding}}},
            )
            rows.append(counted(config, workers, options.steps))
            print(rows[-1], flush=True)
        show(rows)
        write_json(options.json, options, rows)


if __name__ == "__main__":
    main()
