"""Features: padding, dropout, a task's own rows, and candidates outside its events."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from metatrain.config import Config, ModelConfig
from metatrain.data import randomness
from metatrain.data.batch import Ragged, TaskBatch
from metatrain.data.schema import Feature, Kind, LabelKind, Level, Schema
from metatrain.errors import ConfigError, DatasetError
from metatrain.meta import buckets
from metatrain.meta.episode import Episodes, Examples
from metatrain.meta.maml import MAML
from metatrain.model import hashing
from metatrain.model.build import build_model
from metatrain.model.choices import TableSpec
from metatrain.model.features import Featurizer
from metatrain.model.learners.mlp import MLP
from metatrain.model.metamodel import MetaModel
from metatrain.model.places import candidate_slots
from metatrain.model.tables import Tables

SCHEMA = Schema(
    features=(
        Feature(name="item", level=Level.ITEM, kind=Kind.CATEGORICAL, table="item", rows=50, width=3),
        Feature(name="genres", level=Level.ITEM, kind=Kind.MULTI, table="genre", rows=6, width=2),
        Feature(name="year", level=Level.ITEM, kind=Kind.NUMERIC),
        Feature(name="likes", level=Level.TASK, kind=Kind.MULTI, table="genre", rows=6, width=2),
        Feature(name="place", level=Level.EVENT, kind=Kind.VECTOR, width=2),
    ),
    label=LabelKind.RATING,
    label_mean=3.0,
    label_deviation=1.0,
    label_min=1.0,
    label_max=5.0,
)


def two_tasks() -> TaskBatch:
    """Task 0: support items A B, query C; task 1: no support, query A A. Items A, B, C are rows 10, 20, 30."""
    return TaskBatch(
        tasks=np.array([4, 9]),
        support_lengths=np.array([2, 0]),
        query_lengths=np.array([1, 2]),
        items=np.array([10, 20, 30]),
        event_items=np.array([0, 1, 2, 0, 0]),
        labels=np.array([5.0, 1.0, 4.0, 2.0, 3.0], np.float32),
        timestamps=np.zeros(5, np.int64),
        task_features={"likes": Ragged(np.array([1, 2]), np.array([2, 0]))},
        item_features={
            "item": np.array([7, 8, 9]),
            "genres": Ragged(np.array([3, 4, 4]), np.array([2, 0, 1])),
            "year": np.array([0.5, -0.5, 1.5], np.float32),
        },
        event_features={"place": np.arange(10, dtype=np.float32).reshape(5, 2)},
    ).tensors()


def assembled(adapt_rows: tuple[str, ...] = ()):
    featurizer = Featurizer(SCHEMA, ModelConfig(numeric_scale=0.5), adapt_rows)
    tables = Tables(featurizer.table_specs(), dedup=True, seed=1, scale=1.0)
    batch = two_tasks()
    ids = featurizer.ids(batch)
    rows = tables(ids)
    weights = {n.split(".")[-2]: w.detach() for n, w in tables.named_parameters()}
    (whole,) = featurizer.assemble(batch, rows, ids)
    return featurizer, whole, weights


def test_inputs_are_task_then_item_then_event_features() -> None:
    featurizer, found, rows = assembled()
    episodes = found.episodes
    assert featurizer.width == 2 + 3 + 2 + 1 + 2 == episodes.support.x.shape[-1]
    assert episodes.support.x.shape[:2] == (2, 2)
    assert episodes.query.x.shape[:2] == (2, 2)
    likes, genre = rows["genre"][[1, 2]].mean(0), rows["genre"][[3, 4]].mean(0)
    expected = torch.cat([likes, rows["item"][7], genre, 0.5 * torch.tensor([0.5, 0.0, 1.0])])
    torch.testing.assert_close(episodes.support.x[0, 0], expected)
    # B has no genre and task 1 likes nothing: zeros, not the unknown row.
    torch.testing.assert_close(episodes.support.x[0, 1, 5:7], torch.zeros(2))
    torch.testing.assert_close(episodes.query.x[1, :, :2], torch.zeros(2, 2))
    torch.testing.assert_close(episodes.query.x[1, 1, 8:], 0.5 * torch.tensor([8.0, 9.0]))


def test_padding_is_masked_and_zero() -> None:
    episodes = assembled()[1].episodes
    assert episodes.support.mask.tolist() == [[1, 1], [0, 0]]
    assert episodes.query.mask.tolist() == [[1, 0], [1, 1]]
    assert episodes.query.labels.tolist() == [[4, 0], [2, 3]]
    for side in (episodes.support, episodes.query):
        assert not side.x[side.mask == 0].any()


def test_adapted_rows_are_each_tasks_distinct_ids() -> None:
    featurizer, found, rows = assembled(("genres", "item", "likes"))
    episodes = found.episodes
    assert episodes.support.x.shape[-1] == 1 + 2  # year and place are all that is left
    assert featurizer.width == 10
    torch.testing.assert_close(episodes.rows["item"][0], rows["item"][[7, 8, 9]])
    torch.testing.assert_close(episodes.rows["item"][1], torch.stack([rows["item"][7], *torch.zeros(2, 3)]))
    assert found.row_ids["genres"][0].tolist() == [3, 4]
    # Event A uses both rows of task 0, event B none, the query C the second.
    slots = episodes.support.slots["genres"]
    assert (slots.index[0, 0] * slots.mask[0, 0]).tolist() == [0, 1]
    assert slots.mask[0].tolist() == [[1, 1], [0, 0]]
    assert episodes.query.slots["genres"].index[0, 0, 0] == 1
    assert episodes.query.slots["likes"].mask[0].tolist() == [[1, 1], [1, 1]]


def tasks_of_all_lengths(tasks: int, seed: int) -> TaskBatch:
    draw = np.random.default_rng(seed)
    support, query = draw.integers(0, 30, tasks), draw.integers(1, 8, tasks)
    events = int((support + query).sum())
    genres = draw.integers(0, 3, 40)
    likes = draw.integers(0, 3, tasks)
    return TaskBatch(
        tasks=np.arange(tasks),
        support_lengths=support,
        query_lengths=query,
        items=np.arange(40),
        event_items=draw.integers(0, 40, events),
        labels=draw.normal(size=events),
        timestamps=np.zeros(events, np.int64),
        task_features={"likes": Ragged(draw.integers(0, 6, likes.sum()), likes)},
        item_features={
            "item": np.arange(40) % 37,
            "genres": Ragged(draw.integers(0, 6, genres.sum()), genres),
            "year": draw.normal(size=40).astype(np.float32),
        },
        event_features={"place": draw.normal(size=(events, 2)).astype(np.float32)},
    ).tensors()


@pytest.mark.parametrize("adapt_rows", [(), ("item", "genres", "likes")])
@pytest.mark.parametrize("engine", ["auto", "vmap"])
def test_buckets_change_nothing_but_padding(
    adapt_rows: tuple[str, ...], engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of({"meta": {"adapt_rows": adapt_rows, "steps": 2, "rate": 0.1, "engine": engine}})
    batch = tasks_of_all_lengths(37, 0)
    found, shapes = [], []
    for cuts in ("one", "many"):
        seconds = (lambda t, s, q: t * (s + q)) if cuts == "many" else (lambda t, s, q: 1.0)
        monkeypatch.setattr(model.meta, "buckets", lambda s, q, *_, seconds=seconds: buckets.cut(s, q, seconds))
        shapes.append(len(model.meta.buckets(batch.support_lengths, batch.query_lengths, 0, {})))
        output = model(batch, 3, float(batch.size))
        gradients = torch.autograd.grad(output.loss, list(model.parameters()))
        before, after, mask = model.adapted_scores(batch)
        found.append((output.loss, output.gains, *gradients, before * mask, after * mask, mask))
    assert shapes[0] == 1 < 4 < shapes[1]
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-6 * float(one.detach().abs().max()))


def test_buckets_give_the_gradient_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    # The tables are of float32; what buckets may change is behind them.
    found = []
    for cuts in ("one", "many"):
        seconds = (lambda t, s, q: t * (s + q)) if cuts == "many" else (lambda t, s, q: 1.0)
        torch.manual_seed(0)
        maml = MAML(MLP(5, (4,)), steps=3, rate=0.1, learn_rates=True, engine="auto").double()
        draw = torch.Generator().manual_seed(1)
        support, query = (torch.randint(low, 20, (33,), generator=draw) for low in (0, 1))
        x = [torch.randn(33, 24, 5, dtype=torch.float64, generator=draw, requires_grad=True) for _ in range(2)]
        y = [torch.randn(33, 24, dtype=torch.float64, generator=draw) for _ in range(2)]
        total = torch.zeros((), dtype=torch.float64)
        for bucket in buckets.cut(support, query, seconds):
            sides = [
                Examples(
                    x[i][bucket.tasks, :n],
                    {},
                    y[i][bucket.tasks, :n],
                    (torch.arange(n) < of[bucket.tasks, None]).double(),
                )
                for i, (n, of) in enumerate(((bucket.support, support), (bucket.query, query)))
            ]
            total = total + maml(Episodes(*sides, {})).total
        found.append((total, *torch.autograd.grad(total, [*x, *maml.parameters()])))
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-12, atol=1e-12 * float(one.detach().abs().max()))


def test_results_do_not_depend_on_the_order_of_tasks() -> None:
    model = model_of({"meta": {"steps": 2, "rate": 0.1}})
    batch = tasks_of_all_lengths(61, 2)
    order = torch.randperm(61, generator=torch.Generator().manual_seed(0))
    lengths = batch.support_lengths + batch.query_lengths
    events = [e for t, n in zip(lengths.cumsum(0) - lengths, lengths, strict=True) for e in [torch.arange(t, t + n)]]
    likes = batch.task_features["likes"]
    values = likes.values.split(likes.lengths.tolist())
    moved = torch.cat([events[t] for t in order])
    other = replace(
        batch,
        support_lengths=batch.support_lengths[order],
        query_lengths=batch.query_lengths[order],
        event_items=batch.event_items[moved],
        labels=batch.labels[moved],
        task_features={"likes": Ragged(torch.cat([values[t] for t in order]), likes.lengths[order])},
        event_features={"place": batch.event_features["place"][moved]},
    )
    one, two = model(batch, 0, 61.0), model(other, 0, 61.0)
    torch.testing.assert_close(two.gains, one.gains[order], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.adapted_scores(other).after, model.adapted_scores(batch).after[order])


def test_id_dropout_depends_on_seed_step_and_item_alone() -> None:
    featurizer = Featurizer(SCHEMA, ModelConfig(id_dropout=0.3), seed=8)
    items = torch.arange(2000)
    batch = replace(two_tasks(), items=items)
    batch.item_features["item"] = torch.ones(2000, dtype=torch.int64)
    hidden = featurizer.ids(batch, step=5)["item"] == 0
    assert 0.26 < hidden.float().mean() < 0.34
    assert not (featurizer.ids(batch)["item"] == 0).any()
    assert not torch.equal(hidden, featurizer.ids(batch, step=6)["item"] == 0)
    some = replace(batch, items=items[500:700], item_features={**batch.item_features, "item": torch.ones(200).long()})
    assert torch.equal(featurizer.ids(some, step=5)["item"] == 0, hidden[500:700])


def test_hidden_supports_depend_on_seed_step_and_task_alone() -> None:
    batch = two_tasks()  # only the first has a support
    model = model_of({"model": {"support_dropout": 0.5}, "meta": {"algorithm": "maml", "steps": 1, "rate": 0.3}})

    def hidden(batch: TaskBatch) -> list[bool]:
        return [bool(model(batch, step, 2.0).gains[0] == 0) for step in range(30)]

    found = hidden(batch)
    assert 7 < sum(found) < 23
    assert hidden(batch) == found
    assert hidden(replace(batch, tasks=torch.tensor([5, 9]))) != found
    assert hidden(replace(batch, tasks=torch.tensor([4, 8]))) == found
    model.eval()  # what validates and serves sees all
    assert not any(hidden(batch))


@pytest.mark.parametrize("adapt_rows", [(), ("item", "genres", "likes")])
def test_scoring_items_equals_scoring_them_as_a_query(adapt_rows: tuple[str, ...]) -> None:
    # Items of the support (their rows adapted) and items the task has never met, in one list of candidates.
    model = model_of({"meta": {"adapt_rows": adapt_rows, "steps": 2, "rate": 0.3}})
    batch = two_tasks()
    batch.event_features["place"].zero_()
    adapted = model.adapt(replace(batch, query_lengths=torch.zeros(2).long(), event_items=batch.event_items[:2],
                                  labels=batch.labels[:2], event_features={"place": torch.zeros(2, 2)}))  # fmt: skip
    scores = model.score_items(adapted, batch.item_features)
    assert scores.shape == (2, 3)
    found = model.adapted_scores(batch)
    torch.testing.assert_close(scores[0, 2], found.after[0, 0])
    torch.testing.assert_close(scores[1, 0], found.after[1, 1])
    as_query = model.adapted_scores(
        replace(
            batch,
            query_lengths=torch.tensor([3, 0]),
            event_items=torch.tensor([0, 1, 0, 1, 2]),
        )
    )
    torch.testing.assert_close(scores[0], as_query.after[0])
    unadapted = model.score_items(model.adapt(batch, adapted=False), batch.item_features)
    torch.testing.assert_close(unadapted[0], as_query.before[0])
    assert (unadapted[0] - scores[0]).abs().min() > 1e-4


def test_candidate_without_own_row_uses_the_shared_one() -> None:
    row_ids = torch.tensor([[3, 5], [5, torch.iinfo(torch.int64).max]])
    slots = candidate_slots(row_ids, torch.tensor([5, 3, 9]), torch.tensor([1, 0, 2]))
    assert slots.mask.tolist() == [[[1, 0], [0, 0], [1, 1]]] * 2
    assert slots.index[0, [0, 2, 2], [0, 0, 1]].tolist() == [1, 0, 4]
    assert slots.index[1, [0, 2, 2], [0, 0, 1]].tolist() == [0, 3, 4]


def test_scores_without_any_event() -> None:
    model = model_of({"meta": {"adapt_rows": ("item", "genres")}})
    nobody = replace(
        two_tasks(), support_lengths=torch.zeros(2).long(), query_lengths=torch.zeros(2).long(),
        event_items=torch.zeros(0).long(), labels=torch.zeros(0), timestamps=torch.zeros(0).long(),
        items=torch.zeros(0).long(), event_features={"place": torch.zeros(0, 2)},
        item_features={"item": torch.zeros(0).long(), "genres": Ragged(torch.zeros(0).long(), torch.zeros(0).long()),
                       "year": torch.zeros(0)},
    )  # fmt: skip
    assert torch.isfinite(model.score_items(model.adapt(nobody), two_tasks().item_features)).all()


def test_unknown_features_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'genres'"):
        Featurizer(SCHEMA, ModelConfig(features=("item", "genre")))
    with pytest.raises(ConfigError, match="no feature of this name"):
        Featurizer(SCHEMA, ModelConfig(features=("item",)), ("genres",))
    with pytest.raises(ConfigError, match="no embedding rows"):
        Featurizer(SCHEMA, ModelConfig(), ("year",))


def test_patterns_and_losses_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"layers\.0\.weight"):
        model_of({"meta": {"adapt": ("neck.*",)}})
    with pytest.raises(ConfigError, match="for clicks"):
        model_of({"meta": {"loss": "binary_cross_entropy"}})


def test_start_is_the_mean_whatever_the_dtype() -> None:
    for precision in ("float32", "bfloat16"):
        model = model_of({"train": {"precision": precision}, "model": {"init_scale": 1e-4}})
        found = model.adapted_scores(two_tasks())
        assert found.before[0, 0] == pytest.approx(3.0, abs=0.4)
        assert found.after.dtype == torch.float32


def test_ids_outside_a_table_are_refused() -> None:
    tables = Tables([TableSpec("a", 4, 2, ("f",))], dedup=False)
    with pytest.raises(DatasetError, match="4 rows"):
        tables({"f": torch.tensor([0, 4])})
    with pytest.raises(DatasetError, match="got: -1"):
        tables({"f": torch.tensor([-1])})


def test_initial_rows_are_nearly_normal_and_the_unknown_one_is_zero() -> None:
    tables = Tables([TableSpec("a", 5000, 8, ("f",)), TableSpec("b", 5000, 8, ("g",))], dedup=True, seed=3, scale=0.2)
    a, b = (p.detach() for p in tables.parameters())
    assert not a[0].any()
    assert a.mean() == pytest.approx(0, abs=0.004)
    assert a.std() == pytest.approx(0.2, rel=0.02)
    assert (a.abs() > 0.4).float().mean() == pytest.approx(0.0455, abs=0.006)
    assert torch.corrcoef(torch.stack([a[1:].flatten(), b[1:].flatten()]))[0, 1].abs() < 0.02


def test_hashes_are_those_of_the_data_room() -> None:
    counters = np.arange(-3, 1000)
    expected = randomness.hashed(7, 2**63 + 5, counters).view(np.int64)
    assert torch.equal(hashing.hashed(7, 2**63 + 5, torch.from_numpy(counters)), torch.from_numpy(expected))


def test_same_seed_same_model_and_no_trace_in_the_generator() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, other = (model_of({"train": {"seed": seed}}).state_dict() for seed in (4, 4, 5))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not torch.equal(first["meta.learner.layers.0.weight"], other["meta.learner.layers.0.weight"])
    sharded_later = build_model(SCHEMA, Config.model_validate({"train": {"seed": 4}}), tables_device="meta")
    assert all(torch.equal(first[n], v) for n, v in sharded_later.state_dict().items() if not v.is_meta)


def model_of(raw: dict) -> MetaModel:
    return build_model(SCHEMA, Config.model_validate(raw))
