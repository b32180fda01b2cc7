"""How far a long stage is: tokens done, rate and time left."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from time import monotonic
from typing import TypeVar

from tqdm import tqdm

from pipeline.stage import log

T = TypeVar("T")
# Seconds between two lines of a log file.
INTERVAL = 20.0


def tracked(steps: Iterable[T], tokens: Sequence[int]) -> Iterator[T]:
    """The steps one by one; `tokens` says how many each of them is about. On a terminal a bar, else (in a log file) a
    plain line when INTERVAL has passed: `81,920 of 1,000,000 tokens (8 %), 5,120 tokens/s, 3 min left`."""
    if sys.stderr.isatty():
        with tqdm(total=sum(tokens), unit=" tokens", unit_scale=True, dynamic_ncols=True) as bar:
            for step, number in zip(steps, tokens, strict=True):
                yield step
                bar.update(number)
        return
    began = last = monotonic()
    done, total = 0, sum(tokens)
    for step, number in zip(steps, tokens, strict=True):
        yield step
        done += number
        now = monotonic()
        if now - last >= INTERVAL and done < total:
            log.info("%s", line(done, total, now - began))
            last = now


def line(done: int, total: int, seconds: float) -> str:
    """Of so many tokens in so many seconds, and what is left at this rate."""
    rate = done / seconds
    left = (total - done) / rate
    words = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min" if left < 6000 else f"{left / 3600:.1f} h"
    return f"{done:,} of {total:,} tokens ({100 * done / total:.0f} %), {rate:,.0f} tokens/s, {words} left"
