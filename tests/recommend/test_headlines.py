"""What an evaluation leaves in the run's TensorBoard."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metatrain.evaluate.evaluation import evaluate_run
from metatrain.evaluate.headlines import headline_names
from metatrain.observe.copies import board_url
from metatrain.recommend.recommender import Recommender


def test_the_headlines_of_an_evaluation_are_curves_that_training_announced(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Recommender, "load", lambda run, **given: recommender)
    report = evaluate_run(recommender.run_url, progress=False)
    announced = headline_names(recommender.dataset, recommender.config.evaluate)
    assert announced[:2] == ("final/MAE, new users", "final/nDCG@1, new users")
    events = EventAccumulator(board_url(recommender.run_url))
    events.Reload()
    found = {tag: (events.Scalars(tag)[0].step, events.Scalars(tag)[0].value) for tag in events.Tags()["scalars"]}
    shown = {
        f"final/{row.metric}, {row.partition}": (recommender.step, pytest.approx(row.value, rel=1e-6))
        for row in report.rows
        if row.model == "adapted" and row.metric in ("MAE", "nDCG@1")
    }
    assert set(found) == set(shown) <= set(announced)
    assert found == shown
