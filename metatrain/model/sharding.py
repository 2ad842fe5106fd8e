"""A module with tables, spread over the ranks: tables as a plan says (`table_plan`), the rest replicated.

`distribute` shards the tables of a module in place, wraps its dense part in DistributedDataParallel, and fuses the
tables' optimizer into the backward pass. A table's gradient is the mean over ranks of the gradients of their losses,
as DDP's is for dense parameters. Data-parallel tables, which all ranks hold whole, are stepped by `update_replicated`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import (
    DefaultDataParallelWrapper,
    DistributedModelParallel,
    get_unwrapped_module,
)
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingEnv, ShardingPlan

from metatrain.config import OptimizerConfig
from metatrain.errors import CheckpointError, MetatrainError
from metatrain.model.bags import look_up_as_bags
from metatrain.model.gradient_mean import ONE_BUCKET_MB, average_by_name
from metatrain.model.replicated import ReplicatedOptimizer
from metatrain.model.table_plan import FUSED, TablesPlan, Workers, plan_tables
from metatrain.model.tables import Tables

#: Prefix of the fused optimizer's tensors in `Distributed.state_dict`.
OPTIMIZER_PREFIX = "table_optimizer."
_UNKNOWN = 1 << 62  # bytes
#: Added by the tables' optimizers to the root of their sums.
EPSILON = 1e-8


class Distributed:
    """A module with sharded tables and replicated dense parameters. Made by `distribute`.

    Attributes:
        module: Call this in training: its forward and backward keep the ranks in step.
        model: The module given to `distribute`, its tables now sharded: for everything but the training step.
        plan: Where its tables lie.
    """

    def __init__(
        self,
        wrapped: DistributedModelParallel,
        model: nn.Module,
        replicated: ReplicatedOptimizer,
        plan: TablesPlan,
        device: str,
    ) -> None:
        self.module: nn.Module = wrapped
        self.model, self.plan = model, plan
        self._wrapped, self._replicated, self._optimizer, self._device = wrapped, replicated, plan.optimizer, device
        self._meshes: dict[tuple[int, ...], DeviceMesh] = {}
        # Names of data-parallel tables as they are in an unsharded model, and so in checkpoints.
        self._names: dict[str, str] = {}
        for prefix, tables in model.named_modules():
            if isinstance(tables, Tables):
                for name in tables.replicated:
                    self._names[f"{prefix}.replicated.{name}"] = f"{prefix}.{tables.weight_name(name)}"
        self.state_dict()  # makes the meshes, while all ranks are here

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters for the outer optimizer, by their names in `model`: all but the tables."""
        tables = {*DistributedModelParallel._sharded_parameter_names(self.model), *self._names}
        return {name: parameter for name, parameter in self.model.named_parameters() if name not in tables}

    def set_table_rate(self, rate: float) -> None:
        """Sets the learning rate of the tables' optimizer, from the next backward pass on."""
        optimizer = self._wrapped.fused_optimizer
        for group in cast(list[dict[str, Any]], optimizer.param_groups):
            group["lr"] = rate
        # Nothing is stepped: this hands the rate to the kernels. The update itself happens inside backward.
        optimizer.step()
        self._replicated.rate = rate

    def update_replicated(self) -> None:
        """Steps the data-parallel tables: call it after each backward pass that updates the sharded ones."""
        self._replicated.step()

    def state_dict(self) -> dict[str, Tensor]:
        """The module's tensors by their names in `model`, and under `table_optimizer.` the tables' optimizer's.

        Sharded tables and their optimizer state are DTensors over the ranks that hold them, the rest plain tensors.
        None is a copy: loading into them in place (as torch.distributed.checkpoint does) loads the model.
        """
        state = {self._names.get(n, n): self._as_dtensor(value) for n, value in self.model.state_dict().items()}
        fused = cast(dict[str, dict[str, Any]], self._wrapped.fused_optimizer.state_dict()["state"])
        found = {
            f"{table}.{name.removeprefix(f'{table}.')}": self._as_dtensor(value)
            for parameter, slots in sorted(fused.items())
            for name, value in slots.items()
            if (table := _table_of(parameter))
        }
        found |= self._replicated.state()
        # TorchRec has no state on ranks without rows of a table; it is named on all ranks, so that they agree.
        for name, weight in state.items():
            slot = f"{_table_of(name)}.momentum1"
            if isinstance(weight, DTensor) and slot not in found and self._optimizer != "sgd":
                found[slot] = self._without_rows(weight)
        return state | {f"{OPTIMIZER_PREFIX}{name}": found[name] for name in sorted(found)}

    def _without_rows(self, weight: DTensor) -> DTensor:
        """The optimizer's state of a table of which this rank holds no part."""
        of_rows = self._optimizer == "rowwise_adagrad"
        size = weight.shape[:1] if of_rows else weight.shape
        return DTensor.from_local(
            torch.empty(0, *size[1:], device=self._device),
            weight.device_mesh,
            weight.placements,
            run_check=False,
            shape=size,
            stride=torch.empty(size, device="meta").stride(),
        )

    def track(self) -> dict[str, Tensor]:
        """From now on, marks the rows of tables that training steps touch.

        Returns:
            Name in `state_dict`, of tables and of their fused optimizer's state, → bool, one for each of this rank's
            rows: the very bitmap, for others to read and to clear. Tables that are not sharded by whole rows, by
            columns or not at all, are not tracked.
        """
        by_columns = [table.spec.name for table in self.plan.tables if table.sharding == "column_wise"]
        of_table: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        for prefix, tables in self.model.named_modules():
            if isinstance(tables, Tables):
                bitmaps = tables.track(by_columns)
                of_table |= bitmaps
                found |= {f"{prefix}.{tables.weight_name(table)}": bitmap for table, bitmap in bitmaps.items()}
        for name in self.state_dict():
            table = name.removeprefix(OPTIMIZER_PREFIX).rpartition(".")[0]
            if name.startswith(OPTIMIZER_PREFIX) and table in of_table:
                found[name] = of_table[table]
        return found

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads what `state_dict` gives; a table may also come whole, as a plain tensor. Not collective.

        Raises:
            CheckpointError: Names, shapes or placements that differ from this model's.
        """
        own = self.state_dict()
        if state.keys() != own.keys():
            raise CheckpointError(
                "The state is of another model: names differ.",
                got=", ".join(sorted(state.keys() ^ own.keys())[:8]),
                remedy="Use the configuration and dataset that the checkpoint was trained with.",
            )
        for name, target in own.items():  # all of them, before any is copied
            value = state[name]
            if value.shape != target.shape:
                raise CheckpointError(
                    "The state is of another model: shapes differ.",
                    where=name,
                    got=f"{tuple(value.shape)}, not {tuple(target.shape)}",
                    remedy="Use the configuration and dataset that the checkpoint was trained with.",
                )
            if isinstance(target, DTensor) and isinstance(value, DTensor) and _placed(value) != _placed(target):
                raise CheckpointError(
                    "The state is placed otherwise.",
                    where=name,
                    got="{!r} on ranks {}, not {!r} on ranks {}".format(*_placed(value), *_placed(target)),
                    remedy="Give the table whole, as a plain tensor, or save it and load the checkpoint.",
                )
        for name, target in own.items():
            value = state[name]
            if not isinstance(target, DTensor):
                target.copy_(value)
                continue
            local = target.to_local()
            if not local.numel():
                continue
            if isinstance(value, DTensor):
                local.copy_(value.to_local())
            else:
                _, (row, *column) = compute_local_shape_and_global_offset(
                    target.shape, target.device_mesh, target.placements
                )
                part = value[row : row + local.shape[0]]
                local.copy_(part[:, column[0] : column[0] + local.shape[1]] if column else part)

    def _as_dtensor(self, value: Any) -> Tensor:
        """TorchRec's blocks as a DTensor over the ranks that hold them.

        Blocks of rows are exactly those of Shard(0): ceil(rows / ranks) each, the last fewer. Blocks of columns, all
        of the same width, are those of Shard(1); a table on one rank is either.
        """
        if not isinstance(value, ShardedTensor):
            return value
        metadata = value.metadata()
        size, blocks = metadata.size, metadata.shards_metadata
        by_columns = len(size) > 1 and any(block.shard_offsets[1] for block in blocks)
        blocks = sorted(blocks, key=lambda block: block.shard_offsets[int(by_columns)])
        mesh = self._mesh(tuple(_rank_of(block) for block in blocks))
        shards = value.local_shards()
        local = shards[0].tensor if shards else torch.empty(0, *size[1:], device=self._device)
        if not by_columns:
            local = local.view(local.shape[0] if local.numel() else 0, *size[1:])
        stride = torch.empty(size, device="meta").stride()
        placement = Shard(1) if by_columns else Shard(0)
        return DTensor.from_local(local, mesh, [placement], run_check=False, shape=torch.Size(size), stride=stride)

    def _mesh(self, ranks: tuple[int, ...]) -> DeviceMesh:
        """The ranks as a mesh. Making one is collective: the constructor asks for all there are."""
        if ranks not in self._meshes:
            group = dist.group.WORLD
            assert group is not None
            whole = ranks == tuple(range(group.size()))
            self._meshes[ranks] = (
                DeviceMesh.from_group(group, self._device) if whole else DeviceMesh(self._device, list(ranks))
            )
        return self._meshes[ranks]


def _placed(value: DTensor) -> tuple[Placement, list[int]]:
    return value.placements[0], value.device_mesh.mesh.flatten().tolist()


def _table_of(parameter: str) -> str:
    """The table of a parameter's name; empty where it is none's."""
    return parameter.rpartition("embeddings.")[2].removesuffix(".weight") if "embeddings." in parameter else ""


def _rank_of(block: Any) -> int:
    rank = block.placement.rank()
    assert rank is not None
    return rank


def distribute(
    module: nn.Module,
    optimizer: OptimizerConfig,
    device: torch.device | str = "cpu",
    plan: TablesPlan | None = None,
) -> Distributed:
    """Spreads the tables of a module over all ranks, and replicates the rest. Needs a process group.

    The tables get their initial rows again. They start at the optimizer's `table_rate`.

    Args:
        module: With one `Tables` in it, on the meta device.
        optimizer: Of the tables.
        device: Where the rest is, and the tables will be.
        plan: Of the module's tables, the same on all ranks. Default: all of them by rows.
    """
    group = dist.group.WORLD
    assert group is not None, "torch.distributed must be initialised first"
    device = torch.device(device)
    sharders: list[Any] = [
        EmbeddingCollectionSharder(
            fused_params={"optimizer": FUSED[optimizer.table], "learning_rate": optimizer.table_rate, "eps": EPSILON}
        )
    ]
    ((name, tables),) = [(name, m) for name, m in module.named_modules() if isinstance(m, Tables)]
    of_tables = plan or plan_tables(
        tables.specs, {}, optimizer.table, Workers(group.size(), group.size(), device=device.type)
    )
    tables.replicate(of_tables.replicated, device)
    sharding: dict[str, Any] = {
        f"{name}.collections.{key}": EmbeddingModuleShardingPlan(collection)
        for key, collection in of_tables.sharding.items()
    }
    wrapped = DistributedModelParallel(
        module,
        env=ShardingEnv.from_process_group(group),
        device=device,
        plan=ShardingPlan(plan=sharding),
        sharders=sharders,
        data_parallel_wrapper=_DataParallel(),
    )
    model = get_unwrapped_module(wrapped)
    look_up_as_bags(model)
    tables.initialise()
    stepped = ReplicatedOptimizer(dict(tables.replicated.items()), optimizer.table, optimizer.table_rate, EPSILON)
    return Distributed(wrapped, model, stepped, of_tables, device.type)


def agreed_plan(make: Callable[[int | None], TablesPlan], memory: int | None) -> TablesPlan:
    """A plan that all ranks share: rank 0 makes it for the least memory that any rank has. Collective.

    Raises:
        MetatrainError: On all ranks, what making it raised on rank 0.
    """
    least = torch.tensor(_UNKNOWN if memory is None else memory)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [make(None if int(least) == _UNKNOWN else int(least))]
        except MetatrainError as error:
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], MetatrainError):
        raise found[0]
    return found[0]


class _DataParallel(DefaultDataParallelWrapper):
    """DDP without a static graph: a rank without tasks in a step has another graph than the others."""

    def _ddp_wrap(
        self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device, ddp_ignore_param_names: set[str]
    ) -> None:
        module = dmp._dmp_wrapped_module
        # Data-parallel tables may get their gradients in a backward pass of their own (see `Held`), unknown to DDP.
        replicated = {
            f"{prefix}.replicated.{name}"
            for prefix, tables in module.named_modules()
            if isinstance(tables, Tables)
            for name in tables.replicated
        }
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            module=module, params_and_buffers_to_ignore=ddp_ignore_param_names | replicated
        )
        on_cpu = device.type == "cpu"
        dmp._dmp_wrapped_module = wrapped = DistributedDataParallel(
            module=module.to(device),
            device_ids=None if on_cpu else [device],
            process_group=env.process_group,
            gradient_as_bucket_view=True,
            forward_sync_buffers=False,
            bucket_cap_mb=ONE_BUCKET_MB if on_cpu else None,
        )
        if on_cpu:
            average_by_name(wrapped)
