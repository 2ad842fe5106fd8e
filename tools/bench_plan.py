"""Measure the plan of a very large dataset: seconds and memory until a reader gives the batch of any step.

    python tools/bench_plan.py [--tasks 1000000000] [--json FILE]

A real shard is written once and linked under as many names as the dataset has shards, so that manifest, plan and
reader work on a billion users whose files take a few megabytes. Row groups are even (all of --row-group tasks) or
uneven (1 to twice as many). Every row is measured in a process of its own, whose peak memory is shown.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_common import write_json

from metatrain.config import EpisodeConfig
from metatrain.data.manifest import VERSION, ItemSet, Manifest, Shard, Split, read_manifest
from metatrain.data.plan import EpochPlan
from metatrain.data.reader import BatchReader
from metatrain.data.schema import LabelKind, Schema
from metatrain.data.shards import row_groups

EVENTS, ITEMS = 3, 100
OPTIONS = {"seed": 0, "window": 8}


def make_dataset(folder: Path, tasks: int, row_group: int, groups_a_shard: int, uneven: bool) -> Manifest:
    """A dataset of at least so many training tasks."""
    sizes = np.full(groups_a_shard, row_group)
    if uneven:
        sizes = np.random.default_rng(0).integers(1, 2 * row_group, groups_a_shard)
    users = int(sizes.sum())
    shards = -(-tasks // users)
    real = folder / "shard.parquet"
    events = users * EVENTS
    offsets = pa.array(np.arange(0, events + 1, EVENTS, dtype=np.int32))
    columns = {
        "key": pa.array([str(i) for i in range(users)]),
        "items": pa.array(np.arange(events, dtype=np.int32) % ITEMS),
        "labels": pa.array(np.ones(events, np.float32)),
        "timestamps": pa.array(np.arange(events, dtype=np.int64)),
    }
    table = pa.table({n: c if n == "key" else pa.ListArray.from_arrays(offsets, c) for n, c in columns.items()})
    with pq.ParquetWriter(real, table.schema, compression="zstd", write_page_checksum=True) as writer:
        start = 0
        for size in sizes.tolist():
            writer.write_table(table.slice(start, size), row_group_size=size)
            start += size
    digest = hashlib.sha256(real.read_bytes()).hexdigest()
    train = folder / "shards" / "train"
    train.mkdir(parents=True)
    listed = []
    for i in range(shards):
        os.link(real, train / f"{i:05d}.parquet")
        listed.append(
            Shard(
                path=f"shards/train/{i:05d}.parquet",
                split=Split.TRAIN,
                row_groups=tuple(sizes.tolist()),
                events=events,
                bytes=real.stat().st_size,
                sha256=digest,
            )
        )
    none = pa.nulls(ITEMS, pa.string())
    catalogue = {"key": [f"item{i}" for i in range(ITEMS)], "title": none, "new": np.zeros(ITEMS, bool)}
    pq.write_table(pa.table(catalogue | {"training_events": np.ones(ITEMS, np.int64)}), folder / "catalogue.parquet")
    manifest = Manifest(
        version=VERSION,
        name="many users",
        schema_=Schema(
            features=(), label=LabelKind.CLICK, label_mean=1.0, label_deviation=1.0, label_min=1.0, label_max=1.0
        ),
        shards=tuple(listed),
        items=ITEMS,
        new_items=0,
        tasks={Split.TRAIN: users * shards, Split.VALIDATION: 0, Split.TEST: 0},
        events={Split.TRAIN: events * shards, Split.VALIDATION: 0, Split.TEST: 0},
        skipped={},
        catalogue_sha256=hashlib.sha256((folder / "catalogue.parquet").read_bytes()).hexdigest(),
        vocabularies_sha256={},
        prepared_with={},
    )
    manifest.write(str(folder))
    return manifest


def _peak_megabytes() -> int:
    """This process's own peak: ru_maxrss would begin at that of the process that started it."""
    return round(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024)


def measure(url: str, lanes: int, tasks_per_step: int) -> dict[str, object]:
    """The row of one dataset, in this process."""
    row: dict[str, object] = {}

    def timed(name: str, call: Callable[[], object]) -> object:
        begun = time.perf_counter()
        found = call()
        row[name] = round(time.perf_counter() - begun, 4)
        return found

    started = time.perf_counter()
    manifest = timed("manifest_seconds", lambda: read_manifest(url))
    assert isinstance(manifest, Manifest)
    sizes = row_groups(manifest.of(Split.TRAIN))
    shape = {"lanes": lanes, "tasks_per_step": tasks_per_step}
    plan = timed("plan_seconds", lambda: EpochPlan(sizes, epoch=1, **OPTIONS, **shape))
    assert isinstance(plan, EpochPlan)
    row["until_planned_seconds"] = round(time.perf_counter() - started, 4)
    row["peak_megabytes_planned"] = _peak_megabytes()
    for name, step in (("first", 0), ("middle", plan.steps // 2), ("last", plan.steps - 1)):
        taken = []
        for lane in range(lanes):  # each at a window that it has not been at
            begun = time.perf_counter()
            plan.slices(lane, step)
            taken.append(time.perf_counter() - begun)
        row[f"seek_{name}_milliseconds"] = round(statistics.median(taken) * 1e3, 3)
    del plan

    def late_batch() -> int:
        options = {"lanes_total": lanes, "tasks_per_step": tasks_per_step, **OPTIONS}
        reader = BatchReader(url, Split.TRAIN, ItemSet.EXISTING, EpisodeConfig(), **options)
        with contextlib.closing(reader):
            return reader.read(1, reader.steps(1) - 4, [0]).size  # behind it a lane may be short

    assert timed("reader_at_a_late_step_seconds", late_batch) == tasks_per_step // lanes
    peak = _peak_megabytes()
    size = os.path.getsize(os.path.join(url, "manifest.json"))
    counts = {"tasks": manifest.tasks[Split.TRAIN], "row_groups": len(sizes), "shards": len(manifest.shards)}
    return counts | {"manifest_megabytes": round(size / 1e6, 1)} | row | {"peak_megabytes": peak}


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1_000_000_000)
    parser.add_argument("--row-group", type=int, default=1024, help="tasks in a row group")
    parser.add_argument("--groups", type=int, default=250, help="row groups in a shard")
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--tasks-per-step", type=int, default=65_536)
    parser.add_argument("--json", type=Path, help="write machine, versions, configuration and rows there")
    parser.add_argument("--measure", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.lanes, options.tasks_per_step)))
        return
    rows: list[dict[str, object]] = []
    for sizes in ("even", "uneven"):
        with tempfile.TemporaryDirectory() as folder:
            make_dataset(Path(folder), options.tasks, options.row_group, options.groups, sizes == "uneven")
            command = [sys.executable, __file__, "--measure", folder, "--lanes", str(options.lanes)]
            command += ["--tasks-per-step", str(options.tasks_per_step)]
            found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append({"row_group_sizes": sizes, **json.loads(found.stdout)})
    for name in rows[0]:
        print(f"{name.replace('_', ' '):<32}" + "".join(f"{row[name]!s:>16}" for row in rows))
    write_json(options.json, options, rows)


if __name__ == "__main__":
    main()
