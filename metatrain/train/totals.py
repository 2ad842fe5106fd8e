"""The sums of steps that become a line of the curves. Collective: all ranks make a line together, by one all-reduce."""

from __future__ import annotations

import math
import time

import torch
import torch.distributed as dist
from torch import Tensor

from metatrain.data.batch import TaskBatch
from metatrain.observe.laps import STAGES, Laps
from metatrain.observe.layout import SUPPORT_FROM, support_names
from metatrain.observe.machine import resident_bytes
from metatrain.train.step import Outcome

#: Tasks whose gains are kept until a line is due; of more, the last ones are in the histogram.
_GAINS_KEPT = 1 << 14
_GIB = 1 << 30


class Totals:
    """Sums over the steps since the last line of the curves, reduced over ranks only when a line is due.

    Args:
        device: Of the outcomes.
        laps: The clock of the stages.
        clip: The greatest norm of the meta-gradient. 0: none.
    """

    _SUMS = 6  # of losses and counts

    def __init__(self, device: torch.device, laps: Laps, clip: float = 0.0) -> None:
        self._device, self._laps, self._clip = device, laps, clip
        self._bounds = torch.tensor(SUPPORT_FROM[1:], device=device)
        self.restart()

    def restart(self) -> None:
        """Forgets what was added: a new line of the curves begins now."""
        self._sums = torch.zeros(self._SUMS, dtype=torch.float64, device=self._device)
        self._norms = torch.zeros(3, dtype=torch.float64, device=self._device)  # equal on all ranks
        self._by_support = torch.zeros(3, len(SUPPORT_FROM), dtype=torch.float64, device=self._device)
        self._gains: list[tuple[Tensor, Tensor]] = []  # of steps: gain and support events of each task
        self._kept, self._rows = 0, 0
        self._steps, self._skipped, self._clock = 0, 0, time.monotonic()
        self._last: Outcome | None = None
        self._laps.take()

    def add(self, outcome: Outcome, batch: TaskBatch) -> None:
        """Adds a step."""
        self._steps, self._last = self._steps + 1, outcome
        if outcome.skipped:
            self._skipped += 1  # as all ranks know; what it would have added may not be finite
            return
        out, norm = outcome.output, outcome.gradient_norm.detach().to(torch.float64)
        self._sums[:3] += torch.stack([out.before, out.after, out.row_squares]).to(self._sums)
        counts = torch.tensor([batch.size, batch.skipped, batch.labels.shape[0]], dtype=torch.float64)
        self._sums[3:] += counts.to(self._device, non_blocking=True)
        self._norms[0] += norm
        self._norms[1] = torch.maximum(self._norms[1], norm)
        if self._clip:
            self._norms[2] += norm > self._clip
        self._rows += out.rows
        if out.tasks:
            if self._kept > _GAINS_KEPT:
                self._sum_gains()
            self._gains.append((out.gains, batch.support_lengths))
            self._kept += out.tasks

    def reduce(self, due: bool, reader_restarts: int = 0) -> tuple[dict[str, float], Tensor, bool]:
        """Ends a line.

        Args:
            due: What any rank may ask for.
            reader_restarts: Of this rank, since its start.

        Returns:
            The curves of the steps since the last call, equal on all ranks but for their clocks. The gains of this
            rank's last tasks. Whether any rank said `due`.
        """
        assert self._last is not None, "reduce follows at least one add"
        seconds = max(time.monotonic() - self._clock, 1e-9)
        gains = torch.cat([gains for gains, _ in self._gains]) if self._gains else torch.zeros(0)
        self._sum_gains()
        stages = self._laps.take()
        host = [float(self._rows), _memory(self._device) / _GIB, float(reader_restarts), float(due)]
        host += [stages[name] for name in STAGES]
        on_device = torch.tensor(host, dtype=torch.float64).to(self._device)
        all_sums = torch.cat([self._sums, self._by_support.flatten(), on_device])
        dist.all_reduce(all_sums)
        sums, by_support, of_hosts = all_sums.cpu().split([self._SUMS, self._by_support.numel(), len(host)])
        before, after, squares, tasks, skipped, events = sums.tolist()
        gain_of, tasks_of, improved_of = by_support.reshape(self._by_support.shape).tolist()
        rows, gib, restarted, anyone_due, *spent = of_hosts.tolist()
        norm_sum, norm_max, clipped = self._norms.tolist()
        steps, taken = self._steps, max(1, self._steps - self._skipped)
        # Where every step was skipped there is no loss to tell.
        count = math.nan if self._skipped == steps else max(tasks, 1.0)
        curves = {
            "learning/loss_before": before / count,
            "learning/loss_after": after / count,
            "learning/gain": (before - after) / count,
            "learning/improved_share": sum(improved_of) / count,
            **{
                f"gain_by_support/{name}": gain / number
                for name, gain, number in zip(support_names(), gain_of, tasks_of, strict=True)
                if number
            },
            "health/gradient_norm": norm_sum / taken,
            "health/gradient_norm_max": norm_max,
            **({"health/clipped_share": clipped / taken} if self._clip else {}),
            "health/rows_touched": rows / taken,
            "health/row_norm": (squares / max(rows, 1.0)) ** 0.5,
            "health/skipped_tasks": skipped,
            "health/skipped_steps": float(self._skipped),
            "rates/outer": self._last.rate,
            "rates/tables": self._last.table_rate,
            "speed/tasks_per_second": tasks / seconds,
            "speed/events_per_second": events / seconds,
            "speed/step_seconds": seconds / steps,
            "speed/memory_gib": gib / dist.get_world_size(),
            "speed/reader_restarts": restarted,
            # Shares of the time, the mean of the ranks': they add up to 1.
            **{f"time/{name}": of_stage / max(sum(spent), 1e-9) for name, of_stage in zip(STAGES, spent, strict=True)},
        }
        self.restart()
        return curves, gains, anyone_due > 0

    def _sum_gains(self) -> None:
        """Adds the kept gains to the sums by support size, and forgets them."""
        if not self._gains:
            return
        gains, support = (torch.cat(parts) for parts in zip(*self._gains, strict=True))
        sums = torch.stack([gains, torch.ones_like(gains), (gains > 0).to(gains)]).to(self._by_support)
        self._by_support.index_add_(1, torch.bucketize(support, self._bounds, right=True), sums)
        self._gains, self._kept = [], 0


def _memory(device: torch.device) -> int:
    """Bytes that a worker holds: of the GPU where it has one, else of RAM."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes()
