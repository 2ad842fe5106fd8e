"""Checkpoints: format, save, load, retention. Used by training, evaluation and recommendation alike."""

from metatrain.checkpoint.format import MODEL, Cursor, Marker, best_step, committed_steps, read_marker
from metatrain.checkpoint.load import Loaded, load_checkpoint, load_for_inference, open_checkpoint, read_tensors
from metatrain.checkpoint.save import Saved, Saver

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
