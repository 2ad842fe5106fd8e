"""Measure preparing: events a second and peak memory of `metatrain prepare`, beside DuckDB's grouping of the same log.

    python tools/bench_prepare.py [--events 3000000 30000000] [--rounds 3] [--json FILE] [--duckdb FOLDER]

The log is one Parquet file in time order with integer keys: every user's events are spread over all of it, which is
the hardest case to group. `metatrain` is the whole command, its start and end included: it reads, checks, groups,
splits, counts, encodes and writes. DuckDB, which is optional, reads the same columns, groups them by user in time order
and writes the lists to Parquet; each way to say so in SQL is a row:

    list_sort   list_sort(list({time, item, label})), one sort of a user's events: the quickest that is right
    order_by    list(x ORDER BY time) for each column
    (a sorted subquery under list() is quicker still, but with two threads it leaves users out of order)

`metatrain, synthetic` prepares a log that it draws itself, with features of users and items. A small log is prepared
in one process; `metatrain in Ray` is the same log in Ray tasks, for comparing memory with that of a large one.
Runs are interleaved: every round runs every row once; medians of the seconds, greatest memory over the rounds. Memory
is private (RssAnon), so that pages of files and of Ray's object store, which processes share, are not counted.

    pip install --no-deps --target /tmp/duck duckdb
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_common import PACKAGES, descendants, private_bytes, versions, write_json

from metatrain.data.hashing import normal, unit
from metatrain.data.manifest import read_manifest
from metatrain.data.randomness import hashed

_PIECE = 1 << 20
_QUERIES = {
    "list_sort": "SELECT user_id, list_transform(l, lambda x: x.i) items, list_transform(l, lambda x: x.l) labels, "
    "list_transform(l, lambda x: x.t) times FROM (SELECT user_id, list_sort(list({t: timestamp, i: item_id, l: label}))"
    " l FROM read_parquet('LOG') GROUP BY user_id)",
    "order_by": "SELECT user_id, list(item_id ORDER BY timestamp) items, list(label ORDER BY timestamp) labels, "
    "list(timestamp ORDER BY timestamp) times FROM read_parquet('LOG') GROUP BY user_id",
}
_DUCKDB = """
import duckdb
connection = duckdb.connect()
connection.execute("SET enable_progress_bar = false")
connection.execute("SET threads = THREADS")
connection.execute("SET preserve_insertion_order = false")
connection.execute("COPY (QUERY) TO 'OUT' (FORMAT parquet, COMPRESSION zstd)")
"""
_CHECK = """
import duckdb
duckdb.sql("SET enable_progress_bar = false")  # it would stand among the figures of a slow query
print(*duckdb.sql("SELECT sum(len(times)), count_if(list_sort(times) <> times) FROM read_parquet('OUT')").fetchall()[0])
"""
_IN_RAY = """
import logging, ray
from metatrain.config import PrepareConfig
from metatrain.data.prepare import prepare
ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
prepare(PrepareConfig(source="events", path="LOG"), "OUT", progress=False)
ray.shutdown()
"""


@dataclass
class Runner:
    """One way to do it, and what was measured of it."""

    name: str
    command: Callable[[Path], list[str]]  # by the path to write to
    environment: dict[str, str]
    events: Callable[[Path], int]  # of what was written, after a check of it
    seconds: list[float] = field(default_factory=list)
    largest: int = 0
    together: int = 0
    found: int = 0

    def run(self, out: Path) -> None:
        """Runs it once and takes its time and memory."""
        start = time.perf_counter()
        process = subprocess.Popen(self.command(out), env=self.environment, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            sizes = [private_bytes(pid) for pid in descendants(process.pid)]
            self.largest = max(self.largest, *sizes, 0)
            self.together = max(self.together, sum(sizes))
            time.sleep(0.05)
        self.seconds.append(time.perf_counter() - start)
        if process.returncode:
            raise SystemExit(f"{self.name} ended with status {process.returncode}")
        self.found = self.events(out)
        shutil.rmtree(out) if out.is_dir() else out.unlink()


def write_log(path: Path, events: int, items: int) -> None:
    """A log of `events` events of a thirtieth as many users: every draw is a hash of the event's number."""
    users = max(events // 30, 1)
    writer: pq.ParquetWriter | None = None
    for start in range(0, events, _PIECE):
        n = np.arange(start, min(start + _PIECE, events))
        table = pa.table(
            {
                "user_id": (hashed(1, n) % np.uint64(users)).astype(np.int64),
                "item_id": (items * unit(hashed(2, n)) ** 3).astype(np.int64),
                "label": (3.5 + normal(hashed(3, n))).astype(np.float32),
                "timestamp": 1_577_836_800 + n // 4,
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    assert writer is not None
    writer.close()


def runners(log: Path, events: int, options: argparse.Namespace) -> list[Runner]:
    """All that can run here."""
    root = str(Path(__file__).resolve().parents[1])
    ours = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    theirs = ours | {"PYTHONPATH": os.pathsep.join(filter(None, (options.duckdb, ours["PYTHONPATH"])))}
    command = [sys.executable, "-c", "from metatrain.cli import main; main()", "prepare"]
    synthetic = ["--synthetic.users", str(max(events // 30, 1)), "--synthetic.items", str(options.items)]

    def prepared(out: Path) -> int:
        manifest = read_manifest(str(out))
        return sum(manifest.events.values()) + sum(n for reason, n in manifest.skipped.items() if "events" in reason)

    def grouped(out: Path) -> int:
        code = _CHECK.replace("OUT", str(out))
        check = [sys.executable, "-c", code]
        checked = subprocess.run(check, env=theirs, stdout=subprocess.PIPE, text=True, check=True).stdout
        total, unordered = map(int, checked.split())
        if unordered:
            raise SystemExit(f"DuckDB left {unordered} users out of time order")
        return total

    def by_duckdb(query: str) -> Callable[[Path], list[str]]:
        code = _DUCKDB.replace("QUERY", query.replace("LOG", str(log))).replace("THREADS", str(os.cpu_count()))
        return lambda out: [sys.executable, "-c", code.replace("OUT", str(out))]

    in_ray = _IN_RAY.replace("LOG", str(log))
    found = [
        Runner("metatrain", lambda out: [*command, "events", "--path", str(log), "--out", str(out)], ours, prepared),
        Runner("metatrain in Ray", lambda out: [sys.executable, "-c", in_ray.replace("OUT", str(out))], ours, prepared),
        Runner(
            "metatrain, synthetic", lambda out: [*command, "synthetic", *synthetic, "--out", str(out)], ours, prepared
        ),
    ]
    there = subprocess.run([sys.executable, "-c", "import duckdb"], env=theirs, capture_output=True, check=False)
    if there.returncode:
        print("absent: duckdb (install it, or name its folder with --duckdb)")
        return found
    return found + [Runner(f"duckdb {name}", by_duckdb(query), theirs, grouped) for name, query in _QUERIES.items()]


def measure(events: int, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of one size."""
    log = folder / "log.parquet"
    write_log(log, events, options.items)
    engines = [r for r in runners(log, events, options) if not options.runners or r.name in options.runners]
    for _ in range(options.rounds):
        for engine in engines:
            engine.run(folder / "out")
    peers = [r.found / statistics.median(r.seconds) for r in engines if r.name.startswith("duckdb")]
    rows = []
    for r in engines:
        seconds = statistics.median(r.seconds)
        rate = r.found / seconds
        rows.append(
            {
                "runner": r.name,
                "events": r.found,
                "items": options.items,
                "seconds": round(seconds, 2),
                "seconds_least": round(min(r.seconds), 2),
                "seconds_most": round(max(r.seconds), 2),
                "events_per_second": round(rate),
                "times_duckdb": round(rate / max(peers), 2) if peers else None,
                "largest_process_mb": round(r.largest / 2**20),
                "all_processes_mb": round(r.together / 2**20),
            }
        )
    log.unlink()
    return rows


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=[3_000_000, 30_000_000], help="sizes of the log")
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runners", nargs="+", help="these alone, by name (default: all)")
    parser.add_argument("--duckdb", help="folder with DuckDB's package (pip install --target)")
    parser.add_argument("--folder", help="where to write logs and datasets (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write machine, versions, configuration and rows there")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    titles = ("runner", "events", "seconds", "events/s", "x duckdb", "largest MB", "all MB")
    print("{:<22} {:>11} {:>8} {:>10} {:>8} {:>10} {:>7}".format(*titles))
    for events in options.events:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found = measure(events, options, Path(folder))
        rows += found
        for r in found:
            ratio = "" if r["times_duckdb"] is None else f"{r['times_duckdb']:.2f}"
            print(
                f"{r['runner']:<22} {r['events']:>11,} {r['seconds']:>8.1f} {r['events_per_second']:>10,} {ratio:>8} "
                f"{r['largest_process_mb']:>10,} {r['all_processes_mb']:>7,}",
                flush=True,
            )
    sys.path.append(options.duckdb or "")
    write_json(options.json, options, rows, versions((*PACKAGES, "duckdb")))


if __name__ == "__main__":
    main()
