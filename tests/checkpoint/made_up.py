"""Checkpoints for tests, without a run: by hand, and by the same writer that a run has."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner

from metatrain import storage
from metatrain.checkpoint import format as layout
from metatrain.checkpoint.blocks import BLOCK
from metatrain.checkpoint.contents import CONTENTS, Contents
from metatrain.checkpoint.format import checksum
from metatrain.checkpoint.staging import Buffers
from metatrain.checkpoint.writer import Writer


def _fields(run: str, step: int, base: int | None, metrics: dict[str, float]) -> dict[str, Any]:
    below = None if base is None else layout.Base(step=base, contents=layout.read_marker(run, base).contents, number=1)
    return {
        "release": "0",
        "cursor": layout.Cursor(epoch=0, step=step, total=step),
        "identity": {},
        "loop": {},
        "configuration": {},
        "metrics": metrics,
        "world_size": 1,
        "base": below,
    }


def commit(run: str, step: int, base: int | None = None, age_hours: float = 0.0, **metrics: float) -> None:
    """Commits a checkpoint without tensors, differential over `base` where that is given."""
    url = layout.checkpoint_url(run, step)
    contents = Contents(block=BLOCK, tensors={}).model_dump_json().encode()
    storage.write_atomic(storage.join(url, CONTENTS), contents)
    marker = layout.Marker(
        **_fields(run, step, base, metrics),
        version=layout.VERSION,
        contents=checksum(contents),
        bytes=0,
        time=time.time() - 3600 * age_hours,
    )
    storage.write_atomic(storage.join(url, layout.MARKER), marker.as_json())


def save(
    run: str,
    step: int,
    state: dict[str, Tensor],
    base: int | None = None,
    touched: Mapping[str, Tensor] | None = None,
    **metrics: float,
) -> None:
    """Saves tensors, without a process group; of those in `touched`, some rows."""
    staged = Buffers(state).stage(state, touched or {}, {})
    writer = Writer(run, staged, _fields(run, step, base, metrics), rank=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
