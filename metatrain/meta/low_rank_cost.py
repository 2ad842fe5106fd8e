"""What an inner loop costs, counted from shapes: operations, bytes and calls, for vmap and for the low-rank form.

Promises: a pure function of the shapes, so that every rank and every run chooses alike. The counts are exact for
products and fair for the rest; the rates that turn them into a time are those of one CPU core, and only their ratios
matter to the choice.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise

#: One core: products of one large matrix, batched small products, memory traffic in cache and in fresh memory, a call.
SHARED_FLOPS, BATCHED_FLOPS, CACHE_BYTES, FRESH_BYTES, CALL_SECONDS = 6e10, 4.5e10, 2e10, 3e9, 8e-6

#: Seconds that a call costs outside of its chunks: rates gathered, the graph around it, the sums, colder caches.
LOW_RANK_OVERHEAD, VMAP_OVERHEAD = 1e-3, 4e-3


@dataclass(frozen=True)
class Shapes:
    """One call's shapes.

    Args:
        tasks, support, query: T, S, Q, padded.
        inputs: Width of what the lowest layer that adapts reads.
        hidden: Output widths of the hidden layers from that one on.
        skip: Width of what the head sees of the inputs, 0 without.
        steps, order: Inner steps; 1 or 2.
        differentiable_inputs: Whether the inputs' gradient is wanted.
        itemsize: Bytes of a number.
        below: Widths from the learner's inputs up through the layers that do not adapt; empty where the first does.
        rows: Of each feature whose rows adapt: rows of a task, padded, and embedding width. `inputs` is without them.
        moves: Whether any of the hidden layers' weights adapt: with rows alone, or with rows and a head, they don't.
        norm: Whether the hidden layers are normalised.
    """

    tasks: int
    support: int
    query: int
    inputs: int
    hidden: tuple[int, ...]
    skip: int
    steps: int
    order: int
    differentiable_inputs: bool
    itemsize: int = 4
    below: tuple[int, ...] = ()
    rows: tuple[tuple[int, int], ...] = ()
    moves: bool = True
    norm: bool = False

    @property
    def row_width(self) -> int:
        """Width of all adapted features together."""
        return sum(width for _, width in self.rows)


@dataclass(frozen=True)
class Cost:
    """A task's share of one meta-gradient."""

    shared: float  # operations in products with weights that all tasks share
    batched: float  # operations in products a task
    traffic: float  # bytes of elementwise work
    fresh: float  # bytes of memory not used before
    calls: float  # of the framework, a chunk

    def seconds(self, tasks: int) -> float:
        """A task's time on one core, in chunks of that many tasks."""
        products = self.shared / SHARED_FLOPS + self.batched / BATCHED_FLOPS
        return (
            products + self.traffic / CACHE_BYTES + self.fresh / FRESH_BYTES + self.calls * CALL_SECONDS / max(tasks, 1)
        )


def low_rank_cost(s: Shapes) -> Cost:
    """Of `LowRankEngine.query_loss`."""
    events, back = s.support + s.query, 2 if s.order == 2 else 1
    shared = batched = passes = 0.0
    if s.hidden:
        first = s.hidden[0]
        # Forward over support and query; the weights' gradient, in first order from the query alone.
        shared += 2 * s.inputs * first * (events + (events if s.order == 2 else s.query))
        if s.differentiable_inputs:
            # In first order the support's inputs are constants.
            shared += 2 * s.inputs * first * (events if s.order == 2 else s.query)
            batched += 2 * s.inputs * s.support * (2 * events if s.order == 2 else s.query)
        if s.moves or s.skip:
            batched += 2 * s.inputs * s.support * (events if s.steps > 1 else s.query)  # the Gram matrices
        if s.moves:
            kernel = 2 * s.support * first
            batched += kernel * (s.support * max(s.steps - 1, 0) * back + s.query * 2)
    # Adapted rows come into the first layer as outputs of a layer before it would.
    for below, width in pairwise((s.row_width, *s.hidden) if s.rows else s.hidden):
        unit = 2 * below * width * s.support
        ahead = s.query / s.support if s.support else 0.0
        middle = max(s.steps - 1, 0)
        if not s.moves:
            shared += s.steps * unit * (2 + (4 if s.order == 2 else 0)) + unit * ahead * 3
            continue
        shared += unit * (2 + (4 if s.order == 2 else 0))
        batched += middle * unit * 3 + unit * ahead * 2
        if s.order == 2:
            batched += middle * unit * 6
        batched += 2 * s.query * s.support * (below + width) * (1 + back)
    norms = len(s.hidden) if s.norm else 0
    for width in s.hidden:
        passes += s.support * width * s.steps * (10 + (12 if s.order == 2 else 0)) + 6 * s.query * width
        if norms:
            passes += s.support * width * s.steps * (6 + (8 if s.order == 2 else 0)) + 4 * s.query * width
    if s.skip or not s.hidden:
        wide = s.skip or s.inputs
        shared += 2 * wide * events * 2
        if not s.hidden:
            batched += 2 * wide * s.support * (events if s.steps > 1 else s.query)
        batched += 4 * s.support * s.support * s.steps
    # Layers that do not adapt are taken once, by autograd.
    for below, width in pairwise(s.below):
        shared += 2 * below * width * events * 3
    fixed = events * sum(s.below) * s.itemsize * 3
    for rows, width in s.rows:
        # Pooling and its kernels; then a product with a kernel a step, and its reverse.
        batched += 2 * rows * events * (2 * width + s.support)
        batched += 2 * s.support * width * (s.support * max(s.steps - 1, 0) * back + s.query * 2)
        passes += s.support * width * s.steps * (8 + (12 if s.order == 2 else 0)) + 6 * events * width
        fixed += events * (rows + s.support + 2 * width) * s.itemsize
    of_rows = (15 + 12 * len(s.rows)) if s.rows else 0
    # Replayed without autograd and dispatch of views, a call takes a third of the time.
    calls = 0.3 * (
        60 + of_rows + s.steps * (25 + of_rows + 30 * len(s.hidden) + 25 * norms) * (1 if s.order == 2 else 0.6)
    )
    return Cost(shared, batched, passes * s.itemsize * 2.5, events * s.inputs * s.itemsize + fixed, calls)


def vmap_cost(s: Shapes) -> Cost:
    """Of adapting and predicting by `VmapEngine`, and autograd's backward."""
    widths = [s.inputs + s.row_width, *s.hidden]
    skip = s.skip + s.row_width if s.skip else 0
    layers = [*pairwise(widths), (widths[-1] + skip, 1)]
    shared = 0.0
    if not s.moves:
        # Hidden layers whose weights stay: forward and the gradient of their inputs, for all tasks in one product.
        stay = 2 * sum(i * o for i, o in layers[:-1])
        shared = stay * (s.steps * s.support * 2 * (3 if s.order == 2 else 1) + 3 * s.query)
        layers = layers[-1:]
    weights = sum(i * o for i, o in layers)
    forward = 2 * weights * s.support
    # Each step: forward, gradient of weights and of inputs but the first; twice that again in the reverse.
    lower = 0 if s.rows else 2 * layers[0][0] * layers[0][1] * s.support
    step = 3 * forward - lower
    batched = s.steps * step * (3 if s.order == 2 else 1) + 2 * weights * s.query * 3
    # Weights, their gradients and their adjoints a task a step, each a fresh tensor.
    fresh = s.steps * weights * s.itemsize * (7 if s.order == 2 else 3) + 3 * weights * s.itemsize
    # The inputs are read by a vector a task or of a gradient, and written as adjoints: one fresh tensor each a step.
    wide = s.inputs + s.skip
    fresh += s.support * s.steps * wide * s.itemsize * (4 if s.order == 2 and s.differentiable_inputs else 1)
    for rows, width in s.rows:
        fresh += s.steps * (s.support + rows) * width * s.itemsize * (6 if s.order == 2 else 3)
    passes = sum(s.hidden) * (s.support * s.steps * (30 if s.order == 2 else 12) + 10 * s.query)
    norms = len(s.hidden) if s.norm else 0
    if norms:
        passes += sum(s.hidden) * (s.support * s.steps * (22 if s.order == 2 else 8) + 6 * s.query)
    # Layers that do not adapt are taken anew in every step, for all tasks in one product.
    events = s.support * s.steps + s.query
    for below, width in pairwise(s.below):
        shared += 2 * below * width * (3 * events if s.order == 2 else events + 2 * s.query)
        passes += 10 * width * events
    layers_taken = len(s.hidden) + 1 + 0.5 * (len(s.rows) + norms)
    calls = 100 + s.steps * layers_taken * (60 if s.order == 2 else 25)
    return Cost(shared, batched, passes * s.itemsize * 2.5, fresh, calls)


@dataclass(frozen=True)
class Choice:
    """Which engine, and why in one line."""

    engine: str  # "low_rank" or "vmap"
    reason: str


@functools.lru_cache(maxsize=4096)  # asked for each bucket of each step
def choose(s: Shapes) -> Choice:
    """The cheaper engine for these shapes."""
    chunk = min(s.tasks, 64)
    low, full = low_rank_cost(s).seconds(chunk), vmap_cost(s).seconds(chunk)
    engine = "low_rank" if low <= full else "vmap"
    return Choice(
        engine,
        f"{engine}: counted {low * 1e6:.0f} µs a task for low_rank and {full * 1e6:.0f} for vmap, at {s.tasks} tasks "
        f"of {s.support} support and {s.query} query events, input width {s.inputs + s.row_width}"
        f"{f' with {s.row_width} of adapted rows' if s.rows else ''}, hidden {list(s.hidden)}, "
        f"{s.steps} steps, order {s.order}",
    )
