"""Checkpoints: format, save, load, retention. Used by training, evaluation and recommendation alike.

What is named here is imported when it is first asked for: who looks at markers alone should not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metatrain.checkpoint.format import MODEL, Cursor, Marker, best_step, committed_steps, read_marker
    from metatrain.checkpoint.load import Loaded, load_checkpoint, load_for_inference, open_checkpoint, read_tensors
    from metatrain.checkpoint.save import Saved, Saver

_ROOMS = {
    "format": ("MODEL", "Cursor", "Marker", "best_step", "committed_steps", "read_marker"),
    "load": ("Loaded", "load_checkpoint", "load_for_inference", "open_checkpoint", "read_tensors"),
    "save": ("Saved", "Saver"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "MODEL",
    "Cursor",
    "Loaded",
    "Marker",
    "Saved",
    "Saver",
    "best_step",
    "committed_steps",
    "load_checkpoint",
    "load_for_inference",
    "open_checkpoint",
    "read_marker",
    "read_tensors",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    return found
