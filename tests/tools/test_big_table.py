"""A table that no worker holds whole is planned, trained, checkpointed, gone on with, and evaluated."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import big_table


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(300)
def test_a_table_larger_than_a_worker_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, width, workers = 30_000, 8, 2
    found = big_table.run(str(tmp_path), rows, width, workers, users=200, steps=4)
    assert found["first_steps"] == found["resumed_steps"] == 4
    assert found["partitions_evaluated"]
    # The page's rows and their sums, once on disk: nothing of it twice, nothing left out.
    assert 0 < found["checkpoint_bytes"] - rows * (width + 1) * 4 < 400_000
    said = capsys.readouterr().out
    assert f"page {rows:,} × {width} × 4 B / {workers}" in said
    assert "row_wise" in said
