"""RUN/status.json: what it says while a run trains, dies, is started again, and ends; and how a terminal shows it."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from metatrain import storage
from metatrain.errors import StorageError
from metatrain.observe.status import FAULTS_KEPT, STALE_SECONDS, StatusFile, read_status
from metatrain.observe.status_text import alive, rendered, span

START = 1_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


def line(step: int, step_seconds: float = 0.5, reader_restarts: float = 0.0) -> dict[str, Any]:
    return {
        "step": step,
        "steps": 100,
        "epoch": 1,
        "learning/loss_before": 0.9,
        "learning/loss_after": 0.8,
        "speed/step_seconds": step_seconds,
        "speed/tasks_per_second": 128.0,
        "speed/reader_restarts": reader_restarts,
        "time/inner_loop": 0.5,
        "time/wait": 0.25,
        "time/backward": 0.2,
        "time/rest": 0.05,
    }


def trained(run: str, clock: Clock) -> StatusFile:
    file = StatusFile(run, epochs=4, clock=clock)
    for message in (
        {"start": 2},
        {"say": "something"},
        line(40),
        {"step": 40, "steps": 100, "validation_loss": 0.85, "best": True},
        {"checkpoint": 40, "checkpoint_seconds": 1.5, "checkpoint_loss": 0.85},
        line(60, step_seconds=1.5),
    ):
        file.take(message)
    return file


def test_a_running_run_tells_progress_rate_and_time_left(tmp_path: Path) -> None:
    clock = Clock()
    file = trained(str(tmp_path), clock)
    clock.now += 20
    file.tick()
    status = read_status(str(tmp_path))
    assert (status.state, status.step, status.steps, status.workers, status.restarts) == ("training", 60, 100, 2, 0)
    assert status.step_seconds == pytest.approx(0.7 * 0.5 + 0.3 * 1.5)
    shown = rendered(status, clock.now + 3)
    assert "60%  step 60 of 100, epoch 2 of 4" in shown
    assert "128 tasks/s, 1,500.0 ms a step; 32 s left" in shown
    assert "inner loop 50%, wait 25%, backward 20%" in shown
    assert "0.9000 before adaptation, 0.8000 after" in shown
    assert "step 40, 23 s ago, training stood still 1.5 s, validation loss 0.8500" in shown
    assert "2; started again never" in shown


def test_a_silent_command_and_one_without_progress_are_told_apart(tmp_path: Path) -> None:
    clock = Clock()
    file = trained(str(tmp_path), clock)
    clock.now += 600
    file.tick()
    status = read_status(str(tmp_path))
    assert alive(status, clock.now + STALE_SECONDS)
    assert "NO PROGRESS for 10 min" in rendered(status, clock.now)
    shown = rendered(status, clock.now + 3661)
    assert "NOT ALIVE: no sign of it for 1 h 1 min" in shown
    assert " left" not in shown, "nothing is on its way"


def test_it_is_written_seldom_and_at_once_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(storage, "write_atomic", lambda url, data: written.append(data))
    clock = Clock()
    file = StatusFile(str(tmp_path), epochs=4, clock=clock)
    for _ in range(40):  # 20 s
        file.take(line(1))
        file.tick()
        clock.now += 0.5
    assert len(written) == 4
    file.end("failed", "The training loss is not finite.")
    assert len(written) == 5
    assert json.loads(written[-1])["state"] == "failed"


def test_a_start_of_the_workers_is_told_at_once(tmp_path: Path) -> None:
    file = StatusFile(str(tmp_path), epochs=4, clock=Clock())
    for workers in (2, 1):
        file.take({"start": workers})
        file.tick()  # in the same moment: the command may be killed in the next one
    assert (read_status(str(tmp_path)).workers, read_status(str(tmp_path)).restarts) == (1, 1)


def test_an_attempt_that_a_killed_command_did_not_tell_of_is_counted(tmp_path: Path) -> None:
    """The run's board has a file of each attempt, whatever became of the command."""
    run, clock = str(tmp_path), Clock()
    trained(run, clock).tick()
    again = StatusFile(run, epochs=4, clock=clock)
    again.take({"start": 2})
    again.take({**line(70), "speed/restarts": 3.0})
    assert again.status.restarts == 3
    again.take({"start": 2})
    assert again.status.restarts == 4


def test_restarts_and_faults_outlive_the_command(tmp_path: Path) -> None:
    run, clock = str(tmp_path), Clock()
    file = trained(run, clock)
    file.take({"start": 1})  # the group came back smaller
    file.take(line(50))
    file.take(line(60, reader_restarts=2))
    file.take(line(70, reader_restarts=2))
    file.take({"say": "x", "fault": "a worker hangs and is killed"})
    clock.now += 10
    file.tick()
    # Killed here. The same command again, an hour later.
    clock.now += 3600
    again = StatusFile(run, epochs=4, clock=clock)
    assert read_status(run).state == "starting"
    assert "starting" in rendered(read_status(run), clock.now)
    again.take({"start": 2})
    again.take(line(55))
    again.end("finished")
    status = read_status(run)
    assert status.restarts == 2
    assert [fault.what for fault in status.faults] == [
        "the workers were started again, 1 of them",
        "2 readers died and were replaced",
        "a worker hangs and is killed",
        "the command that trained the run ended without a word",
    ]
    assert status.checkpoint_step == 40, "what is known of the run before this command"
    assert "finished 5 s ago" in rendered(status, clock.now + 5)
    assert "started again twice" in rendered(status, clock.now)


def test_a_line_whose_steps_were_all_skipped_is_told_without_a_loss(tmp_path: Path) -> None:
    clock = Clock()
    file = trained(str(tmp_path), clock)
    file.take({**line(70), "learning/loss_before": float("nan"), "learning/loss_after": float("nan")})
    clock.now += 10
    file.tick()
    assert "query loss" not in rendered(read_status(str(tmp_path)), clock.now)


def test_faults_are_bounded(tmp_path: Path) -> None:
    file = StatusFile(str(tmp_path), epochs=1, clock=Clock())
    for number in range(100):
        file.take({"fault": str(number)})
    assert [fault.what for fault in file.status.faults] == [str(n) for n in range(100 - FAULTS_KEPT, 100)]


def test_a_store_that_fails_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    file = StatusFile(str(tmp_path), epochs=1, clock=clock)
    put = storage.write_atomic

    def fails(url: str, data: str) -> None:
        raise OSError("the store is away")

    monkeypatch.setattr(storage, "write_atomic", fails)
    for _ in range(3):
        clock.now += 100
        file.tick()
    assert caplog.text.count("the store is away") == 1
    monkeypatch.setattr(storage, "write_atomic", put)
    clock.now += 100
    file.tick()
    assert read_status(str(tmp_path)).written == clock.now


def test_a_run_on_an_object_store_is_read_from_there() -> None:
    run = f"memory://{uuid.uuid4().hex}/runs/x"
    trained(run, Clock()).end("interrupted")
    assert "interrupted" in rendered(read_status(run), START)


def test_a_missing_or_broken_status_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="told of no training"):
        read_status(str(tmp_path))
    (tmp_path / "status.json").write_text('{"run": 7')
    with pytest.raises(StorageError, match="cannot be read"):
        read_status(str(tmp_path))
    (tmp_path / "status.json").write_text('{"run": "x", "step": "many"}')
    with pytest.raises(StorageError, match="cannot be read"):
        read_status(str(tmp_path))
    # A training run replaces it.
    StatusFile(str(tmp_path), epochs=1)
    assert read_status(str(tmp_path)).state == "starting"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (3600, "1 h"), (3661, "1 h 1 min"), (90_000, "1 d 1 h"), (-5, "0 s")],
)
def test_spans(seconds: float, text: str) -> None:
    assert span(seconds) == text
