"""Tasks (users; items) that a dataset holds, as requests: all of their events are what they have seen, the newest the
support.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from metatrain.config import EpisodeConfig
from metatrain.data.columns import concatenate, stored, take
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.reader import iterate
from metatrain.data.shards import Shards
from metatrain.errors import RequestError
from metatrain.recommend.events import Requests

_ALL_EVENTS = EpisodeConfig(support_min=0, support_max=1_000_000_000, query_min=1, query_max=1)
#: Read at a time for titles.
_ROW_GROUPS = 64


def requests_of(keys: Sequence[str], dataset: TaskDataset, support_max: int) -> Requests:
    """Reads the shards, test users first, until all keys are found.

    Raises:
        RequestError: Keys that the dataset doesn't have.
    """
    task, wanted = dataset.manifest.task, list(dict.fromkeys(str(k) for k in keys))
    found: dict[str, tuple] = {}
    for split in (Split.TEST, Split.VALIDATION, Split.TRAIN):
        if len(found) == len(wanted) or not dataset.manifest.tasks.get(split, 0):
            continue
        for batch, names in iterate(dataset, split, ItemSet.ALL, _ALL_EVENTS, tasks_per_batch=1024, keys=True):
            lengths = batch.support_lengths + batch.query_lengths
            starts = np.cumsum(lengths) - lengths
            for t in np.flatnonzero(np.isin(names.astype(str), wanted)):
                events = np.arange(starts[t], starts[t] + lengths[t])
                recent = events[-support_max:]
                rows = batch.items[batch.event_items].astype(np.int64)
                found[str(names[t])] = (
                    (rows[recent], batch.labels[recent], batch.timestamps[recent]),
                    np.unique(rows[events]),
                    {name: take(stored(column), np.array([t])) for name, column in batch.task_features.items()},
                    {name: take(stored(column), recent) for name, column in batch.event_features.items()},
                    len(events) - len(recent),
                )
            if len(found) == len(wanted):
                break
    if absent := [key for key in wanted if key not in found]:
        raise RequestError(
            f"The dataset has no such {task}.",
            where=dataset.url,
            got=", ".join(absent[:5]),
            remedy=f"Name {task}s of the dataset by their keys, or give events with --events FILE.",
        )
    parts = [found[key] for key in wanted]
    older = sum(part[4] for part in parts)
    return Requests(
        users=tuple(wanted),
        supports=tuple(part[0] for part in parts),
        seen=tuple(part[1] for part in parts),
        task_features={name: concatenate([part[2][name] for part in parts]) for name in (parts[0][2] if parts else {})},
        event_features={
            name: concatenate([part[3][name] for part in parts]) for name in (parts[0][3] if parts else {})
        },
        unknown_items={},
        warnings=(f"{older} events left out: the model takes each {task}'s {support_max} most recent.",)
        if older
        else (),
        titles=_titles(wanted, dataset),
    )


def _titles(keys: Sequence[str], dataset: TaskDataset) -> dict[str, str]:
    """Titles of tasks by key, where tasks are items that have one. Of the shards two columns are read, a few row groups
    at a time."""
    found: dict[str, str] = {}
    if dataset.manifest.task != "item":
        return found
    for split in (Split.TEST, Split.VALIDATION, Split.TRAIN):
        shards = Shards(dataset.url, dataset.manifest.of(split))
        groups = np.arange(len(shards.row_groups))
        for start in range(0, len(groups), _ROW_GROUPS):
            table = shards.read(groups[start : start + _ROW_GROUPS], ["key", "title"])
            named = table.filter(pc.is_in(table["key"], value_set=pa.array(keys, pa.string()))).drop_null()
            found |= dict(zip(named["key"].to_pylist(), named["title"].to_pylist(), strict=True))
        shards.close()
        if len(found) == len(keys):
            break
    return found
