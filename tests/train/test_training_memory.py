"""Training holds no more where there are thirty times the users: the peak of a worker's process, its reader inside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from metatrain.config import to_yaml, validated
from metatrain.data.prepare import prepare

# What a worker of `metatrain train` does between its readers and its checkpoints, the reader in the same process.
CODE = """
import sys, threading, time
from pathlib import Path
import torch, torch.distributed as dist
from metatrain.config import load_config
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import Split
from metatrain.model.build import build_model
from metatrain.model.sharding import distribute
from metatrain.train.outer import DenseOptimizer
from metatrain.train.readers import open_reader
from metatrain.train.step import OuterLoop

torch.set_num_threads(1)
config = load_config(sys.argv[1])
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dataset = TaskDataset.open(config.data.dataset)
distributed = distribute(build_model(dataset.schema, config, "cpu", tables_device="meta"), config.train.optimizer)
reader = open_reader(dataset, config, Split.TRAIN)
optimizer = DenseOptimizer(distributed.dense_parameters(), config.train.optimizer)
outer = OuterLoop(distributed, optimizer, config, int(sys.argv[2]), 1)
peak = 0

def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(status.partition("RssAnon:")[2].split()[0]))
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
step = 0
while step < int(sys.argv[2]):
    for of_epoch in range(min(reader.steps(epoch := step // reader.steps(0)), int(sys.argv[2]) - step)):
        outer.step(reader.read(epoch, of_epoch, range(config.data.lanes)).tensors("cpu"), step)
        step += 1
print(peak)
"""
STEPS = 90


def peak_kilobytes(folder: Path, users: int) -> int:
    config = validated(
        {
            "prepare": {
                "source": "synthetic",
                "synthetic": {"users": users, "items": 300, "events_per_user": 30},
                "row_group_tasks": 64,
            },
            "data": {
                "dataset": str(folder / f"{users}"),
                "tasks_per_step": 32,
                "lanes": 4,
                "shuffle_row_groups": 2,
                "episode": {"support_max": 20, "query_max": 10},
            },
            "model": {"hidden": [16]},
            "meta": {"steps": 1, "adapt": ["head.*"]},
            "run": {"storage": str(folder)},
        },
        where="test",
    )
    prepare(config.prepare, config.data.dataset, progress=False)
    recipe = folder / f"{users}.yaml"
    recipe.write_text(to_yaml(config))
    command = [sys.executable, "-W", "ignore", "-c", CODE, str(recipe), str(STEPS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.timeout(300)
def test_peak_memory_does_not_grow_with_the_users(tmp_path: Path):
    small, large = (peak_kilobytes(tmp_path, users) for users in (2_000, 60_000))
    # The events of the larger dataset are 36 MB more as they lie in its shards' columns.
    assert large < small + 15 * 1024
