"""Pages that speak of the code stay true: the reference is up to date, examples load and run, links lead somewhere."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from metatrain.config import validated
from metatrain.errors import ConfigError
from metatrain.learners import META_LEARNERS
from metatrain.meta.episode import Episodes, Examples
from metatrain.meta.learner import MetaLearner
from metatrain.model.build import build_model
from metatrain.model.construct import named
from tests.model.test_pairs import CLICKS, RATINGS
from tests.pages import ROOT, blocks, example_meta_learner

#: A base learner without any of what some methods need.
PLAIN = """
from torch import nn

class Plain(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.linear = nn.Linear(inputs, 1)

    def forward(self, x):
        return self.linear(x).squeeze(-1)
"""

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_configuration_reference_is_up_to_date():
    reference = load(ROOT / "tools" / "config_reference.py")
    assert reference.FILE.read_text(encoding="utf-8") == reference.reference(), "run `make docs`"


def test_configuration_reference_names_every_section():
    reference = load(ROOT / "tools" / "config_reference.py")
    names = [name for name, _ in reference.sections(reference.Config)]
    assert {"run", "prepare.features[]", "data.episode", "train.optimizer", "evaluate.episode"} <= set(names)
    # A section's default may differ from its class's.
    data, evaluate = (reference.reference().split(f"## `{name}.episode`")[1] for name in ("data", "evaluate"))
    assert "| `uniform` |" in data.split("## ")[0]
    assert "| `last` |" in evaluate.split("## ")[0]


def test_the_recipe_of_own_data_fits_its_files():
    page = ROOT / "docs" / "own-data.md"
    [recipe] = blocks(page, "yaml")
    config = validated(yaml.safe_load(recipe), where=str(page))
    log, items, events = (text.splitlines()[0].split(",") for text in blocks(page, "csv"))
    columns = config.prepare.columns
    assert [columns.task, columns.item, columns.label, columns.timestamp] == log
    assert {columns.item, "title", *(feature.name for feature in config.prepare.features)} == set(items)
    assert events == ["item", "label"]


def test_configuration_example_is_valid():
    [example] = blocks(ROOT / "docs" / "configuration.md", "yaml")
    config = validated(yaml.safe_load(example), where="docs/configuration.md")
    assert [feature.kind for feature in config.prepare.features].count("vector") == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    targets = [t for t in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")) if "://" not in t]
    assert [t for t in targets if not (page.parent / t).exists()] == []


def methods() -> dict[str, list[str]]:
    """The rows of docs/meta-learners.md: name → its other cells."""
    lines = (ROOT / "docs" / "meta-learners.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| [")]
    found = {re.findall(r"`(\w+)`", row[0])[0]: row[1:] for row in rows}
    assert len(found) == len(rows)
    return found


def refusal(name: str, click: bool = False, learner: str = "factorisation", features=None, **meta: object) -> str:
    """Why a model with this meta-learner can't be made; empty where it can."""
    loss = "binary_cross_entropy" if click else "squared"
    model = {"learner": learner, "features": features}
    config = validated({"meta": {"algorithm": name, "loss": loss, **meta}, "model": model}, where="x")
    try:
        build_model(CLICKS if click else RATINGS, config)
    except ConfigError as error:
        return str(error)
    return ""


def test_every_meta_learner_has_a_row():
    assert methods().keys() == META_LEARNERS.keys()


@pytest.mark.parametrize("name", META_LEARNERS)
def test_a_row_says_what_the_constructor_says(name: str, tmp_path: Path):
    *_, labels, needs, options = methods()[name]
    kind = named(name, META_LEARNERS, MetaLearner, "meta.algorithm")
    # The names of a method's own options are those that it offers to one who misspells them.
    [own] = re.findall(r"It has: ([\w, ]+)\.", refusal(name, options={"_": 1}))
    defaults = inspect.signature(kind).parameters
    expected = {} if own == "none" else {n: defaults[n].default for n in own.split(", ")}
    written = yaml.safe_load(f"{{{', '.join(re.findall(r'`(.*?)`', options))}}}")
    assert written == {n: list(v) if isinstance(v, tuple) else v for n, v in expected.items()}
    assert labels == ", ".join(
        word for word, click in (("ratings", False), ("clicks", True)) if not refusal(name, click)
    )
    (tmp_path / "plain.py").write_text(PLAIN)
    why = refusal(name, labels == "clicks", f"{tmp_path}/plain.py:Plain")
    assert needs.split(",")[0] == next((f"`{n}`" for n in ("represent", "head_parameters") if f"`{n}`" in why), "any")
    without = refusal(name, labels == "clicks", features=["item", "year"])
    assert bool(without) == ("features of the task" in needs), without


def test_example_meta_learner_adapts(tmp_path: Path):
    (tmp_path / "shrunk_bias.py").write_text(example_meta_learner())
    learner = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Flatten(-2))
    meta = load(tmp_path / "shrunk_bias.py").ShrunkBias(learner)
    assert meta.curves() == {"meta/shrinkage": pytest.approx(1.0)}
    generator = torch.Generator().manual_seed(0)
    x_TEF = torch.randn(4, 6, 3, generator=generator)
    shift_T1 = torch.tensor([[3.0], [-3.0], [2.0], [-2.0]])  # what tells the tasks apart
    labels_TE = learner(x_TEF).detach() + shift_T1
    mask_TE = torch.ones(4, 6)
    mask_TE[:, 4:] = 0  # padding
    examples = Examples(x_TEF, {}, labels_TE, mask_TE)
    result = meta(Episodes(examples, examples, {}))
    assert (result.after < result.before).all()
    result.total.backward()
    assert all(parameter.grad is not None for parameter in meta.parameters())
    assert torch.equal(meta(Episodes(padded_with(examples, 1e6), examples, {})).after, result.after)


def padded_with(examples: Examples, value: float) -> Examples:
    labels = torch.where(examples.mask > 0, examples.labels, value)
    return Examples(examples.x, {}, labels, examples.mask)
