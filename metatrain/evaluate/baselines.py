"""Baselines that every evaluation prints beside the model: fitted on training users' events of existing items alone.

==============================  =====================================================================================
global mean                     the training labels' mean
support mean, support median    of the task's own support labels; the global mean without support
item + user bias                mean + item's bias + user's bias: both are mean residuals, shrunk towards 0; the
                                user's comes from the support
matrix factorisation fold-in    factors of items by alternating least squares on the residuals of the biases; a new
                                user is folded in by ridge regression, bias and factor together, on the support
popularity                      training events of the item: an order, not a rating, so it has no error in stars
==============================  =====================================================================================

An item without training events has bias 0 and factor 0. Shrinkage, rank and regularisation are chosen on validation
users from small grids, never on what is reported: on whole supports for the table; for the curve by support size how
much a user's bias is shrunk is chosen again, on supports of its sizes. Where labels have few levels (stars), each
baseline's predictions are rounded to them where validation users' error is then less. Clicks are taken as labels of
0 and 1, so predictions are estimates of their probability. Nothing loops over users or events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from metatrain.evaluate.factorisation import Factorisation, fit_factors
from metatrain.evaluate.tasks import PaddedTasks
from metatrain.evaluate.training_events import TrainingEvents

Array = np.ndarray


class Baseline(Protocol):
    """A predictor with nothing meta-trained in it."""

    @property
    def name(self) -> str:
        """Its row's name."""
        ...

    @property
    def predicts(self) -> bool:
        """Whether scores are predictions of the label, or an order alone."""
        ...

    def scores(self, tasks: PaddedTasks) -> Array:
        """Scores of the query events: float64 [T, Q], anything in padding."""
        ...


# --- constants -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GlobalMean:
    """The training labels' mean for every event."""

    mean: float
    name: str = "global mean"
    predicts: bool = True

    def scores(self, tasks: PaddedTasks) -> Array:
        return np.full(tasks.query_items.shape, self.mean)


@dataclass(frozen=True)
class SupportMean:
    """The mean of a task's support labels."""

    fallback: float
    name: str = "support mean"
    predicts: bool = True

    def scores(self, tasks: PaddedTasks) -> Array:
        count = tasks.support_mask.sum(1)
        total = np.where(tasks.support_mask, tasks.support_labels, 0.0).sum(1)
        mean = np.where(count > 0, total / np.maximum(count, 1), self.fallback)
        return np.broadcast_to(mean[:, None], tasks.query_items.shape).copy()


@dataclass(frozen=True)
class SupportMedian:
    """The median of a task's support labels: of an even number, the mean of the middle two."""

    fallback: float
    name: str = "support median"
    predicts: bool = True

    def scores(self, tasks: PaddedTasks) -> Array:
        count = tasks.support_mask.sum(1)
        if not tasks.support_mask.shape[1]:
            return np.full(tasks.query_items.shape, self.fallback)
        ordered = np.sort(np.where(tasks.support_mask, tasks.support_labels, np.inf), axis=1)
        middle = np.stack([np.maximum(count - 1, 0) // 2, np.minimum(count // 2, ordered.shape[1] - 1)], axis=1)
        median = np.take_along_axis(ordered, middle, 1).mean(1)
        median = np.where(count > 0, median, self.fallback)
        return np.broadcast_to(median[:, None], tasks.query_items.shape).copy()


@dataclass(frozen=True)
class Popularity:
    """An item's number of training events. New items all have 0: one tie."""

    events: Array  # int64 [I]
    name: str = "popularity"
    predicts: bool = False

    def scores(self, tasks: PaddedTasks) -> Array:
        return self.events[tasks.query_items].astype(np.float64)


# --- biases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bias:
    """mean + item's bias + user's bias, the latter from the support: Σ residuals / (events + user_shrinkage)."""

    mean: float
    items: Array  # float64 [I]
    user_shrinkage: float
    name: str = "item + user bias"
    predicts: bool = True

    def scores(self, tasks: PaddedTasks) -> Array:
        residuals = tasks.support_labels - self.mean - self.items[tasks.support_items]
        total = np.where(tasks.support_mask, residuals, 0.0).sum(1)
        users = total / np.maximum(tasks.support_mask.sum(1) + self.user_shrinkage, 1e-9)
        return self.mean + self.items[tasks.query_items] + users[:, None]


def fit_biases(
    events: TrainingEvents, item_shrinkage: float, user_shrinkage: float, rounds: int = 5
) -> tuple[Array, Array]:
    """Item biases [I] and training users' biases [U]: each in turn the shrunk mean residual of the other."""
    centred = events.labels.astype(np.float64) - events.mean
    per_item = np.bincount(events.items, minlength=events.item_count) + item_shrinkage
    per_user = np.bincount(events.users, minlength=events.user_count) + user_shrinkage
    items, users = np.zeros(events.item_count), np.zeros(events.user_count)
    for _ in range(rounds):
        items = np.bincount(events.items, weights=centred - users[events.users], minlength=events.item_count) / per_item
        users = np.bincount(events.users, weights=centred - items[events.items], minlength=events.user_count) / per_user
    return items, users


# --- levels ----------------------------------------------------------------------------------------------------------

#: More distinct labels than this are a continuous scale.
_MOST_LEVELS = 12
#: Share of a score left beside its level, so that rounding makes no ties: rankings stay what they were.
_SLOPE = 0.01


@dataclass(frozen=True)
class InLevels:
    """Another baseline's predictions, rounded to the nearest of the labels' levels: under absolute error the best guess
    of a number of stars is a number of stars, as the median is one and the mean is not."""

    baseline: Baseline
    levels: Array  # float64 [L], ascending
    predicts: bool = True

    @property
    def name(self) -> str:
        """The other's."""
        return self.baseline.name

    def scores(self, tasks: PaddedTasks) -> Array:
        scores = self.baseline.scores(tasks)
        nearest = self.levels[np.searchsorted((self.levels[1:] + self.levels[:-1]) / 2, scores)]
        return nearest + _SLOPE * (scores - nearest)


def levels_of(events: TrainingEvents) -> Array | None:
    """The labels' levels: float64 [L], ascending; None where labels are clicks or of a continuous scale."""
    found = np.unique(events.labels[:100_000]).astype(np.float64)
    return found if 2 < len(found) <= _MOST_LEVELS else None


# --- fitting all -----------------------------------------------------------------------------------------------------

ITEM_SHRINKAGE = (1.0, 2.0, 5.0, 10.0, 25.0)
USER_SHRINKAGE = (0.5, 1.0, 3.0, 10.0, 30.0)
REGULARISATION = (5.0, 10.0, 20.0)


@dataclass(frozen=True)
class Fitted:
    """The baselines, what was chosen for them, and what the reader of the table should know."""

    baselines: tuple[Baseline, ...]
    #: The same, by the same names, as they do best on small supports.
    on_small_supports: tuple[Baseline, ...]
    chosen: dict[str, float]
    notes: tuple[str, ...]


def fit(
    events: TrainingEvents,
    popularity: Array,
    validation: Iterable[PaddedTasks],
    error: Callable[[Array, PaddedTasks], Array],
    *,
    small: Iterable[PaddedTasks] = (),
    ranks: Sequence[int] | None = None,
    rounds: int = 10,
    seed: int = 0,
    task: str = "user",
) -> Fitted:
    """Fits all baselines.

    Args:
        events: Of training users on existing items.
        popularity: Training events of each item: int64 [I].
        validation: The validation users' tasks; none: defaults are used, and noted.
        error: Of scores [T, Q] a value a task, lower is better, NaN where undefined.
        small: The validation users' tasks with supports cut to the curve's sizes; none: the curve has the table's
            settings.
        ranks: Of the factorisation, tried on validation users. Default: 32, and 8 where events are few.
        rounds: Of alternating least squares.
        seed: Of the factors' start.
        task: What a task is, for what people read: "user" or "item".
    """
    notes: list[str] = []
    tasks, small = list(validation), list(small)
    mean = events.mean

    def chosen(candidates: Sequence[Baseline], judged_on: Sequence[PaddedTasks]) -> int:
        """The candidate of the least error; the middle one where none has any."""
        values = [np.concatenate([error(c.scores(t), t) for t in judged_on]) for c in candidates] if judged_on else []
        means = np.array([np.nanmean(v) if not np.isnan(v).all() else np.inf for v in values])
        return int(means.argmin()) if np.isfinite(means).any() else len(candidates) // 2

    if not tasks:
        notes.append("No validation task: the baselines' shrinkage, rank and regularisation are defaults.")
    if events.limited:
        notes.append(f"Baselines are fitted on the first {events.user_count:,} training {task}s.")
    grid = [(i, u, fit_biases(events, i, u)) for u in USER_SHRINKAGE for i in ITEM_SHRINKAGE]
    biases = [Bias(mean, fitted[0], u) for _, u, fitted in grid]
    best = chosen(biases, tasks)
    item_shrinkage, user_shrinkage, (item_bias, user_bias) = grid[best]
    residuals = events.labels - mean - item_bias[events.items] - user_bias[events.users]
    ranks = ranks or ((32,) if events.labels.size > 300_000 else (8, 32))
    factorisations = [
        Factorisation(
            mean, item_bias, fit_factors(events, residuals, rank, strength, rounds, seed), user_shrinkage, strength
        )
        for rank in ranks
        for strength in REGULARISATION
    ]
    factorisation = factorisations[chosen(factorisations, tasks)]
    # A few events need another shrinkage than many: at one setting for both, the curve would show a poor baseline.
    bias_small, factorisation_small = biases[best], factorisation
    if small:
        of_items = [b for b, (i, _, _) in zip(biases, grid, strict=True) if i == item_shrinkage]
        bias_small = of_items[chosen(of_items, small)]
        shrunk = [replace(factorisation, user_shrinkage=u) for u in USER_SHRINKAGE]
        factorisation_small = shrunk[chosen(shrunk, small)]
        again = (bias_small.user_shrinkage, factorisation_small.user_shrinkage)
        if again != (user_shrinkage, user_shrinkage):
            whose = "a user's" if task == "user" else "an item's"
            notes.append(
                f"By support size, {whose} bias is shrunk by {again[0]:g} ({bias_small.name}) and {again[1]:g} "
                f"({factorisation.name}) in place of {user_shrinkage:g}: best on validation {task}s with so few events."
            )
    constants = (GlobalMean(mean), SupportMean(mean), SupportMedian(mean))
    levels = levels_of(events)

    def at_best(baseline: Baseline, judged_on: Sequence[PaddedTasks]) -> Baseline:
        """Its predictions rounded, where that is better on validation tasks."""
        if levels is None or not judged_on:
            return baseline
        return (baseline, InLevels(baseline, levels))[chosen((baseline, InLevels(baseline, levels)), judged_on)]

    table = [at_best(b, tasks) for b in (*constants, biases[best], factorisation)]
    curve = [at_best(b, small or tasks) for b in (*constants, bias_small, factorisation_small)]
    if rounded := [b.name for b in table if isinstance(b, InLevels)]:
        notes.append(f"Rounded to the labels' levels, which is better on validation {task}s: {', '.join(rounded)}.")
    popular = Popularity(popularity, "popularity" if task == "user" else "activity")
    return Fitted(
        (*table, popular),
        (*curve, popular),
        {
            "item_shrinkage": item_shrinkage,
            "user_shrinkage": user_shrinkage,
            "rank": factorisation.factors.shape[1],
            "regularisation": factorisation.regularisation,
            "user_shrinkage_on_small_supports": bias_small.user_shrinkage,
            "factorisation_user_shrinkage_on_small_supports": factorisation_small.user_shrinkage,
        },
        tuple(notes),
    )
