"""A run over data that overflows: it ends with a record that replays, or goes on without that step, at any size."""

from __future__ import annotations

import pytest

from metatrain.checkpoint import committed_steps, read_marker
from metatrain.config import Config
from metatrain.errors import TrainingError
from metatrain.train import not_finite
from metatrain.train.launch import launch
from metatrain.train.replay import replay
from tests.train.bad_dataset import write_bad_dataset
from tests.train.runs import assert_equal_states, curve, final_state, recipe
from tests.train.without_ray import train_on_ranks

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

KEY = "user100"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Config:
    """A run of two workers that has ended on the bad task's first step."""
    folder = tmp_path_factory.mktemp("bad")
    write_bad_dataset(str(folder / "dataset"), KEY, users=400, items=60, validation=10)
    rules = {"workers": 2, "epochs": 2, "log_every": 7, "max_failures": 2, "checkpoint": {"every_steps": 3, "keep": 50}}
    config = recipe(str(folder / "dataset"), str(folder / "runs"), "stopped", rules)
    with pytest.raises(TrainingError, match="not finite") as caught:
        launch(config)
    assert f"metatrain replay {config.run_url}" in str(caught.value)
    return config


def test_no_checkpoint_holds_a_bad_step_and_a_replay_names_the_task(stopped: Config) -> None:
    bad = not_finite.read(stopped.run_url)
    kept = committed_steps(stopped.run_url)
    assert kept
    assert max(kept) == bad.checkpoint <= bad.total < bad.found <= bad.total + 7
    assert bad.world_size == 2
    seen = replay(stopped.run_url)
    assert seen.tasks == [KEY]
    assert len(seen.lines) == min(21, bad.total - bad.checkpoint + 1)


def test_skipped_steps_are_counted_and_the_same_at_one_and_two_workers(stopped: Config) -> None:
    runs = []
    for workers in (1, 2):
        train = stopped.train.model_copy(update={"workers": workers, "not_finite": "skip", "log_every": 1})
        run = stopped.run.model_copy(update={"name": f"skipped-{workers}"})
        config = stopped.model_copy(update={"run": run, "train": train})
        train_on_ranks(config, workers)
        runs.append(config)
    one, two = runs
    last = committed_steps(one.run_url)[-1]
    skipped = read_marker(one.run_url, last).loop["guard"]
    assert skipped["skipped"] == 2  # once an epoch
    assert skipped["steps"][0] == not_finite.read(stopped.run_url).total
    assert read_marker(two.run_url, last).loop["guard"]["steps"] == skipped["steps"]
    counted = curve(one, "health/skipped_steps")
    assert [step - 1 for step, count in counted.items() if count] == skipped["steps"]
    losses = curve(one, "learning/loss_after"), curve(two, "learning/loss_after")
    assert sorted(losses[0]) == [step for step in range(1, last + 1) if step - 1 not in skipped["steps"]]
    assert all(losses[1][step] == pytest.approx(loss, rel=1e-5) for step, loss in losses[0].items())
    assert_equal_states(final_state(one), final_state(two), tolerance=1e-4)
