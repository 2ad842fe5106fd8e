"""The leaderboard's rows against means and tests by hand, and its files."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from made_up import JUDGE, METRICS, PARTITION, draw, failed, run

from metatrain.compare.comparison import write
from metatrain.compare.entries import Entry
from metatrain.compare.leaderboard import Leaderboard
from metatrain.compare.runs import Run
from metatrain.compare.tables import markdown, text
from metatrain.config import Config

stats = pytest.importorskip("scipy.stats")

BASELINE = draw(0.9, 99)
GOOD, CLOSE = [draw(0.7, 1), draw(0.72, 2)], draw(0.712, 3)


@pytest.fixture
def board() -> Leaderboard:
    """Two seeds of one entry, one of another, a failure, and one beyond the budget."""
    late = Run(Entry("late", {}, Config()), 0, "/out", "not started", "the budget of 5 minutes was spent")
    runs = (
        run("good", 0, GOOD[0], BASELINE),
        run("close", 0, CLOSE, BASELINE, 30.0),
        failed("broken"),
        late,
        run("good", 1, GOOD[1], BASELINE, 90.0),
    )
    return Leaderboard("board", JUDGE.config, JUDGE, runs, 5.0)


def rows_of(board: Leaderboard) -> dict[tuple[str, str], object]:
    return {(row.model, row.metric): row for row in board.rows}


def test_values_are_means_over_seeds_and_intervals_cover_tasks(board: Leaderboard):
    rows = rows_of(board)
    mean = np.mean(GOOD, axis=0)
    row = rows["good", "MAE"]
    assert (row.seeds, row.tasks, row.train_seconds) == ((0, 1), 30, 75.0)
    assert row.value == pytest.approx(mean.mean())
    half = stats.t.ppf(0.975, 29) * mean.std(ddof=1) / math.sqrt(30)
    assert (row.low, row.high) == pytest.approx((mean.mean() - half, mean.mean() + half), rel=1e-5)
    assert row.seed_deviation == pytest.approx(np.std([v.mean() for v in GOOD], ddof=1))
    assert row.configuration == {"meta": {"steps": 0}}
    squares = np.mean(np.square(GOOD), axis=0)
    assert rows["good", "RMSE"].value == pytest.approx(math.sqrt(squares.mean()))
    roots = [math.sqrt(np.square(v).mean()) for v in GOOD]
    assert rows["good", "RMSE"].seed_deviation == pytest.approx(np.std(roots, ddof=1))
    assert rows["good, unadapted", "MAE"].value == pytest.approx(mean.mean() + 0.2)
    assert math.isnan(rows["close", "MAE"].seed_deviation)
    assert rows["good", "nDCG@5"].tasks == 20


def test_baselines_are_rows_once(board: Leaderboard):
    assert [(r.model, r.metric) for r in board.rows if r.model == "median"] == [("median", m) for m in METRICS]
    row = rows_of(board)["median", "MAE"]
    assert (row.value, row.seeds, row.train_seconds) == (pytest.approx(BASELINE.mean()), (), None)


def test_what_is_not_distinguishable_from_the_best_is_marked_by_a_paired_test(board: Leaderboard):
    rows = rows_of(board)
    mean = np.mean(GOOD, axis=0)
    values = {"good": mean, "close": CLOSE, "median": BASELINE, "good, unadapted": mean + 0.2}
    best = min(values, key=lambda m: values[m].mean())
    assert [m for m in values if rows[m, "MAE"].best] == [best]
    for model in ("close", "median", "good"):
        if model == best:
            continue
        p = stats.ttest_rel(values[model], values[best]).pvalue
        assert rows[model, "MAE"].p_to_best == pytest.approx(p, rel=1e-6, abs=1e-15)
        assert rows[model, "MAE"].distinguishable == (p < 0.01)
    assert not rows["close", "MAE"].distinguishable
    assert rows["median", "MAE"].distinguishable
    # Of nDCG more is better.
    assert max(values, key=lambda m: rows[m, "nDCG@5"].value) == next(m for m in values if rows[m, "nDCG@5"].best)


def test_json_has_the_rows_of_an_evaluation_and_more(board: Leaderboard):
    content = json.loads(board.to_json())
    row = content["rows"][0]
    assert list(row)[:8] == ["model", "partition", "metric", "value", "low", "high", "tasks", "draws"]
    assert {"seeds", "train_seconds", "configuration", "seed_deviation", "p_to_best", "best"} <= set(row)
    assert {e["status"] for e in content["entries"]} == {"scored", "failed", "not started"}
    assert content["entries"][0]["configuration"]["meta"]["algorithm"] == "maml"
    sizes = {(r["model"], r["support"]): r["value"] for r in content["by_support_size"]}
    assert sizes["good", 0] == pytest.approx(np.mean(GOOD) + 1)
    assert content["notes"] == ["Baselines are few.", "good: good was tuned.", "close: close was tuned."]


def test_the_table_has_the_best_first_and_lists_what_is_missing(board: Leaderboard):
    shown = text(board)
    block, missing, notes = shown.rstrip("\n").split("\n\n")
    head, _, names, _, *lines = block.splitlines()
    assert "p ≥ 0.01" in head
    assert names.split() == ["MAE", "RMSE", "nDCG@5", "seeds", "MAE", "over", "seeds", "train", "s"]
    assert len(lines) == 5
    of = {line[:16].strip(): line for line in lines}
    assert "*" in of[lines[0][:16].strip()]
    assert "≈" in of["close"] or "≈" in of["good"]
    assert "≈" not in of["median"]
    assert "σ" in of["good"]
    assert missing.splitlines() == [
        "broken (seed 0): failed: It is broken. — where: meta.algorithm — remedy: Mend it.",
        "late (seed 0): not started: the budget of 5 minutes was spent",
    ]
    assert notes.startswith("note: Baselines are few.")
    assert board.failed
    page = markdown(board)
    assert page.count("| good |") == 1
    assert "- late (seed 0): not started" in page
    widths = {line.count("|") for line in page.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_seeds_measured_on_other_tasks_are_refused(board: Leaderboard):
    values = board.runs[4].scores.values[PARTITION]
    values.tasks[0] = 1
    with pytest.raises(ValueError, match="other tasks"):
        _ = board.rows


def test_files(board: Leaderboard, tmp_path):
    urls = write(board, str(tmp_path))
    assert set(urls) == {"leaderboard.json", "leaderboard.md", "leaderboard.txt", "leaderboard.png"}
    assert (tmp_path / "leaderboard.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "leaderboard.txt").read_text() == text(board)
    nothing = Leaderboard("board", JUDGE.config, JUDGE, (failed("broken"),))
    write(nothing, str(tmp_path / "nothing"))
    assert "failed" in (tmp_path / "nothing" / "leaderboard.md").read_text()
    assert json.loads(nothing.to_json())["rows"] == []
