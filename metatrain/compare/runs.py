"""Trains and scores a comparison's runs, one after the other, in one Ray session; a run that fails ends no other.

What is trained or scored already is not done again: a comparison that was cut off anywhere goes on by the same
command. The budget is wall clock: a training that it cuts off keeps its last checkpoint, and goes on next time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from metatrain import storage
from metatrain.checkpoint import best_step, committed_steps
from metatrain.compare import scores as stored
from metatrain.compare.entries import Comparison, Entry
from metatrain.compare.scores import Scores
from metatrain.config import Config
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import FILE as MANIFEST
from metatrain.data.prepare import prepare, summary
from metatrain.errors import MetatrainError, TrainingError
from metatrain.evaluate.baselines import Fitted
from metatrain.evaluate.evaluation import evaluate_run, fit_baselines
from metatrain.evaluate.protocols import Judge
from metatrain.train.checks import check, finished, located
from metatrain.train.launch import launch
from metatrain.train.session import check_resources, cpus_of, ray_session
from metatrain.train.worker import Seat, train

log = logging.getLogger("metatrain")

Status = Literal["scored", "failed", "cut off", "not started", "not trained"]


class OutOfTimeError(TrainingError):
    """The comparison's budget ended a training, which can go on from its last checkpoint."""


@dataclass(frozen=True)
class Run:
    """One entry at one seed, and what became of it."""

    entry: Entry
    seed: int
    url: str
    status: Status
    why: str = ""  # where it is not scored
    scores: Scores | None = None
    train_seconds: float | None = None  # None: trained elsewhere


class Clock:
    """The budget of a comparison, from its start."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        #: Seconds since the epoch: workers in other processes compare with it.
        self.deadline = time.time() + 60 * minutes if minutes else None

    @property
    def spent(self) -> bool:
        """Whether the budget is used up."""
        return self.deadline is not None and time.time() >= self.deadline


def train_until(config: Config, seat: Seat, deadline: float | None) -> None:
    """Trains on this rank, to the end or to the deadline.

    Raises:
        OutOfTimeError: At a line of the curves behind the deadline.
    """

    def tell(message: dict[str, Any]) -> None:
        seat.tell(message)
        step, last = message.get("step"), message.get("steps")
        # The last step's checkpoint is worth the moment it takes.
        if deadline is not None and step is not None and step != last and time.time() >= deadline:
            raise OutOfTimeError(
                f"The budget was spent at step {step:,} of {last:,}.",
                where=config.run_url,
                remedy="The same command goes on from the last checkpoint; give it more `minutes`.",
            )

    train(config, dataclasses.replace(seat, tell=tell))


def run_of(entry: Entry, seed: int, out: str) -> Config:
    """An entry's configuration at a seed, its run in the comparison's folder.

    Raises:
        MetatrainError: The entry has no configuration that can be used.
    """
    if entry.error is not None:
        raise entry.error
    assert entry.config is not None, "an entry without an error has one"
    config = located(entry.config)
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"name": f"{entry.name}-seed{seed}", "storage": f"{out}/runs"}),
            "train": config.train.model_copy(update={"seed": seed}),
        }
    )


class Runs:
    """A comparison's runs.

    Args:
        comparison: What to train and score.
        out: Folder of the comparison.
        address: Of a Ray cluster. Default: a local Ray, started at the first training and shared by all.
        report: Whether nothing is prepared or trained: what is there is scored.
    """

    def __init__(self, comparison: Comparison, out: str, address: str | None = None, report: bool = False) -> None:
        self.comparison, self.out, self._address, self._report = comparison, storage.absolute(out), address, report
        self._clock = Clock(0.0 if report else comparison.minutes)
        self._fitted: Fitted | None = None

    def results(self) -> Iterator[Run]:
        """Each run, as it ends: of all entries the first seed, then the second: a budget that ends early leaves no
        entry with three seeds beside one with none.

        Raises:
            MetatrainError: The dataset cannot be prepared or read.
        """
        self._prepare()
        with contextlib.ExitStack() as session:
            for place, seed in enumerate(self.comparison.seeds):
                for entry in self.comparison.entries:
                    if entry.run is not None and place:
                        continue  # trained elsewhere, once
                    run = self._result(entry, seed, session)
                    if run.status != "failed":  # a failure was told as it came
                        log.info(
                            "%s, seed %d: %s", entry.name, run.seed, ": ".join(filter(None, (run.status, run.why)))
                        )
                    yield run

    def _prepare(self) -> None:
        url = self.comparison.dataset
        if not self._report and not storage.exists(storage.join(url, MANIFEST)):
            log.info("%s", summary(prepare(self.comparison.shared.prepare, url, address=self._address)))
        self._dataset = TaskDataset.open(url)

    def _result(self, entry: Entry, seed: int, session: contextlib.ExitStack) -> Run:
        if entry.run is not None and entry.config is not None:
            seed = entry.config.train.seed
        name = f"{entry.name}-seed{seed}"
        url = entry.run or f"{self.out}/runs/{name}"

        def run(status: Status, why: str = "", scores: Scores | None = None) -> Run:
            return Run(entry, seed, url, status, why, scores, None if entry.run else _seconds(url))

        try:
            if entry.run is None:
                self._train(run_of(entry, seed, self.out), session)
            return run("scored", scores=self._scores(url, name))
        except _NotTrainedError as reason:
            return run(reason.status, str(reason))
        except OutOfTimeError as reason:
            return run("cut off", reason.what)
        except Exception as error:  # an entry's failure, whatever it is, is told in the report and ends no other
            known = isinstance(error, MetatrainError)
            log.warning("%s, seed %d failed: %s", entry.name, seed, error, exc_info=None if known else error)
            return run("failed", str(error) if known else f"{type(error).__name__}: {error}")

    def _train(self, config: Config, session: contextlib.ExitStack) -> None:
        """Trains a run to its end, unless it is there.

        Raises:
            _NotTrainedError: There is no time for it, or nothing may be trained.
        """
        check(config)
        if finished(config):
            return
        if self._report:
            raise _NotTrainedError("not trained", _progress(config) or "there is no checkpoint")
        if self._clock.spent:
            raise _NotTrainedError("not started", f"the budget of {self._clock.minutes:g} minutes was spent")
        self._enter(session)
        check_resources(config, cluster=bool(self._address))
        start, before = time.monotonic(), _seconds(config.run_url) or 0.0
        try:
            launch(config, self._address, functools.partial(train_until, deadline=self._clock.deadline))
        finally:
            content = {"train_seconds": before + time.monotonic() - start}
            storage.write_atomic(storage.join(config.run_url, _SECONDS_FILE), json.dumps(content))

    def _enter(self, session: contextlib.ExitStack) -> None:
        """Starts the Ray that all trainings share, large enough for the largest; where it runs, nothing happens."""
        configs = [entry.config for entry in self.comparison.entries if entry.config is not None and entry.run is None]
        largest = max(configs, key=cpus_of)
        # GPUs are asked for run by run: one that wants what isn't there ends no other.
        train = largest.train.model_copy(update={"gpus": False})
        run = largest.run.model_copy(update={"storage": f"{self.out}/runs"})
        session.enter_context(ray_session(largest.model_copy(update={"train": train, "run": run}), self._address))

    def _scores(self, run: str, name: str) -> Scores:
        """A trained run's scores: those in the comparison's folder, if they are of its best checkpoint, or new ones."""
        step, evaluate = best_step(run), self.comparison.evaluate
        key = stored.key_of(step, self._dataset.fingerprint, evaluate)
        url = f"{self.out}/scores/{name}.npz"
        if (found := stored.load(key, url)) is not None:
            return found
        self._fitted = self._fitted or fit_baselines(self._dataset, Judge(self._dataset.schema, evaluate))
        ours = run.startswith(f"{self.out}/runs/")
        # A run trained elsewhere keeps the report that it has.
        report = evaluate_run(
            run, checkpoint=step, evaluate=evaluate, dataset=self._dataset.url, write=ours, fitted=self._fitted
        )
        scores = Scores.of(report)
        stored.save(scores, key, url)
        return scores


class _NotTrainedError(Exception):
    def __init__(self, status: Status, why: str) -> None:
        super().__init__(why)
        self.status: Status = status


_SECONDS_FILE = "comparison.json"


def _seconds(run_url: str) -> float | None:
    """Seconds that a run's trainings took in this and earlier comparisons; None where none was made."""
    url = storage.join(run_url, _SECONDS_FILE)
    if not storage.exists(url):
        return None
    content: Mapping[str, Any] = json.loads(storage.read_text(url))
    return float(content["train_seconds"])


def _progress(config: Config) -> str:
    steps = committed_steps(config.run_url)
    return f"its last checkpoint is at step {steps[-1]:,}" if steps else ""
