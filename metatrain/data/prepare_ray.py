"""Where preparation works: in plain Ray tasks, on whatever Ray is there, or in this very process. Errors come out bare.

Nothing large passes through the object store: tasks meet in staged files, and give back what they counted.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import ray
from ray.exceptions import RayError
from tqdm import tqdm

from metatrain.errors import MetatrainError
from metatrain.local_ray import local_ray

Work = TypeVar("Work")
Result = TypeVar("Result")
#: Tasks that are handed to Ray at a time, and for each of its CPUs: enough to make a cluster grow.
_WINDOW, _WINDOW_PER_CPU = 64, 4
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


class Workers(Protocol):
    """Where pieces of work are done."""

    def map(self, what: str, work: Sequence[Work], call: Callable[[Work], Result]) -> Iterator[Result]:
        """`call` of each piece of work; results come in no order. `what` names it for the progress bar.

        Raises:
            MetatrainError: As a call raised it.
        """
        ...

    def share(self, value: Work) -> Callable[[], Work]:
        """A large value that calls take by calling what this returns."""
        ...


class Here:
    """This process, one piece after the other: for logs that are done before Ray has started."""

    def map(self, what: str, work: Sequence[Work], call: Callable[[Work], Result]) -> Iterator[Result]:
        """As `Workers.map`."""
        return map(call, work)

    def share(self, value: Work) -> Callable[[], Work]:
        """As `Workers.share`."""
        return lambda: value


class RayTasks:
    """Tasks of the Ray session that is there."""

    def __init__(self, bars: bool) -> None:
        self._bars = bars

    def map(self, what: str, work: Sequence[Work], call: Callable[[Work], Result]) -> Iterator[Result]:
        """As `Workers.map`. A task whose worker or node dies is run again."""
        shared, left = ray.put(call), iter(work)
        window = max(_WINDOW, int(_WINDOW_PER_CPU * ray.cluster_resources().get("CPU", 1)))
        running: list[ray.ObjectRef] = []
        with tqdm(total=len(work), desc=what, disable=not self._bars, dynamic_ncols=True) as bar:
            try:
                while True:
                    while len(running) < window and (piece := next(left, self)) is not self:
                        running.append(_called.remote(shared, piece))
                    if not running:
                        return
                    done, running = ray.wait(running)
                    result = ray.get(done[0])
                    if isinstance(result, MetatrainError):
                        raise result
                    bar.update()
                    yield result
            finally:
                for task in running:
                    ray.cancel(task)

    def share(self, value: Work) -> Callable[[], Work]:
        """As `Workers.share`: put into the object store once."""
        reference = ray.put(value)
        return lambda: ray.get(reference)


@ray.remote(max_retries=3)
def _called(call: Callable[[Any], Any], piece: Any) -> Any:
    _return_large_blocks()
    try:
        return call(piece)
    except MetatrainError as error:
        return error  # as a value, since Ray's wrapping would print and rename it
    finally:
        # The worker's next task may be of another pass, whose memory should not come on top of what this one kept.
        pa.default_memory_pool().release_unused()


def _return_large_blocks() -> None:
    """Has large arrays go back to the system when they are freed.

    glibc raises its threshold when it meets them and keeps what comes after: a worker grew by half with its tasks.
    """
    with suppress(AttributeError, OSError):  # other C libraries have no such setting
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


@contextmanager
def workers(progress: bool, address: str | None = None, small: bool = False) -> Iterator[Workers]:
    """Where to work for the block: this process's Ray session, the cluster at `address`, or a local Ray of its own.

    What was started or joined here is left when the block ends.

    Args:
        progress: Whether to show bars, on a terminal.
        address: Of a Ray cluster, where this process has no Ray yet.
        small: Whether the work takes less time than starting Ray: without a session or an address, none is started.
    """
    started = not ray.is_initialized()
    if started and address is None and small:
        yield Here()
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    with ExitStack() as session:
        if started and address:
            ray.init(address=address, **quiet)
            session.callback(ray.shutdown)
        elif started:
            session.enter_context(local_ray(**quiet))
        try:
            yield RayTasks(progress and sys.stderr.isatty())
        except RayError as error:
            raise unwrapped(error) from None


def unwrapped(error: BaseException) -> BaseException:
    """The MetatrainError inside Ray's wrapping, or the error itself."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop()
        if isinstance(current, MetatrainError) and type(current).__module__ == MetatrainError.__module__:
            return current
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            queue += [current.__cause__, current.__context__, getattr(current, "cause", None)]
    return error
