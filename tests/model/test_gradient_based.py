"""Gradient-based meta-learners by name, over a dataset's features: they train, and refuse what would be ignored."""

from __future__ import annotations

import pytest
import torch
from test_construct import built

from metatrain.errors import ConfigError
from metatrain.meta.anil import ANIL
from metatrain.meta.boil import BOIL
from metatrain.meta.fomaml import FOMAML
from metatrain.meta.imaml import IMAML
from metatrain.meta.meta_sgd import MetaSGD
from metatrain.meta.reptile import Reptile


@pytest.mark.parametrize("learner", ["mlp", "factorisation"])
def test_found_by_name(learner: str):
    kinds = {"fomaml": FOMAML, "anil": ANIL, "boil": BOIL, "meta_sgd": MetaSGD, "imaml": IMAML, "reptile": Reptile}
    for name, kind in kinds.items():
        assert type(built(meta={"algorithm": name}, model={"learner": learner})) is kind


def test_options():
    meta = built(meta={"algorithm": "imaml", "steps": 7, "options": {"strength": 3, "cg_steps": 4}})
    assert (meta.strength, meta.cg_steps, meta.steps) == (3.0, 4, 7)
    assert built(meta={"algorithm": "reptile", "options": {"sees": "support"}}).sees == "support"


def test_meta_sgd_reads_the_rows_width_off_the_layout():
    meta = built(meta={"algorithm": "meta_sgd", "adapt": ["head.*"], "adapt_rows": ["item"], "rate": 0.02})
    head = meta.learner.head
    assert meta.rates.shape == (head.weight.numel() + 1 + 8,)
    assert (meta.rates == torch.tensor(0.02)).all()


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"algorithm": "anil", "adapt": ["layers.*"]}, "no such setting"),
        ({"algorithm": "anil", "adapt_rows": ["item"]}, "no such setting"),
        ({"algorithm": "boil", "adapt": ["layers.*"]}, "no such setting"),
        ({"algorithm": "fomaml", "order": 1}, "no such setting"),
        ({"algorithm": "imaml", "engine": "low_rank"}, "no such setting"),
        ({"algorithm": "imaml", "options": {"strength": 0}}, "strength must be above 0"),
        ({"algorithm": "imaml", "loss": "absolute"}, "no curvature"),
        ({"algorithm": "meta_sgd", "engine": "low_rank"}, "every weight has a rate of its own"),
        ({"algorithm": "meta_sgd", "steps": 0}, "steps must be at least 1"),
        ({"algorithm": "reptile", "options": {"sees": "query"}}, "sees"),
        ({"algorithm": "reptile", "order": 1}, "no such setting"),
    ],
)
def test_refused(meta: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        built(meta=meta)


def test_a_learner_of_nothing_but_a_head_is_refused():
    with pytest.raises(ConfigError, match="nothing but its head"):
        built(meta={"algorithm": "boil"}, model={"hidden": []})
