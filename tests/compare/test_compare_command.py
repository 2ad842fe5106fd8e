"""`metatrain compare` on Ray: two methods that train, one that cannot, and the same again without training."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path

import pytest
import yaml

from metatrain.checkpoint import committed_steps
from metatrain.cli import main
from metatrain.compare import runs
from metatrain.compare.entries import read_comparison
from metatrain.train.launch import launch
from tests.data.tiny_dataset import write_tiny_dataset
from tests.train.runs import recipe

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A leaderboard file over a tiny dataset."""
    folder = tmp_path_factory.mktemp("board")
    write_tiny_dataset(str(folder / "dataset"), users=80, validation=10, test=20)
    base = recipe(str(folder / "dataset"), str(folder / "elsewhere"), "base", {"epochs": 1, "max_steps": 4})
    (folder / "base.yaml").write_text(yaml.safe_dump(base.model_dump(mode="json")))
    content = {
        "base": "base.yaml",
        "evaluate": {"support_sizes": [0, 5]},
        "entries": {
            "maml": {},
            "broken": {"meta": {"algorithm": "no-such-method"}},
            "joint": {"meta": {"algorithm": "joint"}},
        },
    }
    (folder / "board.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "board.yaml"


def test_trains_judges_reports_and_does_nothing_twice(board: Path, ray_session: None, capsys, monkeypatch):
    out = board.parent / "out"
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(board), "--out", str(out)])
    assert ended.value.code == 1  # one entry cannot be made
    shown = capsys.readouterr().out
    assert "broken (seed 0): failed: There is none of this name." in shown
    content = json.loads((out / "leaderboard.json").read_text())
    assert content["configuration"]["support_sizes"] == [0, 5]
    assert [(e["name"], e["status"]) for e in content["entries"]] == [
        ("maml", "scored"),
        ("broken", "failed"),
        ("joint", "scored"),
    ]
    rows = {(r["model"], r["partition"], r["metric"]): r for r in content["rows"]}
    assert {"maml", "maml, unadapted", "joint", "joint, unadapted", "support median"} <= {model for model, _, _ in rows}
    assert len([r for r in content["rows"] if (r["model"], r["metric"]) == ("support median", "MAE")]) == 3
    # A row is the run's own evaluation.
    for name in ("maml", "joint"):
        alone = json.loads((out / "runs" / f"{name}-seed0" / "evaluation.json").read_text())
        for row in alone["rows"]:
            model = {"adapted": name, "unadapted": f"{name}, unadapted"}.get(row["model"], row["model"])
            assert {k: rows[model, row["partition"], row["metric"]][k] for k in row if k != "model"} == pytest.approx(
                {k: v for k, v in row.items() if k != "model"}
            )
    assert content["entries"][2]["fine_tuning"]["chosen"]["steps"] in (1, 5, 20)
    assert rows["maml", "new users", "MAE"]["train_seconds"] > 0

    # Again: nothing is trained or scored.
    monkeypatch.setattr(runs, "launch", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(runs, "evaluate_run", lambda *_, **__: pytest.fail("scored again"))
    before = (out / "leaderboard.json").read_text()
    with pytest.raises(SystemExit):
        main(["compare", str(board), "--out", str(out)])
    with pytest.raises(SystemExit):
        main(["compare", str(board), "--out", str(out), "--report"])
    assert (out / "leaderboard.json").read_text() == before


def test_a_run_that_was_trained_elsewhere_is_judged_as_it_is(board: Path, capsys):
    trained = board.parent / "out" / "runs" / "maml-seed0"
    main(["compare", str(trained), "--out", str(board.parent / "other")])
    found = json.loads((board.parent / "other" / "leaderboard.json").read_text())
    here = json.loads((board.parent / "out" / "leaderboard.json").read_text())
    value = {(r["model"], r["partition"], r["metric"]): r["value"] for r in here["rows"]}
    own = [r for r in found["rows"] if r["model"] == "maml-seed0"]
    assert own
    # Its protocol is its own here: the figures don't depend on the curve's sizes.
    assert all(r["value"] == pytest.approx(value["maml", r["partition"], r["metric"]]) for r in own)
    assert all(r["train_seconds"] is None for r in own)


def test_a_training_that_the_budget_cuts_off_goes_on_later(board: Path, ray_session: None):
    config = runs.run_of(read_comparison([str(board)]).entries[0], 7, str(board.parent / "cut"))
    with pytest.raises(runs.OutOfTimeError, match="at step 1 of 4"):
        launch(config, None, functools.partial(runs.train_until, deadline=time.time()))
    assert committed_steps(config.run_url) == []
    launch(config, None, functools.partial(runs.train_until, deadline=time.time() + 3600))
    assert committed_steps(config.run_url)[-1] == 4
