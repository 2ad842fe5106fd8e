"""How a comparison spends its time and takes its failures, with trainings and scorings that are made up."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from made_up import draw, run

from metatrain.compare import runs as module
from metatrain.compare.entries import Comparison, Entry
from metatrain.compare.runs import Clock, OutOfTimeError, Runs, train_until
from metatrain.config import Config, DataConfig, RunConfig, TrainConfig
from metatrain.errors import ConfigError, TrainingError
from metatrain.train.worker import Seat
from tests.data.tiny_dataset import write_tiny_dataset


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Comparisons over a tiny dataset; what would be trained is noted, and takes no time."""
    write_tiny_dataset(str(tmp_path / "data"))
    trained: list[str] = []
    done: set[str] = set()

    def launch(config: Config, address, work) -> None:
        trained.append(config.run_url)
        if "broken" in config.run.name:
            raise TrainingError("The loss is not finite.")
        if "slow" in config.run.name:
            raise OutOfTimeError("The budget was spent at step 3 of 9.")
        assert config.train.seed == int(config.run.name[-1])
        done.add(config.run_url)

    monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(module, "check", lambda config: None)
    monkeypatch.setattr(module, "check_resources", lambda config, cluster: None)
    monkeypatch.setattr(module, "finished", lambda config: config.run_url in done)
    monkeypatch.setattr(Runs, "_enter", lambda self, session: None)
    monkeypatch.setattr(Runs, "_scores", lambda self, url, name: run("any", 0, draw(1, 1), draw(1, 2)).scores)

    def compare(*names: str, minutes: float = 0.0, seeds: tuple[int, ...] = (0,), report: bool = False) -> list:
        config = Config(data=DataConfig(dataset=str(tmp_path / "data")))
        error = ConfigError("Unknown configuration key.")
        entries = [Entry(n, {}, None, None, error) if n == "unusable" else Entry(n, {}, config) for n in names]
        comparison = Comparison("c", tuple(entries), config, seeds, minutes)
        return list(Runs(comparison, str(tmp_path / "out"), None, report).results())

    compare.trained = trained
    return compare


def test_the_first_seed_of_all_comes_before_the_second_of_any(made_up):
    found = made_up("a", "b", seeds=(0, 1))
    assert [(r.entry.name, r.seed, r.status) for r in found] == [
        (name, seed, "scored") for seed in (0, 1) for name in ("a", "b")
    ]
    assert all(r.train_seconds is not None and r.train_seconds >= 0 for r in found)
    assert len(made_up.trained) == 4


def test_a_failing_entry_is_told_and_ends_no_other(made_up):
    found = made_up("unusable", "broken", "a")
    assert [(r.status, r.why) for r in found] == [
        ("failed", "Unknown configuration key."),
        ("failed", "The loss is not finite."),
        ("scored", ""),
    ]


def test_what_does_not_fit_the_budget_is_listed_and_goes_on_the_next_time(made_up, tmp_path: Path):
    assert [r.status for r in made_up("a", minutes=1)] == ["scored"]
    found = made_up("a", "slow", "b", minutes=1e-9)
    # What is trained is scored whatever the time; nothing else begins.
    assert [(r.entry.name, r.status) for r in found] == [("a", "scored"), ("slow", "not started"), ("b", "not started")]
    assert "budget of 1e-09 minutes" in found[1].why
    cut = made_up("slow", "b", minutes=5)
    assert [(r.status, r.why) for r in cut] == [("cut off", "The budget was spent at step 3 of 9."), ("scored", "")]
    seconds = tmp_path / "out" / "runs" / "slow-seed0" / "comparison.json"
    seconds.write_text(json.dumps({"train_seconds": 100.0}))
    assert made_up("slow", minutes=5)[0].train_seconds == pytest.approx(100.0, abs=5)
    assert made_up("slow", minutes=5)[0].train_seconds > 100.0


def test_a_report_trains_nothing(made_up):
    made_up("a")
    before = len(made_up.trained)
    assert [(r.entry.name, r.status) for r in made_up("a", "b", report=True)] == [("a", "scored"), ("b", "not trained")]
    assert len(made_up.trained) == before


def test_a_training_ends_at_the_deadline_but_for_its_last_step(monkeypatch: pytest.MonkeyPatch):
    told: list[dict] = []
    seat = Seat(0, 1, torch.device("cpu"), told.append)

    def train(config: Config, seat: Seat) -> None:
        seat.tell({"say": "no step"})
        for step in steps:
            seat.tell({"step": step, "steps": 9})

    monkeypatch.setattr(module, "train", train)
    config = Config(run=RunConfig(name="r"), train=TrainConfig())
    steps = [3, 6, 9]
    train_until(config, seat, None)
    train_until(config, seat, time.time() + 60)
    assert len(told) == 8
    steps = [9]
    train_until(config, seat, time.time() - 1)
    steps = [3, 6]
    with pytest.raises(OutOfTimeError, match="step 3 of 9"):
        train_until(config, seat, time.time() - 1)


def test_the_clock():
    assert not Clock(0).spent
    assert Clock(0).deadline is None
    assert not Clock(1).spent
    assert Clock(1e-9).spent
