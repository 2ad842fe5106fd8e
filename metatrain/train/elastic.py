"""Ray Train's trainer for a number of workers that changes: what nodes have room is asked of the nodes themselves.

Ray's own policy counts what a coordinator reserved, which still has a dead node for up to 20 seconds and a node that is
to be taken away until it is gone. A group that is placed there waits for its room until it gives up.
"""

from __future__ import annotations

from typing import Any

import ray
import ray.train.torch
from ray._private.state import state
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

from metatrain import collector


class LiveNodesPolicy(ElasticScalingPolicy):
    """As Ray's, of the nodes alone that are alive and not being drained."""

    def _count_possible_workers(self, reserved_resources: dict[str, Any]) -> int:
        leaving = state.get_draining_nodes()
        staying = {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving}
        return super()._count_possible_workers({n: has for n, has in reserved_resources.items() if n in staying})


class RelaxedCollector(WorkerGroupCallback):
    """Every worker's imports, which most of a start and of a restart is spent on, take a quarter less."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Before anything is imported there."""
        worker_group.execute(collector.relax)


class Trainer(ray.train.torch.TorchTrainer):
    """Ray's TorchTrainer, with that policy where the number of workers is a range, and without Ray Data."""

    def _create_default_callbacks(self) -> list[Any]:
        # An actor for the datasets of Ray Data would be started with every group. There are none, and a process more
        # makes every start and restart longer.
        needed = [made for made in super()._create_default_callbacks() if not isinstance(made, DatasetsCallback)]
        return [RelaxedCollector(), *needed]  # the first, since those behind it import torch

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            options["scaling_policy"] = LiveNodesPolicy(self.scaling_config)
        return super()._initialize_and_run_controller(**options)
