"""Ray Train's trainer for a number of workers that changes: what nodes have room is asked of the nodes themselves.

Ray's own policy counts what a coordinator reserved, which still has a dead node for up to 20 seconds and a node that is
to be taken away until it is gone. A group that is placed there waits for its room until it gives up.
"""

from __future__ import annotations

from typing import Any

import ray
import ray.train.torch
from ray._private.state import state
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy


class LiveNodesPolicy(ElasticScalingPolicy):
    """As Ray's, of the nodes alone that are alive and not being drained."""

    def _count_possible_workers(self, reserved_resources: dict[str, Any]) -> int:
        leaving = state.get_draining_nodes()
        staying = {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving}
        return super()._count_possible_workers({n: has for n, has in reserved_resources.items() if n in staying})


class Trainer(ray.train.torch.TorchTrainer):
    """Ray's TorchTrainer, with that policy where the number of workers is a range."""

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            options["scaling_policy"] = LiveNodesPolicy(self.scaling_config)
        return super()._initialize_and_run_controller(**options)
