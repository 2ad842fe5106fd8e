"""The audit log: which tasks each rank trained in which step, and whether the weights have seen each exactly once.

A line a step is written and flushed after the step: a kill loses at most what no checkpoint holds either. Every attempt
(a start of the worker group) writes files of its own, one a rank::

    RUN/audit/attempt-0002-rank-0001.jsonl
    {"attempt": 2, "rank": 1, "world_size": 2, "begins": 40}
    {"epoch": 1, "step": 15, "total": 40, "time": 1764000000.123, "tasks": [17, 3, 250], "skipped": 1}

Tasks are numbers in the training split (`EpochPlan`'s ordinals). An attempt that begins at step s puts its own steps in
the place of what earlier ones did from s on: what is left, up to the last checkpoint, is what the weights have seen.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from metatrain import storage
from metatrain.checkpoint import Cursor, committed_steps
from metatrain.config import Config, load_config
from metatrain.data.batch import TaskBatch
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.plan import EpochPlan
from metatrain.data.quarantine import Quarantine, read_quarantine
from metatrain.data.reader import iterate
from metatrain.data.shards import row_groups
from metatrain.errors import ConfigError, StorageError

_NAME = re.compile(r"attempt-(\d+)-rank-(\d+)\.jsonl$")


def audit_url(run_url: str) -> str:
    """Folder of a run's audit log."""
    return storage.join(run_url, "audit")


def next_attempt(run_url: str) -> int:
    """The number of the attempt that now begins. Collective: equal on all ranks.

    Raises:
        ConfigError: The run is not on a disk: lines cannot be appended to an object store's files.
    """
    if not storage.is_local(run_url):
        raise ConfigError(
            "The audit log needs a run's folder on a disk (a mounted one will do).",
            where="train.audit",
            got=run_url,
            remedy="Set `train.audit: false`, or another `run.storage`.",
        )
    known = [int(match[1]) for name in storage.list_folder(audit_url(run_url)) if (match := _NAME.match(name))]
    attempt = torch.tensor(max(known, default=0) + 1)
    dist.broadcast(attempt, 0)  # rank 0's look is the one that counts: others may see its new file
    return int(attempt)


class AuditLog:
    """Writes one rank's part of an attempt.

    Args:
        run_url: The run's folder, on a disk.
        attempt: Its number (see `next_attempt`).
        begins: Where it begins.
        rank: This rank.
        world_size: Ranks.
    """

    def __init__(self, run_url: str, attempt: int, begins: Cursor, rank: int, world_size: int) -> None:
        storage.make_folder(audit_url(run_url))
        path = storage.filesystem(storage.join(audit_url(run_url), f"attempt-{attempt:04d}-rank-{rank:04d}.jsonl"))[1]
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
        self._write({"attempt": attempt, "rank": rank, "world_size": world_size, "begins": begins.total})

    def add(self, place: Cursor, batch: TaskBatch, left_out: bool = False) -> None:
        """A step that was trained at this place, or whose update was left out by `train.not_finite: skip`."""
        line = {"epoch": place.epoch, "step": place.step, "total": place.total, "time": round(time.time(), 3)}
        line |= {"tasks": batch.tasks.tolist(), "skipped": batch.skipped}
        self._write(line | ({"left_out": True} if left_out else {}))

    def sync(self) -> None:
        """Makes what was added outlive the machine: before a checkpoint that holds it."""
        os.fsync(self._file)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def _write(self, line: dict[str, Any]) -> None:
        # One call a line: what a kill leaves is whole lines, and at most one torn one at the end.
        os.write(self._file, (json.dumps(line, separators=(",", ":")) + "\n").encode())


@dataclass(frozen=True)
class Attempt:
    """A start of the worker group, and what its ranks wrote."""

    number: int
    begins: int
    world_size: int
    #: By rank: total → what it trained in that step.
    ranks: dict[int, dict[int, dict[str, Any]]]

    @property
    def steps(self) -> list[int]:
        """Steps that every rank has finished."""
        whole = [set(lines) for lines in self.ranks.values()] if len(self.ranks) == self.world_size else []
        return sorted(set.intersection(*whole)) if whole else []


@dataclass(frozen=True)
class AuditedStep:
    """A step that the weights have seen."""

    epoch: int
    step: int
    total: int
    attempt: int
    tasks: np.ndarray  # int64 [T]: the ranks' behind one another
    skipped: int  # tasks that no episode can be made of
    left_out: bool  # its batch was read, but there was no update


@dataclass
class AuditReport:
    """What an audit found."""

    steps: int  # that the last checkpoint has seen
    attempts: list[Attempt]
    #: Total → how often it was trained beyond the once that counts.
    redone: dict[int, int]
    #: Epoch → tasks trained of it; of whole epochs that is every task.
    tasks: dict[int, int]
    whole_epochs: list[int]
    #: Steps without an update, by `train.not_finite: skip`: their tasks had their turn.
    left_out: list[int]
    problems: list[str] = field(default_factory=list)

    @property
    def exactly_once(self) -> bool:
        """Whether every task of every whole epoch was trained once, and none twice in one that is not whole."""
        return not self.problems

    def __str__(self) -> str:
        lines = [
            f"steps seen by the last checkpoint: {self.steps}, in {len(self.attempts)} attempts",
            *(
                f"  attempt {a.number}: {a.world_size} workers, from step {a.begins}, {len(a.steps)} steps"
                for a in self.attempts
            ),
            f"steps done again: {sum(self.redone.values())}",
            *([f"steps without an update, not finite: {self.left_out}"] if self.left_out else []),
            *self._epochs(),
        ]
        if self.exactly_once:
            return "\n".join([*lines, "every task was trained exactly once an epoch"])
        return "\n".join([*lines, f"PROBLEMS: {len(self.problems)}", *(f"  {p}" for p in self.problems[:20])])

    def _epochs(self) -> Iterator[str]:
        """Tasks of each epoch, a line for those in a row that are alike."""
        alike = groupby(self.tasks.items(), lambda of: (of[1], of[0] in self.whole_epochs))
        for (count, whole), epochs in alike:
            numbers = [epoch for epoch, _ in epochs]
            one = len(numbers) == 1
            which = f"epoch {numbers[0]}" if one else f"epochs {numbers[0]} to {numbers[-1]}, each"
            yield f"  {which}: {count} tasks" + ("" if whole else " (not to its end)")


def audit(run_url: str) -> AuditReport:
    """Whether the weights of a run's last checkpoint have seen every training task exactly once an epoch.

    Raises:
        StorageError: The run has no audit log, or one that cannot be read.
        MetatrainError: The run's configuration or dataset cannot be read.
    """
    attempts = read_attempts(run_url)
    last = max(committed_steps(run_url), default=0)
    history, problems = history_of(attempts, last)
    config = load_config(storage.join(run_url, "config.yaml"))
    dataset = TaskDataset.open(config.data.dataset)
    lost = _lost(dataset, read_quarantine(run_url, dataset))
    eligible = _eligible(dataset, config, lost.paths)
    report = AuditReport(last, attempts, _redone(attempts, last), {}, [], [], problems)
    report.left_out = [step.total for step in history if step.left_out]
    for epoch in sorted({step.epoch for step in history}):
        steps = [step for step in history if step.epoch == epoch]
        plan = _plan(dataset, config, epoch)
        trained = np.concatenate([step.tasks for step in steps])
        report.tasks[epoch] = len(trained)
        if whole := len(steps) == plan.steps:
            report.whole_epochs.append(epoch)
        report.problems += [
            *_counted(epoch, trained, eligible, whole, lost),
            *_planned(steps, plan, eligible, config, lost),
        ]
    return report


def read_attempts(run_url: str) -> list[Attempt]:
    """What is in a run's audit log, in the order of the attempts.

    Raises:
        StorageError: There is none, or a line that is not the log's.
    """
    found: dict[int, Attempt] = {}
    for name in storage.list_folder(audit_url(run_url)):
        if not _NAME.match(name):
            continue
        path = storage.join(audit_url(run_url), name)
        lines = list(_lines(path))
        if not lines:
            continue  # killed before its first line was whole: nothing was trained
        try:
            head, *rest = lines
            attempt = Attempt(head["attempt"], head["begins"], head["world_size"], {})
            if found.setdefault(attempt.number, attempt).begins != attempt.begins:
                raise ValueError("the ranks of an attempt begin at different steps")
            found[attempt.number].ranks[head["rank"]] = {line["total"]: line for line in rest}
            if len({line["total"] for line in rest}) != len(rest):
                raise ValueError("an attempt trained a step twice")
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"The audit log cannot be read: {error!r}", where=path) from error
    if not found:
        raise StorageError(
            "The run has no audit log.", where=audit_url(run_url), remedy="Train it with `train.audit: true`."
        )
    return [found[number] for number in sorted(found)]


def _lines(path: str) -> Iterator[dict[str, Any]]:
    lines = storage.read_bytes(path).split(b"\n")
    torn = lines.pop()  # empty where the last line is whole
    for n, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise StorageError(f"The audit log cannot be read: {error}", where=f"{path}: line {n}") from error
    with contextlib.suppress(ValueError):
        if torn:  # a kill in the midst of a line, or just before its end
            yield json.loads(torn)


def history_of(attempts: list[Attempt], last: int) -> tuple[list[AuditedStep], list[str]]:
    """The steps below `last` that the weights have seen, in order, and what is wrong with them."""
    seen: dict[int, AuditedStep] = {}
    for attempt in attempts:
        seen = {total: step for total, step in seen.items() if total < attempt.begins}
        for total in attempt.steps:
            parts = [attempt.ranks[rank][total] for rank in range(attempt.world_size)]
            places = {(part["epoch"], part["step"]) for part in parts}
            if len(places) > 1:
                return [], [f"attempt {attempt.number}, step {total}: ranks were at different places {sorted(places)}"]
            tasks = np.concatenate([np.asarray(part["tasks"], np.int64) for part in parts])
            epoch, step = places.pop()
            skipped, left_out = sum(part["skipped"] for part in parts), any("left_out" in part for part in parts)
            seen[total] = AuditedStep(epoch, step, total, attempt.number, tasks, skipped, left_out)
    missing = [total for total in range(last) if total not in seen]
    problems = [f"step {total} is in the last checkpoint, but no attempt says that it trained it" for total in missing]
    return [seen[total] for total in range(last) if total in seen], problems


def _redone(attempts: list[Attempt], last: int) -> dict[int, int]:
    """How often each step was trained beyond the once that counts."""
    times: dict[int, int] = {}
    for attempt in attempts:
        for total in attempt.steps:
            times[total] = times.get(total, 0) + 1
    return {total: count - (total < last) for total, count in sorted(times.items()) if count > (total < last)}


@dataclass(frozen=True)
class _Lost:
    """Tasks of quarantined shards, which nobody can read any more."""

    paths: frozenset[str]
    tasks: np.ndarray  # int64 [n], ascending
    since: np.ndarray  # int64 [n]: the total from which each was left out

    def before(self, total: int) -> np.ndarray:
        """Those that a step after so many others may still have had."""
        return self.tasks[self.since > total]


def _lost(dataset: TaskDataset, quarantine: Quarantine) -> _Lost:
    since = {shard.path: shard.since_step for shard in quarantine.shards}
    tasks, totals, first = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for shard in dataset.manifest.of(Split.TRAIN):
        if shard.path in since:
            tasks.append(np.arange(first, first + shard.tasks))
            totals.append(np.full(shard.tasks, since[shard.path]))
        first += shard.tasks
    return _Lost(quarantine.paths, np.concatenate(tasks), np.concatenate(totals))


def _eligible(dataset: TaskDataset, config: Config, quarantined: frozenset[str]) -> np.ndarray:
    """The training tasks that an episode can be made of: int64, ascending. Read anew, in the stored order."""
    episode, seed = config.data.episode, config.train.seed
    batches = iterate(dataset, Split.TRAIN, ItemSet.EXISTING, episode, seed=seed, quarantined=quarantined)
    return np.sort(np.concatenate([np.zeros(0, np.int64), *(batch.tasks for batch in batches)]))


def _plan(dataset: TaskDataset, config: Config, epoch: int) -> EpochPlan:
    return EpochPlan(
        row_groups(dataset.manifest.of(Split.TRAIN)),
        seed=config.train.seed,
        epoch=epoch,
        lanes=config.data.lanes,
        tasks_per_step=config.data.tasks_per_step,
        window=config.data.shuffle_row_groups,
    )


def _counted(epoch: int, trained: np.ndarray, eligible: np.ndarray, whole: bool, lost: _Lost) -> list[str]:
    """What is wrong with the tasks of an epoch, counted without the plan."""
    tasks, times = np.unique(trained, return_counts=True)
    problems = [
        f"epoch {epoch}: task {task} was trained {n} times" for task, n in zip(tasks, times, strict=True) if n > 1
    ]
    strangers = np.setdiff1d(np.setdiff1d(tasks, eligible), lost.tasks)
    problems += [f"epoch {epoch}: task {task} is none of the training tasks" for task in strangers]
    if whole:
        problems += [f"epoch {epoch}: task {task} was never trained" for task in np.setdiff1d(eligible, tasks)]
    return problems


def _planned(steps: list[AuditedStep], plan: EpochPlan, eligible: np.ndarray, config: Config, lost: _Lost) -> list[str]:
    """Steps whose global batch was not the plan's."""
    problems = []
    for step in steps:
        planned = plan.positions(range(config.data.lanes), step.step).ordinal
        # Which tasks of a lost shard had an episode nobody can tell: those that were trained while it was there.
        once = np.intersect1d(step.tasks, lost.before(step.total))
        expected = planned[np.isin(planned, eligible) | np.isin(planned, once)]
        if not np.array_equal(expected, step.tasks) or step.skipped != len(planned) - len(expected):
            problems.append(f"epoch {step.epoch}, step {step.step}: the global batch was not the plan's")
    return problems
