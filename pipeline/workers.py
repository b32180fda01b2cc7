"""Threads that share work on the CPU, each with products of one thread: none waits for another."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import torch
from torch import Tensor


def compiled(x: Tensor) -> bool:
    """Whether the loops of `rows` run this: float32 on the CPU. float64, and GPUs, take the tensor form."""
    return x.device.type == "cpu" and x.dtype == torch.float32


def count(x: Tensor) -> int:
    """Workers for tensors where `x` is: on a CPU one a thread, else one."""
    return torch.get_num_threads() if x.device.type == "cpu" else 1


def share(work: Callable, tasks: Iterable, workers: int) -> list:
    """The results of `work` in the order of the tasks."""
    return list(_pool(workers).map(work, tasks) if workers > 1 else map(work, tasks))


def over_rows(loop: Callable, rows: Tensor, *others) -> None:
    """A compiled loop over the rows of a contiguous tensor, in place, by all threads."""
    matrix, workers = rows.view(-1, rows.shape[-1]).numpy(), count(rows)
    step = -(-len(matrix) // workers)
    parts = [matrix[start : start + step] for start in range(0, len(matrix), step)]
    share(lambda part: loop(part, *others), parts, len(parts))


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, initializer=partial(torch.set_num_threads, 1))
