"""Where items are the tasks: new items get users. The same recommender, evaluation and commands, in the right words."""

from __future__ import annotations

import json

import numpy as np
import pytest

from metatrain.cli import main
from metatrain.config import (
    Config,
    DataConfig,
    EpisodeConfig,
    EvaluateConfig,
    ItemSplit,
    MetaConfig,
    ModelConfig,
    PrepareConfig,
    Synthetic,
    UserSplit,
)
from metatrain.data.dataset import TaskDataset
from metatrain.data.prepare import prepare
from metatrain.errors import RequestError
from metatrain.evaluate.evaluation import evaluate_recommender
from metatrain.model.build import build_model
from metatrain.recommend.recommender import Recommender


@pytest.fixture(scope="module")
def recommender(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    """An untrained one over a synthetic log: 40 items as tasks, 120 users in the catalogue."""
    url = str(tmp_path_factory.mktemp("items") / "dataset")
    config = Config(
        prepare=PrepareConfig(
            source="synthetic",
            task="item",
            synthetic=Synthetic(users=120, items=40, events_per_user=10),
            user_split=UserSplit(validation=0.2, test=0.3),
            item_split=ItemSplit(by="hash", new=0.3),
        ),
        data=DataConfig(dataset=url),
        model=ModelConfig(hidden=(8,), init_scale=0.5),
        meta=MetaConfig(rate=0.1, steps=2, adapt=("head.*",)),
        evaluate=EvaluateConfig(episode=EpisodeConfig(support_max=5, query_max=4), k=(1,), support_sizes=(0, 2)),
    )
    prepare(config.prepare, url, progress=False)
    dataset = TaskDataset.open(url)
    return Recommender(build_model(dataset.schema, config), dataset, config, run_url=url, step=3)


def test_evaluation_speaks_of_new_items(recommender):
    report = evaluate_recommender(recommender, recommender.config.evaluate)
    assert report.partitions == {
        "new items": "test items, existing users",
        "new users": "training items, new users",
        "both": "test items, new users",
    }
    assert report.facts["task"] == "item"
    models = {row.model for row in report.rows}
    assert "activity" in models
    assert "popularity" not in models
    assert all("users have" not in note for note in report.notes)
    tasks = {
        row.tasks for row in report.rows if (row.partition, row.model, row.metric) == ("new items", "adapted", "MAE")
    }
    assert tasks.pop() <= recommender.dataset.manifest.tasks["test"]


def test_events_of_a_new_item_rank_the_users(recommender):
    events = [
        {"user": "3", "label": 5, "timestamp": 1, "title": "The new one", "category": "category-5"},
        {"user": "7", "label": 1, "timestamp": 2, "title": "The new one", "category": "category-5"},
    ]
    adapted = recommender.adapt(events)
    assert adapted.users == ["new item"]
    assert adapted.titles == {"new item": "The new one"}
    assert adapted.warnings == []
    ranked = [line.item for line in adapted.top(200)[0]]
    assert sorted(ranked) == sorted(set(recommender.dataset.catalogue.keys) - {"3", "7"})
    assert adapted.table(3).startswith("item new item (The new one): adapted to 2 events\n")
    content = json.loads(adapted.json_lines(2))
    assert (content["item"], content["title"], content["support"]) == ("new item", "The new one", 2)
    assert [list(line) for line in content["adapted"]] == [["user", "score"]] * 2
    assert "for item new item (The new one): " in str(adapted.explain("9"))
    # The features of the item are read: another category is another score.
    other = recommender.adapt([event | {"category": "category-6"} for event in events])
    assert not np.allclose([line.score for line in adapted.top(3)[0]], [line.score for line in other.top(3)[0]])


def test_several_new_items_are_told_apart_by_their_column(recommender):
    events = [{"item": i, "user": u, "label": 3} for i, u in (("a", "3"), ("b", "7"), ("a", "8"))]
    adapted = recommender.adapt(events)
    assert adapted.users == ["a", "b"]
    assert [len(s[0]) for s in adapted.requests.supports] == [2, 1]
    stranger = recommender.adapt([*events, {"item": "a", "user": "nobody", "label": 3}])
    assert stranger.warnings == ["1 of 4 events left out: users not in the catalogue (nobody)."]


@pytest.mark.parametrize(
    ("events", "message"),
    [([{"item": "a", "label": 3}], "The column `user` is missing"), ([], "There are no events")],
)
def test_what_lacks_is_named(recommender, events, message):
    with pytest.raises(RequestError, match=message) as error:
        recommender.adapt(events)
    assert "user" in str(error.value.remedy)


def test_items_of_the_dataset_by_key_have_their_titles(recommender, monkeypatch, capsys):
    monkeypatch.setattr(Recommender, "load", lambda *_, **__: recommender)
    main(["recommend", "/runs/r", "--item", "5", "7", "--top", "2", "--format", "json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["item"], line["title"]) for line in lines] == [("5", "Item 5"), ("7", "Item 7")]
    main(["recommend", "/runs/r", "--item", "5", "--top", "2"])
    assert capsys.readouterr().out.startswith("item 5 (Item 5): adapted to ")
    with pytest.raises(SystemExit):
        main(["recommend", "/runs/r", "--user", "5"])
    assert "The run's tasks are items" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["recommend", "/runs/r", "--item", "nothing"])
    assert "The dataset has no such item" in capsys.readouterr().err
