"""A run's values task by task, kept in a file so that a leaderboard is made again without scoring again.

Promises: what is read is of the very checkpoint, dataset and protocol that are asked for, or it is not read at all.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metatrain import storage
from metatrain.config import EvaluateConfig
from metatrain.evaluate.report import ADAPTED, UNADAPTED, Report
from metatrain.evaluate.task_values import TaskValues

Array = np.ndarray
_VERSION = 1


@dataclass(frozen=True)
class Scores:
    """What a leaderboard needs of a run's evaluation."""

    dataset: str  # its name
    checkpoint: int
    partitions: Mapping[str, str]  # name → what it is made of, in the order of the table
    values: Mapping[str, TaskValues]  # by partition
    notes: tuple[str, ...]
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, report: Report) -> Scores:
        """Those of a report that was just made."""
        return cls(report.dataset, report.checkpoint, report.partitions, report.task_values, report.notes, report.facts)

    def models(self) -> tuple[str, ...]:
        """Names of all rows but the run's own, in the order of the table."""
        names = dict.fromkeys(model for values in self.values.values() for model in values.models)
        return tuple(name for name in names if name not in (ADAPTED, UNADAPTED))


def key_of(checkpoint: int, fingerprint: str, evaluate: EvaluateConfig) -> dict[str, Any]:
    """What scores depend on."""
    protocol = evaluate.model_dump(mode="json", exclude={"tasks_per_batch"})
    return {"version": _VERSION, "checkpoint": checkpoint, "dataset": fingerprint, "evaluate": protocol}


def save(scores: Scores, key: Mapping[str, Any], url: str) -> None:
    """Publishes scores under their key: one file, numpy's zip of arrays."""
    header: dict[str, Any] = {
        "key": key,
        "dataset": scores.dataset,
        "partitions": dict(scores.partitions),
        "notes": list(scores.notes),
        "facts": scores.facts,
        "tables": [],
    }
    arrays: dict[str, Array] = {}
    for number, (partition, of_tasks) in enumerate(scores.values.items()):
        header["tables"].append(
            {
                "partition": partition,
                "draws": of_tasks.draws,
                "values": list(of_tasks.values),
                "by_support_size": list(of_tasks.by_support_size),
            }
        )
        arrays[f"tasks{number}"] = of_tasks.tasks
        arrays[f"values{number}"] = _stacked(of_tasks.values.values(), len(of_tasks.tasks))
        arrays[f"sizes{number}"] = _stacked(of_tasks.by_support_size.values(), len(of_tasks.tasks))
    buffer = io.BytesIO()
    arrays["header"] = np.array(json.dumps(header))
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    storage.write_atomic(url, buffer.getvalue())


def load(key: Mapping[str, Any], url: str) -> Scores | None:
    """The scores at a URL; None where there are none, or none of this key."""
    if not storage.exists(url):
        return None
    try:
        with np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False) as arrays:
            header = json.loads(str(arrays["header"]))
            if header["key"] != key:
                return None
            values = {
                table["partition"]: TaskValues(
                    arrays[f"tasks{number}"],
                    {
                        (m, of): column
                        for (m, of), column in zip(table["values"], arrays[f"values{number}"], strict=True)
                    },
                    {
                        (m, size): column
                        for (m, size), column in zip(table["by_support_size"], arrays[f"sizes{number}"], strict=True)
                    },
                    table["draws"],
                )
                for number, table in enumerate(header["tables"])
            }
    except (ValueError, KeyError, zipfile.BadZipFile):
        return None  # of another release, or cut: the run is scored again
    return Scores(
        header["dataset"],
        key["checkpoint"],
        header["partitions"],
        values,
        tuple(header["notes"]),
        header["facts"],
    )


def over_seeds(each: Sequence[TaskValues], names: Mapping[str, str]) -> TaskValues:
    """Runs of several seeds as one: each task's values are averaged first, since tasks are what is independent.

    Args:
        each: One a seed, of the same tasks.
        names: Model → its name in the result; others are left out.

    Raises:
        ValueError: The tasks differ.
    """
    first = each[0]
    if any(not np.array_equal(first.tasks, other.tasks) for other in each[1:]):
        raise ValueError("the seeds' runs were measured on other tasks")

    def mean(columns: Sequence[Array]) -> Array:
        return columns[0] if len(columns) == 1 else np.mean(columns, axis=0)

    return TaskValues(
        first.tasks,
        {(names[m], of): mean([e.values[m, of] for e in each]) for m, of in first.values if m in names},
        {(names[m], s): mean([e.by_support_size[m, s] for e in each]) for m, s in first.by_support_size if m in names},
        first.draws,
    )


def joined(parts: Sequence[TaskValues]) -> TaskValues:
    """Several models' values, of the same tasks, as one table's.

    Raises:
        ValueError: The tasks differ.
    """
    first = parts[0]
    if any(not np.array_equal(first.tasks, other.tasks) for other in parts[1:]):
        raise ValueError("the entries were measured on other tasks")
    return TaskValues(
        first.tasks,
        {key: column for part in parts for key, column in part.values.items()},
        {key: column for part in parts for key, column in part.by_support_size.items()},
        first.draws,
    )


def _stacked(columns: Any, width: int) -> Array:
    rows = list(columns)
    return np.stack(rows) if rows else np.zeros((0, width))
