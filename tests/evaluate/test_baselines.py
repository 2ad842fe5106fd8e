"""Baselines against loops that are slow and obvious, and against what is known of a made-up log."""

from __future__ import annotations

import numpy as np
import pytest

from metatrain.evaluate import baselines, metrics
from metatrain.evaluate.factorisation import Factorisation, fit_factors
from metatrain.evaluate.tasks import PaddedTasks
from metatrain.evaluate.training_events import TrainingEvents, training_events

ITEMS = 40


def log(users: int, rank: int, noise: float, seed: int, least: int = 8, most: int = 20) -> tuple[list, np.ndarray]:
    """Users with biases and tastes over fixed items: their (items, labels), and the items' biases."""
    fixed, generator = np.random.default_rng(7), np.random.default_rng(seed)
    factors, biases = fixed.normal(size=(ITEMS, rank)), fixed.normal(size=ITEMS) * 0.5
    people = []
    for _ in range(users):
        items = generator.permutation(ITEMS - 1)[: generator.integers(least, most + 1)]  # the last item is never seen
        taste, bias = generator.normal(size=rank), generator.normal() * 0.5
        people.append(
            (items, 3 + biases[items] + bias + factors[items] @ taste + generator.normal(size=len(items)) * noise)
        )
    return people, biases


def events_of(people: list) -> TrainingEvents:
    return TrainingEvents(
        np.repeat(np.arange(len(people)), [len(i) for i, _ in people]).astype(np.int32),
        np.concatenate([i for i, _ in people]).astype(np.int32),
        np.concatenate([y for _, y in people]).astype(np.float32),
        len(people),
        ITEMS,
    )


def tasks_of(people: list, query: int) -> PaddedTasks:
    def columns(parts: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        width = max(len(i) for i, _ in parts)
        items, labels = np.zeros((len(parts), width), np.int64), np.zeros((len(parts), width))
        mask = np.zeros((len(parts), width), bool)
        for row, (i, y) in enumerate(parts):
            items[row, : len(i)], labels[row, : len(i)], mask[row, : len(i)] = i, y, True
        return items, labels, mask

    support, asked = [(i[:-query], y[:-query]) for i, y in people], [(i[-query:], y[-query:]) for i, y in people]
    return PaddedTasks(np.arange(len(people)), *columns(support), *columns(asked))


@pytest.fixture(scope="module")
def tasks() -> PaddedTasks:
    people, _ = log(60, 2, 0.3, seed=1)
    people.append((np.array([3, 4]), np.array([2.0, 5.0])))  # no support
    people.append((np.array([1, 3, 4]), np.array([1.0, 2.0, 5.0])))  # one support event
    return tasks_of(people, 2)


def test_support_statistics(tasks):
    mean, median = baselines.SupportMean(3.3).scores(tasks), baselines.SupportMedian(3.3).scores(tasks)
    for t in range(tasks.size):
        labels = tasks.support_labels[t][tasks.support_mask[t]]
        assert mean[t].tolist() == pytest.approx([labels.mean() if len(labels) else 3.3] * 2)
        assert median[t].tolist() == pytest.approx([np.median(labels) if len(labels) else 3.3] * 2)


def test_bias_is_the_shrunk_mean_residual(tasks):
    items = np.linspace(-1, 1, ITEMS)
    scores = baselines.Bias(3.0, items, 2.0).scores(tasks)
    for t in range(tasks.size):
        seen = tasks.support_mask[t]
        residuals = tasks.support_labels[t][seen] - 3.0 - items[tasks.support_items[t][seen]]
        assert scores[t] == pytest.approx(3.0 + items[tasks.query_items[t]] + residuals.sum() / (seen.sum() + 2.0))


def test_fold_in_is_ridge_regression(tasks):
    generator = np.random.default_rng(0)
    factors, biases = generator.normal(size=(ITEMS, 3)), generator.normal(size=ITEMS)
    scores = Factorisation(3.0, biases, factors, 2.0, 5.0).scores(tasks)
    for t in range(tasks.size):
        seen = tasks.support_mask[t]
        items = tasks.support_items[t][seen]
        x = np.c_[np.ones(len(items)), factors[items]]
        user = np.linalg.solve(
            x.T @ x + np.diag([2.0, 5, 5, 5]), x.T @ (tasks.support_labels[t][seen] - 3.0 - biases[items])
        )
        asked = tasks.query_items[t]
        assert scores[t] == pytest.approx(3.0 + biases[asked] + np.c_[np.ones(2), factors[asked]] @ user)


def test_biases_are_the_fixed_point_of_their_definition():
    events = events_of(log(80, 1, 0.2, seed=2)[0])
    items, users = baselines.fit_biases(events, 3.0, 2.0, rounds=200)
    for i in range(ITEMS):
        mine = events.items == i
        residuals = events.labels[mine] - events.mean - users[events.users[mine]]
        assert items[i] == pytest.approx(residuals.sum() / (mine.sum() + 3.0), abs=1e-6)
    assert items[ITEMS - 1] == 0.0  # no event


def test_alternating_least_squares_descends_to_a_stationary_point():
    events = events_of(log(80, 2, 0.1, seed=3)[0])
    residuals = events.labels - events.mean
    strength, previous = 0.5, np.inf
    for rounds in (1, 2, 10, 200):
        factors = fit_factors(events, residuals, 2, strength, rounds, seed=0)
        users = np.stack(
            [
                np.linalg.solve(q.T @ q + strength * np.eye(2), q.T @ residuals[events.users == u])
                for u in range(events.user_count)
                for q in [factors[events.items[events.users == u]]]
            ]
        )
        errors = residuals - (users[events.users] * factors[events.items]).sum(1)
        loss = (errors**2).sum() + strength * ((users**2).sum() + (factors**2).sum())
        assert loss <= previous * (1 + 1e-6)
        previous = loss
    gradient = np.zeros_like(factors)
    np.add.at(gradient, events.items, -2 * errors[:, None] * users[events.users])
    assert np.abs(gradient + 2 * strength * factors).max() < 1e-2
    assert not factors[ITEMS - 1].any()


def fitted(train: list, validation: list[PaddedTasks]) -> baselines.Fitted:
    events = events_of(train)
    error = lambda scores, t: metrics.absolute_error(scores, t.query_labels, t.query_mask)  # noqa: E731
    popularity = np.bincount(events.items, minlength=ITEMS)
    return baselines.fit(events, popularity, validation, error, ranks=(2,))


def test_each_baseline_beats_what_knows_less():
    people, _ = log(600, 2, 0.1, seed=4)
    test = tasks_of(log(200, 2, 0.1, seed=5)[0], 3)
    result = fitted(people, [tasks_of(log(100, 2, 0.1, seed=6)[0], 3)])
    errors = {
        b.name: metrics.absolute_error(b.scores(test), test.query_labels, test.query_mask).mean()
        for b in result.baselines
        if b.predicts
    }
    assert (
        errors["matrix factorisation fold-in"]
        < errors["item + user bias"]
        < errors["support mean"]
        < errors["global mean"]
    )
    assert errors["matrix factorisation fold-in"] < 0.5 * errors["item + user bias"]
    assert not result.notes
    assert [b.name for b in result.baselines if not b.predicts] == ["popularity"]


def absolute(scores: np.ndarray, tasks: PaddedTasks) -> np.ndarray:
    return metrics.absolute_error(scores, tasks.query_labels, tasks.query_mask)


def test_the_table_has_the_best_setting_and_the_curve_the_best_for_small_supports():
    train, _ = log(400, 2, 0.1, seed=4)
    # People whose level moves: their old events mislead, so that a long support is shrunk more than the newest event.
    people, generator = [], np.random.default_rng(1)
    for _ in range(200):
        old, now = generator.normal(size=2)
        people.append((generator.permutation(ITEMS - 1)[:20], 3 + np.r_[np.full(16, old), np.full(4, now)]))
    whole, small = tasks_of(people, 3), tasks_of([(i[-4:], y[-4:]) for i, y in people], 3)
    events = events_of(train)
    popularity = np.bincount(events.items, minlength=ITEMS)
    result = baselines.fit(events, popularity, [whole], absolute, small=[small], ranks=(2,))

    def of(chosen, name):
        return next(b for b in chosen if b.name == name)

    every = [
        baselines.Bias(events.mean, baselines.fit_biases(events, i, u)[0], u)
        for u in baselines.USER_SHRINKAGE
        for i in baselines.ITEM_SHRINKAGE
    ]
    table, curve = (of(b, "item + user bias") for b in (result.baselines, result.on_small_supports))
    assert absolute(table.scores(whole), whole).mean() == min(absolute(b.scores(whole), whole).mean() for b in every)
    assert curve.user_shrinkage < table.user_shrinkage
    assert absolute(curve.scores(small), small).mean() < absolute(table.scores(small), small).mean()
    folded = [of(b, "matrix factorisation fold-in") for b in (result.baselines, result.on_small_supports)]
    errors = [absolute(b.scores(small), small).mean() for b in folded]
    assert errors[1] <= errors[0]
    assert [b.name for b in result.baselines] == [b.name for b in result.on_small_supports]
    assert any(note.startswith("By support size") for note in result.notes)


def test_without_validation_users_defaults_are_used_and_noted():
    result = fitted(log(100, 2, 0.1, seed=4)[0], [])
    assert "defaults" in result.notes[0]
    assert result.chosen["rank"] == 2


def test_collecting_events_stops_at_the_limit_and_says_so():
    from metatrain.data.batch import TaskBatch

    def batch(start: int) -> TaskBatch:
        return TaskBatch(
            np.array([0, 1]), np.array([1, 0]), np.array([1, 1]), np.array([start, start + 1]),
            np.array([0, 1, 0]), np.array([1.0, 2, 3], np.float32), np.zeros(3, np.int64),
        )  # fmt: skip

    whole = training_events([batch(0), batch(10)], ITEMS)
    assert whole.users.tolist() == [0, 0, 1, 2, 2, 3]
    assert whole.items.tolist() == [0, 1, 0, 10, 11, 10]
    assert (whole.user_count, whole.limited, whole.mean) == (4, False, 2.0)
    part = training_events([batch(0), batch(10)], ITEMS, limit=3)
    assert (part.user_count, part.limited) == (2, True)
    assert training_events([], ITEMS).mean == 0.0


def test_predictions_are_rounded_to_stars_where_that_is_better():
    def stars(people: list) -> list:
        return [(items, np.clip(labels.round(), 1, 5)) for items, labels in people]

    training, _ = log(300, 1, 0.4, seed=3)
    validation, _ = log(100, 1, 0.4, seed=4)
    events, tasks = events_of(stars(training)), tasks_of(stars(validation), 3)
    popularity = np.bincount(events.items, minlength=ITEMS)

    def error(scores: np.ndarray, of: PaddedTasks) -> np.ndarray:
        return metrics.absolute_error(scores, of.query_labels, of.query_mask)

    fitted = baselines.fit(events, popularity, [tasks], error, ranks=(1,))
    fold_in = next(b for b in fitted.baselines if b.name == "matrix factorisation fold-in")
    assert isinstance(fold_in, baselines.InLevels)
    assert any("Rounded to the labels' levels" in note and fold_in.name in note for note in fitted.notes)
    plain, rounded = fold_in.baseline.scores(tasks), fold_in.scores(tasks)
    assert error(rounded, tasks).mean() < error(plain, tasks).mean() - 0.01
    # What is predicted is a level, up to what keeps the order.
    assert (np.abs(rounded - rounded.round())[tasks.query_mask] <= 0.011 * np.abs(plain - rounded.round()).max()).all()
    order = np.argsort(plain[tasks.query_mask])
    assert (np.diff(rounded[tasks.query_mask][order]) >= 0).all()
    # A continuous scale has none.
    assert baselines.levels_of(events_of(training)) is None
    # And under squared error the mean is better than a level.
    squared = baselines.fit(
        events, popularity, [tasks], lambda s, t: metrics.squared_error(s, t.query_labels, t.query_mask), ranks=(1,)
    )
    assert not any(isinstance(b, baselines.InLevels) for b in squared.baselines if b.name == fold_in.name)
