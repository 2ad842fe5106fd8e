"""Jobs on a cluster that is made up: addresses, names, what is refused, following through broken connections."""

from __future__ import annotations

import types
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus

from metatrain.config import validated
from metatrain.errors import ClusterError, ConfigError
from metatrain.submit import jobs as module
from metatrain.submit.jobs import ENTRYPOINT, RUN, Jobs
from metatrain.train.checks import RECIPE_VARIABLE

CONFIG = validated({"run": {"name": "My run!", "storage": "/shared/runs"}}, where="test")


def job(name: str, status: JobStatus, run: str | None = None, started: int = 0, code: int | None = None) -> Any:
    return types.SimpleNamespace(
        submission_id=name,
        status=status,
        metadata={RUN: run} if run else None,
        start_time=started,
        end_time=None,
        driver_exit_code=code,
        message="as Ray says",
    )


class Cluster:
    """Stands for Ray's client: jobs as given, and logs that break off where they are told to."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []
        self.submitted: list[dict[str, Any]] = []
        self.address = ""
        self.texts: list[list[str | Exception]] = []

    def list_jobs(self) -> list[Any]:
        return self.jobs

    def get_job_info(self, name: str) -> Any:
        if len(self.texts) > 0:
            return job(name, JobStatus.RUNNING)
        return next(j for j in self.jobs if j.submission_id == name)

    def submit_job(self, **asked: Any) -> str:
        folder = asked["runtime_env"].get("working_dir")
        self.submitted.append({**asked, "code": folder and sorted(p.name for p in Path(folder).iterdir())})
        return asked["submission_id"]

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        for text in self.texts.pop(0) if self.texts else []:
            if isinstance(text, Exception):
                raise text
            yield text


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()

    def client(address: str) -> Cluster:
        made.address = address
        return made

    monkeypatch.setattr(module, "JobSubmissionClient", client)
    monkeypatch.setattr(module, "PAUSE", 0.01)
    return made


def test_the_address_that_is_given_counts_and_not_rays_variables(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:8265")
    Jobs("http://head:8265/")
    assert cluster.address == "http://head:8265"
    Jobs(None)
    assert cluster.address == "http://other:8265"


@pytest.mark.parametrize("address", [None, "head:8265", "ray://head:10001", "auto"])
def test_an_address_of_another_kind_is_told(address: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="by its URL") as caught:
        Jobs(address)
    assert "http://HEAD:8265" in str(caught.value)


def test_a_cluster_that_is_not_there_is_told():
    with pytest.raises(ClusterError, match="Nothing answers") as caught:
        Jobs("http://127.0.0.1:1")
    assert caught.value.where == "http://127.0.0.1:1"


def test_a_missing_token_is_told(monkeypatch: pytest.MonkeyPatch):
    def client(address: str) -> None:
        raise AuthenticationError("Token authentication is enabled, none was given")

    monkeypatch.setattr(module, "JobSubmissionClient", client)
    with pytest.raises(ClusterError, match="wants its token") as caught:
        Jobs("http://head:8265")
    assert "RAY_AUTH_TOKEN_PATH" in str(caught.value)


def test_a_job_carries_recipe_code_and_metadata(cluster: Cluster):
    name = Jobs("http://head:8265").submit(CONFIG, metadata={"team": "search"}, environment={"NCCL_DEBUG": "INFO"})
    (asked,) = cluster.submitted
    assert name == "My-run-1"
    assert asked["entrypoint"] == ENTRYPOINT
    assert asked["metadata"][RUN] == "/shared/runs/My run!"
    assert asked["metadata"]["team"] == "search"
    variables = asked["runtime_env"]["env_vars"]
    assert variables["NCCL_DEBUG"] == "INFO"
    assert validated(yaml.safe_load(variables[RECIPE_VARIABLE]), where="job") == CONFIG
    assert asked["code"] == ["metatrain"]
    Jobs("http://head:8265").submit(CONFIG, submission_id="mine", upload=False)
    assert cluster.submitted[1]["submission_id"] == "mine"
    assert cluster.submitted[1]["code"] is None


def test_job_names_are_not_given_twice(cluster: Cluster):
    cluster.jobs = [job("My-run-1", JobStatus.FAILED, CONFIG.run_url), job("My-run-2", JobStatus.STOPPED)]
    assert Jobs("http://head:8265").submit(CONFIG) == "My-run-3"


@pytest.mark.parametrize("status", [JobStatus.PENDING, JobStatus.RUNNING])
def test_a_run_that_is_being_trained_is_not_submitted_again(cluster: Cluster, status: JobStatus):
    cluster.jobs = [job("first", status, CONFIG.run_url), job("else", JobStatus.RUNNING, "/other/run")]
    with pytest.raises(ClusterError, match="on this cluster already") as caught:
        Jobs("http://head:8265").submit(CONFIG)
    assert "metatrain job logs first" in str(caught.value)
    assert not cluster.submitted


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, 137, 137),
        (JobStatus.FAILED, None, 1),
        (JobStatus.STOPPED, None, 130),
    ],
)
def test_the_exit_code_is_the_jobs(cluster: Cluster, status: JobStatus, code: int | None, expected: int, capsys):
    cluster.jobs = [job("a", status, code=code)]
    assert Jobs("http://head:8265").follow("a") == expected
    assert ("as Ray says" in capsys.readouterr().err) == (status == JobStatus.FAILED and code is None)


def test_a_log_is_followed_through_broken_connections_and_nothing_is_printed_twice(cluster: Cluster, capsys):
    cluster.jobs = [job("a", JobStatus.SUCCEEDED)]
    cluster.texts = [
        ["one\n", "two\nth", RuntimeError("WebSocket connection closed unexpectedly")],
        ["one\ntwo\nthree\n"],
        [ConnectionError("refused")],
        ["one\n", "two\nthree\n", "four\n"],
    ]
    assert Jobs("http://head:8265").follow("a") == 0
    assert capsys.readouterr().out == "one\ntwo\nthree\nfour\n"


def test_a_job_server_that_is_gone_ends_the_following_and_not_the_job(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    cluster.texts = [[ConnectionError("refused")] for _ in range(1000)]
    with pytest.raises(ClusterError, match="out of reach") as caught:
        Jobs("http://head:8265").follow("a")
    assert "The job goes on" in str(caught.value)


def test_a_run_means_its_newest_job(cluster: Cluster):
    cluster.jobs = [
        job("new", JobStatus.RUNNING, "/r/x", started=2),
        job("old", JobStatus.FAILED, "/r/x", started=1),
        job("foreign", JobStatus.RUNNING),
    ]
    jobs = Jobs("http://head:8265")
    assert jobs.details("/r/x").submission_id == "new"
    assert jobs.details("old").submission_id == "old"
    assert [j.submission_id for j in jobs.all()] == ["old", "new"]
    with pytest.raises(ClusterError, match="no such job") as caught:
        jobs.details("/r/y")
    assert "new, old" in str(caught.value)
