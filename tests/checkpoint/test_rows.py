"""Rows in fewer bits: what comes back is within the stated bound, and what cannot be stored is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from metatrain.checkpoint.rows import Encoding, decoded, encoded
from metatrain.errors import CheckpointError

# bfloat16 rounds float32's last few numbers below infinity to infinity.
numbers = st.floats(-(2.0**127), 2.0**127, width=32)


@st.composite
def tables(draw: st.DrawFn) -> Tensor:
    count, width = draw(st.integers(0, 6)), draw(st.integers(1, 9))
    flat = draw(st.lists(numbers, min_size=count * width, max_size=count * width))
    return torch.tensor(flat, dtype=torch.float32).reshape(count, width)


def back(rows: Tensor, encoding: Encoding) -> Tensor:
    data, scales = encoded(rows, encoding)
    return decoded(data, scales, rows.dtype)


@given(tables())
def test_exact_rows_come_back_bit_for_bit(rows: Tensor) -> None:
    assert torch.equal(back(rows, "exact").view(torch.int32), rows.view(torch.int32))


@given(tables())
def test_bfloat16_is_off_by_a_256th_of_a_number(rows: Tensor) -> None:
    off = (back(rows, "bfloat16").double() - rows.double()).abs()
    assert bool((off <= rows.double().abs() * 2**-8 + 1e-40).all())


@given(tables())
def test_int8_is_off_by_half_a_level(rows: Tensor) -> None:
    found, exact = back(rows, "int8").double(), rows.double()
    if not rows.shape[0]:
        assert found.shape == rows.shape
        return
    span = exact.amax(1, keepdim=True) - exact.amin(1, keepdim=True)
    rounding = 2.0**-23 * exact.abs().amax(1, keepdim=True)
    assert bool(((found - exact).abs() <= span / 510 * (1 + 1e-4) + rounding + 1e-42).all())


def test_int8_levels_are_spread_over_each_row_by_itself() -> None:
    rows = torch.tensor([[0.0, 1.0, 0.5], [100.0, 100.0, 100.0], [-1e-3, 0.0, 1e-3]])
    assert encoded(rows, "int8")[0][:, :2].tolist() == [[0, 255], [0, 0], [0, 128]]
    assert torch.equal(back(rows, "int8")[1], rows[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_int8_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        encoded(torch.tensor([[0.0, bad]]), "int8")
    assert str(float(back(torch.tensor([[bad]]), "bfloat16")[0, 0])) == str(bad)
