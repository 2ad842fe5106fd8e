"""Room on the disk: what a checkpoint needs, what is said at the start, what refuses to begin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metatrain import storage
from metatrain.errors import StorageError
from metatrain.train import room


def test_a_checkpoint_takes_the_bytes_of_its_tensors() -> None:
    assert room.checkpoint_bytes({"a": torch.zeros(3, 4), "b": torch.zeros((), dtype=torch.float64)}) == 56


def test_too_little_room_is_said_at_the_start_and_refused_before_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(tmp_path / "run")
    monkeypatch.setattr(storage, "free_bytes", lambda url: 50_000_000)
    assert room.warning(run, 10_000_000, keep=3) is None
    told = room.warning(run, 10_000_001, keep=3)
    assert told is not None
    assert "0.05 GB free" in told
    assert "5 × 0.01 GB" in told
    room.check(run, 50_000_000)
    with pytest.raises(StorageError, match="no room for the next checkpoint") as caught:
        room.check(run, 60_000_000)
    assert "0.06 GB needed, 0.05 GB free" in str(caught.value)
    assert caught.value.remedy


def test_an_object_store_has_room() -> None:
    assert room.warning("memory://bucket/run", 10**15, keep=9) is None
    room.check("memory://bucket/run", 10**15)
