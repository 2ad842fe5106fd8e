"""The judgement of steps in one process: what is bad, what is kept, when a run that only skips ends."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from metatrain import storage
from metatrain.config import TrainConfig
from metatrain.errors import TrainingError
from metatrain.train import not_finite
from metatrain.train.guard import FIRST_NORMS, KEPT, MOST_SKIPPED_IN_A_ROW, Guard
from metatrain.train.not_finite import BadStep, coordinates


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def one(value: float) -> torch.Tensor:
    return torch.tensor(value)


CPU = torch.device("cpu")


@pytest.mark.parametrize("loss", [1.0, math.nan, math.inf])
@pytest.mark.parametrize("norm", [1.0, math.nan, math.inf])
@pytest.mark.parametrize("gradient", [1.0, math.nan])
def test_all_must_be_finite(loss: float, norm: float, gradient: float) -> None:
    stop, skip = Guard(TrainConfig(), CPU), Guard(TrainConfig(not_finite="skip"), CPU)
    good = math.isfinite(loss) and math.isfinite(norm)
    stop.judge(0, one(1.0), one(1.0))
    stop.judge(1, one(loss), one(norm))
    stop.judge(2, one(math.nan), one(1.0))
    assert stop.first_bad() == (2 if good else 1)
    taken = skip.agree(7, one(loss), one(norm), [torch.ones(3), torch.tensor([1.0, gradient])])
    assert taken == (good and math.isfinite(gradient))
    assert skip.skipped.steps == (() if taken else (7,))
    assert skip.first_bad() is None


def test_an_explosion_is_measured_by_the_running_mean_of_good_steps_alone() -> None:
    guard = Guard(TrainConfig(explosion=10.0), CPU)
    guard.judge(0, one(1.0), one(100.0))  # the first norms say little
    for step in range(1, FIRST_NORMS + 200):
        guard.judge(step, one(1.0), one(2.0))
    assert guard.first_bad() is None
    mean = guard.state()["mean"]
    assert 2.0 < mean < 4.0
    guard.judge(500, one(1.0), one(9.9 * mean))
    assert guard.first_bad() is None
    guard.judge(501, one(1.0), one(2000.0))
    guard.judge(502, one(1.0), one(2000.0))
    assert guard.first_bad() == 501
    assert guard.state()["mean"] < 4.0


def test_its_state_goes_on_from_a_checkpoint() -> None:
    rules = TrainConfig(explosion=10.0, not_finite="skip")
    whole, first = Guard(rules, CPU), Guard(rules, CPU)
    norms = [float(n) for n in torch.rand(60, generator=torch.Generator().manual_seed(1)) + 0.5]
    norms[30] = 99.0
    taken = [whole.agree(step, one(1.0), one(norm), []) for step, norm in enumerate(norms)]
    assert taken.count(False) == 1
    for step in range(25):
        first.agree(step, one(1.0), one(norms[step]), [])
    second = Guard(rules, CPU, first.state())
    for step in range(25, 60):
        second.agree(step, one(1.0), one(norms[step]), [])
    assert second.state() == whole.state()
    assert second.skipped.steps == (30,)


def test_a_run_that_skips_all_ends_and_keeps_a_bounded_list() -> None:
    guard = Guard(TrainConfig(not_finite="skip"), CPU)
    for step in range(MOST_SKIPPED_IN_A_ROW - 1):
        guard.agree(step, one(math.nan), one(1.0), [])
    assert guard.first_bad() is None
    guard.agree(99, one(1.0), one(1.0), [])
    for step in range(100, 100 + MOST_SKIPPED_IN_A_ROW):
        guard.agree(step, one(math.nan), one(1.0), [])
    assert guard.first_bad() == 100 + MOST_SKIPPED_IN_A_ROW - 1
    assert guard.skipped.count == 2 * MOST_SKIPPED_IN_A_ROW - 1
    assert len(guard.skipped.steps) == min(KEPT, guard.skipped.count)


def test_a_step_of_the_run_is_found_in_its_epoch() -> None:
    steps_of = [3, 0, 4]
    assert [coordinates(total, steps_of) for total in range(7)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (2, 0),
        (2, 1),
        (2, 2),
        (2, 3),
    ]


def test_what_a_run_ended_on_is_kept_and_read_or_refused(tmp_path) -> None:
    run = str(tmp_path)
    with pytest.raises(TrainingError, match="nothing to replay"):
        not_finite.read(run)
    bad = BadStep(
        total=7, epoch=1, step=2, found=9, checkpoint=5, seed=0, lanes=4, tasks_per_step=8, world_size=2, dataset="d",
        fingerprint="f",
    )  # fmt: skip
    not_finite.keep(run, bad)
    assert not_finite.read(run) == bad
    assert f"metatrain replay {run}" in str(not_finite.as_error(run, bad))
    storage.write_atomic(not_finite.url_of(run), '{"total": "many"}')
    with pytest.raises(TrainingError, match="cannot be read"):
        not_finite.read(run)
