"""A hidden layer: its inputs change between steps, so it gets a weight a task. Conventions as in `low_rank_layers`."""

from __future__ import annotations

import torch
from torch import Tensor

from metatrain.meta.low_rank_layers import Gradients, Linear, flat, linear
from metatrain.meta.low_rank_products import accumulate, multiply
from metatrain.meta.low_rank_program import Program, Rate, Workspace, add_product_sum


class HiddenLayer:
    """A weight a task from step 1 on; step 0 shares W₀; the last step is left as factors.

    With S support events and K steps, K S factors cost more than a weight [O, I] soon; but the last step's weight
    would only serve Q query events, and costs more than the two small products with its factors when 2 Q < I, O.

    The columns of the first layer that read adapted rows are such a layer too, without bias; it adds to what the
    columns of the fixed inputs give.
    """

    def __init__(self, p: Program, ws: Workspace, name: str, layer: Linear, steps: int, queries: int) -> None:
        self._p, self._ws, self._id, self._layer, self._steps = p, ws, name, layer, steps
        self._weight, self._bias = layer.weight, layer.bias
        self._out, self._in = layer.weight.shape
        pays = queries * (self._out + self._in) < self._out * self._in
        self._factored = layer.adapts_weight and pays and steps > 0
        self._w: list[Tensor | None] = [None]  # Wₖ of each task; None: the shared one
        self._b: list[Tensor | None] = [layer.bias]
        self._z: list[Tensor] = []
        self._delta: list[Tensor] = []
        self._delta_sum: list[Tensor] = []
        self._d_w: Tensor | None = None

    def _buffer(self, name: str, like: Tensor, width: int) -> Tensor:
        return self._ws(f"{self._id}.{name}", like.shape[0], like.shape[1], width)

    def _apply(self, z: Tensor, w: Tensor | None, b: Tensor | None, out: Tensor, onto: bool = False) -> Tensor:
        if onto:
            assert b is None
            if w is None:
                self._p(accumulate, flat(out), flat(z), self._weight.t())
            else:
                self._p(out.baddbmm_, z, w.mT)
        elif w is None:
            shared = b is None or b.dim() == 1
            linear(self._p, z, self._weight, b if shared else None, out)
            if not shared:
                self._p(out.add_, b)
        elif b is None:
            self._p(torch.bmm, z, w.mT, out=out)
        else:
            self._p(torch.baddbmm, b, z, w.mT, out=out)
        return out

    def _back(self, delta: Tensor, w: Tensor | None, out: Tensor) -> Tensor:
        if w is None:
            self._p(multiply, flat(delta), self._weight, out=flat(out))
        else:
            self._p(torch.bmm, delta, w, out=out)
        return out

    def forward(self, k: int, z: Tensor, onto: Tensor | None = None) -> Tensor:
        """h [T, S, O] before step k; added to `onto`, where that is given."""
        self._z.append(z)
        h = self._buffer(f"h{k}", z, self._out) if onto is None else onto
        return self._apply(z, self._w[k], self._b[k], h, onto is not None)

    def backward(self, k: int, delta: Tensor) -> Tensor:
        """The support loss's gradient at the inputs, δ Wₖ: [T, S, I]."""
        return self._back(delta, self._w[k], self._buffer(f"g{k}", delta, self._in))

    def update(self, k: int, delta: Tensor) -> None:
        """Take step k."""
        layer, w, b = self._layer, self._w[k], self._b[k]
        self._delta.append(delta)
        if layer.adapts_weight and not self._is_factor(k):
            start = self._weight if w is None else w
            w = self._ws(f"{self._id}.w{k + 1}", len(delta), self._out, self._in)
            self._p(torch.baddbmm, start, delta.mT, self._z[k], alpha=-Rate(k, layer.weight_name), out=w)
        if layer.adapts_bias and layer.bias_name is not None:
            total = self._ws(f"{self._id}.sum{k}", len(delta), 1, self._out)
            self._p(torch.sum, delta, 1, keepdim=True, out=total)
            self._delta_sum.append(total)
            moved = self._ws(f"{self._id}.b{k + 1}", len(delta), 1, self._out)
            self._p(torch.sub, b, total, alpha=Rate(k, layer.bias_name), out=moved)
            b = moved
        self._w.append(w)
        self._b.append(b)

    def before(self, z: Tensor, onto: Tensor | None = None) -> Tensor:
        """h [T, Q, O] with the shared parameters."""
        h = self._buffer("before", z, self._out) if onto is None else onto
        return self._apply(z, None, self._bias, h, onto is not None)

    def query(self, z: Tensor, onto: Tensor | None = None) -> Tensor:
        """h [T, Q, O] after the last step."""
        self._z_q = z
        h = self._buffer("h_q", z, self._out) if onto is None else onto
        self._apply(z, self._w[-1], self._b[-1], h, onto is not None)
        if self._factored:
            past, delta = self._z[-1], self._delta[-1]
            self._products = self._buffer("products", z, past.shape[1])
            self._p(torch.bmm, z, past.mT, out=self._products)
            self._p(h.baddbmm_, self._products, delta, alpha=-Rate(self._steps - 1, self._layer.weight_name))
        return h

    def reverse_query(self, p: Program, d_h: Tensor, found: Gradients) -> Tensor:
        """Begin the reverse, from the adjoint of `query`: returns that of z [T, Q, I]."""
        self._p = p
        z, w, name = self._z_q, self._w[-1], self._layer.weight_name
        d_z = self._back(d_h, w, self._buffer("d_z_q", z, self._in))
        if w is None:
            p(accumulate, found.weight(self._layer), flat(d_h).t(), flat(z))
        else:
            self._d_w = self._ws(f"{self._id}.d_w", len(z), self._out, self._in)
            p(torch.bmm, d_h.mT, z, out=self._d_w)
        if self._bias is not None:
            self._d_b = self._ws(f"{self._id}.d_b", len(z), 1, self._out)
            p(torch.sum, d_h, 1, keepdim=True, out=self._d_b)
        if self._factored:
            last = self._steps - 1
            past, delta, minus = self._z[-1], self._delta[-1], -Rate(last, name)
            d_products = self._buffer("d_products", z, past.shape[1])
            p(torch.bmm, d_h, delta.mT, out=d_products)
            if found.learned:
                scratch = self._buffer("scratch_products", z, past.shape[1])
                p(add_product_sum, found.rate(last, name), scratch, d_products, self._products, -1.0)
            p(d_z.baddbmm_, d_products, past, alpha=minus)
            self._d_past = self._buffer("d_past", past, self._in)
            p(torch.baddbmm, self._d_past, d_products.mT, z, beta=0, alpha=minus, out=self._d_past)
            self._d_delta = self._buffer("d_delta", delta, self._out)
            p(torch.baddbmm, self._d_delta, self._products.mT, d_h, beta=0, alpha=minus, out=self._d_delta)
        return d_z

    def _is_factor(self, k: int) -> bool:
        return self._factored and k == self._steps - 1

    def reverse_backward(self, k: int, d_g: Tensor, found: Gradients) -> Tensor:
        """From the adjoint of `backward(k)` and step k's update: the adjoint of δ [T, S, O]."""
        p, layer = self._p, self._layer
        self._d_g = d_g
        w = self._w[k]
        beta: float | Rate = 1.0
        if not layer.adapts_weight:
            d_delta, beta = self._buffer("d_delta", d_g, self._out), 0.0
        elif self._is_factor(k):
            d_delta = self._d_delta
        else:
            d_delta, beta = self._along_d_w(k, found), -Rate(k, layer.weight_name)
        if w is None:
            p(accumulate, flat(d_delta), flat(d_g), self._weight.t(), beta=beta)
        else:
            p(d_delta.baddbmm_, d_g, w.mT, beta=beta)
        self._bias_rate(k, found)
        if layer.adapts_bias and layer.bias_name is not None:
            p(d_delta.sub_, self._d_b, alpha=Rate(k, layer.bias_name))
        return d_delta

    def _along_d_w(self, k: int, found: Gradients) -> Tensor:
        """z d_Wᵀ, which gives both d_δ and d_α of a step that was folded into the weights."""
        assert self._d_w is not None
        z, delta = self._z[k], self._delta[k]
        along = self._buffer("d_delta", z, self._out)
        self._p(torch.bmm, z, self._d_w.mT, out=along)
        if found.learned:
            scratch = self._buffer("scratch", z, self._out)
            self._p(add_product_sum, found.rate(k, self._layer.weight_name), scratch, along, delta, -1.0)
        return along

    def _bias_rate(self, k: int, found: Gradients) -> None:
        name = self._layer.bias_name
        if found.learned and self._layer.adapts_bias and name is not None:
            total = self._delta_sum[k]
            scratch = self._ws(f"{self._id}.scratch_sum", *total.shape)
            self._p(add_product_sum, found.rate(k, name), scratch, self._d_b, total, -1.0)

    def reverse_rates(self, k: int, found: Gradients) -> None:
        """Step k's derivative in the rates alone, for the first order."""
        if found.learned:
            if self._layer.adapts_weight and not self._is_factor(k):
                self._along_d_w(k, found)
            self._bias_rate(k, found)

    def reverse_forward(self, k: int, d_h: Tensor, found: Gradients) -> Tensor:
        """From the adjoint of `forward(k)` and step k's update: the adjoint of z [T, S, I]."""
        p, layer = self._p, self._layer
        z, w, delta = self._z[k], self._w[k], self._delta[k]
        if self._is_factor(k):
            d_z = self._d_past
            if w is None:
                p(accumulate, flat(d_z), flat(d_h), self._weight)
            else:
                p(d_z.baddbmm_, d_h, w)
        else:
            d_z = self._back(d_h, w, self._buffer("d_z", z, self._in))
            if layer.adapts_weight:
                p(d_z.baddbmm_, delta, self._d_w, alpha=-Rate(k, layer.weight_name))
        if w is None:
            into = found.weight(layer)
            p(accumulate, into, flat(d_h).t(), flat(z))
            p(accumulate, into, flat(delta).t(), flat(self._d_g))
        else:
            assert self._d_w is not None
            p(self._d_w.baddbmm_, d_h.mT, z)
            p(self._d_w.baddbmm_, delta.mT, self._d_g)
        if self._bias is not None:
            total = self._ws(f"{self._id}.scratch_sum", len(z), 1, self._out)
            p(torch.sum, d_h, 1, keepdim=True, out=total)
            p(self._d_b.add_, total)
        return d_z

    def finish(self, found: Gradients) -> None:
        """Add up the shared parameters' adjoints."""
        layer = self._layer
        if self._d_w is not None:
            total = self._ws(f"{self._id}.d_weight", self._out, self._in)
            self._p(torch.sum, self._d_w, 0, out=total)
            self._p(found.weight(layer).add_, total)
        if layer.bias_name is not None:
            total = self._ws(f"{self._id}.d_bias", self._out)
            self._p(torch.sum, self._d_b, (0, 1), out=total)
            self._p(found.of[layer.bias_name].add_, total)
