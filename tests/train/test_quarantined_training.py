"""Training over quarantined shards, in one process without Ray: found in mid-run, gone on from the last checkpoint.

tests/faults/test_bad_shards.py does the same through Ray.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from metatrain.checkpoint import committed_steps, read_marker
from metatrain.config import Config
from metatrain.data.quarantine import BadShards
from metatrain.errors import ShardError
from metatrain.train.audit import audit
from metatrain.train.worker import QUARANTINED
from tests.data.tiny_dataset import write_tiny_dataset
from tests.faults.test_bad_shards import garble, late_row_group, make_recipe
from tests.train.runs import assert_equal_states, curve, final_state
from tests.train.without_ray import train_on_ranks

pytestmark = pytest.mark.timeout(300)


def train(config: Config) -> None:
    """As `launch`, but for Ray."""
    BadShards(config.run_url, config.data, lambda: max(committed_steps(config.run_url), default=0)).spared(
        lambda: train_on_ranks(config, 1)
    )


def test_a_run_goes_on_without_the_shard_and_does_so_again_bit_for_bit(tmp_path: Path):
    url, whole = str(tmp_path / "dataset"), str(tmp_path / "whole")
    write_tiny_dataset(url, shards=16, users=480, validation=20)
    shutil.copytree(url, whole)
    config = make_recipe(url, tmp_path, "found", bad_shards="quarantine")
    shard, group, steps = late_row_group(url, config)
    garble(url, shard, group)
    train(config)
    [entry] = BadShards(config.run_url, config.data, lambda: 0).quarantine().shards
    assert (entry.path, entry.tasks, entry.events) == (shard.path, shard.tasks, shard.events)
    # Found when its window was wanted, and not before: the run went on from a checkpoint.
    assert 0 < entry.since_step < steps
    assert read_marker(config.run_url, committed_steps(config.run_url)[-1]).loop[QUARANTINED] == [shard.path]
    report = audit(config.run_url)
    assert report.exactly_once, str(report)
    assert report.whole_epochs == [0, 1]

    # Again, from the list alone, over a dataset that is whole: steps before with the shard, those after without it.
    again = make_recipe(whole, tmp_path, "again", bad_shards="stop")
    train(again.model_copy(update={"train": again.train.model_copy(update={"max_steps": entry.since_step})}))
    shutil.copy(Path(config.run_url) / "quarantine.json", again.run_url)
    train(again)
    assert_equal_states(final_state(config), final_state(again))
    assert curve(again, "learning/loss_after") == curve(config, "learning/loss_after")


def test_by_default_the_run_stops_with_the_shards_name(tmp_path: Path):
    url = str(tmp_path / "dataset")
    write_tiny_dataset(url, shards=16, users=480, validation=20)
    config = make_recipe(url, tmp_path, "stops")
    shard, group, _ = late_row_group(url, config)
    garble(url, shard, group)
    with pytest.raises(ShardError, match="cannot be read") as caught:
        train(config)
    assert caught.value.path == shard.path
    assert shard.path in str(caught.value.where)
    assert "data.bad_shards: quarantine" in str(caught.value)
    assert not (Path(config.run_url) / "quarantine.json").exists()
