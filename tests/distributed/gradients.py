"""Meta-gradients of models whose tables are sharded, and what it means that two of them are equal.

The tables' gradient is read off their fused update: with SGD, rows after - rows before = -rate × gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from meta_reference import part_of
from torch.distributed.tensor import DTensor, Shard

from metatrain.data.batch import TaskBatch
from metatrain.model.metamodel import MetaModel
from metatrain.model.sharding import distribute
from metatrain.model.table_plan import TablesPlan

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
    model: MetaModel, optimizer: Any, batch: TaskBatch, mine: range, world_size: int, plan: TablesPlan | None = None
) -> dict[str, Any]:
    """The gradients as the training step makes them, and this rank's sums of losses.

    Args:
        model: Made with `tables_device="meta"`; it is sharded here.
        optimizer: The configuration's, with `TABLE_OPTIMIZER`.
        batch: The global batch, numpy columns.
        mine: This rank's tasks.
        world_size: Number of ranks.
        plan: Where the tables lie.
    """
    distributed = distribute(model, optimizer, plan=plan)
    before = tables_of(distributed.state_dict())
    output = distributed.module(part_of(batch, mine).tensors(), 0, float(model.weight(batch.tensors())), world_size)
    output.loss.backward()
    distributed.update_replicated()
    after = tables_of(distributed.state_dict())
    gradients = {name: p.grad for name, p in distributed.dense_parameters().items()}
    gradients |= {name: (before[name].double() - after[name].double()) / TABLE_RATE for name in before}
    return {"gradients": gradients, "before": output.before, "after": output.after, "gains": output.gains}


def tables_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole tables of a sharded state."""
    return {name: whole(value) for name, value in state.items() if name.startswith("tables.")}


def whole(value: torch.Tensor) -> torch.Tensor:
    """A copy of a state's tensor, whole on every rank: also where only some ranks hold a part of it."""
    if not isinstance(value, DTensor):
        return value.clone()
    # Not by `full_tensor`, which gathers by an operation that `ranks` refuses.
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value.to_local().detach())
    (placement,) = value.placements
    assert isinstance(placement, Shard)
    return torch.cat([parts[rank] for rank in value.device_mesh.mesh.flatten()], dim=placement.dim)


def assert_equal_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Each tensor within `TOLERANCE` of its own norm, or 3e-7 of the whole gradient's."""
    assert found.keys() == expected.keys()
    # A few units in the last place of the whole gradient: what is left where a tensor's parts nearly cancel.
    rounding = 3e-7 * float(torch.stack([g.norm() for g in expected.values()]).norm())
    for name, reference in expected.items():
        error = float((found[name].double() - reference).norm())
        assert error <= TOLERANCE * float(reference.norm()) + rounding, f"{name}: {error} of {float(reference.norm())}"
