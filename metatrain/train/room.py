"""Room on the disk for checkpoints: told when a run starts, and looked for before each, which it might else cut off."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from metatrain import storage
from metatrain.errors import StorageError


def checkpoint_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes of a full checkpoint of tensors that are whole or sharded over ranks."""
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in state.values())


def warning(run_url: str, needed: int, keep: int) -> str | None:
    """What to say where the disk cannot take all the checkpoints that a run keeps at once; None where it can.

    Args:
        run_url: The run's folder.
        needed: Bytes of a full checkpoint.
        keep: Newest checkpoints kept. The best is kept besides, and a new one is whole before an old one goes.
    """
    free = storage.free_bytes(run_url)
    if free is None or free >= (keep + 2) * needed:
        return None
    return (
        f"the disk of {run_url} has {_size(free)} free; its checkpoints may come to {keep + 2} × {_size(needed)}: "
        "make room, or lower train.checkpoint.keep"
    )


def check(run_url: str, needed: int) -> None:
    """Looks for room before a checkpoint is begun.

    Raises:
        StorageError: The disk has less than `needed` bytes.
    """
    free = storage.free_bytes(run_url)
    if free is not None and free < needed:
        raise StorageError(
            "The disk has no room for the next checkpoint.",
            where=run_url,
            got=f"{_size(needed)} needed, {_size(free)} free",
            remedy="Make room or lower `train.checkpoint.keep`; the same command goes on from the last checkpoint.",
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
