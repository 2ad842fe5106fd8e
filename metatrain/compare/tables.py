"""The leaderboard as text for a terminal, and as Markdown. Best rows come first, by the headline metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from metatrain.compare.leaderboard import LEAST_P, PLOT_FILE, BoardRow, Leaderboard
from metatrain.evaluate.report import ERRORS

#: What counts relevant events at a cut-off stays in the JSON file: a table of fifteen columns is not read.
_LEFT_OUT = ("hit rate", "recall")


def text(board: Leaderboard) -> str:
    """A block a partition, then what has no figures and why, then notes."""
    blocks = []
    for partition in board.partitions:
        head, table = _table(board, partition)
        widths = [max(len(line[n]) for line in table) for n in range(len(table[0]))]
        lines = [
            "  ".join(c.ljust(w) if n == 0 else c.rjust(w) for n, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in table
        ]
        rule = "-" * max(map(len, lines))
        blocks.append("\n".join([head, rule, lines[0].rstrip(), rule, *(line.rstrip() for line in lines[1:])]))
    if missing := _missing(board):
        blocks.append("\n".join(missing))
    if board.notes:
        blocks.append("\n".join(f"note: {note}" for note in board.notes))
    return "\n\n".join(blocks or ["nothing was compared"]) + "\n"


def markdown(board: Leaderboard) -> str:
    """The same as a page, with the plot."""
    blocks = [f"# {board.name}"]
    if board.partitions:
        blocks.append(f"![{board.judge.curve_metric} by support size, a line a method]({PLOT_FILE})")
    for partition in board.partitions:
        head, table = _table(board, partition)
        title, _, words = head.partition(": ")
        rule = "|" + "|".join([" --- ", *[" ---: "] * (len(table[0]) - 1)]) + "|"
        rows = ["| " + " | ".join(cell.strip().replace("*", "\\*") for cell in line) + " |" for line in table]
        blocks.append(f"## {title}\n\n{words}\n\n" + "\n".join([rows[0], rule, *rows[1:]]))
    if missing := _missing(board):
        blocks.append("## Not in the tables\n\n" + "\n".join(f"- {line}" for line in missing))
    if board.notes:
        blocks.append("## Notes\n\n" + "\n".join(f"- {note}" for note in board.notes))
    return "\n\n".join(blocks) + "\n"


def _table(board: Leaderboard, partition: str) -> tuple[str, list[list[str]]]:
    """The head line and the cells, column names first."""
    rows = [row for row in board.rows if row.partition == partition]
    metrics = [m for m in dict.fromkeys(r.metric for r in rows) if not m.startswith(_LEFT_OUT)]
    cells = {(r.model, r.metric): r for r in rows}
    main = board.judge.curve_metric
    sign = 1 if main in ERRORS else -1

    def place(model: str) -> float:
        return sign * cells[model, main].value if (model, main) in cells else math.inf

    models = sorted(dict.fromkeys(r.model for r in rows), key=place)
    level = f"{board.evaluate.confidence:.0%}"
    tasks, draws = max(r.tasks for r in rows), rows[0].draws
    head = f"{partition}: {board.partitions[partition]}, {tasks:,} tasks" + (f", {draws} draws" if draws > 1 else "")
    head += f"; ± is half the {level} interval over tasks, * the best, ≈ not distinguishable from it (p ≥ {LEAST_P:g})"
    columns: list[tuple[str, Callable[[str], str]]] = [("", lambda model: model)]
    columns += [(f"{metric} ", _figures(cells, metric, interval=metric == main)) for metric in metrics]
    of_model = {r.model: r for r in rows}
    if any(len(r.seeds) > 1 for r in rows):
        columns.append(("seeds", lambda m: str(len(of_model[m].seeds) or "")))
        columns.append((f"{main} over seeds", lambda m: _spread(cells.get((m, main)))))
    columns.append(("train s", lambda m: _seconds(of_model[m])))
    return head, [[name for name, _ in columns], *([cell(model) for _, cell in columns] for model in models)]


def _figures(cells: dict[tuple[str, str], BoardRow], metric: str, interval: bool) -> Callable[[str], str]:
    def cell(model: str) -> str:
        row = cells.get((model, metric))
        if row is None:
            return "– "
        half = (row.high - row.low) / 2
        around = f" ±{half:.3f}" if interval and math.isfinite(half) else ""
        return f"{row.value:.3f}{around}{'*' if row.best else ' ' if row.distinguishable else '≈'}"

    return cell


def _spread(row: BoardRow | None) -> str:
    return "" if row is None or math.isnan(row.seed_deviation) else f"σ {row.seed_deviation:.4f}"


def _seconds(row: BoardRow) -> str:
    # An unadapted model is the same training.
    return "" if row.train_seconds is None else f"{row.train_seconds:,.0f}"


def _missing(board: Leaderboard) -> Sequence[str]:
    """A line a run without figures: it failed, or the budget was spent."""
    return [
        f"{run.entry.name} (seed {run.seed}): {run.status}" + (f": {_one_line(run.why)}" if run.why else "")
        for run in board.missing
    ]


def _one_line(words: str) -> str:
    return " — ".join(line.strip() for line in words.splitlines() if line.strip())
