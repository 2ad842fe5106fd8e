"""Items represented once a batch give what items represented once an event give."""

from __future__ import annotations

import pytest
import torch

from metatrain.config import validated
from metatrain.data.batch import TaskBatch
from metatrain.data.schema import Feature, Kind, LabelKind, Level, Schema
from metatrain.learners import META_LEARNERS
from metatrain.meta.learner import MetaLearner
from metatrain.model.build import build_model
from metatrain.model.construct import named
from metatrain.model.metamodel import MetaModel
from tests.model.test_pairs import CLICKS, RATINGS, batch

METHODS = {name: named(path, {}, MetaLearner, "meta.algorithm") for name, path in META_LEARNERS.items()}
BY_ITEMS = sorted(name for name, kind in METHODS.items() if kind.by_items)


def made(schema: Schema, algorithm: str, learner: str) -> MetaModel:
    loss = "binary_cross_entropy" if schema.label is LabelKind.CLICK else "squared"
    settings = {
        # Large rows and a network with biases: what padding is given must show.
        "model": {"learner": learner, "hidden": [6], "activation": "tanh", "init_scale": 1.0, "id_dropout": 0.3},
        "meta": {"algorithm": algorithm, "loss": loss},
    }
    return build_model(schema, validated(settings, where="x.yaml"))


def outcome(model: MetaModel, data: TaskBatch) -> dict[str, torch.Tensor]:
    """Loss, gradients, scores of the query, and scores of candidates."""
    model.train()
    found = model(data, 3, float(data.size))
    found.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.eval()
    scores = model.adapted_scores(data)
    candidates = model.score_items(model.adapt(data), data.item_features)
    after = scores.after * scores.mask  # padding may hold anything
    return gradients | {"loss": found.loss, "before": found.before, "after": after, "candidates": candidates}


@pytest.mark.parametrize("learner", ["factorisation", "content"])
@pytest.mark.parametrize("algorithm", BY_ITEMS)
def test_the_same_loss_gradients_and_scores(algorithm: str, learner: str, monkeypatch: pytest.MonkeyPatch):
    schema = CLICKS if algorithm == "logistic" else RATINGS
    data = batch(schema.label is LabelKind.CLICK)
    model = made(schema, algorithm, learner)
    assert model.meta.represents_items
    once = outcome(model, data)
    monkeypatch.setattr(METHODS[algorithm], "by_items", False)
    each = outcome(made(schema, algorithm, learner), data)
    assert once.keys() == each.keys()
    for name, value in each.items():
        torch.testing.assert_close(once[name], value, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert once["tables.collections.width_8.embeddings.item.weight"].any() or learner == "content"


def test_methods_that_read_items_otherwise_are_not_among_them():
    # What their inner loops adapt is the base learner itself, on inputs whole.
    assert BY_ITEMS == ["kernel", "logistic", "matching", "prototypical", "ridge", "sequence"]


@pytest.mark.parametrize(
    ("level", "learner", "once"),
    [(Level.EVENT, "factorisation", False), (Level.ITEM, "factorisation", True), (Level.ITEM, "hybrid", False)],
)
def test_an_event_of_its_own_features_is_represented_for_itself(level: Level, learner: str, once: bool):
    schema = RATINGS.model_copy(
        update={"features": (*RATINGS.features, Feature(name="hour", level=level, kind=Kind.NUMERIC))}
    )
    assert made(schema, "ridge", learner).meta.represents_items is once
