"""`evaluate_run`: measures a trained run through the recommender that serves it, beside the baselines.

Nothing is tuned on what is reported: the baselines' settings are chosen on validation users.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from metatrain.config import EpisodeConfig, EvaluateConfig
from metatrain.data.batch import TaskBatch
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.quarantine import Quarantine, read_quarantine
from metatrain.data.reader import iterate
from metatrain.errors import CheckpointError
from metatrain.evaluate import baselines
from metatrain.evaluate.baselines import Baseline, Fitted
from metatrain.evaluate.choice import choose_adaptation
from metatrain.evaluate.headlines import headline_values
from metatrain.evaluate.protocols import Judge, Measured, Partition, draws_of, measure, partitions_of
from metatrain.evaluate.report import ADAPTED, UNADAPTED, Report
from metatrain.evaluate.tasks import PaddedTasks, newest_support, padded
from metatrain.evaluate.training_events import TrainingEvents, training_events
from metatrain.observe.tensorboard import write_evaluation
from metatrain.recommend.recommender import Recommender

_log = logging.getLogger(__name__)

#: Every event of every task with one at least: the last is called query, and counted in again.
_ALL_EVENTS = EpisodeConfig(support_min=0, support_max=1_000_000_000, query_min=1, query_max=1)
#: Validation tasks that the baselines' settings are chosen on.
_VALIDATION_TASKS = 2_000


def evaluate_run(
    run_url: str,
    *,
    checkpoint: int | None = None,
    evaluate: EvaluateConfig | None = None,
    dataset: str | None = None,
    write: bool = True,
    progress: bool = True,
    fitted: Fitted | None = None,
) -> Report:
    """Evaluates a run and publishes the report in its folder.

    Args:
        run_url: Folder of the run.
        checkpoint: Step of the checkpoint. Default: the best by validation loss, or the newest.
        evaluate: Another protocol than the run's own.
        dataset: Where the run's dataset now lies, if not where it was trained.
        write: Whether `evaluation.json`, `.txt` and `.png` are written, and the headlines to the run's TensorBoard.
        progress: Whether a terminal shows a bar.
        fitted: See `evaluate_recommender`.

    Raises:
        CheckpointError: No checkpoint, or one of another model or dataset, or scores that are not finite.
        DatasetError: The dataset is missing or broken.
    """
    recommender = Recommender.load(run_url, checkpoint=checkpoint, dataset=dataset)
    report = evaluate_recommender(
        recommender, evaluate or recommender.config.evaluate, progress=progress, fitted=fitted
    )
    if write:
        urls = report.write(recommender.run_url)
        judged = headline_values(report, recommender.dataset, evaluate or recommender.config.evaluate)
        write_evaluation(recommender.run_url, judged, recommender.step)
        _log.info("wrote %s", ", ".join(urls.values()))
    return report


def evaluate_recommender(
    recommender: Recommender, config: EvaluateConfig, *, progress: bool = False, fitted: Fitted | None = None
) -> Report:
    """Evaluates a loaded recommender; nothing is written.

    Args:
        recommender: What adaptation leaves open is chosen on validation users, and the recommender keeps it.
        config: The protocol.
        progress: Whether a terminal shows a bar.
        fitted: The dataset's baselines under this protocol, from `fit_baselines`. Default: fitted now.
    """
    dataset = recommender.dataset
    task, catalogued = dataset.manifest.task, dataset.manifest.catalogued
    judge = Judge(dataset.schema, config)
    lost = read_quarantine(recommender.run_url, dataset)
    fitted = fitted or fit_baselines(dataset, judge, lost)
    whole = list(_validation_batches(dataset, config, None)) if recommender.model.meta.candidates() else []
    choice = choose_adaptation(recommender, whole, judge)
    orders_alone = frozenset(b.name for b in fitted.baselines if not b.predicts)

    def scored(batch: TaskBatch, tasks: PaddedTasks, beside: tuple[Baseline, ...]) -> dict[str, np.ndarray]:
        scores = recommender.scores(batch)
        if not (np.isfinite(scores.after[scores.mask]).all() and np.isfinite(scores.before[scores.mask]).all()):
            raise CheckpointError(
                "The model gives scores that are not finite.",
                where=f"{recommender.run_url}, checkpoint {recommender.step}",
                remedy="Evaluate an earlier checkpoint, and train again with a lower `meta.rate`.",
            )
        return {ADAPTED: scores.after, UNADAPTED: scores.before} | {b.name: b.scores(tasks) for b in beside}

    measured: dict[str, Measured] = {}
    notes = [*fitted.notes, *choice.notes, *([f"The run: {lost.told()}."] if lost.shards else [])]
    partitions = partitions_of(config, task, catalogued)
    for partition in partitions:
        if not dataset.manifest.tasks.get(partition.split, 0):
            notes.append(f"{partition.name}: left out, the dataset has no {partition.split.value} {task}s.")
        elif partition.items is ItemSet.NEW and not dataset.manifest.new_items:
            notes.append(f"{partition.name}: left out, the dataset has no new {catalogued}s.")
        else:
            bar = _bar(dataset, partition, config) if progress else None
            measured[partition.name] = measure(
                partition,
                _batches(dataset, partition, config, bar),
                functools.partial(scored, beside=fitted.baselines),
                judge,
                orders_alone,
                functools.partial(scored, beside=fitted.on_small_supports),
            )
            if bar is not None:
                bar.close()
    notes.extend(note for result in measured.values() for note in result.notes)
    notes.extend(_left_out(measured, partitions, dataset, judge))
    return Report(
        dataset=dataset.manifest.name,
        run=recommender.config.run.name,
        checkpoint=recommender.step,
        configuration=config.model_dump(mode="json"),
        rows=tuple(row for m in measured.values() for row in m.rows),
        by_support_size=tuple(row for m in measured.values() for row in m.by_support_size),
        partitions={p.name: p.words for p in partitions if p.name in measured and measured[p.name].rows},
        notes=tuple(notes),
        paired_rows=tuple(row for m in measured.values() for row in m.paired),
        task_values={name: m.task_values for name, m in measured.items() if m.task_values is not None},
        facts={
            "dataset_url": dataset.url,
            "dataset_fingerprint": dataset.fingerprint,
            "run_url": recommender.run_url,
            "task": task,
            "relevant_from": judge.relevant_from,
            "baselines": fitted.chosen,
            **({"fine_tuning": choice.facts} if choice.facts else {}),
            "tasks_outside_bounds": {name: m.skipped for name, m in measured.items()},
            "dataset": dataset.manifest.facts,
        },
    )


def _left_out(
    measured: dict[str, Measured], partitions: tuple[Partition, ...], dataset: TaskDataset, judge: Judge
) -> Iterator[str]:
    """Notes on tasks beyond the bound, on tasks without an episode, and on metrics that no task has defined."""
    task = dataset.manifest.task
    few = "too few" if judge.config.episode.events_max == EpisodeConfig().events_max else "too few or too many"
    for partition in partitions:
        total = dataset.manifest.tasks.get(partition.split, 0)
        if partition.name in measured and (seen := measured[partition.name].seen) < total:
            yield f"{partition.name}: measured on the first {seen:,} of {total:,} {task}s (evaluate.max_tasks)."
        if partition.name in measured and (result := measured[partition.name]).rows and result.skipped:
            yield (
                f"{partition.name}: {result.skipped:,} of {result.seen:,} {task}s have {few} events for an episode and "
                "are left out."
            )
    for metric in judge.names(True):
        if names := [name for name, result in measured.items() if metric in result.undefined]:
            yield f"{metric} left out for {', '.join(names)}: {judge.needs(metric)}."


def fit_baselines(dataset: TaskDataset, judge: Judge, lost: Quarantine | None = None) -> Fitted:
    """The baselines of a dataset: training tasks' events on the existing catalogue; settings chosen on validation.

    Args:
        dataset: Whose.
        judge: By what settings are chosen.
        lost: Shards that the run beside them was trained without: they are fitted on the same tasks.
    """
    config = judge.config
    batches = list(_validation_batches(dataset, config, ()))
    return baselines.fit(
        _training_events(dataset, lost or Quarantine()),
        np.asarray(dataset.catalogue.training_events),
        map(padded, batches),
        judge.loss,
        # Without support no setting of a user matters.
        small=(padded(newest_support(batch, size)) for batch in batches for size in judge.support_sizes if size),
        seed=config.seed,
        task=dataset.manifest.task,
    )


def _validation_batches(
    dataset: TaskDataset, config: EvaluateConfig, features: tuple[str, ...] | None
) -> Iterator[TaskBatch]:
    if not dataset.manifest.tasks.get(Split.VALIDATION, 0):
        return
    count = 0
    for batch in iterate(
        dataset,
        Split.VALIDATION,
        ItemSet.EXISTING,
        config.episode,
        seed=config.seed,
        tasks_per_batch=config.tasks_per_batch,
        features=features,
    ):
        if batch.size:
            yield batch
        count += batch.size
        if count >= _VALIDATION_TASKS:
            return


def _training_events(dataset: TaskDataset, lost: Quarantine) -> TrainingEvents:
    batches = iterate(
        dataset,
        Split.TRAIN,
        ItemSet.EXISTING,
        _ALL_EVENTS,
        tasks_per_batch=1024,
        features=(),
        quarantined=lost.paths,
    )
    return training_events(batches, len(dataset.catalogue.new))


def _batches(dataset: TaskDataset, partition: Partition, config: EvaluateConfig, bar: tqdm | None):
    def of_draw(draw: int) -> Iterator[TaskBatch]:
        count = 0
        for batch in iterate(
            dataset,
            partition.split,
            partition.items,
            config.episode,
            seed=config.seed,
            epoch=draw,
            tasks_per_batch=config.tasks_per_batch,
        ):
            yield batch
            if bar is not None:
                bar.update(batch.size + batch.skipped)
            count += batch.size
            if config.max_tasks and count >= config.max_tasks:
                return

    return of_draw


def _bar(dataset: TaskDataset, partition: Partition, config: EvaluateConfig) -> tqdm:
    total = dataset.manifest.tasks[partition.split] * draws_of(config)
    # disable=None: no bar where standard error is no terminal.
    return tqdm(total=total, desc=f"evaluate: {partition.name}", unit="task", leave=False, disable=None)
