"""The outer loop of one worker: read, step, log, validate, checkpoint. Every rank runs it in step with the others.

A run that is cut off anywhere and started again goes on from its last whole checkpoint and ends with the same
weights: all that a step depends on is the checkpoint and (manifest, seed, epoch, step).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from metatrain import faults
from metatrain.checkpoint import MODEL, Cursor, Marker, Saver, committed_steps, load_checkpoint, read_marker
from metatrain.checkpoint.identity import check_identity, identity
from metatrain.config import Config
from metatrain.data.batch import TaskBatch
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import Split
from metatrain.data.plan import lanes_of
from metatrain.data.quarantine import read_quarantine
from metatrain.data.stream import TaskStream
from metatrain.errors import TrainingError
from metatrain.model.build import build_model
from metatrain.model.sharding import OPTIMIZER_PREFIX, Distributed, distribute
from metatrain.observe.laps import Laps
from metatrain.train import room
from metatrain.train.audit import AuditLog, next_attempt
from metatrain.train.checks import QUARANTINED, is_over, last_step
from metatrain.train.early_stopping import Patience
from metatrain.train.footprint import workers_plan
from metatrain.train.guard import Guard
from metatrain.train.not_finite import BadStep, as_error, coordinates, keep
from metatrain.train.outer import DenseOptimizer
from metatrain.train.profile import Profile
from metatrain.train.pulse import Asked, Pulse
from metatrain.train.readers import open_reader
from metatrain.train.run_record import RunRecord
from metatrain.train.step import OuterLoop, validation_losses
from metatrain.train.totals import Totals
from metatrain.train.transfer import device_batches

#: Skipped steps that are said one by one; later ones are counted in the curves and at the end.
SKIPPED_SAID = 20


@dataclass(frozen=True)
class Seat:
    """Where this worker sits, and how it speaks to the command that launched it."""

    rank: int
    world_size: int
    device: torch.device
    tell: Callable[[dict[str, Any]], None]
    pulse: Pulse = field(default_factory=Pulse)
    asked: Asked = field(default_factory=Asked)


def run_state(distributed: Distributed, optimizer: DenseOptimizer) -> dict[str, Any]:
    """A run's tensors by name: the very ones, so that loading into them in place restores the run."""
    return {
        **{_stored_name(name): value for name, value in distributed.state_dict().items()},
        **{f"optimizer.{name}": value for name, value in optimizer.state_dict().items()},
    }


class Training:
    """One worker's part of a run, from the run's last checkpoint where there is one, to its end.

    Raises:
        MetatrainError: The dataset, a checkpoint or the loss cannot be used.
    """

    def __init__(self, config: Config, seat: Seat) -> None:
        self.config, self.seat = config, seat
        self.dataset = TaskDataset.open(config.data.dataset)
        self.model = build_model(self.dataset.schema, config, seat.device, tables_device="meta")
        plan = workers_plan(config, self.dataset.manifest, self.model.tables.specs, seat.world_size, seat.device)
        seat.tell({"say": f"embedding tables on {seat.world_size} worker(s):\n{plan.text()}"})
        self.distributed = distribute(self.model, config.train.optimizer, seat.device, plan)
        self.optimizer = DenseOptimizer(self.distributed.dense_parameters(), config.train.optimizer)
        self.quarantine = read_quarantine(config.run_url, self.dataset)
        self.must_equal = identity(config, self.dataset.fingerprint)
        self.pulse = seat.pulse
        self.pulse.enter("restore")
        # Of tables' rows, which have changed since the last full checkpoint.
        differential = config.train.checkpoint.full_every > 1
        touched = {_stored_name(n): bitmap for n, bitmap in self.distributed.track().items()} if differential else {}
        marker = self._restored(touched)
        loop = marker.loop if marker else {}
        self.cursor = marker.cursor if marker else Cursor()
        self.patience = Patience(config.train.early_stopping, loop)
        self.guard = Guard(config.train, seat.device, loop.get("guard"))
        state = run_state(self.distributed, self.optimizer)
        self.saver = Saver(config.run_url, config.train.checkpoint, state, touched, marker, self.pulse.go_on)
        self.pulse.enter("start", self.cursor.total)
        self.saved_at, self.saved_time = self.cursor.total, time.monotonic()
        self.checkpoint_bytes = room.checkpoint_bytes(state)
        keep = config.train.checkpoint.keep
        if seat.rank == 0 and (told := room.warning(config.run_url, self.checkpoint_bytes, keep)):
            seat.tell({"say": told})
        self.lanes = lanes_of(range(config.data.lanes), seat.world_size, seat.rank)
        self.validation = open_reader(self.dataset, config, Split.VALIDATION)
        self.stream = TaskStream(
            self.dataset.url,
            config.data,
            seed=config.train.seed,
            lanes=self.lanes,
            features=config.model.features,
            timestamps=False,
            epochs=config.train.epochs,
            quarantined=self.quarantine.paths,
            num_cpus=0,  # this worker asked for its readers' CPUs too: see `session.worker_cpus`
        )
        self.steps_of = [self.stream.steps(epoch) for epoch in range(config.train.epochs)]
        self.last = last_step(config, self.steps_of)
        self.laps = Laps(seat.device)
        self.totals = Totals(seat.device, self.laps, config.train.optimizer.clip)
        self.outer = OuterLoop(
            self.distributed, self.optimizer, config, self.last, seat.world_size, self.laps, self.pulse, self.guard
        )
        self.record = RunRecord(config, seat, self.dataset, self.distributed, self.cursor.total)
        self.profile = Profile(
            config, seat.rank, self.model, self.pulse, seat.device, lambda what: seat.tell({"say": what})
        )
        self.audit: AuditLog | None = None
        if config.train.audit:
            attempt = next_attempt(config.run_url)
            self.audit = AuditLog(config.run_url, attempt, self.cursor, seat.rank, seat.world_size)

    def run(self) -> None:
        """Trains to the end."""
        config, begun = self.config, False
        while not self._over():
            epoch, due = self.cursor.epoch, False
            self.laps.lap("rest")
            self.profile.at(self.cursor.total)
            self.pulse.enter("read", self.cursor.total)
            for batch, following in _with_next(self._batches(epoch)):
                goes_on = self.cursor.total + 1 < self.last
                wish = self.seat.asked.pending
                outcome = self.outer.step(batch, self.cursor.total, following if goes_on else None, wish=wish > 0)
                if self.audit is not None:
                    self.audit.add(self.cursor, batch, outcome.skipped)
                self.cursor = Cursor(epoch=epoch, step=self.cursor.step + 1, total=self.cursor.total + 1)
                self.saver.check()
                self.totals.add(outcome, batch)
                if not begun:
                    begun = True
                    self.seat.tell({"begun": self.cursor.total, "at": time.time(), "first": dict(self.pulse.first)})
                if outcome.skipped and self.guard.skipped.count <= SKIPPED_SAID:
                    self.seat.tell({"say": f"step {self.cursor.total} is skipped: a loss or gradient is not finite"})
                ends = self.cursor.total == self.last or self.cursor.step == self.steps_of[epoch]
                due = self._due_by_steps()
                if ends or self.cursor.total % config.train.log_every == 0:
                    self.pulse.enter("log", self.cursor.total)
                    due |= self._log()
                if ends:
                    break
                if outcome.wished:
                    self._save_at_once(wish)
                elif due:
                    self._save()
                self.laps.lap("rest")
                self.profile.at(self.cursor.total)
                self.pulse.enter("read", self.cursor.total)
            if self.cursor.step == self.steps_of[epoch]:
                self.cursor = Cursor(epoch=epoch + 1, step=0, total=self.cursor.total)
            metrics, improved = self._validate()
            if improved or (self._over() and not metrics):
                self.record.items()
            if improved or due or self._over():
                self._save(metrics)
        self.profile.end(self.cursor.total)
        self.pulse.enter("checkpoint", self.cursor.total)
        self.saver.wait()
        self.record.committed(self.saver.committed)
        self.record.end(self.cursor.total)
        self.pulse.enter("end", self.cursor.total)
        self.seat.tell(
            {
                "done": self.cursor.total,
                "steps": self.last,
                "stopped_early": self.patience.exhausted,
                "skipped": self.guard.skipped.count,
                "skipped_steps": [step + 1 for step in self.guard.skipped.steps],
            }
        )

    def _batches(self, epoch: int) -> Iterator[TaskBatch]:
        """This worker's batches of an epoch from the cursor on, as tensors on its device."""

        def arrived() -> Iterator[TaskBatch]:
            coming = enumerate(self.stream.batches(epoch, self.cursor.step), self.cursor.total)
            for step, batch in coming:
                faults.point("train.read", step=step, rank=self.seat.rank)
                self.laps.lap("wait")
                yield batch

        for tensors in device_batches(arrived(), self.seat.device):
            self.laps.lap("copy")
            yield tensors

    def close(self) -> None:
        """Ends the readers, lets a save come to its end, and writes what is left of the curves."""
        self.stream.close()
        self.validation.close()
        self.saver.close()
        self.record.close()
        if self.audit is not None:
            self.audit.close()

    def _over(self) -> bool:
        return is_over(self.config, self.cursor, self.last, self.patience)

    def _restored(self, touched: dict[str, torch.Tensor]) -> Marker | None:
        """Loads the run's last checkpoint, where there is one."""
        run = self.config.run_url
        if not (steps := committed_steps(run)):
            return None
        check_identity(read_marker(run, steps[-1]).identity, self.must_equal, run)
        marker = load_checkpoint(run, steps[-1], run_state(self.distributed, self.optimizer), touched)
        self.seat.tell({"say": f"going on from the checkpoint at step {marker.cursor.total}"})
        return marker

    def _due_by_steps(self) -> bool:
        every = self.config.train.checkpoint.every_steps
        return bool(every) and self.cursor.total - self.saved_at >= every

    def _log(self) -> bool:
        """Writes a line of the curves; returns whether a checkpoint is due by time, decided by all ranks together."""
        minutes = self.config.train.checkpoint.every_minutes
        # Clocks differ between ranks: one that says so decides for all.
        due = bool(minutes) and time.monotonic() - self.saved_time > 60 * minutes
        curves, gains, due = self.totals.reduce(due, self.stream.restarts)
        self._check_steps()
        curves |= self.model.meta.curves()
        self.record.line(self.cursor.total, self.last, self.cursor.epoch, curves, gains)
        self.record.committed(self.saver.committed)
        return due

    def _validate(self) -> tuple[dict[str, float], bool]:
        """Metrics for the checkpoint, and whether they are the best so far. No metrics where no validation is due."""
        every = self.config.train.validate_every
        at_epoch = self.cursor.step == 0
        due = bool(every) and (self._over() or (at_epoch and self.cursor.epoch % every == 0))
        if not due or not self.dataset.manifest.tasks.get(Split.VALIDATION):
            return {}, False
        seat = self.seat
        before, after = validation_losses(
            self.distributed, self.validation, self.lanes, seat.device, seat.world_size, self.pulse
        )
        self._check_finite(after, "validation loss")
        # Cut short inside an epoch, the run may be continued: that must not cost it patience.
        improved = self.patience.judge(after) if at_epoch else after < self.patience.best
        best = min(self.patience.best, after)
        self.record.validation(self.cursor.total, self.last, before, after, best, improved)
        return {"validation_loss": after}, improved

    def _save(self, metrics: dict[str, float] | None = None) -> None:
        self._check_steps()  # what came after a bad step must not become a checkpoint
        if self.audit is not None:
            self.audit.sync()
        config = self.config
        self.pulse.enter("checkpoint", self.cursor.total)
        if self.seat.rank == 0 and config.train.checkpoint.full_every == 1:  # a differential one takes what it takes
            room.check(config.run_url, self.checkpoint_bytes)
        saved = self.saver.save(
            run_state(self.distributed, self.optimizer),
            cursor=self.cursor,
            identity=self.must_equal,
            loop={**self.patience.state(), "guard": self.guard.state(), QUARANTINED: sorted(self.quarantine.paths)},
            configuration=config.model_dump(mode="json"),
            metrics=metrics or {},
        )
        self.record.saving(self.cursor.total, metrics or {}, saved.waited + saved.copied)
        self.record.committed(self.saver.committed)
        self.saved_at, self.saved_time = self.cursor.total, time.monotonic()

    def _save_at_once(self, wish: int) -> None:
        """Saves because a rank was asked to, and lets those know who wait for it."""
        self._save()
        if wish:
            self.saver.wait()  # who asked wants it on storage
            asked = self.seat.asked
            self.seat.tell({"say": f"a checkpoint at step {self.cursor.total}: {asked.reason}"})
            asked.meet(wish)

    def _check_steps(self) -> None:
        """Ends the run where a step was bad. Collective: all ranks end."""
        if (total := self.guard.first_bad()) is None:
            return
        self.saver.wait()  # the checkpoint that is being written may be the last good one
        epoch, step = coordinates(total, self.steps_of)
        data, run = self.config.data, self.config.run_url
        bad = BadStep(
            total=total,
            epoch=epoch,
            step=step,
            found=self.cursor.total,
            checkpoint=max((kept for kept in committed_steps(run) if kept <= total), default=None),
            seed=self.config.train.seed,
            lanes=data.lanes,
            tasks_per_step=data.tasks_per_step,
            world_size=self.seat.world_size,
            dataset=self.dataset.url,
            fingerprint=self.dataset.fingerprint,
        )
        if self.seat.rank == 0:
            keep(run, bad)
        dist.barrier()  # the first rank to fail ends the others: not before it is written
        raise as_error(run, bad)

    def _check_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"The {what} is not finite.",
                where=f"epoch {self.cursor.epoch}, after step {self.cursor.total}",
                got=value,
                remedy="Lower `meta.rate` or the rates of `train.optimizer`, or clip with `train.optimizer.clip`, "
                "under another `run.name`.",
            )


def _stored_name(name: str) -> str:
    """A checkpoint's name for what `Distributed.state_dict` calls `name`."""
    return name if name.startswith(OPTIMIZER_PREFIX) else f"{MODEL}{name}"


def _with_next(batches: Iterator[TaskBatch]) -> Iterator[tuple[TaskBatch, TaskBatch | None]]:
    """Each with the one behind it; None behind the last."""
    batch = next(batches, None)
    while batch is not None:
        following = next(batches, None)
        yield batch, following
        batch = following


def train(config: Config, seat: Seat) -> None:
    """Trains `config` to its end on this rank."""
    faults.refresh()
    training = Training(config, seat)
    try:
        training.run()
    finally:
        training.close()
