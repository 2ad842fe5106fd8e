"""A recorded low-rank program of one task, translated for the kernels that run it task by task.

Promises: what the recorded torch operations give, up to rounding. torch records the program from the code that serves
where there are no kernels, so that the mathematics is written down once. What the kernels do not have is an error while
translating (`CannotTranslate`), never another result.

The kernels are `low_rank_kernels.cpp`, built by `low_rank_build`; `OPERATION` and `BASE` are its structs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from metatrain.meta.low_rank_elementwise import ACTIVATIONS, LossDerivatives
from metatrain.meta.low_rank_products import accumulate, multiply, multiply_add
from metatrain.meta.low_rank_program import Program, Rate, Workspace, add_product_sum


class _Place(ctypes.Structure):
    _fields_ = (("base", ctypes.c_int64), ("offset", ctypes.c_int64), ("stride", ctypes.c_int64 * 3))


class OPERATION(ctypes.Structure):
    """`Operation` of the kernels."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("variant", ctypes.c_int64),
        ("alpha_rate", ctypes.c_int64),
        ("beta_rate", ctypes.c_int64),
        ("alpha", ctypes.c_double),
        ("beta", ctypes.c_double),
        ("size", ctypes.c_int64 * 3),
        ("at", _Place * 4),
    )


class BASE(ctypes.Structure):
    """`Base` of the kernels."""

    _fields_ = (("start", ctypes.c_void_p), ("a_task", ctypes.c_int64))


# In the order of the enumerations of the kernels.
(
    _PRODUCT,
    _MULTIPLY,
    _ADD,
    _ADD_PRODUCT,
    _SCALE,
    _ADD_NUMBER,
    _RSQRT,
    _SUM,
    _DOT,
    _ACTIVATE,
    _LOSS_SLOPE,
    _LOSS_CURVATURE,
) = range(12)
_ACTIVATIONS = {ACTIVATIONS[name].evaluate: number for number, name in enumerate(("relu", "tanh", "silu", "gelu"))}
_LOSSES = {name: number for number, name in enumerate(("squared", "absolute", "huber", "binary_cross_entropy"))}

#: Numbers to whose multiples buffers are laid out: a line of the cache, of float32.
_LINE = 16
#: From this inner length on rows are multiplied with rows as they lie; below, the right side is transposed first.
_DEEP = 128

_Number = float | int | Rate
_At = tuple[int, int, list[int]]  # base, offset, strides
_NOWHERE: _At = (-1, 0, [0, 0, 0])


class CannotTranslate(ValueError):  # noqa: N818 - not a failure: the reason for going by torch
    """The kernels do not have what a program does; the text says what."""


def _adds_to(product: OPERATION, last: OPERATION) -> bool:
    """Whether a product is added to the result of the one before it in a way that the kernels can take together.

    Its factors are others than that result: torch takes no product onto its own factors.
    """
    one, other = bytes(last.at[0]), bytes(product.at[0])
    same = one == other == bytes(product.at[3]) and list(last.size[:2]) == list(product.size[:2])
    factors = (last.alpha, last.alpha_rate) == (product.alpha, product.alpha_rate)
    beta = product.beta == 1 and product.beta_rate < 0
    rows = all(op.at[2].stride[1] == 1 for op in (last, product))
    columns = last.at[0].stride[1] == 1 and (last.at[3].base < 0 or last.at[3].stride[1] == 1)
    return same and factors and beta and rows and columns and last.size[2] + product.size[2] <= _DEEP


class Translation:
    """Programs of one task, as the kernels read them.

    Args:
        programs: In the order in which they run.
        ws: Whose buffers they use. Those that are not named in what follows are each thread's own.
        summed: Buffers that start at zero and are added up over all tasks.
        a_task: Buffers of which every task has its own part, in tensors of all tasks.
        shared: Buffers that all tasks read.
        rate_names: Columns of the rates.
        losses: Those that the programs take derivatives of.

    Attributes:
        operations: What the kernels run.
        transposed: Views of shared buffers that the kernels read with rows in one piece: number among `shared`, shape,
            strides, offset. Copies of them are bases after the shared buffers.

    Raises:
        CannotTranslate: See the class.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        ws: Workspace,
        summed: Sequence[Tensor],
        a_task: Sequence[Tensor],
        shared: Sequence[Tensor],
        rate_names: tuple[str, ...],
        losses: Iterable[LossDerivatives],
    ) -> None:
        self._rate_names = rate_names
        self._losses: dict[object, tuple[int, int, float]] = {}
        for loss in losses:
            if loss.name is not None:
                self._losses[loss.slope] = (_LOSS_SLOPE, _LOSSES[loss.name], loss.delta)
                if callable(loss.curvature):
                    self._losses[loss.curvature] = (_LOSS_CURVATURE, _LOSSES[loss.name], loss.delta)
        self._arena = 0  # its length in numbers
        self._places: dict[int, tuple[int, int]] = {}  # a buffer's storage → base, and where in it that begins
        self._sums: list[tuple[int, torch.Size, tuple[int, ...]]] = []
        for buffer in summed:
            self._sums.append((self._arena, buffer.shape, buffer.stride()))
            self._place(buffer, 0, self._room(buffer.numel()))
        self._summed = self._arena
        self._shared = range(1 + len(a_task), 1 + len(a_task) + len(shared))
        for number, buffer in enumerate((*a_task, *shared)):
            self._place(buffer, 1 + number, 0)
        for flat in ws.buffers():
            if flat.untyped_storage().data_ptr() not in self._places:
                self._place(flat, 0, self._room(flat.numel()))
        self._numbers_a_task = [buffer.numel() for buffer in a_task]
        self.transposed: list[tuple[int, tuple[int, ...], tuple[int, ...], int]] = []
        self._writes: dict[int, int] = {}  # a buffer's storage → how often it was written to
        self._copies: dict[object, tuple[int, int]] = {}
        found: list[OPERATION] = []
        self._found = found
        for program in programs:
            for operation, inputs, options in program.calls():
                self._translate(operation, inputs, options)
        self.operations = (OPERATION * len(found))(*found)
        del self._found, self._places, self._writes, self._copies, self._losses

    def _place(self, buffer: Tensor, base: int, offset: int) -> None:
        self._places[buffer.untyped_storage().data_ptr()] = (base, offset)

    def _room(self, numbers: int) -> int:
        start, self._arena = self._arena, self._arena + -(-numbers // _LINE) * _LINE
        return start

    # ---- operations, by the names that torch gives them ----

    def _translate(self, operation: Callable[..., Any], inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        own = getattr(operation, "__self__", None)
        if isinstance(own, Tensor):
            name, inputs = operation.__name__.rstrip("_"), (own, *inputs)
            out: Any = own
        else:
            name, out = getattr(operation, "__name__", repr(operation)), options.get("out")
            if operation in self._losses:
                return self._loss(*self._losses[operation], *inputs)
            if operation in _ACTIVATIONS:
                return self._activate(_ACTIVATIONS[operation], *inputs)
            if operation is accumulate:
                return self._accumulate(*inputs, **options)
            if operation is add_product_sum:
                return self._add_product_sum(*inputs)
        handler = self._HANDLERS.get(operation if operation in (multiply, multiply_add) else name)
        if handler is None or not isinstance(out, Tensor):
            raise CannotTranslate(f"there is no kernel for {name}")
        handler(self, out, *inputs, **{key: value for key, value in options.items() if key != "out"})
        return None

    def _loss(self, kind: int, variant: int, delta: float, scores: Tensor, labels: Tensor, out: Tensor) -> None:
        self._elementwise(kind, out, [scores, labels], delta, variant=variant)

    def _activate(self, variant: int, h: Tensor, slope: Tensor, curvature: Tensor | None) -> None:
        tensors = [h, slope] if curvature is None else [h, slope, curvature]
        if not all(tensor.is_contiguous() for tensor in tensors):
            raise CannotTranslate("an activation is taken of what has gaps")
        self._append(_ACTIVATE, [1, 1, h.numel()], [self._at(t.view(-1)) for t in tensors], variant=variant)
        for tensor in tensors:
            self._wrote(tensor)

    def _accumulate(self, into: Tensor, a: Tensor, b: Tensor, beta: _Number = 1.0) -> None:
        self._product(into, a, b, into, beta=beta)

    def _add_product_sum(self, into: Tensor, scratch: Tensor, a: Tensor, b: Tensor, sign: float) -> None:
        self._elementwise(_DOT, into.expand(scratch.shape), [a, b], sign)

    def _multiply(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        self._product(out, a, b, None)

    def _multiply_add(self, out: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> None:
        self._product(out, a, b, bias)

    def _bmm(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        self._product(out[0], a[0], b[0], None)

    def _baddbmm(self, out: Tensor, d: Tensor, a: Tensor, b: Tensor, beta: _Number = 1.0, alpha: _Number = 1.0) -> None:
        self._product(out[0], a[0], b[0], d.expand(out.shape)[0], alpha, beta)

    def _mv(self, out: Tensor, a: Tensor, v: Tensor) -> None:
        self._product(out.unsqueeze(1), a, v.unsqueeze(1), None)

    def _addmv(self, out: Tensor, d: Tensor, a: Tensor, v: Tensor) -> None:
        self._product(out.unsqueeze(0), v.unsqueeze(0), a.t(), d.unsqueeze(0))

    def _mul(self, out: Tensor, a: Tensor, b: Tensor | _Number | None = None, other: _Number | None = None) -> None:
        if isinstance(b, Tensor):
            self._elementwise(_MULTIPLY, out, [a, b])
        else:
            factor = b if other is None else other
            assert factor is not None
            self._elementwise(_SCALE, out, [a], factor)

    def _add(self, out: Tensor, a: Tensor, b: Tensor | float, alpha: _Number = 1.0) -> None:
        if isinstance(b, Tensor):
            self._elementwise(_ADD, out, [a, b], alpha)
        else:
            self._elementwise(_ADD_NUMBER, out, [a], b)

    def _sub(self, out: Tensor, a: Tensor, b: Tensor, alpha: _Number = 1.0) -> None:
        self._elementwise(_ADD, out, [a, b], -alpha)

    def _addcmul(self, out: Tensor, d: Tensor, a: Tensor, b: Tensor, value: _Number = 1.0) -> None:
        self._elementwise(_ADD_PRODUCT, out, [d, a, b], value)

    def _copy(self, out: Tensor, _: Tensor, source: Tensor) -> None:
        self._elementwise(_SCALE, out, [source])

    def _zero(self, out: Tensor, _: Tensor) -> None:
        self._elementwise(_SCALE, out, [out], 0.0)

    def _fill(self, out: Tensor, _: Tensor, value: float) -> None:
        self._elementwise(_ADD_NUMBER, out, [out], value, 0.0)

    def _neg(self, out: Tensor, a: Tensor) -> None:
        self._elementwise(_SCALE, out, [a], -1.0)

    def _rsqrt(self, out: Tensor, a: Tensor) -> None:
        self._elementwise(_RSQRT, out, [a])

    def _cat(self, out: Tensor, parts: Sequence[Tensor], dim: int) -> None:
        for part, to in zip(parts, out.split([part.shape[dim] for part in parts], dim), strict=True):
            self._copy(to, to, part)

    def _sum(self, out: Tensor, a: Tensor, dim: int | tuple[int, ...], keepdim: bool = False, by: float = 1.0) -> None:
        if not keepdim:
            for axis in sorted(d % a.dim() for d in (dim if isinstance(dim, tuple) else (dim,))):
                out = out.unsqueeze(axis)
        # An axis along which the result has no stride is summed over.
        self._elementwise(_SUM, out.expand(a.shape), [a], by)

    def _mean(self, out: Tensor, a: Tensor, dim: int, keepdim: bool = False) -> None:
        self._sum(out, a, dim, keepdim, 1.0 / a.shape[dim])

    _HANDLERS = {  # noqa: RUF012 - of functions of this class
        multiply: _multiply,
        multiply_add: _multiply_add,
        "bmm": _bmm,
        "baddbmm": _baddbmm,
        "mv": _mv,
        "addmv": _addmv,
        "mul": _mul,
        "add": _add,
        "sub": _sub,
        "addcmul": _addcmul,
        "copy": _copy,
        "zero": _zero,
        "fill": _fill,
        "neg": _neg,
        "rsqrt": _rsqrt,
        "cat": _cat,
        "sum": _sum,
        "mean": _mean,
    }

    # ---- what they are made of ----

    def _wrote(self, tensor: Tensor) -> None:
        place = tensor.untyped_storage().data_ptr()
        self._writes[place] = self._writes.get(place, 0) + 1

    def _at(self, tensor: Tensor, strides: Sequence[int] | None = None) -> _At:
        place = self._places.get(tensor.untyped_storage().data_ptr())
        if place is None:
            raise CannotTranslate("an operation reads a tensor that is no buffer's")
        found = list(tensor.stride() if strides is None else strides)
        return place[0], place[1] + int(tensor.storage_offset()), found + [0] * (3 - len(found))

    def _factor(self, value: _Number) -> tuple[float, int]:
        if isinstance(value, Rate):
            return value.sign, value.step * len(self._rate_names) + self._rate_names.index(value.name)
        return float(value), -1

    def _append(
        self,
        kind: int,
        size: list[int],
        places: list[_At],
        alpha: _Number = 1.0,
        beta: _Number = 1.0,
        variant: int = 0,
    ) -> None:
        (a, a_rate), (b, b_rate) = self._factor(alpha), self._factor(beta)
        at = [_Place(base, offset, tuple(strides)) for base, offset, strides in (*places, *[_NOWHERE] * 4)[:4]]
        self._found.append(OPERATION(kind, variant, a_rate, b_rate, a, b, tuple(size), tuple(at)))

    def _elementwise(
        self,
        kind: int,
        out: Tensor,
        inputs: list[Tensor],
        alpha: _Number = 1.0,
        beta: _Number = 1.0,
        variant: int = 0,
    ) -> None:
        tensors = [out, *(x.expand(out.shape) for x in inputs)]
        # Axes of length one are left out, and axes that lie behind each other in all tensors are one.
        axes: list[tuple[int, list[int]]] = []
        for axis, length in enumerate(out.shape):
            strides = [t.stride(axis) for t in tensors]
            if length != 1 and axes and all(a == length * b for a, b in zip(axes[-1][1], strides, strict=True)):
                axes[-1] = (axes[-1][0] * length, strides)
            elif length != 1:
                axes.append((length, strides))
        if len(axes) > 3:
            raise CannotTranslate("an operation has more than three axes")
        axes = [(1, [0] * len(tensors))] * (3 - len(axes)) + axes
        places = [self._at(t, [strides[i] for _, strides in axes]) for i, t in enumerate(tensors)]
        self._append(kind, [length for length, _ in axes], places, alpha, beta, variant)
        self._wrote(out)

    def _product(
        self, out: Tensor, a: Tensor, b: Tensor, d: Tensor | None, alpha: _Number = 1.0, beta: _Number = 1.0
    ) -> None:
        """out = alpha a b + beta d: [M, K], [K, N]."""
        (m, k), n = a.shape, b.shape[1]
        added = _NOWHERE if d is None or beta == 0 else self._at(d.expand(m, n))
        right = self._in_rows(b) if n > 1 and k > 1 and b.stride(1) != 1 and self._transposes(a, b) else self._at(b)
        places = [self._at(out), self._at(a), right, added]
        # One product after another onto the same result is taken with it, where both are of rows in one piece.
        last = self._found[-1] if self._found else None
        self._append(_PRODUCT, [m, n, k], places, alpha, beta)
        now = self._found[-1]
        if last is not None and last.kind == _PRODUCT and not last.variant and _adds_to(now, last):
            last.variant = 1
        self._wrote(out)

    def _transposes(self, a: Tensor, b: Tensor) -> bool:
        """Whether a right side whose columns are in one piece is read from a transposed copy.

        Shared weights are copied once for all tasks.
        """
        shared = self._at(b)[0] in self._shared
        return shared or a.shape[1] < _DEEP or a.stride(1) != 1 or b.stride(0) != 1

    def _in_rows(self, b: Tensor) -> _At:
        """Where a copy of b lies whose rows are in one piece: made once for as long as b stays as it is."""
        (k, n), place = b.shape, b.untyped_storage().data_ptr()
        key = (place, b.storage_offset(), b.shape, b.stride(), self._writes.get(place, 0))
        if key not in self._copies:
            base, offset, strides = self._at(b)
            if base in self._shared:
                self._copies[key] = (self._shared.stop + len(self.transposed), 0)
                self.transposed.append((base - self._shared.start, tuple(b.shape), b.stride(), offset))
            else:
                self._copies[key] = (0, self._room(k * n))
                self._append(_SCALE, [1, k, n], [(*self._copies[key], [0, n, 1]), (base, offset, [0, *strides[:2]])])
        return (*self._copies[key], [n, 1, 0])

    # ---- running ----

    def run(
        self,
        library: ctypes.CDLL,
        a_task: Sequence[Tensor],
        shared: Sequence[Tensor],
        rates: Sequence[float],
        threads: int,
    ) -> list[Tensor]:
        """Run all tasks.

        Args:
            library: The kernels, for the type of the tensors.
            a_task, shared: In place of the buffers that were translated, contiguous; the former [T, ...].
            rates: Row by row, a step a row, with columns as `rate_names` has them.
            threads: Of tasks.

        Returns:
            The summed buffers.
        """
        tasks = len(a_task[0])
        copies = [
            shared[number].as_strided(shape, strides, shared[number].storage_offset() + offset).contiguous()
            for number, shape, strides, offset in self.transposed
        ]
        bases = (BASE * (1 + len(a_task) + len(shared) + len(copies)))(
            BASE(None, 0),
            *(BASE(t.data_ptr(), numbers) for t, numbers in zip(a_task, self._numbers_a_task, strict=True)),
            *(BASE(t.data_ptr(), 0) for t in (*shared, *copies)),
        )
        sums = a_task[0].new_empty(self._summed)
        enough = library.metatrain_run(
            self.operations,
            len(self.operations),
            bases,
            len(bases),
            (ctypes.c_double * len(rates))(*rates),
            tasks,
            max(1, min(threads, tasks)),
            self._arena,
            sums.data_ptr(),
            self._summed,
        )
        if not enough:
            raise MemoryError(f"no memory for the buffers of {threads} threads, {self._arena} numbers each")
        return [sums.as_strided(shape, strides, start) for start, shape, strides in self._sums]
