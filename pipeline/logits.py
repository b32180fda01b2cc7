"""From the final residual stream to logits, in two steps, so that differences can be taken between them."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.types import Hidden, Logits, Residual


@dataclass(frozen=True)
class Unembedding:
    """logits = cap(hidden @ W_U + b_U), with cap(z) = c tanh(z / c) where `soft_cap` c > 0, else the identity.

    `tf32` lets a GPU round the factors of the *difference* product to 10 bits; the clean product keeps float32.
    """

    normalise: Callable[[Tensor], Tensor]
    W_U: Tensor  # d_model v
    b_U: Tensor  # v
    soft_cap: float = 0.0
    tf32: bool = False

    def hidden(self, final: Residual) -> Hidden:
        """The normalised final stream, a row per token, in float32 or better."""
        return wide(self.normalise(final).flatten(0, 1))

    def products(self, hidden: Hidden, out: Tensor | None = None) -> Logits:
        """hidden @ W_U + b_U, before the cap, in float32 or better; into `out` where it is given."""
        return torch.addmm(wide(self.b_U), hidden, wide(self.W_U), out=out)

    def logits(self, products: Logits) -> Logits:
        """The cap applied to `products`."""
        return self.soft_cap * torch.tanh(products / self.soft_cap) if self.soft_cap else products

    def difference(self, change: Hidden, products: Logits | None, out: Tensor | None = None) -> Logits:
        """How much the logits change where `hidden` changes by `change`, through the product of the difference.

        So small differences keep their digits. `products` are those of the clean hidden state, wanted under a cap only:
        with a = products / c and b = change @ W_U / c it is c tanh(b) sech²(a) / (1 + tanh(a) tanh(b)); for large b,
        where nothing cancels, c (tanh(a + b) - tanh(a)).
        """
        with tf32(self.tf32):
            d = torch.mm(change, wide(self.W_U), out=out)
        if not self.soft_cap:
            return d
        a, b = products / self.soft_cap, d / self.soft_cap
        t, s = a.tanh(), b.tanh()
        return self.soft_cap * torch.where(b.abs() < 0.5, s / a.cosh().square() / (1 + t * s), (a + b).tanh() - t)


@contextmanager
def tf32(allowed: bool):
    """Products of float32 matrices on a GPU within the block may use TF32. Without effect on a CPU."""
    if not allowed:
        yield
        return
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def wide(x: Tensor) -> Tensor:
    """float32, or float64 where it is that already: from the logits on nothing is computed in less."""
    return x if x.dtype == torch.float64 else x.float()
