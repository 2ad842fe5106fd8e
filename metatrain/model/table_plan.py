"""Which worker holds which part of which embedding table: a pure function, without a process group.

TorchRec's planner chooses, within what the configuration allows for each table and what a worker's memory holds. The
plan decides where numbers lie and how they travel, never what they become: every sharding gives the same tables, up to
rounding, and a checkpoint of one is read under any other.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.proposers import GreedyProposer, UniformProposer
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    ParameterConstraints,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import CacheParams, ParameterSharding

from metatrain.config import TableConfig
from metatrain.errors import ConfigError
from metatrain.model.choices import TableSpec, table_settings
from metatrain.model.tables import Tables

DATA_PARALLEL = "data_parallel"
NUMBER_BYTES = 4  # float32, of rows and of the optimizer's state
#: Numbers that a fused optimizer keeps for a row of so many columns.
STATE_NUMBERS = {"sgd": lambda columns: 0, "rowwise_adagrad": lambda columns: 1, "adagrad": lambda columns: columns}
#: FBGEMM's name of each optimizer.
FUSED = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}
_LEAST_COLUMNS = 4  # FBGEMM's kernels move numbers four at a time
_UNBOUNDED = 1 << 50  # bytes, for a planner that is not told of a bound


@dataclass(frozen=True)
class Workers:
    """The workers that a plan is for.

    `memory` is what a worker's node can give its tables in bytes, `device_memory` what its GPU can; None: not known.
    """

    count: int
    per_node: int
    memory: int | None = None
    device: str = "cpu"
    device_memory: int | None = None


@dataclass(frozen=True)
class Block:
    """A worker's part of a table: `rows` × `columns` from (`row`, `column`) on."""

    rank: int
    row: int
    rows: int
    column: int
    columns: int


@dataclass(frozen=True)
class TablePlan:
    """Where one table lies."""

    spec: TableSpec
    sharding: str
    kernel: str
    cache: float  # share of the rows that a GPU caches, with fused_uvm_caching
    blocks: tuple[Block, ...]

    def bytes_of(self, rank: int, optimizer: str) -> tuple[int, int]:
        """Bytes of a worker's rows and of their optimizer state, wherever they lie."""
        mine = [block for block in self.blocks if block.rank == rank]
        rows = sum(block.rows * block.columns for block in mine)
        state = sum(block.rows * STATE_NUMBERS[optimizer](block.columns) for block in mine)
        return rows * NUMBER_BYTES, state * NUMBER_BYTES


@dataclass(frozen=True)
class TablesPlan:
    """Where all tables lie. Made by `plan_tables`; it pickles."""

    tables: tuple[TablePlan, ...]
    workers: Workers
    optimizer: str
    #: Collection of `Tables` → table → TorchRec's form of the plan, without data-parallel tables.
    sharding: dict[str, dict[str, ParameterSharding]]

    @property
    def replicated(self) -> tuple[str, ...]:
        """Tables that every worker holds whole."""
        return tuple(table.spec.name for table in self.tables if table.sharding == DATA_PARALLEL)

    def host_bytes(self, rank: int) -> int:
        """Bytes of rows and optimizer state in the memory of a worker's node."""
        return sum(self._split(table, rank)[0] for table in self.tables)

    def device_bytes(self, rank: int) -> int:
        """Bytes of rows and optimizer state in the memory of a worker's GPU; 0 without one."""
        return sum(self._split(table, rank)[1] for table in self.tables)

    def _split(self, table: TablePlan, rank: int) -> tuple[int, int]:
        both = sum(table.bytes_of(rank, self.optimizer))
        if self.workers.device == "cpu":
            return both, 0
        on_device = {"fused": 1.0, "fused_uvm": 0.0, "fused_uvm_caching": table.cache}[table.kernel]
        return (0 if table.kernel == "fused" else both), int(both * on_device)

    def rows(self) -> list[tuple[str, ...]]:
        """The plan as a table, its head first."""
        ranks = range(self.workers.count)
        head = ("table", "rows", "width", "sharding", "kernel", "workers", "most on a worker")
        found: list[tuple[str, ...]] = [head]
        for table in self.tables:
            holders = sorted({block.rank for block in table.blocks if block.rows})
            most = max(sum(table.bytes_of(rank, self.optimizer)) for rank in ranks)
            spec = table.spec
            where = ",".join(map(str, holders)) if len(holders) < len(ranks) else "all"
            found.append(
                (spec.name, f"{spec.rows:,}", f"{spec.width}", table.sharding, table.kernel, where, size(most))
            )
        most = max(self.host_bytes(rank) + self.device_bytes(rank) for rank in ranks)
        found.append(("all", f"{sum(t.spec.rows for t in self.tables):,}", "", "", "", "", size(most)))
        return found

    def text(self) -> str:
        """The plan for a terminal, one line a table."""
        return columns(self.rows())

    def markdown(self) -> str:
        """The plan as a Markdown table."""
        head, *body = self.rows()
        return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *body))


def size(count: float) -> str:
    """Bytes for people: 6.1 GiB, 512 MiB, 3 KiB."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 2**power:
            return f"{count / 2**power:.3g} {unit}"
    return f"{count:.0f} B"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns: the first flush left, the others flush right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def plan_tables(
    specs: Sequence[TableSpec],
    settings: Mapping[str, TableConfig],
    optimizer: str,
    workers: Workers,
    *,
    tasks: int = 64,
    ids_a_task: Mapping[str, float] | None = None,
) -> TablesPlan:
    """Lets TorchRec's planner place the tables. Pure: the same arguments give the same plan.

    Args:
        specs: The tables.
        settings: `model.tables`.
        optimizer: `train.optimizer.table`.
        workers: Whom to place them on.
        tasks: Of a worker in a step, for the planner's estimate of time.
        ids_a_task: Table → ids that a task looks up, for the same.

    Raises:
        ConfigError: A setting for a table that isn't there, or tables that do not fit the workers' memory.
    """
    of_table = table_settings(specs, settings)
    ids_a_task = ids_a_task or {}
    constraints = {
        spec.name: ParameterConstraints(
            sharding_types=_shardings(of_table[spec.name], optimizer),
            compute_kernels=[of_table[spec.name].kernel, "dense"],
            min_partition=_columns_a_worker(spec.width, workers.count),
            pooling_factors=[max(1.0, ids_a_task.get(spec.name, 1.0))],
            cache_params=_cache(of_table[spec.name]),
        )
        for spec in specs
    }
    module = Tables(specs, dedup=False, device="meta").collections
    memory = _UNBOUNDED if workers.memory is None else workers.memory
    topology_of = {"ddr_cap_bytes": memory, "hbm_cap_bytes": workers.device_memory or _UNBOUNDED}
    with _quiet_planner():
        planner = EmbeddingShardingPlanner(
            topology=TopologyFactory.create_topology(
                TrainerConfig(world_size=workers.count, local_world_size=workers.per_node),
                HardwareConfig(**cast(Any, topology_of)),
                KernelConfig(compute_device=workers.device),
            ),
            batch_size=tasks,
            # What else a worker holds is not for the planner to guess: `memory` is what is left for tables.
            storage_reservation=FixedPercentageStorageReservation(percentage=0.0),
            proposer=cast(Any, [GreedyProposer(), GreedyProposer(use_depth=False), UniformProposer()]),
            constraints=constraints,
            stats=[],
            debug=False,
        )
        try:
            found = planner.plan(
                module, cast(Any, [EmbeddingCollectionSharder(fused_params={"optimizer": FUSED[optimizer]})])
            )
        except PlannerError as error:
            raise _does_not_fit(specs, optimizer, workers, error) from error
    tables, sharding = [], {}
    for key, collection in found.plan.items():
        for spec in specs:
            parameter = cast(Mapping[str, ParameterSharding], collection).get(spec.name)
            if parameter is None:
                continue
            setting = of_table[spec.name]
            if parameter.sharding_type == DATA_PARALLEL:
                blocks = tuple(Block(rank, 0, spec.rows, 0, spec.width) for rank in range(workers.count))
            else:
                blocks = _blocks(parameter, workers)
                sharding.setdefault(key, {})[spec.name] = parameter
            tables.append(TablePlan(spec, parameter.sharding_type, setting.kernel, setting.cache, blocks))
    order = {spec.name: i for i, spec in enumerate(specs)}
    tables.sort(key=lambda table: order[table.spec.name])
    return TablesPlan(tuple(tables), workers, optimizer, sharding)


def _shardings(setting: TableConfig, optimizer: str) -> list[str]:
    if setting.sharding != "auto":
        return [setting.sharding]
    allowed = ["row_wise", "table_wise"]
    if setting.kernel == "fused":
        allowed.append(DATA_PARALLEL)
    if optimizer != "rowwise_adagrad":  # whose state is of whole rows
        allowed.append("column_wise")
    return allowed


def _columns_a_worker(width: int, count: int) -> int:
    """The fewest columns of a block such that all have equally many, and no worker has two blocks."""
    return next(c for c in range(_LEAST_COLUMNS, width + 1, _LEAST_COLUMNS) if width % c == 0 and width // c <= count)


def _cache(setting: TableConfig) -> CacheParams | None:
    return CacheParams(load_factor=setting.cache) if setting.kernel == "fused_uvm_caching" else None


def _blocks(parameter: ParameterSharding, workers: Workers) -> tuple[Block, ...]:
    """TorchRec's shards. Blocks of columns go to workers of their own, which the planner does not promise."""
    spec: Any = parameter.sharding_spec
    ranks = [int(rank) for rank in cast(Sequence[int], parameter.ranks)]
    if len(set(ranks)) < len(ranks):
        ranks = [(ranks[0] + i) % workers.count for i in range(len(ranks))]
        for shard, rank in zip(spec.shards, ranks, strict=True):
            shard.placement = placement(workers.device, rank, workers.per_node)
        parameter.ranks = ranks
    return tuple(
        Block(rank, shard.shard_offsets[0], shard.shard_sizes[0], shard.shard_offsets[1], shard.shard_sizes[1])
        for rank, shard in zip(ranks, spec.shards, strict=True)
    )


def _does_not_fit(specs: Sequence[TableSpec], optimizer: str, workers: Workers, error: PlannerError) -> ConfigError:
    numbers = sum(spec.rows * (spec.width + STATE_NUMBERS[optimizer](spec.width)) for spec in specs)
    bound = workers.device_memory if workers.device != "cpu" else workers.memory
    return ConfigError(
        "The embedding tables do not fit the workers' memory as `model.tables` places them.",
        where="model.tables",
        got=f"tables and their optimizer take {size(numbers * NUMBER_BYTES)}; {workers.count} worker(s) have "
        f"{'an unknown amount' if bound is None else size(bound)} each for them ({str(error).splitlines()[0].strip()})",
        remedy="Shard the large tables by rows, add workers or memory, or make the tables smaller.",
    )


@contextlib.contextmanager
def _quiet_planner() -> Iterator[None]:
    """Without the planner's log: it warns of every table that is data-parallel, by the root logger."""
    root, silent = logging.getLogger(), logging.NullHandler()
    disabled = root.manager.disable
    root.addHandler(silent)  # else logging.warning would give the root a handler of its own
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.removeHandler(silent)
