"""Preparation from end to end on Ray: contents, splits, invariance to held-out users, reuse, errors."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from metatrain import storage
from metatrain.config import FeatureSource, ItemSplit, PrepareConfig, Synthetic, UserSplit
from metatrain.data import prepare_pieces
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import Manifest, Split
from metatrain.data.prepare import _partitions, _prepare, prepare, summary
from metatrain.data.prepare_output import origin_of
from metatrain.data.prepare_ray import Here, RayTasks
from metatrain.data.schema import Level
from metatrain.data.sources import read_source
from metatrain.data.verify import verify
from metatrain.errors import ConfigError, DatasetError, SourceError

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(300)]
assert ray  # marks the module as one that uses Ray
FEATURES = (
    FeatureSource(name="device", level="event", kind="categorical", width=4),
    FeatureSource(name="length", level="event", kind="numeric"),
    FeatureSource(name="city", level="task", kind="categorical", width=4),
    FeatureSource(name="age", level="task", kind="numeric"),
    FeatureSource(name="genre", level="item", kind="categorical", width=4),
    FeatureSource(name="price", level="item", kind="numeric"),
)


class Log:
    """A small log on disk, with tables of users and items and a given split of both."""

    def __init__(self, folder: Path, users: int = 30, items: int = 12) -> None:
        draw = random.Random(3)
        self.folder = folder
        self.split = {f"u{i}": ("train", "validation", "test")[i % 3] for i in range(users)}
        self.events = [
            {
                "user_id": f"u{u}", "item_id": f"i{draw.randrange(items)}", "label": float(draw.randrange(1, 6)),
                "timestamp": draw.randrange(1000, 1030), "device": draw.choice(["tv", "phone"]),
                "length": draw.random(),
            }
            for u in range(users) for _ in range(6 + u % 4)
        ]  # fmt: skip
        draw.shuffle(self.events)
        self.users = [
            {"user_id": u, "city": draw.choice(["x", "y"]), "age": draw.randrange(20, 60)} for u in self.split
        ]
        self.items = [
            {"item_id": f"i{i}", "title": f"T{i}", "genre": draw.choice("gh"), "price": float(i), "made": i}
            for i in range(items)
        ]

    def config(self, **settings: Any) -> PrepareConfig:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("events", "users", "items"):
            pq.write_table(
                pa.Table.from_pylist(getattr(self, name)), self.folder / f"{name}.parquet", row_group_size=40
            )
        (self.folder / "split.csv").write_text("key,split\n" + "".join(f"{k},{v}\n" for k, v in self.split.items()))
        paths = {name: str(self.folder / f"{name}.parquet") for name in ("users", "items")}
        given = UserSplit(by="given", file=str(self.folder / "split.csv"))
        base = {
            "source": "events",
            "path": str(self.folder / "events.parquet"),
            "features": FEATURES,
            "user_split": given,
        }
        return PrepareConfig(
            **(base | paths | {"item_split": ItemSplit(by="time", column="made", after=8), "shards": 1} | settings)
        )


def rows(url: str, split: Split) -> dict[str, dict[str, Any]]:
    dataset = TaskDataset.open(url)
    tables = [pq.read_table(Path(url) / shard.path) for shard in dataset.manifest.of(split)]
    return {row["key"]: row for table in tables for row in table.to_pylist()}


@pytest.mark.parametrize("shards", [1, 3])
def test_a_dataset_holds_the_log_and_nothing_else(tmp_path: Path, shards: int):
    log = Log(tmp_path / "log")
    url = str(tmp_path / "out")
    manifest = prepare(log.config(shards=shards, row_group_tasks=4), url, progress=False)
    dataset = TaskDataset.open(url)
    catalogue = dataset.catalogue
    devices, cities = [None, *dataset.vocabulary("device")], [None, *dataset.vocabulary("city")]
    length = next(f for f in dataset.schema.features if f.name == "length")
    seen = set()
    for split in Split:
        found = rows(url, split)
        assert not seen & set(found)
        seen |= set(found)
        assert set(found) == {u for u, s in log.split.items() if s == split.value}
        for key, row in found.items():
            own = [e for e in log.events if e["user_id"] == key]
            own.sort(key=lambda e: e["timestamp"])  # stable, as ties must be
            assert [catalogue.keys[i] for i in row["items"]] == [e["item_id"] for e in own]
            assert row["labels"] == [e["label"] for e in own]
            assert row["timestamps"] == [e["timestamp"] for e in own]
            assert [devices[i] for i in row["event:device"]] == [e["device"] for e in own]
            np.testing.assert_allclose(
                np.array(row["event:length"]) * length.deviation + length.mean, [e["length"] for e in own], rtol=1e-5
            )
            assert cities[row["task:city"]] == next(u["city"] for u in log.users if u["user_id"] == key)
    assert seen == set(log.split)
    assert sum(manifest.events.values()) == len(log.events)
    assert manifest.skipped == {}
    for shard in manifest.shards:
        data = (tmp_path / "out" / shard.path).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
        file = pq.ParquetFile(tmp_path / "out" / shard.path)
        assert tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)) == shard.row_groups
        assert max(shard.row_groups) <= 4
    assert not (tmp_path / "out" / "staging").exists()
    # The catalogue: new items are without an id of their own, and without training events.
    assert catalogue.keys.tolist() == [i["item_id"] for i in log.items]
    assert catalogue.titles.tolist() == [i["title"] for i in log.items]
    assert catalogue.new.tolist() == [i["made"] > 8 for i in log.items]
    training = {u for u, s in log.split.items() if s == "train"}
    wanted = [
        0 if i["made"] > 8 else sum(e["item_id"] == i["item_id"] and e["user_id"] in training for e in log.events)
        for i in log.items
    ]
    assert catalogue.training_events.tolist() == wanted
    own = [None, *dataset.vocabulary("item")]
    assert [own[i] for i in catalogue.features["item"]] == [
        i["item_id"] if n else None for i, n in zip(log.items, wanted, strict=True)
    ]
    assert "left out    nothing" in summary(manifest)


def test_statistics_and_vocabularies_know_training_users_alone(tmp_path: Path):
    log = Log(tmp_path / "a")
    before = prepare(log.config(), str(tmp_path / "out-a"), progress=False)
    changed = Log(tmp_path / "b")
    for i, event in enumerate(changed.events):
        made = int(event["item_id"][1:])
        if changed.split[event["user_id"]] != "train":
            changed.events[i] = event | {
                "label": 99.0,
                "device": "watch",
                "length": 1e6,
                "item_id": f"i{(made + 5) % 8}",
            }
        elif made > 8:  # new items: held out of training with all their events
            changed.events[i] = event | {"label": 77.0, "device": "radio", "length": -1e6}
    for user in changed.users:
        if changed.split[user["user_id"]] != "train":
            user |= {"city": "z", "age": 1000}
    for item in changed.items:
        if item["made"] > 8:
            item |= {"genre": "other", "price": 1e9}
    after = prepare(changed.config(), str(tmp_path / "out-b"), progress=False)
    assert after.schema_ == before.schema_
    a, b = TaskDataset.open(str(tmp_path / "out-a")), TaskDataset.open(str(tmp_path / "out-b"))
    for table in ("item", "device", "city", "genre"):
        assert a.vocabulary(table) == b.vocabulary(table)
    np.testing.assert_array_equal(a.catalogue.training_events, b.catalogue.training_events)
    assert before.schema_.label_max == 5
    # And the change did reach the dataset.
    assert any(99.0 in row["labels"] for row in rows(str(tmp_path / "out-b"), Split.TEST).values())


def test_a_table_of_items_needs_no_titles(tmp_path: Path):
    log = Log(tmp_path / "log")
    log.items = [{name: value for name, value in item.items() if name != "title"} for item in log.items]
    prepare(log.config(), str(tmp_path / "out"), progress=False)
    catalogue = pq.read_table(tmp_path / "out" / "catalogue.parquet")
    assert catalogue["title"].null_count == len(catalogue) == 12


def test_users_that_a_given_split_does_not_name_are_counted(tmp_path: Path):
    log = Log(tmp_path / "log")
    gone = [log.split.popitem()[0] for _ in range(4)]
    manifest = prepare(log.config(), str(tmp_path / "out"), progress=False)
    assert manifest.skipped == {"users that the given split does not name": 4}
    assert sum(manifest.tasks.values()) == 26
    assert not set(gone) & set(itertools.chain(*(rows(str(tmp_path / "out"), s) for s in Split)))


@pytest.mark.parametrize("users", [UserSplit(), UserSplit(by="time"), UserSplit(by="given", column="city")])
def test_other_splits(tmp_path: Path, users: UserSplit):
    log = Log(tmp_path / "log", users=60)
    for u in log.users:
        u["city"] = "train" if u["city"] == "x" else "test"
    manifest = prepare(
        log.config(user_split=users, item_split=ItemSplit(by="time", new=0.3)), str(tmp_path / "out"), progress=False
    )
    assert sum(manifest.tasks.values()) == 60
    assert manifest.tasks[Split.TEST] > 0
    assert 0 < manifest.new_items <= 4
    first = {k: min(r["timestamps"]) for s in Split for k, r in rows(str(tmp_path / "out"), s).items()}
    if users.by == "time":
        trained = [first[k] for k in rows(str(tmp_path / "out"), Split.TRAIN)]
        assert max(trained) < min(first[k] for k in rows(str(tmp_path / "out"), Split.TEST))


def test_the_same_again_is_left_and_another_is_refused_unless_told(tmp_path: Path):
    log, url = Log(tmp_path / "log"), str(tmp_path / "out")
    config = log.config()
    first = prepare(config, url, progress=False)
    written = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert prepare(config, url, progress=False) == first
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == written
    other = config.model_copy(update={"min_events": 8})
    with pytest.raises(DatasetError, match="another dataset") as error:
        prepare(other, url, progress=False)
    assert error.value.got == "prepare.min_events: 5 there, 8 wanted"
    log.events.append(log.events[0] | {"timestamp": 5000})
    with pytest.raises(DatasetError, match="another dataset") as error:
        prepare(log.config(), url, progress=False)
    assert error.value.got == "other source files (events)"
    few = prepare(other, url, progress=False, overwrite=True)
    assert few.skipped["users with fewer than 8 events"] == sum(6 + u % 4 < 8 for u in range(1, 30))
    assert TaskDataset.open(url).manifest == few


def test_a_folder_of_something_else_is_never_touched(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(DatasetError, match="not a dataset"):
            prepare(Log(tmp_path / "log").config(), str(tmp_path / "out"), progress=False, overwrite=overwrite)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


def test_what_an_interrupted_preparation_left_is_cleared(tmp_path: Path):
    (tmp_path / "out" / "staging").mkdir(parents=True)
    (tmp_path / "out" / "staging" / "00000.tasks.arrow").write_bytes(b"part")
    (tmp_path / "out" / "shards" / "train").mkdir(parents=True)
    (tmp_path / "out" / "shards" / "train" / "00007.parquet").write_bytes(b"part")
    for part in ("shards/train/00008.parquet", "catalogue.parquet", "manifest.json"):
        # What `storage.write_atomic` leaves when it is killed.
        (tmp_path / "out" / f"{part}.{'0a' * 16}.tmp").write_bytes(b"part")
    config = Log(tmp_path / "log").config()
    manifest = prepare(config, str(tmp_path / "out"), progress=False)
    assert files(tmp_path / "out") == files_of(manifest)
    # The same of one that was to replace a dataset.
    (tmp_path / "out" / "staging" / "new" / "shards").mkdir(parents=True)
    (tmp_path / "out" / f"manifest.json.{'0a' * 16}.tmp").write_bytes(b"part")
    assert prepare(config, str(tmp_path / "out"), progress=False) == manifest
    manifest = prepare(config, str(tmp_path / "out"), progress=False, overwrite=True)
    assert files(tmp_path / "out") == files_of(manifest)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def files_of(manifest: Manifest) -> set[str]:
    vocabularies = {f"vocabularies/{table}.parquet" for table in manifest.vocabularies_sha256}
    return {shard.path for shard in manifest.shards} | vocabularies | {"catalogue.parquet", "manifest.json"}


def test_a_preparation_that_fails_leaves_the_dataset_it_was_to_replace(tmp_path: Path):
    log, out = Log(tmp_path / "log"), tmp_path / "out"
    before = prepare(log.config(shards=2), str(out), progress=False)
    content = {name: (out / name).read_bytes() for name in files(out)}
    log.split = dict.fromkeys(log.split, "test")  # found out after the shuffle
    with pytest.raises(SourceError, match="No training user"):
        prepare(log.config(), str(out), progress=False, overwrite=True)
    assert {name: (out / name).read_bytes() for name in files(out)} == content
    dataset = TaskDataset.open(str(out))
    assert dataset.manifest == before
    assert verify(str(out)).whole
    assert len(dataset.catalogue) == before.items
    # And when it goes well nothing of the old one stays: here shards of a second partition.
    after = prepare(Log(tmp_path / "log").config(), str(out), progress=False, overwrite=True)
    assert files(out) == files_of(after)
    assert len(after.shards) < len(before.shards)
    assert verify(str(out)).whole


@pytest.mark.parametrize("shards", [1, 3])
def test_the_same_input_gives_the_same_dataset_wherever_and_whenever(tmp_path: Path, shards: int):
    urls = [str(tmp_path / "out-a"), str(tmp_path / "out-b")]
    configs = [Log(tmp_path / name).config(shards=shards) for name in ("a", "elsewhere/b")]
    for path in (tmp_path / "elsewhere" / "b").iterdir():
        os.utime(path, (1, 1))
    first, second = (prepare(c, url, progress=False) for c, url in zip(configs, urls, strict=True))
    assert first.prepared_with != second.prepared_with
    assert TaskDataset.open(urls[0]).fingerprint == TaskDataset.open(urls[1]).fingerprint
    for name in files_of(first) - {"manifest.json"}:
        assert (tmp_path / "out-a" / name).read_bytes() == (tmp_path / "out-b" / name).read_bytes()
    # So either is there already where the other is wanted, whichever release made it and whenever its files came.
    manifest = first.model_copy(update={"prepared_with": first.prepared_with | {"metatrain": "0.0.1"}})
    manifest.write(urls[0])
    assert prepare(configs[1], urls[0], progress=False) == manifest


@pytest.mark.parametrize("role", ["user_split", "item_split", "users", "items"])
def test_a_change_in_any_table_makes_another_dataset(tmp_path: Path, role: str):
    log, url = Log(tmp_path / "log"), str(tmp_path / "out")
    new = tmp_path / "new.csv"
    new.write_text("key,split\ni1,new\n")
    by_file = ItemSplit(by="given", file=str(new))
    prepare(log.config(item_split=by_file), url, progress=False)
    if role == "user_split":
        log.split["u0"], log.split["u1"] = log.split["u1"], log.split["u0"]
    elif role == "item_split":
        new.write_text("key,split\ni2,new\n")
    else:
        getattr(log, role)[0] |= {"age": 61} if role == "users" else {"genre": "f"}
    with pytest.raises(DatasetError, match="another dataset") as error:
        prepare(log.config(item_split=by_file), url, progress=False)
    assert error.value.got == f"other source files ({role})"


def test_preparing_joins_no_cluster_that_it_was_not_told_to():
    code = """
from metatrain.data.prepare_ray import workers
import ray
with workers(progress=False):
    print(ray.get_runtime_context().gcs_address)
"""
    # Nobody listens there: joining would fail.
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "127.0.0.1:9\n" not in done.stdout


@pytest.mark.parametrize("shards", [1, 2])
def test_an_error_in_a_task_comes_out_as_it_was_raised(tmp_path: Path, shards: int):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,label,timestamp\na,b,1,2\na,b,nan,2\n")
    with pytest.raises(SourceError) as error:
        prepare(PrepareConfig(source="events", path=str(path), shards=shards), str(tmp_path / "out"), progress=False)
    assert type(error.value) is SourceError
    assert error.value.where == f"{path}: line 3, column label"
    assert not (tmp_path / "out" / "manifest.json").exists()
    path.write_text("user_id,item_id,label,timestamp\n" + "a,b,1,2\n" * 6 + "a,b,nan,2\n")
    train = UserSplit(validation=0, test=0)
    config = PrepareConfig(source="events", path=str(path), shards=shards, skip_bad_rows=True, user_split=train)
    assert prepare(config, str(tmp_path / "out"), progress=False).skipped == {"bad rows": 1}


def test_logs_that_teach_nothing_are_refused(tmp_path: Path):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,label,timestamp\n")
    with pytest.raises(SourceError, match="empty"):
        prepare(PrepareConfig(source="events", path=str(path)), str(tmp_path / "out"), progress=False)
    log = Log(tmp_path / "log")
    log.split = dict.fromkeys(log.split, "test")
    with pytest.raises(SourceError, match="No training user"):
        prepare(log.config(), str(tmp_path / "out2"), progress=False)
    a = FeatureSource(name="genre", level="item", kind="categorical", width=4, table="t")
    b = FeatureSource(name="city", level="task", kind="categorical", width=8, table="t")
    with pytest.raises(ConfigError, match="one hash bucket"):
        prepare(log.config(features=(a.model_copy(update={"buckets": 1}),)), str(tmp_path / "out3"), progress=False)
    with pytest.raises(ConfigError, match="table 't' differ"):
        prepare(Log(tmp_path / "log3").config(features=(a, b)), str(tmp_path / "out3"), progress=False)


def test_a_synthetic_dataset_is_the_same_whatever_its_shards(tmp_path: Path):
    manifests = []
    for n, per_shard in enumerate((200, 70)):
        s = Synthetic(users=200, items=60, events_per_user=12, users_per_shard=per_shard)
        manifests.append(
            prepare(PrepareConfig(source="synthetic", synthetic=s), str(tmp_path / str(n)), progress=False)
        )
    assert manifests[0].shards == manifests[1].shards
    assert manifests[0].catalogue_sha256 == manifests[1].catalogue_sha256
    assert manifests[0].facts["bayes_rmse"] == 0.5
    assert json.loads(manifests[0].model_dump_json())["prepared_with"]["config"]["synthetic"]["users"] == 200
    assert {f.level for f in manifests[0].schema_.features} == {Level.ITEM, Level.TASK}


@pytest.mark.parametrize("shards", [1, 3])
def test_this_process_makes_the_same_dataset_as_ray_tasks(tmp_path: Path, shards: int):
    urls = [tmp_path / "here", tmp_path / "ray"]
    config = Log(tmp_path / "log").config(shards=shards)
    raw = read_source(config)
    manifests = [
        _prepare(pool, config, str(url), raw, origin_of(config, raw))
        for pool, url in zip((Here(), RayTasks(bars=False)), urls, strict=True)
    ]
    assert manifests[0] == manifests[1]
    assert files(urls[0]) == files(urls[1]) == files_of(manifests[0])
    for name in files_of(manifests[0]):
        assert (urls[0] / name).read_bytes() == (urls[1] / name).read_bytes()


def test_an_object_store_gets_the_same_dataset_as_a_disk(tmp_path: Path):
    config, disk, store = Log(tmp_path / "log").config(shards=3), str(tmp_path / "out"), "memory://prepared/out"
    raw = read_source(config)
    manifest = _prepare(Here(), config, disk, raw, origin_of(config, raw))
    assert _prepare(Here(), config, store, raw, origin_of(config, raw)) == manifest
    for name in files_of(manifest):
        assert storage.read_bytes(storage.join(store, name)) == (tmp_path / "out" / name).read_bytes()
    assert "staging" not in storage.list_folder(store)


def test_a_small_log_starts_no_ray(tmp_path: Path):
    code = f"""
from metatrain.config import PrepareConfig, Synthetic
from metatrain.data.prepare import prepare
import ray
ray.init = None
manifest = prepare(PrepareConfig(source="synthetic", synthetic=Synthetic(users=50)), {str(tmp_path / "out")!r})
print(sum(manifest.tasks.values()), ray.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "50 False\n"


def test_a_user_with_a_hundred_times_as_many_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prepare_pieces, "RUN_ROWS", 200)  # a run holds far fewer rows than the user has
    log = Log(tmp_path / "log")
    usual = len(log.events)
    heavy = [log.events[0] | {"user_id": "u1", "timestamp": 2000 + i, "item_id": f"i{i % 12}"} for i in range(3000)]
    own = sum(e["user_id"] == "u1" for e in log.events)
    log.events += heavy
    random.Random(5).shuffle(log.events)
    config = log.config(max_events=100, shards=3)
    raw = read_source(config)
    manifest = _prepare(Here(), config, str(tmp_path / "out"), raw, origin_of(config, raw))
    assert manifest.skipped == {"oldest events beyond 100 of a user": own + 3000 - 100}
    assert sum(manifest.events.values()) == usual - own + 100
    kept = rows(str(tmp_path / "out"), Split(log.split["u1"]))["u1"]
    assert kept["timestamps"] == [2000 + i for i in range(2900, 3000)]
    keys = TaskDataset.open(str(tmp_path / "out")).catalogue.keys
    assert [keys[i] for i in kept["items"]] == [f"i{i % 12}" for i in range(2900, 3000)]


@pytest.mark.parametrize("events", [1, 2_000_000, 2_000_001, 30_000_000, 10**9])
def test_no_shard_is_small_however_large_the_log(events: int):
    partitions = _partitions(events)
    assert partitions == 1 or 500_000 < events / partitions <= 1_000_000


def test_a_task_whose_worker_dies_is_run_again(tmp_path: Path):
    died = tmp_path / "died"

    def once(number: int) -> int:
        if number == 2 and not died.exists():
            died.touch()
            os._exit(1)
        return number * 2

    assert sorted(RayTasks(bars=False).map("", range(5), once)) == [0, 2, 4, 6, 8]
    assert died.exists()


@pytest.mark.parametrize("shards", [1, 3])
def test_collisions_of_hashed_values_are_estimated_from_training_users_and_shown(tmp_path: Path, shards: int):
    log = Log(tmp_path / "log", users=300)
    for user in log.users:
        user["city"] = f"city of {user['user_id']}"
    city = FeatureSource(name="city", level="task", kind="categorical", width=4, buckets=51)
    manifest = prepare(log.config(features=(city,), shards=shards), str(tmp_path / "out"), progress=False)
    found = manifest.facts["hashed"]["city"]
    assert (found["values"], found["buckets"]) == (pytest.approx(100, abs=4), 50)
    assert 0.8 < found["sharing"] < 0.95  # 100 values in 50 buckets: all but e⁻² of them
    assert f"about {found['values']:,} values in 50 buckets" in summary(manifest)
