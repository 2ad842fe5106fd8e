"""What is measured: partitions of users and items, their episodes, every scorer's metrics task by task.

==============  ==============  ==============
partition       users           items
==============  ==============  ==============
new users       test            existing
new items       training        new
both            test            new
existing users  training        existing
==============  ==============  ==============

The last is measured where `evaluate.existing_users` says so: its events were trained on, query and all. The four are
those of Lee, Im, Jang, Cho and Chung 2019, "MeLU: Meta-learned user preference estimator for cold-start
recommendation".

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
from metatrain.evaluate.task_values import TaskValues, estimate_of, task_values
from metatrain.evaluate.tasks import PaddedTasks, newest_support, padded

Array = np.ndarray


@dataclass(frozen=True)
class Partition:
    """Whose tasks, on which items."""

    name: str
    split: Split
    items: ItemSet
    words: str


def partitions_of(config: EvaluateConfig, task: str = "user", catalogued: str = "item") -> tuple[Partition, ...]:
    """What is measured, in the table's order, where tasks and the catalogue's rows are called so (see `Manifest`)."""
    asked = (
        Partition(f"new {task}s", Split.TEST, ItemSet.EXISTING, f"test {task}s, existing {catalogued}s"),
        Partition(f"new {catalogued}s", Split.TRAIN, ItemSet.NEW, f"training {task}s, new {catalogued}s"),
        Partition("both", Split.TEST, ItemSet.NEW, f"test {task}s, new {catalogued}s"),
    )
    if not config.existing_users:
        return asked
    words = f"training {task}s, existing {catalogued}s: events that were trained on"
    return (*asked, Partition(f"existing {task}s", Split.TRAIN, ItemSet.EXISTING, words))


#: Of users' tasks.
PARTITIONS = partitions_of(EvaluateConfig())

#: A batch, and the same padded → scores [T, Q] by the scorer's name, in the order of the table.
ScoreAll = Callable[[TaskBatch, PaddedTasks], Mapping[str, Array]]


_RELEVANT_AT = {
    "hit rate": metrics.hit_rate,
    "recall": metrics.recall,
    "precision": metrics.precision,
    "MAP": metrics.average_precision,
}


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
    def headlines(self) -> tuple[str, ...]:
        """What the adapted model is compared by: the curve's metric, and nDCG@5 (or the first cut-off there is)."""
        cuts = [name for name in self.names(True) if name.startswith("nDCG@")]
        return self.curve_metric, *(cuts and ["nDCG@5" if "nDCG@5" in cuts else cuts[0]])

    @property
    def support_sizes(self) -> tuple[int, ...]:
        """Sizes of the curve that an episode can have."""
        return tuple(size for size in self.config.support_sizes if size <= self.config.episode.support_max)

    @property
    def relevant_from(self) -> float | str:
        """The least label that is relevant to AUC and to what counts relevant events; "support mean": each task's."""
        if not self.rates:
            return 0.5
        return self.schema.label_mean if self.config.relevant is None else self.config.relevant

    def relevant(self, tasks: PaddedTasks) -> Array:
        """Which query events are relevant: bool [T, Q]. A threshold never depends on a query's labels."""
        least = self.relevant_from
        if isinstance(least, str):
            count = tasks.support_mask.sum(1)
            total = np.where(tasks.support_mask, tasks.support_labels, 0.0).sum(1)
            least = np.where(count > 0, total / np.maximum(count, 1), self.schema.label_mean)[:, None]
        return tasks.query_labels >= least

    def names(self, predicts: bool) -> list[str]:
        """Metrics in the order of the table."""
        errors = ["MAE", "RMSE"] if self.rates and predicts else []
        cuts = self.config.k
        return [
            *errors,
            *(
                name
                for kind in self.config.metrics
                for name in ([kind] if kind == "AUC" else map(f"{kind}@{{}}".format, cuts))
            ),
        ]

    def needs(self, metric: str) -> str:
        """Why a metric may be defined for no task."""
        if metric.startswith(("hit rate", "recall", "precision")):
            return f"it needs a query of more than {metric.partition('@')[2]} events, some of them relevant"
        return "it needs a label above 0" if metric.startswith("nDCG") else "it needs a query of both kinds of labels"

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
        relevant = self.relevant(tasks)
        if kind == "AUC":
            return metrics.auc(scores, relevant, mask)
        return _RELEVANT_AT[kind](scores, relevant, mask, int(cut))

    def gains(self, labels: Array) -> Array:
        """2^r - 1, of clicks and of scales within 0 to 10; other scales are first mapped to 0 to 5."""
        low, high = self.schema.label_min, self.schema.label_max
        if self.rates and (low < 0 or high > 10):
            labels = 5.0 * np.clip((labels - low) / max(high - low, 1e-12), 0.0, 1.0)
        return 2.0**labels - 1.0

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
    #: The adapted model against each other one, by the judge's `headlines`.
    paired: tuple[PairedRow, ...] = ()
    #: All that the rows are means of.
    task_values: TaskValues | None = None


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
            for size in judge.support_sizes:
                part = newest_support(batch, size)
                short = padded(part)
                for model, scores in (score_small or score_all)(part, short).items():
                    if model not in orders_alone or not judge.rates:
                        curve[model, size].append(judge.values(scores, short, judge.curve_metric))
    if not tasks:
        why = f"{skipped:,} tasks have too few or too many events" if skipped else "there is no such task"
        return Measured((), (), (f"{partition.name}: left out, {why}.",), skipped, skipped)
    of_tasks = task_values(
        np.concatenate(tasks),
        {key: np.concatenate(parts) for key, parts in values.items()},
        np.concatenate(first_tasks),
        {key: np.concatenate(parts) for key, parts in curve.items()},
        draws,
    )
    rows, sizes, undefined = rows_of(partition.name, of_tasks, judge)
    paired = _paired(partition, of_tasks, judge)
    count = skipped + len(of_tasks.tasks)
    return Measured(rows, sizes, (), skipped, count, undefined, paired, of_tasks)


def rows_of(
    partition: str, of_tasks: TaskValues, judge: Judge
) -> tuple[tuple[Row, ...], tuple[SizeRow, ...], tuple[str, ...]]:
    """The rows of a partition's table and of its curve, and the metrics that no task has defined."""
    level, metric_of_curve = judge.config.confidence, judge.curve_metric
    estimates = {key: estimate_of(values, key[1], level) for key, values in of_tasks.values.items()}
    rows = tuple(
        Row(model, partition, metric, *fields_of(estimate), of_tasks.draws)
        for (model, metric), estimate in estimates.items()
        if estimate.tasks
    )
    sizes = tuple(
        SizeRow(model, partition, metric_of_curve, *fields_of(estimate), 1, size)
        for (model, size), values in of_tasks.by_support_size.items()
        if (estimate := estimate_of(values, metric_of_curve, level)).tasks
    )
    undefined = dict.fromkeys(metric for (_, metric), estimate in estimates.items() if not estimate.tasks)
    return rows, sizes, tuple(undefined)


def _paired(partition: Partition, of_tasks: TaskValues, judge: Judge) -> tuple[PairedRow, ...]:
    """The adapted model's values minus each other model's, task by task."""
    found = (
        (metric, model, of_tasks.paired(ADAPTED, model, metric, judge.config.confidence))
        for metric in judge.headlines
        if (ADAPTED, metric) in of_tasks.values
        for model in of_tasks.models
        if model != ADAPTED and (model, metric) in of_tasks.values
    )
    return tuple(
        PairedRow(ADAPTED, partition.name, metric, *fields_of(difference), of_tasks.draws, model, difference.p)
        for metric, model, difference in found
        if difference.tasks
    )


def fields_of(estimate: metrics.Estimate) -> tuple[float, float, float, int]:
    """What a row holds of an estimate.

    Raises:
        ValueError: A mean that is not finite.
    """
    if not math.isfinite(estimate.value):
        raise ValueError(f"a mean over tasks is not finite: {estimate}")
    return estimate.value, estimate.low, estimate.high, estimate.tasks
