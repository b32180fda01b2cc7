"""Frontiers: what the SAEs of one family lose at which sparsity, as points and as fitted curves.

A table has a row per SAE: `family`, `sae`, `l0`, `ce`, `ce_clean`, `ce_base` (nats; the loss under the baseline that
was chosen), and where known `kl` (nats) and `d` (width of the activation). The frontier itself is L0 against nats lost
or KL in logarithms; its curves are of x = 1/L0 against the performance hit (ce - ce_clean) / (ce_base - ce_clean).
Bostock 2024, "How to better report sparse autoencoder performance"; METHODS 5. No torch.

Intervals come from resampled sequences (`Replicates`), which say how sure the numbers of these SAEs are, or, where
there are none, from the scatter of the points about their curve (`fits.Scatter`), which says how other SAEs of the
family would fall. Which points are Pareto-optimal is decided once, by the estimates.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Bool, Float

from pipeline.fits import FAR, LOGARITHMIC, MODELS, PARAMETERS, Batch, Fit, Scatter, fitted
from pipeline.statistics import divided

NUMBERS = ("l0", "ce", "ce_clean", "ce_base")
RESAMPLED = (*NUMBERS, "kl")
CHOICES = ("pareto", "all")
FITS = {"family": pl.String, "curve": pl.String, "points": pl.String, "n": pl.Int64, "n_left_out": pl.Int64}
FITS |= {"errors": pl.String} | {name + end: pl.Float64 for name in PARAMETERS for end in ("", "_low", "_high")}
FITS |= dict.fromkeys(("aicc", "loo", "loo_hit"), pl.Float64) | {"converged": pl.Boolean, "warning": pl.String}
# Resampled estimates agree with the table to the digits that its numbers may have been stored with.
STORED = 1e-5
# Columns of a file, and how `read_csv` names them in a table.
FILE = {"family": "family", "sae": "sae", "l0": "l0", "ce": "ce", "clean": "ce_clean", "baseline": "ce_base"}
FILE |= {"kl": "kl", "d": "d"}
OPTIONAL = ("sae", "kl", "d")


@dataclass(frozen=True)
class Replicates:
    """Resampled columns of a table by name: NUMBERS, and `kl` where the table has it.

    Each is `replicate point`, its columns in the order of the table's rows and the estimate its first row, as
    `Bootstrap.replicates` gives them; all of them of one Bootstrap, so that everything is paired.
    """

    values: Mapping[str, np.ndarray]
    confidence: float


@dataclass(frozen=True)
class Axes:
    """What is drawn and fitted: each `replicate point`, the estimate first, NaN for what is not defined. `losses` and
    `pareto`, which points are Pareto-optimal in their family, go by the name of the loss: nats_lost, and kl if known.
    """

    family: np.ndarray
    x: Batch
    hit: Batch
    losses: Mapping[str, Batch]
    pareto: Mapping[str, Bool[np.ndarray, " point"]]
    resampling: Replicates | Scatter

    @property
    def families(self) -> list[str]:
        return list(dict.fromkeys(self.family))

    def fit(self, family: str, name: str, choice: str) -> tuple[Fit, int]:
        """A model through the chosen points of a family, and how many of them it cannot use."""
        if choice not in CHOICES:
            raise ValueError(f"Unknown choice of points '{choice}'. Known: {', '.join(CHOICES)}.")
        model = MODELS[name]
        chosen = (self.family == family) & (self.pareto["nats_lost"] if choice == "pareto" else True)
        usable = chosen & (self.x[0] > 0) & (self.hit[0] > 0 if model.log else np.isfinite(self.hit[0]))
        resampling = self.resampling if isinstance(self.resampling, Scatter) else self.resampling.confidence
        found = fitted(model, self.x[:, usable], self.hit[:, usable], resampling, family)
        return found, int(chosen.sum() - usable.sum())


def axes(table: pl.DataFrame, resampling: Replicates | Scatter, relative: bool = False) -> Axes:
    """Of a table as above. ValueError for a missing column, and for replicates of another table."""
    wanted = ["family", "sae", *NUMBERS, *(["d"] if relative else [])]
    if missing := [name for name in wanted if name not in table.columns]:
        raise ValueError(f"The table of SAEs has columns {', '.join(table.columns)}, and lacks {', '.join(missing)}.")
    if relative and not (table["d"] > 0).fill_null(False).all():
        raise ValueError("The width d of some SAEs is missing or not positive, expected it for L0 / d.")
    names = [*NUMBERS, *(["kl"] if "kl" in table.columns else [])]
    values = {name: table[name].cast(pl.Float64).to_numpy()[None] for name in names}
    if isinstance(resampling, Replicates):
        _require_same(values, resampling.values)
        values = {name: resampling.values[name] for name in names}
    nats_lost = values["ce"] - values["ce_clean"]
    losses = {"nats_lost": nats_lost} | ({"kl": values["kl"]} if "kl" in names else {})
    family, width = table["family"].cast(pl.String).to_numpy(), table["d"].to_numpy() if relative else 1.0
    pareto = {name: _pareto(family, values["l0"][0], loss[0]) for name, loss in losses.items()}
    x, hit = divided(width, values["l0"]), divided(nats_lost, values["ce_base"] - values["ce_clean"])
    return Axes(family, x, hit, losses, pareto, resampling)


def _require_same(table: Mapping[str, Batch], replicates: Mapping[str, np.ndarray]):
    for name, values in table.items():
        found = replicates.get(name)
        if found is None or found.ndim != 2 or found.shape[1] != values.shape[1]:
            shape = "none" if found is None else f"the shape {found.shape}"
            raise ValueError(f"Replicates of '{name}' have {shape}, expected (replicates, {values.shape[1]} SAEs).")
        if not np.allclose(found[0], values[0], rtol=STORED, atol=0, equal_nan=True):
            raise ValueError(f"The first replicate of '{name}' is not the table's column. Give both in the same order.")


def _pareto(family: np.ndarray, l0: Float[np.ndarray, " point"], loss: Float[np.ndarray, " point"]) -> np.ndarray:
    """Which points no other of the family beats in L0 or loss without being worse in the other."""
    known = (l0 > 0) & np.isfinite(loss)
    as_good = (l0 <= l0[:, None]) & (loss <= loss[:, None])
    better = (l0 < l0[:, None]) | (loss < loss[:, None])
    beaten = (known & as_good & better & (family == family[:, None])).any(1)
    return known & ~beaten


def points(table: pl.DataFrame, relative: bool = False) -> pl.DataFrame:
    """The table with four more columns, in the same order.

    `x` = 1 / L0, or d / L0 where `relative`; null for an L0 that is not positive. `nats_lost` = ce - ce_clean. `hit` =
    nats_lost / (ce_base - ce_clean); null unless the baseline is worse than the clean run. `pareto`: no SAE of the
    family is at least as good in both L0 and nats lost and better in one.
    """
    found = axes(table, Scatter(), relative)
    columns = {"x": found.x[0], "hit": found.hit[0], "nats_lost": found.losses["nats_lost"][0]}
    new = [pl.Series(name, values, nan_to_null=True) for name, values in columns.items()]
    return table.with_columns(*new, pl.Series("pareto", found.pareto["nats_lost"]))


def fit(
    table: pl.DataFrame, resampling: Replicates | Scatter, choice: str = "pareto", relative: bool = False
) -> pl.DataFrame:
    """A row per family, in the table's order, and `curve`, a name of MODELS; the columns are FITS.

    `choice` "pareto" takes a family's Pareto-optimal points, "all" all; `n` are fitted, `n_left_out` have no hit, or
    none that a logarithmic model can use. `errors` names the space of the errors: hit or log_hit. `m` and `a` are hits
    at x = 1, `x_half` is an x. `aicc` as in `Fit.aicc`, to be compared between models of the same n; `loo` and
    `loo_hit` are root mean squares, in the space of the errors and as a hit. Null for what is not defined; `warning`
    says why, and what is extrapolated.
    """
    found, rows = axes(table, resampling, relative), []
    for family in found.families:
        for name in MODELS:
            each, left_out = found.fit(family, name, choice)
            row = {"family": family, "curve": name, "points": choice, "n": len(each.x), "n_left_out": left_out}
            row |= {"errors": "log_hit" if each.model.log else "hit", "converged": each.converged}
            row |= dict(zip(("loo", "loo_hit"), each.leave_one_out(), strict=True)) | {"aicc": each.aicc()}
            for parameter in each.model.parameters:
                row |= each.interval(parameter).columns(parameter)
            rows.append(row | {"warning": "; ".join(warnings(each, left_out)) or None})
    return pl.DataFrame(rows, schema=FITS).with_columns(pl.col(pl.Float64).fill_nan(None))


def warnings(found: Fit, left_out: int) -> list[str]:
    """What a reader of a fit must know; nothing for one that is as good as it looks."""
    n, needed, notes = len(found.x), len(found.model.parameters), []
    if left_out:
        why = "no hit above 0 to take the logarithm of" if found.model.log else "no hit"
        notes.append(f"{left_out} of {n + left_out} points left out: {why}")
    if n < needed:
        return [*notes, f"no fit: {n} point{'s' * (n != 1)} for {needed} parameter{'s' * (needed > 1)}"]
    if not found.converged:
        same = needed > 1 and np.ptp(found.x) <= STORED * found.x.max()
        return [*notes, "no fit: all points have the same L0" if same else "no fit: it did not converge"]
    if n == needed:
        notes.append(f"{n} points for {needed} parameters" if n > 1 else "1 point for 1 parameter")
        notes[-1] += ": the curve goes through them, and nothing says how well it fits"
    if found.model.slope is not None and found.lines[0, 1] <= 0:
        notes.append("the hit does not rise with 1/L0")
    if found.model.saturates and (found.hit >= 1).any():
        notes.append(f"{(found.hit >= 1).sum()} points are at a hit of 1 or more, which no Hill curve reaches")
    return notes + [note for name in found.model.parameters for note in _undetermined(found, name)]


def _undetermined(found: Fit, name: str) -> list[str]:
    """Of a parameter that is extrapolated, or whose interval lacks an end although there are resamples."""
    parameter, low, high = found.interval(name), found.x.min(), found.x.max()
    if name in LOGARITHMIC and not math.isfinite(parameter.value):
        return [f"{name} is not determined: it is more than {FAR:g} times away from all data"]
    notes = []
    if name == "x_half" and not low <= parameter.value <= high:
        notes.append(f"x_half = {parameter.value:.3g} lies outside the data, x = {low:.3g} to {high:.3g}")
    if len(found.lines) > 1 and not (math.isfinite(parameter.low) and math.isfinite(parameter.high)):
        notes.append(f"the interval of {name} lacks an end: in too many resamples the data do not determine it")
    return notes


def curve(row: Mapping, x: Float[np.ndarray, " x"]) -> Float[np.ndarray, " x"]:
    """The hit along the curve of a row of `fit`, for figures; NaN where a parameter is null."""
    model = MODELS[row["curve"]]
    values = [math.nan if row[name] is None else row[name] for name in model.parameters]
    slope = 1.0 if model.slope is None else values[1]
    intercept = values[0] if not model.log else math.log(values[0]) * (-slope if model.saturates else 1)
    predicted = model.predicted(np.array([[intercept, slope]]), x[None])[0]
    return np.exp(predicted) if model.log else predicted


def read_csv(path: Path, names: Mapping[str, str] | None = None, families: Sequence[str] = ()) -> pl.DataFrame:
    """A table from a file with the columns of FILE (those of OPTIONAL if it has them), in the order of its lines.

    `names` says what the file calls them otherwise: {"family": "arch", "baseline": "zero"}. `families` chooses some. An
    SAE without a name is called by its line. ValueError, with the line, for what is not a number, an L0 that is not
    positive, a negative loss, and a baseline that is no worse than the clean run.
    """
    if unknown := sorted(set(names or {}) - set(FILE)):
        raise ValueError(f"Unknown names of columns: {', '.join(unknown)}. Known: {', '.join(FILE)}.")
    called = {name: (names or {}).get(name, name) for name in FILE}
    text = _text(path, called)
    table = text.with_columns(pl.exclude("family", "sae", "line").cast(pl.Float64, strict=False))
    _require(path, text, pl.col("family") != "", lambda row: "there is no name of a family")
    for name, column in FILE.items():
        if column in table.columns and column not in ("family", "sae"):
            number, value = table[column], f"'{called[name]}' is "
            _require(path, text, number.is_finite(), lambda row, c=column, v=value: f"{v}{row[c]!r}, expected a number")
            right, what = (number > 0, "more than 0") if column in ("l0", "d") else (number >= 0, "0 or more")
            _require(path, text, right, lambda row, c=column, v=value, w=what: f"{v}{row[c]}, expected {w}")
    worse = "the baseline is {ce_base}, expected more than the clean loss, {ce_clean}: else there is no performance hit"
    _require(path, text, table["ce_base"] > table["ce_clean"], lambda row: worse.format(**row))
    if unknown := [family for family in families if family not in set(table["family"])]:
        known = ", ".join(table["family"].unique(maintain_order=True))
        raise ValueError(f"{path} has no families {', '.join(unknown)}. Known: {known}.")
    if "sae" not in table.columns:
        table = table.with_columns(sae=pl.format("line {}", "line"))
    return table.drop("line").filter(pl.col("family").is_in(list(families)) if families else True)


def _text(path: Path, called: Mapping[str, str]) -> pl.DataFrame:
    """The columns by the names of a table, as they are written, and `line`."""
    try:
        text = pl.read_csv(path, infer_schema=False, glob=False)
    except (pl.exceptions.ComputeError, pl.exceptions.NoDataError) as error:
        raise ValueError(f"{path} is no table of comma-separated values: {error}") from error
    if missing := [called[name] for name in FILE if called[name] not in text.columns and name not in OPTIONAL]:
        raise ValueError(
            f"{path} has columns {', '.join(text.columns)}, and lacks {', '.join(missing)}. Say in `names` what it "
            'calls them, as in {"family": "arch", "baseline": "zero"}.'
        )
    if twice := [name for name in called.values() if f"{name}_duplicated_0" in text.columns]:
        raise ValueError(f"{path} has the column {twice[0]} twice, expected it once. Rename one of them.")
    if text.is_empty():
        raise ValueError(f"{path} has a header and no line below it, expected a line per SAE.")
    found = {column: pl.col(called[name]) for name, column in FILE.items() if called[name] in text.columns}
    stripped = text.select(value.str.strip_chars().fill_null("").alias(column) for column, value in found.items())
    return stripped.with_columns(line=pl.int_range(2, pl.len() + 2))


def _require(path: Path, text: pl.DataFrame, right: pl.Series | pl.Expr, wrong: Callable[[dict], str]):
    """ValueError about the first line that is not right."""
    bad = text.filter(~right.fill_null(False))
    if len(bad):
        raise ValueError(f"{path}, line {bad['line'][0]}: {wrong(bad.row(0, named=True))}.")
