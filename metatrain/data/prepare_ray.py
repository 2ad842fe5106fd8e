"""Ray Data as preparation uses it: quiet, on whatever Ray is there, and with errors as they were raised.

Every pass is a Ray Data pipeline whose rows are numbers of pieces of work, so Ray bounds how many run at a time.
"""

from __future__ import annotations

import logging
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import DataContext
from ray.data.context import ShuffleStrategy
from ray.exceptions import RayError

from metatrain.errors import MetatrainError

Work = TypeVar("Work")
#: Rows that a task gives back carry their value pickled, in one binary column.
_VALUE = "value"


@contextmanager
def quiet_ray(progress: bool, address: str | None = None) -> Iterator[None]:
    """A Ray session for the block: the one this process has, the cluster at `address`, or a local one of its own.

    What was started or joined here is left when the block ends. Errors come out bare.
    """
    started = not ray.is_initialized()
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if started and address:
        ray.init(address=address, **quiet)
    elif started:
        # Without an address Ray would join whatever cluster $RAY_ADDRESS, or another user of this machine, names.
        ray.init(address="local", include_dashboard=False, **quiet)
    context = DataContext.get_current()
    saved = {name: getattr(context, name) for name in _SETTINGS}
    bars = progress and sys.stderr.isatty()
    wished = dict(_SETTINGS) | {"enable_progress_bars": bars}
    loggers = {name: logging.getLogger(name) for name in ("ray.data", "ray.data._internal")}
    levels = {name: logger.level for name, logger in loggers.items()}
    try:
        for name, value in wished.items():
            setattr(context, name, value)
        for logger in loggers.values():
            # A failing task's traceback belongs to the error that we raise, not to the terminal as well.
            logger.setLevel(logging.CRITICAL)
        yield
    except RayError as error:
        raise unwrapped(error) from None
    finally:
        for name, value in saved.items():
            setattr(context, name, value)
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
        if started:
            ray.shutdown()


_SETTINGS: dict[str, Any] = {
    "enable_progress_bars": False,
    "enable_operator_progress_bars": False,
    "print_on_execution_start": False,
    # Partitions go through the object store, which spills to disk; the older shuffle holds them in actors' memory.
    "shuffle_strategy": ShuffleStrategy.SHUFFLE_V2,
}


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


def partitioned(
    count: int, read: Callable[[int], Iterator[pa.Table]], partitions: int, finish: Callable[[int, pa.Table], Any]
) -> Iterator[Any]:
    """Reads pieces 0 … count - 1 in parallel, shuffles rows by `partition`, and finishes each partition.

    Args:
        read: Gives a piece's rows, with an int32 column `partition`.
        finish: Is given a partition's number and all of its rows; what it returns is yielded.
    """

    def read_batch(batch: pa.Table) -> Iterator[pa.Table]:
        for number in batch["id"].to_pylist():
            yield from read(number)

    def finish_block(block: pa.Table) -> Iterator[pa.Table]:
        # Ray hashes the column once more, so two partitions may meet in a block, but none is ever in two.
        for number in sorted(block["partition"].unique().to_pylist()):
            rows = block.filter(pc.equal(block["partition"], number))
            yield _packed(finish, number, rows)

    if partitions == 1:
        # A log of one partition needs no shuffle, which would only start more processes.
        yield from mapped(
            [0], lambda number: finish(number, pa.concat_tables(t for i in range(count) for t in read(i)))
        )
        return
    pieces = ray.data.range(count, override_num_blocks=count).map_batches(
        read_batch, batch_size=1, batch_format="pyarrow"
    )
    shuffled = pieces.repartition(partitions, keys=["partition"])
    yield from _values(
        shuffled.map_batches(finish_block, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)
    )


def mapped(work: Sequence[Work], call: Callable[[Work], Any]) -> Iterator[Any]:
    """`call` of each piece of work, in parallel; results come in no order."""
    everything = list(work)

    def call_batch(batch: pa.Table) -> pa.Table:
        return pa.concat_tables(_packed(call, everything[number]) for number in batch["id"].to_pylist())

    pieces = ray.data.range(len(everything), override_num_blocks=len(everything))
    yield from _values(pieces.map_batches(call_batch, batch_size=1, batch_format="pyarrow"))


def shared(value: Work) -> Callable[[], Work]:
    """A large value put into the object store once; workers take it from there by calling what this returns."""
    reference = ray.put(value)
    return lambda: ray.get(reference)


def _packed(call: Callable[..., Any], *arguments: Any) -> pa.Table:
    try:
        value = call(*arguments)
    except MetatrainError as error:
        value = error  # as a value, since Ray's wrapping of a mapped function's exception loses its cause
    return pa.table({_VALUE: pa.array([pickle.dumps(value)], type=pa.large_binary())})


def _values(dataset: ray.data.Dataset) -> Iterator[Any]:
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        for packed in batch[_VALUE]:
            value = pickle.loads(packed.as_py())
            if isinstance(value, MetatrainError):
                raise value
            yield value
