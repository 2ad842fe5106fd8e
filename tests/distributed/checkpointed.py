"""A small sharded model for tests of checkpoints: tables of uneven rows, their optimizer's state, dense parameters."""

from __future__ import annotations

from typing import Any

import torch
from gradients import whole
from meta_reference import made_up_batch, part_of, schema
from torch import Tensor

from metatrain.checkpoint import MODEL, Cursor, Marker, Saver, load_checkpoint
from metatrain.config import CheckpointConfig, Config, TableConfig
from metatrain.model.build import build_model
from metatrain.model.sharding import OPTIMIZER_PREFIX, distribute
from metatrain.model.table_plan import Workers, plan_tables
from metatrain.train.outer import DenseOptimizer

# Item, genre, age and hour tables of `schema()` divide by few numbers, and one table has a single row.
TASKS = 6


def configuration(table: str) -> Config:
    return Config.model_validate(
        {"model": {"hidden": (4,)}, "train": {"optimizer": {"table": table, "table_rate": 0.1, "rate": 0.01}}}
    )


class Small:
    """One rank's part of a run: `train` steps, `save` and `load` checkpoints."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        run: str,
        table: str = "rowwise_adagrad",
        shardings: dict[str, str] | None = None,
        **checkpoint: Any,
    ) -> None:
        self.rank, self.world_size, self.run = rank, world_size, run
        self.config = configuration(table)
        self.checkpoint = CheckpointConfig.model_validate({"keep": 20, **checkpoint})
        options = self.config.train.optimizer
        model = build_model(schema(), self.config, tables_device="meta")
        settings = {name: TableConfig.model_validate({"sharding": kind}) for name, kind in (shardings or {}).items()}
        plan = plan_tables(model.tables.specs, settings, table, Workers(world_size, world_size))
        self.distributed = distribute(model, options, plan=plan)
        self.optimizer = DenseOptimizer(self.distributed.dense_parameters(), options)
        self.touched = {self.stored(name): bitmap for name, bitmap in self.distributed.track().items()}
        self.total = 0
        self._saver: Saver | None = None
        self._resumed: Marker | None = None

    @staticmethod
    def stored(name: str) -> str:
        return name if name.startswith(OPTIMIZER_PREFIX) else f"{MODEL}{name}"

    def state(self) -> dict[str, Tensor]:
        moments = self.optimizer.state_dict().items()
        return {
            **{self.stored(name): value for name, value in self.distributed.state_dict().items()},
            **{f"optimizer.{name}": value for name, value in moments},
        }

    def whole(self) -> dict[str, Tensor]:
        """Every tensor, whole, a copy. All ranks together."""
        return {name: whole(value).detach() for name, value in self.state().items()}

    def train(self, steps: int = 1, tasks: int = TASKS) -> list[float]:
        """Global losses of some steps; the step's number is the seed of its batch."""
        losses = []
        for _ in range(steps):
            batch = made_up_batch(tasks, self.total)
            edges = [tasks * rank // self.world_size for rank in range(self.world_size + 1)]
            part = part_of(batch, range(edges[self.rank], edges[self.rank + 1])).tensors()
            output = self.distributed.module(part, self.total, float(tasks), self.world_size)
            output.loss.backward()
            self.distributed.update_replicated()
            self.optimizer.update(0.01)
            after = output.after.detach().clone()
            torch.distributed.all_reduce(after)
            losses.append(float(after))
            self.total += 1
        return losses

    @property
    def saver(self) -> Saver:
        if self._saver is None:
            self._saver = Saver(self.run, self.checkpoint, self.state(), self.touched, self._resumed)
        return self._saver

    def save(self, wait: bool = True, **metrics: float) -> bool:
        """Saves; returns whether the checkpoint is a full one."""
        cursor = Cursor(epoch=0, step=self.total, total=self.total)
        saved = self.saver.save(self.state(), cursor=cursor, identity={}, loop={}, configuration={}, metrics=metrics)
        if wait:
            self.saver.wait()
        return saved.full

    def load(self, step: int) -> Marker:
        self._resumed = load_checkpoint(self.run, step, self.state(), self.touched)
        self.total, self._saver = self._resumed.cursor.total, None
        return self._resumed
