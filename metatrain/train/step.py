"""One step of the outer loop, and the losses of validation. Collective: all ranks call these together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from metatrain import faults
from metatrain.config import Config
from metatrain.data.batch import TaskBatch
from metatrain.data.reader import BatchReader
from metatrain.model.metamodel import Asked, MetaModel, StepOutput
from metatrain.model.sharding import Distributed
from metatrain.observe.laps import Laps
from metatrain.train.guard import Guard
from metatrain.train.outer import DenseOptimizer, rate_share
from metatrain.train.pulse import Pulse


@dataclass(frozen=True)
class Outcome:
    """What a step did on this rank: sums over its tasks, and what is equal on all ranks."""

    output: StepOutput
    gradient_norm: Tensor  # of the dense meta-gradient, before clipping
    rate: float  # of the dense parameters
    table_rate: float
    skipped: bool = False  # whether nothing was updated, since a loss or gradient of a rank was not good
    wished: bool = False  # whether a rank wished for a checkpoint: at this step's start; on a GPU, at the step before


class OuterLoop:
    """Takes the steps of training, one after the other.

    Args:
        distributed: The model.
        optimizer: Of its dense parameters.
        config: Rates and schedule.
        last: Steps of the whole run.
        world_size: Number of ranks.
        laps: Told of the stages.
        pulse: Told of them before they begin.
        guard: Judges the steps. Default: none are judged.
    """

    def __init__(
        self,
        distributed: Distributed,
        optimizer: DenseOptimizer,
        config: Config,
        last: int,
        world_size: int,
        laps: Laps | None = None,
        pulse: Pulse | None = None,
        guard: Guard | None = None,
    ) -> None:
        self._distributed, self._optimizer, self._config = distributed, optimizer, config.train.optimizer
        self._last, self._world_size, self._laps = last, world_size, laps
        self._pulse, self._guard = pulse or Pulse(), guard
        self._model = cast(MetaModel, distributed.model)
        self._ahead: tuple[TaskBatch, int, Asked] | None = None
        self._before: _Sums | None = None

    def step(self, batch: TaskBatch, step: int, following: TaskBatch | None = None, *, wish: bool = False) -> Outcome:
        """Trains on one global batch: one lookup, one backward.

        Args:
            batch: This rank's part (tensors).
            step: Its number, from 0.
            following: The part that comes next, where there is one, on all ranks or on none: its ids go to the ranks
                that hold their rows while this step computes. Its rows are read after this step's update.
            wish: Whether this rank wishes for a checkpoint: all ranks learn of it.
        """
        laps = self._laps or Laps(batch.labels.device)
        self._pulse.enter("forward")
        sums = _Sums(self._model.weight(batch), batch.labels, wish)
        share = rate_share(self._config, step, self._last)
        rate, table_rate = share * self._config.rate, share * self._config.table_rate
        self._distributed.set_table_rate(table_rate)  # before backward, which updates the tables
        faults.point("train.lookup", step=step)
        asked, self._ahead = self._asked(batch, step), None
        laps.lap("rest")
        if following is not None:
            self._ahead = following, step + 1, self._model.ask(following, step + 1)
            laps.lap("lookup")
        hold = self._guard is not None and self._guard.skips
        output: StepOutput = self._distributed.module(batch, step, sums.weight, self._world_size, asked, laps, hold)
        if self._ahead is not None:
            self._ahead[2].request.send()
        self._pulse.enter("backward")
        faults.point("train.backward", step=step)
        output.loss.backward()
        laps.lap("backward")
        self._pulse.enter("update")
        faults.point("train.update", step=step)
        norm = self._optimizer.clip()
        taken = self._taken(step, output, norm)
        self._distributed.update_replicated()
        if taken:
            self._optimizer.update(rate)
        else:
            self._optimizer.forget()
        # A GPU's answer of this step would have to be waited for; the one of the step before is there.
        known, self._before = self._before if sums.on_gpu else sums, sums
        wished = known is not None and known.wished()
        if wished:
            self._before = None  # met now: the same wish, still said in this step, is not another one
        laps.lap("update")
        return Outcome(output, norm, rate, table_rate, not taken, wished)

    def _taken(self, step: int, output: StepOutput, norm: Tensor) -> bool:
        """Judges a step whose gradients are there; whether its updates are to be made."""
        if self._guard is None:
            return True
        if output.held is None:
            self._guard.judge(step, output.loss, norm)
            return True
        taken = self._guard.agree(step, output.loss, norm, output.held.gradients())
        output.held.pass_on(taken)
        return taken

    def _asked(self, batch: TaskBatch, step: int) -> Asked | None:
        """What was asked ahead, if it was for this batch and step."""
        if self._ahead is None or self._ahead[0] is not batch or self._ahead[1] != step:
            return None
        return self._ahead[2]


class _Sums:
    """What the ranks add up in every step, begun before its work: what the tasks of the global batch count, and wishes.

    The plan doesn't know the tasks: a rank finds out which have too few events as it reads them. The GPU's path has not
    been run.

    Args:
        weight: What this rank's tasks count.
        like: Of the losses' type, where they will be.
        wish: Whether this rank has one.
    """

    def __init__(self, weight: Tensor | float, like: Tensor, wish: bool) -> None:
        device, self._dtype = like.device, like.dtype
        self.on_gpu = device.type == "cuda"
        self._sums = torch.tensor([0.0, float(wish)], dtype=torch.float64, device=device)
        self._sums[0] = weight
        work = dist.all_reduce(self._sums, async_op=True)
        assert work is not None, "this process is in the group"
        self._work = work
        self._copied: torch.cuda.Event | None = None

    def weight(self) -> Tensor:
        """Waits for what the tasks of the global batch count together, at least 1."""
        self._work.wait()
        if self.on_gpu:
            self._host = torch.empty(2, dtype=torch.float64, pin_memory=True)
            self._host.copy_(self._sums, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        return self._sums[0].clamp(min=1.0).to(self._dtype)

    def wished(self) -> bool:
        """Whether any rank had a wish. After `tasks`."""
        if self._copied is not None:
            self._copied.synchronize()
            return bool(self._host[1] > 0)
        return bool(self._sums[1] > 0)


def validation_losses(
    distributed: Distributed,
    reader: BatchReader,
    lanes: Sequence[int],
    device: torch.device,
    world_size: int,
    pulse: Pulse | None = None,
) -> tuple[float, float]:
    """Mean query loss over the reader's tasks, before and after adaptation, equal on all ranks."""
    pulse = pulse or Pulse()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    distributed.module.eval()
    with torch.no_grad():
        for step in range(reader.steps(0)):
            pulse.enter("validate")
            batch = reader.read(0, step, lanes).tensors(device)
            output: StepOutput = distributed.module(batch, 0, 1.0, world_size)
            sums += torch.stack([output.before, output.after, torch.as_tensor(float(batch.size))]).to(sums)
    distributed.module.train()
    dist.all_reduce(sums)
    before, after, tasks = sums.tolist()
    assert tasks, "checks.check has found a task"
    return before / tasks, after / tasks
