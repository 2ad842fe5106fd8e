"""What a run holds is counted before it starts; what cannot fit is refused with the arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from metatrain.config import Config
from metatrain.data.manifest import Manifest, Split
from metatrain.data.schema import Feature, Kind, LabelKind, Level, Schema
from metatrain.errors import ConfigError
from metatrain.model.table_plan import Workers
from metatrain.train.footprint import READER_PROCESS, WORKER_PROCESS, check_fits, footprint, room_for_tables
from metatrain.train.session import check_memory

ROWS, WIDTH = 50_000_000, 32
GIB = 1 << 30


def manifest(rows: int = ROWS) -> Manifest:
    """Of a dataset whose shards nobody reads."""
    features = (
        Feature(name="item", level=Level.ITEM, kind=Kind.CATEGORICAL, table="item", rows=rows, width=WIDTH),
        Feature(name="age", level=Level.TASK, kind=Kind.CATEGORICAL, table="age", rows=10, width=4),
    )
    schema = Schema(
        features=features, label=LabelKind.RATING, label_mean=3, label_deviation=1, label_min=1, label_max=5
    )
    shard = {"path": "train/0.parquet", "split": Split.TRAIN, "row_groups": (1000,), "events": 20_000, "bytes": 1}
    return Manifest.model_validate(
        {
            "version": 1, "name": "made up", "schema_": schema, "shards": ({**shard, "sha256": "0" * 64},),
            "items": 1000, "new_items": 0,
            "tasks": {Split.TRAIN: 1000}, "events": {Split.TRAIN: 20_000}, "skipped": {}, "catalogue_sha256": "0" * 64,
            "vocabularies_sha256": {}, "prepared_with": {},
        }
    )  # fmt: skip


def config(**train: Any) -> Config:
    return Config.model_validate({"data": {"lanes": 8}, "train": {"workers": 4, **train}})


@pytest.mark.parametrize(("optimizer", "state"), [("sgd", 0), ("rowwise_adagrad", 4), ("adagrad", 4 * WIDTH)])
def test_the_parts_add_up(optimizer: str, state: int) -> None:
    counted = footprint(config(optimizer={"table": optimizer}), manifest(), Workers(4, 4))
    parts = {part.name: part for part in counted.worker}
    rows = ROWS // 4 * WIDTH * 4
    small = 10 // 4 + 1  # rows of the other table on the first worker
    assert parts["tables"].bytes == rows + small * 4 * 4
    assert parts["tables"].how == "item 50,000,000 × 32 × 4 B / 4, age 10 × 4 × 4 B / 4"
    of_small = {"sgd": 0, "rowwise_adagrad": 4, "adagrad": 16}[optimizer]
    assert parts["tables' optimizer"].bytes == ROWS // 4 * state + small * of_small
    assert parts["checkpoint copy"].bytes == parts["tables"].bytes + parts["tables' optimizer"].bytes
    sure = sum(part.bytes for part in counted.worker if part.surely)
    assert sure == counted.bytes(surely=True) - READER_PROCESS - 1000 * 13
    assert counted.bytes() > counted.bytes(surely=True) + ((1024 + 512) << 20)  # inner loop and prefetch
    assert "50,000,000 × 32 × 4 B / 4" in counted.text()


def test_a_run_that_cannot_fit_is_refused_with_the_arithmetic() -> None:
    counted = footprint(config(), manifest(), Workers(4, 4))
    check_fits(counted, 24 * GIB, 4, "this machine")
    with pytest.raises(ConfigError) as refused:
        check_fits(counted, 12 * GIB, 4, "this machine")
    assert "4 worker(s) on it need 14." in str(refused.value)
    assert "it has 12 GiB" in str(refused.value)
    assert "item 50,000,000 × 32 × 4 B / 4" in str(refused.value)


def node(memory: float, cpu: float, alive: bool = True) -> dict[str, Any]:
    resources = {"CPU": cpu, "memory": 0.7 * memory, "object_store_memory": 0.3 * memory}
    return {"Alive": alive, "Resources": resources}


def refused(monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, Any]]) -> bool:
    class Dataset:
        manifest = manifest()

    monkeypatch.setattr("metatrain.train.session.TaskDataset.open", lambda url: Dataset)
    try:
        check_memory(config(), nodes)
    except ConfigError as error:
        said = str(error)
    else:
        return False
    return "cannot fit into the memory of the cluster's nodes" in said


def test_a_cluster_is_refused_where_it_has_cpus_but_no_memory_for_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not refused(monkeypatch, [node(4 * GIB, 2) for _ in range(4)])
    assert refused(monkeypatch, [node(3 * GIB, 2) for _ in range(4)])
    assert refused(monkeypatch, [node(8 * GIB, 8)])  # four workers by CPUs, two by memory
    assert not refused(monkeypatch, [node(8 * GIB, 4)])  # others may be on their way
    assert not refused(monkeypatch, [node(8 * GIB, 8), node(8 * GIB, 8)])
    assert refused(monkeypatch, [node(8 * GIB, 8), node(8 * GIB, 8, alive=False)])
    assert not refused(monkeypatch, [])


def test_tables_get_what_a_nodes_share_leaves() -> None:
    beside = WORKER_PROCESS + READER_PROCESS
    assert room_for_tables(config(), 8 * GIB, 2) == (4 * GIB - beside) // 2
    assert room_for_tables(config(), beside, 2) == 0
