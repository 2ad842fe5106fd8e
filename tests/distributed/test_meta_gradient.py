"""The meta-gradient equals the float64 reference, at 1 and 2 ranks, whatever engine settings and sharding."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from gradients import TABLE_OPTIMIZER, TOLERANCE, assert_equal_gradients, sharded_gradients, share
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from meta_reference import Reference, made_up_batch, part_of, schema
from ranks import run_ranks

from metatrain.config import Config
from metatrain.data.batch import TaskBatch
from metatrain.data.schema import LabelKind
from metatrain.model.build import build_model
from metatrain.model.metamodel import MetaModel

ROWS = ("item", "genres", "likes", "hour")
LOSSES = ("squared", "absolute", "huber", "binary_cross_entropy")


@dataclass(frozen=True)
class Setting:
    """One point of the grid."""

    order: int
    rows: bool
    dedup: bool
    chunk: int
    loss: str = "squared"
    rates: str = "layer_step"
    adapt: tuple[str, ...] = ("*",)
    steps: int = 2
    decay: float = 0.0
    least_support: int = 0
    engine: str = "auto"
    norm: str = "none"

    @property
    def config(self) -> Config:
        return Config.model_validate(
            {
                "model": {
                    "hidden": (6, 5),
                    "activation": "tanh",
                    "norm": self.norm,
                    "dedup": self.dedup,
                    "init_scale": 0.5,
                },
                "meta": {
                    "order": self.order,
                    "adapt_rows": ROWS if self.rows else (),
                    "chunk": self.chunk,
                    "engine": self.engine,
                    "loss": self.loss,
                    "inner_loss": "squared" if self.loss == "absolute" else None,
                    "learned_rates": self.rates,
                    "adapt": self.adapt,
                    "steps": self.steps,
                    "rate": 0.05,
                },
                "train": {
                    "optimizer": {**TABLE_OPTIMIZER, "table_decay": self.decay},
                    "seed": 3,
                },
            }
        )

    @property
    def label(self) -> LabelKind:
        return LabelKind.CLICK if self.loss == "binary_cross_entropy" else LabelKind.RATING

    def batch(self, tasks: int = 6, seed: int = 5) -> TaskBatch:
        return made_up_batch(tasks, seed, click=self.label is LabelKind.CLICK, least_support=self.least_support)


def grid() -> list[Setting]:
    """First and second order × rows × dedup × chunks × engines, other settings taking turns; then some corners."""
    found = []
    for order in (1, 2):
        for rows in (False, True):
            for dedup in (False, True):
                for chunk in (0, 1, 3):
                    turn = len(found)
                    found.append(
                        Setting(
                            order, rows, dedup, chunk, LOSSES[turn % 4], ("layer_step", "none")[turn % 5 == 0],
                            (("*",), ("head.*",), ("layers.1.*", "head.bias"))[turn % 3], decay=0.01 * (turn % 2),
                            norm=("none", "layer")[turn // 3 % 2],
                        )
                    )  # fmt: skip
    return [
        *(replace(s, engine=engine) for s in found for engine in ("low_rank", "vmap")),
        Setting(2, True, True, 0, steps=0),
        Setting(2, True, True, 0, steps=4, least_support=2, engine="low_rank"),
        Setting(2, True, True, 0, steps=4, least_support=2, engine="vmap"),
        Setting(2, False, True, 0, rates="none", decay=0.1),
    ]


def model_of(setting: Setting, tables_device: str | None = None) -> MetaModel:
    """A model with larger dense weights than at the start, so that second derivatives matter."""
    model = build_model(schema(setting.label), setting.config, tables_device=tables_device)
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.meta.named_parameters():
            if name == "rates":
                parameter += 0.02 * torch.rand(parameter.shape, generator=draw)
            else:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


def gradients_on_rank(rank: int, world_size: int, points: list[Setting]) -> list[dict[str, Any]]:
    """Each setting's gradients, as the training step makes them."""
    found = []
    for number, setting in enumerate(points):
        whole, optimizer = setting.batch(), setting.config.train.optimizer
        mine = share(whole.size, number, rank, world_size)
        found.append(sharded_gradients(model_of(setting, "meta"), optimizer, whole, mine, world_size))
    return found


@functools.cache
def reference_of(setting: Setting, tasks: int = 6, seed: int = 5) -> tuple[dict[str, torch.Tensor], float, float]:
    """The same gradients from the reference, and the sums of the tasks' losses before and after."""
    batch = setting.batch(tasks, seed)
    model = model_of(setting)
    values = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    rates = values.get("meta.rates", model.meta.rates.double())
    reference = Reference(
        schema(setting.label),
        setting.config,
        {name.removeprefix("meta.learner."): v for name, v in values.items() if "learner" in name},
        rates,
        model.meta.rate_names,
        {name.split(".")[-2]: v for name, v in values.items() if name.startswith("tables.")},
    )
    reference.outer_loss(batch).backward()
    before, after = (float(torch.stack(losses).detach().sum()) for losses in reference.task_losses(batch))
    return {n: torch.zeros_like(v) if v.grad is None else v.grad for n, v in values.items()}, before, after


@pytest.fixture(scope="module", params=[1, 2], ids=["1rank", "2ranks"])
def by_ranks(request: pytest.FixtureRequest) -> list[list[dict[str, Any]]]:
    """All of the grid on so many ranks, launched once: results by rank, then by setting."""
    return run_ranks(gradients_on_rank, request.param, grid(), seconds=110)


@pytest.mark.parametrize("number", range(len(grid())), ids=lambda n: str(n))
def test_distributed_meta_gradient_equals_reference(by_ranks: list[list[dict[str, Any]]], number: int) -> None:
    setting = grid()[number]
    expected, before, after = reference_of(setting)
    for rank in by_ranks:
        assert_equal_gradients(rank[number]["gradients"], expected)
    parts = [rank[number] for rank in by_ranks]
    assert sum(float(p["before"]) for p in parts) == pytest.approx(before, rel=TOLERANCE)
    assert sum(float(p["after"]) for p in parts) == pytest.approx(after, rel=TOLERANCE)
    assert sum(float(p["gains"].sum()) for p in parts) == pytest.approx(before - after, rel=1e-4, abs=1e-4)
    if setting.steps and setting.batch().support_lengths.any():
        assert abs(before - after) > 1e-3, "this setting shows nothing: adaptation changes no score"


@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking takes minutes
@given(
    point=st.builds(
        Setting,
        order=st.sampled_from([1, 2]),
        rows=st.booleans(),
        dedup=st.booleans(),
        chunk=st.sampled_from([0, 1, 2, 3]),
        loss=st.sampled_from(LOSSES),
        rates=st.sampled_from(["none", "layer_step"]),
        adapt=st.sampled_from([("*",), ("head.*",), ("layers.0.weight",), ("*.bias",)]),
        steps=st.integers(0, 3),
        decay=st.sampled_from([0.0, 0.1]),
        engine=st.sampled_from(["low_rank", "vmap"]),
        norm=st.sampled_from(["none", "layer"]),
    ),
    tasks=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_unsharded_meta_gradient_equals_reference(point: Setting, tasks: int, seed: int) -> None:
    batch = point.batch(tasks, seed)
    model = model_of(point)
    model(batch.tensors(), 0, float(tasks)).loss.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    assert_equal_gradients(found, reference_of(point, tasks, seed)[0])


def test_reference_sees_second_order() -> None:
    # Guards the guard: the two orders differ by far more than the tolerance.
    first, second = (reference_of(Setting(order, False, True, 0))[0] for order in (1, 2))
    name = "meta.learner.layers.0.weight"
    assert float((first[name] - second[name]).norm()) > 100 * TOLERANCE * float(second[name].norm())


def test_batch_in_parts_is_the_batch() -> None:
    whole = made_up_batch(7, 5)
    parts = [part_of(whole, range(5)), part_of(whole, range(5, 7))]
    np.testing.assert_array_equal(np.concatenate([p.labels for p in parts]), whole.labels)
    items = np.concatenate([p.items[p.event_items] for p in parts])
    np.testing.assert_array_equal(items, whole.items[whole.event_items])
