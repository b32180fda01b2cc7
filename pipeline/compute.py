"""Effective compute: the share of pre-training compute that would buy the loss that a patched model is left with.

With L(C) = L_inf + a C^-b, a model of clean loss L0 that loses delta nats is worth the fraction
f = ((L0 + delta - L_inf) / (L0 - L_inf))^(-1/b) of its compute (Gao et al. 2024, section 4.1). f depends above all on
the law, so there are several, each a calibration with its name, source and range, and none is used outside its range.
Losses are in nats per token, compute in FLOP. A calibration is a CSV, described in calibrations/README.md.
"""

import csv
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Float

from pipeline.normalised import ROWS, Sums, metric_row
from pipeline.statistics import Bootstrap, Interval

KEYS = ("name", "kind", "source", "corpus", "note", "lowest_flop", "highest_flop")
COLUMNS = {"law": ("parameter", "value"), "points": ("flop", "loss"), "checkpoints": ("flop", "loss")}
POWER, CHINCHILLA = ("floor", "scale_flop", "exponent"), ("E", "A", "B", "alpha", "beta")
LABELS = dict.fromkeys(KEYS[:5], pl.String) | {"n_points": pl.Int64, "misfit": pl.Float64}
BOUNDS = (*KEYS[5:], "lowest_loss", "highest_loss")
LAW = [name + end for name in ("floor", "log_scale", "exponent") for end in ("", "_low", "_high")]
CALIBRATIONS = LABELS | dict.fromkeys((*BOUNDS, *LAW), pl.Float64)
# Exponents of published laws go from 0.05 to 0.2; a fit that ends at one of these has found no power law.
EXPONENTS = (0.003, 3.0)
# Where searches for the floor start, as shares of the lowest loss: from a pure power law to a curve that is flat.
STARTS = (0.0, 0.3, 0.6, 0.85, 0.97)
# With four points for three parameters, intervals of 95 % held the truth in 60 of 100 simulations, with five in 92. A
# loss that falls by less than SCATTER times its scatter about the law does not fall.
FEWEST, SCATTER = 5, 3


@dataclass(frozen=True)
class Law:
    """L(C) = floor + (C / scale)^-exponent: the law, then its resamples, if any. `log_scale` is log(scale in FLOP)."""

    floor: Float[np.ndarray, " replicate"]
    log_scale: Float[np.ndarray, " replicate"]
    exponent: Float[np.ndarray, " replicate"]

    @classmethod
    def power(cls, floor: float, scale_flop: float, exponent: float) -> "Law":
        return cls(np.array([floor]), np.array([math.log(scale_flop)]), np.array([exponent]))

    @classmethod
    def chinchilla(cls, e: float, a: float, b: float, alpha: float, beta: float) -> "Law":
        """The compute-optimal law of L(N, D) = E + A N^-alpha + B D^-beta with C = 6 N D. Hoffmann et al. 2022, eq. 4.

        At the optimum N = G (C/6)^(beta/(alpha+beta)) and D = (C/6) / N with G = (alpha A / (beta B))^(1/(alpha+beta)),
        so L(C) = E + (A G^-alpha + B G^beta) (C/6)^-(alpha beta/(alpha+beta)).
        """
        g, exponent = (alpha * a / (beta * b)) ** (1 / (alpha + beta)), alpha * beta / (alpha + beta)
        return cls.power(e, 6 * (a * g**-alpha + b * g**beta) ** (1 / exponent), exponent)

    def loss(self, flop: float) -> float:
        """L(C) of the law itself, in nats: the floor at an infinite C, infinity at 0."""
        log_c = math.log(flop) if flop > 0 else -math.inf
        return float(self.floor[0] + np.exp(-self.exponent[0] * (log_c - self.log_scale[0])))

    def fraction(
        self, clean_loss: Float[np.ndarray, " #replicate"], delta: Float[np.ndarray, " #replicate"]
    ) -> Float[np.ndarray, " replicate"]:
        """f of each replicate, in range or not: it is `Calibration.fraction` that refuses.

        -infinity, an end that lies beyond, where the law never reaches the clean loss, infinity where it never reaches
        the patched one, NaN where neither.
        """
        clean, patched = clean_loss - self.floor, clean_loss + delta - self.floor
        both = (clean > 0) & (patched > 0)
        rise = np.log(np.where(both, patched, 1)) - np.log(np.where(both, clean, 1))
        # A float holds exp(700), not exp(710).
        inside = np.exp(np.clip(-rise / self.exponent, -700, 700))
        return np.where(both, inside, np.where(patched > 0, -np.inf, np.where(clean > 0, np.inf, np.nan)))


@dataclass(frozen=True)
class Calibration:
    """A law with its source, and the lowest and highest `flop` and `losses` (nats) that it holds for; 0 or infinity
    where the source gives none, as `note` says. `misfit`, of `n_points` fitted ones, is the rms of log(loss / law)."""

    name: str
    kind: str
    source: str
    corpus: str
    note: str
    law: Law
    flop: tuple[float, float]
    losses: tuple[float, float]
    confidence: float
    n_points: int | None = None
    misfit: float | None = None

    def fraction(
        self, clean_loss: float | Float[np.ndarray, " replicate"], delta: float | Float[np.ndarray, " replicate"]
    ) -> tuple[Interval, str | None]:
        """(f, None), or (NaN, why there is none). 1: nothing is lost; above 1: the patched model is the better one.

        `clean_loss` and `delta` in nats, each a number or the replicates of one Bootstrap, the estimate first. The
        interval is over the points that the law was fitted to, if it was, and over sequences, if replicates came; they
        are independent, so any pairing is a fair one. An end is NaN beyond the range, and where nothing varies.
        """
        clean, delta = np.atleast_1d(np.float64(clean_loss)), np.atleast_1d(np.float64(delta))
        reason = self.refusal(float(clean[0])) or self.refusal(float(clean[0] + delta[0]))
        if reason:
            return Interval(np.nan, np.nan, np.nan), reason
        number = max(len(self.law.floor), len(clean), len(delta))
        clean, delta, *law = (_cycled(values, number) for values in (clean, delta, *vars(self.law).values()))
        f, (low, high) = Law(*law).fraction(clean, delta), self.losses
        f = np.where((clean + delta > high) | (clean < low), -np.inf, f)
        f = np.where((clean + delta < low) | (clean > high), np.inf, f)
        return _interval(f, self.confidence), None

    def refusal(self, loss: float) -> str | None:
        """Why a loss is not calibrated, None where it is."""
        low, high = self.losses
        if max(low, self.law.floor[0]) < loss <= high or loss == low > self.law.floor[0]:
            return None
        if not math.isfinite(loss):
            return "the loss is not known"
        ends = f"above {low:.3g}" if math.isinf(high) else f"{low:.3g} to {high:.3g}"
        return f"the loss {loss:.3g} is outside {ends} nats, the range of {self.name}"


def _cycled(values: np.ndarray, number: int) -> np.ndarray:
    """The estimate, then `number` - 1 resamples, over and over if there are fewer; the estimate if there are none."""
    return np.concatenate([values[:1], np.resize(values[1:] if len(values) > 1 else values, number - 1)])


def _interval(replicates: np.ndarray, confidence: float) -> Interval:
    """Ends are order statistics: nothing can be interpolated where replicates are infinite, beyond the range."""
    value, resampled = float(replicates[0]), np.sort(replicates[1:])
    if not len(resampled) or np.isnan(resampled).any():
        return Interval(value, np.nan, np.nan)
    tail, last = (1 - confidence) / 2, len(resampled) - 1
    ends = resampled[[math.floor(tail * last), math.ceil((1 - tail) * last)]]
    return Interval(value, *(float(end) if np.isfinite(end) else np.nan for end in ends))


def calibration(text: str, name: str, samples: int, confidence: float, seed: int) -> Calibration:
    """The calibration of a CSV's text; `name` is the file's, and its own unless a line `# name:` says otherwise.

    Points and checkpoints are fitted, with `samples` resamples for intervals of mass `confidence`. Raises ValueError,
    with the name and the line, for what cannot be meant, and for points that show no law.
    """
    try:
        header, cells = _read(text)
        named = {key: header.get(key, "") for key in KEYS[:5]}
        named |= {"name": named["name"] or name, "confidence": confidence}
        if header["kind"] == "law":
            law, flop = _published(header, cells)
            for key in (key for key in KEYS[5:] if header[key] == "none"):
                named["note"] = f"{named['note']} The source gives no {key}: nothing is refused there.".strip()
            return Calibration(law=law, flop=flop, losses=(law.loss(flop[1]), law.loss(flop[0])), **named)
        flop, loss = np.array([[_number(cell, f"line {line}") for cell in row] for line, row in cells]).reshape(-1, 2).T
        law, misfit = fit(flop, loss, samples, seed, correlated=header["kind"] == "checkpoints")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    ends = float(flop.min()), float(flop.max())
    # Of what was seen and of what was fitted: else the best checkpoint may be outside by its own noise.
    losses = min(float(loss.min()), law.loss(ends[1])), max(float(loss.max()), law.loss(ends[0]))
    return Calibration(law=law, flop=ends, losses=losses, n_points=len(flop), misfit=misfit, **named)


def _read(text: str) -> tuple[dict[str, str], list[tuple[int, list[str]]]]:
    """The lines `# key: value`, and for each row its line number and its two cells; other columns are left out."""
    lines = [(i, line.strip()) for i, line in enumerate(text.lstrip("\ufeff").splitlines(), 1)]
    header = {match[1]: match[2] for _, line in lines if (match := re.match(r"#\s*(\w+):\s*(.*)", line))}
    if unknown := set(header) - set(KEYS):
        raise ValueError(f"unknown key '{min(unknown)}'. Known: {', '.join(KEYS)}.")
    if missing := [key for key in KEYS[1:4] if not header.get(key)]:
        raise ValueError(f"no {', '.join(missing)}. Begin the file with lines such as '# {missing[0]}: ...'.")
    if header["kind"] not in COLUMNS:
        raise ValueError(f"the kind is '{header['kind']}', expected {', '.join(COLUMNS)}.")
    if header["kind"] != "law" and set(header) & set(KEYS[5:]):
        raise ValueError(f"the range of {header['kind']} is their own. Delete {' and '.join(KEYS[5:])}.")
    cells = [(i, [cell.strip() for cell in next(csv.reader([line]))]) for i, line in lines if line and line[0] != "#"]
    columns, first = COLUMNS[header["kind"]], cells[0][1] if cells else []
    if not set(columns) <= set(first):
        raise ValueError(f"the columns are '{','.join(first)}', expected '{','.join(columns)}'.")
    for i, row in cells:
        if len(row) != len(first):
            raise ValueError(f"line {i} has {len(row)} cells, expected {len(first)}.")
    return header, [(i, [row[first.index(column)] for column in columns]) for i, row in cells[1:]]


def _number(text: str, where: str, zero: bool = False) -> float:
    """A positive number; 0 too where it is allowed."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf or (zero and value == 0)):
        raise ValueError(f"{where} has '{text}', expected a positive number.")
    return value


def _published(header: dict[str, str], cells: list[tuple[int, list[str]]]) -> tuple[Law, tuple[float, float]]:
    """A law and its (lowest, highest) FLOP: 0 or infinity for `none`."""
    if missing := [key for key in KEYS[5:] if not header.get(key)]:
        raise ValueError(f"no {', '.join(missing)}. Give it in FLOP, or as 'none' where the source gives none.")
    unbounded = dict(zip(KEYS[5:], (0.0, math.inf), strict=True))
    low, high = (_number(header[key], key) if header[key] != "none" else unbounded[key] for key in KEYS[5:])
    if low >= high:
        raise ValueError(f"the range goes from {low:.3g} to {high:.3g} FLOP, expected the lowest first.")
    values = {key: _number(value, f"line {line}", zero=key == "floor") for line, (key, value) in cells}
    if len(values) == len(cells) and set(values) == set(POWER):
        return Law.power(**values), (low, high)
    if len(values) == len(cells) and set(values) == set(CHINCHILLA):
        return Law.chinchilla(*(values[name] for name in CHINCHILLA)), (low, high)
    found = ", ".join(row[0] for _, row in cells)
    raise ValueError(f"the parameters are '{found}', expected '{', '.join(POWER)}' or '{', '.join(CHINCHILLA)}'.")


def fit(
    flop: Float[np.ndarray, " point"], loss: Float[np.ndarray, " point"], samples: int, seed: int, correlated: bool
) -> tuple[Law, float]:
    """(law, root mean square of log(loss / law)): least squares of the log loss, floor >= 0, best of several starts.

    A resample is the law plus residuals drawn with replacement, times sqrt(n / chi²) with n - 3 degrees of freedom: the
    scatter itself is only estimated. Neighbouring checkpoints of one run err together: `correlated` residuals are drawn
    in circular blocks of n^(1/3) (Künsch 1989). Raises ValueError for too few points, and where no loss falls.
    """
    if (different := len(np.unique(flop))) < FEWEST:
        raise ValueError(f"{different} different amounts of compute, expected {FEWEST} or more.")
    order, n, middle = np.argsort(flop, kind="stable"), len(flop), np.log(flop).mean()
    x, y = np.log(flop[order]) - middle, np.log(loss[order])
    best, _ = min((_nearest(x, y, start) for start in _starts(x, y)), key=lambda found: found[1])
    fitted, _ = _model(best, x)
    misfit = float(np.sqrt(np.mean((residual := y - fitted) ** 2)))
    top, bottom = np.exp(fitted[[0, -1]])
    exponent, scatter = float(np.exp(best[2])), misfit * float(np.exp(y.mean()))
    if not EXPONENTS[0] * 1.01 < exponent < EXPONENTS[1] / 1.01 or top - bottom < SCATTER * scatter:
        raise ValueError(
            f"no power law: over the points the loss falls by {top - bottom:.3g} nats with a scatter of {scatter:.3g}, "
            f"at an exponent of {exponent:.3g}. Add points of other compute, or leave this calibration out."
        )
    generator, block = np.random.default_rng([seed, n]), round(n ** (1 / 3)) if correlated else 1
    first = generator.integers(n, size=(samples, math.ceil(n / block), 1))
    drawn = residual[((first + np.arange(block)) % n).reshape(samples, -1)[:, :n]] - residual.mean()
    drawn *= np.sqrt(n / generator.chisquare(n - 3, size=(samples, 1)))
    near = [_nearest(x, fitted + np.clip(row, -5, 5), best)[0] for row in drawn]
    floor, log_drop, log_exponent = np.array([best, *near]).T
    # The search stays inside its bounds: a pure power law comes out as nearly one.
    floor = np.where(floor < 1e-4 * loss.min(), 0, floor)
    return Law(floor, middle + log_drop / np.exp(log_exponent), np.exp(log_exponent)), misfit


def _model(at: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log(floor + drop exp(-exponent x)) at x = log C - mean log C, and its derivatives by floor, log drop and log
    exponent, `point parameter`."""
    slope = np.exp(at[2])
    drop = np.exp(at[1] - slope * x)
    slopes = np.stack([np.ones_like(x), drop, -drop * slope * x], axis=1)
    return np.log(at[0] + drop), slopes / (at[0] + drop)[:, None]


def _nearest(x: np.ndarray, y: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, float]:
    """(parameters, squared error) of the law with log losses nearest to y, from a start."""
    from scipy.optimize import least_squares  # planning reads calibrations too, and half of its imports would be this

    lowest = np.exp(y.min())
    bounds = np.array([(0, lowest), (-20, 5), np.log(EXPONENTS)]).T
    inside = np.clip(start, bounds[0] + 1e-9 * lowest, bounds[1] - 1e-9 * lowest)
    found = least_squares(lambda at: _model(at, x)[0] - y, inside, lambda at: _model(at, x)[1], bounds=tuple(bounds))
    return found.x, float(found.cost)


def _starts(x: np.ndarray, y: np.ndarray) -> Iterable[np.ndarray]:
    """For several floors, the straight line through log(loss - floor)."""
    for floor in np.exp(y.min()) * np.array(STARTS):
        slope, drop = np.polyfit(x, np.log(np.exp(y) - floor), 1)
        yield np.array([floor, drop, np.log(np.clip(-slope, *EXPONENTS))])


def compute_rows(sums: Mapping[str, Sums], calibrations: Iterable[Calibration], boot: Bootstrap) -> pl.DataFrame:
    """A row per intervention and calibration, in the columns of `normalised_rows`: the metric is `effective_compute`,
    the baseline the calibration's name, the value f or null with a reason. Intervals as in `Calibration.fraction`."""
    rows, calibrations = [], list(calibrations)
    for name, each in sums.items():
        ce, clean = boot.replicates(*each.ce), boot.replicates(*each.ce_clean)
        fractions = [(one.name, *one.fraction(clean, ce - clean)) for one in calibrations]
        rows += [metric_row(name, "effective_compute", *fraction) for fraction in fractions]
    return pl.DataFrame(rows, schema=ROWS)


def calibration_rows(calibrations: Iterable[Calibration]) -> pl.DataFrame:
    """A row per calibration: what it is, where it holds (null where not bounded), and its law, as in `Law`."""
    rows = []
    for one in calibrations:
        ends = dict(zip(BOUNDS, one.flop + one.losses, strict=True))
        numbers = {name: end if math.isfinite(end) else None for name, end in ends.items()}
        for name, values in vars(one.law).items():
            numbers |= _interval(values, one.confidence).columns(name)
        rows.append({name: getattr(one, name) for name in LABELS} | numbers)
    return pl.DataFrame(rows, schema=CALIBRATIONS)
