"""The optimizer of data-parallel tables: FBGEMM's rules, on the mean of all ranks' gradients.

A row without a gradient stays as it is under each of these rules, so stepping a whole table is stepping its touched
rows, and a table may be sharded in one run and replicated in the next.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ReplicatedOptimizer:
    """Steps tables that all ranks hold whole.

    Args:
        tables: By name.
        kind: sgd, adagrad or rowwise_adagrad.
        rate: Of the next step; may be set.
        epsilon: Added to the root of Adagrad's sums.
    """

    def __init__(self, tables: Mapping[str, nn.Parameter], kind: str, rate: float, epsilon: float) -> None:
        self.rate = rate
        self._tables, self._epsilon = dict(tables), epsilon
        self._sums: dict[str, Tensor] = {}
        for name, table in self._tables.items():
            if kind == "adagrad":
                self._sums[name] = torch.zeros_like(table.data)
            elif kind == "rowwise_adagrad":
                self._sums[name] = torch.zeros(table.shape[0], device=table.device)

    def state(self) -> dict[str, Tensor]:
        """The sums themselves, by FBGEMM's names: `TABLE.momentum1`, of the table's shape, or one a row."""
        return {f"{name}.momentum1": sums for name, sums in self._sums.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Takes a step along the mean of the ranks' gradients, and forgets these. Collective: one all-reduce."""
        if not self._tables:
            return
        found = {
            name: table.new_zeros(table.shape) if table.grad is None else table.grad
            for name, table in self._tables.items()
        }
        flat = torch.cat([gradient.flatten() for gradient in found.values()])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        means = flat.split([gradient.numel() for gradient in found.values()])
        for (name, table), mean in zip(self._tables.items(), means, strict=True):
            gradient = mean.view_as(table)
            if name in self._sums:
                sums = self._sums[name]
                by_row = sums.dim() == 1
                sums += gradient.square().mean(1) if by_row else gradient.square()
                root = sums.sqrt().add_(self._epsilon)
                table.addcdiv_(gradient, root[:, None] if by_row else root, value=-self.rate)
            else:
                table.add_(gradient, alpha=-self.rate)
            table.grad = None
