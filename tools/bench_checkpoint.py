"""Measure checkpoints: what a save costs training, its bytes, and how fast a restore reads.

    python tools/bench_checkpoint.py [--workers 2] [--rows 8388608] [--width 32] [--folder runs/bench] [--json FILE]

The workers (gloo, one CPU thread each) train a sharded table, of 1 GiB by default, and a dense network on ids that are
popular as 1 / rank^skew. They train in rounds of the same steps: without a save, with a full one, with a differential
one that begins with the round. What a save costs is how much longer its round takes than those without (medians): the
wait for the copy and all that is lost to the writing beside it. Its share is of a run that saves every 30 seconds. On a
machine that does other work besides, look at the CPU seconds of a worker that a save adds to a round: they say what a
save may cost at most where all cores are busy, and are less disturbed.

A restore reads into tensors that are there, as a run that goes on does. It is compared with reading the same files into
memory that is there, in the same pieces, with as many processes, nothing checked; before both the machine's page cache
is told to forget the files.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_common import write_json

from metatrain.checkpoint import MODEL, Cursor, Saver, load_checkpoint, read_marker
from metatrain.checkpoint.blocks import BLOCK
from metatrain.checkpoint.format import checkpoint_url
from metatrain.checkpoint.listing import size
from metatrain.config import CheckpointConfig, OptimizerConfig
from metatrain.model.choices import TableSpec
from metatrain.model.sharding import OPTIMIZER_PREFIX, distribute
from metatrain.model.tables import Tables

EVERY = 30.0  # seconds between saves, of which a cost is a share
KINDS = ("none", "full", "differential")


class Scored(nn.Module):
    """A table's rows through a small network."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.tables = Tables((TableSpec("item", rows, width, ("item",)),), dedup=True, device="meta")
        self.network = nn.Sequential(nn.Linear(width, 128), nn.Tanh(), nn.Linear(128, 1))

    def forward(self, ids: Tensor) -> Tensor:
        return (self.network(self.tables({"item": ids})["item"]) - 1).square().mean()


def popular(rows: int, skew: float, count: int, generator: torch.Generator) -> Tensor:
    """Ids whose popularity falls as 1 / rank^skew, by the inverse of the continuous distribution."""
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    if abs(skew - 1) < 1e-9:
        ranks = torch.exp(u * torch.log(torch.tensor(float(rows))))
    else:
        ranks = (1 + u * (rows ** (1 - skew) - 1)) ** (1 / (1 - skew))
    # Spread over the table, so that each worker holds popular rows.
    return (ranks.long().clamp(1, rows) - 1) * 2654435761 % rows


def forget(folder: str) -> None:
    """Asks the machine to drop a folder's files from its page cache."""
    for path in Path(folder).glob("*.bin"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_raw(paths: list[Path], memory: memoryview) -> int:
    """Reads files front to back into `memory`, in a checkpoint's pieces. Returns the bytes."""
    total = 0
    for path in paths:
        descriptor, at = os.open(path, os.O_RDONLY), 0
        while got := os.preadv(descriptor, [memory[total : total + BLOCK]], at):
            at += got
            total += got
        os.close(descriptor)
    return total


def slowest(seconds: float) -> float:
    """Of all ranks."""
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def work(rank: int, options: argparse.Namespace, folder: str) -> None:
    """One rank's part; rank 0 writes the result."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), options.workers)
    dist.init_process_group("gloo", rank=rank, world_size=options.workers, store=store)
    distributed = distribute(Scored(options.rows, options.width), OptimizerConfig(table="rowwise_adagrad"))
    dense = torch.optim.SGD(distributed.dense_parameters().values(), lr=1e-3)
    touched = {
        name if name.startswith(OPTIMIZER_PREFIX) else f"{MODEL}{name}": bitmap
        for name, bitmap in distributed.track().items()
    }

    def state() -> dict[str, Tensor]:
        found = distributed.state_dict().items()
        return {n if n.startswith(OPTIMIZER_PREFIX) else f"{MODEL}{n}": value for n, value in found}

    run = str(Path(folder, "run"))
    config = CheckpointConfig(keep=1, full_every=1 << 30)
    saver = Saver(run, config, state(), touched)
    generator = torch.Generator().manual_seed(rank)
    batches = [popular(options.rows, options.skew, options.ids, generator) for _ in range(64)]
    total = 0

    def train(steps: int) -> None:
        nonlocal total
        for _ in range(steps):
            dense.zero_grad()
            # Fresh ids every step, without the cost of drawing them: each batch is moved a little.
            distributed.module((batches[total % 64] + total // 64 * 7919) % options.rows).backward()
            dense.step()
            total += 1
            saver.check()

    def save() -> Any:
        where = Cursor(epoch=0, step=total, total=total)
        return saver.save(state(), cursor=where, identity={}, loop={}, configuration={}, metrics={})

    train(5)
    start = time.perf_counter()
    train(20)
    steps = max(20, int(options.seconds / slowest(time.perf_counter() - start) * 20))
    save()  # the full one that the differential ones build on
    saver.wait()
    rows: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        for kind in KINDS:
            if kind == "full":
                saver._base = None
            dist.barrier()
            start, cpu = time.perf_counter(), time.process_time()
            saved = save() if kind != "none" else None
            train(steps)
            seconds = slowest(time.perf_counter() - start)
            waiting = time.perf_counter()
            saver.wait()
            row: dict[str, Any] = {"kind": kind, "seconds": seconds, "cpu": slowest(time.process_time() - cpu)}
            row["outlasted_the_round"] = slowest(time.perf_counter() - waiting)
            if saved is not None:
                row |= {"copied": slowest(saved.copied), "bytes": read_marker(run, saved.step).bytes}
            rows.append(row)
            dist.barrier()  # before the next save may remove what is read here
    saver._base = None
    save()
    saver.wait()
    restores = [restored(run, total, state(), rank, options.workers) for _ in range(options.rounds)]
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps({"steps": steps, "rounds": rows, "restores": restores}))
    dist.barrier()
    dist.destroy_process_group()


def restored(run: str, step: int, state: dict[str, Tensor], rank: int, world_size: int) -> dict[str, float]:
    """Seconds of a restore, and of reading the same files."""
    folder = checkpoint_url(run, step)
    paths = sorted(Path(folder).glob("*.bin"))[rank::world_size]
    memory = memoryview(bytearray(sum(path.stat().st_size for path in paths)))
    memory[:] = bytes(len(memory))
    seconds = {}
    for name in ("raw", "restore"):
        dist.barrier()
        if rank == 0:
            forget(folder)
        dist.barrier()
        start = time.perf_counter()
        if name == "raw":
            read_raw(paths, memory)
        else:
            load_checkpoint(run, step, dict(state))
        seconds[name] = slowest(time.perf_counter() - start)
    return {**seconds, "bytes": float(read_marker(run, step).bytes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1 << 23)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--ids", type=int, default=16_384, help="looked up by a worker in a step")
    parser.add_argument("--skew", type=float, default=1.05, help="of the ids' popularity, 1 / rank^skew")
    parser.add_argument("--seconds", type=float, default=8.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where checkpoints go; default: a temporary folder")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        mp.spawn(work, (options, folder), nprocs=options.workers)
        found = json.loads(Path(folder, "result.json").read_text())
    report(options, found)
    write_json(options.json, options, [*found["rounds"], *found["restores"]])


def report(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Prints medians."""
    of = {kind: [row for row in found["rounds"] if row["kind"] == kind] for kind in KINDS}
    plain = statistics.median(row["seconds"] for row in of["none"])
    spread = max(row["seconds"] for row in of["none"]) - min(row["seconds"] for row in of["none"])
    table = options.rows * options.width * 4
    print(f"{options.workers} workers, a table of {size(table)}, {found['steps']} steps a round")
    print(f"a round without a save: {plain:.2f} s (from slowest to quickest {spread:.2f} s)")
    for kind in KINDS[1:]:
        copied = statistics.median(row["copied"] for row in of[kind])
        lost = statistics.median(row["seconds"] for row in of[kind]) - plain
        stored = statistics.median(row["bytes"] for row in of[kind])
        cpu = statistics.median(r["cpu"] for r in of[kind]) - statistics.median(r["cpu"] for r in of["none"])
        print(
            f"{kind}: {size(int(stored))}; training waited {copied:.3f} s and lost {lost:.2f} s in all: "
            f"{copied / EVERY:.2%} and {lost / EVERY:.2%} of {EVERY:.0f} s; {cpu:.2f} CPU seconds a worker"
        )
    ratio = statistics.median(r["bytes"] for r in of["full"]) / statistics.median(
        r["bytes"] for r in of["differential"]
    )
    print(f"a differential one has {ratio:.1f} times fewer bytes than a full one")
    raw, restore = (statistics.median(row[name] for row in found["restores"]) for name in ("raw", "restore"))
    gigabytes = found["restores"][0]["bytes"] / 1e9
    print(
        f"restore: {gigabytes / restore:.2f} GB/s; reading the same files: {gigabytes / raw:.2f} GB/s "
        f"({raw / restore:.0%})"
    )


if __name__ == "__main__":
    main()
