"""The leaderboard of a comparison: `leaderboard.json`, `.md`, `.txt` and `.png`.

`leaderboard.json` holds `name`, `dataset`, `configuration` (of the evaluation), `facts`, `notes`, `entries` (each run:
its seed, status, why it has no scores, its resolved configuration), `rows` and `by_support_size`. A row is one of
evaluation.json with, besides: `seeds`; `seed_deviation`, the standard deviation of the seeds' values (null with one);
`train_seconds`, the mean of the seeds'; `configuration`, what the entry changes; `best`; and `p_to_best`, the two-sided
p-value of a paired t-test over tasks against the best row of that metric. Baselines are rows once.

With several seeds a row's value is their mean, and its interval covers tasks: a task's values are averaged over seeds
first. A row is not distinguishable from the best where `p_to_best` is at least 0.01.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from metatrain.compare.entries import Comparison
from metatrain.compare.runs import Run
from metatrain.compare.scores import Scores, joined, over_seeds
from metatrain.config import EvaluateConfig
from metatrain.evaluate.protocols import Judge, rows_of
from metatrain.evaluate.report import ADAPTED, ERRORS, UNADAPTED, Row, SizeRow, finite
from metatrain.evaluate.task_values import TaskValues, estimate_of

JSON_FILE, PLOT_FILE = "leaderboard.json", "leaderboard.png"
MARKDOWN_FILE, TABLE_FILE = "leaderboard.md", "leaderboard.txt"
#: A difference from the best row with a p-value of at least this may be chance.
LEAST_P = 0.01


@dataclass(frozen=True)
class BoardRow(Row):
    """One figure of the leaderboard."""

    seeds: tuple[int, ...] = ()
    seed_deviation: float = math.nan
    train_seconds: float | None = None
    configuration: Mapping[str, Any] = field(default_factory=dict)
    best: bool = False
    p_to_best: float = math.nan

    @property
    def distinguishable(self) -> bool:
        """Whether the row's distance from the best is more than chance would give."""
        return not self.best and self.p_to_best < LEAST_P


@dataclass(frozen=True)
class Leaderboard:
    """What a comparison found."""

    name: str
    evaluate: EvaluateConfig
    judge: Judge
    runs: tuple[Run, ...]
    minutes: float = 0.0

    @classmethod
    def of(cls, comparison: Comparison, judge: Judge, runs: Sequence[Run]) -> Leaderboard:
        """Of a comparison's runs, whatever became of them."""
        return cls(comparison.name, comparison.evaluate, judge, tuple(runs), comparison.minutes)

    @property
    def failed(self) -> bool:
        """Whether any run failed."""
        return any(run.status == "failed" for run in self.runs)

    @property
    def missing(self) -> tuple[Run, ...]:
        """Runs without scores: failed, or beyond the budget."""
        return tuple(run for run in self.runs if run.scores is None)

    @cached_property
    def scored(self) -> dict[str, tuple[Run, ...]]:
        """Entry → its runs that have scores, in the order of the entries."""
        names = dict.fromkeys(run.entry.name for run in self.runs)
        of = {name: tuple(r for r in self.runs if r.entry.name == name and r.scores is not None) for name in names}
        return {name: runs for name, runs in of.items() if runs}

    @cached_property
    def partitions(self) -> dict[str, str]:
        """Partition → what it is made of."""
        return {name: words for scores in self._scores() for name, words in scores.partitions.items()}

    @cached_property
    def values(self) -> dict[str, TaskValues]:
        """Partition → values task by task, averaged over seeds, of entries, their unadapted selves, and baselines."""
        found = {}
        for partition in self.partitions:
            parts = [
                over_seeds([_of(run).values[partition] for run in runs], {ADAPTED: name, UNADAPTED: _unadapted(name)})
                for name, runs in self.scored.items()
            ]
            first = next(iter(self._scores()))
            baselines = over_seeds([first.values[partition]], {name: name for name in first.models()})
            found[partition] = joined([*parts, baselines])
        return found

    @cached_property
    def rows(self) -> tuple[BoardRow, ...]:
        """All figures, partition by partition."""
        return tuple(
            row
            for partition, values in self.values.items()
            for row in self._with_best(values, rows_of(partition, values, self.judge)[0])
        )

    @cached_property
    def by_support_size(self) -> tuple[SizeRow, ...]:
        """The curves' points."""
        return tuple(
            row for partition, values in self.values.items() for row in rows_of(partition, values, self.judge)[1]
        )

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What holds for all entries once, then what holds for one."""
        each = {name: [n for run in runs for n in _of(run).notes] for name, runs in self.scored.items()}
        common = [n for n in next(iter(each.values()), []) if all(n in notes for notes in each.values())]
        own = [f"{name}: {n}" for name, notes in each.items() for n in dict.fromkeys(notes) if n not in common]
        return (*dict.fromkeys(common), *own)

    def to_json(self) -> str:
        """What `leaderboard.json` holds."""
        first = next(iter(self._scores()), None)
        content = {
            "name": self.name,
            "dataset": first.dataset if first else "",
            "configuration": self.evaluate.model_dump(mode="json"),
            "facts": {
                "minutes": self.minutes or None,
                "least_p": LEAST_P,
                "relevant_from": self.judge.relevant_from,
                **({n: first.facts[n] for n in ("dataset_url", "dataset_fingerprint", "baselines")} if first else {}),
            },
            "notes": list(self.notes),
            "entries": [_described(run) for run in self.runs],
            "rows": [finite(asdict(row)) for row in self.rows],
            "by_support_size": [finite(asdict(row)) for row in self.by_support_size],
        }
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)

    def _scores(self) -> list[Scores]:
        return [_of(run) for runs in self.scored.values() for run in runs]

    def _with_best(self, values: TaskValues, rows: Sequence[Row]) -> list[BoardRow]:
        best: dict[str, Row] = {}
        for row in rows:
            sign = 1 if row.metric in ERRORS else -1
            if row.metric not in best or sign * row.value < sign * best[row.metric].value:
                best[row.metric] = row
        return [self._board_row(values, row, best[row.metric]) for row in rows]

    def _board_row(self, values: TaskValues, row: Row, best: Row) -> BoardRow:
        difference = values.paired(row.model, best.model, row.metric, self.evaluate.confidence)
        entry = next((name for name in self.scored if row.model in (name, _unadapted(name))), None)
        runs = self.scored[entry] if entry else ()
        own = ADAPTED if row.model == entry else UNADAPTED
        each = [
            estimate_of(_of(run).values[row.partition].of(own, row.metric), row.metric, self.evaluate.confidence).value
            for run in runs
        ]
        seconds = [run.train_seconds for run in runs if run.train_seconds is not None]
        return BoardRow(
            **asdict(row),
            seeds=tuple(run.seed for run in runs),
            seed_deviation=statistics.stdev(each) if len(each) > 1 else math.nan,
            train_seconds=sum(seconds) / len(seconds) if seconds else None,
            configuration=runs[0].entry.configuration if runs else {},
            best=row.model == best.model,
            p_to_best=difference.p,
        )


def _unadapted(name: str) -> str:
    return f"{name}, unadapted"


def _of(run: Run) -> Scores:
    assert run.scores is not None, "only runs with scores are asked"
    return run.scores


def _described(run: Run) -> dict[str, Any]:
    config = run.entry.config
    return {
        "name": run.entry.name,
        "seed": run.seed,
        "run": run.url,
        "status": run.status,
        "why": run.why or None,
        "checkpoint": run.scores.checkpoint if run.scores else None,
        "train_seconds": run.train_seconds,
        "fine_tuning": run.scores.facts.get("fine_tuning") if run.scores else None,
        "changes": run.entry.configuration,
        "configuration": config.model_dump(mode="json") if config else None,
    }
