"""Attention over a task's support, in its order: what the newest events say of the next one.

Kang and McAuley 2018, "Self-Attentive Sequential Recommendation" (SASRec): events' vectors with learned positions
(section III-A), blocks of self-attention and a point-wise feed-forward network (III-B, III-C), and a score that is the
inner product of the user's state and the item's vector. Zhou et al. 2018, "Deep Interest Network for Click-Through Rate
Prediction" (DIN): the user's state is made for each candidate, by attention of the candidate over the user's events.

    z_s = event([h_s, e_s]) + position(age of s)           e_s: what the base learner's score leaves of the label
    z   ← blocks(z)                                        self-attention over the support
    o_q = Σ_s softmax_s(⟨query(h_q), key(z_s)⟩ / √d) value(z_s)
    score_q = the base learner's + ⟨weights(o_q), [h_q, 1]⟩

Ages count from the end: the newest event of a support has age 0, however long the support is and however it is padded.
A null key with the value 0 is among the keys: a task without support attends to it alone and keeps the base learner's
scores, and one whose events say nothing of a candidate may do so too.

Departures. Of SASRec: the label is part of an event, so that ratings serve as clicks do; self-attention looks both
ways, since only events after the whole support are scored; there is no dropout, since nothing in training draws random
numbers. Of DIN: a softmax over scaled products in place of a network's unnormalised weights.

Symbols: T tasks, S support events, Q events to score, H width of a representation, A width of the attention, N heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention

from metatrain.meta.engine import FastWeights, Tensors
from metatrain.meta.episode import Examples, Sizes
from metatrain.meta.learner import MetaLearner, representing


class SequenceAttention(MetaLearner):
    """Attends from each event to be scored to the task's support, whose order matters.

    Args:
        learner: A base learner that represents.
        loss, huber_delta, memory, precision, adapt_rows: See `MetaLearner`. Attention itself runs in the inputs' type.
        width: A.
        heads: N, a divisor of A.
        blocks: Blocks of self-attention over the support; 0: target attention alone.
        positions: Ages that are told apart: all events older than the last have the same.

    Raises:
        ValueError: The base learner doesn't represent, the heads don't divide the width, or a number is too small.
    """

    by_items = True

    def __init__(
        self,
        learner: nn.Module,
        *,
        loss: str = "squared",
        huber_delta: float = 1.0,
        memory: int = 1 << 30,
        precision: torch.dtype | None = None,
        adapt_rows: tuple[str, ...] = (),
        width: int = 32,
        heads: int = 2,
        blocks: int = 1,
        positions: int = 64,
    ) -> None:
        super().__init__(
            learner, adapt_rows=adapt_rows, memory=memory, loss=loss, huber_delta=huber_delta, precision=precision
        )
        self._learner = representing(learner, "sequence")
        for name, value, least in (("width", width, 1), ("heads", heads, 1), ("blocks", blocks, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if width % heads:
            raise ValueError(f"width ({width}) must be a multiple of heads ({heads})")
        if positions < 1:
            raise ValueError(f"positions must be at least 1, got {positions}; 1 makes the order say nothing")
        self.heads = heads
        h = self._learner.represented
        self.event = nn.Linear(h + 1, width)
        self.position = nn.Parameter(0.1 * torch.randn(positions, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.attention = Attention(h, width, heads)
        self.weights = nn.Linear(width, h + 1, bias=False)
        # Small, so that scores start near the base learner's; zero would keep what is below from learning at first.
        nn.init.normal_(self.weights.weight, std=0.1 / math.sqrt(width))

    def adapt(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.adapt`: `keys` and `values` [T, 1 + S, A], the null key first, and their `mask`."""
        h, scores = self.represented(self._learner, self.inputs(support, rows), support.represented)
        expected = scores.sigmoid() if self.loss == "binary_cross_entropy" else scores
        surprise = (support.labels - expected).unsqueeze(-1)
        z_TSA = self.event(torch.cat([h, surprise], dim=-1)) + self.position[ages(support.mask, len(self.position))]
        for block in self.blocks:
            z_TSA = block(z_TSA, support.mask)
        keys, values = self.attention.remembered(z_TSA)
        return FastWeights({"keys": keys, "values": values, "mask": with_null(support.mask)}, rows)

    def predict(self, fast: FastWeights, examples: Examples) -> Tensor:
        """See `MetaLearner.predict`."""
        h, scores = self.represented(self._learner, self.inputs(examples, fast.rows), examples.represented)
        o_TQA = self.attention(h, fast.weights["keys"], fast.weights["values"], fast.weights["mask"])
        w = self.weights(o_TQA)
        return scores + (w[..., :-1] * h).sum(-1) + w[..., -1]

    def unadapted(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.unadapted`: the null key alone."""
        keys, values = self.attention.remembered(support.x.new_zeros(support.x.shape[0], 0, self.event.out_features))
        return FastWeights({"keys": keys, "values": values, "mask": torch.ones_like(keys[..., 0])}, rows)

    def tasks_at_a_time(self, sizes: Sizes) -> int:
        """See `MetaLearner.tasks_at_a_time`."""
        # Where attention isn't fused, products, weights and mask of every head are there at once.
        attention = 3 * self.heads * (sizes.support + sizes.query) * (sizes.support + 1) * sizes.itemsize
        return max(1, min(super().tasks_at_a_time(sizes), self.memory // attention))

    def curves(self) -> dict[str, float]:
        """How much of the attention reaches the scores, and how much the ages tell."""
        return {
            "meta/sequence weights": float(self.weights.weight.detach().norm()),
            "meta/sequence positions": float((self.position - self.position.mean(0)).detach().norm()),
        }


class Attention(nn.Module):
    """Multi-head attention whose keys have a null among them: its value is 0.

    Parameters: `query`, `key`, `value` and `null` [A], the null key.

    Args:
        asking: Width of what asks.
        width: A: of what is asked, and of the result.
        heads: N.
    """

    def __init__(self, asking: int, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(asking, width), nn.Linear(width, width), nn.Linear(width, width)
        self.null = nn.Parameter(torch.zeros(width))
        self._heads = heads

    def remembered(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [T, 1 + S, A] of events [T, S, A]."""
        null = self.null.expand(z.shape[0], 1, -1)
        return torch.cat([null, self.key(z)], dim=1), torch.cat([torch.zeros_like(null), self.value(z)], dim=1)

    def forward(self, asking: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """What each asking event reads: [T, Q, `asking`], keys and values [T, K, A], mask [T, K] → [T, Q, A]."""

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self._heads, -1)).transpose(1, 2)

        seen = (mask > 0)[:, None, None, :].expand(-1, 1, asking.shape[1], -1)
        read = scaled_dot_product_attention(split(self.query(asking)), split(keys), split(values), attn_mask=seen)
        return read.transpose(1, 2).flatten(-2)


class Block(nn.Module):
    """SASRec's block: self-attention, then a point-wise feed-forward network, each x + f(LayerNorm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = Attention(width, width, heads)
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        """Events [T, S, A] and their mask [T, S] → [T, S, A]."""
        normed = self.norms[0](z)
        z = z + self.attention(normed, *self.attention.remembered(normed), with_null(mask))
        return z + self.outer(relu(self.inner(self.norms[1](z))))


def ages(mask: Tensor, most: int) -> Tensor:
    """How many of a task's events are newer than each: int64 [T, S], 0 the newest, at most `most` − 1.

    [1, 1, 1, 0] → [2, 1, 0, 0]. What padding has doesn't matter: nobody attends to it.
    """
    newer = (mask > 0).flip(-1).cumsum(-1).flip(-1) - 1
    return newer.clamp(min=0, max=most - 1)


def with_null(mask: Tensor) -> Tensor:
    """The mask of the null key and the events': [T, S] → [T, 1 + S]."""
    return torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)
