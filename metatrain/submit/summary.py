"""What a run will take of a cluster, in a few lines, before it is submitted."""

from __future__ import annotations

from metatrain.checkpoint import committed_steps
from metatrain.config import Config
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import Split
from metatrain.data.stream import READER_CPUS
from metatrain.model.features import Featurizer
from metatrain.model.tables import TableSpec
from metatrain.submit.checks import node_paths
from metatrain.train.session import cpus_of

_MIB = 1024**2
#: Bytes of optimizer state a row of a table, by its width.
_STATE = {"sgd": lambda width: 0, "rowwise_adagrad": lambda width: 4, "adagrad": lambda width: 4 * width}


def summary(config: Config) -> str:
    """Where the run stands, what it reads, its resources, and memory and tables of a worker."""
    dataset, train, readers = TaskDataset.open(config.data.dataset), config.train, config.data.readers_per_worker
    least, most = train.least_workers, train.most_workers
    steps = committed_steps(config.run_url)
    tasks = dataset.manifest.tasks.get(Split.TRAIN, 0)
    events = dataset.manifest.events.get(Split.TRAIN, 0)
    workers = f"{least}" if least == most else f"{least} to {most}"
    cpus = f"at least {cpus_of(config)} CPUs" + (f", {least} GPUs" if train.gpus else "")
    lines = [
        f"run        {config.run_url}" + (f", goes on from step {steps[-1]}" if steps else ", new"),
        f"dataset    {dataset.url}: {tasks:,} training {dataset.manifest.task}s, {events:,} events",
        f"resources  {workers} workers × (1 CPU + {readers} readers × {READER_CPUS:g} CPU): {cpus}",
        *_memory(config, dataset),
    ]
    if local := node_paths(config):
        lines.append(f"note       every node must see {' and '.join(local)} by this path (a shared disk)")
    return "\n".join(lines)


def table_bytes(config: Config) -> int:
    """Bytes of a worker's tables, with their optimizer's state."""
    return sum(taken for _, _, taken in _tables(config, TaskDataset.open(config.data.dataset)))


def _tables(config: Config, dataset: TaskDataset) -> list[tuple[TableSpec, int, int]]:
    """Each table with a worker's rows of it and their bytes, the largest first."""
    specs = Featurizer(dataset.schema, config.model, config.meta.adapt_rows).table_specs()
    state = _STATE[config.train.optimizer.table]
    mine = [(spec, -(-spec.rows // config.train.least_workers)) for spec in specs]
    tables = [(spec, rows, rows * (4 * spec.width + state(spec.width))) for spec, rows in mine]
    return sorted(tables, key=lambda table: -table[2])


def _memory(config: Config, dataset: TaskDataset) -> list[str]:
    """A worker's tables, which are sharded by rows, and its inner loop."""
    tables = _tables(config, dataset)
    total = sum(taken for _, _, taken in tables) / _MIB
    return [
        f"memory     a worker: tables {total:,.1f} MiB + inner loop {config.meta.memory:,} MiB",
        f"tables     {'by rows':<24} {'rows × width':>19} {'a worker':>12} {'memory':>14}",
        *(
            f"           {spec.name:<24} {spec.rows:>12,} × {spec.width:<4} {rows:>12,} {taken / _MIB:>10,.1f} MiB"
            for spec, rows, taken in tables
        ),
    ]
