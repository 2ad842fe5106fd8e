"""Laps: every moment belongs to one stage, however often the sums are asked for."""

from __future__ import annotations

import time

import pytest

from metatrain.observe import laps as module
from metatrain.observe.laps import STAGES, Laps


@pytest.mark.parametrize("kept", [2, 4096])
def test_stages_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr(module, "_MARKS_KEPT", kept)
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    laps = Laps()
    for stage in ("wait", "lookup", "lookup", "rest"):
        laps.lap(stage)
    first = laps.take()
    assert first == {**dict.fromkeys(STAGES, 0.0), "wait": 1.0, "lookup": 2.0, "rest": 1.0}
    laps.lap("backward")
    assert laps.take() == {**dict.fromkeys(STAGES, 0.0), "backward": 1.0}, "the time between the calls is not lost"
