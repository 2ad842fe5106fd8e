"""Replays the step that a run ended on (`metatrain replay RUN`), and says where it stops being finite.

One process trains from the checkpoint before it, on the same global batches, and looks at everything that the bad step
reads and makes, in the order in which it arises. At another world size than the run's, sums come in another order: what
depends on the last bits may not show.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor

from metatrain import storage
from metatrain.checkpoint import Cursor, committed_steps, load_checkpoint
from metatrain.config import Config, load_config
from metatrain.data.batch import Ragged, TaskBatch
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import Split
from metatrain.errors import CheckpointError, TrainingError
from metatrain.model.build import build_model
from metatrain.model.metamodel import MetaModel, StepOutput
from metatrain.model.sharding import distribute
from metatrain.train import not_finite
from metatrain.train.guard import Guard
from metatrain.train.not_finite import BadStep
from metatrain.train.outer import DenseOptimizer
from metatrain.train.readers import open_reader
from metatrain.train.step import OuterLoop
from metatrain.train.worker import run_state

#: Steps before the bad one whose losses are shown.
SHOWN = 20
#: Tasks that are named.
NAMED = 20


class Line(BaseModel):
    """A step that was replayed: its number from 1, mean losses of its tasks, and its gradient's norm."""

    step: int
    before: float
    after: float
    gradient_norm: float


class Found(BaseModel):
    """Something of the step: how many of its numbers are not finite, and the range of those that are."""

    what: str
    numbers: int
    not_finite: int
    least: float | None
    most: float | None


class Replay(BaseModel):
    """What a replay saw."""

    bad: BadStep
    lines: list[Line]
    #: In the order in which a step makes them: batch, rows, parameters, losses, gradients.
    found: list[Found]
    #: Keys of tasks whose own loss is not finite.
    tasks: list[str]
    #: The operation whose derivative first gave NaN, as torch names it.
    operation: str | None

    @property
    def first(self) -> Found | None:
        """The first thing that is not finite."""
        return next((found for found in self.found if found.not_finite), None)

    def text(self) -> str:
        """For people."""
        bad, first = self.bad, self.first
        rows = [("", "numbers", "not finite", "least", "most")]
        rows += [
            (f.what, f"{f.numbers:,}", f"{f.not_finite:,}" if f.not_finite else "", _number(f.least), _number(f.most))
            for f in self.found
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        table = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        steps = [
            f"  step {line.step}: loss {line.before:.6g} before, {line.after:.6g} after adaptation, "
            f"gradient norm {line.gradient_norm:.6g}"
            for line in self.lines
        ]
        start = "the beginning" if bad.checkpoint is None else f"the checkpoint at step {bad.checkpoint}"
        verdict = (
            f"first not finite: {first.what} ({first.not_finite:,} of {first.numbers:,})"
            if first
            else "all is finite here: it depended on the last bits, or it exploded rather than overflowed"
        )
        return "\n".join(
            [
                f"step {bad.total + 1}: epoch {bad.epoch}, its step {bad.step}; replayed from {start} by one process",
                *steps,
                *table,
                verdict,
                *([f"its tasks: {', '.join(self.tasks)}"] if self.tasks else []),
                *([f"first derivative that is NaN: {self.operation}"] if self.operation else []),
            ]
        )


def replay(run_url: str) -> Replay:
    """Replays the step that the run ended on.

    Raises:
        MetatrainError: The run did not end so, or its checkpoint or dataset is not there any more.
    """
    bad = not_finite.read(run_url)
    config = load_config(storage.join(run_url, "config.yaml"))
    dataset = TaskDataset.open(config.data.dataset)
    _check(run_url, bad, config, dataset)
    with _one_process():
        return _Replaying(run_url, bad, config, dataset).run()


def _check(run_url: str, bad: BadStep, config: Config, dataset: TaskDataset) -> None:
    if bad.checkpoint is not None and bad.checkpoint not in committed_steps(run_url):
        raise CheckpointError(
            "The checkpoint that the replay would start from is not there any more.",
            where=run_url,
            got=f"step {bad.checkpoint}",
            remedy="Train the run again: it ends on the same step, and keeps the checkpoint before it.",
        )
    plan = (config.train.seed, config.data.lanes, config.data.tasks_per_step, dataset.fingerprint)
    if plan != (bad.seed, bad.lanes, bad.tasks_per_step, bad.fingerprint):
        raise TrainingError(
            "The run's configuration or dataset is not the one that it ended with: its batches are others.",
            where=run_url,
            remedy="Restore config.yaml and the dataset, or train the run again.",
        )


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Replaying:
    def __init__(self, run_url: str, bad: BadStep, config: Config, dataset: TaskDataset) -> None:
        self._bad, self._config = bad, config
        model = build_model(dataset.schema, config, "cpu", tables_device="meta")
        self._distributed = distribute(model, config.train.optimizer, "cpu")
        self._dense = self._distributed.dense_parameters()
        self._optimizer = DenseOptimizer(self._dense, config.train.optimizer)
        kept: dict[str, Any] = {}
        self._cursor = Cursor()
        if bad.checkpoint is not None:
            marker = load_checkpoint(run_url, bad.checkpoint, run_state(self._distributed, self._optimizer))
            self._cursor, kept = marker.cursor, marker.loop.get("guard") or {}
        self._guard = Guard(config.train, torch.device("cpu"), kept)
        self._reader = open_reader(dataset, config, Split.TRAIN, keys=True)

    def run(self) -> Replay:
        config, bad = self._config, self._bad
        steps_of = [self._reader.steps(epoch) for epoch in range(config.train.epochs)]
        last = min(sum(steps_of), config.train.max_steps or sum(steps_of))
        loop = OuterLoop(self._distributed, self._optimizer, config, last, 1, guard=self._guard)
        lines: list[Line] = []
        for total in range(self._cursor.total, bad.total):
            outcome = loop.step(self._batch(*not_finite.coordinates(total, steps_of))[0], total)
            lines = [*lines[-SHOWN:], _line(total, outcome.output, outcome.gradient_norm)]
        batch, keys = self._batch(bad.epoch, bad.step)
        output, found = self._examined(batch)
        norm = torch.stack([p.grad.norm() for p in self._dense.values() if p.grad is not None]).norm()
        lines.append(_line(bad.total, output, norm))
        spoiled = [key for key, good in zip(keys, torch.isfinite(output.gains).tolist(), strict=True) if not good]
        self._optimizer.forget()
        operation = self._first_operation(batch)
        return Replay(bad=bad, lines=lines, found=found, tasks=spoiled[:NAMED], operation=operation)

    def _batch(self, epoch: int, step: int) -> tuple[TaskBatch, list[str]]:
        batch, keys = self._reader.read_keyed(epoch, step, range(self._config.data.lanes))
        return batch.tensors(), [str(key) for key in keys]

    def _examined(self, batch: TaskBatch) -> tuple[StepOutput, list[Found]]:
        """All that the step reads and makes. Leaves the dense gradients where they are; no table is updated."""
        model = self._distributed.model
        assert isinstance(model, MetaModel)
        found = [_found(f"batch: {name}", numbers) for name, numbers in _numbers(batch)]
        found += [_found(f"parameter {name}", p) for name, p in self._dense.items()]
        found += [_found(f"optimizer {name}", value) for name, value in self._optimizer.state_dict().items()]
        with torch.no_grad():
            rows = model.tables.lookup(model.ask(batch, self._bad.total).request)
        found += [_found(f"rows of table {name}", values) for name, (_, values) in rows.tables.items()]
        output = self._forward(batch)
        found += [
            _found("losses before adaptation, their sum", output.before),
            _found("losses after adaptation, their sum", output.after),
            _found("gains of the tasks", output.gains),
            _found("loss", output.loss),
        ]
        output.loss.backward()
        assert output.held is not None
        found += [_found(f"gradient of {name}", p.grad) for name, p in self._dense.items() if p.grad is not None]
        found += [
            _found(f"gradient of rows of table {name}", gradient)
            for name, gradient in zip(rows.tables, output.held.gradients(), strict=True)
        ]
        output.held.pass_on(taken=False)
        return output, found

    def _forward(self, batch: TaskBatch) -> StepOutput:
        weight = max(1.0, float(cast(MetaModel, self._distributed.model).weight(batch)))
        return self._distributed.module(batch, self._bad.total, weight, 1, None, None, True)

    def _first_operation(self, batch: TaskBatch) -> str | None:
        """What torch's anomaly detection says of the backward pass."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with torch.autograd.set_detect_anomaly(True):
                    output = self._forward(batch)
                    output.loss.backward()
            except RuntimeError as error:
                return str(error).splitlines()[0]
            finally:
                self._optimizer.forget()
        return None


def _line(total: int, output: StepOutput, norm: Tensor) -> Line:
    tasks = max(1, output.tasks)
    return Line(
        step=total + 1,
        before=float(output.before) / tasks,
        after=float(output.after) / tasks,
        gradient_norm=float(norm),
    )


def _numbers(batch: TaskBatch) -> Iterator[tuple[str, Tensor]]:
    """The columns of a batch that hold numbers, and lengths."""
    yield "support events a task", batch.support_lengths
    yield "query events a task", batch.query_lengths
    yield "labels", batch.labels
    for columns in (batch.task_features, batch.item_features, batch.event_features):
        for name, column in columns.items():
            if not isinstance(column, Ragged) and column.is_floating_point():
                yield name, column


def _found(what: str, values: Tensor) -> Found:
    values = values.detach().double().flatten()
    finite = values[torch.isfinite(values)]
    return Found(
        what=what,
        numbers=values.numel(),
        not_finite=values.numel() - finite.numel(),
        least=float(finite.min()) if finite.numel() else None,
        most=float(finite.max()) if finite.numel() else None,
    )


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.4g}"
