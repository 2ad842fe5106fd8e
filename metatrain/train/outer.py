"""The outer loop's optimizers: AdamW for dense parameters, the tables' fused one, and the rates of both by step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from metatrain.config import OptimizerConfig


def rate_share(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The share of the peak rate at `step` (0-based) of `total_steps`: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    span = max(1, total_steps - 1 - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / span)
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1.0 - done
    return config.final_share + (1 - config.final_share) * left


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay is of this parameter: a layer's weights."""
    return parameter.dim() > 1 and name.rpartition(".")[2] == "weight"


class DenseOptimizer:
    """AdamW (Loshchilov and Hutter 2019) over the dense parameters, by name, with clipping of the whole gradient.

    Weights of layers decay; biases, and what a method learns besides, do not: an inner rate, a λ or a threshold between
    two labels has no reason to be near 0.

    Its state exists from the start, so that a checkpoint can be loaded into it at any time.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> None:
        self._parameters = {name: p for name, p in sorted(parameters.items()) if p.requires_grad}
        self._clip = config.clip
        groups = {
            decay: [p for name, p in self._parameters.items() if decays(name, p) == decay] for decay in (True, False)
        }
        self._adam = torch.optim.AdamW(
            [{"params": of, "weight_decay": config.weight_decay * decay} for decay, of in groups.items() if of], lr=0.0
        )
        for p in self._parameters.values():
            self._adam.state[p] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    def clip(self) -> Tensor:
        """Clips the gradients as a whole; returns their norm before that."""
        return nn.utils.clip_grad_norm_(self._parameters.values(), self._clip if self._clip else math.inf)

    def update(self, rate: float) -> None:
        """Updates with `rate`, and forgets the gradients."""
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self.forget()

    def forget(self) -> None:
        """Forgets the gradients."""
        self._adam.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """The moments by `NAME.MOMENT`: the very tensors, so that loading into them in place restores the optimizer."""
        return {
            f"{name}.{moment}": tensor
            for name, p in self._parameters.items()
            for moment, tensor in self._adam.state[p].items()
        }
