"""A profile of some steps: the trace has the stages and parts of a step, and nothing is left behind when it ends."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from metatrain.config import Config, validated
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import Split
from metatrain.errors import ConfigError
from metatrain.model.build import build_model
from metatrain.train.profile import Profile
from metatrain.train.pulse import Pulse
from metatrain.train.readers import open_reader
from tests.data.tiny_dataset import write_tiny_dataset
from tests.train.runs import recipe

# torch's own: of the CUPTI that a machine without a GPU has not, and of a queue that the profiler empties.
pytestmark = pytest.mark.filterwarnings("ignore:.*[Pp]rofiler.*")


def trained(folder: Path, profile: str | None, steps: int = 6) -> tuple[Config, list[str], Any, Pulse]:
    """Forward and backward over some steps, as the worker's loop goes through them."""
    write_tiny_dataset(str(folder / "dataset"))
    config = recipe(str(folder / "dataset"), str(folder), "run", {"profile": profile})
    dataset = TaskDataset.open(config.data.dataset)
    with contextlib.closing(open_reader(dataset, config, Split.TRAIN)) as reader:
        batch = reader.read(0, 0, range(4)).tensors("cpu")
    model = build_model(dataset.schema, config)
    pulse, said = Pulse(), []
    watched = Profile(config, 0, model, pulse, torch.device("cpu"), said.append)
    for step in range(steps):
        watched.at(step)
        pulse.enter("read", step)
        pulse.enter("forward")
        output = model(batch, step, float(batch.size))
        pulse.enter("backward")
        output.loss.backward()
        pulse.enter("update")
    watched.end(steps)
    return config, said, model, pulse


def trace(file: Path) -> Counter[str]:
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def test_the_trace_names_stages_and_parts_of_the_steps_asked_for(tmp_path: Path) -> None:
    config, said, model, pulse = trained(tmp_path, "2:4")
    folder = Path(config.run_url, "profile")
    assert sorted(path.name for path in folder.iterdir()) == [
        "rank-0.steps-2-4.pt.trace.json.gz",
        "rank-0.steps-2-4.txt",
    ]
    names = trace(folder / "rank-0.steps-2-4.pt.trace.json.gz")
    for stage in ("read", "forward", "backward", "update"):
        assert names[f"stage: {stage}"] == 2, names
    for part in ("lookup, ids sent", "lookup", "assemble"):
        assert names[f"part: {part}"] == 2, names
    assert names["part: inner_loop"] >= 2
    assert "aten::" in (folder / "rank-0.steps-2-4.txt").read_text()
    assert len(said) == 1
    assert str(folder) in said[0]
    # Nothing of it is left in the model.
    assert pulse.on_enter is None
    assert not {"request", "lookup", "assemble", "forward"} & (
        vars(model.tables).keys() | vars(model.featurizer).keys() | vars(model.meta).keys()
    )


def test_a_run_that_ends_or_begins_inside_the_steps_has_the_others(tmp_path: Path) -> None:
    config, _, _, _ = trained(tmp_path, "4:50")
    [file] = Path(config.run_url, "profile").glob("*.json.gz")
    assert file.name == "rank-0.steps-4-6.pt.trace.json.gz"
    assert trace(file)["stage: forward"] == 2


def test_without_being_asked_nothing_is_profiled(tmp_path: Path) -> None:
    config, said, _, _ = trained(tmp_path, None)
    assert said == []
    assert not Path(config.run_url, "profile").exists()


@pytest.mark.parametrize("steps", ["10", "a:b", "5:5", "9:3", "0:101", "-1:4"])
def test_steps_that_make_no_sense_are_refused(steps: str) -> None:
    with pytest.raises(ConfigError):
        validated({"train": {"profile": steps}}, where="x")
