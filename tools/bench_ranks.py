"""Workers without Ray, readers' processes and curves: one process a rank, joined by gloo, that takes training's steps.

What they measure is the step itself: on a machine with few cores, Ray's own processes and the readers need some too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from metatrain.config import Config
from metatrain.data.batch import TaskBatch
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import Split
from metatrain.data.plan import lanes_of
from metatrain.model.build import build_model
from metatrain.model.sharding import distribute
from metatrain.model.table_plan import Workers, plan_tables
from metatrain.train.outer import DenseOptimizer
from metatrain.train.readers import open_reader
from metatrain.train.step import OuterLoop


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
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (work, world_size, folder, given), nprocs=world_size)
        return [torch.load(Path(folder, f"{rank}.result"), weights_only=False) for rank in range(world_size)]


def _rank(rank: int, work: Callable[..., Any], world_size: int, folder: str, given: tuple[Any, ...]) -> None:
    torch.save(work(rank, world_size, folder, *given), Path(folder, f"{rank}.result"))
