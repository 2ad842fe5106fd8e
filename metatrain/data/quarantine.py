"""Bad training shards that a run goes on without: RUN/quarantine.json, the list and what each cost.

The plan does not know of it: positions stay, and those of a quarantined shard give no task. So the batches of a run are
a pure function of the manifest and this list, no other task moves, and every other one is trained exactly once an
epoch. The list only ever grows; each shard has the step from which it was left out.
"""

from __future__ import annotations

import datetime
import functools
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from metatrain import storage
from metatrain.config import DataConfig
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import Count, Shard, Split
from metatrain.data.shards import REMEDY, check_content, wrong_sizes
from metatrain.data.verify import check_shard
from metatrain.documents import parse_json
from metatrain.errors import CheckpointError, DatasetError, ShardError, StorageError

log = logging.getLogger("metatrain")

FILE = "quarantine.json"

Result = TypeVar("Result")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Quarantined(_Frozen):
    """A shard that is not read: its path in the dataset, why, what is lost each epoch, from when on."""

    path: str
    why: str
    tasks: Count
    events: Count
    #: Steps of the run before it: the checkpoint from which the run went on without the shard.
    since_step: Count
    #: UTC, ISO 8601.
    found: str


class Quarantine(_Frozen):
    """A run's list. Without a file it is empty."""

    version: Literal[1] = 1
    #: The dataset's fingerprint.
    dataset: str = ""
    shards: tuple[Quarantined, ...] = ()

    @property
    def paths(self) -> frozenset[str]:
        """The shards that are not read."""
        return frozenset(shard.path for shard in self.shards)

    def told(self) -> str:
        """One line for people; empty where nothing is lost."""
        if not self.shards:
            return ""
        tasks, events = sum(s.tasks for s in self.shards), sum(s.events for s in self.shards)
        shown = ", ".join(shard.path for shard in self.shards[:3]) + (", …" if len(self.shards) > 3 else "")
        plural = "shard is" if len(self.shards) == 1 else "shards are"
        return (
            f"{len(self.shards)} {plural} quarantined ({shown}): {tasks:,} tasks with {events:,} events are not in an "
            f"epoch; {FILE} tells why"
        )

    def markdown(self) -> str:
        """A table, for TensorBoard."""
        rows = [
            f"| {s.path} | {s.tasks:,} | {s.events:,} | {s.since_step} | {s.found} | {s.why} |" for s in self.shards
        ]
        head = ["| shard | tasks | events | from step | found | why |", "|---|---|---|---|---|---|"]
        return "\n".join([*head, *(row.replace("\n", " ") for row in rows)])

    def check_grown(self, trained_without: Sequence[str], where: str) -> None:
        """Checks that the list is no shorter than the one that a checkpoint was trained with.

        Raises:
            CheckpointError: A shard was taken off it.
        """
        if missing := sorted(set(trained_without) - self.paths):
            raise CheckpointError(
                "The run was trained without a shard that is no longer quarantined: its list may only grow.",
                where=where,
                got=", ".join(missing),
                remedy=f"Put it back into {FILE}, or train with the mended dataset under another `run.name`.",
            )


def read_quarantine(run_url: str, dataset: TaskDataset) -> Quarantine:
    """A run's list.

    Raises:
        DatasetError: It cannot be read, is of another dataset, or names what is no training shard.
    """
    path = storage.join(run_url, FILE)
    if not storage.exists(path):
        return Quarantine(dataset=dataset.fingerprint)
    remedy = "Restore the file; without a checkpoint of the run, it may be removed."
    try:
        found = Quarantine.model_validate(parse_json(storage.read_bytes(path)))
    except ValidationError as error:
        first = error.errors()[0]
        place = f"{path}: {'.'.join(str(part) for part in first['loc'])}"
        raise DatasetError(
            f"The list of quarantined shards cannot be used: {first['msg']}", where=place, remedy=remedy
        ) from error
    except ValueError as error:
        raise DatasetError(
            f"The list of quarantined shards cannot be read: {error}", where=path, remedy=remedy
        ) from error
    if found.dataset != dataset.fingerprint:
        raise DatasetError(
            "The list of quarantined shards is of another dataset.", where=path, got=found.dataset, remedy=remedy
        )
    unknown = sorted(found.paths - {shard.path for shard in dataset.manifest.of(Split.TRAIN)})
    if unknown:
        raise DatasetError(
            "The list of quarantined shards names what is no training shard.", where=path, got=unknown[0], remedy=remedy
        )
    return found


def bad_shards(dataset: TaskDataset, shards: Sequence[Shard], checksums: bool) -> Iterator[ShardError]:
    """Shards that are missing, of another size or, with `checksums`, of other content: then every byte is read."""
    wrong = {error.path: error for error in wrong_sizes(dataset.url, shards)}
    for shard in shards:
        if shard.path in wrong:
            yield wrong[shard.path]
        elif checksums:
            try:
                check_content(dataset.url, shard)
            except ShardError as error:
                yield error


class BadShards:
    """What a run does about bad shards: it ends, or goes on without them, as `data.bad_shards` says.

    Args:
        run_url: The run.
        data: Its dataset, and the rules.
        step: Tells how many steps the run goes on from.
    """

    def __init__(self, run_url: str, data: DataConfig, step: Callable[[], int]) -> None:
        self._run_url, self._data, self._step = run_url, data, step

    def quarantine(self) -> Quarantine:
        """The run's list."""
        return read_quarantine(self._run_url, TaskDataset.open(self._data.dataset))

    def check(self, splits: Collection[Split]) -> None:
        """Compares the shards of these splits with the manifest, as `data.verify` says.

        Raises:
            ShardError: As `spared`.
        """
        dataset, known = TaskDataset.open(self._data.dataset), self.quarantine().paths
        shards = [shard for split in Split if split in splits for shard in dataset.manifest.of(split)]
        shards = [shard for shard in shards if shard.path not in known]
        for error in bad_shards(dataset, shards, checksums=self._data.verify == "checksums"):
            quarantine(self._run_url, self._data, error, self._step())

    def spared(self, call: Callable[[], Result]) -> Result:
        """Calls `call`; where a bad training shard ends it, again without that one. It is to read the list anew.

        Raises:
            ShardError: A bad shard that is not to be, or must not be, quarantined.
            StorageError: A shard could not be read, but is whole.
        """
        while True:
            try:
                return call()
            except ShardError as error:
                quarantine(self._run_url, self._data, error, self._step())


def quarantine(run_url: str, data: DataConfig, error: ShardError, since_step: int) -> Quarantine:
    """Puts a shard on the run's list.

    Raises:
        ShardError: The same, where it must not be: `data.bad_shards` is stop, it is no training shard, it is on the
            list already, or more would be lost than `data.quarantine_share`.
        StorageError: The shard is whole after all.
    """
    dataset = TaskDataset.open(data.dataset)
    known = read_quarantine(run_url, dataset)
    shard = next((s for s in dataset.manifest.of(Split.TRAIN) if s.path == error.path), None)
    again = functools.partial(ShardError, error.what, path=error.path, where=error.where, got=error.got)
    if shard is None or shard.path in known.paths:
        raise error
    if data.bad_shards == "stop":
        raise again(remedy=f"{REMEDY} Or go on without it: `data.bad_shards: quarantine`.") from error
    try:
        check_shard(dataset, shard)
    except ShardError as confirmed:
        error = confirmed
    else:
        raise StorageError(
            "A shard could not be read where it was needed, but is whole: the machine or its storage is to blame.",
            where=error.where,
            got=error.what,
            remedy="Check the disk or the mount of that machine; the same command goes on.",
        ) from error
    entry = Quarantined(
        path=shard.path,
        why=error.what if error.got is None else f"{error.what} Got: {error.got}",
        tasks=shard.tasks,
        events=shard.events,
        since_step=since_step,
        found=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    grown = known.model_copy(update={"shards": (*known.shards, entry)})
    lost, all_tasks = sum(s.tasks for s in grown.shards), dataset.manifest.tasks[Split.TRAIN]
    if lost > data.quarantine_share * all_tasks:
        raise ShardError(
            f"{error.what} Without it {lost:,} of {all_tasks:,} training tasks would be lost: more than "
            f"`data.quarantine_share` ({data.quarantine_share:g}) allows.",
            path=error.path,
            where=error.where,
            got=error.got,
            remedy=f"{REMEDY} `metatrain verify {dataset.url}` names every bad shard.",
        ) from error
    storage.write_atomic(storage.join(run_url, FILE), grown.model_dump_json(indent=1))
    log.warning("%s: quarantined, from step %d on: %s", shard.path, since_step, entry.why)
    return grown
