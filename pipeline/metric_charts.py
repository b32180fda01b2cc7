"""Pictures of what scores are made of: ablations at every place of a model, the metrics of SAEs side by side and how
they rank them, effective compute."""

import math
import textwrap
from collections.abc import Mapping
from typing import NamedTuple

import matplotlib
import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from pipeline.charts import (
    PAIR,
    TITLE,
    WIDEST,
    curve,
    dots,
    grid,
    key,
    legend,
    mark,
    message,
    name_axes,
    name_places,
    placed,
    room,
    wrapped,
)
from pipeline.normalised import FEWEST

# What a picture never throws together.
STUDY = ("model", "corpus", "experiment", "baseline")
ABLATIONS = ("zero", "mean", "resample")
LOSSES = {"delta_ce_mean": "loss increase, nats", "kl_mean": "mean KL, nats"}
# Colours that no intervention has: the residual stream in olive, light to dark.
COMPONENTS = {"resid_pre": "#b5d33d", "resid_mid": "#7d9c12", "resid_post": "#3f5205"}
COMPONENTS |= {"attn_out": "#d6128f", "mlp_out": "#3a1fb8"}
# What is smaller than the largest loss by more decades is drawn on a linear scale through 0.
DECADES = 2
# With more heads a number would not fit into its cell.
NUMBERED = 12
# A picture of verdicts: how many places it shows, inches for the names of metrics, and the characters on their lines.
PLACES, MARGIN, METRICS = 4, 3.1, 40
# The grey of a cell without a number, and the size of text in cells and at their edges.
UNKNOWN, SMALL = "0.92", 7.5


def studies(data: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    """The rows of each of STUDY, as far as the table has them, called by what differs."""
    about = [name for name in STUDY if name in data.columns]
    differ = [name for name in about if data[name].n_unique() > 1]
    parts = data.partition_by(about, maintain_order=True)
    return [(" · ".join(str(part[name][0]) for name in differ), part) for part in parts]


def ablations(data: pl.DataFrame) -> list[str]:
    """Those that occur: ours first, then those of others by name."""
    found = set(data["intervention"])
    return [name for name in ABLATIONS if name in found] + sorted(found - set(ABLATIONS))


def named(axes: Axes, *parts: str) -> None:
    """The title of a panel, of those parts that are not empty."""
    axes.set_title(wrapped(" · ".join(filter(None, parts)), TITLE), fontsize=9)


def atlas(data: pl.DataFrame) -> Figure:
    """Loss increase, and below it the mean KL, along the layers: a line per component, a column per ablation."""
    whole = pl.lit(True) if "head" not in data.columns else pl.col("head").is_null()
    known = pl.col("component").is_in(list(COMPONENTS))
    data = data.filter(whole, known, pl.any_horizontal(pl.col(*LOSSES).is_not_null()))
    if data.is_empty():
        return message("No component was ablated.")
    names, parts = ablations(data), studies(data)
    size = min(WIDEST, 0.8 + 4.1 * len(names)), 0.7 + 5.2 * len(parts)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(2 * len(parts), len(names), sharey="row", squeeze=False)
    for (title, part), pair in zip(parts, panels.reshape(-1, 2, len(names)), strict=True):
        for row, (column, label) in zip(pair, LOSSES.items(), strict=True):
            for axes, name in zip(row, names, strict=True):
                _components(axes, part.filter(pl.col("intervention") == name), column)
                axes.axhline(0, color="0.4", linewidth=0.9)
            row[0].set_ylabel(label, fontsize=9)
            _signed_logarithm(row[0], part, column)
        for axes, name in zip(pair[0], names, strict=True):
            named(axes, title, name)
    name_axes(figure, "layer")
    key(figure, {name: mark(shade) for name, shade in COMPONENTS.items() if name in data["component"]})
    return figure


def _components(axes: Axes, part: pl.DataFrame, column: str) -> None:
    part = part.drop_nulls(column)
    for component, shade in COMPONENTS.items():
        line = part.filter(pl.col("component") == component).sort("layer")
        curve(axes, line["layer"].to_numpy(), line, column, shade)
    layers = part["layer"].unique().sort()
    axes.set_xticks(layers[:: 1 + len(layers) // 14])
    if part.is_empty():
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, fontsize=9)


def _signed_logarithm(axes: Axes, part: pl.DataFrame, column: str) -> None:
    """Logarithmic over the DECADES below the largest, and linear from there through 0: nothing vanishes."""
    known = part.select(pl.col(column, f"{column}_low", f"{column}_high").cast(pl.Float64)).to_numpy()
    low, high = (float(end) for end in (np.nanmin(known), np.nanmax(known))) if np.isfinite(known).any() else (0, 0)
    largest = max(abs(low), abs(high))
    if not largest:
        return
    linear = 10.0 ** (round(math.log10(largest)) - DECADES)
    axes.set_yscale("symlog", linthresh=linear)
    scale = axes.yaxis.get_transform()
    ends = scale.transform(np.array([low, high]))
    bottom, top = scale.inverted().transform(ends + 0.06 * np.array([-1, 1]) * (np.ptp(ends) or 1))
    axes.set_ylim(0.0 if 0 <= low < linear else bottom, top)
    axes.yaxis.set_major_locator(matplotlib.ticker.SymmetricalLogLocator(scale, (1, 3)))
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def heads(data: pl.DataFrame) -> Figure:
    """Loss increase of each head: layers below each other, a column per ablation, one scale of colours per row."""
    data = data.filter(pl.col("head").is_not_null(), pl.col("delta_ce_mean").is_not_null())
    if data.is_empty():
        return message("No head was ablated.")
    names, parts = ablations(data), studies(data)
    heights = [0.7 + max(1.2, 0.2 * part["layer"].n_unique()) for _, part in parts]
    most = max(part["head"].n_unique() for _, part in parts)
    size = 1.6 + min(3.8, max(2.4, 0.34 * most)) * len(names), 0.4 + sum(heights)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(parts), len(names), squeeze=False, height_ratios=heights)
    for (title, part), row in zip(parts, panels, strict=True):
        for axes, name in zip(row, names, strict=True):
            mesh = _heads(axes, part, name)
            named(axes, title, name)
        row[0].set_ylabel("layer", fontsize=9)
        figure.colorbar(mesh, ax=list(row), pad=0.01).set_label(LOSSES["delta_ce_mean"], fontsize=9)
    name_axes(figure, "head")
    return figure


def _heads(axes: Axes, part: pl.DataFrame, name: str) -> QuadMesh:
    layers, found = (part[column].unique().sort().to_list() for column in ("layer", "head"))
    most = part["delta_ce_mean"].abs().max() or 1.0
    rows = part.filter(pl.col("intervention") == name).select("layer", "head", "delta_ce_mean")
    values = _matrix(layers, found, {(layer, head): value for layer, head, value in rows.rows()})
    decimals = min(3, max(0, 1 - math.floor(math.log10(most))))
    form = f"{{:z.{decimals}f}}" if len(found) <= NUMBERED else ""
    mesh = _cells(axes, values, np.arange(len(layers) + 1), "RdBu_r", (-most, most), form, size=6.0)
    axes.set_yticks(np.arange(len(layers)) + 0.5, layers, fontsize=SMALL)
    step = 1 + len(found) // 17
    axes.set_xticks(range(0, len(found), step), found[::step], fontsize=SMALL)
    return mesh


def _matrix(rows: list, columns: list, found: Mapping[tuple, float | None]) -> np.ndarray:
    """The number of each row and column, NaN where there is none."""
    return np.array([[found.get((row, column)) for column in columns] for row in rows], dtype=float)


def _cells(
    axes: Axes, values: np.ndarray, edges: np.ndarray, shades: str, ends: tuple[float, float], form: str, size: float
) -> QuadMesh:
    """A heat map of rows between the edges, the first above, with the numbers in it if there is a form for them."""
    at = np.arange(values.shape[1] + 1) - 0.5
    mesh = axes.pcolormesh(at, edges, np.ma.masked_invalid(values), cmap=shades, vmin=ends[0], vmax=ends[1])
    axes.set_facecolor(UNKNOWN)
    axes.grid(False)
    axes.set_ylim(edges[-1], edges[0])
    for i, j in np.argwhere(np.isfinite(values)) if form else ():
        ink = "black" if sns.utils.relative_luminance(mesh.cmap(mesh.norm(values[i, j]))) > 0.4 else "white"
        # Hundreds of numbers would make the layout take seconds, and they stay inside their panel.
        place = {"ha": "center", "va": "center_baseline", "fontsize": size, "in_layout": False}
        axes.text(j, (edges[i] + edges[i + 1]) / 2, form.format(values[i, j]), color=ink, **place)
    return mesh


class Verdict(NamedTuple):
    """One place: metrics that rank all SAEs alike in one group, SAEs and groups in the order of the picture; the ranks
    `group sae` and Kendall's tau `group group`, NaN for what is not known."""

    title: str
    groups: list[list[str]]
    saes: list[str]
    ranks: np.ndarray
    taus: np.ndarray

    @property
    def breadth(self) -> int:
        return len(self.groups) + len(self.saes)

    @property
    def names(self) -> list[str]:
        return [textwrap.fill(f"{i}  {_together(group)}", METRICS) for i, group in enumerate(self.groups, 1)]

    @property
    def heights(self) -> list[float]:
        """Inches of each row."""
        return [0.1 + 0.14 * len(name.splitlines()) for name in self.names]

    @property
    def height(self) -> float:
        return 0.8 + sum(self.heights) + room(self.saes)


def verdicts(ranks: pl.DataFrame, agreements: pl.DataFrame) -> Figure:
    """Which SAE is the best by which metric, and how far metrics agree: below each other the places with the most SAEs.

    Both tables as in `normalised.Verdicts`, with what they are about in front.
    """
    found = sorted(_places(ranks, agreements), key=lambda each: -len(each.saes))
    if not found:
        return message(f"At no place are there {FEWEST} SAEs to be ranked.")
    found, left_out = found[:PLACES], len(found[PLACES:])
    most = max(each.breadth for each in found)
    cell = min(0.42, (WIDEST - MARGIN) / most)
    heights = [each.height for each in found]
    figure = Figure(figsize=(MARGIN + cell * most, sum(heights) + 0.3 * bool(left_out)), layout="constrained")
    rows = figure.subfigures(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
    for each, row in zip(found, rows, strict=True):
        row.suptitle(each.title, x=0.01, ha="left", fontsize=10)
        spare = [most - each.breadth] if most > each.breadth else []
        places = row.add_gridspec(1, 2 + len(spare), width_ratios=[len(each.saes), len(each.groups), *spare])
        _verdict(row.add_subplot(places[0]), row.add_subplot(places[1]), each, size=min(SMALL, 24 * cell))
    if left_out:
        name_axes(figure, f"further places with as many SAEs or fewer, not drawn: {left_out}")
    return figure


def _places(ranks: pl.DataFrame, agreements: pl.DataFrame) -> list[Verdict]:
    found = []
    for title, part in studies(ranks):
        same = [pl.col(name).eq_missing(part[name][0]) for name in STUDY if name in part.columns]
        for rows in part.partition_by("place", maintain_order=True):
            if rows["sae"].n_unique() >= FEWEST:
                place = rows["place"][0]
                name = " · ".join(filter(None, [title, "all hooks" if place == "all" else place]))
                found.append(_ordered(name, rows, agreements.filter(*same, pl.col("place") == place)))
    return found


def _ordered(title: str, ranks: pl.DataFrame, agreements: pl.DataFrame) -> Verdict:
    """Metrics that agree most with `kl` first, SAEs by their rank there; with the first metric where there is no kl."""
    metrics, saes = (ranks[name].unique(maintain_order=True).to_list() for name in ("metric", "sae"))
    first = "kl" if "kl" in metrics else metrics[0]
    rank = {(metric, sae): value for metric, sae, value in ranks.select("metric", "sae", "rank").rows()}
    tau = {(metric, metric): 1.0 for metric in metrics}
    for a, b, value in agreements.select("metric_a", "metric_b", "kendall").rows():
        tau |= {(a, b): value, (b, a): value}
    alike: dict[tuple, list[str]] = {}
    for metric in metrics:
        alike.setdefault(tuple(rank.get((metric, sae)) for sae in saes), []).append(metric)

    def agreement(group: list[str]) -> float:
        value = tau.get((first, group[0]))
        return 2.0 if first in group else -2.0 if value is None else value

    groups = sorted(alike.values(), key=agreement, reverse=True)
    saes = sorted(saes, key=lambda sae: rank.get((first, sae), math.inf))
    each = [group[0] for group in groups]
    return Verdict(title, groups, saes, _matrix(each, saes, rank), _matrix(each, each, tau))


def _together(metrics: list[str]) -> str:
    """The names of several metrics; one that has several baselines stands once: `kl_score[zero, mean]`."""
    baselines: dict[str, list[str]] = {}
    for name, _, baseline in (metric.partition("[") for metric in metrics):
        baselines.setdefault(name, []).extend([baseline.removesuffix("]")] if baseline else [])
    return ", ".join(name + (f"[{', '.join(those)}]" if those else "") for name, those in baselines.items())


def _verdict(left: Axes, right: Axes, each: Verdict, size: float) -> None:
    edges = np.cumsum([0, *each.heights])
    middles = (edges[:-1] + edges[1:]) / 2
    _cells(left, each.ranks, edges, "YlGnBu_r", (1.0, float(len(each.saes))), "{:g}", size)
    name_places(left, each.saes)
    left.set_xlim(-0.5, len(each.saes) - 0.5)
    left.set_yticks(middles, each.names, fontsize=SMALL, parse_math=False)
    left.set_title("rank (1 = best)", fontsize=9)
    _cells(right, each.taus, edges, "RdBu", (-1.0, 1.0), "{:z.2f}", size)
    right.set_xticks(range(len(each.groups)), range(1, len(each.groups) + 1), fontsize=SMALL)
    right.set_yticks(middles, range(1, len(each.groups) + 1), fontsize=SMALL)
    right.set_title("Kendall's tau", fontsize=9)


def effective_compute(metrics: pl.DataFrame) -> Figure:
    """What share of its compute a model with an SAE is worth: a panel per calibration, and below why others say nothing
    of any SAE."""
    data = metrics.filter(pl.col("metric") == "effective_compute", pl.col("intervention").is_in(PAIR))
    if data.is_empty():
        return message("No calibration was given.")
    data = placed(data)
    parts = data.partition_by("baseline", maintain_order=True)
    worth = [part for part in parts if part["value"].is_not_null().any()]
    refusals = [_refusal(part) for part in parts if part["value"].is_null().all()]
    if not worth:
        figure = message("\n".join(textwrap.fill(each, 90) for each in refusals))
        figure.set_figheight(0.5 + 0.4 * len(refusals))
        return figure
    places = data["place"].unique(maintain_order=True).to_list()
    figure, panels = grid(
        len(worth), width=min(WIDEST - 0.6, max(2.9, 0.5 + 0.62 * len(places))), sharex=True, sharey=True
    )
    for axes, part in zip(panels, worth, strict=True):
        known = part.drop_nulls("value")
        dots(axes, known, places, "value")
        refused = f"{len(part) - len(known)} of {len(part)} not calibrated" if len(known) < len(part) else ""
        named(axes, part["baseline"][0], refused)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    name_axes(figure, y="share of pre-training compute")
    below = [textwrap.fill(each, int(14 * figure.get_figwidth())) for each in refusals]
    if below:
        figure.supxlabel("\n".join(below), x=0.01, ha="left", fontsize=8, parse_math=False)
    figure.set_figheight(figure.get_figheight() + room(places) + 0.25 * len(below))
    legend(figure, data)
    return figure


def _refusal(part: pl.DataFrame) -> str:
    """Why a calibration gives no value: the most frequent reason, and whether there are others."""
    reasons = part["reason"].drop_nulls().value_counts(sort=True).get_column("reason").to_list() or ["not known"]
    others = " (and other reasons)" if len(reasons) > 1 else ""
    return f"{part['baseline'][0]} gives no value: {reasons[0]}{others}"
