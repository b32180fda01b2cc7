"""Micro-batches of sequences.

Every batch has exactly BATCH sequences (the last one is filled up with copies of its own first sequence), and shards
start at multiples of it, so that a token's numbers are the same bits whatever the number of shards.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.store import CHUNK

BATCH = CHUNK


def ranges(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(first, last+1) sequence of each micro-batch between two sequences."""
    for first in range(start, stop, BATCH):
        yield first, min(first + BATCH, stop)


def filled(rows: Tensor) -> Tensor:
    """Rows of a micro-batch, filled up to BATCH with copies of the first."""
    return torch.cat([rows, rows[:1].expand(BATCH - len(rows), *rows.shape[1:])]) if len(rows) < BATCH else rows
