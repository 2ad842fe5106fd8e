"""The command line: help, errors without tracebacks, overrides."""

import subprocess
import sys

import pytest
import yaml

from metatrain.cli import main

COMMANDS = (
    *("prepare", "verify", "train", "evaluate", "compare", "recommend", "checkpoints", "board", "status", "submit"),
    *("job", "config"),
    "doctor",
)


def test_without_arguments_the_commands_are_shown(capsys):
    main([])
    shown = capsys.readouterr().out
    assert all(f"metatrain {c}" in shown for c in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 5


@pytest.mark.parametrize("command", ["config", "train", "submit", "prepare"])
@pytest.mark.parametrize("text", ["train: {epochs: many}", "trian: {}", "a: [1,"])
def test_help_is_given_whatever_the_recipe_holds(command, text, tmp_path, capsys):
    """An error of a recipe's value names this as the remedy."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main([command, str(recipe), "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr()
    assert "prepare.path" in shown.out or "--path" in shown.out
    assert f"note: {recipe} cannot be read" in shown.err


def test_overrides_reach_the_resolved_configuration(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {epochs: 3}")
    main(["config", str(recipe), "--train.epochs", "7", "--model.hidden", "8", "4"])
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["train"]["epochs"] == 7
    assert resolved["model"]["hidden"] == [8, 4]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "no such command"),
        (["train"], "needs a recipe"),
        (["train", "none.yaml"], "no such configuration file"),
        (["verify", "no/such/dataset"], "no manifest"),
        (["train", "configs/demo.yaml", "--profile", "15:10"], "must be of 1 to 100 steps"),
        (["train", "configs/demo.yaml", "--profile", "ten"], "--profile"),
        (["recommend", "runs/x"], "--events FILE"),
        (["evaluate", "no/such/run"], "no checkpoint"),
        (["compare"], "needs a leaderboard file"),
        (["board"], "needs RUNs"),
        (["board", "no/such/run"], "no curves yet"),
        (["status", "no/such/run"], "told of no training"),
        (["checkpoints", "no/such/run"], "no such run"),
        (["submit"], "needs a recipe"),
        (["submit", "configs/demo.yaml", "--env", "NAME"], "NAME=VALUE"),
        (["job"], "list, status, logs, stop"),
        (["job", "end", "a"], "no such action"),
        (["job", "stop"], "needs a job's ID"),
        (["compare", "none.yaml", "--out", "x"], "no such configuration file"),
    ],
)
def test_an_error_is_short_and_exits_with_2(arguments, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert expected in shown
    assert "Traceback" not in shown


def test_help_imports_nothing_heavy():
    code = "import sys; from metatrain.cli import main; main([]); assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
