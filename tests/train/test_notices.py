"""What a notice that a node is taken away does to a group, with the nodes and Ray's coordinator made up."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingPolicy,
)
from ray.train.v2.api.exceptions import PreemptionError

from metatrain.train import elastic
from metatrain.train.elastic import LiveNodesPolicy, LocalPolicy, NoticedPolicy, Trainer


class Teller:
    """Keeps what it is told, as the actor does; `live` as its group is."""

    def __init__(self) -> None:
        self.said, self.asked, self.live = list[str](), list[str](), True
        self.tell = SimpleNamespace(remote=lambda message: self.said.append(message["say"]))
        self.ask_save = SimpleNamespace(remote=self._ask_save)

    def _ask_save(self, reason: str) -> int:
        if self.live:
            self.asked.append(reason)
        return len(self.asked) if self.live else 0


class Nodes:
    """Nodes with room for a worker each, of which the coordinator reserves the first; those in `leaving` are to go."""

    def __init__(self, names: str) -> None:
        self.names, self.leaving, self.answers = names, dict[str, int](), True
        self.requested = 0

    def reserved(self) -> dict[str, dict[str, float]] | None:
        return {name: {"CPU": 1.0} for name in self.names[: self.requested]} if self.answers else None

    def request(self, policy: Any) -> None:
        self.requested = policy._get_num_workers_for_resource_request()


@pytest.fixture
def teller() -> Teller:
    return Teller()


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    nodes = Nodes("abc")
    monkeypatch.setattr(elastic.state, "get_draining_nodes", lambda: nodes.leaving)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": name, "Alive": True} for name in nodes.names])
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ElasticScalingPolicy, "_get_reserved_resources", lambda self: nodes.reserved())
    for name in ("_send_resource_request", "_maybe_send_resource_request"):
        monkeypatch.setattr(ScalingPolicy, name, lambda self: nodes.request(self))
    return nodes


def decision(policy: Any, group: str) -> Any:
    workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=node)) for node in group]
    state = SimpleNamespace(start_time=float("inf"), workers=workers, num_workers=len(workers))  # it began just now
    return policy.make_decision_for_running_worker_group(state, None)


def of_range(least: int, most: int, teller: Teller) -> LiveNodesPolicy:
    scaling = ray.train.ScalingConfig(
        num_workers=(least, most), resources_per_worker={"CPU": 1}, elastic_resize_monitor_interval_s=3600
    )
    return LiveNodesPolicy(scaling, teller)


@pytest.mark.parametrize(("most", "group", "expected"), [(3, "abc", 2), (2, "ab", 2), (1, "a", 1)])
def test_a_group_moves_at_once_to_the_nodes_that_stay(
    most: int, group: str, expected: int, nodes: Nodes, teller: Teller
) -> None:
    policy = of_range(1, most, teller)
    assert isinstance(decision(policy, group), NoopDecision)
    nodes.leaving = {"a": 0}
    resize = decision(policy, group)
    assert isinstance(resize, ResizeDecision)
    assert resize.num_workers == expected
    assert not teller.asked, "a change of the group brings its checkpoint"
    (said,) = teller.said
    assert said.startswith("a node is about to be taken away (node a): ")
    assert f"as {expected} worker(s)" in said


def test_a_group_without_room_elsewhere_saves_once_and_trains_on(nodes: Nodes, teller: Teller) -> None:
    policy = of_range(3, 3, teller)
    nodes.leaving = {"b": 10**15}
    assert all(isinstance(decision(policy, "abc"), NoopDecision) for _ in range(3))
    assert len(teller.asked) == len(teller.said) == 1
    assert teller.asked[0].startswith("a node is about to be taken away in ")
    assert "room for 2 worker(s), of 3 at least" in teller.said[0]
    assert nodes.requested == 4
    nodes.names = "abcd"
    resize = decision(policy, "abc")
    assert isinstance(resize, ResizeDecision)
    assert resize.num_workers == 3


def test_a_node_of_which_the_group_has_no_worker_changes_nothing(nodes: Nodes, teller: Teller) -> None:
    policy = of_range(1, 2, teller)
    policy.scaling_config.elastic_resize_monitor_interval_s = 0
    nodes.leaving = {"a": 0}  # which is reserved
    state = SimpleNamespace(workers=[SimpleNamespace(metadata=SimpleNamespace(node_id=n)) for n in "bc"])
    state.start_time, state.num_workers = 0.0, 2
    assert isinstance(policy.make_decision_for_running_worker_group(state, None), NoopDecision)
    assert not teller.said
    nodes.names, nodes.leaving = "bc", {}
    assert isinstance(policy.make_decision_for_running_worker_group(state, None), NoopDecision)
    assert nodes.requested == 2


def test_a_group_that_starts_is_asked_again(nodes: Nodes, teller: Teller) -> None:
    policy, teller.live = of_range(3, 3, teller), False
    nodes.leaving = {"b": 0}
    decision(policy, "abc")
    assert not teller.asked
    teller.live = True
    decision(policy, "abc")
    decision(policy, "abc")
    assert (len(teller.asked), len(teller.said)) == (1, 1)


@pytest.mark.parametrize("fixed", [True, False])
def test_a_group_that_stayed_ends_before_its_node_without_a_failure(fixed: bool, nodes: Nodes, teller: Teller) -> None:
    scaling = ray.train.ScalingConfig(num_workers=3, resources_per_worker={"CPU": 1})
    policy = NoticedPolicy(scaling, teller) if fixed else of_range(3, 3, teller)
    nodes.leaving = {"b": int(1000 * (time.time() + 60)), "c": 0}
    assert isinstance(decision(policy, "abb"), NoopDecision)
    asked = len(teller.asked)
    nodes.leaving["b"] -= 50_000
    for _ in range(2):
        assert isinstance(decision(policy, "abb"), NoopDecision)
    assert len(teller.asked) == asked + 1, "what was trained since the notice is saved"
    nodes.leaving["b"] -= 6_000
    with pytest.raises(PreemptionError) as caught:
        decision(policy, "abb")
    assert caught.value.preemption_info.preempted_node_to_ranks == {"b": [1, 2]}


def test_nodes_that_cannot_be_asked_for_end_nothing(
    nodes: Nodes, teller: Teller, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> dict[str, int]:
        raise RuntimeError("no answer")

    policy = of_range(1, 3, teller)
    nodes.leaving = {"a": 0}
    with monkeypatch.context() as patched:
        patched.setattr(elastic.state, "get_draining_nodes", fails)
        assert isinstance(decision(policy, "abc"), NoopDecision)
    assert isinstance(decision(policy, "abc"), ResizeDecision)


def test_a_coordinator_that_does_not_answer_is_asked_again(nodes: Nodes, teller: Teller) -> None:
    policy = of_range(1, 3, teller)
    nodes.leaving, nodes.answers = {"a": 0}, False
    assert isinstance(decision(policy, "abc"), NoopDecision)
    nodes.answers = True
    assert isinstance(decision(policy, "abc"), ResizeDecision)


def test_a_group_of_fixed_size_saves_at_each_notice_of_its_own_nodes(nodes: Nodes, teller: Teller) -> None:
    policy = NoticedPolicy(ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}), teller)
    nodes.leaving = {"c": 0}
    assert isinstance(decision(policy, "ab"), NoopDecision)
    assert not teller.said
    assert not teller.asked
    for leaving in ({"a": 0}, {"a": 0, "b": 0}):
        nodes.leaving = leaving
        assert isinstance(decision(policy, "ab"), NoopDecision)
        assert isinstance(decision(policy, "ab"), NoopDecision)
        assert len(teller.said) == len(teller.asked) == len(leaving)


def local(monkeypatch: pytest.MonkeyPatch, is_local: bool, workers: int | tuple[int, int]) -> tuple[set[str], Any]:
    """Names of the callbacks, and the policy, of a run on a Ray of this machine alone or on a cluster."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(elastic, "is_local", lambda: is_local)
    monkeypatch.setattr(elastic.os, "environ", {})
    monkeypatch.setattr(
        ray.train.torch.TorchTrainer, "_initialize_and_run_controller", lambda self, **options: given.update(options)
    )
    trainer = Trainer(print, teller=None, scaling_config=ray.train.ScalingConfig(num_workers=workers))
    trainer._initialize_and_run_controller(scaling_policy=None)
    assert elastic.os.environ == {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    return {type(made).__name__ for made in trainer._create_default_callbacks()}, given["scaling_policy"]


def test_a_ray_of_this_machine_alone_has_no_actors_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    callbacks, policy = local(monkeypatch, True, 2)
    assert isinstance(policy, LocalPolicy)
    assert not callbacks & {"PlacementGroupCleanerCallback", "DatasetsCallback"}
    assert "BackendSetupCallback" in callbacks
    policy.after_controller_start(None)
    assert isinstance(policy.make_decision_for_non_running_worker_group(), ResizeDecision)
    assert policy._coordinator_client is None

    assert isinstance(local(monkeypatch, True, (1, 2))[1], LiveNodesPolicy)
    callbacks, policy = local(monkeypatch, False, 2)
    assert isinstance(policy, NoticedPolicy)
    assert "PlacementGroupCleanerCallback" in callbacks
    assert "DatasetsCallback" not in callbacks
