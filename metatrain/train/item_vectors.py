"""The items as the model sees them, for TensorBoard's projector: vectors of those seen most, with their titles.

Collective: all ranks call `item_vectors` together, since the rows lie on all of them; only rank 0 reads the catalogue.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from metatrain.data.batch import Column, Ragged
from metatrain.data.columns import stored, take
from metatrain.data.dataset import Catalogue, TaskDataset
from metatrain.data.schema import ITEM_FEATURE, Feature, Kind, Level
from metatrain.model.metamodel import MetaModel

#: Items shown: as many as a browser lays out in a moment.
ITEMS_SHOWN = 5000
#: Of a feature with more values than this none is shown: its vocabulary would take long to read.
_VALUES_SHOWN = 100_000


def item_vectors(
    model: MetaModel, dataset: TaskDataset, device: torch.device, rank: int, most: int = ITEMS_SHOWN
) -> tuple[np.ndarray, dict[str, list[object]]]:
    """The vectors of the items with most events of training users, and what is known of each.

    Args:
        model: Sharded over the ranks, or whole.
        dataset: Whose catalogue is shown.
        device: Of the model.
        rank: Rank 0 gets the result; for the others it is empty.
        most: How many items.

    Returns:
        float32 [I, D], the vectors. Heading → values [I]: title, key, events, then the items' features in words.
    """
    features = [f for f in model.featurizer.features if f.level is Level.ITEM]
    rows = np.zeros(0, np.int64)
    catalogue = None
    if rank == 0:
        catalogue = dataset.catalogue
        seen = np.flatnonzero(catalogue.training_events > 0)
        order = np.argsort(-catalogue.training_events[seen], kind="stable")
        rows = seen[order[:most]]
    columns = {
        f.name: _empty(f) if catalogue is None else take(stored(catalogue.features[f.name]), rows) for f in features
    }
    vectors = model.item_vectors({name: _tensors(column, device) for name, column in columns.items()})
    if catalogue is None:
        return np.zeros((0, 0), np.float32), {}
    return vectors.float().cpu().numpy(), _known(dataset, catalogue, rows)


def _known(dataset: TaskDataset, catalogue: Catalogue, rows: np.ndarray) -> dict[str, list[object]]:
    keys, titles = catalogue.keys[rows], catalogue.titles[rows]
    known: dict[str, list[object]] = {
        "title": [title or key for title, key in zip(titles, keys, strict=True)],
        "key": list(keys),
        "events": catalogue.training_events[rows].tolist(),
    }
    for feature in dataset.schema.of(Level.ITEM):
        if feature.name in known or feature.name == ITEM_FEATURE or feature.kind is Kind.VECTOR:
            continue
        column = take(stored(catalogue.features[feature.name]), rows)
        if feature.kind is Kind.NUMERIC:
            numbers = cast(np.ndarray, column).astype(np.float64) * feature.deviation + feature.mean
            known[feature.name] = [f"{number:.6g}" for number in numbers.tolist()]
        elif not feature.buckets and (feature.rows or 0) <= _VALUES_SHOWN:
            words = ["", *dataset.vocabulary(str(feature.table))]
            known[feature.name] = _words(column, words)
    return known


def _words(column: Column, words: list[str]) -> list[object]:
    if not isinstance(column, Ragged):
        return [words[i] for i in column.tolist()]
    ids = iter(column.values.tolist())
    return [", ".join(sorted(words[next(ids)] for _ in range(length))) for length in column.lengths.tolist()]


def _empty(feature: Feature) -> Column:
    nothing = np.zeros(0, np.int64)
    if feature.kind is Kind.MULTI:
        return Ragged(nothing, nothing)
    if feature.kind is Kind.CATEGORICAL:
        return nothing
    return np.zeros((0, int(feature.width or 0)) if feature.kind is Kind.VECTOR else 0, np.float32)


def _tensors(column: Column, device: torch.device) -> Column:
    if isinstance(column, Ragged):
        return Ragged(_tensors(column.values, device), _tensors(column.lengths, device))
    tensor = torch.from_numpy(np.ascontiguousarray(column))
    return (tensor if tensor.is_floating_point() else tensor.long()).to(device)
