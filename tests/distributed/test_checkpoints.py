"""Checkpoints of several ranks: full and differential ones, loaded at other numbers of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointed import Small
from ranks import run_ranks
from torch import Tensor

from metatrain.checkpoint import MODEL, committed_steps, read_marker, read_tensors
from metatrain.checkpoint.contents import read_contents
from metatrain.checkpoint.format import checkpoint_url


def train_and_save(rank: int, world_size: int, run: str, table: str, full_every: int) -> dict[str, Any]:
    """Checkpoints after steps 2, 3 and 4; then one step more."""
    small = Small(rank, world_size, run, table, full_every=full_every)
    small.train(2)
    full = [small.save()]
    states = {2: small.whole()}
    for step in (3, 4):
        small.train(1, tasks=2)
        full.append(small.save(wait=False))
        states[step] = small.whole()  # training may go on at once
    losses = small.train(2)
    small.saver.wait()
    return {"states": states, "full": full, "losses": losses}


def load_and_train(rank: int, world_size: int, run: str, table: str, step: int) -> dict[str, Any]:
    small = Small(rank, world_size, run, table, full_every=10)
    small.load(step)
    state = small.whole()
    marked = {name: bitmap.nonzero().squeeze(1).tolist() for name, bitmap in small.touched.items()}
    return {"state": state, "losses": small.train(2), "marked": marked}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("table", "full_every"), [("rowwise_adagrad", 1), ("rowwise_adagrad", 3), ("adagrad", 3)])
def test_four_ranks_save_and_other_numbers_go_on(tmp_path: Path, table: str, full_every: int) -> None:
    run = str(tmp_path / "run")
    ranks = run_ranks(train_and_save, 4, run, table, full_every)
    saved = ranks[0]
    assert committed_steps(run) == [2, 3, 4]
    assert saved["full"] == ([True] * 3 if full_every == 1 else [True, False, False])
    for step in (2, 3, 4):
        assert_equal(read_tensors(run, step), saved["states"][step])
        assert read_marker(run, step).world_size == 4
    for world_size in (1, 2, 3):
        loaded = run_ranks(load_and_train, world_size, run, table, 4)
        for rank in loaded:
            assert_equal(rank["state"], saved["states"][4])
            assert rank["losses"] == pytest.approx(saved["losses"], rel=1e-6)
    assert_equal(run_ranks(load_and_train, 4, run, table, 3)[0]["state"], saved["states"][3])
    if full_every > 1:
        changed = {
            name: (saved["states"][4][name] != saved["states"][2][name]).flatten(1).any(1).nonzero().squeeze(1).tolist()
            for name in loaded[0]["marked"]
            if name.startswith(MODEL)
        }
        tables = {name: len(saved["states"][4][name]) for name in changed}
        assert any(0 < len(rows) < tables[name] for name, rows in changed.items())
        for name, rows in changed.items():
            block = -(-tables[name] // 3)
            marked = {row + rank * block for rank, part in enumerate(loaded) for row in part["marked"][name]}
            assert set(rows) <= marked
            assert len(marked) < tables[name] or len(rows) == tables[name]


def undisturbed(rank: int, world_size: int, run: str) -> dict[str, Tensor]:
    small = Small(rank, world_size, run)
    small.train(3)
    small.save()
    small.train(3)
    return small.whole()


def stopped(rank: int, world_size: int, run: str) -> dict[str, Tensor]:
    small = Small(rank, world_size, run)
    small.load(3)
    small.train(3)
    return small.whole()


@pytest.mark.timeout(200)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_run_that_goes_on_at_the_same_number_of_ranks_is_bit_for_bit_the_same(
    tmp_path: Path, world_size: int
) -> None:
    """Of three ranks' numbers and more, a sum depends on the order: DDP's own changes after its first step."""
    run = str(tmp_path / "run")
    assert_equal(
        run_ranks(undisturbed, world_size, run)[0],
        run_ranks(stopped, world_size, run)[0],
    )


def go_on(rank: int, world_size: int, run: str) -> list[Any]:
    """From the newest checkpoint: a differential one, and again."""
    small = Small(rank, world_size, run, full_every=3)
    small.load(committed_steps(run)[-1])
    found = []
    for _ in range(3):
        small.train(1, tasks=1)
        found.append((small.save(), small.whole()))
    return found


@pytest.mark.timeout(300)
def test_a_run_that_goes_on_from_a_differential_checkpoint_builds_on_the_same_full_one(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    run_ranks(train_and_save, 2, run, "rowwise_adagrad", 10)
    found = run_ranks(go_on, 3, run)[0]
    # The full one of step 2 has two differential ones already.
    assert [full for full, _ in found] == [True, False, False]
    assert [read_marker(run, step).base is None for step in (2, 3, 4, 5, 6, 7)] == [
        True,
        False,
        False,
        True,
        False,
        False,
    ]
    for step, (_, state) in zip((5, 6, 7), found, strict=True):
        assert_equal(read_tensors(run, step), state)


def two_differential(rank: int, world_size: int, run: str, rows: str) -> dict[str, Tensor]:
    small = Small(rank, world_size, run, "adagrad", full_every=9, rows=rows)
    small.train(2)
    small.save()
    small.train(2)
    small.save()
    return small.whole()


@pytest.mark.timeout(200)
@pytest.mark.parametrize("rows", ["bfloat16", "int8"])
def test_rows_in_fewer_bits_are_off_by_no_more_than_is_stated(tmp_path: Path, rows: str) -> None:
    run = str(tmp_path / "run")
    exact = run_ranks(two_differential, 2, run, rows)[0]
    found = read_tensors(run, 4)
    marker = read_marker(run, 4)
    contents = read_contents(checkpoint_url(run, 4), marker.contents)
    inexact = 0
    for name, tensor in exact.items():
        if not (contents.tensors[name].partial and name.startswith(MODEL)):
            assert torch.equal(tensor, found[name]), name
            continue
        off = (tensor - found[name]).abs()
        span = tensor.amax(1, keepdim=True) - tensor.amin(1, keepdim=True)
        bound = span / 510 + 1e-6 * tensor.abs().amax(1, keepdim=True) if rows == "int8" else tensor.abs() * 2**-8
        assert bool((off <= bound * (1 + 1e-5)).all()), name
        inexact += int((off > 0).sum())
    assert inexact
