"""Every meta-learner with every base learner: it trains, or it is refused for a reason that is listed here."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from metatrain.config import validated
from metatrain.data.batch import TaskBatch
from metatrain.data.schema import Feature, Kind, LabelKind, Level, Schema
from metatrain.errors import ConfigError
from metatrain.learners import BASE_LEARNERS, META_LEARNERS
from metatrain.meta.learner import MetaLearner
from metatrain.model.build import build_model
from metatrain.model.construct import named

RATINGS = Schema(
    features=(
        Feature(name="item", level=Level.ITEM, kind=Kind.CATEGORICAL, table="item", rows=11, width=8),
        Feature(name="age", level=Level.TASK, kind=Kind.CATEGORICAL, table="age", rows=5, width=4),
        Feature(name="year", level=Level.ITEM, kind=Kind.NUMERIC),
    ),
    label=LabelKind.RATING,
    label_mean=3.5,
    label_deviation=1,
    label_min=1,
    label_max=5,
)
CLICKS = RATINGS.model_copy(update={"label": LabelKind.CLICK, "label_mean": 0.4, "label_min": 0, "label_max": 1})
#: Name → schema, and settings of `meta`.
SETTINGS = {
    "ratings": (RATINGS, {"loss": "squared"}),
    "clicks": (CLICKS, {"loss": "binary_cross_entropy"}),
    "rows": (RATINGS, {"adapt_rows": ["age", "item"]}),
}

#: (meta-learner, base learner, setting) that make no sense together → what the refusal says; "*" is any.
REFUSED = {
    ("logistic", "*", "ratings"): "binary_cross_entropy",
    ("mamo", "*", "rows"): "there is none that does not adapt",
    ("ridge", "*", "clicks"): "under binary cross-entropy scores are logits",
}


def batch(click: bool) -> TaskBatch:
    """Five tasks, the first without support."""
    draw = np.random.default_rng(0)
    support, query = np.array([0, 3, 5, 2, 4]), np.array([2, 3, 1, 2, 2])
    events = int((support + query).sum())
    labels = draw.integers(0, 2, events) if click else draw.integers(1, 6, events)
    return TaskBatch(
        tasks=np.arange(5),
        support_lengths=support,
        query_lengths=query,
        items=np.arange(9),
        event_items=draw.integers(0, 9, events),
        labels=labels.astype(np.float32),
        timestamps=np.zeros(events, np.int64),
        task_features={"age": draw.integers(0, 5, 5)},
        item_features={"item": draw.integers(0, 11, 9), "year": draw.normal(size=9).astype(np.float32)},
    ).tensors()


def refusal(meta: str, learner: str, setting: str) -> str | None:
    """The listed reason; a meta-learner whose constructor has no `adapt_rows` can't adapt any."""
    kind = named(META_LEARNERS[meta], {}, MetaLearner, "meta.algorithm")
    if setting == "rows" and "adapt_rows" not in inspect.signature(kind).parameters:
        return "has no such setting"
    keys = [(meta, learner, setting), (meta, learner, "*"), (meta, "*", setting), (meta, "*", "*")]
    return next((REFUSED[key] for key in keys if key in REFUSED), None)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("learner", BASE_LEARNERS)
@pytest.mark.parametrize("meta", META_LEARNERS)
def test_a_pair_trains_or_is_refused_for_a_listed_reason(meta: str, learner: str, setting: str):
    schema, settings = SETTINGS[setting]
    config = validated(
        {"model": {"learner": learner, "hidden": [6], "activation": "tanh"}, "meta": {"algorithm": meta, **settings}},
        where="x.yaml",
    )
    if reason := refusal(meta, learner, setting):
        with pytest.raises(ConfigError) as caught:
            build_model(schema, config)
        assert reason in str(caught.value)
        return
    model, data = build_model(schema, config), batch(schema.label is LabelKind.CLICK)
    found = model(data, 0, float(data.size))
    assert torch.isfinite(found.loss)
    found.loss.backward()
    trained = {name: p for name, p in model.meta.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    gradient = torch.cat([p.grad.flatten() for p in trained.values() if p.grad is not None])
    assert torch.isfinite(gradient).all()
    assert gradient.any()
    # What serves: scores of the query, adapted where there is support.
    model.eval()
    scores = model.adapted_scores(data)
    assert torch.isfinite(scores.after).all()
    assert ((scores.after - scores.before)[1:] * scores.mask[1:]).any(), "nothing adapts"
    torch.testing.assert_close(scores.after[0], scores.before[0])


def test_what_is_refused_is_there():
    names = set(META_LEARNERS), set(BASE_LEARNERS) | {"*"}, set(SETTINGS) | {"*"}
    assert all(part in known for key in REFUSED for part, known in zip(key, names, strict=True))
