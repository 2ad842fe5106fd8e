"""The outer loop of one worker, top to bottom: read, step, log, validate, checkpoint. Every rank runs it in step.

A run that is cut off anywhere and started again goes on from its last whole checkpoint and ends with the same
weights: all that a step depends on is the checkpoint and (manifest, seed, epoch, step).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from metatrain.checkpoint import MODEL, Cursor, committed_steps, load_checkpoint, read_marker, save_checkpoint
from metatrain.checkpoint.identity import check_identity, identity
from metatrain.config import Config
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import Split
from metatrain.data.plan import lanes_of
from metatrain.data.stream import TaskStream
from metatrain.errors import TrainingError
from metatrain.model.metamodel import build_model
from metatrain.model.tables import OPTIMIZER_PREFIX, distribute
from metatrain.observe.tensorboard import Board
from metatrain.train.early_stopping import Patience
from metatrain.train.outer import DenseOptimizer
from metatrain.train.run_text import write_texts
from metatrain.train.step import Totals, mean_inner_rates, open_reader, training_step, validation_losses


@dataclass(frozen=True)
class Seat:
    """Where this worker sits, and how it speaks to the command that launched it."""

    rank: int
    world_size: int
    device: torch.device
    tell: Callable[[dict[str, Any]], None]


def train(config: Config, seat: Seat) -> None:
    """Trains `config` to its end, from the run's last checkpoint where there is one.

    Raises:
        MetatrainError: The dataset, a checkpoint or the loss cannot be used.
    """
    dataset = TaskDataset.open(config.data.dataset)
    model = build_model(dataset.schema, config, seat.device, tables_device="meta")
    distributed = distribute(model, config.train.optimizer, seat.device)
    optimizer = DenseOptimizer(distributed.dense_parameters(), config.train.optimizer)

    def state() -> dict[str, Any]:
        tensors = distributed.state_dict().items()
        return {
            **{name if name.startswith(OPTIMIZER_PREFIX) else f"{MODEL}{name}": value for name, value in tensors},
            **{f"optimizer.{name}": value for name, value in optimizer.state_dict().items()},
        }

    must_equal = identity(config, dataset.fingerprint)
    cursor, patience = Cursor(), Patience(config.train.early_stopping)
    if steps_saved := committed_steps(config.run_url):
        check_identity(read_marker(config.run_url, steps_saved[-1]).identity, must_equal, config.run_url)
        marker = load_checkpoint(config.run_url, steps_saved[-1], state())  # in place
        cursor, patience = marker.cursor, Patience(config.train.early_stopping, marker.loop)
        seat.tell({"say": f"going on from the checkpoint at step {cursor.total}"})

    lanes = lanes_of(range(config.data.lanes), seat.world_size, seat.rank)
    features, epochs = config.model.features, config.train.epochs
    stream = TaskStream(dataset.url, config.data, seed=config.train.seed, lanes=lanes, features=features, epochs=epochs)
    validation = open_reader(dataset, config, Split.VALIDATION)
    validates = bool(config.train.validate_every) and dataset.manifest.tasks.get(Split.VALIDATION, 0) > 0
    steps_of = [stream.steps(epoch) for epoch in range(epochs)]
    last = min(sum(steps_of), config.train.max_steps or sum(steps_of))
    board = Board(config.run_url, cursor.total) if seat.rank == 0 else None
    if board is not None:
        write_texts(board, config, dataset)
    totals = Totals(seat.device)
    saved_at, saved_time = cursor.total, time.monotonic()

    def save(metrics: dict[str, float]) -> None:
        nonlocal saved_at, saved_time
        keep = config.train.checkpoint.keep
        save_checkpoint(
            config.run_url,
            state(),
            cursor=cursor,
            identity=must_equal,
            loop=patience.state(),
            metrics=metrics,
            keep=keep,
        )
        saved_at, saved_time = cursor.total, time.monotonic()

    def due_by_time() -> bool:
        minutes = config.train.checkpoint.every_minutes
        return bool(minutes) and time.monotonic() - saved_time > 60 * minutes

    try:
        while cursor.epoch < epochs and cursor.total < last and not patience.exhausted:
            epoch = cursor.epoch
            for batch in stream.batches(epoch, cursor.step):
                tensors = batch.tensors(seat.device)
                outcome = training_step(distributed, optimizer, tensors, config, cursor.total, last, seat.world_size)
                cursor = Cursor(epoch=epoch, step=cursor.step + 1, total=cursor.total + 1)
                totals.add(outcome, batch, stream.wait_seconds)
                ends = cursor.total >= last or cursor.step == steps_of[epoch]
                by_time = False
                if cursor.total % config.train.log_every == 0 or ends:
                    # Whether time is up for a checkpoint is decided by all ranks together: clocks differ.
                    curves, by_time = totals.reduce(due_by_time())
                    if not torch.isfinite(torch.tensor(curves["learning/loss_after"])):
                        raise TrainingError(
                            "The loss is not finite.",
                            where=f"epoch {epoch}, step {cursor.step - 1}",
                            got=curves["learning/loss_after"],
                            remedy="Lower `meta.rate` or `train.optimizer.rate`, or set `train.optimizer.clip`.",
                        )
                    curves |= mean_inner_rates(model.meta)
                    if board is not None:
                        board.scalars(curves, cursor.total)
                        seat.tell({"step": cursor.total, "steps": last, "epoch": epoch, **curves})
                every = config.train.checkpoint.every_steps
                if (by_time or (every and cursor.total % every == 0)) and not ends:
                    save({})
                if cursor.total >= last:
                    break
            if cursor.step >= steps_of[epoch]:
                cursor = Cursor(epoch=epoch + 1, step=0, total=cursor.total)
            metrics: dict[str, float] = {}
            improved = False
            over = cursor.epoch >= epochs or cursor.total >= last
            if validates and (over or cursor.epoch % config.train.validate_every == 0):
                before, after = validation_losses(distributed, validation, lanes, seat.device, seat.world_size)
                improved = patience.judge(after)
                metrics = {"validation_loss": after}
                if board is not None:
                    board.scalars({"validation/loss_before": before, "validation/loss_after": after}, cursor.total)
                seat.tell(
                    {"step": cursor.total, "steps": last, "epoch": epoch, "validation_loss": after, "best": improved}
                )
            every = config.train.checkpoint.every_steps
            if improved or over or patience.exhausted or (every and cursor.total - saved_at >= every):
                save(metrics)
        if patience.exhausted:
            seat.tell({"say": f"validation loss has stopped falling: ended at step {cursor.total}"})
        seat.tell({"done": cursor.total, "steps": last})
    finally:
        stream.close()
        validation.close()
        if board is not None:
            board.close()
