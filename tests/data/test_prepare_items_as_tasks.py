"""`prepare.task: item`: the dataset holds exactly the transposed log, split by item, whatever the users."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metatrain.config import Columns, FeatureSource, ItemSplit, PrepareConfig, UserSplit
from metatrain.data.dataset import TaskDataset
from metatrain.data.hashing import hash_text, unit
from metatrain.data.manifest import FILE, Manifest, Split, read_manifest
from metatrain.data.prepare import prepare, summary
from metatrain.data.schema import Level
from metatrain.errors import DatasetError, SourceError

FEATURES = (
    FeatureSource(name="city", level="task", kind="categorical", width=4),
    FeatureSource(name="age", level="task", kind="numeric"),
    FeatureSource(name="genres", level="item", kind="multi", width=4),
    FeatureSource(name="price", level="item", kind="numeric"),
    FeatureSource(name="device", level="event", kind="categorical", width=4),
)
OTHER_SIDE = {"task": "item", "item": "task", "event": "event"}

# (user, item, label, time, device): few of each, so that times tie and users come back.
events = st.lists(
    st.tuples(
        st.integers(0, 5), st.integers(0, 7), st.integers(1, 5), st.integers(100, 104), st.sampled_from(["tv", "web"])
    ),
    min_size=1,
    max_size=60,
)


def write(folder: Path, log: list[tuple]) -> dict[str, Any]:
    """A log with tables of users and items as Parquet; its settings. One item has no row in its table, one no title."""
    user, item, label, time, device = (list(column) for column in zip(*log, strict=True))
    tables = {
        "events": pa.table(
            {
                "user_id": [f"u{u}" for u in user], "item_id": [f"i{i}" for i in item],
                "label": [float(x) for x in label],
                "timestamp": time, "device": device,
            }
        ),
        "users": pa.table({"user_id": [f"u{u}" for u in range(6)], "city": list("xyxyxx"), "age": list(range(20, 26))}),
        "items": pa.table(
            {
                "item_id": [f"i{i}" for i in range(7)], "title": [None, *(f"Film {i}" for i in range(1, 7))],
                "genres": [["g", "h"][: i % 3] for i in range(7)], "price": [float(i) for i in range(7)],
                "fold": ["train", "test", "validation", "train", "train", "test", "train"],
            }
        ),
    }  # fmt: skip
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet")
    paths = {name: str(folder / f"{name}.parquet") for name in ("users", "items")}
    return {"source": "events", "path": str(folder / "events.parquet"), "features": FEATURES, "min_events": 1} | paths


def films(url: str) -> dict[str, dict[str, Any]]:
    """Every task's row, with its split."""
    manifest = read_manifest(url)
    return {
        row["key"]: row | {"split": shard.split}
        for shard in manifest.shards
        for row in pq.read_table(Path(url) / shard.path).to_pylist()
    }


@contextmanager
def temporary() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def everything_is_trained() -> dict[str, Any]:
    return {"task": "item", "user_split": UserSplit(validation=0, test=0)}


@settings(deadline=None, max_examples=12)
@given(log=events)
def test_a_dataset_of_items_holds_the_transposed_log_and_nothing_else(log: list[tuple]):
    with temporary() as folder:
        base, url = write(folder, log), str(folder / "out")
        manifest = prepare(PrepareConfig(**base | everything_is_trained()), url, progress=False)
        dataset = TaskDataset.open(url)
        assert (manifest.task, manifest.catalogued) == ("item", "user")
        users, found = dataset.catalogue.keys, films(url)
        devices, genres = [None, *dataset.vocabulary("device")], [None, *dataset.vocabulary("genres")]
        price = next(f for f in dataset.schema.features if f.name == "price")
        assert set(found) == {f"i{i}" for _, i, *_ in log}
        for key, row in found.items():
            own = sorted((e for e in log if f"i{e[1]}" == key), key=lambda e: e[3])  # stable, as ties must be
            assert [users[r] for r in row["items"]] == [f"u{u}" for u, *_ in own]
            assert row["labels"] == [e[2] for e in own]
            assert row["timestamps"] == [e[3] for e in own]
            assert [devices[d] for d in row["event:device"]] == [e[4] for e in own]
            number = int(key[1:])
            assert row["title"] == (f"Film {number}" if 1 <= number < 7 else None)
            assert [genres[g] for g in row["task:genres"]] == (["g", "h"][: number % 3] if number < 7 else [])
            if number < 7:
                assert row["task:price"] * price.deviation + price.mean == pytest.approx(number, abs=1e-4)
        # The catalogue is the users' table: features at level item, no title, events of each counted.
        assert users.tolist() == [f"u{u}" for u in range(6)]
        assert dataset.catalogue.titles.tolist() == [None] * 6
        cities = [None, *dataset.vocabulary("city")]
        counts = np.bincount([u for u, *_ in log], minlength=6)
        assert dataset.catalogue.training_events.tolist() == counts.tolist()
        shown = [cities[c] for c in dataset.catalogue.features["city"]]
        known = {"xyxyxx"[u] for u, *_ in log}  # a city that only users without events have teaches nothing
        assert shown == [city if city in known else None for city in "xyxyxx"]
        levels = {f.name: f.level.value for f in dataset.schema.features if f.name != "item"}
        assert levels == {f.name: OTHER_SIDE[f.level] for f in FEATURES}


@settings(deadline=None, max_examples=10)
@given(log=events)
def test_it_is_the_dataset_of_users_of_the_log_written_the_other_way_round(log: list[tuple]):
    with temporary() as folder:
        base = write(folder, log)
        swapped = base | {
            "columns": Columns(task="item_id", item="user_id"),
            "users": base["items"],
            "items": base["users"],
            "features": tuple(f.model_copy(update={"level": OTHER_SIDE[f.level]}) for f in FEATURES),
        }
        pq.write_table(
            pq.read_table(base["users"]).append_column("title", pa.nulls(6, pa.string())), str(base["users"])
        )
        every = {"user_split": UserSplit(validation=0.2, test=0.3), "item_split": ItemSplit(by="hash", new=0.3)}
        try:
            one = prepare(PrepareConfig(**base | every, task="item"), str(folder / "one"), progress=False)
        except SourceError:  # no training item has an event on an existing user: the same, told in both words
            with pytest.raises(SourceError, match="No training user"):
                prepare(PrepareConfig(**swapped | every), str(folder / "two"), progress=False)
            return
        two = prepare(PrepareConfig(**swapped | every), str(folder / "two"), progress=False)
        assert one.schema_ == two.schema_
        assert one.tasks == two.tasks
        assert (one.catalogue_sha256, one.vocabularies_sha256) == (two.catalogue_sha256, two.vocabularies_sha256)
        others = films(str(folder / "two"))
        assert {
            k: {n: v for n, v in row.items() if n != "title"} for k, row in films(str(folder / "one")).items()
        } == others


@settings(deadline=None, max_examples=10)
@given(log=events, data=st.data())
def test_an_items_split_depends_on_its_key_alone(log: list[tuple], data: st.DataObject):
    split = UserSplit(validation=0.25, test=0.25, salt="s")
    part = data.draw(st.lists(st.sampled_from(log), min_size=1, max_size=len(log)))
    for some in (log, part):
        with temporary() as folder:
            try:
                config = PrepareConfig(**write(folder, some), task="item", user_split=split)
                prepare(config, str(folder / "out"), progress=False)
            except SourceError:
                continue  # no training item in this draw
            for key, row in films(str(folder / "out")).items():
                u = unit(hash_text(pa.array([key]), "s"))[0]
                assert row["split"] == ("test" if u < 0.25 else "validation" if u < 0.5 else "train")


@settings(deadline=None, max_examples=10)
@given(log=events)
def test_by_time_the_items_whose_first_event_is_latest_are_tested(log: list[tuple]):
    with temporary() as folder:
        config = PrepareConfig(
            **write(folder, log), task="item", user_split=UserSplit(by="time", validation=0.2, test=0.3)
        )
        prepare(config, str(folder / "out"), progress=False)
        found = films(str(folder / "out"))
        first = {s: [r["timestamps"][0] for r in found.values() if r["split"] == s] for s in ("train", "test")}
        assert first["train"]
        assert len(first["test"]) <= 0.3 * len(found)
        assert all(t > max(first["train"]) for t in first["test"])


LOG = [(u, i, 1 + (3 * u + i) % 5, 100 + 7 * u + i, "tv") for u in range(6) for i in range(7)]


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    return write(tmp_path, LOG)


def given_by(tmp_path: Path, by: str) -> UserSplit:
    if by == "column":
        return UserSplit(by="given", column="fold")
    folds = pq.read_table(tmp_path / "items.parquet").to_pylist()
    (tmp_path / "split.csv").write_text("key,split\n" + "".join(f"{r['item_id']},{r['fold']}\n" for r in folds))
    return UserSplit(by="given", file=str(tmp_path / "split.csv"))


@pytest.mark.parametrize("by", ["column", "file"])
def test_a_given_split_is_that_of_the_items(tmp_path: Path, base: dict[str, Any], by: str):
    prepare(
        PrepareConfig(**base, task="item", user_split=given_by(tmp_path, by)), str(tmp_path / "out"), progress=False
    )
    folds = {r["item_id"]: r["fold"] for r in pq.read_table(tmp_path / "items.parquet").to_pylist()}
    assert {key: row["split"].value for key, row in films(str(tmp_path / "out")).items()} == folds


def test_statistics_and_vocabularies_are_of_training_items_alone(tmp_path: Path, base: dict[str, Any]):
    """What is said of held-out items, and of them by users, changes nothing: not the labels' moments, not a word."""
    split = {"task": "item", "user_split": UserSplit(by="given", column="fold")}
    before = prepare(PrepareConfig(**base | split), str(tmp_path / "before"), progress=False)
    held = {r["item_id"] for r in pq.read_table(base["items"]).to_pylist() if r["fold"] != "train"}
    changed = pq.read_table(base["path"]).to_pylist()
    for row in changed:
        if row["item_id"] in held:
            row |= {"label": 50.0, "device": "fridge"}
    pq.write_table(pa.Table.from_pylist([*changed, changed[0] | {"user_id": "u9", "item_id": "i1"}]), base["path"])
    items = pq.read_table(base["items"]).to_pylist()
    for row in items:
        if row["item_id"] in held:
            row |= {"price": 1e6, "genres": ["western"]}
    pq.write_table(pa.Table.from_pylist(items), base["items"])
    after = prepare(PrepareConfig(**base | split), str(tmp_path / "after"), progress=False)
    assert after.schema_ == before.schema_
    assert after.vocabularies_sha256 == before.vocabularies_sha256
    taught = [e[2] for e in LOG if f"i{e[1]}" not in held]
    assert after.schema_.label_mean == pytest.approx(np.mean(taught))
    assert after.schema_.label_max == 5
    price = next(f for f in after.schema_.features if f.name == "price")
    assert price.mean == pytest.approx(np.mean([0, 3, 4, 6]))
    assert TaskDataset.open(str(tmp_path / "after")).catalogue.keys.tolist()[-1] == "u9"  # known, and never trained
    # Were the words not of training items alone, this would fail: a training item says something else.
    trained = [
        row | {"label": 4.5} if row["item_id"] == "i0" else row for row in pq.read_table(base["path"]).to_pylist()
    ]
    pq.write_table(pa.Table.from_pylist(trained), base["path"])
    assert prepare(PrepareConfig(**base | split), str(tmp_path / "other"), progress=False).schema_ != before.schema_


def test_the_item_split_splits_the_users(tmp_path: Path, base: dict[str, Any]):
    prepare(
        PrepareConfig(**base, task="item", item_split=ItemSplit(by="time", column="age", after=23)),
        str(tmp_path / "out"),
        progress=False,
    )
    catalogue = TaskDataset.open(str(tmp_path / "out")).catalogue
    assert catalogue.new.tolist() == [False] * 4 + [True] * 2
    assert catalogue.training_events.tolist()[4:] == [0, 0]
    assert min(catalogue.training_events.tolist()[:4]) > 0
    with pytest.raises(SourceError, match="A column is missing: colour"):
        prepare(
            PrepareConfig(**base, task="item", item_split=ItemSplit(by="given", column="colour")),
            str(tmp_path / "wrong"),
            progress=False,
        )


def test_what_is_left_out_is_told_in_the_right_words(tmp_path: Path, base: dict[str, Any]):
    manifest = prepare(
        PrepareConfig(**base | {"max_events": 4} | everything_is_trained()),
        str(tmp_path / "out"),
        progress=False,
    )
    assert manifest.skipped == {"oldest events beyond 4 of an item": 14}
    text = summary(manifest)
    assert "6 users, 0 of them new" in text
    assert "7 items" in text
    with pytest.raises(SourceError, match="no item has enough events"):
        prepare(PrepareConfig(**base | {"min_events": 7, "task": "item"}), str(tmp_path / "none"), progress=False)
    twice = pq.read_table(base["users"])
    pq.write_table(pa.concat_tables([twice, twice.slice(2, 1)]), base["users"])
    with pytest.raises(SourceError, match="A user has two rows") as error:
        prepare(PrepareConfig(**base, task="item"), str(tmp_path / "twice"), progress=False)
    assert (error.value.where, error.value.got) == (base["users"], "u2")


@pytest.mark.parametrize("task", ["user", "item"])
def test_bad_rows_of_either_sides_table_are_counted(tmp_path: Path, base: dict[str, Any], task: str):
    for name, key in (("users", "user_id"), ("items", "item_id")):
        table = pq.read_table(base[name])
        rows = [*table.to_pylist(), {**table.to_pylist()[0], key: None}]
        pq.write_table(pa.Table.from_pylist(rows, table.schema), base[name])
    config = PrepareConfig(**base, task=task, skip_bad_rows=True)
    assert prepare(config, str(tmp_path / "out"), progress=False).skipped["bad rows"] == 2


def test_datasets_of_before_are_of_users(tmp_path: Path, base: dict[str, Any]):
    """A manifest that doesn't say what a task is, and a configuration that couldn't."""
    url = str(tmp_path / "out")
    prepare(PrepareConfig(**base), url, progress=False)
    content = json.loads((tmp_path / "out" / FILE).read_text())
    del content["task"], content["prepared_with"]["config"]["task"]
    (tmp_path / "out" / FILE).write_text(json.dumps(content))
    old = read_manifest(url)
    assert (old.task, old.catalogued) == ("user", "item")
    assert prepare(PrepareConfig(**base), url, progress=False) == old  # nothing to do
    with pytest.raises(DatasetError, match="another dataset") as error:
        prepare(PrepareConfig(**base, task="item"), url, progress=False)
    assert "prepare.task" in str(error.value.got)
    assert isinstance(old, Manifest)


def test_movielens_keeps_its_titles_with_the_tasks(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "ml.zip", "w") as archive:
        archive.writestr(
            "ml-1m/ratings.dat",
            "".join(f"{u}::{i}::{1 + (u * i) % 5}::{1000 + u}\n" for u in range(1, 9) for i in (1, 2)),
        )
        archive.writestr(
            "ml-1m/movies.dat", "1::Toy Story (1995)::Animation|Comedy\n2::Heat (1995)::Crime\n3::Unseen (1999)::War\n"
        )
        archive.writestr("ml-1m/users.dat", "".join(f"{u}::F::25::3::12345\n" for u in range(1, 9)))
    config = PrepareConfig(source="movielens-1m", path=str(tmp_path / "ml.zip"), **everything_is_trained())
    manifest = prepare(config, str(tmp_path / "out"), progress=False)
    assert {key: row["title"] for key, row in films(str(tmp_path / "out")).items()} == {
        "1": "Toy Story (1995)",
        "2": "Heat (1995)",
    }
    assert manifest.skipped == {"rows of the item table without events": 1}
    levels = {f.name: f.level for f in manifest.schema_.features}
    assert (levels["genres"], levels["gender"], levels["item"]) == (Level.TASK, Level.ITEM, Level.ITEM)
    assert sum(manifest.tasks.values()) == manifest.tasks[Split.TRAIN] == 2


def test_a_log_without_tables_still_has_both_sides(tmp_path: Path):
    rows = io.StringIO()
    csv.writer(rows).writerows(
        [("user_id", "item_id", "label", "timestamp"), *((u, i, 3, u) for u in range(6) for i in (1, 2))]
    )
    (tmp_path / "log.csv").write_text(rows.getvalue())
    config = PrepareConfig(source="events", path=str(tmp_path / "log.csv"), **everything_is_trained())
    prepare(config, str(tmp_path / "out"), progress=False)
    found = films(str(tmp_path / "out"))
    assert {key: (row["title"], len(row["items"])) for key, row in found.items()} == {"1": (None, 6), "2": (None, 6)}
    assert sorted(TaskDataset.open(str(tmp_path / "out")).catalogue.keys) == [str(u) for u in range(6)]
