"""Ray Train's trainer where nodes come and go: which of them have room, and what a notice that one goes means.

Ray's own policy counts what a coordinator reserved, which still has a dead node for up to 20 seconds and a node that is
to be taken away until it is gone. A group that is placed there waits for its room until it gives up.

Ray's own answer to a notice is to let the group train until the node is gone, which may be minutes, all of them done
again after the last checkpoint. Here a group that has room elsewhere saves and moves there at once.
"""

from __future__ import annotations

import os
import time
from typing import Any

import ray
import ray.train.torch
from ray._private.state import state
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, FixedScalingPolicy, NoopDecision

from metatrain import collector
from metatrain.local_ray import is_local


class Notices:
    """The nodes of a group that are to be taken away; each is told once to whoever follows the run."""

    def __init__(self, teller: Any) -> None:
        self._teller, self._told = teller, set[str]()

    def leaving(self, group: Any) -> dict[str, int]:
        """Nodes of the group (a `WorkerGroupState`) of which notice was given: until when, in ms (0: not known)."""
        nodes = {worker.metadata.node_id for worker in group.workers}
        return {node: until for node, until in state.get_draining_nodes().items() if node in nodes}

    def say(self, leaving: dict[str, int], what: str, save: bool) -> None:
        """Tells of the nodes that were not told of before, and asks the group for a checkpoint where `save` is set."""
        for node in sorted(leaving.keys() - self._told):
            self._told.add(node)
            left = f" in {max(0.0, leaving[node] / 1000 - time.time()):.0f} s" if leaving[node] else ""
            told = f"a node is about to be taken away{left}"
            self._teller.tell.remote({"say": f"{told} (node {node[:12]}): {what}"})
            if save:
                self._teller.ask_save.remote(told)


class LiveNodesPolicy(ElasticScalingPolicy):
    """As Ray's, of the nodes alone that are alive and not being drained. A group leaves a node at its notice."""

    def __init__(self, scaling_config: ray.train.ScalingConfig, teller: Any) -> None:
        super().__init__(scaling_config)
        self._notices = Notices(teller)

    def _count_possible_workers(self, reserved_resources: dict[str, Any]) -> int:
        leaving = state.get_draining_nodes()
        staying = {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving}
        return super()._count_possible_workers({n: has for n, has in reserved_resources.items() if n in staying})

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """As Ray's, but for a notice: then at once, and to as many workers as before too, since those move."""
        if not (leaving := self._notices.leaving(worker_group_state)):
            return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        self._maybe_send_resource_request()
        if (reserved := self._get_reserved_resources()) is None:
            return NoopDecision()  # who answers that was too busy: asked again in two seconds
        room, least = self._count_possible_workers(reserved), self.scaling_config.min_workers
        if room >= least:
            what = f"the group saves, and goes on as {room} worker(s) on the nodes that stay"
            self._notices.say(leaving, what, save=False)  # before any change of the group it is asked for a checkpoint
            return self._get_resize_decision(room)
        what = (
            f"the group saves and trains on until then; the nodes that stay take {room} worker(s), of {least} at least"
        )
        self._notices.say(leaving, what, save=True)
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
        """As Ray's: none."""
        leaving = self._notices.leaving(worker_group_state)
        self._notices.say(leaving, "the group saves, and trains on until then", save=True)
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
