"""The staircase: it keeps every order, starts as the identity, and learns the median where a mean would be worse."""

from __future__ import annotations

import pytest
import torch
from contract import LAYOUT, check_contract, made_up
from hypothesis import given
from hypothesis import strategies as st

from metatrain.meta.link import ORDER_SHARE, Staircase
from metatrain.meta.ridge import Ridge
from metatrain.model.learners.factorisation import Factorisation


def test_starts_near_the_identity():
    for low, high, levels in ((1.0, 5.0, 5), (0.5, 5.0, 10), (0.0, 100.0, 3)):
        scores = torch.linspace(low, high, 101)
        gap = (high - low) / (levels - 1)
        away = (Staircase(low, high, levels)(scores) - scores).abs() / gap
        assert (away < 0.2).all()
        assert (away[(scores > low + gap / 2) & (scores < high - gap / 2)] < 0.06).all()


@given(st.lists(st.floats(-3, 9), min_size=2, max_size=20), st.floats(-4, 0))
def test_keeps_the_order_of_scores_however_sharp_it_is(values: list[float], log_width: float):
    scores = torch.tensor(sorted(set(values)), dtype=torch.float64)
    staircase = Staircase(1, 5, 5).double()
    staircase.log_widths.data.fill_(log_width)
    found = staircase(scores)
    assert (found[1:] > found[:-1]).all() or (scores.diff() < 1e-6).any()


def test_learns_the_median_of_stars():
    """Labels around a known score: absolute error is least at the median, which is a level; no continuous prediction
    that is a fixed shift of the score comes as near."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(200, 50, generator=generator) * 4 + 1
    labels = (scores + 0.7 * torch.randn(200, 50, generator=generator)).round().clamp(1, 5)
    staircase = Staircase(1, 5, 5)
    optimizer = torch.optim.Adam(staircase.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        (staircase(scores) - labels).abs().mean().backward()
        optimizer.step()
    error = float((staircase(scores).detach() - labels).abs().mean())
    # Given the score, the median of the label is the score rounded.
    best = float((scores.round() - labels).abs().mean())
    assert best - 0.002 < error < best + 0.01
    assert best < float((scores - labels).abs().mean()) - 0.03


def test_a_meta_learner_with_a_staircase_keeps_what_it_promises():
    def make() -> Ridge:
        torch.manual_seed(1)
        meta = Ridge(Factorisation(LAYOUT.width, layout=LAYOUT, hidden=(5,), offset=3.0), loss="absolute")
        meta.link = Staircase(1, 5, 5)
        return meta.double()

    meta, episodes = make(), made_up()
    found = meta(episodes)
    fast = meta.adapt(episodes.support, {})
    scores, query = meta.predict(fast, episodes.query), episodes.query
    assert meta.link is not None
    torch.testing.assert_close(meta.predictions(fast, query), meta.link(scores))
    torch.testing.assert_close(meta.task_losses(meta.link(scores), query).detach(), found.after)
    squares = ((scores - query.labels).square() * query.mask).sum(-1) / query.mask.sum(-1)
    torch.testing.assert_close(found.total, found.after.sum() + ORDER_SHARE * squares.sum())
    check_contract(make, own_losses=True)


@pytest.mark.parametrize(("low", "high", "levels"), [(1, 5, 1), (5, 5, 3)])
def test_refuses_fewer_than_two_levels(low: float, high: float, levels: int):
    with pytest.raises(ValueError, match="two levels at least"):
        Staircase(low, high, levels)
