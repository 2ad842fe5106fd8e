"""Where a run ended on a loss or gradient that is not finite, or that exploded: kept in its folder, for a replay."""

from __future__ import annotations

from itertools import accumulate

from pydantic import BaseModel, ConfigDict, ValidationError

from metatrain import storage
from metatrain.errors import TrainingError

NAME = "not_finite.json"


class BadStep(BaseModel):
    """The coordinates of the first step that was not good, and what a replay starts from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Steps of the run before it.
    total: int
    epoch: int
    #: Of the epoch, from 0.
    step: int
    #: Steps of the run when it was found.
    found: int
    #: The last checkpoint before it; None: the run's beginning.
    checkpoint: int | None
    seed: int
    lanes: int
    tasks_per_step: int
    world_size: int
    dataset: str
    fingerprint: str


def url_of(run_url: str) -> str:
    """The file of a run."""
    return storage.join(run_url, NAME)


def coordinates(total: int, steps_of: list[int]) -> tuple[int, int]:
    """Epoch and step of the run's step `total`, both from 0, where the epochs have `steps_of` steps."""
    starts = [0, *accumulate(steps_of)]
    epoch = max(e for e, start in enumerate(starts) if start <= total)
    return epoch, total - starts[epoch]


def keep(run_url: str, bad: BadStep) -> None:
    """Writes it into the run's folder."""
    storage.write_atomic(url_of(run_url), bad.model_dump_json(indent=1))


def read(run_url: str) -> BadStep:
    """What `keep` wrote.

    Raises:
        TrainingError: The run has not ended so, or the file is broken.
    """
    url = url_of(run_url)
    if not storage.exists(url):
        raise TrainingError(
            "There is nothing to replay: the run did not end on a loss or gradient that is not finite.",
            where=url,
            remedy="Give the folder of a run that ended so.",
        )
    try:
        return BadStep.model_validate_json(storage.read_bytes(url))
    except ValidationError as error:
        raise TrainingError(f"The file cannot be read: {error}", where=url, remedy="Train the run again.") from error


def as_error(run_url: str, bad: BadStep) -> TrainingError:
    """What the run ends with."""
    start = "its beginning" if bad.checkpoint is None else f"its checkpoint at step {bad.checkpoint}"
    return TrainingError(
        "A loss or gradient is not finite, or exploded.",
        where=f"step {bad.total + 1} of {run_url}: epoch {bad.epoch}, its step {bad.step}",
        got=f"found after step {bad.found}; nothing after {start} was kept",
        remedy=f"`metatrain replay {run_url}` shows where it arises. Then lower `meta.rate` or the rates of "
        "`train.optimizer`, clip with `train.optimizer.clip`, or leave such steps out with `train.not_finite: skip`.",
    )
