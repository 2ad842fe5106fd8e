"""The texts of a run in TensorBoard: its resolved configuration, its dataset, the versions."""

from __future__ import annotations

from importlib.metadata import version

from metatrain import __version__
from metatrain.config import Config, to_yaml
from metatrain.data.dataset import TaskDataset
from metatrain.observe.tensorboard import Board


def write_texts(board: Board, config: Config, dataset: TaskDataset) -> None:
    """Writes configuration, dataset and versions as Markdown."""
    board.text("configuration", f"```yaml\n{to_yaml(config)}```")
    manifest = dataset.manifest
    rows = [
        f"| {split.value} | {manifest.tasks.get(split, 0):,} | {events:,} |"
        for split, events in manifest.events.items()
    ]
    features = ", ".join(f"{f.name} ({f.level.value}, {f.kind.value})" for f in manifest.schema_.features)
    table = "\n".join(["| split | tasks | events |", "|---|---|---|", *rows])
    board.text("dataset", f"**{manifest.name}**, {manifest.items:,} items\n\n{table}\n\nFeatures: {features}")
    packages = ("torch", "torchrec", "ray", "pyarrow")
    board.text(
        "versions", "\n".join([f"- metatrain {__version__}", *(f"- {name} {version(name)}" for name in packages)])
    )
