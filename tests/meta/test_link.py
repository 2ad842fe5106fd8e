"""The staircase: it keeps every order, starts as the identity, and learns the median where a mean would be worse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contract import LAYOUT, check_contract, made_up
from hypothesis import given, settings
from hypothesis import strategies as st

from metatrain.config import EvaluateConfig
from metatrain.data.schema import LabelKind, Schema
from metatrain.evaluate.protocols import Judge
from metatrain.meta.link import ORDER_SHARE, ORDER_SHARE_OWN, Staircase
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
@settings(deadline=None)  # of time: a busy machine is no error
def test_keeps_the_order_of_scores_however_sharp_it_is(values: list[float], log_width: float):
    scores = torch.tensor(sorted(set(values)), dtype=torch.float64)
    staircase = Staircase(1, 5, 5).double()
    staircase.log_widths.data.fill_(log_width)
    found = staircase(scores)
    assert (found[1:] > found[:-1]).all() or (scores.diff() < 1e-6).any()


@pytest.mark.parametrize(("low", "high"), [(1.0, 5.0), (0.5, 5.0), (-10.0, 10.0), (0.0, 100.0)])
def test_scores_are_taught_half_by_gains_as_evaluation_counts_them(low: float, high: float):
    schema = Schema(features=(), label=LabelKind.RATING, label_mean=0, label_deviation=1, label_min=low, label_max=high)
    labels = np.linspace(low, high, 11)
    gains = Judge(schema, EvaluateConfig()).gains(labels)
    on_scale = low + (high - low) * (gains - gains[0]) / (gains[-1] - gains[0])
    found = Staircase(low, high, 5).worth(torch.tensor(labels))
    torch.testing.assert_close(found, torch.tensor((labels + on_scale) / 2))


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


def test_learns_how_a_task_uses_the_levels_from_its_support():
    """Half of the tasks use the whole scale, half give threes and fours for all: their medians differ given a score."""
    generator = torch.Generator().manual_seed(0)

    def labels_of(scores: torch.Tensor, timid: torch.Tensor) -> torch.Tensor:
        noisy = scores + 0.5 * torch.randn(scores.shape, generator=generator)
        return torch.where(timid[:, None], (noisy > 3).float() + 3, noisy.round().clamp(1, 5))

    timid = torch.arange(200) % 2 == 0
    support, query = (torch.rand(200, n, generator=generator) * 4 + 1 for n in (30, 20))
    given, asked = labels_of(support, timid), labels_of(query, timid)
    mask = (torch.arange(30) < torch.randint(10, 31, (200, 1), generator=generator)).float()
    torch.manual_seed(0)
    staircase = Staircase(1, 5, 5, own=True)
    optimizer = torch.optim.Adam(staircase.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        (staircase(query, staircase.steps_of(support, given, mask)) - asked).abs().mean().backward()
        optimizer.step()
    with torch.no_grad():
        fresh = torch.rand(200, 20, generator=generator) * 4 + 1
        truth = labels_of(fresh, timid)
        own = staircase(fresh, staircase.steps_of(support, given, mask))
    best = float((torch.where(timid[:, None], (fresh > 3).float() + 3, fresh.round()) - truth).abs().mean())
    assert float((own - truth).abs().mean()) < best + 0.06
    shared = min(float((fresh.clamp(low, high).round() - truth).abs().mean()) for low in (1, 2, 3) for high in (4, 5))
    assert float((own - truth).abs().mean()) < shared - 0.1


def test_padding_moves_nothing_and_tasks_without_support_have_the_same_steps():
    torch.manual_seed(0)
    staircase = Staircase(1, 5, 5, own=True)
    for parameter in staircase.personal.parameters():
        torch.nn.init.normal_(parameter)
    scores, labels = torch.rand(3, 6) * 4 + 1, torch.randint(1, 6, (3, 6)).float()
    mask = torch.tensor([[1.0] * 4 + [0] * 2] * 2 + [[0.0] * 6])
    steps = staircase.steps_of(scores, labels, mask)
    torch.testing.assert_close(steps[:2], staircase.steps_of(scores[:2, :4], labels[:2, :4], mask[:2, :4]))
    assert steps[0].abs().max() > 0.01
    nothing = staircase.steps_of(scores[:, :0], labels[:, :0], mask[:, :0])
    assert nothing.any()
    torch.testing.assert_close(nothing, steps[2].expand(3, -1))


@pytest.mark.parametrize("own", [True, False])
def test_a_meta_learner_with_a_staircase_keeps_what_it_promises(own: bool):
    def make() -> Ridge:
        torch.manual_seed(1)
        meta = Ridge(Factorisation(LAYOUT.width, layout=LAYOUT, hidden=(5,), offset=3.0), loss="absolute")
        meta.link = Staircase(1, 5, 5, own=own)
        if not own:
            return meta.double()
        for parameter in meta.link.personal.parameters():  # zero at the start, and then nothing is personal
            torch.nn.init.normal_(parameter, std=0.3)
        return meta.double()

    meta, episodes = make(), made_up()
    found = meta(episodes)
    fast = meta.adapt_whole(episodes.support, {})
    scores, query = meta.predict(fast, episodes.query), episodes.query
    assert meta.link is not None
    torch.testing.assert_close(meta.predictions(fast, query), meta.link(scores, fast.steps))
    torch.testing.assert_close(meta.task_losses(meta.link(scores, fast.steps), query).detach(), found.after)
    share = ORDER_SHARE_OWN if own else ORDER_SHARE
    squares = ((scores - meta.link.worth(query.labels)).square() * query.mask).sum(-1) / query.mask.sum(-1)
    torch.testing.assert_close(found.total, found.after.sum() + share * squares.sum())
    check_contract(make, own_losses=True)


@pytest.mark.parametrize(("low", "high", "levels"), [(1, 5, 1), (5, 5, 3)])
def test_refuses_fewer_than_two_levels(low: float, high: float, levels: int):
    with pytest.raises(ValueError, match="two levels at least"):
        Staircase(low, high, levels)
