"""Watching a worker group from outside: who hangs, when the group may start again, and checkpoints before it changes.

The `Teller` is the one place that all sides reach: the workers' heartbeats, the command that launched them, and Ray
Train's controller. It holds nothing that a run needs to go on.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
import ray.exceptions
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from metatrain.errors import MetatrainError, TrainingError
from metatrain.train.pulse import Asked, Pulse

log = logging.getLogger("metatrain")

#: Seconds between a worker's heartbeats.
BEAT_SECONDS = 2.0
#: A worker without a heartbeat for so long cannot run its threads: it is stopped, or in a call that never lets go.
SILENT_SECONDS = 20.0
#: Restarts in a row that got no further than the run had been, after which it ends.
FRUITLESS_RESTARTS = 10
#: The longest wait before a restart.
LONGEST_BACKOFF_SECONDS = 60.0
#: How long a change of the group waits for a checkpoint.
SAVE_SECONDS = 300.0


@dataclass
class Rank:
    """What a rank last said of itself."""

    rank: int
    pid: int
    node: str
    step: int
    stage: str
    count: int
    idle_seconds: float
    heard: float  # monotonic clock of the teller

    def idle_at(self, now: float) -> float:
        """Seconds without progress."""
        return self.idle_seconds + now - self.heard

    def described(self, now: float) -> str:
        """As a person is told. Of a silent one, step and stage are those of its last sign of life."""
        silent = f" (no sign of life for {now - self.heard:.0f} s)" if now - self.heard > SILENT_SECONDS else ""
        place = f"rank {self.rank} (process {self.pid}), step {self.step}, stage {self.stage!r}"
        return f"{place}, {self.idle_at(now):.0f} s without progress{silent}"


class Watch:
    """The workers of the present group, and how often groups began. Knows nothing of Ray."""

    def __init__(self, backoff_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._backoff, self._clock = backoff_seconds, clock
        self._group, self._known = "", set[str]()
        self._ranks: dict[int, Rank] = {}
        self._furthest, self._at_start, self._fruitless = 0, 0, 0
        self._asked = self._saved = 0
        self._reason, self._over = "", False

    def begin(self, group: str) -> float:
        """A worker of a group starts. Returns the seconds that it is to wait, equal for all of the group.

        Raises:
            TrainingError: Too many groups before it got no further.
        """
        if group not in self._known:
            if self._known:
                self._fruitless = 0 if self._furthest > self._at_start else self._fruitless + 1
            self._known.add(group)
            self._group, self._ranks, self._at_start = group, {}, self._furthest
            self._over = False
            self._saved = self._asked  # what the group before was asked for
        if self._fruitless >= FRUITLESS_RESTARTS:
            raise TrainingError(
                f"{self._fruitless} restarts of the workers in a row trained no step that was not trained before.",
                where=f"step {self._furthest}",
                remedy="Look for the cause in the messages above; the same command goes on from the last checkpoint.",
            )
        return backoff(self._fruitless, self._backoff)

    def beat(self, group: str, rank: Rank) -> tuple[int, str]:
        """Takes a heartbeat. Returns the number of the checkpoint that is asked for, 0 if none, and what it is for."""
        if group == self._group and not self._over:
            rank.heard = self._clock()
            self._ranks[rank.rank] = rank
            self._furthest = max(self._furthest, rank.step)
        return (self._asked, self._reason) if self._asked > self._saved else (0, "")

    def leave(self, group: str, rank: int) -> None:
        """A worker is at its end, or in an error that it reports itself."""
        if group == self._group:
            self._ranks.pop(rank, None)

    def over(self) -> None:
        """The group is gone, or about to be ended: what is still heard of it does not count."""
        self._ranks, self._over = {}, True

    def hanging(self, seconds: float) -> list[Rank]:
        """The ranks that the group has waited for, for so many seconds without progress."""
        now = self._clock()
        if not self._ranks:
            return []
        least = min(rank.count for rank in self._ranks.values())
        behind = [rank for rank in self._ranks.values() if rank.count == least]
        if min(rank.idle_at(now) for rank in behind) < seconds:
            return []
        silent = [rank for rank in behind if now - rank.heard > SILENT_SECONDS]
        return silent or behind

    def ask_save(self, reason: str) -> int:
        """Asks the group for a checkpoint. Returns its number, 0 where there is no group that could make one."""
        if not self._live():
            return 0
        self._asked += 1
        self._reason = reason
        return self._asked

    def saved(self, number: int) -> None:
        """A checkpoint from after that wish is whole."""
        self._saved = max(self._saved, number)

    def settled(self, number: int) -> bool:
        """Whether the checkpoint is whole, or nobody is there any more to make it."""
        return self._saved >= number or not self._live()

    def _live(self) -> bool:
        now = self._clock()
        return bool(self._ranks) and all(now - rank.heard < SILENT_SECONDS for rank in self._ranks.values())


def backoff(fruitless: int, seconds: float) -> float:
    """The wait before a restart, after so many in a row that got no further: none before the first."""
    return min(LONGEST_BACKOFF_SECONDS, seconds * 2 ** (fruitless - 2)) if fruitless >= 2 else 0.0


@ray.remote(num_cpus=0)
class Teller:
    """Carries the workers' messages to the command that launched them, and watches the workers."""

    def __init__(self, backoff_seconds: float) -> None:
        self._messages: list[dict[str, Any]] = []
        self._fatal: MetatrainError | None = None
        self._watch = Watch(backoff_seconds)
        self._named: set[int] = set()

    def tell(self, message: dict[str, Any]) -> None:
        """Takes a message."""
        self._messages.append(message)

    def drain(self) -> list[dict[str, Any]]:
        """The messages since the last call."""
        messages, self._messages = self._messages, []
        return messages

    def end_with(self, error: MetatrainError) -> None:
        """Takes an error that another try cannot mend."""
        self._fatal = self._fatal or error

    def fatal(self) -> MetatrainError | None:
        """The error that ends the run."""
        return self._fatal

    def begin(self, group: str) -> float:
        """As `Watch.begin`; its error ends the run."""
        try:
            return self._watch.begin(group)
        except MetatrainError as error:
            self.end_with(error)
            return 0.0

    def beat(self, group: str, rank: Rank) -> tuple[int, str]:
        """As `Watch.beat`."""
        return self._watch.beat(group, rank)

    def leave(self, group: str, rank: int) -> None:
        """As `Watch.leave`."""
        self._watch.leave(group, rank)

    def over(self) -> None:
        """As `Watch.over`."""
        self._watch.over()

    def hanging(self, seconds: float) -> list[tuple[Rank, str]]:
        """The ranks that hang and were not named before, each with its description."""
        now = time.monotonic()
        found = [rank for rank in self._watch.hanging(seconds) if rank.pid not in self._named]
        self._named.update(rank.pid for rank in found)
        return [(rank, rank.described(now)) for rank in found]

    def ask_save(self, reason: str) -> int:
        """As `Watch.ask_save`."""
        return self._watch.ask_save(reason)

    def saved(self, number: int) -> None:
        """As `Watch.saved`."""
        self._watch.saved(number)

    def settled(self, number: int) -> bool:
        """As `Watch.settled`."""
        return self._watch.settled(number)


def make_teller(backoff_seconds: float) -> Any:
    """A teller on this process's node: it is to live as long as the command does, whichever other node is lost."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return cast(Any, Teller).options(scheduling_strategy=here).remote(backoff_seconds)


def fatal(teller: Any) -> MetatrainError | None:
    """The error that ends the run, if there is one."""
    return cast("MetatrainError | None", ray.get(teller.fatal.remote()))


# --- on a worker ---------------------------------------------------------------------------------------------------


def group_name() -> str:
    """A name that the workers of one group share, and no other group has: where rank 0 waited for the others."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


@contextlib.contextmanager
def heart(teller: Any, rank: int, pulse: Pulse, asked: Asked) -> Iterator[None]:
    """While the block runs, a thread reports this worker's pulse, and brings what is asked of rank 0."""
    group, over = group_name(), threading.Event()
    me = {"rank": rank, "pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}

    def beat_on() -> None:
        wanted = 0
        while not over.is_set():
            now = Rank(
                **me, step=pulse.step, stage=pulse.stage, count=pulse.count, idle_seconds=pulse.idle_seconds, heard=0.0
            )
            # Where the command is gone, this worker's end is not for this thread to decide.
            with contextlib.suppress(ray.exceptions.RayError):
                number, reason = cast("tuple[int, str]", ray.get(teller.beat.remote(group, now)))
                if rank == 0 and number > wanted:
                    wanted = number
                    asked.ask(reason, functools.partial(teller.saved.remote, number))
            over.wait(BEAT_SECONDS)

    thread = threading.Thread(target=beat_on, name="heart", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        teller.leave.remote(group, rank)


# --- beside the launching command ----------------------------------------------------------------------------------


def kill_hanging(teller: Any, seconds: float) -> list[str]:
    """Kills the workers that hang, so that Ray Train starts the group again. Returns what to say of each."""
    found = cast("list[tuple[Rank, str]]", ray.get(teller.hanging.remote(seconds)))
    for rank, _ in found:
        # By a process on its node: a stopped process, or one in a call that never lets go, heeds no request of Ray's.
        there = NodeAffinitySchedulingStrategy(rank.node, soft=False)
        ray.remote(num_cpus=0, max_retries=0)(_kill_worker).options(scheduling_strategy=there).remote(rank.pid)
    return [described for _, described in found]


def _kill_worker(pid: int) -> None:
    with contextlib.suppress(OSError):
        if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)


class Overseer(ControllerCallback):
    """In Ray Train's controller: a checkpoint before a healthy group changes its size, and the time of each failure."""

    def __init__(self, teller: Any) -> None:
        self._teller = teller

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Waits for a checkpoint where a group is at work: without it, the steps since the last would be done again."""
        with _never_raising():
            number = cast(int, ray.get(self._teller.ask_save.remote("the worker group is about to change")))
            ends = time.monotonic() + SAVE_SECONDS
            while number and time.monotonic() < ends and not ray.get(self._teller.settled.remote(number)):
                time.sleep(0.2)

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Tells when the failure was seen."""
        with _never_raising():
            self._teller.over.remote()
            self._teller.tell.remote({"mark": "failure seen", "at": time.time()})


@contextlib.contextmanager
def _never_raising() -> Iterator[None]:
    """An error in a callback would end the run, for something that it can do without."""
    try:
        yield
    except Exception:
        log.warning("the watch over the workers failed", exc_info=True)
