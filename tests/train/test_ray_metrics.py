"""Ray's metrics of a run: each is set from what workers tell, and the dashboard shows those that exist, all of them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from metatrain.train import metrics
from metatrain.train.metrics import COUNTERS, GAUGES, RunMetrics
from tests.pages import ROOT

DASHBOARD = ROOT / "cluster" / "grafana" / "metatrain.json"


class Recorded:
    """In place of Ray's Gauge and Counter."""

    values: dict[tuple[str, ...], float]

    def __init__(self, name: str, what: str, tag_keys: tuple[str, ...]) -> None:
        assert what
        self.name, self.tag_keys = name, tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tuple(tags) == self.tag_keys
        self.values[(self.name, *tags.values())] = value

    def inc(self, value: float, tags: dict[str, str]) -> None:
        key = (self.name, *tags.values())
        self.set(self.values.get(key, 0.0) + value, tags)


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], float]:
    Recorded.values = {}
    monkeypatch.setattr(metrics, "Gauge", Recorded)
    monkeypatch.setattr(metrics, "Counter", Recorded)
    return Recorded.values


def line(step: int, reader_restarts: float = 0.0) -> dict[str, Any]:
    of_curves = dict.fromkeys(metrics.OF_CURVES, 0.5)
    return {
        "step": step,
        "steps": 90,
        "epoch": 0,
        **of_curves,
        "time/inner_loop": 0.75,
        "speed/reader_restarts": reader_restarts,
    }


def test_every_metric_is_set(values: dict[tuple[str, ...], float]) -> None:
    run = RunMetrics("demo")
    messages = [
        {"start": 2},
        {"say": "x"},
        line(10, reader_restarts=1),
        line(20, reader_restarts=3),
        {"step": 20, "steps": 90, "validation_loss": 0.25, "best": True},
        {"checkpoint": 20, "checkpoint_seconds": 1.5, "checkpoint_loss": None},
        {"start": 1},  # the group again: its readers count from nothing
        line(21, reader_restarts=1),
        {"done": 90, "steps": 90, "stopped_early": False},
    ]
    for message in messages:
        run.take(message)
    assert values["metatrain_step", "demo"] == 21
    assert values["metatrain_steps", "demo"] == 90
    assert values["metatrain_workers", "demo"] == 1
    assert values["metatrain_validation_loss", "demo"] == 0.25
    assert values["metatrain_checkpoint_step", "demo"] == 20
    assert values["metatrain_time_share", "demo", "inner_loop"] == 0.75
    assert values["metatrain_wait_share", "demo"] == 0.5
    assert values["metatrain_worker_restarts_total", "demo"] == 1
    assert values["metatrain_reader_restarts_total", "demo"] == 4
    assert {key[0] for key in values} == {named.name for named in (*GAUGES, *COUNTERS)}


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    shown = set(re.findall(r"\bray_(metatrain_\w+)", json.dumps(dashboard)))
    assert shown == {named.name for named in (*GAUGES, *COUNTERS)}
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert all(panel["targets"] and panel["title"] for panel in panels)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in dashboard["panels"]:  # none lies over another
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24


@pytest.mark.timeout(180)
@pytest.mark.ray
def test_prometheus_sees_them_under_these_names(ray_session: None) -> None:
    """Ray adds `ray_`, and no second `_total`."""
    import ray

    from tests.faults.processes import wait_for

    run = RunMetrics("seen")
    run.take({"start": 2})
    run.take({"start": 2})
    run.take(line(10, reader_restarts=2))
    nodes = [node for node in ray.nodes() if node["Alive"]]
    addresses = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
    wanted = {"ray_metatrain_step", "ray_metatrain_worker_restarts_total", "ray_metatrain_reader_restarts_total"}

    def exported() -> bool:
        import urllib.request

        text = ""
        for address in addresses:
            with urllib.request.urlopen(address, timeout=10) as answer:
                text += answer.read().decode()
        lines = [line for line in text.splitlines() if 'run="seen"' in line or 'run=\\"seen\\"' in line]
        names = {re.split(r"[{ ]", line, maxsplit=1)[0] for line in lines}
        return wanted <= names

    wait_for(exported, 90, "the metrics at Prometheus' door")
