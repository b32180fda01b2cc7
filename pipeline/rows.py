"""Compiled loops over rows for the CPU: the reductions over the vocabulary, and GELU.

One pass over a row that stays in cache. The same numbers as the tensor forms in `metrics` and `lean`, which run on a
GPU and in float64. Numba brings its own compiler, so
no machine needs one; the machine code is cached beside this file. Rows are float32, sums of blocks are added in
float64.
"""

import math
from typing import no_type_check

import llvmlite.binding
import numba
import numpy as np

# Elements whose float32 sum is added to a float64 one.
BLOCK = 1024
# Where e^x grows beyond this, a probability that float32 takes for 0 may matter, and logarithms are summed instead.
HUGE = np.float32(60.0)
_f = np.float32
# Sums may be reordered into vectors and products fused, and no NaN is expected: the engine refuses them before.
_FAST = {"reassoc", "contract", "nsz", "arcp", "nnan"}
# Vectors as wide as the processor has them: LLVM would take half of AVX-512.
numba.config.CPU_NAME = llvmlite.binding.get_host_cpu_name()
numba.config.CPU_FEATURES = llvmlite.binding.get_host_cpu_features().flatten() + ",-prefer-256-bit"
_options = {"nogil": True, "cache": True, "fastmath": _FAST, "error_model": "numpy"}


@no_type_check  # compiled functions can't be wrapped
@numba.njit(inline="always")
def exponential(x):
    """(e^x - 1 - x, e^x) in float32, each exact to a few units in the last place, for x from -87 to 88.

    x = n log 2 + r with |r| <= log(2) / 2, and s = e^r - 1 - r by its series. For n = 0 that is the first answer
    itself, so that small x lose no digits.
    """
    bounded = min(max(x, _f(-87.0)), _f(88.0))
    n = np.floor(bounded * _f(1.44269504) + _f(0.5))
    r = bounded - n * _f(0.693359375) - n * _f(-2.12194440e-4)
    tail = _f(1 / 24) + r * (_f(1 / 120) + r * (_f(1 / 720) + r * _f(1 / 5040)))
    s = r * r * (_f(1 / 2) + r * (_f(1 / 6) + r * tail))
    power = np.int32((n + _f(127.0)) * _f(8388608.0)).view(np.float32)  # 2^n, written into the exponent
    grown = power * (_f(1.0) + (r + s))
    return s if n == _f(0.0) else grown - _f(1.0) - x, grown


@no_type_check
@numba.njit(**_options)
def clean_rows(logits, largest, total):
    """Rows of logits become e^(logit - largest of the row) in place, at least e^-87; `total` is their sum per row."""
    width = logits.shape[1]
    for i in range(logits.shape[0]):
        row, best, whole = logits[i], largest[i], 0.0
        for start in range(0, width, BLOCK):
            stop = min(start + BLOCK, width)
            for v in range(start, stop):
                row[v] = exponential(row[v] - best)[1]
            part = _f(0.0)
            for v in range(start, stop):
                part += row[v]
            whole += part
        total[i] = whole


@no_type_check
@numba.njit(**_options)
def patched_rows(d, at, p, total, top1, kl, mean, agrees):
    """KL, mean logit difference under P, and whether the top token stays, for rows of logit differences `d`.

    Row i is compared with the clean row `at[i]` of `p`, which sums to `total`. Where some x is above HUGE, `kl` is
    infinite, and the caller sums logarithms instead.
    """
    width = d.shape[1]
    for i in range(d.shape[0]):
        change, clean, j = d[i], p[at[i]], at[i]
        moved = 0.0
        for start in range(0, width, BLOCK):
            part = _f(0.0)
            for v in range(start, min(start + BLOCK, width)):
                part += clean[v] * change[v]
            moved += part
        centre = _f(moved / total[j])
        # A little above, or the top token would outdo itself by its own rounding.
        top = clean[top1[j]] * exponential(change[top1[j]] - centre)[1] * _f(1 + 2e-6)
        whole, left, above, huge = 0.0, 0.0, _f(0.0), _f(0.0)
        for start in range(0, width, BLOCK):
            part, rest = _f(0.0), _f(0.0)
            for v in range(start, min(start + BLOCK, width)):
                x = change[v] - centre
                more, grown = exponential(x)
                part += clean[v] * more
                rest += clean[v] * x
                above += _f(1.0) if clean[v] * grown > top else _f(0.0)
                huge += _f(1.0) if x > HUGE else _f(0.0)
            whole += part
            left += rest
        # `centre` is the mean up to rounding; what is left of it is taken into account.
        whole, left = whole / total[j], left / total[j]
        kl[i] = max(math.log1p(whole + left) - left, 0.0) if huge == _f(0.0) else np.inf
        mean[i], agrees[i] = centre + left, above == _f(0.0)


@no_type_check
@numba.njit(**_options)
def gelu_rows(hidden, bias):
    """GELU of hidden + bias in its tanh form, in place: x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    for i in range(hidden.shape[0]):
        row = hidden[i]
        for v in range(hidden.shape[1]):
            x = row[v] + bias[v]
            u = x * (_f(0.7978845608028654) + _f(0.035677408136300125) * x * x)
            row[v] = x / (_f(1.0) + exponential(_f(-2.0) * u)[1])
