"""`metatrain submit` and `metatrain job`: what they do and print, and the exit code of each."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from metatrain.config import Config
from metatrain.submit.checks import check_submission, node_paths
from metatrain.train.checks import finished, located

# Ray, and the sharding plan's TorchRec, are imported once a run is known to be sound: that takes seconds.
if TYPE_CHECKING:
    from metatrain.submit.jobs import Jobs

log = logging.getLogger("metatrain")


def submit(
    config: Config,
    address: str | None,
    *,
    submission_id: str | None = None,
    metadata: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    upload: bool = True,
    wait: bool = True,
    dry_run: bool = False,
) -> int:
    """Checks a run, shows what it will take, hands it to the cluster and follows it; the exit code.

    Raises:
        MetatrainError: The run cannot work, or its name is another's; then the cluster has heard nothing of it. Or the
            cluster cannot be reached, or refuses.
    """
    config = located(config)
    check_submission(config)
    if finished(config):
        print(f"this run is trained to its end, and nothing is submitted: {config.run_url}")
        return 0
    from metatrain.submit.summary import summary

    print(summary(config), flush=True)
    if dry_run:
        return 0
    from metatrain.submit.jobs import Jobs

    jobs = Jobs(address)
    job = jobs.submit(config, submission_id=submission_id, metadata=metadata, environment=environment, upload=upload)
    print(f"submitted  {job} to {jobs.address}", flush=True)
    if not wait:
        print(f"  metatrain job logs {job}    follow it\n  metatrain job stop {job}    end it")
        return 0
    return _followed(jobs, job)


def render(config: Config, image: str, environment: Mapping[str, str]) -> str:
    """The manifest of a RayJob that trains this run, checked as if it were submitted. What its pods may lack is told
    at its top, and in the log.

    Raises:
        MetatrainError: The run cannot work.
    """
    config = located(config)
    check_submission(config)
    from metatrain.submit.rayjob import manifest
    from metatrain.submit.summary import table_bytes

    doubts = [f"{path} is a path on a disk: every pod must mount it there" for path in node_paths(config)]
    if "/" not in image:
        doubts.append(f"{image} names no registry: the cluster's nodes must have this image already (--image)")
    for doubt in doubts:
        log.warning("%s", doubt)
    comments = "".join(f"# {doubt}\n" for doubt in doubts)
    return comments + manifest(config, image, environment, table_bytes(config))


def job(action: str, subject: str, address: str | None, *, wait: bool = True) -> int:
    """`list`, or `status`, `logs` or `stop` of a job or of a run's newest one; the exit code.

    Raises:
        MetatrainError: There is no such job, or the cluster cannot be reached.
    """
    from metatrain.submit.jobs import Jobs, described

    jobs = Jobs(address)
    if action == "list":
        for found in jobs.all():
            print(described(found))
        return 0
    found = jobs.details(subject)
    name = str(found.submission_id)
    if action == "status":
        print(described(found))
        if found.message:
            print(f"  {found.message.strip()}")
        return 0
    if action == "stop":
        stopped = jobs.stop(name)
        print(f"{name} was asked to end" if stopped else f"{name} had ended already: {found.status.value}")
        return 0
    if wait:
        return _followed(jobs, name)
    print(jobs.logs(name), end="")
    return 0


def _followed(jobs: Jobs, job: str) -> int:
    try:
        return jobs.follow(job)
    except KeyboardInterrupt:
        print(f"\nno longer followed; the job goes on. metatrain job logs {job}, metatrain job stop {job}", flush=True)
        return 0
