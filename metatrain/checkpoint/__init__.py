"""Checkpoints: format, save, load, retention. Used by training, evaluation and recommendation alike."""

from metatrain.checkpoint.format import Cursor, Marker, best_step, committed_steps, read_marker
from metatrain.checkpoint.load import MODEL, Loaded, load_checkpoint, load_for_inference, read_tensors
from metatrain.checkpoint.save import save_checkpoint

__all__ = [
    "MODEL",
    "Cursor",
    "Loaded",
    "Marker",
    "best_step",
    "committed_steps",
    "load_checkpoint",
    "load_for_inference",
    "read_marker",
    "read_tensors",
    "save_checkpoint",
]
