"""Ray Train's trainer where nodes come and go: which of them have room, and what a notice that one goes means.

Ray's own policy counts what a coordinator reserved, which still has a dead node for up to 20 seconds and a node that is
to be taken away until it is gone. A group that is placed there waits for its room until it gives up.

Ray's own answer to a notice is to let the group train until the node is gone, which may be minutes, all of them done
again after the last checkpoint. Here a group that has room elsewhere saves and moves there at once.
"""

from __future__ import annotations

import logging
import math
import os
import time
from typing import Any, cast

import ray
import ray.train.torch
from ray._private.state import state
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, FixedScalingPolicy, NoopDecision
from ray.train.v2.api.exceptions import PreemptionError
from ray.train.v2.api.preemption import PreemptionInfo

from metatrain import collector
from metatrain.local_ray import is_local

log = logging.getLogger("metatrain")


#: Seconds before the end of a node's notice at which a group that stayed there is asked for a checkpoint once more, and
#: at which it ends. Not at the end itself, where workers that only lost touch with those on the node count as failures.
LAST_SAVE, BEFORE_THE_END = 15.0, 5.0


def leaving_nodes() -> dict[str, int]:
    """Nodes of which notice was given: until when, Unix time in ms (0: not told)."""
    try:
        return cast("dict[str, int]", state.get_draining_nodes())
    except Exception:  # an error would end the run, for what can be asked again in two seconds
        log.warning("the nodes that are to be taken away cannot be asked for", exc_info=True)
        return {}


class Notices:
    """The nodes of a group that are to be taken away. Each is told of once to whoever follows the run."""

    def __init__(self, teller: Any) -> None:
        self._teller, self._told, self._asked = teller, set[str](), set[tuple[str, bool]]()

    def leaving(self, group: Any) -> dict[str, int]:
        """Those of the group (a `WorkerGroupState`), as `leaving_nodes` has them."""
        nodes = {worker.metadata.node_id for worker in group.workers}
        return {node: until for node, until in leaving_nodes().items() if node in nodes}

    def say(self, leaving: dict[str, int], what: str) -> None:
        """Tells of nodes, and what the group does."""
        for node in sorted(leaving.keys() - self._told):
            self._told.add(node)
            self._teller.tell.remote({"say": f"{_described(leaving[node])} (node {node[:12]}): {what}"})

    def stay(self, group: Any, leaving: dict[str, int]) -> None:
        """Asks a group that has no other place for a checkpoint, at the notice and before its end.

        Raises:
            PreemptionError: The end is near: the group is to end, which is no failure.
        """
        left = {node: until / 1000 - time.time() if until else math.inf for node, until in leaving.items()}
        if ended := sorted(node for node in leaving if left[node] < BEFORE_THE_END):
            nodes = [worker.metadata.node_id for worker in group.workers]
            ranks = {node: [rank for rank, its in enumerate(nodes) if its == node] for node in ended}
            raise PreemptionError(PreemptionInfo(min(leaving[node] for node in ended), ranks), drain_timed_out=True)
        for node in sorted(leaving):
            wish = node, left[node] < LAST_SAVE
            # The number is 0 while the group starts: it is asked again.
            if wish not in self._asked and ray.get(self._teller.ask_save.remote(_described(leaving[node]))):
                self._asked.add(wish)


def _described(until: int) -> str:
    left = f" in {max(0.0, until / 1000 - time.time()):.0f} s" if until else ""
    return f"a node is about to be taken away{left}"


class LiveNodesPolicy(ElasticScalingPolicy):
    """As Ray's, of the nodes alone that are alive and not being drained. A group leaves a node at its notice."""

    def __init__(self, scaling_config: ray.train.ScalingConfig, teller: Any) -> None:
        super().__init__(scaling_config)
        self._notices = Notices(teller)
        self._lost = 0  # workers for whom nodes are reserved that are about to go

    def _get_num_workers_for_resource_request(self) -> int:
        return super()._get_num_workers_for_resource_request() + self._lost

    def _get_reserved_resources(self) -> dict[str, Any] | None:
        if (reserved := super()._get_reserved_resources()) is None:
            return None
        leaving = leaving_nodes()
        lost = super()._count_possible_workers({node: has for node, has in reserved.items() if node in leaving})
        if lost != self._lost:
            # In place of those, others: the coordinator reserves no more than it was asked for.
            self._lost = lost
            self._send_resource_request()
            self._latest_reserved_resources_query_time = float("-inf")
            return super()._get_reserved_resources()
        return reserved

    def _count_possible_workers(self, reserved_resources: dict[str, Any]) -> int:
        leaving = leaving_nodes()
        staying = {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving}
        return super()._count_possible_workers({n: has for n, has in reserved_resources.items() if n in staying})

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """As Ray's, but for a notice: then at once, and to as many workers as before too, since those move."""
        if not (leaving := self._notices.leaving(worker_group_state)):
            return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        self._maybe_send_resource_request()
        # None where who answers that was too busy: it is asked again in two seconds.
        room = None if (reserved := self._get_reserved_resources()) is None else self._count_possible_workers(reserved)
        least = self.scaling_config.min_workers
        if room is not None and room >= least:
            # Before any change of the group it is asked for a checkpoint.
            self._notices.say(leaving, f"the group saves, and goes on as {room} worker(s) on the nodes that stay")
            return self._get_resize_decision(room)
        if room is not None:
            self._notices.say(
                leaving, f"the group saves; the others have room for {room} worker(s), of {least} at least"
            )
        self._notices.stay(worker_group_state, leaving)
        return NoopDecision()


class LocalPolicy(FixedScalingPolicy):
    """As Ray's, for a fixed number of workers on a Ray of this machine alone: nobody is asked for nodes.

    Ray's starts an actor that asks an autoscaler: two seconds of a core, and one percent of a core from then on.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        """Asks for nothing."""

    def _maybe_send_resource_request(self) -> None:
        pass


class NoticedPolicy(FixedScalingPolicy):
    """As Ray's, for a fixed number of workers, with a checkpoint at the notice that one of their nodes goes."""

    def __init__(self, scaling_config: ray.train.ScalingConfig, teller: Any) -> None:
        super().__init__(scaling_config)
        self._notices = Notices(teller)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """As Ray's: none. At the end of a notice, the error by which the group starts again."""
        if leaving := self._notices.leaving(worker_group_state):
            self._notices.say(leaving, "the group saves, and starts again when the node goes")
            self._notices.stay(worker_group_state, leaving)
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)


class RelaxedCollector(WorkerGroupCallback):
    """Every worker's imports, which most of a start and of a restart is spent on, take a quarter less."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Before anything is imported there."""
        worker_group.execute(collector.relax)


class Trainer(ray.train.torch.TorchTrainer):
    """Ray's TorchTrainer with these policies, and without Ray Data. `teller` is as `supervise.make_teller` makes it."""

    def __init__(self, *arguments: Any, teller: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._teller = teller

    def _create_default_callbacks(self) -> list[Any]:
        # Every process more makes every start longer, on a small machine by a second, and takes its part of a core.
        unneeded: tuple[type, ...] = (DatasetsCallback,)  # an actor for Ray Data, with every group
        if is_local():
            unneeded = (*unneeded, PlacementGroupCleanerCallback)  # an actor, for who stays when this run has died
        needed = [made for made in super()._create_default_callbacks() if not isinstance(made, unneeded)]
        return [RelaxedCollector(), *needed]  # the first, since those behind it import torch

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        # Ray's watcher, an actor more, would hold the group where it is until the node is gone.
        os.environ[ENABLE_PREEMPTION_WATCHER_ENV_VAR] = "0"  # the controller takes it from here
        if self.scaling_config.elasticity_enabled:
            options["scaling_policy"] = LiveNodesPolicy(self.scaling_config, self._teller)
        elif is_local():
            options["scaling_policy"] = LocalPolicy(self.scaling_config)
        else:
            options["scaling_policy"] = NoticedPolicy(self.scaling_config, self._teller)
        return super()._initialize_and_run_controller(**options)
