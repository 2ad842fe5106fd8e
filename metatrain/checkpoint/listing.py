"""A run's checkpoints for people: what is there, whether it is whole, and how two of them differ."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from metatrain import storage
from metatrain.checkpoint.blocks import PartReader
from metatrain.checkpoint.format import checkpoint_url, committed_steps, folders
from metatrain.checkpoint.load import Stored, open_checkpoint
from metatrain.checkpoint.retention import readable_markers
from metatrain.errors import CheckpointError, StorageError


@dataclass(frozen=True)
class Listed:
    """One line of the list. What is not known of a broken checkpoint is None."""

    step: int
    #: Whether its marker is there.
    committed: bool = True
    epoch: int | None = None
    #: Step of the full checkpoint that it builds on; of a full one, its own.
    base: int | None = None
    bytes: int | None = None
    age_seconds: float | None = None
    validation_loss: float | None = None
    best: bool = False
    #: Why it cannot be loaded, empty where nothing is known against it.
    problem: str = ""

    @property
    def broken(self) -> bool:
        """Whether it should be whole and is not."""
        return self.committed and bool(self.problem)


def listed(run_url: str, verify: bool = False, progress: Callable[[int], object] | None = None) -> list[Listed]:
    """All checkpoints of a run, ascending; a folder without a marker too.

    Args:
        run_url: The run.
        verify: Read every byte and compare it with its checksum. Else: that files are there, and as long as they were.
        progress: Called with the bytes that were read since the last call.
    """
    markers, whole, now = readable_markers(run_url), set(committed_steps(run_url)), time.time()
    judged = [(loss, s) for s, marker in markers.items() if (loss := marker.metrics.get("validation_loss")) is not None]
    best = min(judged)[1] if judged else None
    lines: dict[int, Listed] = {}
    for step in folders(run_url):
        if step not in whole:
            lines[step] = Listed(step, committed=False, problem="no marker: left by a killed attempt, or being written")
            continue
        problem = _problem(run_url, step, verify, progress)
        if (marker := markers.get(step)) is None:
            lines[step] = Listed(step, problem=problem)
            continue
        lines[step] = Listed(
            step,
            epoch=marker.cursor.epoch,
            base=marker.base.step if marker.base else step,
            bytes=marker.bytes,
            age_seconds=max(0.0, now - marker.time),
            validation_loss=marker.metrics.get("validation_loss"),
            best=step == best,
            problem=problem,
        )
    for step, line in lines.items():
        below = lines.get(line.base) if line.base not in (None, step) else None
        if below is not None and below.problem and not line.problem:
            lines[step] = replace(line, problem=f"the full one of step {below.step} is broken")
    return list(lines.values())


def _problem(run_url: str, step: int, verify: bool, progress: Callable[[int], object] | None) -> str:
    try:
        stored = open_checkpoint(run_url, step)
        if verify:
            _check_bytes(stored, progress or (lambda count: None))
    except (CheckpointError, StorageError) as error:
        where = (error.where or "").removeprefix(checkpoint_url(run_url, step)).lstrip("/")
        return f"{error.what.removeprefix('The checkpoint is broken: ')} ({where})" if where else error.what
    return ""


def _check_bytes(stored: Stored, progress: Callable[[int], object]) -> None:
    chunks = [chunk for tensor in stored.contents.tensors.values() for chunk in tensor.chunks]
    for name in sorted({chunk.file for chunk in chunks}):
        with PartReader(storage.join(stored.url, name)) as file:
            parts = [part for chunk in chunks if chunk.file == name for part in chunk.parts()]
            for part in sorted(parts, key=lambda part: part.at):
                file.check(part)
                progress(part.bytes)


def table(lines: list[Listed]) -> str:
    """The list as text."""
    if not lines:
        return "no checkpoints"
    cells = [("step", "epoch", "kind", "size", "age", "validation loss", "", "state")]
    for line in lines:
        kind = "" if line.base is None else "full" if line.base == line.step else f"over {line.base}"
        loss = "" if line.validation_loss is None else f"{line.validation_loss:.4f}"
        epoch = "" if line.epoch is None else str(line.epoch)
        state = f"broken: {line.problem}" if line.broken else line.problem or "whole"
        best = "best" if line.best else ""
        cells.append((str(line.step), epoch, kind, size(line.bytes), _age(line.age_seconds), loss, best, state))
    widths = [max(len(row[n]) for row in cells) for n in range(len(cells[0]))]
    rows = []
    for row in cells:
        left = {2, 6, 7}
        aligned = [c.ljust(w) if n in left else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True))]
        rows.append("  ".join(aligned).rstrip())
    return "\n".join(rows)


def size(count: int | None) -> str:
    """Bytes, short."""
    if count is None:
        return ""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def _age(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, scale in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.0f} s"
