"""Plan, train, checkpoint, go on and evaluate with a table larger than any one worker is to hold.

    python tools/big_table.py [--rows 50_000_000] [--width 32] [--workers 4] [--folder FOLDER] [--json FILE]

Users' events carry an id of an unbounded space (a page, say), which is hashed into so many rows. The run is the
product's own: launched on a local Ray, sharded by TorchRec's planner, checkpointed, resumed in a second launch, and
evaluated in one process, which holds the whole table. What is printed: the counted footprint and the plan, then
seconds, bytes of the checkpoint, and the peak of private memory of each kind of process.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_common import PeakMemory, write_json

from metatrain import storage
from metatrain.checkpoint import committed_steps
from metatrain.checkpoint.format import checkpoint_url
from metatrain.config import Config
from metatrain.data.dataset import TaskDataset
from metatrain.data.prepare import prepare
from metatrain.evaluate.evaluation import evaluate_run
from metatrain.model.table_plan import Workers
from metatrain.train.footprint import footprint
from metatrain.train.launch import launch
from metatrain.train.worker import Seat, Training

RESULT = "big-table.json"


def write_log(path: Path, users: int, events: int, seed: int = 0) -> None:
    """A log whose labels depend on user, item, and the parity of the page's number."""
    draw = np.random.default_rng(seed)
    count = users * events
    user, item = np.repeat(np.arange(users), events), draw.integers(0, 500, count)
    page = draw.integers(0, 1 << 40, count)
    taste = draw.normal(size=(users, 1)) * draw.normal(size=(1, 500))
    label = np.clip(np.round(3 + taste[user, item] + 0.3 * (page % 2)), 1, 5)
    columns = {"user_id": user, "item_id": item, "label": label, "timestamp": np.arange(count), "page": page}
    text = {name: pa.array(columns[name]).cast(pa.string()) for name in ("user_id", "item_id", "page")}
    pq.write_table(pa.table(columns | text), path)


def recipe(folder: str, rows: int, width: int, workers: int, steps: int) -> Config:
    """The run: one large table beside the items' own."""
    return Config.model_validate(
        {
            "run": {"name": "big-table", "storage": storage.join(folder, "runs")},
            "prepare": {
                "source": "events",
                "path": storage.join(folder, "log.parquet"),
                "item_width": width,
                "features": [
                    {"name": "page", "level": "event", "kind": "categorical", "width": width, "buckets": rows}
                ],
            },
            "data": {"dataset": storage.join(folder, "dataset"), "tasks_per_step": 256, "lanes": 8},
            "model": {"hidden": [32]},
            "meta": {"memory": 256, "adapt": ["head.*"]},
            "train": {
                "workers": workers,
                "epochs": 1000,
                "max_steps": steps,
                "validate_every": 0,
                "max_failures": 0,
                "log_every": 5,
                "checkpoint": {"every_steps": 0, "keep": 1},
            },
            "evaluate": {"max_tasks": 2000},
        }
    )


def timed(config: Config, seat: Seat) -> None:
    """What every worker does: trains, and rank 0 notes how long it took to be ready, to step and to save."""
    begun = time.perf_counter()
    training = Training(config, seat)
    ready, saving = time.perf_counter(), 0.0
    save = training._save

    def saved(*args: Any, **options: Any) -> None:
        nonlocal saving
        at = time.perf_counter()
        save(*args, **options)
        saving += time.perf_counter() - at

    training._save = saved  # pyright: ignore[reportAttributeAccessIssue]
    first = training.cursor.total
    try:
        training.run()
    finally:
        training.close()
    whole = time.perf_counter() - ready
    if seat.rank == 0:
        found = {"ready": ready - begun, "save": saving, "steps": training.cursor.total - first}
        found["step"] = (whole - saving) / max(1, found["steps"])
        storage.write_atomic(storage.join(config.run_url, RESULT), json.dumps(found))


def run(folder: str, rows: int, width: int, workers: int, users: int, steps: int) -> dict[str, Any]:
    """All of it; returns seconds, bytes and peaks."""
    config = recipe(folder, rows, width, workers, steps)
    write_log(Path(folder, "log.parquet"), users, 30)
    prepare(config.prepare, config.data.dataset, progress=False, overwrite=True)
    begun = time.perf_counter()
    counted = footprint(config, TaskDataset.open(config.data.dataset).manifest, Workers(workers, workers))
    found: dict[str, Any] = {"rows": rows, "width": width, "workers": workers, "plan_seconds": _since(begun)}
    print(counted.plan.text(), counted.text(), sep="\n\n", flush=True)
    for launched, last in (("first", steps), ("resumed", 2 * steps)):
        changed = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": last})})
        with PeakMemory() as memory:
            begun = time.perf_counter()
            launch(changed, work=functools.partial(timed))
            found[f"{launched}_seconds"] = _since(begun)
        inside = json.loads(storage.read_text(storage.join(config.run_url, RESULT)))
        found |= {f"{launched}_{name}": round(value, 3) for name, value in inside.items()}
        found |= {f"{launched}: {role} peak_mb": round(size / 1e6) for role, size in sorted(memory.peaks.items())}
        (step,) = committed_steps(config.run_url)[-1:]
        url = checkpoint_url(config.run_url, step)
        found["checkpoint_bytes"] = sum(f.stat().st_size for f in Path(url).rglob("*") if f.is_file())
        print(f"\n{launched}: {found}", flush=True)
    with PeakMemory() as memory:
        begun = time.perf_counter()
        report = evaluate_run(config.run_url, write=False, progress=False)
        found["evaluate_seconds"] = _since(begun)
    found["evaluate peak_mb"] = round(memory.peaks.get("driver", 0) / 1e6)
    found["partitions_evaluated"] = len(report.partitions)
    return found


def _since(begun: float) -> float:
    return round(time.perf_counter() - begun, 2)


def main() -> None:
    """Parse the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000_000)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--users", type=int, default=5_000)
    parser.add_argument("--steps", type=int, default=20, help="of each of the two launches")
    parser.add_argument("--folder", help="for log, dataset and run; default: one that goes afterwards")
    parser.add_argument("--json", type=Path, help="write machine, versions, configuration and figures there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="metatrain-big-table-") as temporary:
        found = run(
            options.folder or temporary, options.rows, options.width, options.workers, options.users, options.steps
        )
        print()
        for name, value in found.items():
            print(f"{name:<40} {value:>16,}")
        write_json(options.json, options, [found])


if __name__ == "__main__":
    # By its module's name: see bench_train.py.
    import big_table

    big_table.main()
