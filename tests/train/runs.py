"""Small runs for tests: a recipe over a prepared dataset, and what a finished run left behind."""

from __future__ import annotations

from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metatrain import storage
from metatrain.checkpoint import committed_steps, read_tensors
from metatrain.config import Config, validated


def recipe(dataset: str, storage_url: str, name: str, train: dict[str, Any] | None = None, **sections: Any) -> Config:
    """A quick recipe, smooth so that rounding does not grow: 16 tasks a step over 4 lanes, 2 inner steps."""
    raw: dict[str, Any] = {
        "run": {"name": name, "storage": storage_url},
        "data": {"dataset": dataset, "lanes": 4, "tasks_per_step": 16, "shuffle_row_groups": 4, "prefetch": 2},
        "model": {"hidden": [16], "activation": "tanh", "id_dropout": 0.1},
        "meta": {"steps": 2, "rate": 0.02, "adapt": ["head.*"]},
        "train": {
            "epochs": 4,
            "log_every": 1,
            "max_failures": 0,
            "checkpoint": {"every_steps": 5},
            "optimizer": {"warmup_steps": 5, "table_decay": 1e-4},
            **(train or {}),
        },
        "evaluate": {"episode": {"support_max": 20, "query_max": 5}},
        **sections,
    }
    return validated(raw, where=name)


def tags(config: Config) -> set[str]:
    """The names of the run's curves."""
    events = EventAccumulator(storage.join(config.run_url, "tensorboard"), size_guidance={"scalars": 1})
    events.Reload()
    return set(events.Tags()["scalars"])


def curve(config: Config, tag: str) -> dict[int, float]:
    """A curve of the run's TensorBoard, as TensorBoard itself would show it: step → value."""
    events = EventAccumulator(storage.join(config.run_url, "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def final_state(config: Config) -> dict[str, torch.Tensor]:
    """Every tensor of the run's last checkpoint: tables, their optimizer's state, dense parameters and moments."""
    return read_tensors(config.run_url, committed_steps(config.run_url)[-1])


def assert_equal_states(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    """Bit for bit at tolerance 0, else relative to each tensor's norm."""
    assert one.keys() == other.keys()
    assert len(one) > 5
    for name, tensor in one.items():
        if tolerance == 0.0:
            assert torch.equal(tensor, other[name]), f"{name} differs by {(tensor - other[name]).abs().max():.3g}"
        else:
            distance = (tensor.double() - other[name].double()).norm() / tensor.double().norm().clamp(min=1e-6)
            assert distance <= tolerance, f"{name} differs by {distance:.3g}"
