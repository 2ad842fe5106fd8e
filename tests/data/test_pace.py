"""The number of readers follows the measured rates; what waits for the worker is bounded in bytes."""

from __future__ import annotations

import pytest

from metatrain.data.nearby import node_for
from metatrain.data.pace import CALL_BYTES, CALLS, LEAST_AHEAD, UNTIMED, Pace


def timed(pace: Pace, reading: float, training: float, calls: int = UNTIMED + CALLS) -> int:
    for _ in range(calls):
        pace.timed(2, 2 * reading, 2, 2 * training)
    return pace.wanted()


@pytest.mark.parametrize(
    ("reading", "training", "wanted"),
    [(1.0, 10.0, 1), (7.9, 10.0, 1), (8.5, 10.0, 2), (20.0, 10.0, 3), (500.0, 10.0, 4), (1.0, 0.0, 4)],
)
def test_as_many_readers_as_keep_up(reading: float, training: float, wanted: int) -> None:
    assert timed(Pace(1, 4, 1 << 20), reading, training) == wanted


def test_nothing_is_decided_before_enough_was_timed_nor_from_the_first_calls() -> None:
    pace = Pace(1, 4, 1 << 20)
    assert timed(pace, 100.0, 1.0, UNTIMED + CALLS - 1) == 1
    assert timed(pace, 100.0, 1.0, 1) == 4
    slow_start = Pace(1, 4, 1 << 20)
    timed(slow_start, 1000.0, 1.0, UNTIMED)
    assert timed(slow_start, 0.1, 1.0, CALLS) == 1


def test_after_a_change_it_is_measured_anew_and_readers_are_never_taken_away() -> None:
    pace = Pace(1, 4, 1 << 20)
    assert timed(pace, 15.0, 10.0) == 2
    pace.now(2)
    assert pace.wanted() == 2
    assert timed(pace, 7.5, 10.0) == 2  # each reads half of the lanes
    assert timed(pace, 0.1, 10.0) == 2
    assert timed(pace, 20.0, 10.0) == 4
    pace.no_more()
    assert timed(pace, 20.0, 10.0) == 2


def test_calls_that_grow_are_timed_by_their_own_steps() -> None:
    pace = Pace(1, 4, 1 << 20)
    for call in range(UNTIMED + CALLS):
        pace.timed(2 * 2**call, 5.0 * 2 * 2**call, 2**call, 10.0 * 2**call)
    assert pace.wanted() == 1


def test_steps_in_flight_are_bounded_by_their_bytes() -> None:
    pace = Pace(1, 1, 1000)
    assert pace.ahead(16) == 2  # nothing is known yet
    assert pace.ahead(1) == 1
    pace.sized(2, 100)
    assert pace.ahead(16) == 16
    pace.sized(1, 300)
    assert pace.ahead(16) == 3
    pace.sized(4, 400)  # the largest counts
    assert pace.ahead(16) == 3
    pace.sized(1, 10_000)
    assert pace.ahead(16) == 1


def test_calls_grow_to_so_many_bytes_for_each_reader() -> None:
    pace = Pace(2, 2, 100 * CALL_BYTES)
    assert (pace.ahead("auto"), pace.call("auto", 0), pace.call("auto", 4)) == (2, 1, 1)  # nothing is known yet
    pace.sized(1, CALL_BYTES // 50)
    assert pace.ahead("auto") == 200
    assert [pace.call("auto", before) for before in (0, 1, 2, 30, 64)] == [1, 2, 4, 60, 100]
    assert pace.call(12, 30) == 6  # so that two are in flight
    pace.sized(1, 3 * CALL_BYTES)  # a large step is a call of its own
    assert (pace.ahead("auto"), pace.call("auto", 100)) == (LEAST_AHEAD, 1)
    pace.sized(1, 60 * CALL_BYTES)
    assert (pace.ahead("auto"), pace.call("auto", 100)) == (1, 1)


def node(name: str, gpus: int = 0, zone: str | None = None, alive: bool = True) -> dict:
    labels = {"ray.io/availability-zone": zone, "ray.io/availability-region": zone[:2]} if zone else {}
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": 8, "GPU": gpus}, "Labels": labels}


def test_a_reader_stays_with_its_trainer_while_there_is_room() -> None:
    nodes = [node("here", gpus=1), node("other")]
    assert node_for(nodes, {"here": {"CPU": 1.0}, "other": {"CPU": 8.0}}, "here", 0.5) == "here"
    assert node_for(nodes, {"here": {"CPU": 0.2}, "other": {"CPU": 8.0}}, "here", 0.5) == "other"
    assert node_for(nodes, {}, "here", 0.5) == "here"


def test_a_reader_goes_to_a_node_without_gpus_in_its_trainers_zone() -> None:
    nodes = [
        node("here", 1, "eu-a"),
        node("a gpu", 1, "eu-a"),
        node("far", 0, "us-a"),
        node("near", 0, "eu-b"),
        node("beside", 0, "eu-a"),
        node("beside too", 0, "eu-a"),
        node("dead", 0, "eu-a", alive=False),
    ]
    free = {str(n["NodeID"]): {"CPU": 4.0} for n in nodes if n["NodeID"] != "here"}
    assert {node_for(nodes, free, "here", 0.5, turn) for turn in range(4)} == {"beside", "beside too"}
    for name in ("beside", "beside too", "near", "far", "a gpu"):
        assert node_for(nodes, free, "here", 0.5) == name
        del free[name]
    assert node_for(nodes, {"dead": {"CPU": 4.0}}, "here", 0.5) == "here"
