"""What is measured of a partition: rows, draws, support sizes, and what is left out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from metatrain.config import EpisodeConfig, EvaluateConfig
from metatrain.data.batch import TaskBatch
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.schema import LabelKind, Schema
from metatrain.evaluate.protocols import PARTITIONS, Judge, draws_of, measure, partitions_of
from metatrain.evaluate.report import Report
from metatrain.evaluate.tasks import newest_support, padded

scipy_stats = pytest.importorskip("scipy.stats")

RATINGS = Schema(features=(), label=LabelKind.RATING, label_mean=3.5, label_deviation=1, label_min=1, label_max=5)
CLICKS = Schema(features=(), label=LabelKind.CLICK, label_mean=0.3, label_deviation=0.4, label_min=0, label_max=1)
RANDOM = EpisodeConfig(by="random", query_max=4)


def batch(tasks: list[int], seed: int, click: bool = False, skipped: int = 0) -> TaskBatch:
    """Each task with 3 support and 4 query events; items are 0 to 6."""
    generator = np.random.default_rng(seed)
    count = 7 * len(tasks)
    labels = generator.integers(0, 2, count) if click else generator.integers(1, 6, count)
    return TaskBatch(
        tasks=np.array(tasks, np.int64),
        support_lengths=np.full(len(tasks), 3),
        query_lengths=np.full(len(tasks), 4),
        items=np.arange(7),
        event_items=np.tile(np.arange(7), len(tasks)),
        labels=labels.astype(np.float32),
        timestamps=np.arange(count),
        skipped=skipped,
    )


def score_all(batch, tasks):
    """An oracle that overshoots the scale, and one that gives the number of support events."""
    return {
        "oracle": tasks.query_labels + np.where(tasks.query_labels >= 5, 9.0, 0.0),
        "sizes": np.broadcast_to(tasks.support_mask.sum(1)[:, None], tasks.query_labels.shape).astype(float),
        "order": -tasks.query_items.astype(float),
    }


def measured(schema=RATINGS, **settings):
    config = EvaluateConfig(episode=RANDOM, k=(1, 4), support_sizes=(0, 2), **settings)
    judge = Judge(schema, config)
    click = schema is CLICKS
    draws = []

    def batches(draw):
        draws.append(draw)
        return [batch([4, 9, 2], 10 * draw, click, skipped=2), batch([], 0), batch([7], 10 * draw + 1, click)]

    return measure(PARTITIONS[0], batches, score_all, judge, frozenset({"order"})), draws


def test_rows_count_tasks_and_draws():
    result, draws = measured(draws=3)
    assert draws == [0, 1, 2]
    assert {(r.tasks, r.draws) for r in result.rows if r.metric == "MAE"} == {(4, 3)}
    assert result.skipped == 2
    assert {r.partition for r in result.rows} == {"new users"}


def test_predictions_are_held_to_the_scale_and_ranked_as_they_are():
    rows = {(r.model, r.metric): r.value for r in measured()[0].rows}
    assert rows["oracle", "MAE"] == rows["oracle", "RMSE"] == 0.0
    assert rows["oracle", "nDCG@4"] == pytest.approx(1.0)
    assert rows["sizes", "AUC"] == 0.5


def test_an_order_alone_has_no_errors():
    result, _ = measured()
    assert {r.metric for r in result.rows if r.model == "order"} == {
        "AUC",
        "nDCG@1",
        "nDCG@4",
        "hit rate@1",
        "recall@1",
    }
    assert "order" not in {r.model for r in result.by_support_size}


def test_metrics_without_a_defined_task_are_left_out_and_noted():
    result, _ = measured()
    assert not [r for r in result.rows if r.metric in ("hit rate@4", "recall@4")]
    assert result.undefined == ("hit rate@4", "recall@4")


def test_the_curve_truncates_the_support_of_the_first_draw():
    result, _ = measured(draws=2)
    sizes = {r.support: r for r in result.by_support_size if r.model == "sizes"}
    assert set(sizes) == {0, 2}
    assert sizes[0].draws == 1
    assert sizes[2].metric == "MAE"
    # The scorer answers with the size of the support it was shown: errors of answering 1 (0 held to the scale) and 2.
    labels = np.concatenate([batch([4, 9, 2], 0).labels, batch([7], 1).labels]).reshape(4, 7)[:, 3:]
    assert sizes[0].value == pytest.approx(np.abs(labels - 1).mean())
    assert sizes[2].value == pytest.approx(np.abs(labels - 2).mean())


def test_small_supports_have_scorers_of_their_own():
    judge = Judge(RATINGS, EvaluateConfig(episode=RANDOM, support_sizes=(0,)))
    calls = []

    def of(value):
        def score(batch, tasks):
            calls.append((value, int(tasks.support_mask.sum(1).max())))
            return {"constant": np.full(tasks.query_labels.shape, value)}

        return score

    result = measure(PARTITIONS[0], lambda draw: [batch([1, 2], 0)], of(1.0), judge, score_small=of(5.0))
    assert calls == [(1.0, 3), (5.0, 0)]
    labels = batch([1, 2], 0).labels.reshape(2, 7)[:, 3:]
    assert next(r.value for r in result.rows if r.metric == "MAE") == pytest.approx(np.abs(labels - 1).mean())
    assert result.by_support_size[0].value == pytest.approx(np.abs(labels - 5).mean())


def test_the_adapted_model_is_compared_task_by_task():
    judge = Judge(RATINGS, EvaluateConfig(episode=RANDOM, support_sizes=(), confidence=0.9))
    tasks = [4, 9, 2, 7, 5]
    # Tasks differ far more than the models do: each model's own interval is wide, that of the difference narrow.
    spread = np.arange(5)[:, None] / 4

    def score(batch, padded):
        constant = np.ones(padded.query_labels.shape)
        better = padded.query_labels + constant * spread * np.where(padded.query_labels > 3, -1, 1)
        worse = better + (0.1 + 0.01 * spread) * np.where(padded.query_labels > 3, -1, 1)
        return {"adapted": better, "unadapted": worse, "bias": worse, "order": constant}

    result = measure(PARTITIONS[0], lambda draw: [batch(tasks, draw)], score, judge, frozenset({"order"}))
    rows = {r.against: r for r in result.paired if r.metric == "MAE"}
    assert set(rows) == {"unadapted", "bias"}
    assert {r.against for r in result.paired if r.metric == "nDCG@5"} == {"unadapted", "bias", "order"}
    row = rows["bias"]
    assert (row.model, row.partition, row.metric, row.tasks) == ("adapted", "new users", "MAE", 5)
    expected = -0.1 - 0.01 * spread[:, 0]
    assert row.value == pytest.approx(expected.mean())
    assert row.high - row.low == pytest.approx(2 * 2.131847 * expected.std(ddof=1) / math.sqrt(5), rel=1e-4)
    assert row.p == pytest.approx(scipy_stats.ttest_1samp(expected, 0.0).pvalue, rel=1e-6)
    own = next(r for r in result.rows if (r.model, r.metric) == ("adapted", "MAE"))
    assert own.high - own.low > 10 * (row.high - row.low)
    assert measured()[0].paired == ()  # no model named adapted


def test_any_two_models_are_compared_over_their_tasks_draws_averaged_first():
    result, _ = measured(draws=3)
    values = result.task_values
    assert values.tasks.tolist() == [2, 4, 7, 9]
    report = Report("d", "r", 0, {"confidence": 0.9}, result.rows, (), {}, task_values={"new users": values})
    # Each draw's values by hand: a task's labels in the order of `batch`.
    draws = [
        np.concatenate([batch([4, 9, 2], 10 * d).labels, batch([7], 10 * d + 1).labels]).reshape(4, 7)[:, 3:]
        for d in range(3)
    ]
    of = {
        "oracle": np.zeros(4),
        "sizes": np.mean([np.abs(labels - 3).mean(1) for labels in draws], axis=0),
    }
    found = report.paired("sizes", "oracle", "new users", "MAE")
    expected = scipy_stats.ttest_rel(of["sizes"], of["oracle"])
    assert found.value == pytest.approx(np.mean(of["sizes"]))
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6)
    assert report.paired("oracle", "sizes", "new users", "MAE").value == pytest.approx(-found.value)
    assert report.paired("oracle", "order", "new users", "nDCG@4").tasks == 4
    with pytest.raises(KeyError, match=r"models oracle, sizes, order; metrics MAE"):
        report.paired("oracle", "popularity", "new users", "MAE")


def test_ranking_metrics_are_those_of_the_configuration():
    result, _ = measured(metrics=("precision", "MAP"))
    assert {r.metric for r in result.rows} == {"MAE", "RMSE", "precision@1", "MAP@1", "MAP@4"}
    judge = Judge(RATINGS, EvaluateConfig(metrics=("nDCG",), k=(1, 3)))
    assert judge.headlines == ("MAE", "nDCG@1")
    assert Judge(RATINGS, EvaluateConfig()).headlines == ("MAE", "nDCG@5")
    assert Judge(CLICKS, EvaluateConfig(metrics=("AUC",))).headlines == ("AUC",)


def test_support_sizes_that_no_episode_has_are_left_out():
    assert Judge(RATINGS, EvaluateConfig()).support_sizes == (0, 1, 2, 5, 10, 20, 50)
    few = EvaluateConfig(episode=EpisodeConfig(support_max=10))
    assert Judge(RATINGS, few).support_sizes == (0, 1, 2, 5, 10)


def test_relevance_by_the_supports_mean_reads_no_query_label():
    tasks = padded(batch([1, 2, 3], 0))
    judge = Judge(RATINGS, EvaluateConfig(relevant="support mean"))
    means = tasks.support_labels.mean(1)
    assert judge.relevant(tasks).tolist() == [(q >= m).tolist() for q, m in zip(tasks.query_labels, means, strict=True)]
    bare = padded(newest_support(batch([1, 2, 3], 0), 0))
    assert judge.relevant(bare).tolist() == (bare.query_labels >= 3.5).tolist()
    assert Judge(CLICKS, EvaluateConfig(relevant="support mean")).relevant_from == 0.5


def test_training_users_on_existing_items_are_measured_on_demand_and_said_to_be_trained_on():
    assert partitions_of(EvaluateConfig()) == PARTITIONS
    fourth = partitions_of(EvaluateConfig(existing_users=True))[-1]
    assert (fourth.split, fourth.items) == (Split.TRAIN, ItemSet.EXISTING)
    assert "trained on" in fourth.words


def test_clicks_have_no_errors_and_a_curve_of_auc():
    result, _ = measured(CLICKS)
    assert not {"MAE", "RMSE"} & {r.metric for r in result.rows}
    assert {r.metric for r in result.by_support_size} == {"AUC"}
    assert {r.model for r in result.by_support_size} == {"oracle", "sizes", "order"}


def test_a_partition_without_eligible_tasks_is_left_out_with_a_note():
    judge = Judge(RATINGS, EvaluateConfig())
    result = measure(PARTITIONS[1], lambda draw: [batch([], 0, skipped=12)], score_all, judge)
    assert result.rows == ()
    assert "new items: left out" in result.notes[0]
    assert "12" in result.notes[0]


def test_scores_that_are_not_finite_are_refused():
    judge = Judge(RATINGS, EvaluateConfig())

    def broken(batch, tasks):
        return {"broken": np.where(tasks.query_items == 5, np.nan, 3.0)}

    with pytest.raises(ValueError, match="broken"):
        measure(PARTITIONS[0], lambda draw: [batch([1], 0)], broken, judge)


@pytest.mark.parametrize(("episode", "draws"), [(EpisodeConfig(), 1), (RANDOM, 5), (EpisodeConfig(cut="uniform"), 5)])
def test_draws_where_nothing_is_drawn(episode, draws):
    assert draws_of(EvaluateConfig(episode=episode, draws=5)) == draws


def test_gains_of_other_scales_are_mapped():
    wide = Judge(RATINGS.model_copy(update={"label_min": -10.0, "label_max": 90.0}), EvaluateConfig())
    assert wide.gains(np.array([-10.0, 40.0, 90.0])) == pytest.approx([0.0, 2**2.5 - 1, 31.0])
    assert Judge(RATINGS, EvaluateConfig()).gains(np.array([1.0, 5.0])).tolist() == [1.0, 31.0]


def test_relevant_is_the_training_mean_unless_set():
    assert Judge(RATINGS, EvaluateConfig()).relevant_from == 3.5
    assert Judge(RATINGS, EvaluateConfig(relevant=4)).relevant_from == 4
    assert Judge(CLICKS, EvaluateConfig()).relevant_from == 0.5
