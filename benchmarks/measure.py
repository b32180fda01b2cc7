"""Times taken in turn, as ratios; tables of them; and the machine that they were taken on.

The forms that are compared run A, B, A, B, ... in one process, and a ratio is the median over rounds of the ratios
within a round: what else the machine does then falls on all of them alike. Nothing here is ever a limit on time.
"""

import os
import platform
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from pipeline import linear

ROOT = Path(__file__).parent.parent
# Mean KLs of ours and of the plain way must agree to this, relative; below the second they are rounding.
AGREEMENT, ROUNDING = 1e-3, 1e-6


@dataclass(frozen=True)
class Options:
    """What the command line says; None leaves each part its own rounds, and `all_tokens` every layer."""

    small: bool
    rounds: int | None
    threads: int
    layers: list[int] | None = None

    def turns(self, full: int) -> int:
        """Rounds: what the user asked for, else two for a small run and `full` for a whole one."""
        return self.rounds or (2 if self.small else full)


@dataclass(frozen=True)
class Table:
    """Rows of named values with a caption that says what was compared."""

    caption: str
    rows: list[dict[str, object]]

    def markdown(self) -> str:
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        lines = [names, ["---"] * len(names), *([_shown(row.get(name, "")) for name in names] for row in self.rows)]
        return "\n".join([self.caption, "", *("| " + " | ".join(line) + " |" for line in lines)])


def _shown(value: object) -> str:
    """Three digits of a number, and the whole of a large one."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


@dataclass(frozen=True)
class Time:
    """Seconds of CPU, over all threads, and of wall clock."""

    cpu: float
    wall: float

    def __add__(self, other: "Time") -> "Time":
        return Time(self.cpu + other.cpu, self.wall + other.wall)

    def __mul__(self, factor: float) -> "Time":
        return Time(self.cpu * factor, self.wall * factor)


Times = dict[Hashable, list[Time]]


def timed(form: Callable[[], object]) -> tuple[Time, object]:
    cpu, wall = time.process_time(), time.perf_counter()
    result = form()
    return Time(time.process_time() - cpu, time.perf_counter() - wall), result


def interleaved(
    forms: dict[Hashable, Callable[[], object]], rounds: int, warm: Iterable[Hashable] | None = None
) -> tuple[Times, dict[Hashable, object]]:
    """The times of every form, run in turn, and the result of its last run. Those in `warm` run once before, unless
    told otherwise all of them."""
    for name in forms if warm is None else warm:
        forms[name]()
    times: Times = {name: [] for name in forms}
    results: dict[Hashable, object] = {}
    for _ in range(rounds):
        for name, form in forms.items():
            time_taken, results[name] = timed(form)
            times[name].append(time_taken)
    return times, results


def total(parts: Iterable[list[Time]]) -> list[Time]:
    """The sum of several forms, round by round."""
    return [sum(times[1:], times[0]) for times in zip(*parts, strict=True)]


def scaled(times: list[Time], factor: float) -> list[Time]:
    return [time_taken * factor for time_taken in times]


def ratios(label: str, others: list[Time], ours: list[Time]) -> dict[str, float]:
    """How many times longer the others took, in CPU time and in wall time."""
    pairs = list(zip(others, ours, strict=True))
    return {
        f"{label}, CPU": median(other.cpu / mine.cpu for other, mine in pairs),
        f"{label}, wall": median(other.wall / mine.wall for other, mine in pairs),
    }


def scale(times: list[Time], label: str = "ours", unit: str = "s") -> dict[str, float]:
    """Medians, to say what the ratios are ratios of."""
    return {
        f"{label}, CPU {unit}": median(each.cpu for each in times),
        f"{label}, wall {unit}": median(each.wall for each in times),
    }


def agreement(ours: Tensor, plain: Tensor) -> float:
    """The largest relative difference of the mean KL of an intervention, `intervention ...` each. ValueError where it
    is too large."""
    mine, other = (kl.double().flatten(1).mean(1) for kl in (ours, plain))
    large = other > ROUNDING
    worst = ((mine - other).abs() / other)[large].max().item()
    small = (mine - other).abs()[~large]
    if worst > AGREEMENT or (small > ROUNDING).any():
        raise ValueError(f"Ours and the plain way differ in mean KL: {mine.tolist()} and {other.tolist()}.")
    return worst


def machine(threads: int, load: float) -> dict[str, object]:
    """What the numbers depend on; `load` is the average of processes that wanted to run when the part began."""
    return {
        "cpu": linear.processor("model name"),
        "cores": os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "load_before": round(load, 1),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "packed_weights": linear.prefers_packed(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
