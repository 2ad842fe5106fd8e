"""Leaderboard files, and recipes and runs named one by one: what they mean, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from metatrain.compare.entries import read_comparison
from metatrain.config import Config, load_config
from metatrain.data.schema import Feature, Kind, LabelKind, Level, Schema
from metatrain.errors import ConfigError
from metatrain.model.build import build_model

CONFIGS = Path(__file__).parents[2] / "configs"

BASE = """
data: {dataset: /data/set}
meta: {loss: huber, steps: 7, adapt: [head.*]}
evaluate: {draws: 2, episode: {by: random}}
"""


@pytest.fixture
def board(tmp_path: Path):
    """Writes a leaderboard file beside a base recipe, and reads it."""
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "boards").mkdir()

    def read(text: str):
        (tmp_path / "boards" / "small.yaml").write_text(text)
        return read_comparison([str(tmp_path / "boards" / "small.yaml")])

    return read


def test_entries_are_changes_of_the_base_as_a_recipe_that_extends_it_would_say_them(board):
    found = board("base: ../base.yaml\nseeds: [3, 4]\nminutes: 5\nentries: {a: {}, b: {meta: {algorithm: ridge}}}")
    assert (found.name, found.seeds, found.minutes, found.dataset) == ("small", (3, 4), 5.0, "/data/set")
    a, b = found.entries
    assert (a.config.meta.algorithm, a.config.meta.steps, a.config.evaluate.draws) == ("maml", 7, 2)
    assert (b.config.meta.algorithm, b.config.meta.loss, b.config.meta.steps) == ("ridge", "huber", 3)
    assert b.configuration == {"meta": {"algorithm": "ridge"}}


def test_a_protocol_in_the_file_is_everyones(board, tmp_path: Path):
    (tmp_path / "boards" / "own.yaml").write_text(BASE.replace("draws: 2", "draws: 9") + "model: {hidden: [8]}\n")
    found = board("base: ../base.yaml\nevaluate: {draws: 5}\nentries: {a: {}, own: own.yaml}")
    assert found.evaluate.draws == 5
    assert found.evaluate.episode.by == "random"
    assert [e.config.evaluate.draws for e in found.entries] == [5, 5]
    assert found.entries[1].config.model.hidden == (8,)


def test_an_entry_of_another_protocol_dataset_or_key_is_an_error_of_its_own(board, tmp_path: Path):
    (tmp_path / "boards" / "draws.yaml").write_text(BASE.replace("draws: 2", "draws: 9"))
    (tmp_path / "boards" / "batch.yaml").write_text(BASE.replace("draws: 2", "draws: 2, tasks_per_batch: 3"))
    (tmp_path / "boards" / "data.yaml").write_text(BASE.replace("/data/set", "/data/other"))
    found = board(
        "base: ../base.yaml\nentries: {fine: {}, draws: draws.yaml, batch: batch.yaml, data: data.yaml, none: no.yaml,"
        " key: {meta: {step: 3}}, seed: {train: {seed: 3}}, protocol: {evaluate: {k: [1]}}}"
    )
    said = {entry.name: str(entry.error) for entry in found.entries if entry.error}
    assert list(said) == ["draws", "data", "none", "key", "seed", "protocol"]
    assert "another `evaluate.draws`" in said["draws"]
    assert "/data/other" in said["data"]
    assert "no such configuration file" in said["none"]
    assert "Did you mean `steps`?" in said["key"]
    assert "entries.key" in said["key"]
    assert "what all entries share" in said["seed"]
    assert "what all entries share" in said["protocol"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("entries: {}", "at least 1"),
        ("base: ../base.yaml\nentires: {a: {}}\nentries: {a: {}}", "Did you mean `entries`"),
        ("entries: {a: {}}", "Without a base"),
        ("base: ../base.yaml\nentries: {a b: {}}", "letters, digits"),
        ("base: ../base.yaml\nentries: {popularity: {}}", "none of the report's own"),
        ("base: ../base.yaml\nseeds: []\nentries: {a: {}}", "at least 1"),
        ("base: ../base.yaml\nminutes: -1\nentries: {a: {}}", "greater than or equal to 0"),
        ("base: ../base.yaml\nevaluate: {draw: 1}\nentries: {a: {}}", "Did you mean `draws`"),
    ],
)
def test_a_file_that_cannot_be_meant_so_is_refused(board, text: str, message: str):
    with pytest.raises(ConfigError) as caught:
        board(text)
    assert message in str(caught.value)


def test_recipes_named_one_by_one_share_the_first_ones_protocol(tmp_path: Path):
    for name, text in (
        ("a", BASE),
        ("b", BASE + "model: {hidden: [4]}\n"),
        ("c", BASE.replace("draws: 2", "draws: 3")),
    ):
        (tmp_path / f"{name}.yaml").write_text(f"run: {{name: {name}}}\n{text}")
    found = read_comparison([str(tmp_path / f"{name}.yaml") for name in "abc"])
    assert [e.name for e in found.entries] == ["a", "b", "c"]
    assert [bool(e.error) for e in found.entries] == [False, False, True]
    with pytest.raises(ConfigError, match="one name"):
        read_comparison([str(tmp_path / "a.yaml")] * 2)
    (tmp_path / "board.yaml").write_text("entries: {a: a.yaml}")
    with pytest.raises(ConfigError, match="compared alone"):
        read_comparison([str(tmp_path / "board.yaml"), str(tmp_path / "a.yaml")])
    with pytest.raises(ConfigError, match="nothing to compare"):
        read_comparison([])


MOVIELENS = Schema(
    features=(
        Feature(name="item", level=Level.ITEM, kind=Kind.CATEGORICAL, table="item", rows=11, width=8),
        Feature(name="genres", level=Level.ITEM, kind=Kind.MULTI, table="genres", rows=5, width=4),
        Feature(name="year", level=Level.ITEM, kind=Kind.NUMERIC),
        Feature(name="age", level=Level.TASK, kind=Kind.CATEGORICAL, table="age", rows=5, width=4),
    ),
    label=LabelKind.RATING,
    label_mean=3.5,
    label_deviation=1,
    label_min=1,
    label_max=5,
)


@pytest.mark.parametrize("path", sorted((CONFIGS / "leaderboards").glob("*.yaml")), ids=lambda path: path.stem)
def test_our_leaderboards_can_be_made(path: Path):
    found = read_comparison([str(path)])
    assert found.name == path.stem
    assert found.minutes > 0
    for entry in found.entries:
        assert entry.error is None, str(entry.error)
        builds(entry.config)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_our_recipes_can_be_made(path: Path):
    builds(load_config(str(path)))


def builds(config: Config) -> None:
    """A model is made of a recipe, of all features that there are."""
    clicks = {"label": LabelKind.CLICK, "label_mean": 0.5, "label_min": 0, "label_max": 1}
    schema = MOVIELENS.model_copy(update=clicks if config.prepare.label == "click" else {})
    model = config.model.model_copy(update={"features": None})
    assert build_model(schema, config.model_copy(update={"model": model}), tables_device="meta").meta.learner


@pytest.mark.parametrize("path", sorted((CONFIGS / "protocols").glob("*.yaml")), ids=lambda path: path.stem)
def test_our_protocols_go_behind_a_recipe(path: Path, tmp_path: Path):
    (tmp_path / "own.yaml").write_text(f"extends: [{CONFIGS / 'movielens-1m.yaml'}, {path}]")
    config = load_config(str(tmp_path / "own.yaml"))
    # Training may draw from longer histories than are judged, and ask for more of them.
    of_any_length = {"events_min": 1, "events_max": 10**9, "query_max": 10**9}
    assert config.data.episode.model_copy(update=of_any_length) == config.evaluate.episode.model_copy(
        update=of_any_length
    )
    assert config.meta.loss == "absolute"
    assert config.evaluate.draws == 5
