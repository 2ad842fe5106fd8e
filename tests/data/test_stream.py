from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import ray

from metatrain.config import DataConfig, EpisodeConfig
from metatrain.data import pace
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.pace import MOST_CALLS
from metatrain.data.plan import lanes_of
from metatrain.data.reader import BatchReader, concatenate_batches
from metatrain.data.stream import TaskStream
from metatrain.errors import ConfigError, DatasetError
from tests.data.tiny_dataset import plain

DATA = DataConfig(
    episode=EpisodeConfig(cut="uniform", support_max=5, query_max=3),
    lanes=4,
    tasks_per_step=8,
    shuffle_row_groups=2,
    prefetch=3,
    readers_per_worker=2,
)


pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def undisturbed(url: str, epoch: int, data: DataConfig = DATA) -> list[Any]:
    with contextlib.closing(
        BatchReader.from_config(url, data, Split.TRAIN, ItemSet.EXISTING, data.episode, 3)
    ) as reader:
        return [plain(reader.read(epoch, step, range(data.lanes))) for step in range(reader.steps(epoch))]


@pytest.fixture(scope="module")
def stream(ray_session: None, tiny_dataset: Callable[..., str]) -> Iterator[TaskStream]:
    """One worker with two readers. Ray starts a process for each reader, so tests share it."""
    with contextlib.closing(TaskStream(tiny_dataset(), DATA, seed=3, num_cpus=0.1)) as opened:
        yield opened


def test_two_readers_make_the_plans_batches(stream: TaskStream, tiny_dataset: Callable[..., str]):
    assert len(set(stream.pids())) == 2
    waited = stream.wait_seconds
    for epoch in range(2):
        assert stream.steps(epoch) == len(undisturbed(tiny_dataset(), epoch))
        assert [plain(b) for b in stream.batches(epoch)] == undisturbed(tiny_dataset(), epoch)
    assert stream.wait_seconds > waited
    assert stream.restarts == 0


def test_two_workers_make_the_plans_batches(tiny_dataset: Callable[..., str]):
    url, data = tiny_dataset(), DATA.model_copy(update={"readers_per_worker": 1})
    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(
                contextlib.closing(TaskStream(url, data, seed=3, lanes=lanes_of(range(4), 2, rank), num_cpus=0.1))
            )
            for rank in range(2)
        ]
        parts = zip(*(s.batches(1) for s in streams), strict=True)
        assert [plain(concatenate_batches(p)) for p in parts] == undisturbed(url, 1)


def test_starts_at_any_step_and_changes_its_place(stream: TaskStream, tiny_dataset: Callable[..., str]):
    url = tiny_dataset()
    assert [plain(b) for b in stream.batches(1, 5)] == undisturbed(url, 1)[5:]
    left = stream.batches(0, 2)
    assert plain(next(left)) == undisturbed(url, 0)[2]
    left.close()
    assert [plain(b) for b in stream.batches(0, 1)] == undisturbed(url, 0)[1:]


def test_a_reader_works_ahead_while_the_trainer_computes(stream: TaskStream):
    batches = stream.batches(0)
    next(batches)
    ahead = [ref for call in stream._queue for ref in call.refs]
    assert len(ahead) == 2 * (DATA.prefetch - 1)
    done, _ = ray.wait(ahead, num_returns=len(ahead), timeout=60)
    assert len(done) == len(ahead)  # made before anybody asked for them


def test_nothing_is_read_behind_the_last_epoch(tiny_dataset: Callable[..., str]):
    one = DATA.model_copy(update={"readers_per_worker": 1})
    with contextlib.closing(TaskStream(tiny_dataset(), one, seed=3, epochs=1, num_cpus=0.1)) as stream:
        in_flight = [len(stream._queue) for _ in stream.batches(0)]
        assert max(in_flight) == DATA.prefetch - 1
        assert in_flight[-1] == 0


def test_small_steps_are_made_many_in_one_call(tiny_dataset: Callable[..., str]):
    one = DATA.model_copy(update={"readers_per_worker": 1, "prefetch": "auto"})
    url, asked = tiny_dataset(), []
    with contextlib.closing(TaskStream(url, one, seed=3, num_cpus=0.1)) as stream:
        for epoch in range(3):
            found = []
            for batch in stream.batches(epoch):
                found.append(plain(batch))
                asked += [(call.place, call.steps) for call in stream._queue if (call.place, call.steps) not in asked]
            assert found == undisturbed(url, epoch)
        # Behind the first, which is used: each call is at most twice the one before, until a whole epoch is one call.
        sizes = [steps for _, steps in sorted(asked)]
        assert sizes[:2] == [1, 2]
        assert all(after <= 2 * before for before, after in pairwise(sizes[: sizes.index(max(sizes))]))
        assert ((3, 0), len(undisturbed(url, 3))) in asked
        # At a new place it begins again with small ones.
        next(stream.batches(0, 1))
        assert (stream._queue[0].place, stream._queue[0].steps) == ((0, 2), 2)


def test_short_epochs_are_not_read_far_ahead(tiny_dataset: Callable[..., str]):
    one = DATA.model_copy(update={"readers_per_worker": 1, "prefetch": "auto", "tasks_per_step": 400})
    with contextlib.closing(TaskStream(tiny_dataset(), one, seed=3, num_cpus=0.1)) as stream:
        assert stream.steps(0) == 1
        for epoch in range(3):
            assert len(list(stream.batches(epoch))) == 1
        assert len(stream._queue) <= MOST_CALLS


def test_what_cannot_be_used_is_raised_as_itself(tiny_dataset: Callable[..., str], tmp_path):
    with pytest.raises(DatasetError, match="no manifest"):
        TaskStream(str(tmp_path / "nothing"), DATA, seed=3)
    with pytest.raises(ConfigError, match="no such feature") as caught:
        TaskStream(tiny_dataset(), DATA, seed=3, lanes=[0], features=("zap",), num_cpus=0.1)  # found in the actor
    assert type(caught.value) is ConfigError
    assert "Traceback" not in str(caught.value)
    assert caught.value.got == "zap"


@pytest.mark.timeout(180)
def test_readers_are_added_while_they_cannot_keep_up_and_batches_stay(
    tiny_dataset: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pace, "_SHARE", 1e-9)  # whatever a reader takes is too much
    url, data = tiny_dataset(), DATA.model_copy(update={"readers_per_worker": "auto", "most_readers_per_worker": 2})
    expected = [undisturbed(url, epoch, data) for epoch in range(3)]
    with contextlib.closing(TaskStream(url, data, seed=3, num_cpus=0.1)) as stream:
        assert len(stream.pids()) == 1
        deadline, round_ = time.monotonic() + 120, 0
        while (len(stream.pids()) == 1 or round_ < 3) and time.monotonic() < deadline:
            assert [plain(b) for b in stream.batches(round_ % 3)] == expected[round_ % 3]
            round_ += 1
        assert len(set(stream.pids())) == 2
        assert [plain(b) for b in stream.batches(1)] == expected[1]
        assert stream.restarts == 0


def test_large_steps_are_prefetched_less_far(tiny_dataset: Callable[..., str]):
    one = DATA.model_copy(update={"readers_per_worker": 1, "prefetch": 12, "tasks_per_step": 4})
    with contextlib.closing(TaskStream(tiny_dataset(), one, seed=3, num_cpus=0.1)) as stream:
        batches = stream.batches(0)
        next(batches)
        size = stream._pace._step_bytes
        assert size > 0
        assert sum(call.steps for call in stream._queue) > 3
        stream._pace._memory = 3 * size
        for _ in range(10):
            next(batches)
        assert sum(call.steps for call in stream._queue) <= 3
