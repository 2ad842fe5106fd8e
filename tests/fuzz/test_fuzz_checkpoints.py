"""Mutated checkpoints: of any file of them, full and differential, the very tensors come back, or a refusal."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from metatrain.checkpoint import read_tensors
from metatrain.errors import CheckpointError
from tests.checkpoint.made_up import save
from tests.fuzz.mutations import fuzzed, mutated, read_or_refused


def tensors() -> dict[str, Tensor]:
    return {"model.table": torch.arange(40.0).reshape(10, 4), "optimizer.step": torch.tensor(2.0)}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a full checkpoint of step 1 and a differential one of step 2."""
    run = tmp_path_factory.mktemp("pristine")
    state = tensors()
    save(str(run), 1, state)
    state["model.table"][[2, 5]] = -1.0
    bitmap = torch.zeros(10, dtype=torch.bool)
    bitmap[[2, 5]] = True
    save(str(run), 2, state, base=1, touched={"model.table": bitmap})
    return run


@fuzzed(60)
@given(data=st.data())
def test_mutated_files(pristine: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    run = Path(tmp_path_factory.getbasetemp()) / "mutated-run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(pristine, run)
    files = sorted(path for path in run.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    path.write_bytes(data.draw(mutated(path.read_bytes())))
    for step in (1, 2):
        found = read_or_refused(lambda step=step: read_tensors(str(run), step), CheckpointError)
        if found is not None:
            expected = read_tensors(str(pristine), step)
            assert found.keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
