"""Metrics against scikit-learn and, for ties, against the mean over all orders."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metatrain.evaluate import metrics, student

sklearn_metrics = pytest.importorskip("sklearn.metrics")


def padded(rows: list[np.ndarray], fill: float, dtype=np.float64) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows), default=0)), fill, dtype=dtype)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out


@st.composite
def queries(draw):
    """Tasks of 1 to 8 events with many ties; padding is filled with what would win if it were read."""
    lengths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=6))
    scores = [np.array(draw(st.lists(st.integers(-2, 2), min_size=n, max_size=n)), dtype=float) / 2 for n in lengths]
    labels = [np.array(draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)), dtype=float) for n in lengths]
    return scores, labels, draw(st.integers(1, 6))


@settings(max_examples=150, deadline=None)
@given(queries())
def test_error_auc_and_ndcg_are_scikit_learns(case):
    scores, labels, k = case
    s, y = padded(scores, 99.0), padded(labels, 7.0)
    mask = padded([np.ones(len(row)) for row in scores], 0).astype(bool)
    gains = 2.0**y - 1.0
    mae, mse = metrics.absolute_error(s, y, mask), metrics.squared_error(s, y, mask)
    area, ndcg = metrics.auc(s, y >= 3, mask), metrics.ndcg(s, gains, mask, k)
    for t, (row, label) in enumerate(zip(scores, labels, strict=True)):
        assert mae[t] == pytest.approx(sklearn_metrics.mean_absolute_error(label, row))
        assert mse[t] == pytest.approx(sklearn_metrics.mean_squared_error(label, row))
        if 0 < (label >= 3).sum() < len(label):
            assert area[t] == pytest.approx(sklearn_metrics.roc_auc_score(label >= 3, row))
        else:
            assert math.isnan(area[t])
        if label.any() and len(label) > 1:  # scikit-learn refuses a single document
            assert ndcg[t] == pytest.approx(sklearn_metrics.ndcg_score([2**label - 1], [row], k=k))
        elif not label.any():
            assert math.isnan(ndcg[t])


@settings(max_examples=60, deadline=None)
@given(queries())
def test_hit_rate_and_recall_are_means_over_the_orders_of_ties(case):
    scores, labels, k = [row[:6] for row in case[0]], [row[:6] for row in case[1]], case[2]
    s, y = padded(scores, 99.0), padded(labels, 7.0)
    mask = padded([np.ones(len(row)) for row in scores], 0).astype(bool)
    hit, found = metrics.hit_rate(s, y >= 3, mask, k), metrics.recall(s, y >= 3, mask, k)
    for t, (row, label) in enumerate(zip(scores, labels, strict=True)):
        relevant = label >= 3
        if not relevant.any() or len(row) <= k:
            assert math.isnan(hit[t])
            assert math.isnan(found[t])
            continue
        orders = [o for o in itertools.permutations(range(len(row))) if all(np.diff(row[list(o)]) <= 0)]
        firsts = np.array([relevant[list(o)[:k]].sum() for o in orders])
        assert hit[t] == pytest.approx((firsts > 0).mean())
        assert found[t] == pytest.approx(firsts.mean() / relevant.sum())


@settings(max_examples=60, deadline=None)
@given(queries())
def test_precision_and_map_are_means_over_the_orders_of_ties(case):
    scores, labels, k = [row[:6] for row in case[0]], [row[:6] for row in case[1]], case[2]
    s, y = padded(scores, 99.0), padded(labels, 7.0)
    mask = padded([np.ones(len(row)) for row in scores], 0).astype(bool)
    found, average = metrics.precision(s, y >= 3, mask, k), metrics.average_precision(s, y >= 3, mask, k)
    for t, (row, label) in enumerate(zip(scores, labels, strict=True)):
        relevant = label >= 3
        orders = [o for o in itertools.permutations(range(len(row))) if all(np.diff(row[list(o)]) <= 0)]
        ranked = [[bool(relevant[i]) for i in o] for o in orders]
        if not relevant.any() or len(row) <= k:
            assert math.isnan(found[t])
        else:
            assert found[t] == pytest.approx(np.mean([sum(r[:k]) / k for r in ranked]))
        if not 0 < relevant.sum() < len(row):
            assert math.isnan(average[t])
            continue
        each = [sum(sum(r[: n + 1]) / (n + 1) for n in range(min(k, len(r))) if r[n]) for r in ranked]
        assert average[t] == pytest.approx(np.mean(each) / min(k, relevant.sum()))


def test_map_without_ties_and_cut_is_scikit_learns():
    generator = np.random.default_rng(3)
    scores, relevant = generator.normal(size=(50, 9)), generator.random((50, 9)) < 0.4
    relevant[:, 0], relevant[:, 1] = True, False
    found = metrics.average_precision(scores, relevant, np.ones((50, 9), bool), 9)
    expected = [sklearn_metrics.average_precision_score(r, s) for r, s in zip(relevant, scores, strict=True)]
    assert found == pytest.approx(expected)


def test_a_constant_predictor_gets_what_shuffling_gets():
    generator = np.random.default_rng(0)
    labels = generator.integers(1, 6, size=(4000, 10)).astype(float)
    mask = np.ones(labels.shape, dtype=bool)
    constant = metrics.ndcg(np.zeros_like(labels), 2**labels - 1, mask, 3)
    shuffled = metrics.ndcg(generator.random(labels.shape), 2**labels - 1, mask, 3)
    assert constant.mean() == pytest.approx(shuffled.mean(), abs=0.01)
    assert metrics.auc(np.zeros_like(labels), labels > 3, mask)[0] == 0.5


def test_infinite_scores_stay_before_padding():
    scores = np.array([[-np.inf, 1.0, 0.0]])
    mask = np.array([[True, True, False]])
    assert metrics.auc(scores, np.array([[True, False, True]]), mask)[0] == 0.0


def test_no_query_at_all():
    empty = np.zeros((3, 0))
    nothing = empty.astype(bool)
    assert np.isnan(metrics.absolute_error(empty, empty, nothing)).all()
    assert np.isnan(metrics.auc(empty, nothing, nothing)).all()
    assert np.isnan(metrics.ndcg(empty, empty, nothing, 1)).all()
    assert np.isnan(metrics.hit_rate(empty, nothing, nothing, 1)).all()
    assert np.isnan(metrics.precision(empty, nothing, nothing, 1)).all()
    assert np.isnan(metrics.average_precision(empty, nothing, nothing, 1)).all()


@pytest.mark.parametrize(
    ("degrees", "expected"),  # tables of Student's t, two-sided 95 %
    [(1, 12.7062), (2, 4.30265), (10, 2.22814), (100, 1.98397), (500, 1.96472), (501, 1.96471), (10**6, 1.95997)],
)
def test_student_quantile(degrees, expected):
    assert student.student_quantile(0.95, degrees) == pytest.approx(expected, rel=1e-4)


def test_interval_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        values = generator.normal(2.0, 1.0, size=12)
        estimate = metrics.mean_over_tasks(values, np.arange(12), 0.9)
        covered += estimate.low <= 2.0 <= estimate.high
    assert 870 <= covered <= 930


def test_draws_of_a_task_are_one_observation():
    values = np.array([1.0, 3.0, 1.0, 3.0, np.nan])
    tasks = np.array([0, 1, 0, 1, 2])
    once, twice = metrics.mean_over_tasks(values[:2], tasks[:2], 0.95), metrics.mean_over_tasks(values, tasks, 0.95)
    assert once == twice
    assert twice.tasks == 2
    assert metrics.mean_over_tasks(values[4:], tasks[4:], 0.95).tasks == 0


def test_root_maps_the_interval():
    estimate = metrics.root(metrics.Estimate(4.0, -1.0, 9.0, 5))
    assert (estimate.value, estimate.low, estimate.high) == (2.0, 0.0, 3.0)


@pytest.mark.parametrize("degrees", [1, 2, 5, 30, 499, 6039, 10**6])
@pytest.mark.parametrize("t", [0.0, 1e-6, 0.3, 1.0, 1.96, -2.5, 6.0])
def test_student_p_is_scipys(t, degrees):
    stats = pytest.importorskip("scipy.stats")
    assert student.student_p(t, degrees) == pytest.approx(2 * stats.t.sf(abs(t), degrees), rel=1e-8, abs=1e-15)


def test_student_p_is_never_below_the_precision_of_its_type():
    assert student.student_p(1e6, 500) == student.student_p(math.inf, 3) == np.finfo(float).eps


def test_paired_difference_is_scipys_paired_t_test():
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(2)
    one, other = generator.normal(size=(2, 40))
    other += 0.3 + one
    one[3] = other[7] = np.nan
    found = metrics.paired_difference(one, other, 0.9)
    both = ~np.isnan(one - other)
    expected = stats.ttest_rel(one[both], other[both])
    interval = expected.confidence_interval(0.9)
    assert found.tasks == 38
    assert found.value == pytest.approx((one - other)[both].mean())
    assert found.p == pytest.approx(expected.pvalue, rel=1e-8)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-4)


def test_a_difference_without_spread():
    same = np.array([1.0, 2.0, np.nan])
    assert metrics.paired_difference(same, same, 0.95).p == 1.0
    assert metrics.paired_difference(same, same + 1, 0.95).p == np.finfo(float).eps
    assert math.isnan(metrics.paired_difference(same[1:], same[1:] + 1, 0.95).p)
    assert metrics.paired_difference(same[2:], same[2:], 0.95).tasks == 0
