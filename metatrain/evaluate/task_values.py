"""What an evaluation keeps of each task of a partition, so that any two models can be told apart task by task.

A metric's mean over tasks has a wide interval where tasks differ much; the difference of two models on the same tasks
has a narrow one. Symbols: T tasks, in ascending order of their ordinals. NaN where a metric is undefined for a task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from metatrain.evaluate import metrics
from metatrain.evaluate.metrics import Difference, Estimate

Array = np.ndarray


@dataclass(frozen=True)
class TaskValues:
    """One value a task of every model and metric: the mean over draws; of RMSE the mean square."""

    tasks: Array  # int64 [T]: ordinals in the split
    values: Mapping[tuple[str, str], Array]  # (model, metric) → float64 [T]
    by_support_size: Mapping[tuple[str, int], Array]  # (model, support size) → float64 [T]: first draw, curve's metric
    draws: int = 1

    @property
    def models(self) -> tuple[str, ...]:
        """In the order of the table."""
        return tuple(dict.fromkeys(model for model, _ in self.values))

    @property
    def metrics(self) -> tuple[str, ...]:
        """In the order of the table."""
        return tuple(dict.fromkeys(metric for _, metric in self.values))

    def of(self, model: str, metric: str) -> Array:
        """One model's values [T] of one metric.

        Raises:
            KeyError: There are none; the message lists what there is.
        """
        if (model, metric) not in self.values:
            known = f"models {', '.join(self.models)}; metrics {', '.join(self.metrics)}"
            raise KeyError(f"no {metric!r} of {model!r}: there are {known}")
        return self.values[model, metric]

    def paired(self, model: str, against: str, metric: str, confidence: float) -> Difference:
        """The metric of `model` minus that of `against`, by a paired t-test over tasks; of RMSE the mean squares'.

        Raises:
            KeyError: No such model or metric.
        """
        return metrics.paired_difference(self.of(model, metric), self.of(against, metric), confidence)


def estimate_of(values: Array, metric: str, confidence: float) -> Estimate:
    """Mean and interval over tasks of one value a task [T]; of RMSE, whose values are squares, the root of both."""
    mean = metrics.mean_over_tasks(values, np.arange(len(values)), confidence)
    return metrics.root(mean) if metric == "RMSE" and mean.tasks else mean


def task_values(
    tasks: Array,
    values: Mapping[tuple[str, str], Array],
    first_tasks: Array,
    by_support_size: Mapping[tuple[str, int], Array],
    draws: int,
) -> TaskValues:
    """Averages over draws.

    Args:
        tasks: int64 [N]: which task each value is of, all draws.
        values: (model, metric) → [N].
        first_tasks: int64 [M]: the same of the first draw alone.
        by_support_size: (model, size) → [M].
        draws: How many.
    """
    known = np.unique(tasks)

    def placed(column: Array) -> Array:
        result = np.full(len(known), np.nan)
        found, means = metrics.mean_of_draws(column, first_tasks)
        result[np.searchsorted(known, found)] = means
        return result

    return TaskValues(
        known,
        {key: metrics.mean_of_draws(column, tasks)[1] for key, column in values.items()},
        {key: placed(column) for key, column in by_support_size.items()},
        draws,
    )
