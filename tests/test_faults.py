"""Planned faults fire where and when the plan says, once among all processes, and never without a plan."""

from __future__ import annotations

import errno
import json
import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metatrain import faults
from metatrain.errors import ConfigError
from metatrain.faults import Fault


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path / "plan.json")
    faults.activate(None)


def begin(plan: str, *some: Fault) -> None:
    faults.write_plan(plan, some)
    faults.activate(plan)


def raises(**place: Any) -> bool:
    try:
        faults.point("train.update", **place)
    except OSError:
        return True
    return False


def test_without_a_plan_nothing_happens_at_next_to_no_cost() -> None:
    begun = time.perf_counter()
    for step in range(10_000):
        faults.point("train.update", step=step, rank=0)
    assert (time.perf_counter() - begun) / 10_000 < 10e-6


def test_a_fault_fires_at_its_step_and_rank_once(plan: str) -> None:
    begin(plan, Fault("train.update", "error", rank=1, step=3))
    places = [(rank, step) for step in range(6) for rank in range(2)]
    assert [place for place in places if raises(rank=place[0], step=place[1])] == [(1, 3)]
    faults.activate(plan)  # a restart
    assert not any(raises(rank=1, step=step) for step in range(6))


def test_a_step_that_no_passage_has_fires_at_the_next_one(plan: str) -> None:
    begin(plan, Fault("train.update", "error", step=3))
    assert [step for step in (0, 2, 5, 6) if raises(step=step)] == [5]


def test_skip_lets_passages_go_and_times_repeats(plan: str) -> None:
    begin(plan, Fault("train.update", "error", skip=2, times=2))
    assert [raises() for _ in range(6)] == [False, False, True, True, False, False]


def test_paths_and_epochs_are_matched(plan: str) -> None:
    begin(plan, Fault("train.update", "error", path="part-1"), Fault("train.update", "error", epoch=2))
    assert not raises(path="a/part-0", epoch=0)
    assert not raises()
    assert raises(path="a/part-1.bin")
    assert raises(epoch=2)


def test_a_point_that_knows_no_place_is_where_the_process_was_last(plan: str) -> None:
    begin(plan, Fault("storage.write", "error", rank=1, step=7))
    faults.point("train.read", rank=1, step=6)
    faults.point("storage.write", path="x")
    faults.point("train.read", rank=1, step=7)
    with pytest.raises(OSError, match="on purpose"):
        faults.point("storage.write", path="x")


def test_an_error_is_the_one_of_its_number(plan: str) -> None:
    begin(
        plan,
        Fault("storage.write", "error", errno="ENOSPC", path="disk"),
        Fault("storage.write", "error", errno="ECONNRESET", path="net"),
    )
    with pytest.raises(ConnectionResetError):
        faults.point("storage.write", path="net")
    with pytest.raises(OSError, match="No space left") as full:
        faults.point("storage.write", path="disk")
    assert full.value.errno == errno.ENOSPC
    assert full.value.filename == "disk"


def test_a_delay_sleeps_and_a_truncation_halves_the_file(plan: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(100))
    begin(plan, Fault("storage.read", "truncate", path="file"), Fault("train.read", "delay", seconds=0.2))
    faults.point("storage.read", path=str(file))
    assert file.stat().st_size == 50
    begun = time.monotonic()
    faults.point("train.read")
    assert time.monotonic() - begun >= 0.2


def test_what_fired_is_told_with_its_place(plan: str) -> None:
    begin(plan, Fault("train.update", "error", step=4, id="late"), Fault("train.update", "error", step=1, id="soon"))
    for step in range(5):
        raises(step=step, rank=2)
    told = faults.fired(plan)
    assert [(record["id"], record["place"]["step"], record["place"]["rank"]) for record in told] == [
        ("soon", 1, 2),
        ("late", 4, 2),
    ]
    assert told[0]["time"] <= told[1]["time"]


def _pass(plan: str, count: Any) -> None:
    faults.activate(plan)
    with count.get_lock():
        count.value += sum(raises() for _ in range(50))


def test_many_processes_at_once_fire_it_once(plan: str) -> None:
    faults.write_plan(plan, [Fault("train.update", "error", times=3)])
    context = multiprocessing.get_context("fork")
    count = context.Value("i", 0)
    processes = [context.Process(target=_pass, args=(plan, count)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert count.value == 3


@pytest.mark.parametrize(("action", "status"), [("kill", -signal.SIGKILL), ("error", 1)])
def test_a_process_reads_the_plan_that_the_environment_names(plan: str, action: Any, status: int) -> None:
    faults.write_plan(plan, [Fault("train.update", action)])
    code = "from metatrain import faults; faults.point('train.read'); faults.point('train.update'); print('lived')"

    def run() -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-c", code], env={faults.VARIABLE: plan}, capture_output=True, timeout=60
        )

    assert run().returncode == status
    assert run().stdout == b"lived\n"  # once among restarts


@pytest.mark.parametrize("action", ["hang", "freeze"])
def test_a_hanging_process_never_comes_back(plan: str, action: Any) -> None:
    faults.write_plan(plan, [Fault("train.update", action)])
    code = "from metatrain import faults; print('here', flush=True); faults.point('train.update')"
    process = subprocess.Popen([sys.executable, "-c", code], env={faults.VARIABLE: plan}, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        assert faults.fired(plan)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"faults": [{"at": "train.update"}]}', "cannot be read"),
        ('{"faults": [{"at": "train.update", "action": "kill", "when": 3}]}', "unknown keys"),
        ('{"faults": [{"at": "train.nowhere", "action": "kill"}]}', "unknown `at`"),
        ('{"faults": [{"at": "train.update", "action": "explode"}]}', "unknown `action`"),
        ('{"faults": [{"at": "train.update", "action": "error", "errno": "EFOO"}]}', "unknown `errno`"),
    ],
)
def test_a_plan_that_is_none_is_refused(plan: str, text: str, complaint: str) -> None:
    Path(plan).write_text(text)
    with pytest.raises(ConfigError, match=complaint) as refused:
        faults.activate(plan)
    assert refused.value.remedy


def test_a_missing_plan_is_refused_and_a_truncation_needs_a_file(plan: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        faults.activate(plan)
    begin(plan, Fault("train.read", "truncate"))
    with pytest.raises(ConfigError, match="no local file"):
        faults.point("train.read")


def test_a_plan_survives_its_file(plan: str) -> None:
    some = [Fault("train.read", "delay", seconds=1.5, step=3, rank=0), Fault("reader.read", "kill", epoch=1)]
    faults.write_plan(plan, some)
    assert faults.read_plan(plan) == some
    assert json.loads(Path(plan).read_text())["faults"][0]["seconds"] == 1.5
