"""What the low-rank query loss is asked for, and what it finds: between `low_rank_loss` and those who compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from metatrain.meta.losses import EventLoss
from metatrain.meta.low_rank_chunk import Buffers, Sizes
from metatrain.meta.low_rank_elementwise import LossDerivatives
from metatrain.meta.low_rank_form import LinearForm
from metatrain.meta.low_rank_layers import Gradients
from metatrain.meta.low_rank_program import Workspace
from metatrain.meta.low_rank_rows import RowFeature


@dataclass(frozen=True)
class Problem:
    """What the tensors of one call mean.

    The inputs given to `AdaptedLoss` are those of `Buffers.inputs`; after them come the rates [K, N] and the
    parameters, named by `names`.
    """

    form: LinearForm
    names: tuple[str, ...]
    rate_names: tuple[str, ...]
    adapted: frozenset[str]
    loss: EventLoss  # of a query event
    outer: LossDerivatives  # of the same
    inner: LossDerivatives  # of a support event
    order: int
    inputs: int
    skips: bool  # whether the head's fixed inputs are others than the first layer's
    rows: tuple[RowFeature, ...]
    chunk: int
    differentiate: bool  # the gradient mode of the caller


class Given(NamedTuple):
    """The tensors of one call; T, S and Q as `Sizes` has them."""

    labels_s: Tensor  # [T, S]
    weights_s: Tensor  # [T, S]: mask / number of events
    labels_q: Tensor  # [T, Q]
    weights_q: Tensor  # [T, Q]: what the derivative of an event's loss counts in that of the total
    inputs: tuple[Tensor, ...]
    rates: Tensor  # [K, N]
    values: tuple[Tensor, ...]  # of the parameters


class Found(NamedTuple):
    """Of one call."""

    before: Tensor  # scores [T, Q] with the shared parameters
    after: Tensor  # and after adaptation
    d_inputs: list[Tensor | None]  # adjoints, None where they are not wanted
    gradients: list[Tensor]  # the rates' and the parameters' adjoints; what they hold is the caller's


def buffers_of(ws: Workspace, problem: Problem, sizes: Sizes, given: Given) -> tuple[Buffers, Gradients]:
    """Buffers for what a chunk reads, and writes."""
    tasks, support, query = sizes.tasks, sizes.support, sizes.query
    wanted = enumerate(zip(sizes.shapes, sizes.differ, strict=True))
    buffers = Buffers(
        [ws(f"in.{i}", *shape) for i, shape in enumerate(sizes.shapes)],
        [ws(f"d_in.{i}", *shape) if differ else None for i, (shape, differ) in wanted],
        ws("in.labels", tasks, support),
        ws("in.weights", tasks, support),
        ws("in.d_scores", tasks, query),
    )
    of = {n: ws(f"d_parameter.{n}", *v.shape) for n, v in zip(problem.names, given.values, strict=True)}
    return buffers, Gradients(of, ws("d_rates", *given.rates.shape), problem.rate_names, sizes.rates_differ)


def parameters_of(ws: Workspace, problem: Problem, given: Given) -> dict[str, Tensor]:
    """Buffers for the parameters."""
    return {n: ws(f"parameter.{n}", *v.shape) for n, v in zip(problem.names, given.values, strict=True)}
