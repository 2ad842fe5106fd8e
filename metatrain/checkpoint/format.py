"""What a run's checkpoints look like on storage, which are whole, and which are kept. No torch needed to list them.

Layout::

    RUN/config.yaml                              the resolved configuration
    RUN/checkpoints/step-00000120/.metadata      written by torch.distributed.checkpoint, with its shards beside it
    RUN/checkpoints/step-00000120/COMMITTED.json written last: without it the folder is not a checkpoint
"""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from metatrain import storage
from metatrain.errors import CheckpointError

VERSION = 1
MARKER = "COMMITTED.json"
_NAME = re.compile(r"step-(\d+)$")


class Cursor(BaseModel):
    """Where training stands: `step` steps of epoch `epoch` are done, `total` steps in all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int = 0
    step: int = 0
    total: int = 0


class Marker(BaseModel):
    """What the commit marker says of its checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    release: str
    cursor: Cursor
    #: What must be equal for a run to go on from here: see `checkpoint.identity`.
    identity: dict[str, Any]
    #: State of the loop besides tensors: early stopping, best loss.
    loop: dict[str, Any]
    #: The resolved configuration.
    configuration: dict[str, Any]
    metrics: dict[str, float]
    world_size: int


def checkpoints_url(run_url: str) -> str:
    """Folder of a run's checkpoints."""
    return storage.join(run_url, "checkpoints")


def checkpoint_url(run_url: str, total: int) -> str:
    """Folder of the checkpoint after `total` steps."""
    return storage.join(checkpoints_url(run_url), f"step-{total:08d}")


def committed_steps(run_url: str) -> list[int]:
    """Steps of the run's whole checkpoints, ascending."""
    return [s for s in _folders(run_url) if storage.exists(storage.join(checkpoint_url(run_url, s), MARKER))]


def _folders(run_url: str) -> list[int]:
    names = storage.list_folder(checkpoints_url(run_url))
    return sorted(int(match[1]) for name in names if (match := _NAME.match(name)))


def read_marker(run_url: str, step: int) -> Marker:
    """The marker of a checkpoint.

    Raises:
        CheckpointError: No such checkpoint, or a marker of another version.
    """
    path = storage.join(checkpoint_url(run_url, step), MARKER)
    if not storage.exists(path):
        known = committed_steps(run_url)
        raise CheckpointError(
            "There is no such checkpoint.",
            where=path,
            got=str(step),
            remedy=f"Whole checkpoints of this run: {known}." if known else "Train the run first.",
        )
    try:
        raw = json.loads(storage.read_text(path))
        if raw.get("version") != VERSION:
            raise CheckpointError(
                f"The checkpoint is of another version; this release reads version {VERSION}.",
                where=path,
                got=raw.get("version"),
                remedy="Use the release that wrote it, or train again.",
            )
        return Marker.model_validate(raw)
    except (ValueError, ValidationError) as error:
        raise CheckpointError(
            f"The checkpoint's marker cannot be read: {error}", where=path, remedy="Delete this checkpoint's folder."
        ) from error


def best_step(run_url: str) -> int:
    """The whole checkpoint with the lowest validation loss; the newest where none was validated.

    Raises:
        CheckpointError: The run has no whole checkpoint.
    """
    steps = committed_steps(run_url)
    if not steps:
        raise CheckpointError(
            "The run has no checkpoint.",
            where=checkpoints_url(run_url),
            remedy="Train it with `metatrain train CONFIG`, or check the run's name and storage.",
        )
    losses = {step: read_marker(run_url, step).metrics.get("validation_loss") for step in steps}
    judged = [(loss, step) for step, loss in losses.items() if loss is not None]
    return min(judged)[1] if judged else steps[-1]


def prune(run_url: str, keep: int) -> list[int]:
    """Removes all whole checkpoints but the newest `keep` and the best, markers first. Returns the removed steps.

    What killed attempts left below the newest whole checkpoint goes too.
    """
    steps = committed_steps(run_url)
    for step in _folders(run_url):
        if steps and step < steps[-1] and step not in steps:
            storage.remove(checkpoint_url(run_url, step))
    kept = {*steps[-keep:], best_step(run_url)} if steps else set()
    removed = [step for step in steps if step not in kept]
    for step in removed:
        # The marker goes first: a kill in between leaves a folder that doesn't count as a checkpoint.
        storage.remove(storage.join(checkpoint_url(run_url, step), MARKER))
        storage.remove(checkpoint_url(run_url, step))
    return removed
