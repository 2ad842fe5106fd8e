"""What must be equal for a run to go on: the same model, plan and optimizers over the same dataset.

To score with a checkpoint less must be equal: the model, the meta-learner and the dataset.
"""

from __future__ import annotations

from typing import Any

from metatrain.config import Config
from metatrain.errors import CheckpointError
from metatrain.model.construct import placeless_name


def identity(config: Config, dataset_fingerprint: str) -> dict[str, Any]:
    """The part of a configuration that a resumed run may not change, flat, by field name.

    Workers, readers, paths, where tables lie and the times of checkpoints may change; epochs may where no rate depends
    on them. A learner in a file of the user's is known by the names of file and class, wherever the file lies.
    """
    whole = config.model_dump(mode="json")
    parts: dict[str, Any] = {
        "model": {k: v for k, v in whole["model"].items() if k not in ("dedup", "tables")},
        "meta": {k: v for k, v in whole["meta"].items() if k not in ("chunk", "engine", "memory", "checkpoint_steps")},
        "data": {k: whole["data"][k] for k in ("episode", "tasks_per_step", "lanes", "shuffle_row_groups")},
        "train": {k: whole["train"][k] for k in ("optimizer", "seed", "precision", "validate_every")},
        "evaluate": {k: whole["evaluate"][k] for k in ("episode", "seed")},
        "dataset": dataset_fingerprint,
    }
    if config.train.optimizer.schedule != "constant":
        parts["train"] |= {"epochs": config.train.epochs, "max_steps": config.train.max_steps}
    parts["model"]["learner"] = placeless_name(config.model.learner)
    parts["meta"]["algorithm"] = placeless_name(config.meta.algorithm)
    return flat(parts, "")


def check_identity(saved: dict[str, Any], current: dict[str, Any], where: str) -> None:
    """Refuses to go on from a checkpoint of another model or plan.

    Raises:
        CheckpointError: Names every field that differs, with both values.
    """
    _refuse(
        saved,
        current,
        "The run's checkpoint is of another model or plan than this configuration.",
        where,
        "Give the new configuration another `run.name`, or restore the values that differ.",
    )


def check_begun(saved: dict[str, Any], current: dict[str, Any], where: str) -> None:
    """Refuses to take the name of a run that was begun with another model or plan and has no checkpoint yet.

    Raises:
        CheckpointError: Names every field that differs, with both values.
    """
    _refuse(
        saved,
        current,
        "A run of this name was begun with another model or plan than this configuration.",
        where,
        "Give the new configuration another `run.name`, or restore the values that differ. It has no checkpoint yet: "
        "unless it is being trained (`metatrain status` tells), deleting this file loses nothing.",
    )


def check_scoring(saved: dict[str, Any], current: dict[str, Any], where: str) -> None:
    """Refuses to score with a checkpoint of another model, meta-learner or dataset; how it was trained is not asked.

    Raises:
        CheckpointError: Names every field that differs, with both values.
    """
    # The inner rule is no tensor: a state dict fits whatever `meta.steps` or `model.activation` say.
    saved, current = (
        {name: v for name, v in identity.items() if name == "dataset" or name.startswith(("model.", "meta."))}
        for identity in (saved, current)
    )
    _refuse(
        saved,
        current,
        "The configuration does not fit the run's checkpoint: it describes another model than was trained.",
        where,
        "Restore these fields, or train a run of another `run.name` with them.",
    )


def _refuse(saved: dict[str, Any], current: dict[str, Any], what: str, where: str, remedy: str) -> None:
    """Raises a `CheckpointError` that says what differs, where anything does."""
    if shown := _differing(saved, current):
        raise CheckpointError(what, where=where, got=shown, remedy=remedy)


def _differing(saved: dict[str, Any], current: dict[str, Any]) -> str:
    """The fields that differ, with both values, in words; empty where none does."""
    # What a release before this one did not know of it did by default.
    defaults = {name: v for name, v in identity(Config(), "").items() if name in current and name != "dataset"}
    saved = defaults | saved
    differing = [n for n in sorted(saved.keys() | current.keys()) if saved.get(n) != current.get(n)]
    shown = "; ".join(f"{n}: was {saved.get(n)!r}, is {current.get(n)!r}" for n in differing[:8])
    return shown + (f"; and {len(differing) - 8} more" if len(differing) > 8 else "")


def flat(value: Any, name: str) -> dict[str, Any]:
    """Nested mappings as one, by dotted names that begin with `name`."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}.{key}" if name else key).items()}
    return {name: value}
