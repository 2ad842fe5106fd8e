"""The feed of a training worker: `TaskReader` actors read ahead through the object store, `TaskStream` gives batches.

The batch of a step is what the plan says, whichever reader makes it: a reader that dies is replaced where the trainer
stands, and the trainer sees the same batches. At most `prefetch` steps are in the object store. Several small steps are
made and sent in one call (see `Pace`). Where their number is `auto`, readers are added while training goes on, from a
call on: earlier calls end with those that were asked.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from metatrain.config import DataConfig
from metatrain.data.assemble import concatenate_batches
from metatrain.data.batch import TaskBatch, TaskBatches
from metatrain.data.manifest import ItemSet, Split, read_manifest
from metatrain.data.nearby import node_for
from metatrain.data.pace import MOST_CALLS, Pace
from metatrain.data.plan import EpochPlan, lanes_of
from metatrain.data.shards import check_sizes, row_groups
from metatrain.data.task_reader import TaskReader
from metatrain.errors import MetatrainError, TrainingError
from metatrain.malloc import with_malloc

log = logging.getLogger(__name__)

#: CPUs that a reader asks Ray for.
READER_CPUS = 0.5
#: Deaths of readers without a batch in between after which the stream gives up.
DEATHS_IN_A_ROW = 5
#: Seconds that a new reader may take to start before the stream gives up.
START_SECONDS = 300.0

# What takes a reader, or a batch it made, away; anything else is an error of the read itself.
_DEATHS = (RayActorError, NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError)


@dataclass(frozen=True)
class _Call:
    """What readers were asked for at once: each for its lanes, the first reader for the first ones."""

    place: tuple[int, int]  # epoch, and its first step
    steps: int
    lanes: list[list[int]]
    refs: list[ray.ObjectRef]


class _Starting(NamedTuple):
    """A reader that is to be added."""

    actor: Any
    opened: ray.ObjectRef
    since: float


class TaskStream:
    """A worker's batches: the parts of its lanes, read by `data.readers_per_worker` actors on this worker's node.

    Readers that are added later (`auto`) may be on another node, where this one has no CPU left.

    Args:
        dataset_url: The task dataset.
        data: Lanes, batch size, window, readers and prefetch.
        seed: Seed of the plan and of the episodes.
        lanes: This worker's lanes (see `lanes_of`).
        split: Which tasks.
        items: Which events of a task count.
        features: Names of the features to read. Default: all.
        timestamps: Whether the events' times are read.
        epochs: Epochs there are: nothing is read ahead behind the last. Default: no end.
        quarantined: Paths of shards that are not read (see `BatchReader`).
        num_cpus: CPUs of a reader, for Ray's scheduling; of those added later, `READER_CPUS`.

    Raises:
        MetatrainError: What a reader cannot use, as itself: a missing dataset, a truncated shard, an unknown feature.
        TrainingError: Readers that cannot be started, or that keep dying.
    """

    def __init__(
        self,
        dataset_url: str,
        data: DataConfig,
        *,
        seed: int,
        lanes: Sequence[int] | None = None,
        split: Split = Split.TRAIN,
        items: ItemSet = ItemSet.EXISTING,
        features: Sequence[str] | None = None,
        timestamps: bool = True,
        epochs: int | None = None,
        quarantined: Collection[str] = (),
        num_cpus: float = READER_CPUS,
    ) -> None:
        self._url, self._data, self._seed, self._epochs, self._num_cpus = dataset_url, data, seed, epochs, num_cpus
        shards = read_manifest(dataset_url).of(split)
        check_sizes(
            dataset_url, [s for s in shards if s.path not in quarantined]
        )  # here, once a worker: a broken dataset fails before an actor starts
        self._row_groups = row_groups(shards)
        self._steps: dict[int, int] = {}
        mine = list(range(data.lanes)) if lanes is None else list(lanes)
        readers = max(1, min(data.first_readers, len(mine)))
        self._mine, self._lanes = mine, _dealt(mine, readers)
        self._pace = Pace(readers, min(data.most_readers, max(1, len(mine))), data.prefetch_memory << 20)
        self._starting: _Starting | None = None
        self._arrived: tuple[float, int] | None = None  # when the call before came, and its steps
        self._options = {
            "data": data,
            "split": split,
            "items": items,
            "episode": data.episode,
            "seed": seed,
            "features": features,
            "timestamps": timestamps,
            "quarantined": quarantined,
        }
        #: Readers that were replaced.
        self.restarts = 0
        #: Seconds that the consumer waited for batches.
        self.wait_seconds = 0.0
        self._deaths = 0
        self._call_steps = 0  # of the newest call, unless an epoch's end cut it
        self._queue: deque[_Call] = deque()
        self._actors: list[Any] = [self._actor(num_cpus) for _ in range(readers)]
        self._pids: list[int] = [0] * readers
        try:
            opened = [actor.open.remote() for actor in self._actors]
            for i, ref in enumerate(opened):
                try:
                    self._opened(i, ref)
                except _DEATHS as death:
                    self._replace(i, death)
        except BaseException:
            self.close()
            raise

    def steps(self, epoch: int) -> int:
        """Steps of an epoch, equal for all workers."""
        if epoch not in self._steps:
            data = self._data
            plan = EpochPlan(
                self._row_groups,
                seed=self._seed,
                epoch=epoch,
                lanes=data.lanes,
                tasks_per_step=data.tasks_per_step,
                window=data.shuffle_row_groups,
            )
            self._steps[epoch] = plan.steps
        return self._steps[epoch]

    def pids(self) -> list[int]:
        """Process ids of the readers."""
        return list(self._pids)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[TaskBatch]:
        """This worker's batches of an epoch from a step on, one a step, possibly of no task.

        The first steps of the next epoch are read ahead while this one's last are consumed.
        """
        step, end = start_step, self.steps(epoch)
        while step < end:
            if not self._queue or self._queue[0].place != (epoch, step):
                self._queue.clear()  # what was read ahead is for another place
                self._arrived, self._call_steps = None, 0
            self._fill(epoch, step)
            begun = time.monotonic()
            parts = [self._part(i) for i in range(len(self._queue[0].refs))]
            arrived = time.monotonic()
            self.wait_seconds += arrived - begun
            call = self._queue[0]
            self._pace.sized(call.steps, sum(batches.bytes for batches, _ in parts))
            if self._arrived is not None:
                before, trained = self._arrived
                self._pace.timed(call.steps, max(seconds for _, seconds in parts), trained, begun - before)
            self._arrived = arrived, call.steps
            self._fill(epoch, step)  # the first batches tell how many of them may be in flight
            self._queue.popleft()
            self._grow()
            step += call.steps
            self._deaths = 0
            for of_readers in zip(*(batches for batches, _ in parts), strict=True):
                yield concatenate_batches(of_readers)

    def close(self) -> None:
        """Ends the readers."""
        self._queue.clear()
        for actor in [*self._actors, *([self._starting.actor] if self._starting else [])]:
            ray.kill(actor)
        self._actors, self._starting = [], None

    def _fill(self, epoch: int, step: int) -> None:
        """Asks for steps from here on until as many of them are in flight as `prefetch` and their bytes allow."""
        ahead = self._pace.ahead(self._data.prefetch)
        in_flight = sum(call.steps for call in self._queue)
        if self._queue:
            epoch, step = self._after(self._queue[-1])
        while self._epochs is None or epoch < self._epochs:
            if not self.steps(epoch):
                return
            call_steps = self._pace.call(self._data.prefetch, self._call_steps)
            steps = min(call_steps, self.steps(epoch) - step)
            # Without a number of steps, epochs of few steps would be asked for by the thousand.
            if in_flight + steps > ahead or (self._data.prefetch == "auto" and len(self._queue) >= MOST_CALLS):
                return
            self._call_steps = call_steps
            lanes = self._lanes
            refs = [actor.read.remote(epoch, step, steps, own) for actor, own in zip(self._actors, lanes, strict=True)]
            self._queue.append(_Call((epoch, step), steps, lanes, refs))
            in_flight += steps
            epoch, step = self._after(self._queue[-1])

    def _after(self, call: _Call) -> tuple[int, int]:
        epoch, step = call.place
        return (epoch, step + call.steps) if step + call.steps < self.steps(epoch) else (epoch + 1, 0)

    def _grow(self) -> None:
        """Adds a reader where more would keep up better: begins to start it, or takes it in once it has started."""
        if self._starting is None:
            if self._pace.wanted() > len(self._actors):
                actor = self._actor(READER_CPUS, anywhere=True)
                self._starting = _Starting(actor, actor.open.remote(), time.monotonic())
            return
        actor, ref, since = self._starting
        if not ray.wait([ref], timeout=0)[0]:
            if time.monotonic() - since > START_SECONDS:
                self._no_more("no CPU was free for it")
            return
        self._starting = None
        try:
            self._pids.append(ray.get(ref))
        except (*_DEATHS, RayTaskError) as error:
            self._starting = _Starting(actor, ref, since)
            self._no_more(_shortly(error))
            return
        self._actors.append(actor)
        self._lanes = _dealt(self._mine, len(self._actors))
        self._pace.now(len(self._actors))
        log.info("%d readers feed this worker: fewer could not keep up", len(self._actors))

    def _no_more(self, why: str) -> None:
        assert self._starting is not None
        ray.kill(self._starting.actor)
        self._starting = None
        self._pace.no_more()
        log.warning("Another reader would help, but could not be started (%s): %d go on.", why, len(self._actors))

    def _part(self, i: int) -> tuple[TaskBatches, float]:
        """Reader i's part of the first call in the queue, from a new reader where it died."""
        while True:
            try:
                return ray.get(self._queue[0].refs[i])
            except _DEATHS as death:
                self._replace(i, death)
            except RayTaskError as error:
                raise _own(error) from None

    def _replace(self, i: int, death: Exception) -> None:
        """A new reader i, asked again for every step in flight.

        Raises:
            TrainingError: Readers keep dying.
        """
        while True:
            self._deaths += 1
            epoch, step = self._queue[0].place if self._queue else (0, 0)
            place = f"epoch {epoch}, step {step}, lanes {self._lanes[i]}"
            if self._deaths > DEATHS_IN_A_ROW:
                raise TrainingError(
                    f"Readers keep dying: {self._deaths} deaths without a batch in between.",
                    where=place,
                    got=_shortly(death),
                    remedy="Look for its end in Ray's logs; where memory ran out, lower data.shuffle_row_groups, "
                    "data.prefetch or data.readers_per_worker.",
                ) from death
            self.restarts += 1
            log.warning("A reader died (%s); another one goes on at %s.", type(death).__name__, place)
            ray.kill(self._actors[i])  # a lost batch does not mean that the actor is gone
            self._actors[i] = self._actor(
                self._num_cpus if i < self._data.first_readers else READER_CPUS, anywhere=True
            )
            try:
                self._opened(i, self._actors[i].open.remote())
            except _DEATHS as another:
                death = another
                continue
            for call in self._queue:
                if i < len(call.refs):  # calls from before this reader was added have no part of it
                    call.refs[i] = self._actors[i].read.remote(*call.place, call.steps, call.lanes[i])
            return

    def _actor(self, num_cpus: float, anywhere: bool = False) -> Any:
        # On this node while it has room, so that batches reach the worker through shared memory. By the node's name,
        # since a child of a Ray Train worker would otherwise go into its placement group, where there is no room.
        node = ray.get_runtime_context().get_node_id()
        if anywhere and num_cpus:
            turn = self._mine[0] if self._mine else 0
            node = node_for(ray.nodes(), available_resources_per_node(), node, num_cpus, turn)
        there = NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)
        own: dict[str, Any] = {"runtime_env": environment} if (environment := with_malloc()) else {}
        placed = ray.remote(TaskReader).options(num_cpus=num_cpus, max_restarts=0, scheduling_strategy=there, **own)
        return placed.remote(self._url, self._options)

    def _opened(self, i: int, ref: ray.ObjectRef) -> None:
        try:
            self._pids[i] = ray.get(ref, timeout=START_SECONDS)
        except GetTimeoutError as error:
            raise TrainingError(
                f"A reader did not start within {START_SECONDS:.0f} s: the cluster may have no CPU left for it.",
                where=f"lanes {self._lanes[i]}",
                got=f"{self._num_cpus} CPUs wanted; free: {ray.available_resources().get('CPU', 0.0)}",
                remedy="Lower train.workers or data.readers_per_worker, or give the cluster more CPUs.",
            ) from error
        except RayTaskError as error:
            raise _own(error) from None


def _dealt(lanes: Sequence[int], readers: int) -> list[list[int]]:
    return [lanes_of(lanes, readers, i) for i in range(readers)]


def _shortly(death: Exception) -> str:
    """Ray's long text: its first line, and its last, which is the cause where a constructor failed."""
    lines = str(death).strip().splitlines() or [type(death).__name__]
    return lines[0] if len(lines) == 1 else f"{lines[0].strip()} … {lines[-1].strip()}"


def _own(error: RayTaskError) -> BaseException:
    """An error of ours as itself: trying again cannot mend it, and its text is for people."""
    return error.cause if isinstance(error.cause, MetatrainError) else error
