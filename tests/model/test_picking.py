"""Distinct ids, and rows picked side by side, forward, backward and twice backward: the kernels against torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metatrain.model import picking
from metatrain.model.picking import distinct, side_by_side


def picked(tables: list[Tensor], indices: list[Tensor], present: Tensor) -> Tensor:
    """In two pieces, put together again."""
    sizes = [len(present) // 3, len(present) - len(present) // 3]
    pieces = side_by_side(tables, indices, present, sizes)
    assert [len(piece) for piece in pieces] == sizes
    return torch.cat(pieces)


def by_torch(tables: list[Tensor], indices: list[Tensor], present: Tensor) -> Tensor:
    with mock.patch.dict(os.environ, METATRAIN_KERNELS="0"):
        return picked(tables, indices, present)


def gradients(
    pick: Callable[..., Tensor], tables: list[Tensor], indices: list[Tensor], present: Tensor
) -> list[Tensor]:
    """Values, their gradients, and the gradients of a function of these."""
    leaves = [table.clone().requires_grad_() for table in tables]
    values = pick(leaves, indices, present)
    nothing = sum((0 * leaf.sum() for leaf in leaves), torch.zeros(()))  # torch forgets tables without rows
    first = torch.autograd.grad(values.square().sum() + nothing, leaves, create_graph=True)
    second = torch.autograd.grad(sum((g.pow(3).sum() for g in first), nothing), leaves)
    return [values.detach(), *(g.detach() for g in first), *second]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    places = draw(st.integers(0, 40))
    sizes = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20)), min_size=1, max_size=4))
    present = torch.rand(places, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    tables = [torch.randn(rows, width, generator=generator) for rows, width in sizes]
    indices = [torch.randint(0, max(1, rows), (places,), generator=generator).to(dtype) for rows, _ in sizes]
    return tables, indices, present


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_the_kernel_gives_what_torch_gives(case: tuple[list[Tensor], list[Tensor], Tensor]) -> None:
    assert picking.kernels() is not None, "this machine has a compiler"
    for mine, theirs in zip(gradients(picked, *case), gradients(by_torch, *case), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_what_is_not_contiguous_is_read_as_it_stands() -> None:
    table, wide = torch.randn(6, 10)[:, ::2], torch.randn(5, 4).t().contiguous().t()
    indices, present = [torch.tensor([5, 0, 2, 3])[::2], torch.tensor([1, 4])], torch.tensor([True, False, True])[::2]
    assert not any(tensor.is_contiguous() for tensor in (table, wide, indices[0], present))
    assert torch.equal(picked([table, wide], indices, present), by_torch([table, wide], indices, present))


def test_what_is_not_finite_shows_in_its_places_alone() -> None:
    indices, present = [torch.tensor([1, 0, 2])], torch.tensor([True, False, True])
    for pick in (picked, by_torch):
        table = torch.tensor([[torch.nan], [1.0], [-2.0]], requires_grad=True)
        values = pick([table], indices, present)
        assert values.flatten().tolist() == [1.0, 0.0, -2.0]
        assert not torch.signbit(values[1])
        (gradient,) = torch.autograd.grad(values, table, torch.tensor([[1.0], [torch.nan], [3.0]]))
        assert gradient.flatten().tolist() == [0.0, 1.0, 3.0]


def test_a_table_that_needs_no_gradient_has_none() -> None:
    tables = [torch.randn(4, 3, requires_grad=True), torch.randn(5, 2), torch.randn(6, 1, requires_grad=True)]
    indices = [torch.tensor([3, 1]), torch.tensor([0, 4]), torch.tensor([5, 5])]
    values = picked(tables, indices, torch.tensor([True, True]))
    first = torch.autograd.grad(values.square().sum(), [tables[0], tables[2]], create_graph=True)
    assert first[0][3].tolist() == (2 * tables[0][3]).tolist()
    assert first[1][5].tolist() == (4 * tables[2][5]).tolist()
    second = torch.autograd.grad(sum(g.sum() for g in first), [tables[0], tables[2]])
    assert second[0].sum(1).tolist() == [0.0, 6.0, 0.0, 6.0]
    assert second[1].flatten().tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 4.0]


def large() -> tuple[list[Tensor], list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(3)
    places = 40_000
    tables = [torch.randn(rows, 24, generator=generator) for rows in (700, 5)]
    indices = [torch.randint(0, len(table), (places,), generator=generator) for table in tables]
    return tables, indices, torch.rand(places, generator=generator) < 0.8


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_change_nothing(threads: int) -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            found.append(gradients(picked, *large()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, several) for one, several in zip(*found, strict=True))


@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_index_outside_of_its_table_is_an_error(wrong: int) -> None:
    tables, indices = [torch.randn(9, 2), torch.randn(4, 3)], [torch.tensor([8, 0]), torch.tensor([0, wrong])]
    with pytest.raises(IndexError, match=rf"table 1 have indices .*{wrong}.*4 rows"):
        picked(tables, indices, torch.tensor([True, True]))
    # Where nothing is picked, no index is read.
    assert picked(tables, indices, torch.tensor([True, False]))[1].tolist() == [0.0] * 5


def test_other_types_go_by_torch() -> None:
    tables, indices, present = [torch.randn(4, 3).double()], [torch.tensor([3, 1])], torch.tensor([True, False])
    assert torch.equal(picked(tables, indices, present), torch.stack([tables[0][3], torch.zeros(3).double()]))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 400),
    numbers=st.lists(st.integers(0, 10_000), max_size=60),
    outside=st.lists(st.sampled_from([-1, -64, 400, 2**40]), max_size=2),
)
def test_distinct_ids_are_what_torch_gives(rows: int, numbers: list[int], outside: list[int]) -> None:
    ids = torch.tensor([number % rows for number in numbers] + outside, dtype=torch.int64)
    for mine, theirs in zip(distinct(ids, rows), torch.unique(ids, return_inverse=True), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.dtype == theirs.dtype


def test_a_piece_that_is_not_used_has_no_gradient() -> None:
    table = torch.randn(5, 3, requires_grad=True)
    present = torch.tensor([True, True, True])
    _, second = side_by_side([table], [torch.tensor([1, 2, 4])], present, [1, 2])
    second.sum().backward()
    assert table.grad is not None
    assert table.grad.sum(1).tolist() == [0.0, 0.0, 3.0, 0.0, 3.0]


def test_pieces_are_all_the_places() -> None:
    with pytest.raises(ValueError, match="pieces of 2 places in all, of 3"):
        side_by_side([torch.randn(5, 3)], [torch.zeros(3, dtype=torch.int64)], torch.ones(3, dtype=torch.bool), [2])
