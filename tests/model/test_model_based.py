"""Model-based meta-learners by name, over a dataset's schema: what a recipe makes of them, and what it may not."""

from __future__ import annotations

import pytest
import torch

from metatrain.config import validated
from metatrain.data.schema import Feature, Kind, LabelKind, Level, Schema
from metatrain.errors import ConfigError
from metatrain.meta.episode import Episodes, Examples
from metatrain.meta.hypernetwork import Hypernetwork
from metatrain.meta.mamo import MAMO
from metatrain.meta.tanp import TaNP
from metatrain.model.build import build_model

AGE = Feature(name="age", level=Level.TASK, kind=Kind.CATEGORICAL, table="age", rows=5, width=4)
ITEM = Feature(name="item", level=Level.ITEM, kind=Kind.CATEGORICAL, table="item", rows=11, width=8)
RATING = {"label": LabelKind.RATING, "label_mean": 3.5, "label_deviation": 1, "label_min": 1, "label_max": 5}
CLICK = {"label": LabelKind.CLICK, "label_mean": 0.3, "label_deviation": 0.5, "label_min": 0, "label_max": 1}


def built(meta: dict, features: tuple[Feature, ...] = (ITEM, AGE), label: dict | None = None):
    config = validated({"model": {"hidden": [6]}, "meta": meta}, where="x.yaml")
    return build_model(Schema(features=features, **(label or RATING)), config).meta


@pytest.mark.parametrize(
    ("algorithm", "options", "kind"),
    [
        ("tanp", {}, TaNP),
        ("tanp", {"latent": True, "modulation": "film", "encoder": [8], "decoder": [8, 4], "clusters": 2}, TaNP),
        ("hypernetwork", {}, Hypernetwork),
        ("hypernetwork", {"kind": "nonlinear_biases", "means": "class"}, Hypernetwork),
        ("hypernetwork", {"kind": "full", "widths": [5]}, Hypernetwork),
        ("mamo", {}, MAMO),
        ("mamo", {"slots": 2, "preference": True}, MAMO),
    ],
    ids=str,
)
@pytest.mark.parametrize("click", [False, True])
def test_they_are_made_of_a_recipe_and_give_every_parameter_a_gradient(
    algorithm: str, options: dict, kind: type, click: bool
):
    recipe = {"algorithm": algorithm, "options": options, "loss": "binary_cross_entropy" if click else "huber"}
    meta = built(recipe, label=CLICK if click else RATING)
    assert type(meta) is kind
    generator = torch.Generator().manual_seed(0)

    def side(events: int) -> Examples:
        labels = torch.randint(0, 2, (3, events), generator=generator).float() + (0.0 if click else 3.0)
        return Examples(torch.randn(3, events, 12, generator=generator), {}, labels, torch.ones(3, events))

    meta(Episodes(side(4), side(5), {})).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in meta.parameters())
    # A second one of the same recipe begins with the same weights.
    again = built(recipe, label=CLICK if click else RATING).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in meta.state_dict().items())


def test_relevance_is_that_of_the_labels():
    ratings = built({"algorithm": "hypernetwork"})
    clicks = built({"algorithm": "hypernetwork", "loss": "binary_cross_entropy"}, label=CLICK)
    assert (ratings._relevant_from, clicks._relevant_from) == (3.5, 0.5)


@pytest.mark.parametrize(
    ("meta", "features", "message"),
    [
        ({"algorithm": "mamo"}, (ITEM,), "add a task-level feature to model.features"),
        ({"algorithm": "mamo", "adapt_rows": ["age"]}, (ITEM, AGE), "leave it out of meta.adapt_rows"),
        ({"algorithm": "mamo", "engine": "low_rank"}, (ITEM, AGE), "meta.engine"),
        ({"algorithm": "mamo", "options": {"slots": 0}}, (ITEM, AGE), "slots must be above 0"),
        ({"algorithm": "tanp", "steps": 5}, (ITEM, AGE), "meta.steps"),
        ({"algorithm": "tanp", "options": {"modulation": "fil"}}, (ITEM, AGE), "meta.options.modulation"),
        ({"algorithm": "hypernetwork", "options": {"kind": "linear"}}, (ITEM, AGE), "meta.options.kind"),
        ({"algorithm": "hypernetwork", "order": 1}, (ITEM, AGE), "meta.order"),
        ({"algorithm": "hypernetwrk"}, (ITEM, AGE), "Did you mean 'hypernetwork'?"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(meta: dict, features: tuple[Feature, ...], message: str):
    with pytest.raises(ConfigError) as caught:
        built(meta, features)
    assert message in str(caught.value)
