"""A table that no worker holds whole is planned, trained, checkpointed, gone on with, and evaluated."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import ray

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import big_table

from metatrain.data.prepare import prepare
from metatrain.errors import ConfigError
from metatrain.train.launch import launch


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(600)  # two starts of Ray Train, on a machine that may be busy
def test_a_table_larger_than_a_worker_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Ray's workers, which were started elsewhere, cannot import the tool.
    ray.cloudpickle.register_pickle_by_value(big_table)
    rows, width, workers = 30_000, 8, 2
    found = big_table.run(str(tmp_path), rows, width, workers, users=200, steps=4)
    assert found["first_steps"] == found["resumed_steps"] == 4
    assert found["partitions_evaluated"]
    # The page's rows and their sums, once on disk: nothing of it twice, nothing left out.
    assert 0 < found["checkpoint_bytes"] - rows * (width + 1) * 4 < 400_000
    said = capsys.readouterr().out
    assert f"page {rows:,} × {width} × 4 B / {workers}" in said
    assert "row_wise" in said


def test_a_table_that_no_machine_holds_is_refused_before_anything_starts(tmp_path: Path) -> None:
    rows = 2_000_000_000
    config = big_table.recipe(str(tmp_path), rows, 128, 4, steps=4)
    big_table.write_log(tmp_path / "log.parquet", users=50, events=20)
    prepare(config.prepare, config.data.dataset, progress=False)
    with pytest.raises(ConfigError, match="cannot fit into the memory of this machine: 4 worker") as refused:
        launch(config)
    assert "page 2,000,000,000 × 128 × 4 B / 4" in str(refused.value)
    assert not (tmp_path / "runs").exists()
