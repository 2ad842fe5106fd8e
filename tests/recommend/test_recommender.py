"""Rankings and explanations against scores of whole batches; evaluation through the recommender."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from metatrain.checkpoint.identity import identity
from metatrain.config import to_yaml
from metatrain.data.assemble import batch_from_events
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.reader import iterate
from metatrain.data.schema import LabelKind
from metatrain.errors import CheckpointError, RequestError
from metatrain.evaluate.evaluation import evaluate_recommender
from metatrain.recommend import adapted as adapted_module
from metatrain.recommend import recommender as recommender_module
from metatrain.recommend import rendering
from metatrain.recommend.adapted import Recommendation
from metatrain.recommend.recommender import Recommender

EVENTS = [
    {"user": "ann", "item": "item3", "label": 5, "timestamp": 30, "zip": "z1", "shade": "red"},
    {"user": "ben", "item": "item7", "label": 1, "timestamp": 10, "zip": "z2", "shade": "blue"},
    {"user": "ann", "item": "item4", "label": 2, "timestamp": 20, "zip": "z1", "shade": None},
    {"user": "ann", "item": "item9", "label": 4, "timestamp": 40, "zip": "z1", "shade": "green"},
]


def whole_catalogue(recommender: Recommender, adapted, task: int, kept=None) -> tuple[np.ndarray, np.ndarray]:
    """Scores of all items for one user by the path that evaluation takes: support and query in one batch."""
    requests, dataset = adapted.requests, recommender.dataset
    count = len(dataset.catalogue)
    support = requests.supports[task]
    kept = np.arange(len(support[0])) if kept is None else kept
    start = sum(len(s[0]) for s in requests.supports[:task])
    context = {}
    for name, column in requests.event_features.items():
        rows = np.asarray(column)[start + kept]
        context[name] = np.concatenate([rows, np.zeros((count, *rows.shape[1:]), rows.dtype)])
    people = {name: np.asarray(column)[[task]] for name, column in requests.task_features.items()}
    support = tuple(column[kept] for column in support)
    scores = recommender.scores(batch_from_events(dataset, [support], [np.arange(count)], people, context))
    return scores.before[0], scores.after[0]


@pytest.mark.parametrize(("items", "pairs"), [(8192, 65536), (7, 10), (4, 1)])
def test_top_is_the_order_of_the_scores_in_any_pieces(recommender, monkeypatch, items, pairs):
    monkeypatch.setattr(adapted_module, "ITEMS_AT_A_TIME", items)
    monkeypatch.setattr(adapted_module, "PAIRS_AT_A_TIME", pairs)
    adapted = recommender.adapt(EVENTS)
    assert adapted.users == ["ann", "ben"]
    seen = {"ann": {"item3", "item4", "item9"}, "ben": {"item7"}}
    keys = recommender.dataset.catalogue.keys
    for task, user in enumerate(adapted.users):
        for scores, ranking in zip(
            whole_catalogue(recommender, adapted, task),
            (adapted.unadapted.top(5)[task], adapted.top(5)[task]),
            strict=True,
        ):
            expected = [i for i in np.argsort(-scores, kind="stable") if keys[i] not in seen[user]][:5]
            assert [line.item for line in ranking] == [keys[i] for i in expected]
            assert [line.score for line in ranking] == pytest.approx(scores[expected], rel=1e-4)
    # Something was adapted, or the test would prove little.
    assert adapted.top(5) != adapted.unadapted.top(5)


def test_seen_items_are_kept_on_request_and_never_shown_otherwise(recommender):
    adapted = recommender.adapt(EVENTS)
    count = len(recommender.dataset.catalogue)
    assert len(adapted.top(1000, exclude_seen=False)[0]) == count
    assert len(adapted.top(1000)[0]) == count - 3
    assert not {"item3", "item4", "item9"} & {line.item for line in adapted.top(1000)[0]}


def test_rare_items_are_left_out_on_request(recommender):
    events = recommender.dataset.catalogue.training_events
    least = int(np.median(events))
    assert 0 < (events < least).sum() < len(events)
    listed = recommender.adapt(EVENTS).top(1000, exclude_seen=False, min_events=least)[0]
    common = recommender.dataset.catalogue.keys[events >= least]
    assert {line.item for line in listed} == set(common)


def test_events_too_old_for_the_support_still_count_as_seen(recommender):
    events = [{"item": f"item{i}", "label": 3, "timestamp": i} for i in range(10)]
    adapted = recommender.adapt(events)
    assert [f"item{i}" for i in adapted.requests.supports[0][0]] == [f"item{i}" for i in range(4, 10)]
    assert "4 events left out" in adapted.warnings[0]
    assert not {e["item"] for e in events} & {line.item for line in adapted.top(1000)[0]}


def test_users_do_not_touch_one_another(recommender):
    both, alone = recommender.adapt(EVENTS), recommender.adapt([e for e in EVENTS if e["user"] == "ben"])
    assert [line.item for line in both.top(8)[1]] == [line.item for line in alone.top(8)[0]]
    assert [line.score for line in both.top(8)[1]] == pytest.approx([line.score for line in alone.top(8)[0]], rel=1e-4)


def test_explanation_is_what_leaving_the_event_out_changes(recommender):
    adapted = recommender.adapt(EVENTS)
    why = adapted.explain("item12", top=2, user="ann")
    row = 12
    before, after = whole_catalogue(recommender, adapted, 0)
    assert (why.before, why.after) == pytest.approx((before[row], after[row]), rel=1e-4)
    influence = [
        after[row] - whole_catalogue(recommender, adapted, 0, np.delete(np.arange(3), n))[1][row] for n in range(3)
    ]
    strongest = np.argsort(-np.abs(influence))[:2]
    items = [("item4", 2.0), ("item3", 5.0), ("item9", 4.0)]  # in the order of time
    assert [(r.item, r.label) for r in why.reasons] == [items[n] for n in strongest]
    assert [r.influence for r in why.reasons] == pytest.approx([influence[n] for n in strongest], abs=1e-4)
    assert "The item 12 for user ann" in str(why)


@pytest.mark.parametrize(
    ("item", "user", "words"),
    [("nothing", "ann", "catalogue"), ("item1", "eve", "no such user"), ("item1", None, "Which")],
)
def test_explaining_the_unknown(recommender, item, user, words):
    with pytest.raises(RequestError, match=words):
        recommender.adapt(EVENTS).explain(item, user=user)


def test_a_user_of_unknown_items_alone_is_not_adapted(recommender):
    adapted = recommender.adapt([{"item": "x", "label": 3}, {"item": "y", "label": 3}, {"item": "x", "label": 4}])
    assert adapted.unknown_items == {"x": 2, "y": 1}
    assert "3 of 3 events left out" in adapted.warnings[0]
    assert adapted.top(5) == adapted.unadapted.top(5)


def test_users_of_the_dataset(recommender):
    # Users 0 to 59 are for training, 60 to 69 for validation, 70 to 84 for test.
    adapted = recommender.adapt_users(["user80", "user3", "user65"])
    assert adapted.users == ["user80", "user3", "user65"]
    episode = recommender.config.evaluate.episode.model_copy(update={"query_max": 1})
    for batch, keys in iterate(recommender.dataset, Split.TEST, ItemSet.ALL, episode, keys=True):
        if "user80" in keys:
            place = list(keys).index("user80")
            start = int((batch.support_lengths + batch.query_lengths)[:place].sum())
            own = batch.items[batch.event_items][start:][: batch.support_lengths[place] + 1]
            assert adapted.requests.supports[0][0].tolist() == own.tolist()[-6:]
            assert set(own.tolist()) <= set(adapted.requests.seen[0].tolist())
    with pytest.raises(RequestError, match="no such user"):
        recommender.adapt_users(["user3", "nobody"])


def test_renderings(recommender):
    adapted = recommender.adapt([*EVENTS, {"user": "ann", "item": "gone", "label": 1, "timestamp": 5}])
    table = adapted.table(3)
    assert "user ann: adapted to 3 events" in table
    assert "note: 1 of 5 events left out: items not in the catalogue (gone)." in table
    best = adapted.top(3)[0][0]
    assert f"{best.item}" in table, "the key is what a shop joins on"
    assert best.title in table
    lines = [json.loads(line) for line in adapted.json_lines(3).splitlines()]
    assert [line["user"] for line in lines] == ["ann", "ben"]
    assert lines[0]["adapted"][0] == adapted.top(3)[0][0]._asdict()
    assert len(lines[1]["unadapted"]) == 3


def test_scores_are_shown_by_as_many_decimals_as_tell_them_apart():
    of = rendering._Style.of
    lines = [Recommendation("a", "A", 4.9991), Recommendation("b", "B", 4.9989)]
    assert of(lines).line(lines[0]).split() == ["a", "A", "4.9991"]
    assert of([Recommendation("a", "a", 4.98), Recommendation("b", "b", 4.99)]).decimals == 2
    assert of([Recommendation("a", "a", 5.0), Recommendation("b", "b", 5.0)]).decimals == 2, "they are equal"
    assert len(of(lines).line(None)) == len(of(lines).line(lines[0])) == of(lines).width
    assert of([]).line(None).strip() == ""


def test_a_ranking_of_nothing_is_refused(recommender):
    with pytest.raises(RequestError, match="one item"):
        recommender.adapt(EVENTS).top(0)


def test_clicks_are_probabilities(recommender_of):
    recommender = recommender_of(LabelKind.CLICK)
    adapted = recommender.adapt([{"item": "item1"}, {"item": "item2"}])
    scores = [line.score for line in adapted.top(100)[0]]
    assert all(0 < s < 1 for s in scores)
    assert np.std(scores) > 0.01


def test_evaluation_measures_what_the_recommender_gives(recommender):
    report = evaluate_recommender(recommender, recommender.config.evaluate)
    assert list(report.partitions) == ["new users", "new items", "both"]
    errors, tasks = [], 0
    for batch in iterate(recommender.dataset, Split.TEST, ItemSet.EXISTING, recommender.config.evaluate.episode):
        scores = recommender.scores(batch)
        starts = np.cumsum(batch.support_lengths + batch.query_lengths) - batch.query_lengths
        for t in range(batch.size):
            labels = batch.labels[starts[t] : starts[t] + batch.query_lengths[t]]
            errors.append(np.abs(np.clip(scores.after[t][scores.mask[t]], 1, 5) - labels).mean())
        tasks += batch.size
    row = next(r for r in report.rows if (r.model, r.partition, r.metric) == ("adapted", "new users", "MAE"))
    assert row.value == pytest.approx(np.mean(errors), rel=1e-6)
    assert row.tasks == tasks
    names = {
        "global mean",
        "support mean",
        "support median",
        "item + user bias",
        "matrix factorisation fold-in",
        "popularity",
    }
    assert {r.model for r in report.rows} == names | {"adapted", "unadapted"}
    assert {(r.support, r.metric) for r in report.by_support_size} == {(0, "MAE"), (3, "MAE")}
    # Without support there is nothing to adapt to.
    at_none = {r.model: r.value for r in report.by_support_size if r.support == 0 and r.partition == "new users"}
    assert at_none["adapted"] == pytest.approx(at_none["unadapted"], rel=1e-6)


def test_evaluation_says_how_many_users_have_no_episode(recommender):
    config = recommender.config.evaluate
    # Users of the tiny dataset have 1 to 20 events.
    one = config.model_copy(update={"episode": config.episode.model_copy(update={"support_min": 0})})
    assert not [n for n in evaluate_recommender(recommender, one).notes if n.startswith("new users")]
    strict = config.model_copy(
        update={"episode": config.episode.model_copy(update={"support_min": 8, "support_max": 12})}
    )
    report = evaluate_recommender(recommender, strict)
    skipped = report.facts["tasks_outside_bounds"]["new users"]
    assert 0 < skipped < 15
    assert f"new users: {skipped} of 15 users have too few events for an episode and are left out." in report.notes
    assert f"new users: {skipped} of 15" in report.table()
    bounded = strict.model_copy(update={"episode": strict.episode.model_copy(update={"events_max": 15})})
    assert any("too few or too many events" in n for n in evaluate_recommender(recommender, bounded).notes)


def test_evaluation_refuses_a_broken_model(recommender_of):
    broken = recommender_of()
    next(p for n, p in broken.model.named_parameters() if "head" in n).data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        evaluate_recommender(broken, broken.config.evaluate)


def test_evaluation_without_new_items_says_so(recommender_of):
    report = evaluate_recommender(recommender_of(new_items=0), recommender_of().config.evaluate)
    assert list(report.partitions) == ["new users"]
    assert any("no new items" in note for note in report.notes)


def loaded(recommender: Recommender, fingerprint: str, drop: bool = False):
    state = dict(recommender.model.state_dict())
    if drop:
        state.popitem()
    marker = SimpleNamespace(identity=identity(recommender.config, fingerprint))
    return SimpleNamespace(config=recommender.config, state=state, step=3, marker=marker)


def test_load_gives_the_model_back(recommender, monkeypatch):
    content = loaded(recommender, recommender.dataset.fingerprint)
    monkeypatch.setattr(recommender_module, "load_for_inference", lambda url, step: content)
    again = Recommender.load("runs/some")
    assert again.adapt(EVENTS).top(3) == recommender.adapt(EVENTS).top(3)


def test_load_refuses_another_dataset_and_another_model(recommender, monkeypatch):
    monkeypatch.setattr(recommender_module, "load_for_inference", lambda url, step: loaded(recommender, "another"))
    with pytest.raises(CheckpointError, match="another task dataset"):
        Recommender.load("runs/some")
    content = loaded(recommender, recommender.dataset.fingerprint, drop=True)
    monkeypatch.setattr(recommender_module, "load_for_inference", lambda url, step: content)
    with pytest.raises(CheckpointError, match="another model"):
        Recommender.load("runs/some")


@pytest.mark.parametrize(
    ("section", "changed", "refused"),
    [
        ("meta", {"steps": 4}, "meta.steps: was 2, is 4"),
        ("model", {"activation": "tanh"}, "model.activation: was 'relu', is 'tanh'"),
        ("meta", {"chunk": 3, "engine": "vmap"}, None),
        ("train", {"seed": 9}, None),
    ],
)
def test_load_refuses_a_configuration_that_scores_otherwise(recommender, monkeypatch, section, changed, refused):
    content = loaded(recommender, recommender.dataset.fingerprint)
    part = getattr(recommender.config, section).model_copy(update=changed)
    content.config = recommender.config.model_copy(update={section: part})
    monkeypatch.setattr(recommender_module, "load_for_inference", lambda url, step: content)
    if refused is None:
        Recommender.load("runs/some")
        return
    with pytest.raises(CheckpointError, match="does not fit") as error:
        Recommender.load("runs/some")
    assert error.value.got == refused
    assert "Restore" in error.value.remedy


def test_load_refuses_an_edited_configuration_file(recommender, monkeypatch, tmp_path):
    content = loaded(recommender, recommender.dataset.fingerprint)
    monkeypatch.setattr(recommender_module, "load_for_inference", lambda url, step: content)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(recommender.config))
    Recommender.load(str(tmp_path))
    file.write_text(to_yaml(recommender.config).replace("  steps: 2\n", "  steps: 9\n"))
    with pytest.raises(CheckpointError, match="does not fit") as error:
        Recommender.load(str(tmp_path))
    assert (error.value.where, error.value.got) == (str(file), "meta.steps: was 2, is 9")


def test_evaluation_of_the_first_tasks_alone_says_so(recommender):
    config = recommender.config.evaluate.model_copy(update={"max_tasks": 7})
    report = evaluate_recommender(recommender, config)
    row = next(r for r in report.rows if r.partition == "new users" and r.metric == "MAE")
    assert 7 <= row.tasks < 14
    assert any(note.startswith("new users: measured on the first") for note in report.notes)
    assert not [n for n in evaluate_recommender(recommender, recommender.config.evaluate).notes if "first" in n]
