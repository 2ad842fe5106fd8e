"""The plan of tables: every number has one place, bytes add up, and what cannot be is refused."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metatrain.config import Config, TableConfig
from metatrain.errors import ConfigError
from metatrain.model.choices import TableSpec
from metatrain.model.table_plan import TablesPlan, Workers, plan_tables

KINDS = ("row_wise", "table_wise", "column_wise", "data_parallel", "auto")


def spec(name: str, rows: int, width: int) -> TableSpec:
    return TableSpec(name, rows, width, (name,))


def settings_of(**kinds: str) -> dict[str, TableConfig]:
    return {name: TableConfig.model_validate({"sharding": kind}) for name, kind in kinds.items()}


tables = st.lists(
    st.tuples(st.integers(1, 200), st.sampled_from([4, 8, 12, 32]), st.sampled_from(KINDS)), min_size=1, max_size=5
)


@given(tables, st.integers(1, 7), st.sampled_from(["sgd", "adagrad"]))
@settings(max_examples=40, deadline=None)
def test_every_number_has_one_place(drawn: list[tuple[int, int, str]], count: int, optimizer: str) -> None:
    specs = [spec(f"t{i}", rows, width) for i, (rows, width, _) in enumerate(drawn)]
    kinds = settings_of(**{f"t{i}": kind for i, (_, _, kind) in enumerate(drawn)})
    plan = plan_tables(specs, kinds, optimizer, Workers(count, 1))
    assert [table.spec for table in plan.tables] == specs
    for table, (rows, width, kind) in zip(plan.tables, drawn, strict=True):
        assert kind in (table.sharding, "auto")
        held = np.zeros((rows, width), int)
        for block in table.blocks:
            assert 0 <= block.rank < count
            held[block.row : block.row + block.rows, block.column : block.column + block.columns] += 1
        assert (held == (count if table.sharding == "data_parallel" else 1)).all()
        if table.sharding == "row_wise":  # as a DTensor's Shard(0), which checkpoints are written by
            a_rank = -(-rows // count)
            assert [(b.rank, b.row) for b in table.blocks if b.rows] == [
                (rank, rank * a_rank) for rank in range(count) if rank * a_rank < rows
            ]
        else:
            assert len({block.rank for block in table.blocks}) == len(table.blocks)
        each = [sum(table.bytes_of(rank, optimizer)) for rank in range(count)]
        assert sum(each) == held.sum() * 4 * (2 if optimizer == "adagrad" else 1)
    assert sum(plan.host_bytes(rank) for rank in range(count)) == sum(
        sum(table.bytes_of(rank, optimizer)) for table in plan.tables for rank in range(count)
    )


def test_the_same_arguments_give_the_same_plan_and_it_pickles() -> None:
    specs = [spec("item", 100_000, 32), spec("genre", 20, 32), spec("age", 7, 4)]
    plans = [plan_tables(specs, settings_of(**{"*": "auto"}), "rowwise_adagrad", Workers(4, 2)) for _ in range(2)]
    assert plans[0].tables == plans[1].tables
    copy: TablesPlan = pickle.loads(pickle.dumps(plans[0]))
    assert copy.tables == plans[0].tables
    assert copy.text() == plans[0].text()


def test_a_tables_name_goes_before_patterns() -> None:
    specs = [spec("item", 100, 8), spec("item_tag", 100, 8), spec("age", 10, 4)]
    plan = plan_tables(specs, settings_of(**{"item*": "table_wise", "item": "data_parallel"}), "sgd", Workers(2, 2))
    assert [table.sharding for table in plan.tables] == ["data_parallel", "table_wise", "row_wise"]
    assert plan.replicated == ("item",)


def test_a_name_that_no_table_has_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean `genre`"):
        plan_tables([spec("genre", 9, 4)], settings_of(genres="table_wise"), "sgd", Workers(1, 1))


def test_tables_that_do_not_fit_are_refused_with_the_arithmetic() -> None:
    large = [spec("item", 50_000_000, 32)]
    rows = 50_000_000 * 33 * 4
    plan_tables(large, {}, "rowwise_adagrad", Workers(4, 4, memory=rows // 3))
    with pytest.raises(ConfigError, match=r"take 6\.15 GiB; 4 worker\(s\) have 1\.02 GiB each"):
        plan_tables(large, {}, "rowwise_adagrad", Workers(4, 4, memory=rows // 6))
    with pytest.raises(ConfigError, match="by rows"):
        plan_tables(large, settings_of(item="table_wise"), "rowwise_adagrad", Workers(4, 4, memory=rows // 3))


def test_the_planner_replicates_what_is_small_and_shards_what_is_not() -> None:
    specs = [spec("item", 5_000_000, 32), spec("genre", 20, 32)]
    chosen = plan_tables(
        specs,
        settings_of(**{"*": "auto"}),
        "rowwise_adagrad",
        Workers(4, 4, memory=400 << 20),
        tasks=512,
        ids_a_task={"item": 30, "genre": 60},
    )
    assert chosen.tables[0].sharding == "row_wise"
    assert max(chosen.host_bytes(rank) for rank in range(4)) < 400 << 20


@pytest.mark.parametrize(("kernel", "host", "device"), [("fused_uvm", 1.0, 0.0), ("fused_uvm_caching", 1.0, 0.25)])
def test_kernels_for_gpus_are_planned(kernel: str, host: float, device: float) -> None:
    config = TableConfig.model_validate({"kernel": kernel, "cache": 0.25})
    workers = Workers(2, 2, device="cuda", device_memory=1 << 30)
    plan = plan_tables([spec("item", 1000, 32)], {"item": config}, "sgd", workers)
    parameter = plan.sharding["width_32"]["item"]
    assert parameter.compute_kernel == kernel
    assert (parameter.cache_params is not None) == (kernel == "fused_uvm_caching")
    whole = 1000 * 32 * 4 // 2
    assert (plan.host_bytes(0), plan.device_bytes(0)) == (host * whole, device * whole)


def test_planning_leaves_the_log_alone() -> None:
    root = logging.getLogger()
    handlers, disabled = list(root.handlers), root.manager.disable
    plan_tables([spec("a", 9, 4)], settings_of(a="data_parallel"), "sgd", Workers(2, 2))
    assert (root.handlers, root.manager.disable) == (handlers, disabled)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"tables": {"item": {"kernel": "fused_uvm"}}}}, "set train.gpus"),
        ({"model": {"tables": {"item": {"sharding": "column_wise"}}}}, "rowwise_adagrad"),
        ({"model": {"tables": {"a": {"sharding": "data_parallel", "kernel": "fused_uvm"}}}}, "data_parallel"),
        ({"model": {"tables": {"item": {"sharding": "rows"}}}}, "row_wise"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Config.model_validate(changes)
