"""A stream of random faults for `tools/chaos.py`: what happens at which step, a function of the seed alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from metatrain.faults import Action, Fault

#: Seconds that a worker may be without progress in these runs.
HANG_SECONDS = 15.0

PHASES_OF_A_STEP = ("train.read", "train.lookup", "train.backward", "train.update")
PHASES_OF_A_CHECKPOINT = (
    "checkpoint.copy",
    "checkpoint.copied",
    "checkpoint.write",
    "checkpoint.metadata",
    "checkpoint.commit",
    "checkpoint.committed",
    "checkpoint.prune",
)
#: What only rank 0 does.
BY_RANK_0 = ("checkpoint.metadata", "checkpoint.commit", "checkpoint.committed", "checkpoint.prune")
TRANSIENT = ("ETIMEDOUT", "ECONNRESET", "EIO", "EAGAIN")


@dataclass(frozen=True)
class Event:
    """A fault of the stream.

    Attributes:
        kind: Of `KINDS`.
        step: When: at the first passage from this step on.
        faults: What the run's processes do to themselves, all of them in one go.
        outside: What is done to them: `node killed` or `command killed`.
        details: For the table.
        ends_the_command: Whether the command ends, and is to be given again.
    """

    kind: str
    step: int
    faults: tuple[Fault, ...] = ()
    outside: str | None = None
    details: str = ""
    ends_the_command: bool = False


@dataclass(frozen=True)
class Place:
    """Where in a run a fault is to happen: step `total`, which is `step` of `epoch`; and how many workers there are."""

    total: int
    epoch: int
    step: int
    ranks: int


def places(steps_of: Sequence[int], ranks: int) -> list[Place]:
    """The place of every step of a run whose epochs have so many steps."""
    inside = [(epoch, step) for epoch, steps in enumerate(steps_of) for step in range(steps)]
    return [Place(total, epoch, step, ranks) for total, (epoch, step) in enumerate(inside)]


def _at_a_rank(draw: random.Random, place: Place, points: Sequence[str], action: Action, **how: Any) -> Fault:
    at = draw.choice(points)
    rank = 0 if at in BY_RANK_0 else draw.randrange(place.ranks)
    return Fault(at, action, step=place.total, rank=rank, **how)


def _at_a_reader(place: Place, action: Action, **how: Any) -> Fault:
    return Fault("reader.read", action, epoch=place.epoch, step=place.step, **how)


def _of(kind: str, place: Place, *faults: Fault, **how: Any) -> Event:
    first = faults[0]
    who = [f"rank {first.rank}"] if first.rank is not None else []
    what = {"delay": f"{first.seconds} s", "error": f"{first.errno} × {first.times}"}.get(first.action, first.action)
    return Event(kind, place.total, faults, details=", ".join([*who, first.at, what]), **how)


def _worker_killed(kind: str, draw: random.Random, place: Place) -> Event:
    return _of(kind, place, _at_a_rank(draw, place, PHASES_OF_A_STEP, "kill"))


def _checkpoint_killed(kind: str, draw: random.Random, place: Place) -> Event:
    return _of(kind, place, _at_a_rank(draw, place, PHASES_OF_A_CHECKPOINT, "kill"))


def _checkpoint_cut(kind: str, draw: random.Random, place: Place) -> Event:
    cut = _at_a_rank(draw, place, ["checkpoint.write"], "truncate")
    # At the same passage, in the order of the plan.
    return _of(kind, place, cut, Fault("checkpoint.write", "kill", step=place.total, rank=cut.rank))


def _reader_killed(kind: str, draw: random.Random, place: Place) -> Event:
    return _of(kind, place, _at_a_reader(place, "kill"))


def _reader_slow(kind: str, draw: random.Random, place: Place) -> Event:
    return _of(kind, place, _at_a_reader(place, "delay", seconds=round(draw.uniform(1, 4), 1)))


def _reader_hangs(kind: str, draw: random.Random, place: Place) -> Event:
    return _of(kind, place, _at_a_reader(place, "freeze"))


def _worker_slow(kind: str, draw: random.Random, place: Place) -> Event:
    return _of(kind, place, _at_a_rank(draw, place, PHASES_OF_A_STEP, "delay", seconds=round(draw.uniform(1, 4), 1)))


def _worker_hangs(kind: str, draw: random.Random, place: Place) -> Event:
    return _of(kind, place, _at_a_rank(draw, place, PHASES_OF_A_STEP, draw.choice(("hang", "freeze"))))


def _storage_fails(kind: str, draw: random.Random, place: Place) -> Event:
    how = {"errno": draw.choice(TRANSIENT), "times": draw.randint(1, 3)}
    return _of(kind, place, Fault("storage.write", "error", step=place.total, rank=0, **how))


def _storage_slow(kind: str, draw: random.Random, place: Place) -> Event:
    seconds = round(draw.uniform(1, 4), 1)
    return _of(kind, place, Fault("storage.write", "delay", step=place.total, rank=0, seconds=seconds))


def _disk_full(kind: str, draw: random.Random, place: Place) -> Event:
    fault = Fault("storage.write", "error", step=place.total, rank=0, errno="ENOSPC")
    return _of(kind, place, fault, ends_the_command=True)


def _node_killed(kind: str, draw: random.Random, place: Place) -> Event:
    return Event(kind, place.total, outside="node killed", details="another one comes")


def _command_killed(kind: str, draw: random.Random, place: Place) -> Event:
    return Event(kind, place.total, outside="command killed", details="given again", ends_the_command=True)


#: Kind → how it is made, and how often beside the once that every kind is there: those that cost a restart seldom.
KINDS: dict[str, tuple[Callable[[str, random.Random, Place], Event], int]] = {
    "worker killed in a step": (_worker_killed, 2),
    "worker killed in a checkpoint": (_checkpoint_killed, 2),
    "file of an unfinished checkpoint cut short": (_checkpoint_cut, 0),
    "reader killed": (_reader_killed, 5),
    "reader slow": (_reader_slow, 4),
    "reader hangs": (_reader_hangs, 0),
    "worker slow": (_worker_slow, 4),
    "worker hangs": (_worker_hangs, 0),
    "storage fails for a while": (_storage_fails, 5),
    "storage slow": (_storage_slow, 4),
    "disk full": (_disk_full, 0),
    "Ray node killed": (_node_killed, 0),
    "command killed": (_command_killed, 0),
}
#: Those after which a run goes on in the same processes, or with another reader.
MILD = (
    "reader killed",
    "reader slow",
    "worker slow",
    "storage fails for a while",
    "storage slow",
)


def random_events(seed: int, count: int, there: Sequence[Place], mild: bool = False, nodes: int = 1) -> list[Event]:
    """So many faults over a run, in their order: every kind once, and more of those that cost little.

    Args:
        seed: Another seed is another stream.
        count: Number of faults: `nodes` or more.
        there: The run's places.
        mild: Only faults that need no restart of the workers.
        nodes: Nodes that are killed.
    """
    draw = random.Random(seed)
    known = [name for name in KINDS if name in MILD or not mild]
    once = draw.sample(known, min(count - (nodes - 1), len(known)))
    once += ["Ray node killed"] * (nodes - 1)
    names = once + draw.choices(known, [KINDS[name][1] for name in known], k=count - len(once))
    draw.shuffle(names)
    # One in each of equal stretches, so that the run has got over one before the next; none in the last 5 %.
    length = 0.95 * len(there) / count
    events = [
        KINDS[name][0](name, draw, there[int((n + draw.uniform(0.1, 0.9)) * length)]) for n, name in enumerate(names)
    ]
    return [
        replace(event, faults=tuple(replace(f, id=f"{n:03d}-{i}") for i, f in enumerate(event.faults)))
        for n, event in enumerate(events)
    ]
