"""The leaderboard's picture: error (or AUC, for clicks) by support size, a panel a partition, a line a method."""

from __future__ import annotations

import io
import math

from metatrain.compare.leaderboard import Leaderboard
from metatrain.evaluate.report import ERRORS

#: Told apart also by those who confuse red and green; with more methods than colours, markers and dashes go on.
_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8a5aa8",
    "#000000",
    "#a0a000",
    "#8c564b",
)
_MARKERS, _DASHES = "osD^vPX*<>", ("-", "-.", ":")
_GREYS = ("#9a9a9a", "#c0c0c0", "#6e6e6e")


def plot(board: Leaderboard) -> bytes:
    """The PNG. Without any curve it says so."""
    # The figure is made without pyplot: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    partitions = list(board.partitions) or [""]
    metric = board.judge.curve_metric
    entries = list(board.scored)
    figure = Figure(figsize=(max(7.0, 5.2 * len(partitions)), 6.2), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(partitions), squeeze=False)[0]
    styles = _styles(entries, [row.model for row in board.by_support_size])
    for axes, partition in zip(panels, partitions, strict=True):
        rows = [r for r in board.by_support_size if r.partition == partition and r.model in styles]
        # Equal steps for unequal sizes: most of the gain lies in the first few events.
        sizes = sorted({row.support for row in rows})
        for model, (colour, dash, width, marker, order) in styles.items():
            points = sorted((sizes.index(r.support), r.value, r.low, r.high) for r in rows if r.model == model)
            if not points:
                continue
            x, y, low, high = zip(*points, strict=True)
            axes.plot(x, y, dash, color=colour, lw=width, marker=marker, ms=5, label=model, zorder=order)
            if len(entries) == 1 and model in entries and all(map(math.isfinite, low)):
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_xlabel("support events, at most")
        axes.set_ylabel(f"{metric} ({'lower' if metric in ERRORS else 'higher'} is better)")
        axes.set_title(partition or "nothing was measured", fontsize=10, loc="left")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), fontsize=8, frameon=False)
    figure.suptitle(f"{board.name}: {metric} by support size", fontsize=11, x=0.01, ha="left")
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _styles(entries: list[str], models: list[str]) -> dict[str, tuple[str, str, float, str, int]]:
    """Colour, dash, width, marker and order of drawing: methods in colour, baselines grey behind them. Unadapted
    models have no line: they read no support."""
    own = {
        name: (
            _COLOURS[n % len(_COLOURS)],
            _DASHES[n // len(_COLOURS) % len(_DASHES)],
            2.0,
            _MARKERS[n % len(_MARKERS)],
            3,
        )
        for n, name in enumerate(entries)
    }
    unadapted = {model for model in models for name in entries if model == f"{name}, unadapted"}
    others = [m for m in dict.fromkeys(models) if m not in own and m not in unadapted]
    return own | {
        m: (_GREYS[n % len(_GREYS)], ("--", ":", "-.")[n // len(_GREYS) % 3], 1.2, "", 2) for n, m in enumerate(others)
    }
