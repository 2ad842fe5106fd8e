"""Measure the feed up to the trainer: events a second beside a raw scan of the same columns of the same files.

    python tools/bench_reader.py [--dataset URL | --users 800000] [--tasks 64 256 1024] [--timestamps] [--json FILE]

Paths, each on one core:

- scan: pyarrow decodes the projected columns of all row groups, file after file, on one thread, and drops them;
- reader: `BatchReader.read_steps` makes the batches in this process, several steps a call as the actor does;
- step: the same by `BatchReader.read`, one step a call;
- actor: a `TaskReader` makes them in a process of its own, pinned to one core with all its threads; this process,
  on another core, takes them from Ray's object store through `TaskStream.batches` and makes `tensors()`. Ray's own
  processes are on that other core too.

The columns are those that training reads; with --timestamps the events' times too, which no learner sees.

Every round runs every path once, over one epoch of the training split, so that a busy machine slows all alike; each
round's share of the scan is taken within the round, and medians over the rounds are shown. The first epoch of a path,
with its opening of files, is not timed. Without --dataset, a synthetic one is prepared in a temporary folder. It should
be many times what a reader reads ahead, 65,536 tasks: an actor reads ahead of an epoch before the epoch is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_common import write_json

from metatrain import storage
from metatrain.config import DataConfig, PrepareConfig, Synthetic
from metatrain.data.batch import TaskBatch
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.pace import CALL_BYTES
from metatrain.data.prepare import prepare
from metatrain.data.reader import BatchReader
from metatrain.data.stream import TaskStream

SEED = 0
COLUMNS = ("path", "tasks_per_step", "events_per_second", "tasks_per_second", "megabytes_per_second", "share_of_scan")


class Feed:
    """The paths over one dataset. Each is called with a number of epochs done, and goes through one epoch."""

    def __init__(self, url: str, cores: tuple[int, int], timestamps: bool) -> None:
        self.dataset = TaskDataset.open(url)
        self.cores, self.timestamps = cores, timestamps
        self.shards = self.dataset.manifest.of(Split.TRAIN)
        self.names = [
            *("items", "labels", *(["timestamps"] if timestamps else [])),
            *(f"{f.level.value}:{f.name}" for f in self.dataset.schema.features if f.level.value != "item"),
        ]
        self.bytes = sum(table.nbytes for table in self._tables())
        self._open = contextlib.ExitStack()

    def close(self) -> None:
        """Ends readers."""
        self._open.close()

    def scan(self, epoch: int) -> None:
        """Decodes every row group and drops it."""
        for _ in self._tables():
            pass

    def _tables(self) -> Iterator[pa.Table]:
        for shard in self.shards:
            # Of pyarrow's ways the quickest here: no reading ahead by threads, no checksums.
            file = pq.ParquetFile(storage.join(self.dataset.url, shard.path), pre_buffer=False)
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=self.names, use_threads=False)

    def reader(self, data: DataConfig, steps_per_call: int | None) -> Callable[[int], None]:
        """Batches made in this process; None: as many steps a call as an actor makes."""
        own = BatchReader.from_config(
            self.dataset, data, Split.TRAIN, ItemSet.EXISTING, data.episode, SEED, timestamps=self.timestamps
        )
        self._open.callback(own.close)
        if steps_per_call is None:
            steps_per_call = max(1, CALL_BYTES // own.read_steps(0, 0, 1, range(data.lanes)).bytes)

        def run(epoch: int) -> None:
            count = own.steps(epoch)
            for step in range(0, count, steps_per_call):
                for batch in own.read_steps(epoch, step, min(steps_per_call, count - step), range(data.lanes)):
                    _used(batch)

        return run

    def actor(self, data: DataConfig) -> tuple[Callable[[int], None], TaskStream]:
        """Batches made by an actor, taken here as tensors."""
        stream = TaskStream(self.dataset.url, data, seed=SEED, timestamps=self.timestamps)
        self._open.callback(stream.close)
        # Threads that the reader starts later stay where the one that starts them is.
        for thread in os.listdir(f"/proc/{stream.pids()[0]}/task"):
            os.sched_setaffinity(int(thread), {self.cores[0]})

        def run(epoch: int) -> None:
            os.sched_setaffinity(0, {self.cores[1]})
            try:
                for batch in stream.batches(epoch):
                    _used(batch.tensors())
            finally:
                os.sched_setaffinity(0, {self.cores[0]})

        return run, stream


def _used(batch: TaskBatch) -> None:
    assert batch.size or batch.skipped, "a step without a task"


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(
    url: str, cores: tuple[int, int], sizes: list[int], rounds: int, data: DataConfig, timestamps: bool
) -> list[dict[str, object]]:
    """A row for each path and size, readers on the first of the cores."""
    os.sched_setaffinity(0, {cores[0]})
    feed = Feed(url, cores, timestamps)
    paths: dict[tuple[str, int], Callable[[int], None]] = {("scan", 0): feed.scan}
    streams: dict[int, TaskStream] = {}
    for size in sizes:
        own = data.model_copy(update={"tasks_per_step": size})
        paths["reader", size] = feed.reader(own, None)
        paths["step", size] = feed.reader(own, 1)
        paths["actor", size], streams[size] = feed.actor(own)
    seconds: dict[tuple[str, int], list[float]] = {name: [] for name in paths}
    reader_cpu: dict[int, list[float]] = {size: [] for size in sizes}
    gc.freeze()  # as an actor does: collections that look through all that is imported would be a tenth of the time
    try:
        for epoch in range(rounds + 1):
            for (path, size), run in paths.items():
                before = cpu_seconds(streams[size].pids()[0]) if path == "actor" else 0.0
                begun = time.perf_counter()
                run(epoch)
                passed = time.perf_counter() - begun
                if epoch:  # the first one opens files
                    seconds[path, size].append(passed)
                    if path == "actor":
                        reader_cpu[size].append((cpu_seconds(streams[size].pids()[0]) - before) / passed)
        idle = {size: cpu_seconds(stream.pids()[0]) for size, stream in streams.items()}
        time.sleep(3)
        idle = {size: (cpu_seconds(stream.pids()[0]) - idle[size]) / 3 for size, stream in streams.items()}
    finally:
        feed.close()
    scans = seconds["scan", 0]
    tasks, events = feed.dataset.manifest.tasks[Split.TRAIN], feed.dataset.manifest.events[Split.TRAIN]
    rows: list[dict[str, object]] = []
    for (path, size), times in seconds.items():
        middle = statistics.median(times)
        row: dict[str, object] = {
            "path": path,
            "tasks_per_step": size,
            "events_per_second": round(events / middle),
            "tasks_per_second": round(tasks / middle),
            "megabytes_per_second": round(feed.bytes / middle / 1e6, 1),
            "share_of_scan": round(statistics.median(s / t for s, t in zip(scans, times, strict=True)), 3),
        }
        if path == "actor":
            row["reader_cpu_share"] = round(statistics.median(reader_cpu[size]), 3)
            row["idle_cpu_share"] = round(idle[size], 3)
        rows.append(row)
    return rows


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="a task dataset on this machine; default: a synthetic one is prepared")
    parser.add_argument("--users", type=int, default=800_000, help="of the synthetic log")
    parser.add_argument("--items", type=int, default=20_000, help="of the synthetic log")
    parser.add_argument("--events", type=int, default=60, help="of a user of the synthetic log, on average")
    parser.add_argument("--tasks", type=int, nargs="+", default=[64, 256, 1024], help="tasks a step")
    parser.add_argument("--timestamps", action="store_true", help="read the events' times too")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write machine, versions, configuration and rows there")
    options = parser.parse_args()
    pa.set_cpu_count(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        url = options.dataset or folder
        if not options.dataset:
            log = Synthetic(users=options.users, items=options.items, events_per_user=options.events)
            prepare(PrepareConfig(source="synthetic", synthetic=log), url, progress=False, overwrite=True)
        data = DataConfig(dataset=url)
        allowed = sorted(os.sched_getaffinity(0))
        cores = (allowed[0], allowed[-1])
        os.sched_setaffinity(0, {cores[1]})  # and Ray's processes, which start from this one
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            rows = measure(url, cores, options.tasks, options.rounds, data, options.timestamps)
        finally:
            ray.shutdown()
    print("{:<8}{:>15}{:>12}{:>10}{:>8}{:>8}".format("path", "tasks a step", "events/s", "tasks/s", "MB/s", "scan"))
    for row in rows:
        path, size, events, tasks, megabytes, share = (row[name] for name in COLUMNS)
        line = f"{path:<8}{size or '':>15}{events:>12,}{tasks:>10,}{megabytes:>8}{share:>8.0%}"
        if path == "actor":
            line += f"  reader's CPU {row['reader_cpu_share']:.0%}, idle {row['idle_cpu_share']:.0%}"
        print(line)
    write_json(options.json, options, rows)


if __name__ == "__main__":
    main()
