"""Closed-form and metric-based methods named in a recipe: what reaches them, and which pairings are refused."""

from __future__ import annotations

import pytest
import torch

from metatrain.config import validated
from metatrain.data.schema import Feature, Kind, LabelKind, Level, Schema
from metatrain.errors import ConfigError
from metatrain.meta.kernel import Kernel
from metatrain.meta.learner import MetaLearner
from metatrain.meta.logistic import Logistic
from metatrain.meta.matching import Matching
from metatrain.meta.prototypical import Prototypical
from metatrain.model.build import build_model

FEATURES = (
    Feature(name="item", level=Level.ITEM, kind=Kind.CATEGORICAL, table="item", rows=11, width=8),
    Feature(name="age", level=Level.TASK, kind=Kind.CATEGORICAL, table="age", rows=5, width=4),
)
RATINGS = Schema(features=FEATURES, label=LabelKind.RATING, label_mean=3.5, label_deviation=1, label_min=1, label_max=5)
CLICKS = Schema(features=FEATURES, label=LabelKind.CLICK, label_mean=0.2, label_deviation=0.4, label_min=0, label_max=1)
LOGITS = {"loss": "binary_cross_entropy"}


def built(schema: Schema, learner: str = "factorisation", **meta: object) -> MetaLearner:
    return build_model(schema, validated({"model": {"learner": learner}, "meta": meta}, where="x.yaml")).meta


@pytest.mark.parametrize("learner", ["factorisation", "mlp"])
def test_all_are_found_by_name_and_get_their_settings(learner: str):
    logistic = built(CLICKS, learner, algorithm="logistic", **LOGITS, options={"newton_steps": 3, "strength": 2})
    assert isinstance(logistic, Logistic)
    assert logistic.newton_steps == 3
    matching = built(RATINGS, learner, algorithm="matching", loss="huber", options={"temperature": 0.5})
    assert isinstance(matching, Matching)
    assert float(matching.log_temperature.detach().exp()) == pytest.approx(0.5)
    for schema, middle in ((RATINGS, 3.5), (CLICKS, 0.5)):
        prototypical = built(schema, learner, algorithm="prototypical", memory=7)
        assert isinstance(prototypical, Prototypical)
        assert (prototypical.relevant_from, prototypical.memory) == (middle, 7 << 20)
    smoother = built(RATINGS, learner, algorithm="kernel", options={"kind": "smoother", "lengthscale": 2})
    assert isinstance(smoother, Kernel)
    assert sorted(smoother.curves()) == ["meta/kernel lengthscale", "meta/kernel nothing known"]
    process = built(CLICKS, learner, algorithm="kernel", **LOGITS, options={"rbf": 0})
    assert sorted(process.curves()) == ["meta/kernel bias", "meta/kernel linear"]


@pytest.mark.parametrize(
    ("schema", "meta", "message"),
    [
        (RATINGS, {"algorithm": "logistic"}, "use binary_cross_entropy, or ridge"),
        (RATINGS, {"algorithm": "logistic", **LOGITS}, "Binary cross-entropy is for clicks"),
        (CLICKS, {"algorithm": "logistic", **LOGITS, "options": {"newton_steps": 0}}, "must be at least 1, got 0"),
        (RATINGS, {"algorithm": "kernel", "options": {"kind": "smooth"}}, "meta.options.kind"),
        (RATINGS, {"algorithm": "kernel", "options": {"kind": "smoother", "noise": 1}}, "has no noise"),
        (RATINGS, {"algorithm": "matching", "adapt_rows": ["age"]}, "meta.adapt_rows"),
        (RATINGS, {"algorithm": "prototypical", "steps": 1}, "meta.steps"),
        (RATINGS, {"algorithm": "prototypical", "options": {"shrinkage": 0}}, "shrinkage must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(schema: Schema, meta: dict, message: str):
    with pytest.raises(ConfigError) as caught:
        built(schema, **meta)
    assert message in str(caught.value)


@pytest.mark.parametrize("method", ["logistic", "matching", "prototypical", "kernel"])
def test_a_base_learner_that_does_not_represent_is_refused(method: str, monkeypatch: pytest.MonkeyPatch):
    class Mute(torch.nn.Linear):
        def __init__(self, inputs: int) -> None:
            super().__init__(inputs, 1)

    monkeypatch.setattr("metatrain.model.learners.mlp.MLP", Mute)
    with pytest.raises(ConfigError) as caught:
        built(CLICKS, "mlp", algorithm=method, **LOGITS)
    assert "Mute has no `represent`; choose another base learner" in str(caught.value)
