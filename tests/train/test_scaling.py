"""What a run asks of Ray Train: workers, their resources, and their places."""

from __future__ import annotations

import pytest

from metatrain.config import Config
from metatrain.train.launch import scaling


@pytest.mark.parametrize(
    ("data", "train", "expected"),
    [
        ({}, {"workers": 3}, (3, {"CPU": 1.5}, "PACK")),
        ({"readers_per_worker": 4}, {"placement": "spread"}, (1, {"CPU": 3.0}, "SPREAD")),
        ({"readers_per_worker": "auto"}, {"workers": {"min": 1, "max": 4}}, ((1, 4), {"CPU": 1.5}, "PACK")),
        ({}, {"gpus": True, "placement": "spread"}, (1, {"CPU": 1.5, "GPU": 1}, "SPREAD")),
    ],
)
def test_workers_take_their_readers_cpus_and_lie_as_configured(data: dict, train: dict, expected: tuple) -> None:
    found = scaling(Config.model_validate({"data": data, "train": train}))
    assert (found.num_workers, found.resources_per_worker, found.placement_strategy) == expected
