"""Meta-gradients of models whose tables are sharded, and what it means that two of them are equal.

The tables' gradient is read off their fused update: with SGD, rows after - rows before = -rate × gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from meta_reference import part_of
from torch.distributed.tensor import DTensor

from metatrain.data.batch import TaskBatch
from metatrain.model.metamodel import MetaModel
from metatrain.model.sharding import distribute

TOLERANCE = 1e-5
# A power of two, so large that the float32 rounding of the updated row does not hide the gradient.
TABLE_RATE = 1024.0
#: `train.optimizer` of a configuration whose tables' gradient is to be read.
TABLE_OPTIMIZER = {"table": "sgd", "table_rate": TABLE_RATE}


def share(tasks: int, number: int, rank: int, world_size: int) -> range:
    """A rank's tasks, of one or two ranks: uneven shares, and for every third `number` the last rank has none."""
    edge = tasks if number % 3 == 2 else min(4, tasks)
    return range(tasks) if world_size == 1 else (range(edge), range(edge, tasks))[rank]


def sharded_gradients(
    model: MetaModel, optimizer: Any, batch: TaskBatch, mine: range, world_size: int
) -> dict[str, Any]:
    """The gradients as the training step makes them, and this rank's sums of losses.

    Args:
        model: Made with `tables_device="meta"`; it is sharded here.
        optimizer: The configuration's, with `TABLE_OPTIMIZER`.
        batch: The global batch, numpy columns.
        mine: This rank's tasks.
        world_size: Number of ranks.
    """
    distributed = distribute(model, optimizer)
    before = tables_of(distributed.state_dict())
    output = distributed.module(part_of(batch, mine).tensors(), 0, float(batch.size), world_size)
    output.loss.backward()
    after = tables_of(distributed.state_dict())
    gradients = {name: p.grad for name, p in distributed.dense_parameters().items()}
    gradients |= {name: (before[name].double() - after[name].double()) / TABLE_RATE for name in before}
    return {"gradients": gradients, "before": output.before, "after": output.after, "gains": output.gains}


def tables_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole tables of a sharded state."""
    return {
        name: value.full_tensor().clone()
        for name, value in state.items()
        if isinstance(value, DTensor) and not name.startswith("table_optimizer.")
    }


def assert_equal_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Each tensor within `TOLERANCE` of its own norm, or 3e-7 of the whole gradient's."""
    assert found.keys() == expected.keys()
    # A few units in the last place of the whole gradient: what is left where a tensor's parts nearly cancel.
    rounding = 3e-7 * float(torch.stack([g.norm() for g in expected.values()]).norm())
    for name, reference in expected.items():
        error = float((found[name].double() - reference).norm())
        assert error <= TOLERANCE * float(reference.norm()) + rounding, f"{name}: {error} of {float(reference.norm())}"
