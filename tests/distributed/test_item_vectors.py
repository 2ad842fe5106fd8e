"""Items for the projector: the most frequent ones, as the base learner represents them, the same at any world size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metatrain.config import Config
from metatrain.data.dataset import TaskDataset
from metatrain.model.build import build_model
from metatrain.model.sharding import distribute
from metatrain.observe import projector
from metatrain.train.item_vectors import item_vectors
from tests.data.tiny_dataset import write_tiny_dataset
from tests.distributed.ranks import run_ranks
from tests.train.runs import recipe

CPU = torch.device("cpu")


def made(folder: Path, **sections: Any) -> Config:
    write_tiny_dataset(str(folder / "dataset"), new_items=6)
    return recipe(str(folder / "dataset"), str(folder), "run", **sections)


def on_rank(rank: int, world_size: int, config: Config) -> Any:
    dataset = TaskDataset.open(config.data.dataset)
    model = build_model(dataset.schema, config, tables_device="meta")
    distributed = distribute(model, config.train.optimizer)
    return item_vectors(distributed.model, dataset, CPU, rank, most=20)


def test_two_ranks_give_what_one_process_gives(tmp_path: Path) -> None:
    config = made(tmp_path)
    dataset = TaskDataset.open(config.data.dataset)
    vectors, known = item_vectors(build_model(dataset.schema, config), dataset, CPU, 0, most=20)
    (sharded, sharded_known), (nothing, _) = run_ranks(on_rank, 2, config)
    np.testing.assert_allclose(sharded, vectors, atol=1e-6)
    assert sharded_known == known
    assert len(nothing) == 0
    assert len(vectors) == 20
    assert len(np.unique(vectors, axis=0)) > 10, "items differ"


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"learner": "factorisation"}, "meta": {"algorithm": "ridge"}},
        {"model": {"hidden": [8]}, "meta": {"steps": 1, "adapt_rows": ["genres", "likes"]}},
        {"model": {"hidden": [8], "features": ["price", "zip"]}, "meta": {"steps": 1}},
    ],
    ids=["factorisation", "adapted rows", "numeric alone"],
)
def test_the_most_frequent_items_come_first_with_what_is_known_of_them(
    tmp_path: Path, sections: dict[str, Any]
) -> None:
    config = made(tmp_path, **sections)
    dataset = TaskDataset.open(config.data.dataset)
    model = build_model(dataset.schema, config)
    vectors, known = item_vectors(model, dataset, CPU, 0)
    catalogue = dataset.catalogue
    trained = {key for key, n in zip(catalogue.keys, catalogue.training_events, strict=True) if n > 0}
    assert set(known["key"]) == trained, "an item without events has a vector that means nothing"
    assert known["events"] == sorted(known["events"], reverse=True)  # pyright: ignore[reportArgumentType]
    assert np.isfinite(vectors).all()
    assert set(known) == {"title", "key", "events", "colour", "genres", "price"}
    row = int(catalogue.rows_of([str(known["key"][0])])[0])
    colour = int(catalogue.features["colour"][row])  # pyright: ignore[reportIndexIssue]
    assert known["colour"][0] == ["", *dataset.vocabulary("colour")][colour]
    files = projector.files(vectors, known)
    assert list(files)[-1] == projector.CONFIG, "it names the others"
    lines = files[projector.METADATA].splitlines()
    assert lines[0].split("\t")[:3] == ["title", "key", "events"]
    assert len(lines) == len(files[projector.VECTORS].splitlines()) + 1
    assert all(line.count("\t") == 5 for line in lines)


def test_a_title_with_a_tab_stays_in_its_cell() -> None:
    files = projector.files(np.ones((2, 1)), {"title": ["a\tb\nc", ""], "events": [3, 1]})
    assert files[projector.METADATA] == "title\tevents\na b c\t3\n-\t1\n"
    assert files[projector.VECTORS] == "1\n1\n"
