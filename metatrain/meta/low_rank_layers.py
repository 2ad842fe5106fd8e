"""Linear layers with fast weights, their inner backward, and the hand-written reverse of both.

Promises: every product is one call over all tasks of a chunk, into a buffer that is used again by the next chunk.

A layer is `h = z Wₖᵀ + bₖ` at inner step k, with `δ` the support loss's gradient at h; a step takes
`Wₖ₊₁ = Wₖ - α δᵀ z` and `bₖ₊₁ = bₖ - β Σ δ`. An adjoint, the query loss's derivative, is written `d_`:
`d_w` is that of Wₖ₊₁ on the way back. Symbols: T tasks of the chunk, S support, Q query, I input width, O output
width, K inner steps. `low_rank` has the mathematics.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Buffers by name, kept from chunk to chunk and from call to call: fresh large tensors cost page faults.

    A buffer's content lasts until the same name is asked for again.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._flat: dict[str, Tensor] = {}
        self._views: dict[tuple[str | int, ...], Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor of that shape."""
        view = self._views.get((name, *shape))
        if view is not None:
            return view
        size = 1
        for length in shape:
            size *= length
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size or len(self._views) > 10_000:
            # Views of the buffer that is replaced would keep it alive.
            self._views = {key: held for key, held in self._views.items() if key[0] != name and len(self._views) <= 10_000}
            if flat is None or flat.numel() < size:
                flat = self._flat[name] = self._like.new_empty(size)
        view = self._views[(name, *shape)] = flat[:size].view(shape)
        return view


class Gradients:
    """Where the reverse adds what it finds: shared parameters by name, and the rates."""

    def __init__(self, parameters: dict[str, Tensor], rates: Tensor, names: list[str], learned: bool) -> None:
        self.of = {name: torch.zeros_like(value) for name, value in parameters.items()}
        self.rates = torch.zeros_like(rates)
        self.learned = learned
        self._column = {name: i for i, name in enumerate(names)}

    def rate(self, step: int, name: str, value: Tensor) -> None:
        """Add to the derivative in one rate."""
        self.rates[step, self._column[name]] += value


class Gram:
    """Inner products of inputs that don't change between steps: they are all that adaptation needs of the inputs.

    `support` is x_s x_sᵀ [T, S, S], `query` is x_q x_sᵀ [T, Q, S]; with `differentiable`, their adjoints beside.
    """

    def __init__(self, ws: Workspace, name: str, x_s: Tensor, x_q: Tensor, differentiable: bool) -> None:
        tasks, events, queries = len(x_s), x_s.shape[1], x_q.shape[1]
        self.x_s, self.x_q = x_s, x_q
        self.support = torch.bmm(x_s, x_s.mT, out=ws(f"{name}.ss", tasks, events, events))
        self.query = torch.bmm(x_q, x_s.mT, out=ws(f"{name}.qs", tasks, queries, events))
        self.d_support = ws(f"{name}.d_ss", tasks, events, events).zero_() if differentiable else None
        self.d_query = ws(f"{name}.d_qs", tasks, queries, events).zero_() if differentiable else None

    def into_inputs(self, d_s: Tensor | None, d_q: Tensor) -> None:
        """Add the adjoints of the inputs; d_s None: the support's inputs are constants (first order)."""
        if self.d_support is None or self.d_query is None:
            return
        d_q.baddbmm_(self.d_query, self.x_s)
        if d_s is not None:
            d_s.baddbmm_(self.d_support + self.d_support.mT, self.x_s)
            d_s.baddbmm_(self.d_query.mT, self.x_q)


class FirstLayer:
    """The lowest layer that adapts. Its inputs are the same in every step, so it never has a weight a task.

    hₖ = x W₀ᵀ + b₀ - [x x_sᵀ, 1] Aₖ, where the rows of A [T, S + 1, O] sum α δ over the steps, and β Σ δ.
    """

    def __init__(
        self,
        ws: Workspace,
        names: tuple[str, str | None],
        weight: Tensor,
        bias: Tensor | None,
        x_s: Tensor,
        x_q: Tensor,
        gram: Gram | None,
        adapts_bias: bool,
    ) -> None:
        self._ws, self.names, self._weight, self._gram = ws, names, weight, gram
        self._tasks, self._events, self._queries = len(x_s), x_s.shape[1], x_q.shape[1]
        self._x_s, self._x_q = x_s, x_q
        self._out = len(weight)
        self._rows = self._events if gram is not None else 0
        self._adapts_bias = adapts_bias
        self._base_s = _linear(x_s, weight, bias, ws("first.base_s", *x_s.shape[:2], self._out))
        self.base_q = _linear(x_q, weight, bias, ws("first.base_q", *x_q.shape[:2], self._out))
        self._kernel_s = self._kernel("first.kernel_s", None if gram is None else gram.support, self._events)
        self._kernel_q = self._kernel("first.kernel_q", None if gram is None else gram.query, self._queries)
        self._keep = gram is not None and gram.d_support is not None
        self._a: list[Tensor] = []  # A after step k
        self._delta: list[Tensor] = []
        self._delta_sum: list[Tensor] = []

    def _kernel(self, name: str, products: Tensor | None, events: int) -> Tensor:
        if products is not None and not self._adapts_bias:
            return products
        ones = self._ws(f"{name}.ones", self._tasks, events, 1).fill_(1)
        if products is None:
            return ones
        return torch.cat([products, ones], -1, out=self._ws(name, self._tasks, events, self._events + 1))

    def forward(self, k: int) -> Tensor:
        """h [T, S, O] before step k."""
        h = self._ws(f"first.h{k}", self._tasks, self._events, self._out)
        if k == 0:
            return h.copy_(self._base_s)
        return torch.baddbmm(self._base_s, self._kernel_s, self._a[k - 1], alpha=-1, out=h)

    def update(self, k: int, delta: Tensor, rates: dict[str, float]) -> None:
        """Take step k."""
        weight, bias = self.names
        rows, kept = self._rows, k if self._keep else 0
        a = self._ws(f"first.a{kept}", self._tasks, rows + self._adapts_bias, self._out)
        before = self._a[k - 1] if k else None
        if rows:
            if before is None:
                torch.mul(delta, rates[weight], out=a[:, :rows])
            else:
                torch.add(before[:, :rows], delta, alpha=rates[weight], out=a[:, :rows])
        if self._adapts_bias:
            assert bias is not None
            total = torch.sum(delta, 1, keepdim=True, out=self._ws(f"first.sum{k}", self._tasks, 1, self._out))
            self._delta_sum.append(total)
            if before is None:
                torch.mul(total, rates[bias], out=a[:, rows:])
            else:
                torch.add(before[:, rows:], total, alpha=rates[bias], out=a[:, rows:])
        self._a.append(a)
        self._delta.append(delta)

    def query(self) -> Tensor:
        """h [T, Q, O] after the last step."""
        h = self._ws("first.h_q", self._tasks, self._queries, self._out)
        if not self._a:
            return h.copy_(self.base_q)
        return torch.baddbmm(self.base_q, self._kernel_q, self._a[-1], alpha=-1, out=h)

    def reverse_query(self, d_h: Tensor) -> None:
        """Begin the reverse, from the adjoint of `query`."""
        self._d_base_q, self._d_base_s = d_h, None
        if self._a:
            self._d_a = self._ws("first.d_a", *self._a[-1].shape)
            torch.baddbmm(self._d_a, self._kernel_q.mT, d_h, beta=0, alpha=-1, out=self._d_a)
            if self._gram is not None and self._gram.d_query is not None:
                self._gram.d_query.baddbmm_(d_h, self._a[-1][:, : self._rows].mT, alpha=-1)

    def reverse_update(self, k: int, rates: dict[str, float], found: Gradients) -> Tensor:
        """The adjoint of δ at step k, [T, S, O]."""
        weight, bias = self.names
        rows, d_a = self._rows, self._d_a
        self.reverse_rates(k, found)
        d_delta = self._ws("first.d_delta", self._tasks, self._events, self._out)
        if rows:
            torch.mul(d_a[:, :rows], rates[weight], out=d_delta)
            if self._adapts_bias:
                assert bias is not None
                d_delta.add_(d_a[:, rows:], alpha=rates[bias])
        else:
            assert bias is not None
            d_delta.copy_(d_a[:, rows:]).mul_(rates[bias])
        return d_delta

    def reverse_rates(self, k: int, found: Gradients) -> None:
        """Step k's derivative in the rates."""
        if not found.learned:
            return
        weight, bias = self.names
        if self._rows:
            found.rate(k, weight, (self._d_a[:, : self._rows] * self._delta[k]).sum())
        if self._adapts_bias:
            assert bias is not None
            found.rate(k, bias, (self._d_a[:, self._rows :] * self._delta_sum[k]).sum())

    def reverse_forward(self, k: int, d_h: Tensor) -> None:
        """Take in the adjoint of `forward(k)`."""
        if self._d_base_s is None:
            self._d_base_s = self._ws("first.d_base_s", self._tasks, self._events, self._out).copy_(d_h)
        else:
            self._d_base_s.add_(d_h)
        if k:
            self._d_a.baddbmm_(self._kernel_s.mT, d_h, alpha=-1)
            if self._gram is not None and self._gram.d_support is not None:
                self._gram.d_support.baddbmm_(d_h, self._a[k - 1][:, : self._rows].mT, alpha=-1)

    def finish(self, found: Gradients, d_x_s: Tensor | None, d_x_q: Tensor | None) -> None:
        """Add up the shared parameters' adjoints; set the inputs', less the Gram matrix's part."""
        weight, bias = self.names
        pairs = [(self._d_base_q, self._x_q, d_x_q)]
        if self._d_base_s is not None:
            pairs.append((self._d_base_s, self._x_s, d_x_s))
        for d_h, x, d_x in pairs:
            flat = _flat(d_h)
            found.of[weight].addmm_(flat.t(), _flat(x))
            if bias is not None:
                found.of[bias].add_(flat.sum(0))
            if d_x is not None:
                torch.mm(flat, self._weight, out=_flat(d_x))


class HiddenLayer:
    """A layer whose inputs change between steps: a weight a task from step 1 on, the last step left as factors.

    With S support events and K steps, K S factors cost more than a weight [O, I] soon; but the last step's weight
    would only serve Q query events, and costs more than the two small products with its factors when 2 Q < I, O.
    """

    def __init__(
        self,
        ws: Workspace,
        number: int,
        names: tuple[str, str | None],
        weight: Tensor,
        bias: Tensor | None,
        adapts: tuple[bool, bool],
        steps: int,
        fold_last: bool,
    ) -> None:
        self._ws, self._id, self.names, self._steps = ws, f"hidden{number}", names, steps
        self._weight, self._bias = weight, bias
        self._adapts_weight, self._adapts_bias = adapts
        self._factored = self._adapts_weight and not fold_last and steps > 0
        self._w: list[Tensor | None] = [None]  # Wₖ of each task; None: the shared one
        self._b: list[Tensor | None] = [bias]
        self._z: list[Tensor] = []
        self._delta: list[Tensor] = []
        self._delta_sum: list[Tensor] = []
        self._d_w: Tensor | None = None

    def _buffer(self, name: str, like: Tensor, width: int) -> Tensor:
        return self._ws(f"{self._id}.{name}", like.shape[0], like.shape[1], width)

    def _apply(self, z: Tensor, w: Tensor | None, b: Tensor | None, out: Tensor) -> Tensor:
        if w is None:
            if b is None or b.dim() == 1:
                return _linear(z, self._weight, b, out)
            return _linear(z, self._weight, None, out).add_(b)
        return torch.bmm(z, w.mT, out=out) if b is None else torch.baddbmm(b, z, w.mT, out=out)

    def _back(self, delta: Tensor, w: Tensor | None, out: Tensor) -> Tensor:
        if w is None:
            torch.mm(_flat(delta), self._weight, out=_flat(out))
            return out
        return torch.bmm(delta, w, out=out)

    def forward(self, k: int, z: Tensor) -> Tensor:
        """h [T, S, O] before step k."""
        self._z.append(z)
        return self._apply(z, self._w[k], self._b[k], self._buffer(f"h{k}", z, len(self._weight)))

    def backward(self, k: int, delta: Tensor) -> Tensor:
        """The support loss's gradient at the inputs, δ Wₖ: [T, S, I]."""
        return self._back(delta, self._w[k], self._buffer(f"g{k}", delta, self._weight.shape[1]))

    def update(self, k: int, delta: Tensor, rates: dict[str, float]) -> None:
        """Take step k."""
        weight, bias = self.names
        self._delta.append(delta)
        w, b = self._w[k], self._b[k]
        if self._adapts_weight and not (self._factored and k == self._steps - 1):
            start = self._weight if w is None else w
            out = self._ws(f"{self._id}.w{k + 1}", len(delta), *self._weight.shape)
            w = torch.baddbmm(start, delta.mT, self._z[k], alpha=-rates[weight], out=out)
        if self._adapts_bias:
            assert bias is not None and b is not None
            total = torch.sum(delta, 1, keepdim=True, out=self._ws(f"{self._id}.sum{k}", len(delta), 1, delta.shape[2]))
            self._delta_sum.append(total)
            b = torch.sub(b, total, alpha=rates[bias], out=self._ws(f"{self._id}.b{k + 1}", *total.shape))
        self._w.append(w)
        self._b.append(b)

    def before(self, z: Tensor) -> Tensor:
        """h [T, Q, O] with the shared parameters."""
        return self._apply(z, None, self._bias, self._buffer("before", z, len(self._weight)))

    def query(self, z: Tensor, rates: dict[str, float] | None) -> Tensor:
        """h [T, Q, O] after the last step; `rates` are its rates."""
        self._z_q = z
        h = self._apply(z, self._w[-1], self._b[-1], self._buffer("h_q", z, len(self._weight)))
        if self._factored and rates is not None:
            self._products = torch.bmm(z, self._z[-1].mT, out=self._buffer("products", z, self._z[-1].shape[1]))
            h.baddbmm_(self._products, self._delta[-1], alpha=-rates[self.names[0]])
        return h

    def reverse_query(self, d_h: Tensor, rates: dict[str, float] | None, found: Gradients) -> Tensor:
        """Begin the reverse, from the adjoint of `query`: returns that of z [T, Q, I]."""
        z, w = self._z_q, self._w[-1]
        d_z = self._back(d_h, w, self._buffer("d_z_q", z, z.shape[2]))
        if w is None:
            found.of[self.names[0]].addmm_(_flat(d_h).t(), _flat(z))
        else:
            self._d_w = torch.bmm(d_h.mT, z, out=self._ws(f"{self._id}.d_w", len(z), *self._weight.shape))
        self._d_b = torch.sum(d_h, 1, keepdim=True, out=self._ws(f"{self._id}.d_b", len(z), 1, d_h.shape[2]))
        if self._factored and rates is not None:
            rate, past, delta = rates[self.names[0]], self._z[-1], self._delta[-1]
            d_products = torch.bmm(d_h, delta.mT, out=self._buffer("d_products", z, past.shape[1]))
            if found.learned:
                found.rate(self._steps - 1, self.names[0], -(d_products * self._products).sum())
            d_products.mul_(-rate)
            d_z.baddbmm_(d_products, past)
            self._d_past = torch.bmm(d_products.mT, z, out=self._buffer("d_past", past, past.shape[2]))
            self._d_delta = self._buffer("d_delta", delta, delta.shape[2])
            torch.baddbmm(self._d_delta, self._products.mT, d_h, beta=0, alpha=-rate, out=self._d_delta)
        return d_z

    def _is_factor(self, k: int) -> bool:
        return self._factored and k == self._steps - 1

    def reverse_backward(self, k: int, d_g: Tensor, rates: dict[str, float], found: Gradients) -> Tensor:
        """From the adjoint of `backward(k)` and step k's update: the adjoint of δ [T, S, O]."""
        weight, bias = self.names
        self._d_g = d_g
        z, w = self._z[k], self._w[k]
        beta = 1.0
        if not self._adapts_weight:
            d_delta, beta = self._buffer("d_delta", z, len(self._weight)), 0.0
        elif self._is_factor(k):
            d_delta = self._d_delta
        else:
            assert self._d_w is not None
            d_delta = torch.bmm(z, self._d_w.mT, out=self._buffer("d_delta", z, len(self._weight)))
            if found.learned:
                found.rate(k, weight, -torch.dot(d_delta.view(-1), self._delta[k].view(-1)))
            beta = -rates[weight]
        if w is None:
            flat = _flat(d_delta)
            torch.addmm(flat, _flat(d_g), self._weight.t(), beta=beta, out=flat)
        else:
            d_delta.baddbmm_(d_g, w.mT, beta=beta)
        if self._adapts_bias:
            assert bias is not None
            if found.learned:
                found.rate(k, bias, -(self._d_b * self._delta_sum[k]).sum())
            d_delta.sub_(self._d_b, alpha=rates[bias])
        return d_delta

    def reverse_rates(self, k: int, found: Gradients) -> None:
        """Step k's derivative in the rates alone, for the first order."""
        if not found.learned:
            return
        weight, bias = self.names
        if self._adapts_weight and not self._is_factor(k):
            assert self._d_w is not None
            moved = torch.bmm(self._z[k], self._d_w.mT, out=self._buffer("d_delta", self._z[k], len(self._weight)))
            found.rate(k, weight, -torch.dot(moved.view(-1), self._delta[k].view(-1)))
        if self._adapts_bias:
            assert bias is not None
            found.rate(k, bias, -(self._d_b * self._delta_sum[k]).sum())

    def reverse_forward(self, k: int, d_h: Tensor, rates: dict[str, float], found: Gradients) -> Tensor:
        """From the adjoint of `forward(k)` and step k's update: the adjoint of z [T, S, I]."""
        z, w, delta = self._z[k], self._w[k], self._delta[k]
        if self._adapts_weight and self._is_factor(k):
            d_z = self._d_past
            if w is None:
                _flat(d_z).addmm_(_flat(d_h), self._weight)
            else:
                d_z.baddbmm_(d_h, w)
        else:
            d_z = self._back(d_h, w, self._buffer("d_z", z, z.shape[2]))
            if self._adapts_weight:
                assert self._d_w is not None
                d_z.baddbmm_(delta, self._d_w, alpha=-rates[self.names[0]])
        if w is None:
            found.of[self.names[0]].addmm_(_flat(d_h).t(), _flat(z)).addmm_(_flat(delta).t(), _flat(self._d_g))
        else:
            assert self._d_w is not None
            self._d_w.baddbmm_(d_h.mT, z).baddbmm_(delta.mT, self._d_g)
        self._d_b.add_(torch.sum(d_h, 1, keepdim=True))
        return d_z

    def finish(self, found: Gradients) -> None:
        """Add up the shared parameters' adjoints."""
        weight, bias = self.names
        if self._d_w is not None:
            found.of[weight].add_(self._d_w.sum(0))
        if bias is not None:
            found.of[bias].add_(self._d_b.sum((0, 1)))


def _flat(x: Tensor) -> Tensor:
    """All tasks' events in one axis."""
    return x.view(-1, x.shape[-1])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """x Wᵀ + b with shared parameters: one product for all tasks."""
    if bias is None:
        torch.mm(_flat(x), weight.t(), out=_flat(out))
    else:
        torch.addmm(bias, _flat(x), weight.t(), out=_flat(out))
    return out
