"""Training on Ray: the same curve at any number of workers, and what cannot work fails before it starts."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from metatrain.checkpoint import best_step, committed_steps, read_marker
from metatrain.config import Config
from metatrain.errors import CheckpointError, ConfigError, DatasetError
from metatrain.observe import projector
from metatrain.observe.copies import board_url
from metatrain.observe.layout import FINAL, support_names
from metatrain.observe.status import read_status
from metatrain.train import launch as launching
from metatrain.train.launch import check, launch
from tests.data.tiny_dataset import write_tiny_dataset
from tests.train.runs import assert_equal_states, curve, final_state, recipe, tags
from tests.train.without_ray import train_on_ranks

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("dataset"))
    write_tiny_dataset(url, users=400, items=60, validation=30)
    return url


@pytest.fixture(scope="module")
def one_worker(dataset: str, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Config:
    config = recipe(
        dataset,
        str(tmp_path_factory.mktemp("runs")),
        "one",
        {"max_steps": 100, "checkpoint": {"every_steps": 5, "keep": 50}},
    )
    launch(config)
    return config


def changed(config: Config, name: str, **train: int) -> Config:
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"name": name}),
            "train": config.train.model_copy(update=train),
        }
    )


def assert_equal_runs(one: Config, other: Config) -> None:
    for tag in ("learning/loss_after", "learning/loss_before"):
        expected, got = curve(one, tag), curve(other, tag)
        assert sorted(expected) == sorted(got) == list(range(1, 101))
        assert all(got[step] == pytest.approx(loss, rel=1e-5) for step, loss in expected.items())
    assert_equal_states(final_state(one), final_state(other), tolerance=1e-4)


@pytest.mark.timeout(300)
def test_one_and_two_workers_give_the_same_curve_over_100_steps(one_worker: Config) -> None:
    two = changed(one_worker, "two", workers=2)
    launch(two)
    assert read_marker(two.run_url, 100).world_size == 2
    assert_equal_runs(one_worker, two)


@pytest.mark.timeout(300)
def test_a_run_goes_on_at_another_number_of_workers_as_if_never_stopped(one_worker: Config) -> None:
    train_on_ranks(changed(one_worker, "grown", workers=2, max_steps=40), 2)
    grown = changed(one_worker, "grown", workers=1)
    launch(grown)
    assert read_marker(grown.run_url, 40).world_size == 2
    assert read_marker(grown.run_url, 100).world_size == 1
    restarts = curve(grown, "speed/restarts")
    assert {step: restarts[step] for step in (40, 41)} == {40: 0.0, 41: 1.0}
    assert_equal_runs(one_worker, grown)


@pytest.mark.timeout(300)
def test_training_learns_validates_and_keeps_the_checkpoints_it_should(one_worker: Config) -> None:
    losses = list(curve(one_worker, "learning/loss_after").values())
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    validation = curve(one_worker, "validation/loss_after")
    assert len(validation) == 4  # once an epoch, and at the last step
    assert max(validation) == 100
    best = min(validation, key=validation.__getitem__)
    steps = committed_steps(one_worker.run_url)
    assert best_step(one_worker.run_url) == best
    # Every 5 steps or, where an epoch's end came first, there; and never a step twice.
    assert all(later - earlier <= 5 for earlier, later in itertools.pairwise([0, *steps]))
    assert read_marker(one_worker.run_url, best).metrics["validation_loss"] == pytest.approx(validation[best], rel=1e-6)


def test_a_run_leaves_a_status_and_a_board_that_say_what_it_was(one_worker: Config) -> None:
    status = read_status(one_worker.run_url)
    assert (status.state, status.step, status.steps, status.workers) == ("finished", 100, 100, 1)
    assert (status.checkpoint_step, status.restarts, status.faults) == (100, 0, ())
    assert status.best_loss == pytest.approx(min(curve(one_worker, "validation/loss_after").values()), rel=1e-6)
    for tag in FINAL:
        assert list(curve(one_worker, tag)) == [100], tag
    assert curve(one_worker, "final/validation_loss")[100] == pytest.approx(status.best_loss, rel=1e-6)
    assert set(curve(one_worker, "speed/restarts").values()) == {0.0}
    assert {f"gain_by_support/{name}" for name in support_names()} > {
        tag for tag in tags(one_worker) if tag.startswith("gain_by_support/")
    }
    assert {"health/clipped_share", "health/row_norm", "speed/memory_gib", "speed/checkpoint_seconds"} <= tags(
        one_worker
    )
    board = Path(board_url(one_worker.run_url))
    assert [path.name for path in board.iterdir() if path.is_dir()] == [], "a folder would be another run"
    assert {projector.CONFIG, projector.VECTORS, projector.METADATA} <= {path.name for path in board.iterdir()}


def test_a_finished_run_starts_no_worker(one_worker: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_fit", lambda config: pytest.fail("workers were started"))
    launch(one_worker)
    assert not launching.finished(changed(one_worker, "one", max_steps=101))
    assert not launching.finished(changed(one_worker, "another"))


@pytest.mark.timeout(300)
def test_a_checkpoint_of_another_model_is_refused_before_any_worker_starts(one_worker: Config) -> None:
    other = one_worker.model_copy(update={"model": one_worker.model.model_copy(update={"hidden": (8,)})})
    with pytest.raises(CheckpointError, match="another model") as caught:
        check(other)
    assert "model.hidden" in str(caught.value)


def test_a_missing_dataset_a_truncated_shard_and_an_unknown_feature_are_refused(tmp_path: Path) -> None:
    runs = str(tmp_path / "runs")
    with pytest.raises(DatasetError, match="no manifest"):
        check(recipe(str(tmp_path / "none"), runs, "x"))
    url = str(tmp_path / "dataset")
    manifest = write_tiny_dataset(url)
    check(recipe(url, runs, "x"))
    with pytest.raises(ConfigError, match="no feature of this name") as unknown:
        check(recipe(url, runs, "x", model={"features": ["item", "color"]}))
    assert "Did you mean 'colour'?" in str(unknown.value)
    with pytest.raises(ConfigError, match="matches no parameter"):
        check(recipe(url, runs, "x", meta={"adapt": ["nothing.*"]}))
    shard = Path(url) / manifest.shards[0].path
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DatasetError) as caught:
        check(recipe(url, runs, "x"))
    assert str(shard) in str(caught.value)
