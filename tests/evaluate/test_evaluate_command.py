"""`metatrain evaluate`: whose protocol it takes, and where the dataset lies."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from metatrain.cli import main
from metatrain.evaluate import evaluation


@pytest.fixture
def asked(monkeypatch) -> list:
    """What the command asks for, in place of an evaluation."""
    calls = []

    def evaluate_run(run, **settings):
        calls.append((run, settings))
        return SimpleNamespace(table=lambda: "the table")

    monkeypatch.setattr(evaluation, "evaluate_run", evaluate_run)
    return calls


@pytest.fixture
def recipe(tmp_path) -> str:
    """A recipe whose protocol has changed since its run was trained."""
    run = tmp_path / "runs" / "r"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("evaluate: {draws: 2, seed: 9}")
    path = tmp_path / "recipe.yaml"
    path.write_text(f"run: {{name: r, storage: {tmp_path / 'runs'}}}\nevaluate: {{draws: 5}}")
    return str(path)


def test_a_recipe_brings_its_own_protocol(asked, recipe, tmp_path, capsys):
    main(["evaluate", recipe])
    run, settings = asked[0]
    assert run == str(tmp_path / "runs" / "r")
    assert (settings["evaluate"].draws, settings["evaluate"].seed) == (5, 0)
    assert settings["dataset"] is None
    assert capsys.readouterr().out == "the table\n"


def test_a_run_has_the_protocol_that_it_was_trained_with(asked, recipe, tmp_path):
    main(["evaluate", str(tmp_path / "runs" / "r"), "--seed", "3", "--dataset", "/moved/here", "--checkpoint", "40"])
    _, settings = asked[0]
    assert (settings["evaluate"].draws, settings["evaluate"].seed) == (2, 3)
    assert (settings["dataset"], settings["checkpoint"]) == ("/moved/here", 40)
