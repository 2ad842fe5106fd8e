"""A run that is cut off anywhere and goes on ends as if nothing had happened: weights, curves, early stopping.

The worker's loop runs in this process, one rank, and reads its batches itself: no Ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from metatrain.checkpoint import committed_steps, read_marker
from metatrain.config import Config
from metatrain.errors import CheckpointError
from metatrain.train import worker
from metatrain.train.worker import Seat, train
from tests.data.tiny_dataset import write_tiny_dataset
from tests.train.runs import assert_equal_states, curve, final_state, recipe
from tests.train.without_ray import OwnStream

pytestmark = pytest.mark.timeout(300)

#: Everything that has a state: warm-up and cosine by the step, moments, Adagrad's sums, patience, a hidden-id rate.
TRAIN: dict[str, Any] = {
    "epochs": 8,
    "optimizer": {"warmup_steps": 5, "schedule": "cosine", "table": "adagrad", "table_rate": 0.5, "rate": 0.05},
    "early_stopping": {"patience": 2, "tolerance": 0.01},
    "checkpoint": {"every_steps": 4, "full_every": 3, "keep": 2},
}


class CutError(Exception):
    """Where a run is cut off."""


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "TaskStream", OwnStream)
        yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, group: None) -> tuple[Config, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("resume")
    write_tiny_dataset(str(folder / "dataset"), users=240, items=60, validation=30)
    config = recipe(str(folder / "dataset"), str(folder / "runs"), "undisturbed", TRAIN)
    return config, trained(config)


def trained(config: Config, cut_at: int | None = None) -> dict[str, Any]:
    """Trains to the end, or until step `cut_at` is told of; what the run said at last."""
    said: list[dict[str, Any]] = []

    def tell(message: dict[str, Any]) -> None:
        said.append(message)
        if cut_at is not None and message.get("step") == cut_at:
            raise CutError

    train(config, Seat(0, 1, torch.device("cpu"), tell))
    return said[-1]


def named(config: Config, name: str) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def test_what_a_checkpoint_resumes_has_a_state_to_lose(undisturbed: tuple[Config, dict[str, Any]]) -> None:
    config, end = undisturbed
    assert end["stopped_early"], "early stopping is part of what is tested"
    steps = committed_steps(config.run_url)
    assert any(read_marker(config.run_url, step).base for step in steps), "so are differential checkpoints"
    assert read_marker(config.run_url, steps[-1]).loop["waited"] == 2


def test_a_run_cut_off_again_and_again_ends_the_same(undisturbed: tuple[Config, dict[str, Any]]) -> None:
    config, end = undisturbed
    cut = named(config, "cut")
    last = end["done"]
    went_on_from = []
    for step in (3, 9, 10, last // 2, last // 2 + 5, last - 1):
        with pytest.raises(CutError):
            trained(cut, cut_at=step)
        went_on_from.append(committed_steps(cut.run_url)[-1:])
    assert any(step and read_marker_base(cut, step[0]) for step in went_on_from), "one began with a differential one"
    assert trained(cut) == end
    assert_equal_states(final_state(config), final_state(cut))
    for tag in ("learning/loss_after", "validation/loss_after", "rates/outer", "rates/tables"):
        assert curve(cut, tag) == curve(config, tag)
    newest = [read_marker(c.run_url, committed_steps(c.run_url)[-1]) for c in (config, cut)]
    assert newest[0].loop == newest[1].loop
    assert newest[0].cursor == newest[1].cursor


def read_marker_base(config: Config, step: int) -> bool:
    try:
        return read_marker(config.run_url, step).base is not None
    except CheckpointError:
        return False  # removed since


def test_how_checkpoints_are_made_may_change_between_resumes(undisturbed: tuple[Config, dict[str, Any]]) -> None:
    config, end = undisturbed
    changed = named(config, "changed")
    for step, checkpoint in ((12, {"full_every": 1}), (20, {"full_every": 5, "keep": 1}), (None, {"every_steps": 7})):
        raw = changed.model_dump()
        raw["train"]["checkpoint"] |= checkpoint
        one = Config.model_validate(raw)
        if step is None:
            assert trained(one) == end
        else:
            with pytest.raises(CutError):
                trained(one, cut_at=step)
    assert_equal_states(final_state(config), final_state(changed))


def test_a_broken_newest_checkpoint_is_refused_and_the_one_before_goes_on_when_told(
    undisturbed: tuple[Config, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    from metatrain.cli import main

    config, end = undisturbed
    broken = named(config, "broken")
    with pytest.raises(CutError):
        trained(broken, cut_at=end["done"] // 2)
    newest = committed_steps(broken.run_url)[-1]
    path = next(Path(broken.run_url, "checkpoints", f"step-{newest:08d}").glob("*.bin"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="do not match their checksum") as caught:
        trained(broken)
    assert str(path) in str(caught.value)
    command = str(caught.value).split("`metatrain ")[1].split("`")[0]
    main(command.split())
    assert newest not in committed_steps(broken.run_url)
    assert trained(broken) == end
    assert_equal_states(final_state(config), final_state(broken))
