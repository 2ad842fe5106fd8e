"""Steps and rate of fine-tuning are chosen on validation tasks alone, and said in the report."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metatrain.config import Config, DataConfig, EpisodeConfig, EvaluateConfig, MetaConfig, ModelConfig
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.reader import iterate
from metatrain.evaluate.evaluation import evaluate_recommender
from metatrain.evaluate.protocols import Judge
from metatrain.evaluate.tasks import padded
from metatrain.meta import joint
from metatrain.model.build import build_model
from metatrain.recommend.recommender import Recommender
from tests.data.tiny_dataset import write_tiny_dataset

EPISODE = EpisodeConfig(support_max=8, query_max=4)


def recommender(folder, **dataset) -> Recommender:
    write_tiny_dataset(str(folder), **dataset)
    config = Config(
        data=DataConfig(dataset=str(folder)),
        model=ModelConfig(hidden=(8,), activation="tanh"),
        meta=MetaConfig(algorithm="joint", steps=2, rate=0.5, adapt=("head.*",)),
        evaluate=EvaluateConfig(episode=EPISODE, support_sizes=(0, 4), tasks_per_batch=6),
    )
    opened = TaskDataset.open(config.data.dataset)
    return Recommender(build_model(opened.schema, config), opened, config, run_url=str(folder), step=1)


def test_the_best_on_validation_tasks_is_chosen_and_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(joint, "RATES_TRIED", (0.01, 0.1, 1e30))  # the last one overflows
    used = recommender(tmp_path, validation=12)
    judge = Judge(used.dataset.schema, used.config.evaluate)
    batches = list(iterate(used.dataset, Split.VALIDATION, ItemSet.EXISTING, EPISODE, tasks_per_batch=5))
    errors = {}
    for steps in joint.STEPS_TRIED:
        for rate in (0.01, 0.1):
            # The same grid by hand: a model of its own for each, with these settings in its recipe.
            own = used.config.model_copy(
                update={"meta": used.config.meta.model_copy(update={"steps": steps, "rate": rate})}
            )
            scorer = Recommender(build_model(used.dataset.schema, own), used.dataset, own)
            values = [judge.loss(scorer.scores(b).after, padded(b)) for b in batches if b.size]
            errors[steps, rate] = np.nanmean(np.concatenate(values))
    best = min(errors, key=errors.__getitem__)
    report = evaluate_recommender(used, used.config.evaluate)
    fine_tuning = report.facts["fine_tuning"]
    assert fine_tuning["chosen"] == {"steps": best[0], "rate": best[1]}
    assert len(fine_tuning["of"]) == 9
    assert any(f"steps {best[0]}, rate {best[1]}" in note for note in report.notes)
    # And it is what the table measures: the same recipe settings give the same row.
    own = used.config.model_copy(update={"meta": used.config.meta.model_copy(update=fine_tuning["chosen"])})
    again = Recommender(build_model(used.dataset.schema, own), used.dataset, own)
    tasks = [b for b in iterate(used.dataset, Split.TEST, ItemSet.EXISTING, EPISODE) if b.size]
    values = np.concatenate([judge.loss(again.scores(b).after, padded(b)) for b in tasks])
    assert report.value("adapted", "new users", "MAE") == pytest.approx(np.mean(values), rel=1e-5)
    assert report.value("unadapted", "new users", "MAE") != report.value("adapted", "new users", "MAE")


def test_without_validation_users_the_recipes_settings_hold(tmp_path):
    used = recommender(tmp_path, validation=0)
    report = evaluate_recommender(used, used.config.evaluate)
    assert "fine_tuning" not in report.facts
    assert any("the recipe's steps and rate" in note for note in report.notes)
    meta = used.model.meta
    assert isinstance(meta, joint.Joint)
    assert torch.equal(meta.rates, torch.full((2, 2), 0.5))
