"""Settings of adaptation that training leaves open, chosen on validation tasks: never on what is reported.

A jointly trained model knows nothing of the fine-tuning that follows. What comparison owes it is the best steps and
rate of a grid, as the baselines are given their best shrinkage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from metatrain.data.batch import TaskBatch
from metatrain.evaluate.protocols import Judge
from metatrain.evaluate.tasks import padded
from metatrain.recommend.recommender import Recommender


@dataclass(frozen=True)
class Choice:
    """What was chosen, and what the reader of the table should know."""

    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def choose_adaptation(recommender: Recommender, batches: Sequence[TaskBatch], judge: Judge) -> Choice:
    """Gives the meta-learner the candidate that serves validation tasks best; from then on the recommender has it.

    Args:
        recommender: Its meta-learner may have `candidates`; without any, nothing happens.
        batches: The validation tasks.
        judge: What is better.
    """
    meta = recommender.model.meta
    candidates = list(meta.candidates())
    if not candidates:
        return Choice()
    if not batches:
        return Choice(notes=("No validation task: the fine-tuning has the recipe's steps and rate.",))
    tasks = [padded(batch) for batch in batches]
    losses = []
    for candidate in candidates:
        meta.choose(candidate)
        with np.errstate(over="ignore", invalid="ignore"):  # of rates that are too steep
            scores = [recommender.scores(batch).after for batch in batches]
            finite = all(np.isfinite(s[t.query_mask]).all() for s, t in zip(scores, tasks, strict=True))
            values = [judge.loss(s, t) for s, t in zip(scores, tasks, strict=True)] if finite else []
        each = np.concatenate(values) if values else np.full(1, np.nan)
        losses.append(np.inf if np.isnan(each).all() else float(np.nanmean(each)))
    best = int(np.argmin(losses))
    chosen = dict(candidates[best])
    meta.choose(chosen)
    words = ", ".join(f"{name} {value:g}" for name, value in chosen.items())
    note = (
        f"Fine-tuning was chosen on validation users: {words}, the best of {len(candidates)} by {judge.curve_metric}. "
        "`metatrain recommend` adapts by the recipe's `meta.steps` and `meta.rate`."
    )
    tried = [dict(candidate) for candidate in candidates]
    return Choice({"chosen": chosen, "of": tried, "by": judge.curve_metric}, (note,))
