"""`metatrain recommend`: users by key, events from a file, and where the dataset lies."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from metatrain.cli import main
from metatrain.config import to_yaml
from metatrain.recommend.recommender import Recommender


@pytest.fixture
def asked(recommender, monkeypatch) -> list:
    """What is loaded, in place of a trained run."""
    calls = []

    def load(run_url, **settings):
        calls.append((run_url, settings))
        return recommender

    monkeypatch.setattr(Recommender, "load", load)
    return calls


@pytest.mark.parametrize(
    ("given", "users"),
    [
        (["--user", "user5", "user7"], ["user5", "user7"]),
        (["--user", "user5", "--user", "user7"], ["user5", "user7"]),
        (["--user", "user5", "user7", "--top", "3", "--user", "user1"], ["user5", "user7", "user1"]),
    ],
)
def test_users_may_be_listed_and_the_option_repeated(asked, given, users, capsys):
    main(["recommend", "/runs/r", *given, "--format", "json"])
    assert [json.loads(line)["user"] for line in capsys.readouterr().out.splitlines()] == users


def test_a_dataset_that_was_moved_is_named(asked, tmp_path, capsys):
    events = tmp_path / "events.csv"
    events.write_text("item,label\nitem1,5\n")
    main(["recommend", "/runs/r", "--events", str(events), "--dataset", "/moved/here", "--checkpoint", "40"])
    assert asked == [("/runs/r", {"checkpoint": 40, "dataset": "/moved/here"})]
    assert "adapted to 1 event\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "told"), [(None, "no such file of events"), ("item,stars\nitem1,5\n", "column `label` is missing")]
)
def test_a_file_of_events_is_refused_before_the_model_is_loaded(recommender, asked, content, told, tmp_path, capsys):
    events, run = tmp_path / "events.csv", tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(recommender.config))
    if content is not None:
        events.write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["recommend", str(run), "--events", str(events)])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
    assert not asked


def test_what_a_refusal_of_events_does_not_import(tmp_path):
    code = (
        "import sys; from metatrain.cli import main\n"
        "try: main(['recommend', sys.argv[1], '--events', 'none.csv'])\n"
        "finally: print(*{'torch', 'ray'} & set(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stdout.strip()) == (2, "")
    assert "no such file of events" in ended.stderr


def test_neither_users_nor_events_and_both_are_refused(asked, capsys):
    for given in ([], ["--user", "user5", "--events", "some.csv"]):
        with pytest.raises(SystemExit) as ended:
            main(["recommend", "/runs/r", *given])
        assert ended.value.code == 2
        assert "Give one of them" in capsys.readouterr().err
    assert not asked
