"""A step whose loss or gradient is not finite: found on all ranks, or left out as if it had not been."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gradients import whole
from meta_reference import made_up_batch, part_of, schema
from ranks import run_ranks

from metatrain.config import Config, TableConfig
from metatrain.model.build import build_model
from metatrain.model.sharding import distribute
from metatrain.model.table_plan import Workers, plan_tables
from metatrain.train import guard as guarding
from metatrain.train.guard import Guard
from metatrain.train.outer import DenseOptimizer
from metatrain.train.step import OuterLoop

STEPS, BAD = 6, 2


def config_of(**train: Any) -> Config:
    rates = {
        "rate": 0.05,
        "table_rate": 0.2,
        "table_decay": 0.01,
        "warmup_steps": 1,
        "table": train.pop("table", "sgd"),
    }
    return Config.model_validate(
        {"model": {"hidden": (6,), "activation": "tanh"}, "train": {**train, "optimizer": rates}}
    )


def spoiled(batch: Any, how: str) -> Any:
    """A batch with one label that spoils its last task: of six tasks, the second rank's."""
    labels = np.asarray(batch.labels).copy()
    labels[-1] = {"nan": np.nan, "inf": np.inf, "huge": 1e4}[how]
    return replace(batch, labels=labels)


def trained_on_rank(
    rank: int, world_size: int, train: dict[str, Any], how: str | None, leave_out: bool = False, ahead: bool = True
) -> tuple[dict[str, torch.Tensor], int | None, list[int], dict[str, Any]]:
    sharding = {"*": TableConfig.model_validate({"sharding": train.get("sharding", "row_wise")})}
    config = config_of(**{name: value for name, value in train.items() if name != "sharding"})
    model, table = build_model(schema(), config, tables_device="meta"), config.train.optimizer.table
    plan = plan_tables(model.tables.specs, sharding, table, Workers(world_size, world_size, device="cpu"))
    distributed = distribute(model, config.train.optimizer, plan=plan)
    optimizer = DenseOptimizer(distributed.dense_parameters(), config.train.optimizer)
    guard = Guard(config.train, torch.device("cpu"))
    loop = OuterLoop(distributed, optimizer, config, STEPS, world_size, guard=guard)
    parts = []
    for step in range(STEPS):
        batch = made_up_batch(6, step, least_support=1)
        if step == BAD and how:
            batch = spoiled(batch, how)
        mine = range(6) if world_size == 1 else (range(4), range(4, 6))[rank]
        parts.append(part_of(batch, mine).tensors())
    steps = [step for step in range(STEPS) if not (leave_out and step == BAD)]
    for step in steps:
        loop.step(parts[step], step, parts[step + 1] if ahead and step + 1 in steps else None)
    state = distributed.state_dict() | optimizer.state_dict()
    plain = {n: whole(v.detach()) for n, v in state.items()}
    return plain, guard.first_bad(), list(guard.skipped.steps), guard.state()


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.isfinite(value).all(), name
        assert value.shape == other[name].shape, name
        # A rank holds nothing of a table that lies wholly on another.
        if value.numel():
            assert (value - other[name]).abs().max() <= tolerance * value.abs().max(), name


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("table", "how", "sharding"),
    [
        ("sgd", "nan", "row_wise"),
        ("adagrad", "nan", "row_wise"),
        ("rowwise_adagrad", "inf", "row_wise"),
        ("adagrad", "nan", "data_parallel"),
        ("rowwise_adagrad", "nan", "table_wise"),
    ],
)
def test_a_skipped_step_leaves_no_trace(world_size: int, table: str, how: str, sharding: str) -> None:
    rules = {"not_finite": "skip", "table": table, "sharding": sharding}
    skipped = run_ranks(trained_on_rank, world_size, rules, how)
    without = run_ranks(trained_on_rank, world_size, rules, None, True)
    for (one, bad, steps, _), (other, *_) in zip(skipped, without, strict=True):
        assert steps == [BAD]
        assert bad is None
        assert_same(one, other)


def test_a_skipped_step_is_the_same_at_one_and_two_ranks() -> None:
    (one, *_), (two, *_) = (run_ranks(trained_on_rank, n, {"not_finite": "skip"}, "nan")[0] for n in (1, 2))
    assert_same(one, two, 1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
def test_looking_at_every_step_before_it_is_taken_changes_no_good_step(world_size: int) -> None:
    skip, stop = (run_ranks(trained_on_rank, world_size, {"not_finite": how}, None) for how in ("skip", "stop"))
    for (one, _, steps, _), (other, bad, *_) in zip(skip, stop, strict=True):
        assert steps == []
        assert bad is None
        assert_same(one, other)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("how", ["nan", "inf"])
def test_the_first_bad_step_is_known_on_all_ranks_later_and_not_the_ones_it_spoils(world_size: int, how: str) -> None:
    for state, bad, *_ in run_ranks(trained_on_rank, world_size, {"not_finite": "stop"}, how):
        assert bad == BAD
        assert not all(torch.isfinite(value).all() for value in state.values())


def exploded_on_rank(rank: int, world_size: int, how: str) -> tuple[Any, ...]:
    guarding.FIRST_NORMS = 2
    return trained_on_rank(rank, world_size, {"not_finite": how, "explosion": 50.0}, "huge")


def test_an_exploding_gradient_is_found_or_skipped_equally_at_one_and_two_ranks() -> None:
    for world_size in (1, 2):
        for _, bad, *_ in run_ranks(exploded_on_rank, world_size, "stop"):
            assert bad == BAD
    states = []
    for world_size in (1, 2):
        (state, _, steps, kept), *_ = run_ranks(exploded_on_rank, world_size, "skip")
        assert steps == [BAD]
        assert kept["count"] == STEPS - 1
        states.append((state, kept["mean"]))
    assert_same(states[0][0], states[1][0], 1e-5)
    assert states[0][1] == pytest.approx(states[1][1], rel=1e-5)
