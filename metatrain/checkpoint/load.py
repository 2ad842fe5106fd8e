"""Reading a checkpoint: into a run at any world size, or without a process group for evaluation and recommendation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner

from metatrain import storage
from metatrain.checkpoint.contents import Contents, StoredTensor, dtype_name, read_contents
from metatrain.checkpoint.format import MODEL, Marker, best_step, checkpoint_url, folders, read_marker, removing
from metatrain.checkpoint.reader import Reader
from metatrain.checkpoint.retention import readable_markers
from metatrain.config import Config, validated
from metatrain.errors import CheckpointError


@dataclass(frozen=True)
class Stored:
    """A checkpoint's contents, and those of the full one that it builds on."""

    run_url: str
    step: int
    marker: Marker
    contents: Contents
    base: Contents | None

    @property
    def url(self) -> str:
        """Its folder."""
        return checkpoint_url(self.run_url, self.step)

    def layers(self, names: set[str]) -> list[tuple[str, Contents, set[str]]]:
        """What to read for these tensors, one after the other: a folder, its contents, names."""
        own = (self.url, self.contents, names)
        if self.base is None or self.marker.base is None:
            return [own]
        partial = {name for name in names if self.contents.tensors[name].partial}
        return [(checkpoint_url(self.run_url, self.marker.base.step), self.base, partial), own]


def open_checkpoint(run_url: str, step: int) -> Stored:
    """What the checkpoint of `step` holds; its files are looked at, not read.

    Raises:
        CheckpointError: It, or what it builds on, is missing or broken.
    """
    marker = read_marker(run_url, step)
    try:
        contents = _opened(checkpoint_url(run_url, step), marker)
        base = None
        if marker.base is not None:
            whole = read_marker(run_url, marker.base.step)
            where = checkpoint_url(run_url, marker.base.step)
            if whole.contents != marker.base.contents:
                raise CheckpointError(
                    f"The checkpoint of step {step} builds on another checkpoint of step {marker.base.step}.",
                    where=where,
                )
            base = _opened(where, whole)
        _check_fit(contents, base, checkpoint_url(run_url, step))
    except CheckpointError as error:
        raise _with_remedy(error, run_url, step) from error
    return Stored(run_url, step, marker, contents, base)


def load_checkpoint(
    run_url: str, step: int, state: dict[str, Any], touched: Mapping[str, Tensor] | None = None
) -> Marker:
    """Fills the tensors of `state` in place from the checkpoint of `step`. Collective over the default process group.

    Args:
        run_url: The run.
        step: Of the checkpoint.
        state: The tensors by name, sharded by rows or whole.
        touched: Of some tensors, bitmaps of this rank's rows: those that a differential checkpoint brought, and none
            but those, are marked.

    Raises:
        CheckpointError: The checkpoint is missing or broken, or is of another model: names or shapes differ.
    """
    stored = open_checkpoint(run_url, step)
    _check_shapes(stored, state)
    for bitmap in (touched or {}).values():
        bitmap.zero_()
    _load(stored, state, touched)
    return stored.marker


@dataclass(frozen=True)
class Loaded:
    """A trained model for use without a cluster."""

    config: Config
    state: dict[str, Tensor]  # of the unsharded model, by its own names
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


def read_tensors(run_url: str, step: int, prefix: str = "") -> dict[str, Tensor]:
    """A checkpoint's tensors whose names begin with `prefix`, whole, without a process group.

    Raises:
        CheckpointError: The checkpoint cannot be read.
    """
    stored = open_checkpoint(run_url, step)
    state: dict[str, Tensor] = {
        name: torch.empty(entry.size, dtype=entry.torch_dtype)
        for name, entry in stored.contents.tensors.items()
        if name.startswith(prefix)
    }
    _load(stored, state, None, no_dist=True)
    return state


def tensor_of(stored: Stored, name: str) -> Tensor:
    """One tensor of a checkpoint, whole, without a process group.

    Raises:
        CheckpointError: It cannot be read.
    """
    entry = stored.contents.tensors[name]
    state = {name: torch.empty(entry.size, dtype=entry.torch_dtype)}
    _load(stored, state, None, no_dist=True)
    return state[name]


def _load(stored: Stored, state: dict[str, Any], touched: Mapping[str, Tensor] | None, no_dist: bool = False) -> None:
    try:
        for url, contents, names in stored.layers(set(state)):
            if not names:
                continue
            part = {name: state[name] for name in sorted(names)}
            marked = touched if stored.base is not None and contents is stored.contents else None
            planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            with warnings.catch_warnings():
                # Without a process group is what is meant here.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
                dcp.load(part, storage_reader=Reader(url, contents, marked), planner=planner, no_dist=no_dist)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        ours = next((cause for cause in causes if isinstance(cause, CheckpointError)), None)
        if ours is None:
            raise CheckpointError(
                f"The checkpoint cannot be read: {type(causes[0]).__name__}: {causes[0]}", where=stored.url
            ) from causes[0]
        raise _with_remedy(ours, stored.run_url, stored.step) from error


def _opened(url: str, marker: Marker) -> Contents:
    """The contents of a checkpoint whose files are there, and as long as they were."""
    contents, sizes = read_contents(url, marker.contents), storage.file_sizes(url)
    for name, expected in contents.files().items():
        if sizes.get(name) != expected:
            got = f"has {sizes[name]} bytes in place of {expected}" if name in sizes else "is not there"
            raise CheckpointError(f"The checkpoint is broken: a file {got}.", where=storage.join(url, name))
    return contents


def _check_fit(contents: Contents, base: Contents | None, url: str) -> None:
    for name, tensor in contents.tensors.items():
        if not tensor.partial:
            continue
        below = base.tensors.get(name) if base else None
        if below is None or below.partial or (below.dtype, below.size) != (tensor.dtype, tensor.size):
            raise CheckpointError(
                f"The checkpoint is broken: tensor {name!r} does not fit the one that it builds on.", where=url
            )


def _check_shapes(stored: Stored, state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        entry: StoredTensor | None = stored.contents.tensors.get(name)
        expected = (dtype_name(value.dtype), tuple(value.shape))
        if entry is None or (entry.dtype, entry.size) != expected:
            found = "not in it" if entry is None else f"{entry.dtype}, shape {entry.size}"
            raise CheckpointError(
                "The checkpoint is of another model.",
                where=f"{stored.url}: {name}",
                got=f"{found}; this model's is {expected[0]}, shape {expected[1]}",
                remedy="Use the configuration that trained the run (its config.yaml), or another `run.name`.",
            )


def _with_remedy(error: CheckpointError, run_url: str, step: int) -> CheckpointError:
    """The same error, naming the command that goes on without the broken checkpoint and those that build on it."""
    markers = readable_markers(run_url)
    base = markers[step].base if step in markers else None
    root = base.step if base and checkpoint_url(run_url, base.step) in (error.where or "") else step
    broken = {root, *(other for other, marker in markers.items() if marker.base and marker.base.step == root)}
    return CheckpointError(
        error.what, where=error.where, got=error.got, remedy=removing(run_url, sorted(broken & set(folders(run_url))))
    )
