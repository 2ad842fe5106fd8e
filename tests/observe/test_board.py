"""`metatrain board`: a real TensorBoard over local and remote runs, asked over HTTP as a browser would."""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import pytest

from metatrain import storage
from metatrain.errors import ConfigError, StorageError
from metatrain.observe import board as module
from metatrain.observe.board import Boards, names_of
from metatrain.observe.copies import Copy, board_url
from metatrain.observe.tensorboard import Board
from tests.faults.processes import wait_for

pytestmark = [
    pytest.mark.timeout(120),
    # The server is built for a process of its own: it leaves its sockets to the end.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


def ask(boards: Boards, path: str, **query: str) -> Any:
    url = f"{boards.url.rstrip('/')}/data/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=20) as answer:
        return json.load(answer)


def write(run: str, *steps: int, start: int = 0) -> None:
    board = Board(run, start)
    board.layout(["meta/x"])
    board.hparams({"meta.algorithm": "maml"}, ["final/training_loss"])
    board.text("1 guide", "Look **here**.")
    board.scalars({"learning/gain": 0.0, "meta/x": 1.0}, 0) if not start else None
    for step in steps:
        board.scalars({"learning/gain": 100.0 * start + step}, step)
    board.close()


def gains(boards: Boards, run: str) -> list[tuple[int, float]]:
    points = ask(boards, "plugin/scalars/scalars", run=run, tag="learning/gain")
    return [(step, value) for _, step, value in points]


def test_runs_of_a_disk_and_of_a_store_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_COPIES", 0.2)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_READS", 1)
    local, remote = str(tmp_path / "one"), f"memory://{uuid.uuid4().hex}/two"
    # Three attempts: the second goes on from step 2, the third from step 4.
    write(local, 1, 2, 3, 4)
    write(local, 3, 4, start=2)
    write(local, 5, 6, start=4)
    write(remote, 1)
    boards = Boards([local, remote], port=0)
    try:
        assert boards.url.startswith("http://127.0.0.1:"), "this machine alone reaches it"
        wait_for(lambda: set(ask(boards, "runs")) == {"one", "two"}, 30, "both runs")
        assert wait_for(lambda: gains(boards, "one"), 30, "the curve") == [
            (0, 0.0),
            (1, 1.0),
            (2, 2.0),
            (3, 203.0),
            (4, 204.0),
            (5, 405.0),
            (6, 406.0),
        ]
        layout = ask(boards, "plugin/custom_scalars/layout")
        assert [category["title"][0] for category in layout["category"]] == ["1", "2", "3"]
        assert ask(boards, "plugin/text/tags")["one"] == ["1 guide/text_summary"]
        # What the remote run writes while it is looked at comes too.
        write(remote, 2, 3, start=1)
        wait_for(lambda: gains(boards, "two") == [(0, 0.0), (1, 1.0), (2, 102.0), (3, 103.0)], 40, "new points")
    finally:
        boards.close()


def test_a_copy_appends_what_has_grown_and_replaces_the_rest(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    events = storage.join(url, "events.out.tfevents.1.x")
    storage.write_atomic(events, b"abc")
    storage.write_atomic(storage.join(url, "items.tsv"), b"12")
    copy = Copy(url, str(tmp_path / "copy"))
    assert copy.refresh() == 5
    open_file = (tmp_path / "copy" / "events.out.tfevents.1.x").open("rb")
    assert open_file.read() == b"abc"
    storage.write_atomic(events, b"abcdef")
    storage.write_atomic(storage.join(url, "items.tsv"), b"34")  # as long as before
    copy.refresh()
    assert open_file.read() == b"def", "it grew in place: TensorBoard reads on"
    open_file.close()
    assert (tmp_path / "copy" / "items.tsv").read_bytes() == b"34"


def test_a_run_without_curves_and_a_taken_port_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no curves yet"):
        Boards([str(tmp_path / "none")])
    write(str(tmp_path / "one"), 1)
    boards = Boards([str(tmp_path / "one")], port=0)
    port = urllib.parse.urlparse(boards.url).port
    with pytest.raises(ConfigError, match="cannot listen"):
        Boards([str(tmp_path / "one")], port=port)
    boards.close()
    assert not Path(boards._folder).exists()
    assert storage.exists(board_url(str(tmp_path / "one"))), "the run's own files stay"


def test_names_tell_runs_apart() -> None:
    assert names_of(["/a/x", "s3://b/c/y/"]) == {"x": "/a/x", "y": "s3://b/c/y/"}
    assert list(names_of(["/a/x", "/b/x"])) == ["a·x", "b·x"]
    with pytest.raises(ConfigError, match="twice"):
        names_of(["/a/x", "/a/x"])
