"""A straight-line program of tensor operations over fixed buffers: recorded as it first runs, then run again.

Promises: a replay does exactly what the recording did, on what the input buffers hold then. On CPU the work of one
inner step is some sixty calls of a few microseconds each; deciding names, slicing, transposing and dispatching views in
Python would cost as much again as the arithmetic. It is to a CPU what a captured graph is to a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class Rate:
    """An inner rate, or its negative, in place of a number: it is filled in before each replay."""

    __slots__ = ("name", "sign", "step")

    def __init__(self, step: int, name: str, sign: float = 1.0) -> None:
        self.step, self.name, self.sign = step, name, sign

    def __neg__(self) -> Rate:
        return Rate(self.step, self.name, -self.sign)


class Workspace:
    """Buffers by name: fresh large tensors cost page faults, several times the arithmetic on them.

    Programs of different shapes share them, so that the largest decides what is held. A buffer's content lasts until
    another program asks for the same name. `generation` changes when a buffer was replaced by a larger one: programs
    recorded before must then be recorded again, for they would keep the old one alive.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like.detach()
        self._flat: dict[str, Tensor] = {}
        self.generation = 0

    def __call__(self, name: str, *shape: int) -> Tensor:
        """A tensor of that shape; new content is undefined."""
        size = 1
        for length in shape:
            size *= length
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            if flat is not None:
                self.generation += 1
            # A buffer made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                flat = self._flat[name] = self._like.new_empty(size)
        return flat[:size].view(shape)

    def buffers(self) -> list[Tensor]:
        """All that it holds, flat."""
        return list(self._flat.values())


class Program:
    """Operations in order. Calling it runs an operation and records it; see the module."""

    def __init__(self, rates: list[dict[str, float]]) -> None:
        self._rates = rates
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        self._open: list[tuple[dict[str, Any], str, Rate]] = []

    def __call__(self, operation: Callable[..., Any], *inputs: Any, **options: Any) -> None:
        """Run `operation(*inputs, **options)` and record it. It must write into tensors that are given to it."""
        for key, value in options.items():
            if isinstance(value, Rate):
                self._open.append((options, key, value))
                options[key] = value.sign * self._rates[value.step][value.name]
        operation(*inputs, **options)
        self._calls.append((operation, inputs, options))

    @property
    def empty(self) -> bool:
        """Whether nothing was recorded."""
        return not self._calls

    def calls(self) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
        """Operation, inputs and options of each, with rates as they were recorded."""
        rates: dict[int, dict[str, Rate]] = {}
        for options, key, rate in self._open:
            rates.setdefault(id(options), {})[key] = rate
        return ((operation, inputs, options | rates.get(id(options), {})) for operation, inputs, options in self._calls)

    def inputs(self) -> Iterator[Tensor]:
        """The tensors that recorded operations are given by position."""
        return (value for _, values, _ in self._calls for value in values if isinstance(value, Tensor))

    def fill_in(self, rates: list[dict[str, float]]) -> None:
        """Rates of the next replays."""
        for options, key, rate in self._open:
            options[key] = rate.sign * rates[rate.step][rate.name]

    def replay(self) -> None:
        """Run all of it again."""
        for operation, inputs, options in self._calls:
            operation(*inputs, **options)


class Window:
    """All that programs read of one input buffer, moved together to another tensor of its shape: a copy spared."""

    def __init__(self, buffer: Tensor, programs: list[Program]) -> None:
        # An object of its own: the buffer that was recorded is among what moves.
        self.buffer = buffer.view(buffer.shape)
        place = buffer.untyped_storage().data_ptr()
        found: dict[int, Tensor] = {}
        for program in programs:
            for tensor in program.inputs():
                if tensor.numel() and tensor.untyped_storage().data_ptr() == place:
                    found[id(tensor)] = tensor
        self._views = [(t, t.storage_offset() - buffer.storage_offset(), t.shape, t.stride()) for t in found.values()]

    def move(self, to: Tensor) -> None:
        """Read from `to`, contiguous and of the buffer's shape, until the next move."""
        storage, start = to.untyped_storage(), to.storage_offset()
        for view, offset, shape, stride in self._views:
            view.set_(storage, start + offset, shape, stride)  # pyright: ignore[reportCallIssue, reportArgumentType]


def add_product_sum(into: Tensor, scratch: Tensor, a: Tensor, b: Tensor, sign: float) -> None:
    """into (no axes) += sign · Σ a ⊙ b, where a and b broadcast to the shape of `scratch`."""
    into.add_(torch.mul(a, b, out=scratch).sum(), alpha=sign)
