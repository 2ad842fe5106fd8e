"""`compare`: trains and scores what a comparison names, and publishes its leaderboard."""

from __future__ import annotations

import logging

from metatrain import storage
from metatrain.compare.entries import Comparison
from metatrain.compare.leaderboard import JSON_FILE, MARKDOWN_FILE, PLOT_FILE, TABLE_FILE, Leaderboard
from metatrain.compare.plot import plot
from metatrain.compare.runs import Runs
from metatrain.compare.tables import markdown, text
from metatrain.data.dataset import TaskDataset
from metatrain.evaluate.protocols import Judge

log = logging.getLogger("metatrain")


def compare(comparison: Comparison, out: str, *, address: str | None = None, report: bool = False) -> Leaderboard:
    """Compares; the same call again goes on where it stopped.

    Args:
        comparison: From `entries.read_comparison`.
        out: Folder of the runs, their scores, and the leaderboard's files.
        address: Of a Ray cluster. Default: a local Ray that ends with the call.
        report: Whether the leaderboard is made of what is trained already, and nothing is prepared or trained.

    Raises:
        MetatrainError: The dataset cannot be prepared or read. What a single run meets is in the leaderboard.
    """
    runs = list(Runs(comparison, out, address, report).results())
    judge = Judge(TaskDataset.open(comparison.dataset).schema, comparison.evaluate)
    board = Leaderboard.of(comparison, judge, runs)
    log.info("wrote %s", ", ".join(write(board, storage.absolute(out)).values()))
    return board


def write(board: Leaderboard, out: str) -> dict[str, str]:
    """Publishes a leaderboard's files in a folder; returns their URLs by name."""
    contents = {JSON_FILE: board.to_json(), TABLE_FILE: text(board), MARKDOWN_FILE: markdown(board)}
    urls = {name: storage.join(out, name) for name in (*contents, PLOT_FILE)}
    for name, content in contents.items():
        storage.write_atomic(urls[name], content)
    storage.write_atomic(urls[PLOT_FILE], plot(board))
    return urls
