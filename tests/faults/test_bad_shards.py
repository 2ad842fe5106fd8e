"""A shard that goes bad in mid-run: the run goes on without it from its last checkpoint.

tests/train/test_quarantined_training.py shows without Ray that this can be done again, and that a run stops by default.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metatrain.checkpoint import committed_steps, read_marker
from metatrain.config import Config
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import Shard, Split, read_manifest
from metatrain.data.plan import EpochPlan
from metatrain.data.quarantine import read_quarantine
from metatrain.data.shards import row_groups
from metatrain.errors import CheckpointError
from metatrain.observe.status import read_status
from metatrain.train.audit import audit
from metatrain.train.launch import launch
from tests.data.tiny_dataset import write_tiny_dataset
from tests.train.runs import curve, recipe

pytestmark = [pytest.mark.timeout(500), pytest.mark.usefixtures("ray_session")]

SETTINGS = {"shards": 16, "users": 480, "validation": 20}


def late_row_group(url: str, config: Config) -> tuple[Shard, int, int]:
    """A shard, the place in it of its row group that is read last in the first epoch, and the step that wants it."""
    shards = read_manifest(url).of(Split.TRAIN)
    data = config.data
    plan = EpochPlan(
        row_groups(shards),
        seed=config.train.seed,
        epoch=0,
        lanes=data.lanes,
        tasks_per_step=data.tasks_per_step,
        window=data.shuffle_row_groups,
    )
    group = int(plan.window_tasks(0, plan.windows(0) - 1).row_groups[0])
    first = np.cumsum([0, *(len(s.row_groups) for s in shards)])
    number = int(np.searchsorted(first, group, side="right")) - 1
    return shards[number], group - int(first[number]), plan.steps


def garble(url: str, shard: Shard, group: int) -> None:
    """Flips a byte of the row group's labels: the file's size, footer and other row groups stay."""
    path = Path(url) / shard.path
    of_group = pq.ParquetFile(path).metadata.row_group(group)
    chunk = next(c for c in map(of_group.column, range(of_group.num_columns)) if c.path_in_schema.startswith("labels"))
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 0xFF
    path.write_bytes(content)


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    url = str(tmp_path / "dataset")
    write_tiny_dataset(url, **SETTINGS)
    return url


def make_recipe(url: str, tmp_path: Path, name: str, **data: object) -> Config:
    config = recipe(url, str(tmp_path / "runs"), name, {"workers": 1, "epochs": 2, "validate_every": 0, "audit": True})
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def test_a_run_goes_on_without_the_shard_and_tells_of_it(dataset: str, tmp_path: Path):
    config = make_recipe(dataset, tmp_path, "found", bad_shards="quarantine")
    shard, group, steps = late_row_group(dataset, config)
    garble(dataset, shard, group)
    launch(config)
    found = read_quarantine(config.run_url, TaskDataset.open(dataset))
    [entry] = found.shards
    assert (entry.path, entry.tasks, entry.events) == (shard.path, shard.tasks, shard.events)
    # Found when its window was wanted, and not before: the run went on from a checkpoint.
    assert 0 < entry.since_step < steps
    end = committed_steps(config.run_url)[-1]
    assert read_marker(config.run_url, end).loop["quarantined"] == [shard.path]
    skipped, trained = curve(config, "health/skipped_tasks"), curve(config, "learning/loss_after")
    assert sorted(trained) == list(range(1, end + 1))
    assert sum(skipped[step] for step in range(steps + 1, end + 1)) >= shard.tasks
    assert read_status(config.run_url).restarts == 1
    report = audit(config.run_url)
    assert report.exactly_once, str(report)
    assert report.whole_epochs == [0, 1]
    events = EventAccumulator(str(Path(config.run_url) / "tensorboard"))
    events.Reload()
    assert any("quarantine" in tag for tag in events.Tags()["tensors"])

    # What was trained without it cannot go on with it.
    (Path(config.run_url) / "quarantine.json").unlink()
    with pytest.raises(CheckpointError, match="may only grow"):
        launch(config)
