"""What a run tells while it trains: curves and texts to TensorBoard, messages to the command that launched it.

All of it is of rank 0: on the others nothing happens. But for `items`, no other rank is asked, and no device waited for
that the line of the curves did not need already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from metatrain.config import Config
from metatrain.data.dataset import TaskDataset
from metatrain.evaluate.headlines import headline_names
from metatrain.model.metamodel import MetaModel
from metatrain.model.sharding import Distributed
from metatrain.observe import projector
from metatrain.observe.layout import FINAL
from metatrain.observe.tensorboard import Board
from metatrain.train.item_vectors import item_vectors
from metatrain.train.run_text import settings, write_texts

if TYPE_CHECKING:
    from metatrain.train.worker import Seat


class RunRecord:
    """The record of one attempt to train a run.

    Args:
        config: The recipe.
        seat: Rank 0's keeps the record.
        dataset: What is trained on.
        distributed: What is trained.
        step: Where the attempt begins.
    """

    def __init__(self, config: Config, seat: Seat, dataset: TaskDataset, distributed: Distributed, step: int) -> None:
        self._tell, self._rank, self._device = seat.tell, seat.rank, seat.device
        self._model, self._dataset = cast(MetaModel, distributed.model), dataset
        self._board = Board(config.run_url, step) if seat.rank == 0 else None
        self._dense: list[nn.Parameter] = list(distributed.dense_parameters().values())
        self._line_at, self._tasks, self._seconds = step, 0.0, 0.0
        self._final: dict[str, float] = {}
        self._pending: list[dict[str, Any]] = []  # messages of checkpoints that are not known to be whole
        if self._board is not None:
            self._board.layout(self._model.meta.curves())
            self._board.hparams(settings(config, dataset), (*FINAL, *headline_names(dataset, config.evaluate)))
            write_texts(self._board, config, dataset, distributed)

    def line(self, step: int, of: int, epoch: int, curves: Mapping[str, float], gains: Tensor) -> None:
        """A line of the curves.

        Args:
            step: Steps that are done.
            of: Steps of the whole run.
            epoch: The epoch of the last of them.
            curves: By name, equal on all ranks.
            gains: Of this rank's tasks since the last line: before - after adaptation.
        """
        if self._board is None:
            return
        seconds = curves["speed/step_seconds"] * (step - self._line_at)
        self._line_at = step
        self._tasks, self._seconds = self._tasks + curves["speed/tasks_per_second"] * seconds, self._seconds + seconds
        if math.isfinite(curves["learning/loss_after"]):  # it is not where all steps of the line were skipped
            self._final["final/training_loss"] = curves["learning/loss_after"]
        norm = torch.stack([p.detach().norm() for p in self._dense]).norm() if self._dense else 0.0
        told = {**curves, "health/parameter_norm": float(norm), "speed/restarts": float(self._board.restarts)}
        if len(gains):
            self._board.histogram("learning/gain_of_tasks", gains, step)
        self._board.scalars({name: value for name, value in told.items() if math.isfinite(value)}, step)
        self._tell({"step": step, "steps": of, "epoch": epoch, **told})

    def validation(self, step: int, of: int, before: float, after: float, best: float, improved: bool) -> None:
        """The mean query loss of validation tasks before and after adaptation; `best` is the lowest after it so far."""
        if self._board is None:
            return
        curves = {"validation/loss_before": before, "validation/loss_after": after, "validation/gain": before - after}
        self._board.scalars(curves | {"validation/best_loss": best}, step)
        self._final |= {"final/validation_loss": best, "final/validation_gain": before - after}
        self._tell({"step": step, "steps": of, "validation_loss": after, "best": improved})

    def items(self) -> None:
        """Shows the items as the model sees them now. All ranks call it together."""
        vectors, known = item_vectors(self._model, self._dataset, self._device, self._rank)
        if self._board is not None and len(vectors):
            for name, content in projector.files(vectors, known).items():
                self._board.file(name, content)

    def saving(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        """A checkpoint has begun to be written, for which training stood still for some seconds."""
        if self._board is None:
            return
        self._board.scalars({"speed/checkpoint_seconds": seconds}, step)
        self._board.flush()
        loss = metrics.get("validation_loss")
        self._pending.append({"checkpoint": step, "checkpoint_seconds": seconds, "checkpoint_loss": loss})

    def committed(self, step: int | None) -> None:
        """The checkpoint of `step` is whole, and so are those before it, of which `saving` was told."""
        while self._pending and step is not None and self._pending[0]["checkpoint"] <= step:
            self._tell(self._pending.pop(0))

    def end(self, step: int) -> None:
        """The run is trained to its end."""
        if self._board is None:
            return
        if self._seconds:
            self._final["final/tasks_per_second"] = self._tasks / self._seconds
        self._board.scalars(self._final, step)
        self._board.ended()

    def close(self) -> None:
        """Writes what is left."""
        if self._board is not None:
            self._board.close()
