"""The audit finds what was trained twice, never, or out of the plan, and takes restarts for what they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from metatrain import storage
from metatrain.checkpoint import Cursor
from metatrain.config import Config, to_yaml
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.plan import lanes_of
from metatrain.data.reader import BatchReader
from metatrain.errors import ConfigError, StorageError
from metatrain.train.audit import AuditLog, audit, next_attempt
from tests.data.tiny_dataset import write_tiny_dataset
from tests.distributed.ranks import run_ranks
from tests.train.runs import recipe


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("dataset"))
    write_tiny_dataset(url, users=150, max_events=6)  # some of one event, of which no episode can be made
    return url


@pytest.fixture
def run(dataset: str, tmp_path: Path) -> Config:
    config = recipe(dataset, str(tmp_path), "run")
    storage.write_atomic(storage.join(config.run_url, "config.yaml"), to_yaml(config))
    return config


def places(config: Config, begins: int, ends: int) -> Iterator[tuple[Cursor, BatchReader]]:
    """Where a run from step `begins` to `ends` is, and a reader of its plan."""
    data, total = config.data, 0
    reader = BatchReader.from_config(data.dataset, data, Split.TRAIN, ItemSet.EXISTING, data.episode, config.train.seed)
    for epoch in range(config.train.epochs):
        for step in range(reader.steps(epoch)):
            if begins <= total < ends:
                yield Cursor(epoch=epoch, step=step, total=total), reader
            total += 1
    reader.close()


def attempt(config: Config, begins: int, ends: int, number: int = 1, world_size: int = 2) -> None:
    """What an attempt writes that trains these steps."""
    logs = [AuditLog(config.run_url, number, Cursor(total=begins), rank, world_size) for rank in range(world_size)]
    for place, reader in places(config, begins, ends):
        for rank, log in enumerate(logs):
            mine = lanes_of(range(config.data.lanes), world_size, rank)
            log.add(place, reader.read(place.epoch, place.step, mine).tensors())
    for log in logs:
        log.sync()
        log.close()


def commit(config: Config, total: int) -> None:
    storage.write_atomic(storage.join(config.run_url, "checkpoints", f"step-{total:08d}", "COMMITTED.json"), "{}")


def steps_of(config: Config) -> list[int]:
    """Steps of each epoch."""
    epochs = [place.epoch for place, _ in places(config, 0, 10**9)]
    return [epochs.count(epoch) for epoch in range(config.train.epochs)]


def edited(config: Config, change: Any, attempt: int = 1, rank: int = 0) -> None:
    """Changes the lines of one file."""
    path = Path(config.run_url, "audit", f"attempt-{attempt:04d}-rank-{rank:04d}.jsonl")
    head, *lines = map(json.loads, path.read_text().splitlines())
    lines = change(lines) or lines
    path.write_text("".join(json.dumps(line) + "\n" for line in [head, *lines]))


def test_a_run_without_faults_trained_every_task_once_an_epoch(run: Config) -> None:
    steps = steps_of(run)
    attempt(run, 0, sum(steps))
    commit(run, sum(steps))
    report = audit(run.run_url)
    assert report.exactly_once, report
    assert report.whole_epochs == [0, 1, 2, 3]
    assert len(set(report.tasks.values())) == 1
    assert 0 < report.tasks[0] < 150  # some were skipped
    assert report.redone == {}
    assert "exactly once" in str(report)


def test_restarts_at_other_sizes_count_each_step_once_and_tell_what_was_done_again(run: Config) -> None:
    total = sum(steps_of(run))
    attempt(run, 0, 9)
    attempt(run, 5, 14, number=2, world_size=1)
    attempt(run, 10, total, number=3)
    commit(run, total)
    report = audit(run.run_url)
    assert report.exactly_once, report
    assert report.redone == {5: 1, 6: 1, 7: 1, 8: 1, 10: 1, 11: 1, 12: 1, 13: 1}
    assert [(a.number, a.begins, a.world_size) for a in report.attempts] == [(1, 0, 2), (2, 5, 1), (3, 10, 2)]


def test_steps_behind_the_last_checkpoint_are_not_what_the_weights_have_seen(run: Config) -> None:
    first = steps_of(run)[0]
    attempt(run, 0, first + 6)
    commit(run, first + 2)
    report = audit(run.run_url)
    assert report.exactly_once, report
    assert report.steps == first + 2
    assert report.whole_epochs == [0]
    assert set(report.redone) == set(range(first + 2, first + 6))  # done in vain so far


def test_a_line_torn_by_a_kill_is_no_step_and_a_step_of_one_rank_alone_neither(run: Config) -> None:
    attempt(run, 0, 9)
    path = Path(run.run_url, "audit", "attempt-0001-rank-0001.jsonl")
    path.write_bytes(path.read_bytes()[:-20])
    commit(run, 8)
    assert audit(run.run_url).exactly_once
    commit(run, 9)
    assert audit(run.run_url).problems == ["step 8 is in the last checkpoint, but no attempt says that it trained it"]


def doubled(lines: list[dict[str, Any]]) -> None:
    lines[3]["tasks"].append(lines[2]["tasks"][0])


def missing(lines: list[dict[str, Any]]) -> None:
    lines[3]["tasks"].pop()


def swapped(lines: list[dict[str, Any]]) -> None:
    lines[2]["tasks"][0], lines[3]["tasks"][0] = lines[3]["tasks"][0], lines[2]["tasks"][0]


def foreign(lines: list[dict[str, Any]]) -> None:
    lines[3]["tasks"][0] = 10_000


def lost(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return lines[:3] + lines[4:]


def elsewhere(lines: list[dict[str, Any]]) -> None:
    lines[3]["step"] += 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (doubled, "trained 2 times"),
        (missing, "never trained"),
        (swapped, "the global batch was not the plan's"),
        (foreign, "none of the training tasks"),
        (lost, "no attempt says that it trained it"),
        (elsewhere, "ranks were at different places"),
    ],
)
def test_what_is_wrong_is_found(run: Config, change: Any, complaint: str) -> None:
    total = sum(steps_of(run))
    attempt(run, 0, total)
    commit(run, total)
    edited(run, change)
    report = audit(run.run_url)
    assert not report.exactly_once
    assert any(complaint in problem for problem in report.problems), report


def test_steps_without_an_update_are_told(run: Config) -> None:
    attempt(run, 0, 9)
    for rank in range(2):
        edited(run, lambda lines: lines[4].update(left_out=True), rank=rank)
    commit(run, 9)
    report = audit(run.run_url)
    assert report.exactly_once
    assert report.left_out == [4]
    assert "[4]" in str(report)


def test_a_restart_that_skips_steps_is_found(run: Config) -> None:
    total = sum(steps_of(run))
    attempt(run, 0, 8)
    attempt(run, 10, total, number=2)
    commit(run, total)
    assert [problem.split(" is in")[0] for problem in audit(run.run_url).problems[:2]] == ["step 8", "step 9"]


def test_a_run_without_a_log_and_a_broken_log_are_refused(run: Config) -> None:
    with pytest.raises(StorageError, match="no audit log") as refused:
        audit(run.run_url)
    assert refused.value.remedy
    attempt(run, 0, 5)
    edited(run, lambda lines: [*lines, lines[-1]])
    with pytest.raises(StorageError, match="trained a step twice"):
        audit(run.run_url)
    path = Path(run.run_url, "audit", "attempt-0001-rank-0000.jsonl")
    path.write_text("nothing\n" + path.read_text())
    with pytest.raises(StorageError, match=r"rank-0000\.jsonl: line 1"):
        audit(run.run_url)


def begin(rank: int, world_size: int, run_url: str) -> list[int]:
    """Three attempts begun, one after the other."""
    numbers = []
    for _ in range(3):
        numbers.append(next_attempt(run_url))
        AuditLog(run_url, numbers[-1], Cursor(), rank, world_size).close()
        dist.barrier()
    return numbers


def test_ranks_agree_on_the_number_of_an_attempt(tmp_path: Path) -> None:
    assert run_ranks(begin, 2, str(tmp_path / "run")) == [[1, 2, 3], [1, 2, 3]]


def test_an_object_store_is_refused() -> None:
    with pytest.raises(ConfigError, match="on a disk"):
        next_attempt("memory://runs/run")
