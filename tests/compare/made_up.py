"""Runs of a comparison with made-up values, and the means by hand."""

from __future__ import annotations

import numpy as np

from metatrain.compare.entries import Entry
from metatrain.compare.runs import Run
from metatrain.compare.scores import Scores
from metatrain.config import Config, EvaluateConfig
from metatrain.data.schema import LabelKind, Schema
from metatrain.errors import ConfigError
from metatrain.evaluate.protocols import Judge
from metatrain.evaluate.task_values import TaskValues

RATINGS = Schema(features=(), label=LabelKind.RATING, label_mean=3.5, label_deviation=1, label_min=1, label_max=5)
JUDGE = Judge(RATINGS, EvaluateConfig(metrics=("nDCG",), k=(5,), support_sizes=(0, 5)))
METRICS = ("MAE", "RMSE", "nDCG@5")
PARTITION = "new users"


def table(values: dict[str, np.ndarray]) -> TaskValues:
    """Of model → its MAE [T]; RMSE holds squares, nDCG falls as MAE grows; every third task has no nDCG."""
    ndcg = {m: np.where(np.arange(len(v)) % 3 == 0, np.nan, 1 - v / 4) for m, v in values.items()}
    kinds = {"MAE": values, "RMSE": {m: v**2 for m, v in values.items()}, "nDCG@5": ndcg}
    return TaskValues(
        np.arange(30) * 2,
        {(model, metric): kinds[metric][model] for model in values for metric in METRICS},
        {(model, size): v + 1 / (1 + size) for model, v in values.items() for size in (0, 5)},
    )


def draw(mean: float, seed: int) -> np.ndarray:
    """A value a task: tasks differ more than models do."""
    hard = np.random.default_rng(0).normal(size=30) * 0.3
    return np.abs(mean + hard + 0.05 * np.random.default_rng(seed).normal(size=30))


def run(name: str, seed: int, adapted: np.ndarray, baseline: np.ndarray, seconds: float | None = 60.0) -> Run:
    values = table({"adapted": adapted, "unadapted": adapted + 0.2, "median": baseline})
    facts = {"dataset_url": "/data", "dataset_fingerprint": "f", "baselines": {"rank": 8}}
    notes = ("Baselines are few.", f"{name} was tuned.")
    scores = Scores("made-up", 100 + seed, {PARTITION: "test users"}, {PARTITION: values}, notes, facts)
    entry = Entry(name, {"meta": {"steps": seed}}, Config())
    return Run(entry, seed, f"/out/runs/{name}-seed{seed}", "scored", "", scores, seconds)


def failed(name: str, seed: int = 0) -> Run:
    error = ConfigError("It is broken.", where="meta.algorithm", remedy="Mend it.")
    return Run(Entry(name, {}, error=error), seed, "/out", "failed", str(error))
