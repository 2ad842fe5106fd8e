"""A cluster's jobs, by Ray's job server: submit, follow, stop. A run is known by its URL in its jobs' metadata."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from metatrain import __version__
from metatrain.config import Config, to_yaml
from metatrain.errors import ClusterError, ConfigError
from metatrain.submit.package import packaged
from metatrain.train.checks import RECIPE_VARIABLE

#: Of a job: the URL of the run that it trains.
RUN = "metatrain.run"
#: What trains on the cluster: reads the recipe from the job's environment, so that no file need lie on the nodes.
ENTRYPOINT = f"python -m metatrain train env:{RECIPE_VARIABLE} --address auto"

#: Seconds between looks at a job whose log has ended.
PAUSE = 0.5
#: Seconds that the job server may be out of reach before following ends.
PATIENCE = 60.0

# Ray's client tells of each upload and each connection, in its own words.
for _name in (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
):
    logging.getLogger(_name).setLevel(logging.WARNING)

_NAME = re.compile(r"[A-Za-z0-9._-]+")


class Jobs:
    """The jobs of one cluster.

    Args:
        address: Of the head's job server, `http://HOST:8265`. Default: RAY_API_SERVER_ADDRESS.

    Raises:
        ConfigError: No address, or one of another kind.
        ClusterError: Nothing answers there, or it wants a token that it doesn't get.
    """

    def __init__(self, address: str | None) -> None:
        self.address = (address or os.environ.get("RAY_API_SERVER_ADDRESS", "")).rstrip("/")
        if not self.address.startswith(("http://", "https://")):
            raise ConfigError(
                "A cluster's job server is named by its URL.",
                where="--address",
                got=self.address or None,
                remedy="Give `--address http://HEAD:8265` (its dashboard's port), or set RAY_API_SERVER_ADDRESS.",
            )
        # Ray lets its variables overrule the address that it is given.
        with _without("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"), self._told():
            self._client = JobSubmissionClient(self.address)

    def submit(
        self,
        config: Config,
        *,
        submission_id: str | None = None,
        metadata: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        upload: bool = True,
    ) -> str:
        """Hands a run to the cluster; the job's submission ID.

        Args:
            config: With absolute paths, and checked.
            submission_id: Of the job. Default: the run's name with a number.
            metadata: To show beside the job.
            environment: Variables of the job's processes, on every node.
            upload: Send this package's code; else what the nodes have installed runs.

        Raises:
            ClusterError: The run is being trained by another job of this cluster, or the server refuses.
        """
        with self._told():
            jobs = self._client.list_jobs()
        for job in jobs:
            if (job.metadata or {}).get(RUN) == config.run_url and not job.status.is_terminal():
                raise ClusterError(
                    f"The run is on this cluster already: job {job.submission_id} is {job.status.value}.",
                    where=config.run_url,
                    remedy=f"Follow it by `metatrain job logs {job.submission_id}`, end it by `metatrain job stop "
                    f"{job.submission_id}`, or give this one another `run.name`.",
                )
        submission_id = submission_id or _new_id(config.run.name, {job.submission_id for job in jobs})
        with contextlib.ExitStack() as stack, self._told():
            folder, sent = stack.enter_context(packaged(config)) if upload else (None, config)
            return self._client.submit_job(
                entrypoint=ENTRYPOINT,
                submission_id=submission_id,
                metadata={RUN: config.run_url, "metatrain.version": __version__, **(metadata or {})},
                runtime_env=runtime_env(sent, environment or {}, folder),
            )

    def details(self, job: str) -> JobDetails:
        """A job by its submission ID, or the newest that trains the run of that URL.

        Raises:
            ClusterError: There is none.
        """
        with self._told():
            jobs = self._client.list_jobs()
        of_run = [j for j in jobs if (j.metadata or {}).get(RUN) == job]
        found = [j for j in jobs if j.submission_id == job] or sorted(of_run, key=lambda j: j.start_time or 0)[-1:]
        if not found:
            known = ", ".join(str(j.submission_id) for j in jobs if RUN in (j.metadata or {}))
            raise ClusterError(
                "There is no such job, nor one of such a run, on this cluster.",
                where=self.address,
                got=job,
                remedy=f"Its jobs: {known}." if known else "It has had no job of metatrain.",
            )
        return found[0]

    def all(self) -> list[JobDetails]:
        """The jobs that train runs, oldest first."""
        with self._told():
            jobs = self._client.list_jobs()
        return sorted((j for j in jobs if RUN in (j.metadata or {})), key=lambda j: j.start_time or 0)

    def logs(self, submission_id: str) -> str:
        """What a job has printed."""
        with self._told():
            return self._client.get_job_logs(submission_id)

    def follow(self, submission_id: str) -> int:
        """Prints a job's log as it comes, to the job's end; the exit code that its command had.

        A job that was stopped has 130, one that Ray could not run has 1.

        Raises:
            ClusterError: The job server is out of reach for a minute.
        """
        log, reached = _Log(), time.monotonic()
        while True:
            try:
                asyncio.run(log.show(self._client.tail_job_logs(submission_id)))
                job = self._client.get_job_info(submission_id)
                reached = time.monotonic()
            except (ConnectionError, OSError, RuntimeError, aiohttp.ClientError, requests.RequestException) as error:
                # The job does not need us: what fails here is the way to its log.
                if time.monotonic() - reached > PATIENCE:
                    raise ClusterError(
                        f"The cluster's job server is out of reach: {error}",
                        where=self.address,
                        got=submission_id,
                        remedy=f"The job goes on: `metatrain job logs {submission_id}` follows it again. Where the "
                        "head is gone, submit the run to another cluster: it goes on from its last checkpoint.",
                    ) from error
                time.sleep(PAUSE)
                continue
            if job.status.is_terminal():
                return _exit_code(job)
            time.sleep(PAUSE)

    def stop(self, submission_id: str) -> bool:
        """Asks a job to end; whether it was running."""
        with self._told():
            return self._client.stop_job(submission_id)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What Ray's client raises, as an error that says what to do."""
        try:
            yield
        except AuthenticationError as error:
            raise ClusterError(
                "The cluster wants its token.",
                where=self.address,
                got=str(error).splitlines()[0],
                remedy="Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file that holds the cluster's token.",
            ) from error
        except (ConnectionError, requests.RequestException, aiohttp.ClientError) as error:
            raise ClusterError(
                "Nothing answers at the cluster's address.",
                where=self.address,
                got=str(error),
                remedy="Check that the head is up and the port is its dashboard's (8265); on Kubernetes, "
                "`kubectl port-forward service/CLUSTER-head-svc 8265`.",
            ) from error
        except (RuntimeError, ValueError) as error:
            raise ClusterError(
                f"The cluster's job server refuses: {str(error).strip().splitlines()[-1]}",
                where=self.address,
                remedy="Look at what it says; `metatrain job list` shows its jobs.",
            ) from error


class _Log:
    """A job's log on standard output: each part once, though every reading of it begins at its start."""

    def __init__(self) -> None:
        self._shown = 0

    async def show(self, texts: AsyncIterator[str]) -> None:
        """Prints what is new in a reading, until that ends."""
        seen = 0
        async for text in texts:
            fresh = text[max(0, self._shown - seen) :]
            seen += len(text)
            if fresh:
                self._shown = seen
                sys.stdout.write(fresh)
                sys.stdout.flush()


def _exit_code(job: JobDetails) -> int:
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.status == JobStatus.STOPPED:
        return 130
    if job.driver_exit_code is None:
        # Ray could not start the command, or lost it: its own words are all there is.
        print(f"error: the job failed: {job.message}", file=sys.stderr)
    return job.driver_exit_code or 1


def described(job: JobDetails) -> str:
    """A job in a line: its ID, status, seconds, and run."""
    begun, ended = (job.start_time or 0) / 1000, (job.end_time or 0) / 1000
    seconds = (ended or time.time()) - begun if begun else 0.0
    return f"{job.submission_id:<32} {job.status.value:<10} {seconds:>8.0f} s  {(job.metadata or {}).get(RUN, '')}"


def runtime_env(config: Config, environment: Mapping[str, str], folder: str | None) -> dict[str, Any]:
    """What a job's processes find: the recipe, in a variable; variables of the user's; the code, where it is sent."""
    variables = {RECIPE_VARIABLE: to_yaml(config), **environment}
    return {"env_vars": variables, **({"working_dir": folder} if folder else {})}


def _new_id(name: str, taken: set[str | None]) -> str:
    """NAME-1, or the next number that no job of the cluster has had."""
    stem = "-".join(_NAME.findall(name)) or "run"
    number = 1
    while f"{stem}-{number}" in taken:
        number += 1
    return f"{stem}-{number}"


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """The environment without these variables, while the block runs."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
