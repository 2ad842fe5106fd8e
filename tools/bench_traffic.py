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
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_common import changed, synthetic_recipe, write_json
from projection import step_bytes

from metatrain.config import Config
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import Split
from metatrain.data.plan import lanes_of
from metatrain.data.prepare import prepare
from metatrain.model.build import build_model
from metatrain.model.sharding import distribute
from metatrain.model.table_plan import Workers, plan_tables
from metatrain.model.tables import Tables
from metatrain.train.outer import DenseOptimizer
from metatrain.train.readers import open_reader
from metatrain.train.step import OuterLoop

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


def worker(rank: int, config: Config, world_size: int, steps: int, folder: str) -> None:
    """What every worker does: takes steps, counts, and leaves its rows in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timedelta(minutes=10)
    )
    traffic = Traffic()
    dataset = TaskDataset.open(config.data.dataset)
    model = build_model(dataset.schema, config, tables_device="meta")
    optimizer = config.train.optimizer
    plan = plan_tables(model.tables.specs, config.model.tables, optimizer.table, Workers(world_size, 1))
    distributed = distribute(model, optimizer, plan=plan)
    dense = distributed.dense_parameters()
    numbers = sum(p.numel() for p in dense.values())
    loop = OuterLoop(distributed, DenseOptimizer(dense, optimizer), config, 1_000_000, world_size)
    reader = open_reader(dataset, config, Split.TRAIN)
    lanes = lanes_of(range(config.data.lanes), world_size, rank)
    widths = {spec.name: spec.width for spec in model.tables.specs if spec.name not in plan.replicated}
    rows = []
    for step in range(WARM_UP + steps):
        batch = reader.read(0, step % reader.steps(0), lanes).tensors()
        traffic.take()
        begun = time.thread_time()
        loop.step(batch, step)
        seconds = time.thread_time() - begun
        counted = traffic.take()
        keys = {name: count for name, count in traffic.keys.items() if name in widths}
        ring = 2 * (world_size - 1) / world_size
        for kind in ("sums", "dense"):
            counted["sent"][kind] = int(ring * counted["sent"][kind])
        predicted = step_bytes([(widths[n], count) for n, count in keys.items()], world_size, numbers)
        row: dict[str, float] = {"tasks": batch.size, "events": batch.labels.shape[0], "cpu_ms": 1e3 * seconds}
        row |= {"ids": traffic.ids, "distinct_ids": sum(traffic.keys.values())}
        row |= {f"{kind}_bytes": counted["sent"][kind] for kind in KINDS}
        row |= {f"{kind}_predicted": predicted[kind] for kind in predicted}
        row["calls"] = sum(counted["calls"].values())
        rows.append(row)
    reader.close()
    torch.save(rows[WARM_UP:], Path(folder, f"{rank}.rows"))
    dist.barrier()
    dist.destroy_process_group()


def counted(config: Config, workers: int, steps: int) -> dict[str, float]:
    """The mean worker's mean step."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (config, workers, steps, folder), nprocs=workers)
        ranks = [torch.load(Path(folder, f"{rank}.rows"), weights_only=True) for rank in range(workers)]
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
