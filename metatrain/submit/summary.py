"""What a run will take of a cluster, in a few lines, before it is submitted."""

from __future__ import annotations

from metatrain.checkpoint import committed_steps
from metatrain.config import Config
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import Split
from metatrain.data.stream import READER_CPUS
from metatrain.model.table_plan import Workers
from metatrain.submit.checks import node_paths
from metatrain.train.footprint import Footprint, footprint
from metatrain.train.session import cpus_of


def summary(config: Config) -> str:
    """Where the run stands, what it reads, its resources, and memory and tables of a worker."""
    dataset, train, readers = TaskDataset.open(config.data.dataset), config.train, config.data.first_readers
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
    """Bytes that a worker's tables take of its node: rows, optimizer state, and both once more for checkpoints."""
    counted = _footprint(config, TaskDataset.open(config.data.dataset))
    return sum(part.bytes for part in counted.worker if part.surely and part.name != "process")


def _footprint(config: Config, dataset: TaskDataset) -> Footprint:
    workers = Workers(config.train.least_workers, 1, device="cuda" if config.train.gpus else "cpu")
    return footprint(config, dataset.manifest, workers)


def _memory(config: Config, dataset: TaskDataset) -> list[str]:
    """What a worker and its reader hold, and where the tables lie."""
    counted = _footprint(config, dataset)
    return [*_under("memory", counted.text()), *_under("tables", counted.plan.text())]


def _under(title: str, text: str) -> list[str]:
    return [f"{title if not i else '':<10} {line}" for i, line in enumerate(text.splitlines())]
