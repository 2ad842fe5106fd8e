"""How DistributedDataParallel averages dense gradients on CPU: the same sums whatever its buckets look like.

DDP lays gradients out by parameters in its first step, and from then on by when each was ready. gloo's ring adds up the
ranks' numbers in an order that depends on where in the buffer they lie. With three ranks or more, the first step after
a restart would be off in its last bits from an undisturbed run's.
"""
# No `from __future__ import annotations`: DDP examines a hook's annotations, which must be types.

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

#: For `bucket_cap_mb`: more than any machine's memory.
ONE_BUCKET_MB = 1 << 30


@dataclass(frozen=True)
class _State:
    group: dist.ProcessGroup
    names: dict[Tensor, str]


def average_by_name(wrapped: DistributedDataParallel) -> None:
    """Has gradients averaged in the order of their parameters' names. `wrapped` needs to have one bucket."""
    group = wrapped.process_group
    assert group is not None, "DistributedDataParallel has made sure of one"
    names: dict[Tensor, str] = {parameter: name for name, parameter in wrapped.module.named_parameters()}
    wrapped.register_comm_hook(_State(group, names), _mean)


def _mean(state: _State, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    named = zip((state.names[p] for p in bucket.parameters()), bucket.gradients(), strict=True)
    gradients = [gradient for _, gradient in sorted(named, key=lambda pair: pair[0])]
    flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(state.group.size())
    work = dist.all_reduce(flat, group=state.group, async_op=True)
    assert work is not None, "this process is in the group"

    def put_back(done: torch.futures.Future[list[Tensor]]) -> Tensor:
        done.value()  # raises where a rank is gone
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return bucket.buffer()

    return work.get_future().then(put_back)
