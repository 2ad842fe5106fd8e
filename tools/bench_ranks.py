"""Workers without Ray, readers' processes and curves: one process a rank, joined by gloo, that takes training's steps.

What they measure is the step itself: on a machine with few cores, Ray's own processes and the readers need some too.
Their malloc and Python's collector are set as those of training's workers.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from metatrain import collector
from metatrain.config import Config
from metatrain.data.batch import TaskBatch
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import Split
from metatrain.data.plan import lanes_of
from metatrain.malloc import MALLOC
from metatrain.model.build import build_model
from metatrain.model.sharding import distribute
from metatrain.model.table_plan import Workers, plan_tables
from metatrain.train.outer import DenseOptimizer
from metatrain.train.readers import open_reader
from metatrain.train.step import OuterLoop

#: Batches that are held in memory and gone round in.
RESIDENT = 8


@dataclass
class Rank:
    """One process's part of training.

    Attributes:
        read: The part of a step's global batch that is this rank's, as tensors. Steps go round in the first epoch.
        widths: Of the tables that are sharded, by name.
        dense_numbers: Of the dense parameters, together.
    """

    loop: OuterLoop
    read: Callable[[int], TaskBatch]
    widths: dict[str, int]
    dense_numbers: int


@contextmanager
def rank_of(config: Config, rank: int, world_size: int, folder: str) -> Iterator[Rank]:
    """This process as a rank; the ranks find one another in `folder`."""
    collector.relax()
    torch.set_num_threads(config.train.threads_per_worker)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timedelta(minutes=10)
    )
    dataset = TaskDataset.open(config.data.dataset)
    model = build_model(dataset.schema, config, tables_device="meta")
    optimizer = config.train.optimizer
    plan = plan_tables(model.tables.specs, config.model.tables, optimizer.table, Workers(world_size, 1))
    distributed = distribute(model, optimizer, plan=plan)
    dense = distributed.dense_parameters()
    loop = OuterLoop(distributed, DenseOptimizer(dense, optimizer), config, 1_000_000, world_size)
    reader = open_reader(dataset, config, Split.TRAIN)
    lanes = lanes_of(range(config.data.lanes), world_size, rank)
    try:
        yield Rank(
            loop,
            lambda step: reader.read(0, step % reader.steps(0), lanes).tensors(),
            {spec.name: spec.width for spec in model.tables.specs if spec.name not in plan.replicated},
            sum(p.numel() for p in dense.values()),
        )
        dist.barrier()
    finally:
        reader.close()
        dist.destroy_process_group()


def on_ranks(work: Callable[..., Any], world_size: int, *given: Any) -> list[Any]:
    """`work(rank, world_size, folder, *given)` in a process for each rank; what they return, by rank."""
    with tempfile.TemporaryDirectory() as folder, _malloc():
        mp.spawn(_rank, (work, world_size, folder, given), nprocs=world_size)
        return [torch.load(Path(folder, f"{rank}.result"), weights_only=False) for rank in range(world_size)]


class Team:
    """Workers that are kept, and take some steps whenever they are told to: so that teams can be measured in turns.

    Args:
        config: Of all of them together, or with `apart` of each.
        workers: How many processes.
        steps: Of a turn.
        apart: Each is a rank alone, which exchanges nothing: what the machine gives to so many processes.
    """

    def __init__(self, config: Config, workers: int, steps: int, apart: bool = False) -> None:
        context, self._folder = mp.get_context("spawn"), tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        with _malloc():
            for i in range(workers):
                folder = Path(self._folder.name, str(i) if apart else "all")
                folder.mkdir(exist_ok=True)
                ours, theirs = context.Pipe()
                seat = (0, 1) if apart else (i, workers)
                process = context.Process(target=_member, args=(theirs, config, *seat, str(folder), steps), daemon=True)
                process.start()
                theirs.close()  # so that its end is noticed here
                self._pipes.append(ours)
                self._processes.append(process)
        self._answers()  # they are there, and warm

    def turn(self) -> float:
        """Takes the steps of a turn. Tasks a second, of all workers together."""
        for pipe in self._pipes:
            pipe.send(True)
        tasks, seconds = zip(*self._answers(), strict=True)
        return sum(tasks) / max(seconds)

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self._pipes:
            pipe.send(False)
        for process in self._processes:
            process.join()
        self._folder.cleanup()

    def _answers(self) -> list[tuple[int, float]]:
        try:
            return [pipe.recv() for pipe in self._pipes]
        except EOFError:
            raise SystemExit("A worker ended: see its error above.") from None


def _member(pipe: Any, config: Config, rank: int, world_size: int, folder: str, steps: int) -> None:
    with rank_of(config, rank, world_size, folder) as this:
        batches = [this.read(step) for step in range(RESIDENT)]
        count = 0

        def take(steps: int) -> int:
            nonlocal count
            tasks = 0
            for _ in range(steps):
                batch, following = (batches[i % RESIDENT] for i in (count, count + 1))
                this.loop.step(batch, count, following)
                count, tasks = count + 1, tasks + batch.size
            return tasks

        take(2 * RESIDENT)
        pipe.send((0, 0.0))
        while pipe.recv():
            take(1)  # after a pause
            dist.barrier()
            begun = time.perf_counter()
            tasks = take(steps)
            pipe.send((tasks, time.perf_counter() - begun))


@contextmanager
def _malloc() -> Iterator[None]:
    """For processes that are started within."""
    added = MALLOC.keys() - os.environ.keys()
    os.environ.update({name: MALLOC[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _rank(rank: int, work: Callable[..., Any], world_size: int, folder: str, given: tuple[Any, ...]) -> None:
    torch.save(work(rank, world_size, folder, *given), Path(folder, f"{rank}.result"))
