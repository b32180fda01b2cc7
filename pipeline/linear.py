"""x @ W' + b, on weights packed by oneDNN where that is faster.

MKL's products run well below the peak on processors that are not Intel's; oneDNN's, on weights brought into its own
layout once, do not (1.28 times faster on the AMD machine that DESIGN was measured on; alike on Intel's). PyTorch offers
the packed product to its compiler only, so that its absence must be no error.
"""

import platform
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]


def linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """x -> x @ weight.T + bias; `weight` is `out in`."""
    if weight.dtype == torch.float32 and weight.device.type == "cpu" and prefers_packed():
        return packed(weight, bias)
    return partial(F.linear, weight=weight, bias=bias)


def packed(weight: Tensor, bias: Tensor | None) -> Linear:
    """The same on packed float32 weights on the CPU."""
    ready = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, ready, bias, "none", [], "")


@cache
def prefers_packed() -> bool:
    """Whether this processor is one where packed weights are faster. By its maker, not by a race, so that equal
    machines round alike."""
    return torch.backends.mkl.is_available() and processor() != "GenuineIntel" and can_pack()


@cache
def can_pack() -> bool:
    """Whether this build of PyTorch has the packed product, and it is right on a small example."""
    x, weight, bias = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3), torch.ones(4)
    try:
        return torch.allclose(packed(weight, bias)(x), F.linear(x, weight, bias))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False


def processor(field: str = "vendor_id") -> str:
    """The maker of the processor, or its "model name", as Linux has it; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), platform.machine())
