"""Public meta-learning libraries behind one call: the same second-order MAML gradient, each as its documentation shows.

Each leaves the gradient in the learner's parameters. What a library does beside the inner loop (an outer optimizer's
step, reports) is taken away as far as its interface lets.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class Peer:
    """A library: `build(learner, episodes, steps, rate)` gives a function that runs the first n tasks."""

    name: str
    package: str
    modules: tuple[str, ...]
    one_at_a_time: bool
    build: Callable[[nn.Module, Any, int, float], Callable[[int], object]]

    def check(self) -> str:
        """The version.

        Raises:
            ImportError: It is not there, or lacks something itself.
        """
        with contextlib.redirect_stdout(io.StringIO()):
            for module in self.modules:
                importlib.import_module(module)
        return importlib.metadata.version(self.package)


def _higher(learner: nn.Module, data: Any, steps: int, rate: float) -> Callable[[int], object]:
    import higher

    optimizer = torch.optim.SGD(learner.parameters(), lr=rate)

    def run(tasks: int) -> object:
        for i in range(tasks):
            with higher.innerloop_ctx(learner, optimizer, copy_initial_weights=False) as (fast, inner):
                for _ in range(steps):
                    inner.step(functional.mse_loss(fast(data.support.x[i]), data.support.labels[i]))
                functional.mse_loss(fast(data.query.x[i]), data.query.labels[i]).backward()
        return None

    return run


def _torchopt(learner: nn.Module, data: Any, steps: int, rate: float) -> Callable[[int], object]:
    import torchopt

    def run(tasks: int) -> object:
        inner = torchopt.MetaSGD(learner, lr=rate)
        start = torchopt.extract_state_dict(learner, by="reference", detach_buffers=False)
        inner_start = torchopt.extract_state_dict(inner, by="reference")
        for i in range(tasks):
            for _ in range(steps):
                inner.step(functional.mse_loss(learner(data.support.x[i]), data.support.labels[i]))
            functional.mse_loss(learner(data.query.x[i]), data.query.labels[i]).backward()
            torchopt.recover_state_dict(learner, start)
            torchopt.recover_state_dict(inner, inner_start)
        return None

    return run


def _parallel_metalearn(learner: nn.Module, data: Any, steps: int, rate: float) -> Callable[[int], object]:
    from metalearn.algorithms.MAML import MAML
    from metalearn.inner_optimizers.optimizers import InnerSGD
    from metalearn.loss.base import BaseLoss

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.learner = learner

        def forward(self, x: torch.Tensor, **_: Any) -> dict[str, Any]:
            return {"logits": self.learner(x), "buffers": dict(self.named_buffers())}

        def get_fast_weights(self, **_: Any) -> OrderedDict[str, nn.Parameter]:
            return OrderedDict(self.named_parameters())

    class Squared(BaseLoss):
        def forward(self, out_dict: Any, targets: Any, model_states: Any = None, **_: Any) -> Any:
            loss = functional.mse_loss(out_dict["logits"], targets["labels"])
            return loss, loss

    model = Model()
    inner = InnerSGD(model.get_fast_weights(), inner_lr=rate, max_inner_steps=steps, learn_lr=False)
    meta = MAML(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        inner_optimizer=inner,
        support_loss_fn=Squared(),
        inner_steps=steps,
        chunk_size=64,
        device=torch.device("cpu"),
    )

    def run(tasks: int) -> object:
        s, q = data.support.tasks(0, tasks), data.query.tasks(0, tasks)
        return meta.step(iter([(s.x, {"labels": s.labels}, q.x, {"labels": q.labels})]))

    return run


PEERS = (
    Peer("higher", "higher", ("higher",), True, _higher),
    Peer("torchopt", "torchopt", ("torchopt",), True, _torchopt),
    Peer("parallel_metalearn", "parallel-metalearn", ("metalearn.algorithms.MAML",), False, _parallel_metalearn),
)
