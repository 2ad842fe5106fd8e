"""The report as JSON, as a table and as a plot."""

from __future__ import annotations

import json
import math

import pytest

from metatrain.evaluate.report import PairedRow, Report, Row, SizeRow


@pytest.fixture
def report() -> Report:
    rows = [
        Row("adapted", "new users", "MAE", 0.70, 0.68, 0.72, 90, 2),
        Row("adapted", "new users", "AUC", 0.80, 0.78, 0.82, 80, 2),
        Row("global mean", "new users", "MAE", 0.90, 0.88, 0.92, 90, 2),
        Row("global mean", "new users", "AUC", 0.50, 0.50, 0.50, 80, 2),
        Row("popularity", "new users", "AUC", 0.85, 0.83, 0.87, 80, 2),
        Row("adapted", "both", "MAE", 1.00, -math.inf, math.inf, 1, 2),
    ]
    sizes = [
        SizeRow(model, "new users", "MAE", value, value - 0.1, value + 0.1, 90, 1, size)
        for model, value in (("adapted", 0.8), ("unadapted", 0.9), ("global mean", 0.95))
        for size in (0, 1, 5)
    ]
    return Report(
        dataset="made-up",
        run="test",
        checkpoint=120,
        configuration={"confidence": 0.9},
        rows=tuple(rows),
        by_support_size=tuple(sizes),
        partitions={"new users": "test users, existing items", "both": "test users, new items"},
        notes=("new items: left out, the dataset has no new items.",),
        facts={"relevant_from": 3.5},
    )


def test_json_rows_carry_exactly_these_keys(report):
    content = json.loads(report.to_json())
    assert list(content["rows"][0]) == ["model", "partition", "metric", "value", "low", "high", "tasks", "draws"]
    assert list(content["by_support_size"][0])[-1] == "support"
    assert content["rows"][-1]["low"] is None
    assert content["checkpoint"] == 120
    assert content["notes"]


def test_table_marks_the_best_and_aligns(report):
    blocks = report.table().split("\n\n")
    assert len(blocks) == 3
    head, _, names, _, *models, _, tasks = blocks[0].splitlines()
    assert "test users, existing items" in head
    assert "90%" in head
    assert "2 draws" in head
    of = {line[:12].strip(): line for line in models}
    assert "0.700 ±0.020*" in of["adapted"]
    assert "0.850*" in of["popularity"]
    assert "*" not in of["global mean"]
    assert "–" in of["popularity"]
    assert tasks.split() == ["tasks", "90", "80"]
    # Figures of a column end at the same place.
    assert of["adapted"].index("0.800") == of["global mean"].index("0.500") == of["popularity"].index("0.850")
    assert names.split() == ["MAE", "AUC"]
    assert "note: new items" in blocks[2]


def test_paired_differences_have_rows_of_their_own_and_a_line_for_the_best_baseline(report):
    paired = tuple(
        PairedRow("adapted", "new users", "MAE", value, value - 0.004, value + 0.004, 90, 2, against, 0.0312)
        for against, value in (("unadapted", -0.001), ("global mean", -0.2), ("item + user bias", -0.0071))
    )
    alone = PairedRow("adapted", "both", "MAE", 0.25, -math.inf, math.inf, 1, 2, "global mean")
    content = Report(**{**report.__dict__, "paired_rows": (*paired, alone)})
    blocks = content.table().split("\n\n")
    assert (
        blocks[0].splitlines()[-1] == "MAE of adapted − item + user bias: −0.007 ± 0.004 (paired over tasks, p = 0.031)"
    )
    assert blocks[1].splitlines()[-1] == "MAE of adapted − global mean: +0.250 (paired over tasks)"
    rows = json.loads(content.to_json())["paired"]
    assert list(rows[0]) == [*json.loads(content.to_json())["rows"][0], "against", "p"]
    assert rows[-1]["low"] is None
    assert [row["p"] for row in rows[-2:]] == [0.0312, None]
    assert "paired over tasks" not in report.table()


def test_where_all_tie_nothing_is_marked(report):
    tied = Report(**{**report.__dict__, "rows": tuple(Row(m, "both", "AUC", 0.5, 0.5, 0.5, 9, 1) for m in ("a", "b"))})
    assert "*" not in tied.table().split("\n\n")[1].split("\n", 1)[1]


def test_value_of_a_row(report):
    assert report.value("popularity", "new users", "AUC") == 0.85
    with pytest.raises(KeyError):
        report.value("popularity", "new users", "MAE")


def test_written_whole(report, tmp_path):
    urls = report.write(str(tmp_path))
    assert set(urls) == {"evaluation.json", "evaluation.txt", "evaluation.png"}
    assert (tmp_path / "evaluation.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "evaluation.txt").read_text() == report.table()


def test_a_report_without_rows_is_still_written(report, tmp_path):
    empty = Report(**{**report.__dict__, "rows": (), "by_support_size": (), "partitions": {}})
    assert empty.table().startswith("note: ")
    assert empty.plot()
