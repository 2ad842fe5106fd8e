"""What a run is, in words: configuration, dataset, sharding plan, versions; and what tells it from other runs."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from metatrain import __version__
from metatrain.config import Config, to_yaml
from metatrain.data.dataset import TaskDataset
from metatrain.data.quarantine import read_quarantine
from metatrain.model.sharding import Distributed
from metatrain.observe.tensorboard import Board

GUIDE = """The tab **Custom scalars** asks three questions, with the charts that answer each.

1. *Does it learn?* The query loss **after** adaptation falls, and stays below the loss **before**: their distance is
what adaptation is worth. It grows with the number of support events. Validation follows training.
2. *Is it healthy?* Norms settle, few steps are clipped, few tasks are skipped.
3. *How fast, and what holds it back?* The greatest share of the time says where to look first.

The other tabs: **Scalars**, all curves. **Histograms** and **Distributions**, the gain of single tasks. **HParams**,
this run beside others. **Projector**, the items as the model sees them. docs/watching.md says what each curve means."""

#: Always shown in the tab "HParams", default or not; of the rest of model, meta and train what was changed.
_SHOWN = (
    "meta.algorithm",
    "meta.loss",
    "model.learner",
    "data.tasks_per_step",
    "train.epochs",
    "train.seed",
    "train.workers",
    "train.optimizer.rate",
    "train.optimizer.table",
    "train.optimizer.table_rate",
    "train.optimizer.table_decay",
)
#: Where things are and how often they are written: nothing that a run's result depends on.
_PLACES = ("data.dataset", "train.checkpoint", "train.log_every")


def write_texts(board: Board, config: Config, dataset: TaskDataset, distributed: Distributed) -> None:
    """Writes a guide, configuration, dataset, quarantined shards, sharding plan and versions as Markdown."""
    board.text("1 guide", GUIDE)
    board.text("2 configuration", f"```yaml\n{to_yaml(config)}```")
    board.text("3 dataset", _dataset(dataset))
    if (quarantine := read_quarantine(config.run_url, dataset)).shards:
        board.text("3 quarantined shards", quarantine.markdown())
    board.text("4 sharding plan", _plan(distributed))
    packages = ("torch", "torchrec", "ray", "pyarrow")
    board.text(
        "5 versions", "\n".join([f"- metatrain {__version__}", *(f"- {name} {version(name)}" for name in packages)])
    )


def settings(config: Config, dataset: TaskDataset) -> dict[str, bool | int | float | str]:
    """What tells runs from one another, flat, by field name: the main settings, and all others that were changed."""
    given, default = (
        _flat(c.model_dump(mode="json", include={"data", "model", "meta", "train"})) for c in (config, Config())
    )
    if isinstance(workers := config.train.workers, tuple):
        given = {name: value for name, value in given.items() if not name.startswith("train.workers.")}
        given["train.workers"] = "{} to {}".format(*workers)
    found = {"dataset": dataset.manifest.name}
    found |= {name: given[name] for name in _SHOWN}
    changed = {name for name, value in given.items() if value != default.get(name)}
    found |= {
        name: given[name] for name in sorted(changed) if not name.startswith(("data.dataset", "train.checkpoint"))
    }
    return {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in found.items()}


def _dataset(dataset: TaskDataset) -> str:
    manifest = dataset.manifest
    rows = [
        f"| {split.value} | {manifest.tasks.get(split, 0):,} | {events:,} |"
        for split, events in manifest.events.items()
    ]
    table = "\n".join([f"| split | {manifest.task}s | events |", "|---|--:|--:|", *rows])
    features = "\n".join(
        ["| feature | level | kind | ids | width |", "|---|---|---|--:|--:|"]
        + [
            f"| {f.name} | {f.level.value} | {f.kind.value} | {f'{f.rows:,}' if f.rows else ''} | {f.width or ''} |"
            for f in manifest.schema_.features
        ]
    )
    new = f", {manifest.new_items:,} of them held out as new" if manifest.new_items else ""
    return (
        f"**{manifest.name}**: {manifest.items:,} {manifest.catalogued}s{new}; fingerprint "
        f"`{manifest.fingerprint[:12]}`, at `{dataset.url}`\n\n{table}\n\n{features}"
    )


def _plan(distributed: Distributed) -> str:
    plan = distributed.plan
    return f"{plan.markdown()}\n\nOver {plan.workers.count} workers." if plan.tables else "No table."


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}" if name else key).items()}
    return {name: value}
