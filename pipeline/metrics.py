"""KL, cross-entropy and top-1 agreement of patched runs against the clean run, per token, in nats.

Nothing of shape `seq pos v` is ever held: the work goes over chunks of tokens, and a chunk's clean logits serve every
run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.decoder import Unembedding
from pipeline.types import Hidden, Logits, TokenValues

# Four or five buffers of `chunk v` float32 are alive at once, so a chunk takes about five times this.
LOGITS_BYTES = 64 * 2**20
# Below this |log q - log p| the series is exact to float32; above it the subtraction loses less than a digit.
SERIES_LIMIT = 0.3


@dataclass(frozen=True)
class Clean:
    """The clean distribution P at some tokens, kept while every run is compared with it."""

    hidden: Hidden
    products: Logits
    logits: Logits
    log_sum: Tensor  # token 1
    probability: Logits
    top1: Tensor  # token

    @classmethod
    def of(cls, hidden: Hidden, unembedding: Unembedding) -> "Clean":
        products = unembedding.products(hidden)
        logits = unembedding.logits(products)
        log_sum = logits.logsumexp(-1, keepdim=True)
        return cls(hidden, products, logits, log_sum, (logits - log_sum).exp(), logits.argmax(-1))

    def cross_entropy(self, target: Tensor) -> TokenValues:
        """-log P[target]."""
        return (self.log_sum - self.logits.gather(-1, target[:, None])).squeeze(-1)

    def entropy(self) -> TokenValues:
        """-sum_v P log P."""
        return (self.probability * (self.log_sum - self.logits)).sum(-1)


def divergence(log_ratio: Logits, p: Logits, log_q: Logits) -> TokenValues:
    """KL(P || Q) = sum_v p (e^x - 1 - x), with x = log q - log p: equal to -sum p x because both sum to one.

    Every term is >= 0, so nothing cancels between tokens of the vocabulary; for small x the bracket is its series
    x²/2 + x³/6 + ... + x⁶/720. Exactly 0 for x = 0, and never negative.

    x comes with an error common to all of the vocabulary, that of the two log-sums. It shows as r = sum_v p (e^x - 1),
    which should be 0, and takes r - log(1 + r), about r²/2, off the sum; that matters below 1e-6 nats. Relative error
    against float64 below 1e-5 from 1e-7 to 100 nats.
    """
    x = log_ratio
    series = p * x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720))))
    kl = torch.where(x.abs() < SERIES_LIMIT, series, log_q.exp() - p - p * x).sum(-1)
    r = (kl + (p * x).sum(-1)).clamp(-0.5, 0.5)
    return (kl - (r - r.log1p())).clamp_min(0.0)


def compare(
    clean: Clean, patched: Hidden, target: Tensor, unembedding: Unembedding
) -> tuple[TokenValues, TokenValues, Tensor]:
    """KL(P || Q), cross-entropy of Q and whether the top tokens agree, at each token of a chunk.

    Q comes from the *difference* of the logits, d = (h_q - h_p) W_U, so that a small change keeps all its digits:
    log q - log p = d - (lse_q - lse_p).
    """
    d = unembedding.difference(clean.hidden, patched, clean.products)
    logits = clean.logits + d
    log_sum = logits.logsumexp(-1, keepdim=True)
    shift = log_sum - clean.log_sum
    kl = divergence(d - shift, clean.probability, logits - log_sum)
    ce = clean.cross_entropy(target) + (shift - d.gather(-1, target[:, None])).squeeze(-1)
    return kl, ce, logits.argmax(-1) == clean.top1


def chunk_size(d_vocab: int, budget: int = LOGITS_BYTES) -> int:
    """Tokens per chunk, so that one buffer `chunk v` of float32 stays within the budget in bytes."""
    return max(16, budget // (4 * d_vocab))


def clean_values(hidden: Hidden, target: Tensor, unembedding: Unembedding) -> dict[str, Tensor]:
    """`ce`, `entropy` (nats) and `top1` (a token id) of the clean run, each ` token`."""
    parts = []
    for h, t in zip(*_chunks(unembedding, hidden, target), strict=True):
        clean = Clean.of(h, unembedding)
        parts.append((clean.cross_entropy(t), clean.entropy(), clean.top1))
    return dict(zip(("ce", "entropy", "top1"), map(torch.cat, zip(*parts, strict=True)), strict=True))


def patched_values(
    hidden: Hidden, patched: Sequence[Hidden], target: Tensor, unembedding: Unembedding
) -> dict[str, Tensor]:
    """`kl`, `ce` (nats) and `top1_agrees` of several patched runs against one clean run, each `run token`."""
    parts = []
    for h, t, *runs in zip(*_chunks(unembedding, hidden, target, *patched), strict=True):
        clean = Clean.of(h, unembedding)
        columns = zip(*(compare(clean, run, t, unembedding) for run in runs), strict=True)
        parts.append([torch.stack(column) for column in columns])
    kl, ce, agrees = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    return {"kl": kl, "ce": ce, "top1_agrees": agrees}


def _chunks(unembedding: Unembedding, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    size = chunk_size(unembedding.W_U.shape[1])
    return [tensor.split(size) for tensor in tensors]
