"""Who hangs is told from who waits for it; back-off and the end of fruitless restarts; checkpoints on request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from metatrain.config import validated
from metatrain.errors import ConfigError, TrainingError
from metatrain.train import supervise
from metatrain.train.pulse import STAGES, Asked, Pulse
from metatrain.train.run_text import settings
from metatrain.train.session import cpus_of, worker_cpus
from metatrain.train.supervise import Rank, Watch, backoff


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def rank(number: int, *, step: int = 0, stage: str = "forward", count: int = 1, idle: float = 0.0) -> Rank:
    return Rank(number, 100 + number, "node", step, stage, count, idle, 0.0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock) -> Watch:
    return Watch(2.0, clock)


def test_the_rank_that_is_waited_for_hangs_and_not_those_that_wait(watch: Watch, clock: Clock) -> None:
    watch.begin("a")
    for now in range(0, 61, 2):
        clock.now = 1000.0 + now
        watch.beat("a", rank(0, step=7, stage="forward", count=31, idle=now))
        watch.beat("a", rank(1, step=7, stage="read", count=30, idle=now))
        watch.beat("a", rank(2, step=7, stage="forward", count=31, idle=now))
        assert [r.rank for r in watch.hanging(60)] == ([1] if now >= 60 else [])
    (found,) = watch.hanging(60)
    assert found.described(clock.now) == "rank 1 (process 101), step 7, stage 'read', 60 s without progress"


def test_a_group_that_makes_progress_or_has_ended_does_not_hang(watch: Watch, clock: Clock) -> None:
    assert not watch.hanging(1)
    watch.begin("a")
    for count in range(100):
        clock.now += 50
        watch.beat("a", rank(0, count=count, idle=49.0))
        watch.beat("a", rank(1, count=count + 1, idle=80.0))  # waits for rank 0, which works
        assert not watch.hanging(60)
    clock.now += 61
    watch.leave("a", 0)
    watch.leave("a", 1)
    assert not watch.hanging(60)
    watch.beat("a", rank(0, idle=100))
    watch.over()
    assert not watch.hanging(60)


def test_a_rank_whose_threads_do_not_run_is_named_before_those_at_the_same_place(watch: Watch, clock: Clock) -> None:
    watch.begin("a")
    watch.beat("a", rank(0, count=9, stage="backward"))
    watch.beat("a", rank(1, count=9, stage="backward"))
    clock.now += supervise.SILENT_SECONDS + 41
    watch.beat("a", rank(0, count=9, stage="backward", idle=supervise.SILENT_SECONDS + 41))
    (found,) = watch.hanging(60)
    assert found.rank == 1
    assert found.described(clock.now).endswith("(no sign of life for 61 s)")
    watch.beat("a", rank(1, count=9, stage="backward", idle=supervise.SILENT_SECONDS + 41))
    assert [r.rank for r in watch.hanging(60)] == [0, 1], "which of them it is cannot be told"


def test_heartbeats_of_a_group_that_was_replaced_are_not_the_present_one_s(watch: Watch, clock: Clock) -> None:
    watch.begin("a")
    watch.beat("a", rank(1, count=3))
    watch.begin("b")
    watch.begin("b")
    watch.beat("b", rank(0, count=1))
    watch.beat("a", rank(1, count=3, idle=500))
    watch.leave("a", 0)
    clock.now += 100
    assert [r.rank for r in watch.hanging(60)] == [0]


def test_restarts_that_get_no_further_wait_longer_and_longer_and_then_end_the_run(watch: Watch) -> None:
    waits = []
    for group in range(5):
        waits.append(watch.begin(str(group)))
        assert watch.begin(str(group)) == waits[-1], "all ranks of a group wait as long"
        watch.beat(str(group), rank(0, step=0))
    assert waits == [0, 0, 2, 4, 8]
    watch.beat("4", rank(0, step=57))
    assert watch.begin("5") == 0, "it got further"
    for group in range(6, 15):
        watch.beat(str(group - 1), rank(0, step=57))
        watch.begin(str(group))
    with pytest.raises(TrainingError, match="10 restarts") as caught:
        watch.begin("15")
    assert "step 57" in str(caught.value)


def test_the_wait_is_bounded() -> None:
    assert [backoff(n, 0.0) for n in (0, 5, 99)] == [0, 0, 0]
    assert backoff(99, 2.0) == supervise.LONGEST_BACKOFF_SECONDS


def test_a_checkpoint_is_asked_of_a_live_group_alone_and_settled_when_whole_or_nobody_is_left(
    watch: Watch, clock: Clock
) -> None:
    assert watch.ask_save("a reason") == 0
    watch.begin("a")
    assert watch.beat("a", rank(0)) == (0, "")
    number = watch.ask_save("a reason")
    assert watch.beat("a", rank(0)) == (number, "a reason")
    assert number > 0
    assert not watch.settled(number)
    watch.saved(number)
    assert watch.settled(number)
    assert watch.beat("a", rank(0)) == (0, "")
    another = watch.ask_save("a reason")
    assert not watch.settled(another)
    watch.leave("a", 0)
    assert watch.settled(another)
    watch.beat("a", rank(0))
    clock.now += supervise.SILENT_SECONDS + 1
    assert watch.ask_save("a reason") == 0, "a group that does not answer makes no checkpoint"


def test_what_is_heard_of_a_group_that_ends_does_not_count_and_its_wishes_are_not_the_next_ones(watch: Watch) -> None:
    watch.begin("a")
    watch.beat("a", rank(0))
    number = watch.ask_save("a reason")
    watch.over()
    watch.beat("a", rank(0))
    assert watch.settled(number), "nobody waits for a checkpoint of it"
    assert watch.ask_save("another") == 0
    watch.begin("b")
    assert watch.beat("b", rank(0)) == (0, "")
    assert watch.ask_save("another") > number


def test_wishes_are_met_once_and_in_order() -> None:
    asked, whole = Asked(), []
    assert asked.pending == 0
    asked.ask("one", lambda: whole.append(1))
    first = asked.pending
    asked.ask("two", lambda: whole.append(2))
    asked.meet(first)
    assert whole == [1]
    assert asked.pending == 2
    assert asked.reason == "two"
    asked.ask("three")
    asked.meet(asked.pending)
    asked.meet(1)
    assert whole == [1, 2]
    assert asked.pending == 0


def test_a_pulse_knows_where_it_is_and_since_when(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("metatrain.train.pulse.time.monotonic", clock)
    pulse = Pulse()
    assert pulse.stage in STAGES
    pulse.enter("read", 5)
    clock.now += 3
    assert (pulse.step, pulse.stage, pulse.count, pulse.idle_seconds) == (5, "read", 1, 3.0)
    pulse.enter("forward")
    pulse.enter("read", 6)
    assert (pulse.step, pulse.count, pulse.idle_seconds) == (6, 3, 0.0)
    assert list(pulse.first) == ["read", "forward"]


@pytest.mark.parametrize(("written", "kept"), [(3, 3), ({"min": 1, "max": 8}, (1, 8)), ([2, 4], (2, 4))])
def test_workers_are_a_number_or_a_range(written: object, kept: object) -> None:
    config = validated({"train": {"workers": written}}, "test")
    assert config.train.workers == kept
    assert validated(config.model_dump(mode="json"), "test") == config
    least = kept[0] if isinstance(kept, tuple) else kept
    assert config.train.least_workers == least
    readers = config.data.first_readers
    assert worker_cpus(config) == 1 + 0.5 * readers
    assert cpus_of(config) >= least * worker_cpus(config)


@pytest.mark.parametrize("written", [0, {"min": 1}, {"min": 2, "max": 1}, {"min": 1, "max": 9}, {"least": 1, "max": 2}])
def test_workers_that_make_no_range_or_have_no_lanes_are_refused(written: object) -> None:
    with pytest.raises(ConfigError):
        validated({"train": {"workers": written}, "data": {"lanes": 8}}, "test")


def test_a_range_of_workers_is_a_setting_among_others() -> None:
    dataset: Any = SimpleNamespace(manifest=SimpleNamespace(name="tiny"))
    told = settings(validated({"train": {"workers": {"min": 1, "max": 4}}}, "test"), dataset)
    assert told["train.workers"] == "1 to 4"
    assert not any(name.startswith("train.workers.") for name in told)
    assert settings(validated({"train": {"workers": 4}}, "test"), dataset)["train.workers"] == 4
