"""Losses and gradients that are not finite, or that explode: found without a device waiting, or left out by agreement.

stop: every step is judged on the device after its update, the first bad one is kept there, and the ranks compare when
a line of the curves or a checkpoint is due. No checkpoint holds what came after it. skip: the ranks agree on a step
between its gradients and its updates, and a bad one changes nothing.

The judgement: the loss of every rank and the norm of the dense meta-gradient, which is equal on all ranks, must be
finite; with `explosion` e the norm must also be at most e × its running mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from metatrain.config import TrainConfig

#: Gradient norms before explosions are looked for: the first ones say little.
FIRST_NORMS = 20
#: Norms over which the running mean reaches, roughly.
NORMS = 100
#: Skipped steps in a row after which a run ends: then it is not the batches.
MOST_SKIPPED_IN_A_ROW = 50
#: Skipped steps that a run keeps by number.
KEPT = 100

# No step: greater than any.
_NONE = 2**62


@dataclass(frozen=True)
class Skipped:
    """The steps of a run that were skipped: how many, and the first ones' numbers."""

    count: int = 0
    steps: tuple[int, ...] = ()


class Guard:
    """Judges steps, in their order.

    Args:
        config: `not_finite` and `explosion`.
        device: Where losses and norms are.
        state: What a checkpoint kept.
    """

    def __init__(self, config: TrainConfig, device: torch.device, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self.skips = config.not_finite == "skip"
        self._explosion = config.explosion
        self._mean = torch.tensor(float(state.get("mean", 0.0)), dtype=torch.float64, device=device)
        self._count = torch.tensor(int(state.get("count", 0)), device=device)
        self._first_bad = torch.tensor(_NONE, device=device)
        self._in_a_row = 0
        #: Of the whole run.
        self.skipped = Skipped(int(state.get("skipped", 0)), tuple(state.get("steps", ())))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON has it. Waits for the device."""
        return {
            "mean": float(self._mean),
            "count": int(self._count),
            "skipped": self.skipped.count,
            "steps": list(self.skipped.steps),
        }

    def judge(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Judges a step that has been taken; `first_bad` tells later."""
        good = torch.isfinite(loss.detach()) & self._fits(norm)
        self._follow(good, norm)
        now = torch.where(good, _NONE, step)
        self._first_bad = torch.minimum(self._first_bad, now)

    def first_bad(self) -> int | None:
        """The first step, by number from 0, that any rank found bad; None: there is none. Collective."""
        first = self._first_bad.clone()
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
        return None if int(first) == _NONE else int(first)

    def agree(self, step: int, loss: Tensor, norm: Tensor, gradients: list[Tensor]) -> bool:
        """Whether all ranks are to take a step, known on all of them. Collective; waits for the device.

        Args:
            step: Its number.
            loss: This rank's.
            norm: Of the dense meta-gradient, equal on all ranks.
            gradients: This rank's, of the rows it looked up.
        """
        sums = torch.stack([loss.detach().float(), *(gradient.float().sum() for gradient in gradients)])
        bad = (~(torch.isfinite(sums).all() & self._fits(norm))).to(torch.int64)
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        good = not bool(bad)
        if good:
            self._follow(torch.ones((), dtype=torch.bool, device=norm.device), norm)
            self._in_a_row = 0
        else:
            self._in_a_row += 1
            before = self.skipped
            self.skipped = Skipped(before.count + 1, (*before.steps, step)[:KEPT])
            if self._in_a_row >= MOST_SKIPPED_IN_A_ROW:
                self._first_bad = torch.full_like(self._first_bad, step)
        return good

    def _fits(self, norm: Tensor) -> Tensor:
        good = torch.isfinite(norm)
        if self._explosion:
            good = good & ((self._count < FIRST_NORMS) | (norm <= self._explosion * self._mean))
        return good

    def _follow(self, good: Tensor, norm: Tensor) -> None:
        if not self._explosion:
            return
        self._count = self._count + good
        share = 1.0 / self._count.clamp(1, NORMS)
        # Zero times not finite is not finite: chosen, not multiplied away.
        self._mean = torch.where(good, self._mean + (norm.double() - self._mean) * share, self._mean)
