"""Recipes: `extends`, unknown keys, unusable values, and the way there and back through YAML."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metatrain.config import Config, load_config, to_yaml, validated
from metatrain.errors import ConfigError


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_extends_merges_key_by_key_and_the_file_wins(tmp_path):
    write(tmp_path, "base.yaml", "train: {epochs: 3, workers: 2}\nmodel: {hidden: [8, 8]}\n")
    path = write(tmp_path, "child.yaml", "extends: base.yaml\ntrain: {epochs: 5}\nmodel: {hidden: [4]}\n")
    config = load_config(path)
    assert (config.train.epochs, config.train.workers, config.model.hidden) == (5, 2, (4,))


def test_another_learner_inherits_nothing_that_was_set_for_the_one_below(tmp_path):
    meta = "{algorithm: maml, loss: huber, steps: 9, adapt: [head.*], options: {a: 1}}"
    write(tmp_path, "base.yaml", f"meta: {meta}\nmodel: {{hidden: [8], options: {{b: 2}}}}\n")
    same = load_config(write(tmp_path, "same.yaml", "extends: base.yaml\nmeta: {algorithm: maml, rate: 0.5}"))
    assert (same.meta.steps, same.meta.options, same.model.options) == (9, {"a": 1}, {"b": 2})
    path = write(
        tmp_path, "other.yaml", "extends: base.yaml\nmeta: {algorithm: ridge}\nmodel: {learner: factorisation}"
    )
    other = load_config(path)
    assert (other.meta.loss, other.meta.steps, other.meta.adapt, other.meta.options) == ("huber", 3, ("*",), {})
    assert (other.model.hidden, other.model.options) == ((8,), {})
    # And so on, down the chain.
    last = load_config(write(tmp_path, "last.yaml", "extends: other.yaml\nmeta: {algorithm: ridge}"))
    assert (last.meta.loss, last.meta.steps) == ("huber", 3)


def test_a_circle_of_extends_is_refused(tmp_path):
    write(tmp_path, "a.yaml", "extends: b.yaml")
    with pytest.raises(ConfigError, match="circle"):
        load_config(write(tmp_path, "b.yaml", "extends: a.yaml"))


@pytest.mark.parametrize(
    ("raw", "place", "hint"),
    [
        ({"train": {"epoch": 3}}, "x.yaml: train.epoch", "`epochs`"),
        ({"trian": {}}, "x.yaml: trian", "`train`"),
        ({"train": {"optimizer": {"table_rat": 1}}}, "train.optimizer.table_rat", "`table_rate`"),
        ({"prepare": {"features": [{"name": "a", "level": "item", "kind": "multi", "widht": 3}]}}, "widht", "`width`"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_one(raw, place, hint):
    with pytest.raises(ConfigError) as caught:
        validated(raw, "x.yaml")
    assert place in str(caught.value)
    assert f"Did you mean {hint}?" in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"data": {"tasks_per_step": 10, "lanes": 4}}, "must be a multiple of lanes"),
        ({"train": {"workers": 9}}, "must be at most data.lanes"),
        ({"train": {"epochs": 0}}, "greater than 0"),
        ({"meta": {"rate": float("nan")}}, "finite"),
        ({"meta": {"order": 3}}, "1 or 2"),
    ],
)
def test_an_unusable_value_is_refused(raw, message):
    with pytest.raises(ConfigError, match=message):
        validated(raw, "x.yaml")


def test_a_missing_file_and_broken_yaml_are_config_errors(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration"):
        load_config(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="YAML cannot be read"):
        load_config(write(tmp_path, "bad.yaml", "a: [1,"))
    with pytest.raises(ConfigError, match="mapping"):
        load_config(write(tmp_path, "list.yaml", "- 1"))


@settings(deadline=None)  # its time is the machine's
@given(
    epochs=st.integers(1, 10**6),
    rate=st.floats(1e-12, 1e3),
    hidden=st.lists(st.integers(1, 512), max_size=4),
    adapt=st.lists(st.text(max_size=8), max_size=3),
)
def test_yaml_reads_back_to_an_equal_configuration(tmp_path_factory, epochs, rate, hidden, adapt):
    raw = {"train": {"epochs": epochs}, "meta": {"rate": rate, "adapt": adapt}, "model": {"hidden": hidden}}
    config = validated(raw, "x")
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(path)) == config


def test_training_draws_its_cuts_also_where_other_fields_of_its_episodes_are_given():
    config = validated({"data": {"episode": {"query_max": 3}}, "evaluate": {"episode": {"query_max": 3}}}, where="here")
    assert (config.data.episode.cut, config.data.episode.query_max) == ("uniform", 3)
    assert (config.evaluate.episode.cut, config.evaluate.episode.query_max) == ("last", 3)
    assert validated({"data": {"episode": {"cut": "last"}}}, where="here").data.episode.cut == "last"


def test_the_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().train.epochs = 2
