"""What a run's checkpoints look like on storage, which are whole, and which is the best.

Layout::

    RUN/config.yaml                              the resolved configuration
    RUN/checkpoints/step-00000120/0-5f3a9c01.bin what rank 0 wrote; the number behind is of the attempt
    RUN/checkpoints/step-00000120/contents.json  which tensor is where in these files, with checksums
    RUN/checkpoints/step-00000120/COMMITTED.json written last: without it the folder is not a checkpoint
"""

from __future__ import annotations

import json
import re
from typing import Any

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from metatrain import storage
from metatrain.errors import CheckpointError

VERSION = 2
MARKER = "COMMITTED.json"
#: Prefix of the model's tensors in a checkpoint; the others are optimizers'.
MODEL = "model."
_NAME = re.compile(r"step-(\d+)$")


class Cursor(BaseModel):
    """Where training stands: `step` steps of epoch `epoch` are done, `total` steps in all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int = 0
    step: int = 0
    total: int = 0


class Base(BaseModel):
    """The full checkpoint that a differential one builds on: all but the rows touched since is there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    #: The checksum of the base's `contents.json`: another checkpoint of the same step will not do.
    contents: str
    #: Which differential checkpoint over this base it is, from 1.
    number: int


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
    #: Checksum of `contents.json`, which has those of all other files.
    contents: str
    #: None: a full checkpoint.
    base: Base | None = None
    #: Size of its data files.
    bytes: int
    #: When it was committed, in seconds since 1970.
    time: float

    def as_json(self) -> str:
        """The marker's text, with a checksum of all that it says."""
        said = self.model_dump(mode="json")
        return json.dumps(said | {"checksum": _checksum(said)}, indent=1)


def checksum(data: bytes | memoryview) -> str:
    """The checksum of a block, or of a small file."""
    return xxhash.xxh3_64_hexdigest(data)


def _checksum(said: dict[str, Any]) -> str:
    return checksum(json.dumps(said, sort_keys=True).encode())


def checkpoints_url(run_url: str) -> str:
    """Folder of a run's checkpoints."""
    return storage.join(run_url, "checkpoints")


def checkpoint_url(run_url: str, total: int) -> str:
    """Folder of the checkpoint after `total` steps."""
    return storage.join(checkpoints_url(run_url), f"step-{total:08d}")


def committed_steps(run_url: str) -> list[int]:
    """Steps of the run's whole checkpoints, ascending."""
    return [s for s in folders(run_url) if storage.exists(storage.join(checkpoint_url(run_url, s), MARKER))]


def folders(run_url: str) -> list[int]:
    """Steps that have a folder, whole or not, ascending."""
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
        raw = json.loads(storage.read_bytes(path))
        if not isinstance(raw, dict):
            raise ValueError("it is no JSON object")
        if raw.get("version") != VERSION:
            raise CheckpointError(
                f"The checkpoint is of another version; this release reads version {VERSION}.",
                where=path,
                got=raw.get("version"),
                # Version 1 had pickled metadata, and pickles run code: there is no reading it.
                remedy="Use the release that wrote it (its `release` in this file), or train again under another "
                "`run.name`.",
            )
        if raw.pop("checksum", None) != _checksum(raw):
            raise ValueError("it does not match its own checksum")
        return Marker.model_validate(raw)
    except (ValueError, ValidationError, RecursionError) as error:
        raise CheckpointError(
            f"The checkpoint's marker cannot be read: {error}", where=path, remedy=removing(run_url, [step])
        ) from error


def removing(run_url: str, steps: list[int]) -> str:
    """What to do about broken checkpoints, in words."""
    kept = [step for step in committed_steps(run_url) if step not in steps]
    before = [step for step in kept if step < min(steps)]
    goes_on = f"from step {before[-1]}" if before else "from the beginning"
    numbers = " ".join(str(step) for step in steps)
    return (
        f"`metatrain checkpoints {run_url} --remove {numbers}` removes what is broken; "
        f"the same `train` command then goes on {goes_on}."
    )


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
