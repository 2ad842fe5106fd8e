"""Metrics of a query's predictions, one value a task, for all tasks at once; and their intervals over tasks.

Arrays are padded: scores, labels and mask are [T, Q]; padding has mask False and changes no result. A task for which
a metric means nothing has NaN there, is left out of the mean, and is not counted in the `tasks` of its row. In every
metric each task weighs the same, however many events it has.

============  ==========================================================  =====================================
metric        of a task                                                   undefined (NaN) where
============  ==========================================================  =====================================
MAE           mean of |prediction - label| over its query                 no query event
RMSE          mean of squares; the root is taken of the mean over tasks   no query event
AUC           share of (relevant, other) pairs in the right order         the query holds one kind alone
nDCG@k        DCG@k over its greatest, gains as given                     all gains are 0
hit rate@k    1 where a relevant event is among the first k               no relevant event, or at most k events
recall@k      relevant events among the first k, of all relevant          no relevant event, or at most k events
precision@k   relevant events among the first k, of k                     no relevant event, or at most k events
MAP@k         mean over relevant events of the precision at their place   the query holds one kind alone
              (0 behind place k), over min(k, relevant events)
============  ==========================================================  =====================================

With at most k events every order has them all in its first k, so that hit rate, recall and precision would be the same
for every model.

Equal scores stand in no order: each ranking metric is its mean over all orders of the tied events, exactly. So a
constant predictor gets what shuffling would, never what the log's order happens to give. nDCG is that of scikit-learn
(`ndcg_score(gains, scores, k=k)`), AUC that of its `roc_auc_score`, MAP without ties and cut that of its
`average_precision_score` (which breaks ties otherwise).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from metatrain.evaluate.student import student_p, student_quantile

Array = np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks, its two-sided interval, and over how many tasks. No task: NaN."""

    value: float
    low: float
    high: float
    tasks: int


# --- one value a task ------------------------------------------------------------------------------------------------


def absolute_error(predictions: Array, labels: Array, mask: Array) -> Array:
    """Mean absolute error of each task: [T]."""
    return _mean(np.abs(predictions - labels), mask)


def squared_error(predictions: Array, labels: Array, mask: Array) -> Array:
    """Mean squared error of each task: [T]."""
    return _mean(np.square(predictions - labels), mask)


def auc(scores: Array, relevant: Array, mask: Array) -> Array:
    """Area under the ROC curve of each task, ties counted half: [T]. `relevant` is bool [T, Q]."""
    places = _places(scores, mask)
    positive = relevant & mask
    positives, others = positive.sum(1), (mask & ~relevant).sum(1)
    # Events ranked below an event, ties half: all others minus those above.
    below = mask.sum(1, keepdims=True) - places.above - (places.tied + 1) / 2
    wins = np.where(positive, below, 0.0).sum(1) - positives * (positives - 1) / 2
    return _ratio(wins, positives * others)


def ndcg(scores: Array, gains: Array, mask: Array, k: int) -> Array:
    """Normalised discounted cumulative gain at k of each task: [T]. `gains` (not negative) are used as they are."""
    gains = np.where(mask, gains, 0.0)
    return _ratio(_dcg(scores, gains, mask, k), _dcg(gains, gains, mask, k))


def hit_rate(scores: Array, relevant: Array, mask: Array, k: int) -> Array:
    """Chance that the first k hold a relevant event, for each task: [T]; 0 or 1 without ties."""
    places = _places(scores, mask)
    positive = relevant & mask
    surely = (positive & (places.above + places.tied <= k)).any(1)
    # The one group of ties that the cut at k goes through: `size` events, `good` of them relevant, `room` places.
    cut = mask & (places.above < k) & (places.above + places.tied > k)
    size, good = cut.sum(1), (cut & positive).sum(1)
    room = np.where(cut, k - places.above, 0).max(1, initial=0)
    missed = _chance_of_none(size, good, room)
    return _where_ranked(np.where(surely, 1.0, 1.0 - missed), positive, mask, k)


def recall(scores: Array, relevant: Array, mask: Array, k: int) -> Array:
    """Share of a task's relevant events that are among the first k, for each task: [T]."""
    places = _places(scores, mask)
    positive = relevant & mask
    inside = np.clip((k - places.above) / places.tied, 0.0, 1.0)
    found = np.where(positive, inside, 0.0).sum(1)
    return _where_ranked(_ratio(found, positive.sum(1)), positive, mask, k)


def precision(scores: Array, relevant: Array, mask: Array, k: int) -> Array:
    """Share of the first k that is relevant, for each task: [T]."""
    places = _places(scores, mask)
    positive = relevant & mask
    found = np.where(positive, np.clip((k - places.above) / places.tied, 0.0, 1.0), 0.0).sum(1)
    return _where_ranked(found / k, positive, mask, k)


def average_precision(scores: Array, relevant: Array, mask: Array, k: int) -> Array:
    """Average precision at k of each task: [T]; 1 where the first places hold relevant events alone."""
    positive = relevant & mask
    counts = positive.sum(1)
    if not scores.shape[1]:
        return np.full(len(scores), np.nan)
    places = _places(scores, mask)
    above, tied = (np.take_along_axis(of_event, places.order, 1) for of_event in (places.above, places.tied))
    good = np.take_along_axis(positive, places.order, 1)
    before = np.concatenate([np.zeros((len(good), 1), np.int64), np.cumsum(good, axis=1)], axis=1)
    good_above = np.take_along_axis(before, above, 1)
    good_tied = np.take_along_axis(before, above + tied, 1) - good_above
    # Over the orders of its ties, a place holds a relevant event with chance good_tied / tied; where it does, each
    # place before it in the ties holds one of the good_tied - 1 others with equal chance.
    place = np.arange(scores.shape[1])
    found = good_above + 1 + (place - above) * (good_tied - 1) / np.maximum(tied - 1, 1)
    parts = np.where(place < k, good_tied / tied * found / (place + 1), 0.0)
    both = (counts > 0) & (counts < mask.sum(1))
    return np.where(both, _ratio(parts.sum(1), np.minimum(counts, k)), np.nan)


# --- over tasks ------------------------------------------------------------------------------------------------------


def mean_of_draws(values: Array, tasks: Array) -> tuple[Array, Array]:
    """The tasks there are, ascending: int64 [T]; and each one's mean over its defined values: [T], NaN without any.

    Args:
        values: [N], NaN where undefined.
        tasks: int64 [N], which task each value is of.
    """
    known, index = np.unique(tasks, return_inverse=True)
    defined = ~np.isnan(values)
    total = np.bincount(index[defined], weights=values[defined], minlength=len(known))
    return known, _ratio(total, np.bincount(index[defined], minlength=len(known)))


def mean_over_tasks(values: Array, tasks: Array, confidence: float) -> Estimate:
    """Mean and Student interval over tasks of values that may come from several draws.

    Args:
        values: [N], NaN where undefined; a task may have several, one a draw. They are averaged first: tasks are
            what is independent, draws are not.
        tasks: int64 [N], which task each value is of.
        confidence: Of the interval, in (0, 1).

    Returns:
        NaN without a defined task; the interval is infinitely wide with one.
    """
    _, means = mean_of_draws(values, tasks)
    means = means[~np.isnan(means)]
    count = len(means)
    if not count:
        return Estimate(math.nan, math.nan, math.nan, 0)
    value = float(means.mean())
    if count == 1:
        return Estimate(value, -math.inf, math.inf, 1)
    half = student_quantile(confidence, count - 1) * float(means.std(ddof=1)) / math.sqrt(count)
    return Estimate(value, value - half, value + half, count)


def root(estimate: Estimate) -> Estimate:
    """The root of a mean of squares, its interval's ends with it."""
    low, high = (math.sqrt(max(end, 0.0)) for end in (estimate.low, estimate.high))
    return Estimate(math.sqrt(estimate.value), low, high, estimate.tasks)


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean difference over tasks, its interval, and the two-sided p-value of "there is none"."""

    p: float


def paired_difference(one: Array, other: Array, confidence: float) -> Difference:
    """The paired t-test over tasks of `one - other`, on the tasks where both are defined.

    Args:
        one, other: A value a task: [T], NaN where undefined.
        confidence: Of the interval, in (0, 1).

    Returns:
        p is at least the precision of a float64 (2.2e-16). It is NaN with fewer than two tasks, and 1 where all tasks
        have the very same value.
    """
    differences = one - other
    tasks = np.arange(len(differences))
    estimate = mean_over_tasks(differences, tasks, confidence)
    return Difference(estimate.value, estimate.low, estimate.high, estimate.tasks, _p_of_zero(differences))


def _p_of_zero(differences: Array) -> float:
    defined = differences[~np.isnan(differences)]
    count = len(defined)
    if count < 2:
        return math.nan
    if not defined.any():
        return 1.0
    error = float(defined.std(ddof=1)) / math.sqrt(count)
    return student_p(float(defined.mean()) / error if error else math.inf, count - 1)


# --- ranks under ties ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Places:
    above: Array  # int64 [T, Q]: events of a greater score
    tied: Array  # int64 [T, Q]: events of the same score, itself included; 1 in padding
    order: Array  # int64 [T, Q]: events best first, padding last


def _places(scores: Array, mask: Array) -> _Places:
    """Where each event stands in its task's order by score, best first."""
    tasks, width = scores.shape
    if not width:
        nothing = np.zeros_like(scores, dtype=np.int64)
        return _Places(nothing, nothing, nothing)
    # Padding last: behind events of any score, infinite ones too.
    order = np.lexsort((-np.where(mask, scores, 0.0), ~mask), axis=1)
    ranked, there = np.take_along_axis(scores, order, 1), np.take_along_axis(mask, order, 1)
    position = np.broadcast_to(np.arange(width), (tasks, width))
    new = np.ones((tasks, width), dtype=bool)
    new[:, 1:] = (ranked[:, 1:] != ranked[:, :-1]) | ~there[:, 1:]
    first = np.maximum.accumulate(np.where(new, position, 0), axis=1)
    last_of_group = np.ones((tasks, width), dtype=bool)
    last_of_group[:, :-1] = new[:, 1:]
    last = np.minimum.accumulate(np.where(last_of_group, position, width)[:, ::-1], axis=1)[:, ::-1]
    above, tied = np.empty_like(order), np.empty_like(order)
    np.put_along_axis(above, order, first, 1)
    np.put_along_axis(tied, order, last - first + 1, 1)
    return _Places(above, tied, order)


def _dcg(scores: Array, gains: Array, mask: Array, k: int) -> Array:
    places = _places(scores, mask)
    width = scores.shape[1]
    discounts = np.where(np.arange(width) < k, 1.0 / np.log2(np.arange(width) + 2.0), 0.0)
    summed = np.concatenate([[0.0], np.cumsum(discounts)])
    mean_discount = (summed[places.above + places.tied] - summed[places.above]) / places.tied
    return np.where(mask, gains * mean_discount, 0.0).sum(1)


def _chance_of_none(size: Array, good: Array, room: Array) -> Array:
    """Chance that `room` draws without replacement from `size` events meet none of the `good`: [T]."""
    possible = size - good >= room
    bad = np.where(possible, size - good, room)  # any value that keeps the logarithm defined
    return np.where(possible, np.exp(_log_choose(bad, room) - _log_choose(np.maximum(size, room), room)), 0.0)


def _log_choose(n: Array, m: Array) -> Array:
    table = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, int(n.max(initial=1)) + 1)))])
    return table[n] - table[m] - table[n - m]


def _where_ranked(values: Array, positive: Array, mask: Array, k: int) -> Array:
    return np.where(positive.any(1) & (mask.sum(1) > k), values, np.nan)


def _mean(values: Array, mask: Array) -> Array:
    return _ratio(np.where(mask, values, 0.0).sum(1), mask.sum(1))


def _ratio(above: Array, below: Array) -> Array:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below != 0)
