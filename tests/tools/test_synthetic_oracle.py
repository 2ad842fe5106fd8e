"""The oracle equals the same posterior in its dual form, task by task, and is right about its own error."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from metatrain.config import Synthetic
from metatrain.data.batch import TaskBatch
from metatrain.data.sources.synthetic import draw_events

SETTINGS = Synthetic(users=3000, items=400, events_per_user=20, seed=3)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "synthetic_oracle.py"
    spec = importlib.util.spec_from_file_location("synthetic_oracle", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batch_of(users: np.ndarray, query: int) -> TaskBatch:
    """Each user's last events are the query."""
    user, item, label, _, timestamp = draw_events(SETTINGS, users)
    lengths = np.bincount(user - users[0], minlength=len(users))
    items, event_items = np.unique(item, return_inverse=True)
    return TaskBatch(
        users, lengths - query, np.full(len(users), query), items, event_items, label, timestamp
    )  # fmt: skip


def test_posterior_equals_its_dual_form(tool: ModuleType) -> None:
    users = np.arange(7)
    batch = batch_of(users, 2)
    mean, variance, task = tool.predicted(SETTINGS, batch, users, np.arange(SETTINGS.items))
    bias, factors = tool.item_truth(SETTINGS, batch.items[batch.event_items])
    x = np.concatenate([np.ones((len(bias), 1)), factors], 1)
    prior = tool.prior_means(SETTINGS, users)
    start, found_mean, found_variance = 0, [], []
    for t, (s, q) in enumerate(zip(batch.support_lengths, batch.query_lengths, strict=True)):
        both = x[start : start + s + q]
        known = 3.5 + bias[start : start + s + q] + both @ prior[t]
        covariance = both @ np.diag([0.4**2, *[0.8**2] * SETTINGS.rank]) @ both.T  # of the ratings, without noise
        of_support = covariance[:s, :s] + SETTINGS.noise**2 * np.eye(s)
        gain = np.linalg.solve(of_support, covariance[:s, s:]).T
        found_mean.append(known[s:] + gain @ (batch.labels[start : start + s] - known[:s]))
        found_variance.append(np.diag(covariance[s:, s:] - gain @ covariance[:s, s:]) + SETTINGS.noise**2)
        start += s + q
    assert task.tolist() == np.repeat(users, 2).tolist()
    np.testing.assert_allclose(mean, np.concatenate(found_mean), atol=1e-9)
    np.testing.assert_allclose(variance, np.concatenate(found_variance), atol=1e-9)


def test_errors_are_as_large_as_the_oracle_expects(tool: ModuleType) -> None:
    users = np.arange(3000)
    batch = batch_of(users, 3)
    mean, variance, task = tool.predicted(SETTINGS, batch, users, np.arange(SETTINGS.items))
    place = np.arange(len(batch.labels)) - np.repeat(
        np.cumsum(batch.support_lengths + batch.query_lengths) - 3, batch.support_lengths + batch.query_lengths
    )
    error = (batch.labels[place >= 0] - mean) ** 2 / variance
    by_task = np.bincount(task, error) / 3
    assert abs(by_task.mean() - 1.0) < 4 * by_task.std() / np.sqrt(len(users)), "standardised squares are 1 in the mean"
