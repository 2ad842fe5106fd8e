"""The synthetic log: the same whatever its shards, of the structure and the errors that it claims."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metatrain.config import PrepareConfig, Synthetic
from metatrain.data.sources import read_source
from metatrain.data.sources.synthetic import bayes_errors, draw_events


def table(settings: Synthetic, what: str = "events") -> pa.Table:
    raw = read_source(PrepareConfig(source="synthetic", synthetic=settings))
    return pa.concat_tables([rows.table for chunk in getattr(raw, what) for rows in chunk.read()])


@settings(deadline=None, max_examples=15)
@given(
    users=st.integers(1, 60),
    shard=st.integers(1, 70),
    items=st.sampled_from([1, 7, 50, 300]),
    label=st.sampled_from(["rating", "click"]),
)
def test_the_log_does_not_depend_on_its_shards(users: int, shard: int, items: int, label):
    whole = Synthetic(users=users, items=items, users_per_shard=1000, label=label)
    cut = whole.model_copy(update={"users_per_shard": shard})
    for what in ("events", "tasks"):
        assert table(cut, what).equals(table(whole, what))


def test_another_seed_is_another_log_and_more_users_change_no_earlier_one():
    base = Synthetic(users=50)
    assert not table(base).equals(table(base.model_copy(update={"seed": 1})))
    more = table(base.model_copy(update={"users": 80}))
    assert more.slice(0, table(base).num_rows).equals(table(base))


def test_users_see_distinct_items_in_increasing_time():
    user, item, _, _, time = draw_events(Synthetic(users=400, items=300, events_per_user=40), np.arange(400))
    counts = np.bincount(user)
    assert counts.min() >= 5
    assert abs(counts.mean() - 40) < 4
    assert len(np.unique(user * 300 + item)) == len(user)
    same = user[1:] == user[:-1]
    assert (np.diff(time)[same] > 0).all()
    popularity = np.sort(np.bincount(item, minlength=300))
    assert popularity[-30:].mean() > 3 * popularity[:30].mean()


def test_the_claimed_error_is_that_of_who_knows_all_but_the_noise():
    s = Synthetic(users=3000, noise=0.7)
    _, _, label, expected, _ = draw_events(s, np.arange(3000))
    error = label - expected
    facts = bayes_errors(s)
    assert math.sqrt((error**2).mean()) == pytest.approx(facts["bayes_rmse"], rel=0.01)
    assert np.abs(error).mean() == pytest.approx(facts["bayes_mae"], rel=0.01)
    assert label.std() > 1.5 * s.noise


def test_the_claimed_error_of_clicks():
    s = Synthetic(users=6000, label="click")
    _, _, label, chance, _ = draw_events(s, np.arange(3000, 6000))
    facts = bayes_errors(s)
    assert set(np.unique(label)) == {0.0, 1.0}
    loss = -(label * np.log(chance) + (1 - label) * np.log(1 - chance)).mean()
    assert loss == pytest.approx(facts["bayes_log_loss"], rel=0.03)
    order = np.argsort(chance)
    rank = np.empty(len(chance))
    rank[order] = np.arange(1, len(chance) + 1)
    n = label.sum()
    auc = (rank[label > 0].sum() - n * (n + 1) / 2) / (n * (len(label) - n))
    assert auc == pytest.approx(facts["bayes_auc"], abs=0.01)


def test_ratings_have_low_rank_besides_biases():
    s = Synthetic(users=300, items=200, rank=3, noise=0.0)
    from metatrain.data.sources.synthetic import _expected_rating

    every = np.tile(np.arange(200), 300)
    ratings = _expected_rating(s, np.arange(300), every, np.full(300, 200)).reshape(300, 200)
    centred = ratings - ratings.mean(0) - ratings.mean(1)[:, None] + ratings.mean()
    singular = np.linalg.svd(centred, compute_uv=False)
    assert singular[2] > 1
    assert singular[3] < 1e-6
