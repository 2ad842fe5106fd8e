"""A run's board: one folder across restarts without doubled steps, as TensorBoard reads it; on an object store too."""

from __future__ import annotations

import re
import uuid
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util import tensor_util

from metatrain import storage
from metatrain.observe import copies
from metatrain.observe.copies import board_url
from metatrain.observe.layout import FINAL, support_names
from metatrain.observe.tensorboard import FURTHER, Board, write_evaluation


def read(folder: str) -> EventAccumulator:
    """The folder as TensorBoard's own reader sees it."""
    events = EventAccumulator(folder, size_guidance={"tensors": 0})
    events.Reload()
    return events


def curve(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, tensor_util.make_ndarray(event.tensor_proto).item()) for event in events.Tensors(tag)]


def test_a_killed_attempt_leaves_no_doubled_step(tmp_path: Path) -> None:
    run = str(tmp_path)
    killed = Board(run, 0)
    for step in (1, 2, 3, 4):
        killed.scalars({"learning/gain": float(step), "final/training_loss": 1.0}, step)
    killed.flush()  # and never closed
    [file] = Path(board_url(run)).iterdir()
    file.write_bytes(file.read_bytes()[:-7])  # a kill may leave half a record

    resumed = Board(run, 2)
    assert (killed.restarts, resumed.restarts) == (0, 1)
    resumed.scalars({"learning/gain": 30.0}, 3)
    resumed.close()
    events = read(board_url(run))
    assert curve(events, "learning/gain") == [(1, 1.0), (2, 2.0), (3, 30.0)]
    # What the former attempt alone wrote beyond the checkpoint is gone too.
    assert curve(events, "final/training_loss") == [(1, 1.0), (2, 1.0)]


def test_settings_and_final_metrics_are_of_the_run_itself(tmp_path: Path) -> None:
    board = Board(str(tmp_path), 0)
    board.hparams({"meta.algorithm": "maml", "train.optimizer.rate": 0.01}, FINAL)
    board.scalars({FINAL[0]: 0.5}, 10)
    board.ended()
    board.close()
    assert [path for path in Path(board_url(str(tmp_path))).iterdir() if path.is_dir()] == []
    events = read(board_url(str(tmp_path)))
    content = events.PluginTagToContent("hparams")
    parsed = {tag: HParamsPluginData.FromString(raw) for tag, raw in content.items()}
    started = parsed["_hparams_/session_start_info"].session_start_info
    assert started.hparams["meta.algorithm"].string_value == "maml"
    assert parsed["_hparams_/session_end_info"].session_end_info.status == 1  # success
    shown = [metric.name.tag for metric in parsed["_hparams_/experiment"].experiment.metric_infos]
    assert shown == list(FINAL)
    assert set(shown) & set(events.Tags()["tensors"]) == {FINAL[0]}


def test_an_evaluation_adds_to_the_run_and_replaces_an_earlier_one(tmp_path: Path) -> None:
    run = f"memory://board-{uuid.uuid4().hex}"
    for url in (str(tmp_path), run):
        board = Board(url, 0)
        board.hparams({"meta.algorithm": "maml"}, (*FINAL, "final/MAE, new users"))
        board.scalars({FINAL[0]: 0.5}, 10)
        board.close()
        write_evaluation(url, {"final/MAE, new users": 0.9, "final/MAE, both": 0.8}, 8)
        write_evaluation(url, {"final/MAE, new users": 0.7}, 10)
        assert Board(url, 10).restarts == 1, "an evaluation is no attempt to train"
    folder = tmp_path / "copied"
    copies.Copy(board_url(run), str(folder)).refresh()
    for place in (board_url(str(tmp_path)), str(folder)):
        events = read(place)
        assert curve(events, "final/MAE, new users") == [(10, pytest.approx(0.7))]
        assert curve(events, FINAL[0]) == [(10, 0.5)]
        assert "final/MAE, both" not in events.Tags()["tensors"]


def test_the_layout_reaches_tensorboard(tmp_path: Path) -> None:
    board = Board(str(tmp_path), 0)
    board.layout(["meta/ridge strength"])
    board.close()
    [event] = read(board_url(str(tmp_path))).Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title[0] for category in layout.category] == ["1", "2", "3"]
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert charts["what the method learned"] == ["meta/"]
    assert "learned inner rates" not in charts, "it would be empty"
    assert all(re.compile(tag) for tags in charts.values() for tag in tags)


def test_names_of_support_sizes_sort_by_size() -> None:
    assert support_names() == tuple(sorted(support_names()))
    assert support_names()[:3] == ("00", "01-02", "03-05")


@pytest.fixture
def store() -> str:
    """A store that cannot append, and is not a disk."""
    return f"memory://{uuid.uuid4().hex}"


def mirrored(url: str, folder: Path) -> str:
    fs, path = storage.filesystem(url)
    fs.get(path, str(folder), recursive=True)
    return str(folder)


def test_files_grow_on_a_store_that_cannot_append(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "SECONDS_BETWEEN_ROUNDS", 0.0)
    board = Board(store, 0, bytes_a_file=2000)
    for step in range(1, 101):
        board.scalars({"learning/gain": float(step)}, step)
        board.flush()
    board.file("items.tsv", "1\t2\n")
    board.close()
    assert not Path(board._folder).exists()
    names = storage.list_folder(board_url(store))
    assert sum(name.endswith(FURTHER) for name in names) > 1, "one file would be put there whole each time"
    assert "items.tsv" in names
    assert [step for step, _ in curve(read(mirrored(board_url(store), tmp_path / "m")), "learning/gain")] == [
        *range(1, 101)
    ]
    assert Board(store, 100).restarts == 1


def test_a_store_that_fails_ends_no_training_and_loses_no_curve(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(copies, "SECONDS_BETWEEN_ROUNDS", 0.0)
    broken = [True]
    put = storage.write_atomic

    def fails(url: str, data: bytes) -> None:
        if broken[0]:
            raise OSError("the store is away")
        put(url, data)

    monkeypatch.setattr(storage, "write_atomic", fails)
    board = Board(store, 0)
    board.scalars({"learning/gain": 1.0}, 1)
    board.flush()
    broken[0] = False
    board.close()
    assert curve(read(mirrored(board_url(store), tmp_path / "m")), "learning/gain") == [(1, 1.0)]

    broken[0] = True
    lost = Board(store, 1)
    lost.scalars({"learning/gain": 2.0}, 2)
    lost.close()
    assert "the store is away" in caplog.text
    assert lost._folder in caplog.text, "the log says where the curves are"
    assert curve(read(lost._folder), "learning/gain") == [(2, 2.0)]
