"""The stream of faults is what the seed says, of every kind; what grows is told from what only swings."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))  # a tool imports what lies beside it

import chaos
import chaos_plan
from chaos_resources import Sampler


def test_a_stream_is_a_function_of_its_seed_and_has_every_kind() -> None:
    there = chaos_plan.places([47] * 60, ranks=2)
    events = chaos_plan.random_events(3, 24, there)
    assert events == chaos_plan.random_events(3, 24, there)
    assert events != chaos_plan.random_events(4, 24, there)
    assert {event.kind for event in events} == set(chaos_plan.KINDS)
    steps = [event.step for event in events]
    assert steps == sorted(steps)
    assert 0 < steps[0] < steps[-1] < 0.95 * len(there)
    assert len({fault.id for event in events for fault in event.faults}) == sum(len(e.faults) for e in events)
    assert all(event.faults or event.outside for event in events)


def test_a_short_stream_has_as_many_faults_as_asked_for_and_kills_every_node() -> None:
    there = chaos_plan.places([47] * 60, ranks=2)
    for seed in range(20):
        events = chaos_plan.random_events(seed, 6, there, nodes=3)
        assert len(events) == 6
        assert sum(event.kind == "Ray node killed" for event in events) >= 2


def test_a_mild_stream_restarts_nothing() -> None:
    events = chaos_plan.random_events(0, 200, chaos_plan.places([50] * 100, ranks=1), mild=True)
    assert {event.kind for event in events} == set(chaos_plan.MILD)
    assert not any(event.ends_the_command or event.outside for event in events)
    assert not any(f.action == "kill" and f.at != "reader.read" for event in events for f in event.faults)


def test_a_reader_s_fault_is_at_the_epoch_and_step_of_its_place() -> None:
    there = chaos_plan.places([10, 12, 10], ranks=1)
    events = [e for e in chaos_plan.random_events(1, 30, there) if e.kind == "reader killed"]
    assert events
    for event in events:
        place = there[event.step]
        assert place.total == event.step
        assert (event.faults[0].epoch, event.faults[0].step) == (place.epoch, place.step)


def sampled(series: dict[str, np.ndarray]) -> Sampler:
    sampler = Sampler(0, None, None)  # pyright: ignore[reportArgumentType]
    length = len(next(iter(series.values())))
    sampler.samples = [(5.0 * n, {name: float(values[n]) for name, values in series.items()}) for n in range(length)]
    return sampler


def test_growth_is_found_and_what_swings_or_warms_up_is_not() -> None:
    draw, hour = np.random.default_rng(0), np.arange(720)
    flat = {
        "worker, MiB": 500 + 100 * np.minimum(hour / 100, 1) + draw.normal(0, 5, 720),
        "reader, files": 40.0 + 10 * (hour % 50 == 0),
    }
    assert sampled(flat).problems() == []
    grown = sampled(flat | {"driver, files": 60 + hour / 100, "store, objects": 3.0 + hour / 20})
    assert [problem.split(":")[1].split(", from")[0].strip() for problem in grown.problems()] == [
        "driver, files",
        "store, objects",
    ]
    assert grown.slopes()["driver, files"]["an hour"] == pytest.approx(7.2)
    assert "driver, files" in grown.report()


def test_a_pause_is_told_of_the_fault_before_it_though_steps_read_ahead_come_first() -> None:
    # A fault at 2.5 s: two steps are trained of what was read, then 14 s pass, and a new attempt goes on.
    done = [(1.0, 0), (2.0, 0), (3.0, 0), (3.5, 0), (17.5, 1), (18.0, 1), (30.0, 1)]
    assert chaos._pause(done, 2.5, 20.0) == (14.0, True)
    assert chaos._pause(done, 18.0, float("inf")) == (12.0, False)
    assert chaos._pause(done, 5.0, 20.0) == (12.5, True)
    assert chaos._pause(done, 31.0, 40.0) == (None, False)
