"""What must be equal for a run to go on: the same model, plan and optimizers over the same dataset."""

from __future__ import annotations

from typing import Any

from metatrain.config import Config
from metatrain.errors import CheckpointError


def identity(config: Config, dataset_fingerprint: str) -> dict[str, Any]:
    """The part of a configuration that a resumed run may not change, flat, by field name.

    Workers, readers, paths and the times of checkpoints may change; epochs may where no rate depends on them.
    """
    whole = config.model_dump(mode="json")
    parts: dict[str, Any] = {
        "model": {k: v for k, v in whole["model"].items() if k != "dedup"},
        "meta": {k: v for k, v in whole["meta"].items() if k not in ("chunk", "engine")},
        "data": {k: whole["data"][k] for k in ("episode", "tasks_per_step", "lanes", "shuffle_row_groups")},
        "train": {k: whole["train"][k] for k in ("optimizer", "seed", "precision", "validate_every")},
        "evaluate": {"episode": whole["evaluate"]["episode"]},
        "dataset": dataset_fingerprint,
    }
    if config.train.optimizer.schedule != "constant":
        parts["train"] |= {"epochs": config.train.epochs, "max_steps": config.train.max_steps}
    return _flat(parts, "")


def check_identity(saved: dict[str, Any], current: dict[str, Any], where: str) -> None:
    """Refuses to go on from a checkpoint of another model or plan.

    Raises:
        CheckpointError: Names every field that differs, with both values.
    """
    names = sorted(saved.keys() | current.keys())
    differing = [n for n in names if saved.get(n) != current.get(n)]
    if differing:
        shown = "; ".join(f"{n}: was {saved.get(n)!r}, is {current.get(n)!r}" for n in differing[:8])
        raise CheckpointError(
            "The run's checkpoint is of another model or plan than this configuration.",
            where=where,
            got=shown + (f"; and {len(differing) - 8} more" if len(differing) > 8 else ""),
            remedy="Give the new configuration another `run.name`, or restore the values that differ.",
        )


def _flat(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}" if name else key).items()}
    return {name: value}
