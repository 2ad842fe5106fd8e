"""A module with tables, spread over the ranks: tables by rows, the rest replicated.

`distribute` shards the tables of a module in place, wraps its dense part in DistributedDataParallel, and fuses the
tables' optimizer into the backward pass. A table's gradient is the mean over ranks of the gradients of their losses,
as DDP's is for dense parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import (
    DefaultDataParallelWrapper,
    DistributedModelParallel,
    get_unwrapped_module,
)
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingCollection

from metatrain.config import OptimizerConfig
from metatrain.errors import CheckpointError
from metatrain.model.tables import Tables

#: Prefix of the fused optimizer's tensors in `Distributed.state_dict`.
OPTIMIZER_PREFIX = "table_optimizer."

_OPTIMIZERS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}


class PlannedTable(NamedTuple):
    """How a table lies on the ranks."""

    table: str
    rows: int
    width: int
    sharding: str
    kernel: str
    rows_of_ranks: tuple[int, ...]


class Distributed:
    """A module with sharded tables and replicated dense parameters. Made by `distribute`.

    Attributes:
        module: Call this in training: its forward and backward keep the ranks in step.
        model: The module given to `distribute`, its tables now sharded: for everything but the training step.
    """

    def __init__(self, wrapped: DistributedModelParallel, model: nn.Module, mesh: DeviceMesh) -> None:
        self.module: nn.Module = wrapped
        self.model = model
        self._wrapped, self._mesh = wrapped, mesh

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters for the outer optimizer, by their names in `model`: all but the tables."""
        sharded = set(DistributedModelParallel._sharded_parameter_names(self.model))
        return {name: parameter for name, parameter in self.model.named_parameters() if name not in sharded}

    def plan(self) -> list[PlannedTable]:
        """The sharding plan, as TorchRec carries it out."""
        of_table = {
            name: sharding
            for of_module in self._wrapped.plan.plan.values()
            for name, sharding in cast(dict[str, Any], of_module).items()
        }
        specs = [spec for tables in self.model.modules() if isinstance(tables, Tables) for spec in tables.specs]
        planned = []
        for spec in specs:
            sharding = of_table[spec.name]
            rows = tuple(shard.shard_sizes[0] for shard in sharding.sharding_spec.shards)
            planned.append(
                PlannedTable(spec.name, spec.rows, spec.width, sharding.sharding_type, sharding.compute_kernel, rows)
            )
        return planned

    def set_table_rate(self, rate: float) -> None:
        """Sets the learning rate of the tables' fused optimizer, from the next backward pass on."""
        optimizer = self._wrapped.fused_optimizer
        for group in cast(list[dict[str, Any]], optimizer.param_groups):
            group["lr"] = rate
        # Nothing is stepped: this hands the rate to the kernels. The update itself happens inside backward.
        optimizer.step()

    def state_dict(self) -> dict[str, Tensor]:
        """The module's tensors by their names in `model`, and under `table_optimizer.` the fused optimizer's.

        Tables and their optimizer state are DTensors sharded by rows, the rest plain tensors. None is a copy: loading
        into them in place (as torch.distributed.checkpoint does) loads the model.
        """
        state = {name: self._as_dtensor(value) for name, value in self.model.state_dict().items()}
        fused = cast(dict[str, dict[str, Any]], self._wrapped.fused_optimizer.state_dict()["state"])
        for parameter, slots in fused.items():
            table = parameter.rpartition("embeddings.")[2].removesuffix(".weight")
            for name, value in slots.items():
                state[f"{OPTIMIZER_PREFIX}{table}.{name.removeprefix(f'{table}.')}"] = self._as_dtensor(value)
        return state

    def track(self) -> dict[str, Tensor]:
        """From now on, marks the rows of tables that training steps touch.

        Returns:
            Name in `state_dict`, of tables and of their fused optimizer's state, → bool, one for each of this rank's
            rows: the very bitmap, for others to read and to clear.
        """
        of_table: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        for prefix, tables in self.model.named_modules():
            if isinstance(tables, Tables):
                bitmaps = tables.track()
                of_table |= bitmaps
                found |= {f"{prefix}.{tables.weight_name(table)}": bitmap for table, bitmap in bitmaps.items()}
        for name in self.state_dict():
            if name.startswith(OPTIMIZER_PREFIX):
                found[name] = of_table[name.removeprefix(OPTIMIZER_PREFIX).rpartition(".")[0]]
        return found

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads what `state_dict` gives; a table may also come whole, as a plain tensor.

        Raises:
            CheckpointError: Names or shapes that differ from this model's.
        """
        own = self.state_dict()
        if state.keys() != own.keys():
            raise CheckpointError(
                "The state is of another model: names differ.",
                got=", ".join(sorted(state.keys() ^ own.keys())[:8]),
                remedy="Use the configuration and dataset that the checkpoint was trained with.",
            )
        for name, target in own.items():
            value = state[name]
            if value.shape != target.shape:
                raise CheckpointError(
                    "The state is of another model: shapes differ.",
                    where=name,
                    got=f"{tuple(value.shape)}, not {tuple(target.shape)}",
                    remedy="Use the configuration and dataset that the checkpoint was trained with.",
                )
            if not isinstance(target, DTensor):
                target.copy_(value)
                continue
            local = target.to_local()
            if isinstance(value, DTensor):
                local.copy_(value.to_local())
            else:
                start = self._mesh.get_local_rank() * -(-target.shape[0] // self._mesh.size())
                local.copy_(value[start : start + local.shape[0]])

    def _as_dtensor(self, value: Any) -> Tensor:
        """TorchRec's row blocks are exactly those of a DTensor's Shard(0): ceil(rows / ranks) each, the last fewer."""
        if not isinstance(value, ShardedTensor):
            return value
        size = value.metadata().size
        shards = value.local_shards()
        local = shards[0].tensor if shards else torch.empty(0, *size[1:], device=self._mesh.device_type)
        local = local.view(local.shape[0] if local.numel() else 0, *size[1:])
        stride = torch.empty(size, device="meta").stride()
        return DTensor.from_local(local, self._mesh, [Shard(0)], run_check=False, shape=torch.Size(size), stride=stride)


def distribute(module: nn.Module, optimizer: OptimizerConfig, device: torch.device | str = "cpu") -> Distributed:
    """Shards the tables of a module by rows over all ranks, and replicates the rest. Needs a process group.

    The tables get their initial rows again. They start at the optimizer's `table_rate`.
    """
    group = dist.group.WORLD
    assert group is not None, "torch.distributed must be initialised first"
    device = torch.device(device)
    sharders: list[Any] = [
        EmbeddingCollectionSharder(
            fused_params={"optimizer": _OPTIMIZERS[optimizer.table], "learning_rate": optimizer.table_rate, "eps": 1e-8}
        )
    ]
    collections = {name: m for name, m in module.named_modules() if isinstance(m, EmbeddingCollection)}
    # Written down rather than searched for: TorchRec's planner would weigh memory that this plan doesn't depend on.
    plan = {
        name: construct_module_sharding_plan(
            collection,
            {table.name: row_wise(compute_kernel="fused") for table in collection.embedding_configs()},
            sharder=sharders[0],
            world_size=group.size(),
            local_size=group.size(),
            device_type=device.type,
        )
        for name, collection in collections.items()
    }
    wrapped = DistributedModelParallel(
        module,
        env=ShardingEnv.from_process_group(group),
        device=device,
        plan=ShardingPlan(plan=cast(Any, plan)),
        sharders=sharders,
        data_parallel_wrapper=_DataParallel(),
    )
    model = get_unwrapped_module(wrapped)
    for tables in [m for m in model.modules() if isinstance(m, Tables)]:
        tables.initialise()
    return Distributed(wrapped, model, DeviceMesh.from_group(group, device.type))


class _DataParallel(DefaultDataParallelWrapper):
    """DDP without a static graph: a rank without tasks in a step has another graph than the others."""

    def _ddp_wrap(
        self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device, ddp_ignore_param_names: set[str]
    ) -> None:
        module = dmp._dmp_wrapped_module
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            module=module, params_and_buffers_to_ignore=ddp_ignore_param_names
        )
        dmp._dmp_wrapped_module = DistributedDataParallel(
            module=module.to(device),
            device_ids=None if device.type == "cpu" else [device],
            process_group=env.process_group,
            gradient_as_bucket_view=True,
            forward_sync_buffers=False,
        )
