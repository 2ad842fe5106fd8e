"""What a run holds in memory, counted before it starts: a worker's parts and a reader's, with the arithmetic.

Pure functions of (configuration, manifest, workers): `metatrain submit` shows them, launching refuses what cannot fit,
and the workers plan their tables by the same. Counted are numbers and bytes; measured is what a process takes that has
nothing to hold yet (`python tools/bench_scaling.py --users`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from metatrain.config import Config
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import Manifest, Split
from metatrain.data.schema import Feature, Kind, Level
from metatrain.errors import ConfigError
from metatrain.model.build import build_model
from metatrain.model.choices import TableSpec
from metatrain.model.sharding import agreed_plan
from metatrain.model.table_plan import (
    DATA_PARALLEL,
    NUMBER_BYTES,
    STATE_NUMBERS,
    TablePlan,
    TablesPlan,
    Workers,
    columns,
    plan_tables,
    size,
)
from metatrain.observe.machine import memory_bytes

#: A worker's process with Python, torch and Ray, and a reader's, which has no torch: private memory, measured.
WORKER_PROCESS, READER_PROCESS = 400 << 20, 160 << 20
# A step's looked-up rows: the rows, their gradient, and both once more as inputs of the base learner.
_COPIES_OF_ROWS = 4
# A reader's decoded row groups: what Parquet gives, and the columns made of it.
_COPIES_OF_EVENTS = 2


@dataclass(frozen=True)
class Part:
    """Something held in memory."""

    name: str
    bytes: int
    how: str  # the arithmetic, for people
    surely: bool = True  # False: a bound that need not be reached


@dataclass(frozen=True)
class Footprint:
    """The memory of a worker (the one with most rows) and of one of its readers, by part."""

    plan: TablesPlan
    worker: tuple[Part, ...]
    reader: tuple[Part, ...]
    readers: tuple[int, int]  # of a worker: at the start, and the most there may be

    def bytes(self, surely: bool = False) -> int:
        """Of a worker with its readers. `surely`: without what is a bound."""
        return _sum(self.worker, surely) + self.readers[not surely] * _sum(self.reader, surely)

    def text(self) -> str:
        """All parts for a terminal, with their arithmetic."""
        rows = [
            (f"{whose} {part.name}", size(part.bytes), part.how if part.surely else f"at most: {part.how}")
            for whose, parts in (("worker:", self.worker), ("reader:", self.reader))
            for part in parts
        ]
        rows.append(
            ("a worker with its readers", size(self.bytes()), f"{size(self.bytes(surely=True))} of it in any case")
        )
        first = columns([row[:2] for row in rows]).splitlines()
        return "\n".join(f"{line}  {row[2]}" for line, row in zip(first, rows, strict=True))


def footprint(config: Config, manifest: Manifest, workers: Workers) -> Footprint:
    """Counts what a run of so many workers holds.

    Raises:
        ConfigError: A model that fits no dataset, or tables that do not fit `workers.memory`.
    """
    model = build_model(manifest.schema_, config, tables_device="meta")
    plan = tables_plan(config, manifest, workers, model.tables.specs)
    heaviest = max(range(workers.count), key=plan.host_bytes)
    optimizer = config.train.optimizer.table
    rows = sum(table.bytes_of(heaviest, optimizer)[0] for table in plan.tables)
    state = sum(table.bytes_of(heaviest, optimizer)[1] for table in plan.tables)
    on_host = plan.host_bytes(heaviest)
    parts = [Part("process", WORKER_PROCESS, "Python, torch and Ray, measured")]
    if workers.device == "cpu":
        parts += [Part("tables", rows, _arithmetic(plan)), Part("tables' optimizer", state, _state_of(optimizer))]
    else:
        parts.append(Part("tables on the host", on_host, "rows and optimizer state of tables with a uvm kernel"))
    # The background writer's copy, which every checkpoint reuses, of GPUs' tables too.
    parts.append(Part("checkpoint copy", rows + state, "tables and optimizer once more, while they are written"))
    dense = sum(p.numel() for p in model.meta.parameters())
    parts.append(Part("dense parameters", 4 * dense * NUMBER_BYTES, f"{dense:,} × 4 B × (value, gradient, 2 of Adam)"))
    if workers.device == "cpu":
        tasks = -(-config.data.tasks_per_step // workers.count)
        widths = {spec.name: spec.width for spec in model.tables.specs}
        numbers = sum(ids * widths[table] for table, ids in _ids_a_task(config, manifest).items())
        looked_up = int(tasks * numbers * NUMBER_BYTES * _COPIES_OF_ROWS)
        how = f"{tasks} tasks × {numbers:,.0f} numbers × 4 B × {_COPIES_OF_ROWS}"
        parts.append(Part("rows of a step", looked_up, how, surely=False))
        parts.append(Part("inner loop", config.meta.memory << 20, "meta.memory", surely=False))
    parts.append(Part("batches ahead", config.data.prefetch_memory << 20, "data.prefetch_memory", surely=False))
    readers = config.data.first_readers, config.data.most_readers
    return Footprint(plan, tuple(parts), _reader(config, manifest, workers), readers)


def tables_plan(config: Config, manifest: Manifest, workers: Workers, specs: Sequence[TableSpec]) -> TablesPlan:
    """The plan of a run's tables (see `plan_tables`)."""
    return plan_tables(
        specs,
        config.model.tables,
        config.train.optimizer.table,
        workers,
        tasks=-(-config.data.tasks_per_step // workers.count),
        ids_a_task=_ids_a_task(config, manifest),
    )


def room_for_tables(config: Config, node_bytes: int, workers_a_node: int) -> int:
    """What a worker's share of its node leaves for tables, when each is held twice while a checkpoint is written."""
    beside = WORKER_PROCESS + config.data.most_readers * READER_PROCESS
    return max(0, node_bytes // workers_a_node - beside) // 2


def workers_plan(
    config: Config, manifest: Manifest, specs: Sequence[TableSpec], world_size: int, device: torch.device
) -> TablesPlan:
    """The plan of the workers that are there, by the memory that they have. Collective.

    Raises:
        ConfigError: On all ranks: tables that do not fit.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))  # set by Ray Train: workers on this node
    on_gpu = device.type == "cuda"
    room = room_for_tables(config, memory_bytes(), here)
    if on_gpu:  # the inner loop's budget is the GPU's
        room = max(0, torch.cuda.get_device_properties(device).total_memory - (config.meta.memory << 20))

    def make(least: int | None) -> TablesPlan:
        workers = Workers(
            world_size,
            here if world_size % here == 0 else 1,  # TorchRec knows nodes of one size alone
            None if on_gpu else least,
            device.type,
            least if on_gpu else None,
        )
        return tables_plan(config, manifest, workers, specs)

    return agreed_plan(make, room)


def check_machine(config: Config) -> None:
    """Refuses a run that cannot fit into this machine, which all of its workers share.

    Raises:
        ConfigError: With the arithmetic.
    """
    count = config.train.least_workers
    device = "cuda" if config.train.gpus else "cpu"
    manifest = TaskDataset.open(config.data.dataset).manifest
    check_fits(footprint(config, manifest, Workers(count, count, device=device)), memory_bytes(), count, "this machine")


def check_fits(counted: Footprint, node_bytes: int, workers_a_node: int, where: str) -> None:
    """Refuses a run whose workers on one node surely need more than the node has.

    Raises:
        ConfigError: With the arithmetic.
    """
    needed = workers_a_node * counted.bytes(surely=True)
    if needed <= node_bytes:
        return
    raise ConfigError(
        f"This run cannot fit into the memory of {where}: {workers_a_node} worker(s) on it need {size(needed)}, it has "
        f"{size(node_bytes)}.",
        where="model, train.workers",
        got="\n    " + counted.text().replace("\n", "\n    "),
        remedy="Give it more nodes or memory, hash features into fewer buckets, lower `width`, or leave some out.",
    )


def _sum(parts: Sequence[Part], surely: bool) -> int:
    return sum(part.bytes for part in parts if part.surely or not surely)


def _arithmetic(plan: TablesPlan) -> str:
    """The largest tables' rows × width × 4 B, and over how many workers."""
    largest = sorted(plan.tables, key=lambda table: -table.spec.rows * table.spec.width)
    shown = [f"{t.spec.name} {t.spec.rows:,} × {t.spec.width} × {NUMBER_BYTES} B{_parts_of(t)}" for t in largest[:3]]
    return ", ".join(shown) + (f", and {len(largest) - 3} more" if len(largest) > 3 else "")


def _parts_of(table: TablePlan) -> str:
    holders = len({block.rank for block in table.blocks if block.rows})
    return f" / {holders}" if holders > 1 and table.sharding != DATA_PARALLEL else ""


def _state_of(optimizer: str) -> str:
    numbers = STATE_NUMBERS[optimizer](1)
    if not numbers:
        return f"{optimizer} has none"
    return f"{optimizer}: 4 B a row" if optimizer == "rowwise_adagrad" else f"{optimizer}: as much as the rows"


def _ids_a_task(config: Config, manifest: Manifest) -> dict[str, float]:
    """Table → ids that a task looks up in a step, about: an item or event feature once an event."""
    events = _events_a_task(config, manifest)
    found: dict[str, float] = {}
    for feature in manifest.schema_.features:
        if feature.embedded and (config.model.features is None or feature.name in config.model.features):
            table = str(feature.table)
            found[table] = found.get(table, 0.0) + (1.0 if feature.level is Level.TASK else events)
    return found


def _events_a_task(config: Config, manifest: Manifest) -> float:
    episode = config.data.episode
    tasks = max(1, manifest.tasks.get(Split.TRAIN, 0))
    return min(manifest.events.get(Split.TRAIN, 0) / tasks, episode.support_max + episode.query_max)


def _reader(config: Config, manifest: Manifest, workers: Workers) -> tuple[Part, ...]:
    schema = manifest.schema_
    item = sum(_bytes_of(f) for f in schema.of(Level.ITEM)) + 9  # `new`, and its training events
    event = 16 + sum(_bytes_of(f) for f in schema.of(Level.EVENT))  # item, label and time
    groups = [tasks for shard in manifest.of(Split.TRAIN) for tasks in shard.row_groups]
    tasks = max(1, manifest.tasks.get(Split.TRAIN, 0))
    of_group = max(groups, default=0) * manifest.events.get(Split.TRAIN, 0) / tasks * event
    lanes = -(-config.data.lanes // (workers.count * config.data.first_readers))
    open_groups = min(lanes * config.data.shuffle_row_groups, len(groups))
    return (
        Part("process", READER_PROCESS, "Python, Arrow and Ray, measured"),
        Part("catalogue", manifest.items * item, f"{manifest.items:,} {manifest.catalogued}s × {item} B"),
        Part(
            "row groups",
            int(open_groups * of_group * _COPIES_OF_EVENTS),
            f"{open_groups} open × {size(of_group)} × {_COPIES_OF_EVENTS}",
            surely=False,
        ),
    )


def _bytes_of(feature: Feature) -> int:
    if feature.kind is Kind.VECTOR:
        return 4 * int(feature.width or 0)
    return 16 if feature.kind is Kind.MULTI else 4  # some ids and their offsets
