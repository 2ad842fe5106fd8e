"""Every registered meta-learner's meta-gradient, at 1 and 2 ranks with sharded tables, equals that of an unsharded
float64 model of the same weights which takes the batch one task at a time.

Each method's own test holds its formula to a reference; here it is held to what the ranks, the shards, the buckets and
the padding must not change. A method is covered by being registered.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gradients import TABLE_OPTIMIZER, TOLERANCE, assert_equal_gradients, sharded_gradients, share
from meta_reference import made_up_batch, part_of, schema
from ranks import run_ranks
from torch import Tensor

from metatrain.config import Config, validated
from metatrain.data.batch import TaskBatch
from metatrain.data.schema import LabelKind
from metatrain.errors import ConfigError
from metatrain.learners import META_LEARNERS
from metatrain.meta.episode import Episodes, Examples
from metatrain.meta.learner import MetaLearner
from metatrain.model.build import build_model
from metatrain.model.construct import named
from metatrain.model.metamodel import MetaModel

#: Fields of `meta` for the methods whose constructor has the argument: inner steps that bend, and learned rates.
FIELDS = {"steps": {"steps": 2}, "rate": {"rate": 0.05}, "learn_rates": {"learned_rates": "layer_step"}}
#: Further options of a method that take another way through it.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "hypernetwork": [{"kind": "nonlinear_biases", "widths": (5,)}, {"kind": "full", "widths": (5,)}],
    "tanp": [{"latent": True}],
}
#: Options of a method in all its cases. iMAML grows rounding by the condition of its system, which λ bounds.
OPTIONS: dict[str, dict[str, Any]] = {"imaml": {"strength": 16.0}}
#: Method → why its meta-gradient can't be the sum of those of its tasks alone. None so far.
EXEMPT: dict[str, str] = {}
#: Method → why a task's loss is the same before and after in training.
UNADAPTED = {"joint": "it trains on all events as they come, and fine-tunes at test time alone"}


@dataclass(frozen=True)
class Case:
    """A meta-learner around a base learner; `rows`: embedding rows reach it task by task."""

    meta: str
    learner: str
    click: bool = False
    rows: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        marks = ("clicks",) * self.click + ("rows",) * self.rows + tuple(f"{k}={v}" for k, v in self.options)
        return "-".join((self.meta, self.learner, *marks))

    @property
    def size_weight(self) -> float:
        """What tasks count: around one base learner all the same, around the other by the root of their events."""
        return 0.5 if self.learner == "mlp" else 0.0

    @property
    def label(self) -> LabelKind:
        return LabelKind.CLICK if self.click else LabelKind.RATING

    @property
    def config(self) -> Config:
        arguments = arguments_of(self.meta)
        fields = {k: v for name, field in FIELDS.items() if name in arguments for k, v in field.items()}
        return validated(
            {
                "model": {"learner": self.learner, "hidden": [6], "activation": "tanh", "init_scale": 0.5},
                "meta": {
                    "algorithm": self.meta,
                    "loss": "binary_cross_entropy" if self.click else "squared",
                    "size_weight": self.size_weight,
                    "adapt_rows": ["genres", "item", "likes"] if self.rows else [],
                    "options": OPTIONS.get(self.meta, {}) | dict(self.options),
                    **fields,
                },
                "train": {"optimizer": TABLE_OPTIMIZER, "seed": 3},
            },
            where=str(self),
        )

    @property
    def batch(self) -> TaskBatch:
        return made_up_batch(6, 5, click=self.click)


def arguments_of(meta: str) -> set[str]:
    return set(inspect.signature(named(meta, META_LEARNERS, MetaLearner, "meta.algorithm")).parameters)


@functools.cache
def cases() -> list[Case]:
    """Around what represents and what need not, for ratings and clicks, with rows and without: what can be made."""
    found = []
    for meta in sorted(META_LEARNERS.keys() - EXEMPT.keys()):
        tried = [
            Case(meta, "factorisation"),
            Case(meta, "factorisation", click=True),
            Case(meta, "mlp"),
            *([Case(meta, "mlp", rows=True)] if "adapt_rows" in arguments_of(meta) else []),
        ]
        tried += [
            Case(meta, "mlp", click, options=tuple(options.items()))
            for options in VARIANTS.get(meta, [])
            for click in (False, True)
        ]
        found += [case for case in tried if can_be_made(case)]
    return found


def can_be_made(case: Case) -> bool:
    """Which pairs are refused, and why, is for tests/model/test_pairs.py."""
    try:
        build_model(schema(case.label), case.config, tables_device="meta")
    except ConfigError:
        return False
    return True


def model_of(case: Case, tables_device: str | None = None) -> MetaModel:
    """A model whose dense weights are far from the start, where second derivatives vanish."""
    model = build_model(schema(case.label), case.config, tables_device=tables_device)
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.meta.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            # Rates stay near theirs: steps that are too long make rounding grow.
            parameter += 0.01 * noise.abs() if "rate" in name else 0.2 * noise
    return model


def gradients_on_rank(rank: int, world_size: int, points: list[Case]) -> list[dict[str, Any]]:
    """Each case's gradients, as the training step makes them."""
    found = []
    for number, case in enumerate(points):
        mine = share(case.batch.size, number, rank, world_size)
        model, optimizer = model_of(case, "meta"), case.config.train.optimizer
        found.append(sharded_gradients(model, optimizer, case.batch, mine, world_size))
    return found


@functools.cache
def reference_of(case: Case) -> tuple[dict[str, Tensor], float, float]:
    """The gradients, and the sums of the losses before and after, of float64 and one task at a time."""
    batch, model = case.batch, model_of(case).double()
    tables = {name.split(".")[-2]: p for name, p in model.named_parameters() if name.startswith("tables.")}
    parts = []
    for task in range(batch.size):
        alone = part_of(batch, range(task, task + 1)).tensors()
        ids = model.featurizer.ids(alone)
        # By plain indexing: no lookup, no dedup.
        rows = {feature: tables[model.tables.table_of[feature].name][of] for feature, of in ids.items()}
        [assembled] = model.featurizer.assemble(alone, rows, ids)
        parts.append(model.meta(doubled(assembled.episodes)))
    counts = [len_of_query**case.size_weight for len_of_query in batch.query_lengths.tolist()]
    assert len(set(counts)) > 1 or not case.size_weight, "weights that are all alike change nothing"
    total = torch.stack([part.total * count for part, count in zip(parts, counts, strict=True)]).sum()
    (total / sum(counts)).backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return gradients, float(sum(part.before.sum() for part in parts)), float(sum(part.after.sum() for part in parts))


def doubled(episodes: Episodes) -> Episodes:
    """The same episodes in float64."""

    def of(examples: Examples) -> Examples:
        return Examples(examples.x.double(), examples.slots, examples.labels.double(), examples.mask.double())

    return Episodes(of(episodes.support), of(episodes.query), episodes.rows)


@pytest.fixture(scope="module", params=[1, 2], ids=["1rank", "2ranks"])
def by_ranks(request: pytest.FixtureRequest) -> list[list[dict[str, Any]]]:
    """All cases on so many ranks, launched once: results by rank, then by case."""
    return run_ranks(gradients_on_rank, request.param, cases(), seconds=110)


@pytest.mark.parametrize("number", range(len(cases())), ids=lambda n: str(cases()[n]))
def test_a_methods_distributed_meta_gradient_is_that_of_its_tasks_alone(
    by_ranks: list[list[dict[str, Any]]], number: int
) -> None:
    expected, before, after = reference_of(cases()[number])
    for rank in by_ranks:
        assert_equal_gradients(rank[number]["gradients"], expected)
    assert sum(float(rank[number]["before"]) for rank in by_ranks) == pytest.approx(before, rel=TOLERANCE)
    assert sum(float(rank[number]["after"]) for rank in by_ranks) == pytest.approx(after, rel=TOLERANCE)
    adapts = cases()[number].meta not in UNADAPTED
    assert (abs(before - after) > 1e-3) == adapts, "adaptation changes no score, or ought not to"


@pytest.mark.parametrize("number", range(len(cases())), ids=lambda n: str(cases()[n]))
def test_tables_and_dense_parameters_have_a_gradient(number: int) -> None:
    # Guards the guard: gradients of zero would agree.
    gradients = reference_of(cases()[number])[0]
    assert any(g.any() for name, g in gradients.items() if name.startswith("meta."))
    assert all(g.any() for name, g in gradients.items() if name.startswith("tables."))


def test_every_method_is_covered_or_exempt_for_a_reason() -> None:
    assert {case.meta for case in cases()} | EXEMPT.keys() == META_LEARNERS.keys()
    assert all([*EXEMPT.values(), *UNADAPTED.values()])
