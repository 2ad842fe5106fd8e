"""What a differential checkpoint holds: any rows come back with all the others as they were, in fewer bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metatrain import storage
from metatrain.checkpoint import read_marker, read_tensors
from metatrain.checkpoint.listing import listed
from metatrain.checkpoint.load import load_checkpoint
from metatrain.checkpoint.retention import prune
from tests.checkpoint.made_up import save


@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 5),
    touched=st.sets(st.integers(0, 39), max_size=40),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_touched_rows_come_back_over_the_full_ones(
    tmp_path: Path, rows: int, width: int, touched: set[int], seed: int
) -> None:
    run, generator = str(tmp_path / "run"), torch.Generator().manual_seed(seed)
    storage.remove(run)
    state = {
        "model.table": torch.randn(rows, width, generator=generator),
        "table_optimizer.table.momentum1": torch.rand(rows, generator=generator),
        "model.dense": torch.randn(3, generator=generator),
    }
    save(run, 1, state)
    bitmap = torch.zeros(rows, dtype=torch.bool)
    bitmap[[row for row in touched if row < rows]] = True
    for name, tensor in state.items():
        changed = torch.randn(tensor.shape, generator=generator)
        state[name] = (
            changed
            if name == "model.dense"
            else torch.where(bitmap.view(-1, *[1] * (tensor.dim() - 1)), changed, tensor)
        )
    marked = {name: bitmap for name in state if name != "model.dense"}
    save(run, 2, state, base=1, touched=marked)
    found = read_tensors(run, 2)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    marker = read_marker(run, 2)
    assert marker.bytes <= read_marker(run, 1).bytes


def test_popular_items_make_small_checkpoints(tmp_path: Path) -> None:
    """200,000 items of 16 numbers, and row-wise Adagrad's sums; between checkpoints 300,000 events on items of a
    popularity of 1 / rank^1.4: six times fewer bytes."""
    run, items, events = str(tmp_path), 200_000, 300_000
    shares = torch.arange(1, items + 1, dtype=torch.float64).pow(-1.4)
    generator = torch.Generator().manual_seed(0)
    asked = torch.multinomial(shares, events, replacement=True, generator=generator)
    bitmap = torch.zeros(items, dtype=torch.bool)
    bitmap[asked] = True
    state = {"model.table": torch.randn(items, 16), "table_optimizer.table.momentum1": torch.rand(items)}
    save(run, 1, state)
    save(run, 2, state, base=1, touched=dict.fromkeys(state, bitmap))
    assert int(bitmap.sum()) > 5_000
    assert read_marker(run, 1).bytes > 6 * read_marker(run, 2).bytes


@pytest.mark.parametrize("changed", [3, 38])
def test_a_resume_marks_what_the_differential_one_brought(
    tmp_path: Path, changed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nearly all rows were touched all are stored, and marked; a full checkpoint marks none."""
    import torch.distributed.checkpoint as dcp

    alone = dcp.load
    monkeypatch.setattr(dcp, "load", lambda *a, **k: alone(*a, **{**k, "no_dist": True}))
    run = str(tmp_path)
    state = {"model.table": torch.randn(40, 4)}
    save(run, 1, state)
    bitmap = torch.zeros(40, dtype=torch.bool)
    bitmap[:changed] = True
    save(run, 2, state, base=1, touched={"model.table": bitmap})
    marked = torch.ones(40, dtype=torch.bool)
    load_checkpoint(run, 2, {"model.table": torch.zeros(40, 4)}, {"model.table": marked})
    assert int(marked.sum()) == (3 if changed == 3 else 40)
    load_checkpoint(run, 1, {"model.table": torch.zeros(40, 4)}, {"model.table": marked})
    assert not marked.any()


def test_an_object_store_holds_them_too() -> None:
    run = "memory://differential/run"
    storage.remove(run)
    state = {
        "model.table": torch.randn(3_000_000, 4),
        "model.dense": torch.randn(3),
    }  # several blocks, fetched together
    save(run, 1, state)
    bitmap = torch.zeros(3_000_000, dtype=torch.bool)
    bitmap[[5, 2_999_999]] = True
    state["model.table"][bitmap] = 7.0
    save(run, 2, state, base=1, touched={"model.table": bitmap})
    found = read_tensors(run, 2)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert not any(line.problem for line in listed(run, verify=True))
    assert prune(run, 1) == []
    save(run, 3, state)
    assert prune(run, 1) == [1, 2]
    assert [line.step for line in listed(run)] == [3]
    storage.remove(run)
