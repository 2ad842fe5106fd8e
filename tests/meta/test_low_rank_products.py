"""Products by either library are those of torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metatrain.meta import low_rank_products
from metatrain.meta.low_rank_products import accumulate, multiply, multiply_add, prefers_onednn

SIZES = st.integers(1, 40)


@pytest.fixture(params=[False, True], ids=["as torch does", "by oneDNN"])
def by_onednn(request, monkeypatch):
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(low_rank_products, "_WORTH_A_CALL", 0)
    monkeypatch.setattr(low_rank_products, "prefers_onednn", lambda: request.param)


@pytest.mark.usefixtures("by_onednn")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
def test_products_are_those_of_a_sum_over_the_inner_axis(dtype, beta):
    @settings(max_examples=20, deadline=None)
    @given(SIZES, SIZES, SIZES, st.booleans(), st.booleans())
    def check(m: int, k: int, n: int, left_turned: bool, right_turned: bool) -> None:
        generator = torch.Generator().manual_seed(m + 41 * k + 1681 * n)

        def matrix(rows: int, columns: int, turned: bool = False) -> torch.Tensor:
            shape = (columns, rows) if turned else (rows, columns)
            made = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            return made.t() if turned else made

        a, b, bias, into = matrix(m, k, left_turned), matrix(k, n, right_turned), matrix(1, n)[0], matrix(m, n)
        exact = (a.double()[:, :, None] * b.double()[None]).sum(1)
        close = {"rtol": 0, "atol": 1e-4 if dtype is torch.float32 else 1e-12}
        out = torch.full_like(into, torch.nan)
        multiply(a, b, out=out)
        torch.testing.assert_close(out.double(), exact, **close)
        multiply_add(bias, a, b, out=out)
        torch.testing.assert_close(out.double(), exact + bias.double(), **close)
        expected = exact + beta * into.double()
        accumulate(into, a, b, beta=beta)
        torch.testing.assert_close(into.double(), expected, **close)

    check()


@pytest.mark.usefixtures("by_onednn")
def test_weights_with_gaps_between_their_rows_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(low_rank_products, "_onednn", lambda *_: pytest.fail("too slow with such weights"))
    a, b, out = torch.randn(3, 4), torch.randn(4, 9)[:, :5], torch.empty(3, 5)
    multiply(a, b, out=out)
    torch.testing.assert_close(out, torch.mm(a, b))


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX2", False), ("AuthenticAMD", "AVX512", True)],
)
def test_onednn_is_preferred_where_mkl_leaves_half_of_the_core_idle(monkeypatch, vendor, capability, expected):
    monkeypatch.setattr(low_rank_products, "_vendor", lambda: f"vendor_id\t: {vendor}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    expected = expected and torch.backends.mkldnn.is_available()
    prefers_onednn.cache_clear()
    try:
        assert prefers_onednn() is expected
    finally:
        prefers_onednn.cache_clear()
