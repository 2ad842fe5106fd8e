"""Mutated recipes: read to a configuration that can be written and read again, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from metatrain.compare.entries import read_comparison
from metatrain.config import Config, load_config, to_yaml, validated
from metatrain.credentials import holds_credential
from metatrain.errors import ConfigError
from tests.fuzz.mutations import altered, fuzzed, mutated, read_or_refused

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
BOARDS = sorted((Path(__file__).parents[2] / "configs" / "leaderboards").glob("*.yaml"))
WHOLE = yaml.safe_load(to_yaml(Config()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes beside one another, for `extends`."""
    folder = tmp_path_factory.mktemp("recipes")
    for recipe in RECIPES:
        (folder / recipe.name).write_bytes(recipe.read_bytes())
    return folder


def check(path: Path) -> None:
    config = read_or_refused(lambda: load_config(str(path)), ConfigError)
    if config is not None:
        written = to_yaml(config)
        assert validated(yaml.safe_load(written), "again") == config
        assert not holds_credential(written)
        assert config.run_url


@fuzzed(150)
@given(data=st.data())
def test_mutated_recipes(folder: Path, data: st.DataObject):
    content = data.draw(st.sampled_from([recipe.read_bytes() for recipe in RECIPES]))
    path = folder / "mutated.yaml"
    path.write_bytes(data.draw(mutated(content)))
    check(path)


@fuzzed(150)
@given(data=st.data())
def test_altered_recipes(folder: Path, data: st.DataObject):
    path = folder / "altered.yaml"
    document = data.draw(altered(WHOLE))
    try:
        path.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), encoding="utf-8")
    except UnicodeEncodeError:
        return
    check(path)


_MARKS = ["&a ", "*a", "<<: ", "- ", "? ", ": ", "{", "}", "[", "]", "|\n  ", ">\n  ", "---\n", "...\n", "%YAML 1.1\n"]
_TAGS = ["!!python/object:os.system ", "!!int ", "!!set ", "!!binary ", "!!timestamp ", "!!null ", "'", '"', "\\", "\t"]
_VALUES = [
    "train",
    "epochs",
    "meta",
    "extends",
    "1",
    "0x1F",
    "1_0",
    "0o7",
    "1:30",
    ".inf",
    ".nan",
    "~",
    "2001-01-01",
    "é",
]
PIECES = st.sampled_from([*_MARKS, *_TAGS, *_VALUES, "=", "\n", "\n  "])


@fuzzed(150)
@given(pieces=st.lists(PIECES, max_size=30))
def test_texts_of_yaml_pieces(folder: Path, pieces: list[str]):
    path = folder / "pieces.yaml"
    path.write_text("".join(pieces), encoding="utf-8")
    check(path)


@fuzzed(60)
@given(data=st.data())
def test_mutated_leaderboards(folder: Path, data: st.DataObject):
    content = data.draw(st.sampled_from([board.read_bytes() for board in BOARDS]))
    path = folder / "board.yaml"
    path.write_bytes(data.draw(mutated(content)))
    read_or_refused(lambda: read_comparison([str(path)]), ConfigError)


def test_extends_that_never_ends_is_refused(folder: Path):
    (folder / "circle.yaml").write_text("extends: ./././circle.yaml")
    read_or_refused(lambda: load_config(str(folder / "circle.yaml")), ConfigError)
    for number in range(40):
        (folder / f"long{number}.yaml").write_text(f"extends: [long{number + 1}.yaml, long{number + 1}.yaml]")
    (folder / "long40.yaml").write_text("run: {name: x}")
    with pytest.raises(ConfigError, match="goes through 32 files"):
        load_config(str(folder / "long0.yaml"))
    assert load_config(str(folder / "long9.yaml")).run.name == "x"  # 2^31 ways through 31 files, each read once
