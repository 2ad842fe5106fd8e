"""Which rows of tables a step may have changed: those that it looked up, where gradients are on."""

from __future__ import annotations

import torch

from metatrain.model.choices import TableSpec
from metatrain.model.tables import Tables


def tables() -> Tables:
    return Tables(
        (
            TableSpec("item", 11, 4, ("item", "other_item")),
            TableSpec("genre", 3, 4, ("genre",)),
            TableSpec("wide", 5, 8, ("wide",)),
        ),
        dedup=True,
    )


def marked(bitmaps: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {table: bitmap.nonzero().squeeze(1).tolist() for table, bitmap in bitmaps.items()}


def test_rows_that_a_step_looks_up_are_marked_until_they_are_cleared() -> None:
    model = tables()
    bitmaps = model.track()
    model({"item": torch.tensor([3, 3, 10]), "other_item": torch.tensor([0]), "wide": torch.tensor([4])})
    assert marked(bitmaps) == {"item": [0, 3, 10], "genre": [], "wide": [4]}
    model({"genre": torch.tensor([2])})
    assert marked(bitmaps) == {"item": [0, 3, 10], "genre": [2], "wide": [4]}
    bitmaps["item"].zero_()
    model({"item": torch.tensor([1])})
    assert marked(bitmaps) == {"item": [1], "genre": [2], "wide": [4]}


def test_reading_without_gradients_leaves_no_mark() -> None:
    model = tables()
    bitmaps = model.track()
    with torch.no_grad():
        model({"item": torch.tensor([3])})
    assert not any(marked(bitmaps).values())


def test_names_are_those_of_the_state() -> None:
    model = tables()
    assert {model.weight_name(table) for table in ("item", "genre", "wide")} == set(model.state_dict())
