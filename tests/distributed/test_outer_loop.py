"""Asking for the next step's rows ahead changes nothing: the same weights, bit for bit, as asking step by step."""

from __future__ import annotations

import pytest
import torch
from gradients import whole
from meta_reference import made_up_batch, part_of, schema
from ranks import run_ranks

from metatrain.config import Config
from metatrain.model.build import build_model
from metatrain.model.sharding import distribute
from metatrain.observe.laps import Laps
from metatrain.train.outer import DenseOptimizer
from metatrain.train.step import OuterLoop

STEPS = 5
CONFIG = Config.model_validate(
    {
        "model": {"hidden": (6,), "id_dropout": 0.3},
        "train": {"optimizer": {"rate": 0.1, "table_rate": 0.5, "table_decay": 0.01, "warmup_steps": 1}},
    }
)


def trained_on_rank(rank: int, world_size: int, ahead: bool) -> dict[str, torch.Tensor]:
    """The state after some steps on batches that share most of their items; in one step the last rank has no task."""
    distributed = distribute(build_model(schema(), CONFIG, tables_device="meta"), CONFIG.train.optimizer)
    optimizer = DenseOptimizer(distributed.dense_parameters(), CONFIG.train.optimizer)
    loop = OuterLoop(distributed, optimizer, CONFIG, STEPS, world_size, Laps())
    parts = []
    for step in range(STEPS):
        batch = made_up_batch(6, step)
        edge = 6 if step == 2 else 4
        mine = range(6) if world_size == 1 else (range(edge), range(edge, 6))[rank]
        parts.append(part_of(batch, mine).tensors())
    for step, part in enumerate(parts):
        loop.step(part, step, parts[step + 1] if ahead and step + 1 < STEPS else None)
    state = distributed.state_dict() | optimizer.state_dict()
    return {n: whole(v.detach()) for n, v in state.items()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_asking_ahead_is_bit_equal_to_asking_step_by_step(world_size: int) -> None:
    ahead, plain = (run_ranks(trained_on_rank, world_size, ahead) for ahead in (True, False))
    for one, other in zip(ahead, plain, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]), name
