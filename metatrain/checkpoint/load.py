"""Reading a checkpoint: into a run at any world size, or without a process group for evaluation and recommendation."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from metatrain.checkpoint.format import Marker, best_step, checkpoint_url, read_marker
from metatrain.config import Config, validated
from metatrain.errors import CheckpointError

#: Prefix of the model's tensors in a checkpoint's state.
MODEL = "model."


def load_checkpoint(run_url: str, step: int, state: dict[str, Any]) -> Marker:
    """Fills the tensors of `state` in place from the checkpoint of `step`. Collective over the default process group.

    Raises:
        CheckpointError: The checkpoint is missing, or is of another model: names or shapes differ.
    """
    marker = read_marker(run_url, step)
    url = checkpoint_url(run_url, step)
    reader = FsspecReader(url)
    _check_shapes(reader, state, url)
    try:
        dcp.load(state, storage_reader=reader)
    except (CheckpointException, RuntimeError, ValueError, OSError) as error:
        raise _unreadable(url, error) from error
    return marker


@dataclass(frozen=True)
class Loaded:
    """A trained model for use without a cluster."""

    config: Config
    state: dict[str, torch.Tensor]  # of the unsharded model, by its own names
    marker: Marker
    step: int


def load_for_inference(run_url: str, step: int | None = None) -> Loaded:
    """The run's best checkpoint (or the one of `step`) as plain tensors, without a process group.

    Raises:
        CheckpointError: The run has no whole checkpoint, or it cannot be read.
    """
    step = best_step(run_url) if step is None else step
    marker = read_marker(run_url, step)
    state = read_tensors(run_url, step, MODEL)
    config = validated(marker.configuration, where=checkpoint_url(run_url, step))
    return Loaded(config, {name.removeprefix(MODEL): tensor for name, tensor in state.items()}, marker, step)


def read_tensors(run_url: str, step: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """A checkpoint's tensors whose names begin with `prefix`, whole, without a process group.

    Raises:
        CheckpointError: The checkpoint cannot be read.
    """
    url = checkpoint_url(run_url, step)
    reader = FsspecReader(url)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in _metadata(reader, url).items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    try:
        with warnings.catch_warnings():
            # Without a process group is what is meant here.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            dcp.load(state, storage_reader=reader, no_dist=True)
    except (CheckpointException, RuntimeError, ValueError, OSError) as error:
        raise _unreadable(url, error) from error
    return state


def _metadata(reader: FsspecReader, url: str) -> dict[str, Any]:
    try:
        return reader.read_metadata().state_dict_metadata
    except Exception as error:  # the reader unpickles: a broken file raises anything
        raise _unreadable(url, error) from error


def _check_shapes(reader: FsspecReader, state: dict[str, Any], url: str) -> None:
    stored = _metadata(reader, url)
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) and not hasattr(value, "size"):
            continue
        entry = stored.get(name)
        size = tuple(value.size())
        if entry is None or tuple(entry.size) != size:
            raise CheckpointError(
                "The checkpoint is of another model.",
                where=f"{url}: {name}",
                got="not in it" if entry is None else f"shape {tuple(entry.size)}, this model's is {size}",
                remedy="Use the configuration that trained the run (its config.yaml), or another `run.name`.",
            )


def _unreadable(url: str, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint cannot be read: {type(error).__name__}: {error}",
        where=url,
        remedy="Delete its folder to go on from the checkpoint before it.",
    )
