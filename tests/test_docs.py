"""Pages that speak of the code stay true: the reference is up to date, examples load and run, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from metatrain.config import validated
from metatrain.meta.episode import Episodes, Examples

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


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


def test_configuration_example_is_valid():
    [example] = blocks(ROOT / "docs" / "configuration.md", "yaml")
    config = validated(yaml.safe_load(example), where="docs/configuration.md")
    assert [feature.kind for feature in config.prepare.features].count("vector") == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    targets = [t for t in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")) if "://" not in t]
    assert [t for t in targets if not (page.parent / t).exists()] == []


def test_example_meta_learner_adapts(tmp_path: Path):
    [source] = blocks(ROOT / "docs" / "adding-a-meta-learner.md", "python")
    (tmp_path / "shrunk_bias.py").write_text(source)
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
