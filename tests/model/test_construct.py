"""Learners by name or import path: what their constructors take, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from metatrain.checkpoint.identity import identity
from metatrain.config import Config, validated
from metatrain.data.schema import Feature, Kind, LabelKind, Level, Schema
from metatrain.errors import ConfigError
from metatrain.meta.maml import MAML
from metatrain.meta.metaembedding import MetaEmbedding
from metatrain.meta.mwuf import MWUF
from metatrain.meta.ridge import Ridge
from metatrain.model.build import build_model
from metatrain.train.checks import located

SCHEMA = Schema(
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

OWN = """
import torch
from metatrain.meta.learner import MetaLearner

class Halved(MetaLearner):
    def __init__(self, learner, *, loss="squared", layout=None, factor: float = 0.5, widths: tuple[int, ...] = ()):
        super().__init__(learner, loss=loss)
        if factor > 1:
            raise ValueError("factor is above 1")
        self.layout, self.factor, self.widths = layout, factor, widths

class Stranger:
    pass
"""


def config(**sections: object) -> Config:
    return validated({"model": {"hidden": [6], "activation": "tanh"}, **sections}, where="x.yaml")


def built(**sections: object):
    return build_model(SCHEMA, config(**sections)).meta


def test_ours_are_found_by_name():
    assert isinstance(built(), MAML)
    meta = built(meta={"algorithm": "ridge", "options": {"strength": 3}}, model={"learner": "factorisation"})
    assert isinstance(meta, Ridge)
    assert float(meta.log_strength.detach().exp()) == pytest.approx(3.0)
    assert meta.learner.represented == 8


@pytest.mark.parametrize(("name", "kind"), [("metaembedding", MetaEmbedding), ("mwuf", MWUF)])
def test_methods_that_read_the_tasks_features(name: str, kind: type):
    meta = built(meta={"algorithm": name, "steps": 2, "options": {"hidden": [3]}}, model={"learner": "factorisation"})
    assert isinstance(meta, kind)
    assert (meta.vector_width, meta.rates.shape, len(meta.task_columns)) == (9, (2,), 4)
    with pytest.raises(ConfigError, match=r"name features of level task in model\.features"):
        built(meta={"algorithm": name}, model={"learner": "factorisation", "features": ["item", "year"]})


@pytest.mark.parametrize("by", ["file", "module"])
def test_one_of_the_users_is_found_by_its_import_path(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / f"own_{by}.py"
    file.write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = f"{file}:Halved" if by == "file" else f"own_{by}:Halved"
    meta = built(meta={"algorithm": path, "loss": "huber", "options": {"factor": 1, "widths": [3, 4]}})
    assert (meta.loss, meta.factor, meta.widths) == ("huber", 1.0, (3, 4))
    assert [(c.feature, c.owner, c.start, c.stop) for c in meta.layout.features] == [
        ("age", "task", 0, 4),
        ("item", "item", 4, 12),
        ("year", "item", 12, 13),
    ]
    # The same file is the same class, however often it is named.
    assert type(built(meta={"algorithm": path})) is type(meta)
    assert sys.modules[type(meta).__module__].Halved is type(meta)


def test_a_file_is_the_same_learner_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    here = config(meta={"algorithm": "own.py:Halved"}, model={"learner": "parts/base.py:Base"})
    there = located(here)
    assert there.meta.algorithm == f"{tmp_path}/own.py:Halved"
    assert there.model.learner == f"{tmp_path}/parts/base.py:Base"
    assert identity(here, "x") == identity(there, "x")
    other = config(meta={"algorithm": "own.py:Other"}, model={"learner": "parts/base.py:Base"})
    assert identity(other, "x") != identity(here, "x")
    # Names and modules stay as they are.
    named = config(meta={"algorithm": "package.module:Class"})
    assert (located(named).meta, located(named).model) == (named.meta, named.model)


def test_an_adapted_feature_comes_last():
    layout = built(meta={"adapt_rows": ["age"]}).learner.layers[0]
    assert layout.in_features == 13
    from metatrain.model.features import Featurizer

    columns = Featurizer(SCHEMA, config().model, ["age"]).layout.features
    assert [(c.feature, c.start) for c in columns] == [("item", 0), ("year", 8), ("age", 9)]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"meta": {"algorithm": "mml"}}, "Did you mean 'maml'?"),
        ({"meta": {"algorithm": "nowhere.module:Class"}}, "nowhere.module cannot be imported: ModuleNotFoundError"),
        ({"meta": {"algorithm": "nowhere/file.py:Class"}}, "no such file"),
        ({"meta": {"algorithm": "metatrain.meta.maml:Nothing"}}, "no class derived from metatrain.meta.learner"),
        ({"meta": {"algorithm": "FILE:Stranger"}}, "no class derived from"),
        ({"meta": {"algorithm": "ridge", "order": 1}}, "meta.order"),
        ({"meta": {"algorithm": "ridge", "options": {"strenght": 1}}}, "Did you mean 'strength'?"),
        ({"meta": {"algorithm": "ridge", "options": {"strength": "much"}}}, "meta.options.strength"),
        ({"meta": {"algorithm": "ridge", "options": {"strength": -1}}}, "strength must be above 0"),
        ({"meta": {"algorithm": "FILE:Halved", "options": {"factor": 2}}}, "factor is above 1"),
        ({"meta": {"options": {"anything": 1}}}, "MAML has no such option"),
        ({"model": {"learner": "factorisation", "norm": "layer"}}, "model.norm"),
        ({"meta": {"adapt": ["hed.*"]}}, "matches no parameter"),
        ({"meta": {"loss": "absolute"}, "model": {"levels": 5}}, "MAML takes its query loss in its inner loop"),
        ({"meta": {"algorithm": "ridge"}, "model": {"levels": 5}}, "under squared error the best prediction is a mean"),
        ({"meta": {"algorithm": "ridge", "loss": "absolute"}, "model": {"levels": 1}}, "two levels at least"),
        ({"model": {"own_levels": True}}, "no staircase that tasks could have"),
    ],
)
def test_what_cannot_be_made_is_refused(sections: dict, message: str, tmp_path: Path):
    (tmp_path / "own.py").write_text(OWN)
    if "meta" in sections and "FILE" in str(sections["meta"].get("algorithm")):
        name = sections["meta"]["algorithm"].replace("FILE", str(tmp_path / "own.py"))
        sections = {"meta": {**sections["meta"], "algorithm": name}}
    with pytest.raises(ConfigError) as caught:
        built(**sections)
    assert message in str(caught.value)


def test_weights_depend_on_the_seed_alone():
    one, other = (built(meta={"algorithm": "ridge"}, model={"learner": "factorisation"}).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
