"""Writing a checkpoint: all ranks together, the marker last. After a kill at any point it is whole or doesn't count."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

from metatrain import __version__, storage
from metatrain.checkpoint.format import MARKER, VERSION, Cursor, Marker, checkpoint_url, prune
from metatrain.errors import CheckpointError


def save_checkpoint(
    run_url: str,
    state: dict[str, Any],
    *,
    cursor: Cursor,
    identity: dict[str, Any],
    loop: dict[str, Any],
    configuration: dict[str, Any],
    metrics: dict[str, float],
    keep: int,
) -> str:
    """Saves `state` (tensors, sharded or replicated, by name) from all ranks; returns the checkpoint's URL.

    Collective: every rank of the default process group calls it with its own part of `state`.

    Raises:
        CheckpointError: On rank 0, where this step's checkpoint is there already: someone else trains the same run.
    """
    url = checkpoint_url(run_url, cursor.total)
    rank = dist.get_rank()
    if rank == 0:
        if storage.exists(storage.join(url, MARKER)):
            raise CheckpointError(
                "This step's checkpoint is there already: another process trains the same run.",
                where=url,
                remedy="End one of the two, or give one another `run.name`.",
            )
        storage.remove(url)  # what an earlier, killed attempt left there
        storage.make_folder(url)
    dist.barrier()
    dcp.save(state, storage_writer=FsspecWriter(url, sync_files=True))
    if rank == 0:
        marker = Marker(
            version=VERSION,
            release=__version__,
            cursor=cursor,
            identity=identity,
            loop=loop,
            configuration=configuration,
            metrics=metrics,
            world_size=dist.get_world_size(),
        )
        storage.write_atomic(storage.join(url, MARKER), marker.model_dump_json(indent=1))
        prune(run_url, keep)
    dist.barrier()
    return url
