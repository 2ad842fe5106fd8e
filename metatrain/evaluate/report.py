"""The evaluation's report: `evaluation.json`, a table for the terminal, and `evaluation.png`, in the run's folder.

`evaluation.json` holds `dataset`, `run`, `checkpoint` (its step), `configuration` (of the evaluation), `facts`,
`notes`, `rows`, `by_support_size` and `paired`. A row is `{model, partition, metric, value, low, high, tasks, draws}`;
a row of `by_support_size` has `support` besides. A row of `paired` has `against` and `p`: the mean over tasks of the
model's metric minus that of the model `against` on the same task, whose interval is far narrower than either model's
own where both find the same tasks hard, and the two-sided p-value of a paired t-test over tasks. `low`, `high` and `p`
are null where one task alone gives none. `Report.paired` compares any two models of the table.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from metatrain import storage
from metatrain.evaluate.metrics import Difference
from metatrain.evaluate.task_values import TaskValues

ADAPTED, UNADAPTED = "adapted", "unadapted"
JSON_FILE, PLOT_FILE, TABLE_FILE = "evaluation.json", "evaluation.png", "evaluation.txt"
#: Metrics of which less is better.
ERRORS = ("MAE", "RMSE")


@dataclass(frozen=True)
class Row:
    """One figure: a model's metric on a partition, with its interval over tasks."""

    model: str
    partition: str
    metric: str
    value: float
    low: float
    high: float
    tasks: int
    draws: int


@dataclass(frozen=True)
class SizeRow(Row):
    """The same with no more than the newest `support` events of each task's support."""

    support: int


@dataclass(frozen=True)
class PairedRow(Row):
    """The mean over tasks of a model's metric minus that of the model `against`, and the p-value of "no difference"."""

    against: str
    p: float = math.nan


@dataclass(frozen=True)
class Report:
    """All of an evaluation."""

    dataset: str
    run: str
    checkpoint: int
    configuration: dict[str, Any]
    rows: tuple[Row, ...]
    by_support_size: tuple[SizeRow, ...]
    #: Partition → what it is made of, in words, in the order of the table.
    partitions: dict[str, str]
    notes: tuple[str, ...] = ()
    #: The adapted model against each other one, by the headline metrics.
    paired_rows: tuple[PairedRow, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    #: Partition → what its rows are means of. In memory alone.
    task_values: Mapping[str, TaskValues] = field(default_factory=dict, repr=False, compare=False)

    def paired(self, model: str, against: str, partition: str, metric: str) -> Difference:
        """The metric of `model` minus that of `against`, by a paired t-test over the tasks that both have; of RMSE the
        difference of the mean squares.

        Raises:
            KeyError: No such partition, model or metric.
        """
        confidence = self.configuration.get("confidence", 0.95)
        return self.task_values[partition].paired(model, against, metric, confidence)

    def value(self, model: str, partition: str, metric: str) -> float:
        """One figure of `rows`; KeyError where there is none."""
        for row in self.rows:
            if (row.model, row.partition, row.metric) == (model, partition, metric):
                return row.value
        raise KeyError((model, partition, metric))

    def to_json(self) -> str:
        """What `evaluation.json` holds."""
        content = {
            "dataset": self.dataset,
            "run": self.run,
            "checkpoint": self.checkpoint,
            "configuration": self.configuration,
            "facts": self.facts,
            "notes": list(self.notes),
            "rows": [finite(asdict(row)) for row in self.rows],
            "by_support_size": [finite(asdict(row)) for row in self.by_support_size],
            "paired": [finite(asdict(row)) for row in self.paired_rows],
        }
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)

    def table(self) -> str:
        """A block a partition, in plain text; the best value of a column is marked."""
        blocks = [self._block(name, words) for name, words in self.partitions.items()]
        notes = [f"note: {note}" for note in self.notes]
        return "\n\n".join([*blocks, "\n".join(notes)] if notes else blocks) + "\n"

    def plot(self) -> bytes:
        """The PNG: error by model on the first partition, and by support size."""
        return _plot(self)

    def write(self, run_url: str) -> dict[str, str]:
        """Publishes all three files in a run's folder; returns their URLs by name."""
        contents = {JSON_FILE: self.to_json(), TABLE_FILE: self.table(), PLOT_FILE: self.plot()}
        urls = {name: storage.join(run_url, name) for name in contents}
        for name, content in contents.items():
            storage.write_atomic(urls[name], content)
        return urls

    def _block(self, partition: str, words: str) -> str:
        rows = [row for row in self.rows if row.partition == partition]
        models, metrics = list(dict.fromkeys(r.model for r in rows)), list(dict.fromkeys(r.metric for r in rows))
        cells = {(r.model, r.metric): r for r in rows}
        level = f"{self.configuration.get('confidence', 0.95):.0%}"
        draws = rows[0].draws if rows else 1
        head = f"{partition} ({words}): {max((r.tasks for r in rows), default=0):,} tasks"
        head += f", {draws} draws" if draws > 1 else ""
        head += f"; ± is half the {level} interval over tasks, * the best" if rows else ""
        # The interval stands beside the first metric alone: a table of ten columns of them is not read.
        columns = [
            [
                metric.replace("hit rate", "hit"),
                *(_cell(cells, models, m, metric, metric == metrics[0]) for m in models),
            ]
            for metric in metrics
        ]
        counts = [max((r.tasks for r in rows if r.metric == metric), default=0) for metric in metrics]
        for column, count in zip(columns, counts, strict=True):
            column.append(f"{count:,} ")
        names = ["", *models, "tasks"]
        width = max(len(n) for n in names)
        lines = [name.ljust(width) for name in names]
        for column in columns:
            # The mark's place is kept free in every cell, so that figures stand under one another.
            column[0] += " "
            wide = max(len(c) for c in column)
            lines = [f"{line}  {cell.rjust(wide)}" for line, cell in zip(lines, column, strict=True)]
        rule = "-" * max(len(line) for line in lines)
        whole = [head, rule, lines[0].rstrip(), rule, *(s.rstrip() for s in lines[1:-1]), rule, lines[-1].rstrip()]
        return "\n".join([*whole, *self._against_the_best(partition)])

    def _against_the_best(self, partition: str) -> list[str]:
        """A line: how far the adapted model is from the best baseline, task by task; none where nothing is paired."""
        rows = [row for row in self.paired_rows if row.partition == partition and row.against != UNADAPTED]
        if not rows:
            return []
        rows = [row for row in rows if row.metric == rows[0].metric]
        # From the best baseline the adapted model gains least.
        least = max if rows[0].metric in ERRORS else min
        row = least(rows, key=lambda r: r.value)
        half = (row.high - row.low) / 2
        around = f" ± {half:.3f}" if math.isfinite(half) else ""
        value = f"{row.value:+.3f}".replace("-", "−")
        p = "" if math.isnan(row.p) else f", p = {row.p:.2g}"
        return [f"{row.metric} of {row.model} − {row.against}: {value}{around} (paired over tasks{p})"]


def _cell(cells: dict[tuple[str, str], Row], models: list[str], model: str, metric: str, interval: bool) -> str:
    row = cells.get((model, metric))
    if row is None:
        return "– "
    values = [cells[m, metric].value for m in models if (m, metric) in cells]
    best = min(values) if metric in ERRORS else max(values)
    # A mark on every row would say nothing: where all models tie there is no best.
    mark = "*" if math.isclose(row.value, best, rel_tol=1e-9) and max(values) - min(values) > 1e-9 else " "
    half = (row.high - row.low) / 2
    around = f" ±{half:.3f}" if interval and math.isfinite(half) else ""
    return f"{row.value:.3f}{around}{mark}"


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """A row for JSON, which has no infinities: null in their place."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}


# --- plot ------------------------------------------------------------------------------------------------------------

_BLUE, _SKY, _GREYS = (
    "#1f5fa8",
    "#8fb8de",
    ("#333333", "#d1762b", "#3d8f5f", "#8a5aa8", "#b04a4a", "#777777", "#a0a000"),
)


def _plot(report: Report) -> bytes:
    # The figure is made without pyplot: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 5.0), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.05])
    metric = report.rows[0].metric if report.rows else "MAE"
    partition = report.rows[0].partition if report.rows else ""
    rows = [r for r in report.rows if r.metric == metric and r.partition == partition]
    styles = _styles([r.model for r in report.rows])
    better = "lower is better" if metric in ERRORS else "higher is better"
    for place, row in enumerate(reversed(rows)):
        colour, *_ = styles[row.model]
        spread = [[row.value - row.low], [row.high - row.value]] if math.isfinite(row.low) else None
        left.errorbar([row.value], [place], xerr=spread, fmt="o", color=colour, capsize=3, markersize=6, linewidth=1.6)
        left.annotate(
            f"{row.value:.3f}", (row.value, place), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8
        )
    left.set_yticks(range(len(rows)), [r.model for r in reversed(rows)])
    left.set_ylim(-0.6, len(rows) - 0.3)
    left.set_xlabel(f"{metric} ({better})")
    tasks = max((r.tasks for r in rows), default=0)
    level = f"{report.configuration.get('confidence', 0.95):.0%}"
    left.set_title(f"{partition}: {tasks:,} tasks, {level} intervals over tasks", fontsize=10, loc="left")

    curve = [r for r in report.by_support_size if r.partition == partition]
    # Equal steps for unequal sizes (0, 1, 2, 5, 10, 20): most of the gain lies in the first few events.
    sizes = sorted({r.support for r in curve})
    for model in dict.fromkeys(r.model for r in curve):
        points = sorted((sizes.index(r.support), r.value, r.low, r.high) for r in curve if r.model == model)
        colour, line, width, marker = styles[model]
        x = [p[0] for p in points]
        right.plot(
            x, [p[1] for p in points], line, color=colour, linewidth=width, marker=marker, markersize=4, label=model
        )
        if model == ADAPTED and all(math.isfinite(p[2]) for p in points):
            right.fill_between(x, [p[2] for p in points], [p[3] for p in points], color=colour, alpha=0.15, linewidth=0)
    right.set_xticks(range(len(sizes)), [str(s) for s in sizes])
    right.set_xlabel("support events, at most")
    right.set_ylabel(f"{curve[0].metric if curve else metric} ({better})")
    right.set_title(f"{partition}: by support size", fontsize=10, loc="left")
    if curve:
        right.legend(fontsize=8, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.46, -0.14))
    for axes in (left, right):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report.dataset} · run {report.run} · step {report.checkpoint:,}", fontsize=11, x=0.01, ha="left")
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _styles(models: list[str]) -> dict[str, tuple[str, str, float, str]]:
    """Colour, line, width and marker of each model: the adapted model stands out, its unadapted self beside it."""
    others = [m for m in dict.fromkeys(models) if m not in (ADAPTED, UNADAPTED)]
    styles = {m: (_GREYS[n % len(_GREYS)], "--", 1.2, "") for n, m in enumerate(others)}
    return {ADAPTED: (_BLUE, "-", 2.6, "o"), UNADAPTED: (_SKY, "-", 1.8, "")} | styles
