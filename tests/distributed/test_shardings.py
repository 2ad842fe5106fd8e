"""Whatever the sharding, tables, gradients and resumed runs are the same: those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpointed import Small
from gradients import TABLE_RATE, assert_equal_gradients, sharded_gradients, share, tables_of, whole
from meta_reference import made_up_batch, part_of, schema
from ranks import run_ranks
from test_meta_gradient import Setting, model_of, reference_of
from test_tables_sharded import SPECS, Weighted, states_of, trained_by_hand

from metatrain.checkpoint import read_tensors
from metatrain.config import Config, OptimizerConfig, TableConfig
from metatrain.errors import CheckpointError
from metatrain.model.build import build_model
from metatrain.model.choices import TableSpec
from metatrain.model.sharding import Distributed, distribute
from metatrain.model.table_plan import TablesPlan, Workers, plan_tables

SHARDINGS: dict[str, dict[str, str]] = {
    "table_wise": {"*": "table_wise"},
    "column_wise": {"*": "column_wise"},
    "data_parallel": {"*": "data_parallel"},
    "auto": {"*": "auto"},
    # In one collection, tables by rows, on one rank and replicated; in the other, columns.
    "mixed": {"item": "row_wise", "one": "table_wise", "wide": "data_parallel"},
}
#: Of the made-up batches' tables.
MIXED = {"item": "row_wise", "genre": "data_parallel", "age": "table_wise", "hour": "column_wise", "only": "row_wise"}


def plan_of(specs: tuple[TableSpec, ...], shardings: dict[str, str], optimizer: str, world_size: int) -> TablesPlan:
    settings = {name: TableConfig.model_validate({"sharding": kind}) for name, kind in shardings.items()}
    return plan_tables(specs, settings, optimizer, Workers(world_size, world_size))


def trained_on_rank(rank: int, world_size: int) -> dict[str, Any]:
    results = {}
    for name, shardings in SHARDINGS.items():
        for kind in ("sgd", "adagrad", "rowwise_adagrad"):
            if name == "column_wise" and kind == "rowwise_adagrad":  # refused by the configuration
                continue
            plan = plan_of(SPECS, shardings, kind, world_size)
            results[f"{name} {kind}"] = states_of(rank, world_size, kind, True, plan)
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.timeout(180)
def test_every_sharding_updates_its_tables_as_one_process_would(world_size: int) -> None:
    ranks = run_ranks(trained_on_rank, world_size, seconds=150)
    for name in ranks[0]:
        expected = trained_by_hand(name.split()[1])
        for rank in ranks:
            for found, reference in zip(rank[name], expected, strict=True):
                for spec in SPECS:
                    table = found[f"tables.collections.width_{spec.width}.embeddings.{spec.name}.weight"]
                    torch.testing.assert_close(table.double(), reference[spec.name], rtol=2e-6, atol=2e-6, msg=name)


GRADIENTS = [
    Setting(2, True, True, 0, decay=0.01),
    Setting(2, False, False, 3, decay=0.01),
    Setting(1, True, True, 1),  # the last rank has no task in this one
]


def gradients_on_rank(rank: int, world_size: int, shardings: dict[str, str]) -> list[dict[str, Any]]:
    found = []
    for number, setting in enumerate(GRADIENTS):
        model, batch = model_of(setting, "meta"), setting.batch()
        optimizer = setting.config.train.optimizer
        plan = plan_of(model.tables.specs, shardings, optimizer.table, world_size)
        mine = share(batch.size, number, rank, world_size)
        found.append(sharded_gradients(model, optimizer, batch, mine, world_size, plan))
    return found


@pytest.mark.parametrize(
    "shardings",
    [{"*": "table_wise"}, {"*": "column_wise"}, {"*": "data_parallel"}, MIXED],
    ids=["table_wise", "column_wise", "data_parallel", "mixed"],
)
def test_the_meta_gradient_of_every_sharding_is_the_reference(shardings: dict[str, str]) -> None:
    for rank in run_ranks(gradients_on_rank, 2, shardings):
        for setting, found in zip(GRADIENTS, rank, strict=True):
            assert_equal_gradients(found["gradients"], reference_of(setting)[0])


def held_on_rank(rank: int, world_size: int, shardings: dict[str, str]) -> list[dict[str, torch.Tensor]]:
    """Tables before, after a step that is not taken, and after one that is."""
    model = model_of(GRADIENTS[0], "meta")
    optimizer = GRADIENTS[0].config.train.optimizer
    distributed = distribute(model, optimizer, plan=plan_of(model.tables.specs, shardings, optimizer.table, world_size))
    states = [tables_of(distributed.state_dict())]
    batch = GRADIENTS[0].batch()
    part = part_of(batch, share(batch.size, 0, rank, world_size)).tensors()
    for taken in (False, True):
        output = distributed.module(part, 0, float(batch.size), world_size, hold=True)
        output.loss.backward()
        output.held.pass_on(taken)
        distributed.update_replicated()
        states.append(tables_of(distributed.state_dict()))
    return states


@pytest.mark.parametrize("shardings", [{"*": "data_parallel"}, MIXED], ids=["data_parallel", "mixed"])
def test_a_step_that_is_left_out_changes_no_table(shardings: dict[str, str]) -> None:
    for before, left_out, taken in run_ranks(held_on_rank, 2, shardings):
        for name, table in before.items():
            assert torch.equal(table, left_out[name]), name
            found = (table.double() - taken[name].double()) / TABLE_RATE
            reference = reference_of(GRADIENTS[0])[0][name]
            torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-6)


CONFIG = Config.model_validate(
    {"model": {"hidden": (4,)}, "train": {"optimizer": {"table": "adagrad", "table_rate": 0.1, "table_decay": 0.05}}}
)
# Saved under one, gone on with under the next.
JOURNEY: list[tuple[int, dict[str, str]]] = [
    (2, {"*": "row_wise"}),
    (3, {"*": "column_wise"}),
    (1, {"*": "table_wise"}),
    (2, {"*": "data_parallel"}),
    (3, MIXED),
    (2, {"*": "auto"}),
]


def steps(distributed: Distributed, rank: int, world_size: int, seeds: tuple[int, ...]) -> list[float]:
    """Global losses of some training steps."""
    losses = []
    for seed in seeds:
        batch = made_up_batch(6, seed)
        edges = [0, 4, *[6] * world_size] if world_size > 1 else [0, 6]
        part = part_of(batch, range(edges[rank], edges[rank + 1])).tensors()
        output = distributed.module(part, seed, 6.0, world_size)
        output.loss.backward()
        distributed.update_replicated()
        after = output.after.detach().clone()
        dist.all_reduce(after)
        losses.append(float(after))
    return losses


def leg_on_rank(rank: int, world_size: int, folder: str, leg: int, alone: bool) -> list[float]:
    """Loads what the leg before saved, trains two steps, saves."""
    model = build_model(schema(), CONFIG, tables_device="meta")
    plan = None if alone else plan_of(model.tables.specs, JOURNEY[leg][1], "adagrad", world_size)
    distributed = distribute(model, CONFIG.train.optimizer, plan=plan)
    if leg:
        state = distributed.state_dict()
        dcp.load(state, checkpoint_id=f"{folder}/{leg - 1}")
        distributed.load_state_dict(state)
    losses = steps(distributed, rank, world_size, (2 * leg, 2 * leg + 1))
    dcp.save(distributed.state_dict(), checkpoint_id=f"{folder}/{leg}")
    return losses


@pytest.mark.timeout(240)
def test_a_run_goes_on_under_other_shardings_and_sizes(tmp_path: Path) -> None:
    for leg, (world_size, _) in enumerate(JOURNEY):
        found = run_ranks(leg_on_rank, world_size, str(tmp_path / "journey"), leg, False)[0]
        expected = run_ranks(leg_on_rank, 1, str(tmp_path / "alone"), leg, True)[0]
        assert found == pytest.approx(expected, rel=1e-5), JOURNEY[leg]


def whole_state_on_rank(rank: int, world_size: int, shardings: dict[str, str]) -> bool:
    """Whether a whole, unsharded state loads into each rank's blocks."""
    plan = plan_of(SPECS, shardings, "sgd", world_size)
    distributed = distribute(Weighted(True, "meta"), OptimizerConfig(table="sgd"), plan=plan)
    numbers = torch.arange(200.0)
    state = {n: numbers[: v.numel()].view(v.shape) + 1 for n, v in distributed.state_dict().items()}
    distributed.load_state_dict(state)
    return all(torch.equal(whole(value), state[name]) for name, value in distributed.state_dict().items())


@pytest.mark.parametrize("name", ["table_wise", "column_wise", "data_parallel", "mixed"])
def test_a_whole_state_loads_into_every_sharding(name: str) -> None:
    assert all(run_ranks(whole_state_on_rank, 2, SHARDINGS[name]))


def placed_otherwise_on_rank(rank: int, world_size: int) -> bool:
    """Whether the state that was refused has changed nothing."""
    rows, columns = (
        distribute(
            Weighted(True, "meta"), OptimizerConfig(table="sgd"), plan=plan_of(SPECS, {"*": kind}, "sgd", world_size)
        )
        for kind in ("row_wise", "column_wise")
    )
    with pytest.raises(CheckpointError, match=r"Shard\(dim=0\) on ranks \[0\], not Shard\(dim=0\) on ranks \[0, 1\]"):
        rows.load_state_dict({name: value + 1 for name, value in columns.state_dict().items()})
    untouched = distribute(Weighted(True, "meta"), OptimizerConfig(table="sgd")).state_dict()
    return all(torch.equal(whole(value), whole(untouched[name])) for name, value in rows.state_dict().items())


def test_a_state_that_is_placed_otherwise_is_refused() -> None:
    assert all(run_ranks(placed_otherwise_on_rank, 2))


def saved_on_rank(rank: int, world_size: int, run: str, shardings: dict[str, str]) -> list[dict[str, torch.Tensor]]:
    """A full checkpoint and a differential one; the states."""
    small = Small(rank, world_size, run, "adagrad", shardings, full_every=9)
    states = []
    for tasks in (6, 1):
        small.train(1, tasks)
        small.save()
        states.append(small.whole())
    return states


def loaded_on_rank(rank: int, world_size: int, run: str, shardings: dict[str, str]) -> dict[str, torch.Tensor]:
    small = Small(rank, world_size, run, "adagrad", shardings, full_every=9)
    small.load(2)
    return small.whole()


@pytest.mark.parametrize(
    "shardings",
    [{"*": "table_wise"}, {"*": "column_wise"}, {"*": "data_parallel"}, MIXED],
    ids=["table_wise", "column_wise", "data_parallel", "mixed"],
)
@pytest.mark.timeout(180)
def test_full_and_differential_checkpoints_of_every_sharding_load_under_another(
    tmp_path: Path, shardings: dict[str, str]
) -> None:
    run = str(tmp_path / "run")
    states = run_ranks(saved_on_rank, 2, run, shardings)[0]
    for step, state in enumerate(states, start=1):
        found = read_tensors(run, step)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state), step
    for other in ({}, MIXED):
        for state in run_ranks(loaded_on_rank, 3, run, other):
            assert all(torch.equal(state[name], states[1][name]) for name in states[1])
