"""Sharded tables at 1, 2 and 3 ranks: rows, updates, rates and state are those of one process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gradients import whole
from meta_reference import made_up_batch, part_of, schema
from ranks import RankError, run_ranks
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding
from torchrec.distributed.embedding import ShardedEmbeddingCollection

from metatrain.config import Config, OptimizerConfig
from metatrain.model import bags, sharding
from metatrain.model.build import build_model
from metatrain.model.choices import TableSpec
from metatrain.model.sharding import OPTIMIZER_PREFIX, distribute
from metatrain.model.table_plan import TablesPlan
from metatrain.model.tables import Tables
from metatrain.observe.laps import Laps

# 11 rows divide by neither 2 nor 3; the table of one row leaves ranks without any.
SPECS = (
    TableSpec("item", 11, 4, ("item", "other_item")),
    TableSpec("one", 1, 4, ("one",)),
    TableSpec("wide", 5, 8, ("wide",)),
)
# Ids of the global batch, and which rank asks for which of them: unequal numbers, repeats across ranks, none at all.
STEPS = (
    {"item": [0, 3, 3, 10, 7, 2], "other_item": [3, 9], "one": [0, 0], "wide": [4, 1, 1]},
    {"item": [10, 1, 3, 3, 3, 8], "other_item": [0, 5], "one": [0, 0], "wide": [2, 2, 4]},
    {"item": [6, 6, 4, 10, 0, 2], "other_item": [1, 1], "one": [0, 0], "wide": [0, 3, 4]},
)
WHOLE = {"item": 6, "other_item": 2, "one": 2, "wide": 3}
RATES = (0.5, 0.0, 0.25)
KINDS = ("sgd", "adagrad", "rowwise_adagrad")


class Weighted(nn.Module):
    """A loss that is linear in some rows and square in others, with a dense parameter beside the tables."""

    def __init__(self, dedup: bool, device: str) -> None:
        super().__init__()
        self.tables = Tables(SPECS, dedup=dedup, device=device, seed=5, scale=0.5)
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, ids: dict[str, Tensor], share: float) -> Tensor:
        rows = self.tables(ids)
        parts = [(r * torch.arange(1.0, r.shape[1] + 1)).sum() + r.square().sum() for r in rows.values()]
        return self.gain * torch.stack(parts).sum() * share


def ids_of_rank(step: int, rank: int, world_size: int) -> dict[str, Tensor]:
    """Rank 0 has most of the ids; in the second step all of them, so that the others ask for nothing."""
    found = {}
    for name, ids in STEPS[step].items():
        whole = torch.tensor(ids)
        edges = [0, (len(ids) + 1) // 2, *[len(ids)] * world_size] if step != 1 else [0, *[len(ids)] * world_size]
        found[name] = whole if world_size == 1 else whole[edges[rank] : edges[rank + 1]]
    return found


def trained_on_rank(rank: int, world_size: int) -> dict[str, Any]:
    """For every optimizer, with and without dedup: see `states_of`."""
    results: dict[str, Any] = {}
    for kind in KINDS:
        for dedup in (True, False):
            results[f"{kind} {dedup}"] = states_of(rank, world_size, kind, dedup)
    return results


def states_of(
    rank: int, world_size: int, kind: str, dedup: bool, plan: TablesPlan | None = None
) -> list[dict[str, Tensor]]:
    """The state with initial tables, and after each of three steps."""
    distributed = distribute(Weighted(dedup, "meta"), OptimizerConfig(table=kind, table_rate=9.0), plan=plan)
    states = [{name: whole(value) for name, value in distributed.state_dict().items()}]
    for step, rate in enumerate(RATES):
        distributed.set_table_rate(rate)
        # As in training: each rank's loss is scaled so that the mean over ranks is the global one.
        distributed.module(ids_of_rank(step, rank, world_size), world_size / 7.0).backward()
        distributed.update_replicated()
        states.append({name: whole(value) for name, value in distributed.state_dict().items()})
    return states


def trained_by_hand(kind: str) -> list[dict[str, Tensor]]:
    """The same in one process, float64, the optimizers written out (FBGEMM's: eps 1e-8, no decay)."""
    module = Weighted(False, "cpu").double()
    # EmbeddingCollection gives float32 rows whatever its weights; look the rows up directly.
    weights = {name.split(".")[-2]: p for name, p in module.tables.named_parameters()}
    sums: dict[str, Any] = dict.fromkeys(weights, 0.0)
    states = [{n: w.detach().clone() for n, w in weights.items()}]
    for step, rate in enumerate(RATES):
        loss = torch.zeros((), dtype=torch.float64)
        for spec in SPECS:
            for feature in spec.features:
                for i in STEPS[step][feature]:
                    row = weights[spec.name][i]
                    loss = loss + 2.0 / 7.0 * ((row * torch.arange(1.0, spec.width + 1)).sum() + row.square().sum())
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        with torch.no_grad():
            for name, g in gradients.items():
                if kind == "sgd":
                    weights[name] -= rate * g
                    continue
                sums[name] = sums[name] + (g.square().mean(1, keepdim=True) if "rowwise" in kind else g.square())
                weights[name] -= rate * g / (sums[name].sqrt() + 1e-8)
        states.append({n: w.detach().clone() for n, w in weights.items()})
    return states


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda n: f"{n}ranks")
def trained(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(trained_on_rank, request.param)


@pytest.mark.parametrize("dedup", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_updates_at_the_rates_that_were_set(trained: list[dict[str, Any]], kind: str, dedup: bool) -> None:
    expected = trained_by_hand(kind)
    for rank in trained:
        for found, reference in zip(rank[f"{kind} {dedup}"], expected, strict=True):
            for spec in SPECS:
                table = found[f"tables.collections.width_{spec.width}.embeddings.{spec.name}.weight"]
                torch.testing.assert_close(table.double(), reference[spec.name], rtol=2e-6, atol=2e-6)
    # The second rate is 0: nothing moves. The first is not: something does.
    weights = [state["tables.collections.width_4.embeddings.item.weight"] for state in trained[0][f"{kind} {dedup}"]]
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], weights[1])


def as_bags_and_as_rows(rank: int, world_size: int) -> dict[str, Any]:
    """What is trained with the operator for bags, and with TorchRec's own choice."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        found[kind] = [states_of(rank, world_size, kind, dedup=False)]
        with mock.patch.object(sharding, "look_up_as_bags"):
            found[kind].append(states_of(rank, world_size, kind, dedup=False))
        model = distribute(Weighted(False, "meta"), OptimizerConfig(table=kind)).model
        lookups = [of for m in model.modules() if isinstance(m, ShardedEmbeddingCollection) for of in m._lookups]
        kernels = [k for lookup in lookups for k in lookup.modules() if isinstance(k, BatchedFusedEmbedding)]
        found[f"{kind} as bags"] = [isinstance(kernel.forward, bags._Bags) for kernel in kernels]
    return found


def test_rows_looked_up_as_bags_are_trained_as_torchrec_trains_them() -> None:
    first, _ = run_ranks(as_bags_and_as_rows, 2)
    for kind in KINDS:
        assert first[f"{kind} as bags"] == [True, True]  # a kernel a width
        for bag, row in zip(*first[kind], strict=True):
            assert bag.keys() == row.keys()
            for name, value in bag.items():
                if kind == "rowwise_adagrad":  # which adds up a row's squares in another order
                    torch.testing.assert_close(value, row[name], rtol=1e-6, atol=1e-6)
                else:
                    assert torch.equal(value, row[name]), (kind, name)


def test_initial_rows_are_those_of_one_process(trained: list[dict[str, Any]]) -> None:
    alone = Weighted(True, "cpu").state_dict()
    for rank in trained:
        start = rank["sgd True"][0]
        for name, value in alone.items():
            assert torch.equal(start[name], value)


def configuration(table: str = "rowwise_adagrad") -> Config:
    return Config.model_validate(
        {"model": {"hidden": (4,)}, "train": {"optimizer": {"table": table, "table_rate": 0.1, "table_decay": 0.05}}}
    )


def step_losses(distributed: Any, rank: int, world_size: int, seeds: tuple[int, ...]) -> list[float]:
    """Global losses of some training steps."""
    dense = torch.optim.SGD(distributed.dense_parameters().values(), lr=1e-3)
    losses = []
    for seed in seeds:
        batch = made_up_batch(6, seed)
        edges = [0, 4, *[6] * world_size] if world_size > 1 else [0, 6]
        part = part_of(batch, range(edges[rank], edges[rank + 1])).tensors()
        dense.zero_grad()
        output = distributed.module(part, seed, 6.0, world_size)
        output.loss.backward()
        dense.step()
        after = output.after.detach().clone()
        dist.all_reduce(after)
        losses.append(float(after))
    return losses


def save_on_rank(rank: int, world_size: int, folder: str, table: str) -> list[float]:
    """Trains two steps, saves, trains two more: the losses of the latter."""
    distributed = distribute(
        build_model(schema(), configuration(table), tables_device="meta"), configuration(table).train.optimizer
    )
    step_losses(distributed, rank, world_size, (1, 2))
    dcp.save(distributed.state_dict(), checkpoint_id=folder)
    return step_losses(distributed, rank, world_size, (3, 4))


def load_on_rank(rank: int, world_size: int, folder: str, table: str) -> list[float]:
    distributed = distribute(
        build_model(schema(), configuration(table), tables_device="meta"), configuration(table).train.optimizer
    )
    state = distributed.state_dict()
    dcp.load(state, checkpoint_id=folder)
    distributed.load_state_dict(state)
    return step_losses(distributed, rank, world_size, (3, 4))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_checkpoint_of_two_ranks_goes_on_at_other_sizes(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    expected = run_ranks(save_on_rank, 2, folder, "rowwise_adagrad")[0]
    for world_size in (1, 3):
        assert run_ranks(load_on_rank, world_size, folder, "rowwise_adagrad")[0] == pytest.approx(expected, rel=1e-5)
    # An unsharded model loads the same names, without a process group.
    model = build_model(schema(), configuration())
    state = model.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(state)
    assert all(not torch.equal(before[n], state[n]) for n in state if n.startswith("tables.") and "only" not in n)
    saved = {m for m in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata if OPTIMIZER_PREFIX in m}
    assert saved == {f"{OPTIMIZER_PREFIX}{t}.momentum1" for t in ("item", "genre", "age", "hour", "only")}
    model.eval()
    output = model(made_up_batch(6, 3).tensors(), 0, 6.0)
    assert float(output.after) == pytest.approx(expected[0], rel=1e-5)


def waited_for_a_late_rank(rank: int, world_size: int) -> dict[str, float]:
    """Seconds by stage of a lookup for which the last rank is two seconds late."""
    model = Weighted(True, "meta")
    distribute(model, OptimizerConfig())
    dist.barrier()  # or the other rank may be as late by itself
    if rank == world_size - 1:
        time.sleep(2.0)
    laps = Laps()
    model.tables.lookup(model.tables.request(ids_of_rank(0, rank, world_size)), mark=laps.lap)
    return laps.take()


def test_waiting_for_another_rank_is_told_apart_from_looking_up() -> None:
    first, late = run_ranks(waited_for_a_late_rank, 2)
    assert first["exchange"] > 1.0
    assert first["lookup"] > 0
    assert late["exchange"] < 1.0


def fails_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("this rank is broken")
    dist.barrier()


def waits(rank: int, world_size: int) -> None:
    dist.recv(torch.zeros(1), src=1 - rank)


def test_a_rank_that_fails_is_reported() -> None:
    with pytest.raises(RankError, match="this rank is broken"):
        run_ranks(fails_on_one, 2)


def test_ranks_that_wait_forever_are_ended() -> None:
    with pytest.raises(RankError, match=r"not done in|[Tt]imed out"):
        run_ranks(waits, 2, seconds=6)
