"""What is measured: partitions of users and items, their episodes, every scorer's metrics task by task.

============  ==============  ==============
partition     users           items
============  ==============  ==============
new users     test            existing
new items     training        new
both          test            new
============  ==============  ==============

Where tasks are items it is the other way round: new items are test tasks on existing users, new users are new rows of
the catalogue.

Support and query of a task are both inside its partition. All scorers see the same episodes, batch by batch: what is
kept of a batch is one number a task a metric. Predictions are held to the range of the training labels before errors
are taken, for every scorer alike; ranking uses scores as they are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from metatrain.config import EvaluateConfig
from metatrain.data.batch import TaskBatch
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.schema import LabelKind, Schema
from metatrain.evaluate import metrics
from metatrain.evaluate.report import ADAPTED, PairedRow, Row, SizeRow
from metatrain.evaluate.tasks import PaddedTasks, newest_support, padded

Array = np.ndarray


@dataclass(frozen=True)
class Partition:
    """Whose tasks, on which items."""

    name: str
    split: Split
    items: ItemSet
    words: str


def partitions(task: str = "user", catalogued: str = "item") -> tuple[Partition, ...]:
    """The partitions of a dataset whose tasks and whose catalogue's rows are called so (see `Manifest.task`)."""
    return (
        Partition(f"new {task}s", Split.TEST, ItemSet.EXISTING, f"test {task}s, existing {catalogued}s"),
        Partition(f"new {catalogued}s", Split.TRAIN, ItemSet.NEW, f"training {task}s, new {catalogued}s"),
        Partition("both", Split.TEST, ItemSet.NEW, f"test {task}s, new {catalogued}s"),
    )


#: Of users' tasks.
PARTITIONS = partitions()

#: A batch, and the same padded → scores [T, Q] by the scorer's name, in the order of the table.
ScoreAll = Callable[[TaskBatch, PaddedTasks], Mapping[str, Array]]


@dataclass(frozen=True)
class Judge:
    """Turns scores into one value a task a metric, as the labels' kind and the configuration ask."""

    schema: Schema
    config: EvaluateConfig

    @property
    def rates(self) -> bool:
        """Whether labels are ratings."""
        return self.schema.label is LabelKind.RATING

    @property
    def curve_metric(self) -> str:
        """What the curve by support size shows, and what the baselines are chosen by."""
        return "MAE" if self.rates else "AUC"

    @property
    def relevant_from(self) -> float:
        """The least label that is relevant to AUC, hit rate and recall."""
        if not self.rates:
            return 0.5
        return self.schema.label_mean if self.config.relevant is None else self.config.relevant

    def names(self, predicts: bool) -> list[str]:
        """Metrics in the order of the table."""
        errors = ["MAE", "RMSE"] if self.rates and predicts else []
        kinds = ("nDCG", "hit rate", "recall")
        return [*errors, "AUC", *(f"{kind}@{k}" for kind in kinds for k in self.config.k)]

    def needs(self, metric: str) -> str:
        """Why a metric may be defined for no task."""
        if metric.startswith(("hit rate", "recall")):
            return f"it needs a query of more than {metric.partition('@')[2]} events, some of them relevant"
        return "it needs a query of both kinds of labels" if metric == "AUC" else "it needs a label above 0"

    def values(self, scores: Array, tasks: PaddedTasks, metric: str) -> Array:
        """The metric of each task: [T], NaN where undefined; for RMSE the mean square."""
        labels, mask = tasks.query_labels, tasks.query_mask
        kind, _, cut = metric.partition("@")
        if kind in ("MAE", "RMSE"):
            held = np.clip(scores, self.schema.label_min, self.schema.label_max)
            error = metrics.absolute_error if kind == "MAE" else metrics.squared_error
            return error(held, labels, mask)
        if kind == "nDCG":
            return metrics.ndcg(scores, self.gains(labels), mask, int(cut))
        relevant = labels >= self.relevant_from
        if kind == "AUC":
            return metrics.auc(scores, relevant, mask)
        rank = metrics.hit_rate if kind == "hit rate" else metrics.recall
        return rank(scores, relevant, mask, int(cut))

    def gains(self, labels: Array) -> Array:
        """2^r - 1, of clicks and of scales within 0 to 10; other scales are first mapped to 0 to 5."""
        low, high = self.schema.label_min, self.schema.label_max
        if self.rates and (low < 0 or high > 10):
            labels = 5.0 * np.clip((labels - low) / max(high - low, 1e-12), 0.0, 1.0)
        return 2.0**labels - 1.0

    def estimate(self, metric: str, values: Array, tasks: Array) -> metrics.Estimate:
        """Mean and interval over tasks; of RMSE the root of both."""
        mean = metrics.mean_over_tasks(values, tasks, self.config.confidence)
        return metrics.root(mean) if metric == "RMSE" and mean.tasks else mean

    def loss(self, scores: Array, tasks: PaddedTasks) -> Array:
        """What the baselines' settings are chosen by, lower is better: [T]."""
        values = self.values(scores, tasks, self.curve_metric)
        return values if self.rates else -values


@dataclass(frozen=True)
class Measured:
    """A partition's rows; no row where it has no eligible task."""

    rows: tuple[Row, ...]
    by_support_size: tuple[SizeRow, ...]
    notes: tuple[str, ...]
    skipped: int  # tasks outside of the episode's bounds
    seen: int  # tasks read, those included
    #: Metrics that no task has defined.
    undefined: tuple[str, ...] = ()
    #: The adapted model against each other one, by the judge's `curve_metric`.
    paired: tuple[PairedRow, ...] = ()


def draws_of(config: EvaluateConfig) -> int:
    """Draws of support and query: one where nothing is drawn."""
    drawn = config.episode.by == "random" or config.episode.cut == "uniform"
    return config.draws if drawn else 1


def measure(
    partition: Partition,
    batches: Callable[[int], Iterable[TaskBatch]],
    score_all: ScoreAll,
    judge: Judge,
    orders_alone: frozenset[str] = frozenset(),
    score_small: ScoreAll | None = None,
) -> Measured:
    """Scores a partition's tasks, all draws, and the first draw again at each support size.

    Args:
        partition: What is measured.
        batches: Draw → its batches, of numpy columns.
        score_all: All scorers at once.
        judge: The metrics.
        orders_alone: Names of scorers whose scores are no predictions of the label.
        score_small: All scorers for the support sizes, where some have settings of their own for small supports.

    Raises:
        ValueError: A score that is not finite.
    """
    draws = draws_of(judge.config)
    values: dict[tuple[str, str], list[Array]] = defaultdict(list)
    curve: dict[tuple[str, int], list[Array]] = defaultdict(list)
    tasks, first_tasks, skipped = [], [], 0
    for draw in range(draws):
        for batch in batches(draw):
            skipped += batch.skipped if draw == 0 else 0
            if not batch.size:
                continue
            whole = padded(batch)
            tasks.append(whole.tasks)
            for model, scores in score_all(batch, whole).items():
                if not np.isfinite(scores[whole.query_mask]).all():
                    # NaN would pass for "undefined" in the metrics, and a broken model would look no worse.
                    raise ValueError(f"scores of {model!r} are not finite")
                for metric in judge.names(model not in orders_alone):
                    values[model, metric].append(judge.values(scores, whole, metric))
            if draw:
                continue
            first_tasks.append(whole.tasks)
            for size in judge.config.support_sizes:
                part = newest_support(batch, size)
                short = padded(part)
                for model, scores in (score_small or score_all)(part, short).items():
                    if model not in orders_alone or not judge.rates:
                        curve[model, size].append(judge.values(scores, short, judge.curve_metric))
    if not tasks:
        why = f"{skipped:,} tasks have too few or too many events" if skipped else "there is no such task"
        return Measured((), (), (f"{partition.name}: left out, {why}.",), skipped, skipped)
    ordinals, first = np.concatenate(tasks), np.concatenate(first_tasks)
    rows, undefined = [], {}
    for (model, metric), parts in values.items():
        estimate = judge.estimate(metric, np.concatenate(parts), ordinals)
        if estimate.tasks:
            rows.append(Row(model, partition.name, metric, *_fields(estimate), draws))
        else:
            undefined[metric] = True
    sizes = [
        SizeRow(model, partition.name, judge.curve_metric, *_fields(estimate), 1, size)
        for (model, size), parts in curve.items()
        if (estimate := judge.estimate(judge.curve_metric, np.concatenate(parts), first)).tasks
    ]
    paired = _paired(partition, values, ordinals, judge, draws)
    return Measured(tuple(rows), tuple(sizes), (), skipped, skipped + len(first), tuple(undefined), paired)


def _paired(
    partition: Partition, values: Mapping[tuple[str, str], list[Array]], tasks: Array, judge: Judge, draws: int
) -> tuple[PairedRow, ...]:
    """The adapted model's values minus each other model's, task by task."""
    metric = judge.curve_metric
    if (ADAPTED, metric) not in values:
        return ()
    own = np.concatenate(values[ADAPTED, metric])
    return tuple(
        PairedRow(ADAPTED, partition.name, metric, *_fields(estimate), draws, model)
        for (model, of), parts in values.items()
        if of == metric
        and model != ADAPTED
        and (estimate := metrics.mean_over_tasks(own - np.concatenate(parts), tasks, judge.config.confidence)).tasks
    )


def _fields(estimate: metrics.Estimate) -> tuple[float, float, float, int]:
    if not math.isfinite(estimate.value):
        raise ValueError(f"a mean over tasks is not finite: {estimate}")
    return estimate.value, estimate.low, estimate.high, estimate.tasks
