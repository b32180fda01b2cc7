"""The picture of frontiers: families of SAEs from sparse to dense, and the curves through them."""

from itertools import cycle

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipeline import frontier as frontiers
from pipeline.charts import (
    WIDEST,
    key,
    logarithmic,
    mark,
    message,
    spread,
)
from pipeline.metric_charts import STUDY, named, studies

FAMILIES = tuple(zip(("#0d6efd", "#8a4b1c", "#e680ff", "#0fbf5c", "#9d00ff", "#801a4c"), "osD^vP", strict=True))
CURVES = {"linear": ("-", "linear"), "power": ("--", "power"), "hill_1": (":", "Hill, k = 1")}
CURVES |= {"hill": ("-.", "Hill, k free")}
# The colour and the marker of each family of a frontier.
Looks = dict[str, tuple[str, str]]


def frontier(points: pl.DataFrame, fits: pl.DataFrame) -> Figure:
    """L0 against nats lost and against KL, and sparsity against the performance hit with its fitted curves.

    `points` as `frontier.points` gives them, `fits` as `frontier.fit`, each with STUDY in front.
    """
    if points.is_empty():
        return message("No frontier was measured.")
    points = points.with_columns(pl.col(pl.Float64).fill_nan(None))
    looks = dict(zip(points["family"].unique(maintain_order=True), cycle(FAMILIES), strict=False))
    fits = _with_ends(fits.filter(pl.col("converged"), pl.col("curve").is_in(list(CURVES))), points)
    parts = studies(points)
    figure = Figure(figsize=(WIDEST, 0.7 + 3.5 * len(parts)), layout="constrained")
    for (title, part), row in zip(parts, figure.subplots(len(parts), 3, squeeze=False), strict=True):
        _losses(row[0], part, "nats_lost", "pareto", looks, title)
        row[0].set_ylabel("loss increase, nats", fontsize=9)
        _losses(row[1], part, "kl", "pareto_kl", looks, title)
        row[1].set_ylabel("mean KL, nats", fontsize=9)
        same = [pl.col(name).eq_missing(part[name][0]) for name in STUDY]
        _hits(row[2], part, fits.filter(same), looks, title)
    families = {name: mark(shade, shape) for name, (shade, shape) in looks.items()}
    styles = (CURVES[name] for name in CURVES if name in fits["curve"])
    lines = {text: Line2D([], [], color="0.3", linestyle=style) for style, text in styles}
    filled = {"Pareto-optimal": mark("0.3"), "not Pareto-optimal": mark("0.3", markerfacecolor="white")}
    key(figure, families | lines | filled)
    return figure


def _with_ends(fits: pl.DataFrame, points: pl.DataFrame) -> pl.DataFrame:
    """Each fit with the `low` and `high` x of its family; those of a single x, which have no curve, are gone."""
    family = [*STUDY, "family"]
    known = points.drop_nulls(["x", "hit"]).group_by(family).agg(low=pl.min("x"), high=pl.max("x"))
    return fits.join(known.filter(pl.col("low") < pl.col("high")), on=family, nulls_equal=True, maintain_order="left")


def _losses(axes: Axes, part: pl.DataFrame, column: str, best: str, looks: Looks, title: str) -> None:
    above = pl.all_horizontal(pl.col("l0", column).cast(pl.Float64) > 0)
    drawn = part.filter(above)
    for family, look in looks.items():
        rows = drawn.filter(pl.col("family") == family).sort("l0")
        _markers(axes, rows, "l0", column, best, look)
        joined = rows.filter(best)
        axes.plot(joined["l0"], joined[column], color=look[0], linewidth=1.2, zorder=1)
    logarithmic(axes, x=True)
    axes.set_xlabel("L0, latents per token", fontsize=9)
    _left_out(axes, part, drawn, title, "not above 0")


def _hits(axes: Axes, part: pl.DataFrame, fits: pl.DataFrame, looks: Looks, title: str) -> None:
    drawn = part.drop_nulls(["x", "hit"])
    for family, look in looks.items():
        _markers(axes, drawn.filter(pl.col("family") == family), "x", "hit", "pareto", look)
        for fit in fits.filter(pl.col("family") == family).iter_rows(named=True):
            at = np.geomspace(fit["low"], fit["high"], 200)
            hit = frontiers.curve(fit, at)
            axes.plot(at, hit, linestyle=CURVES[fit["curve"]][0], color=look[0], linewidth=1.2, zorder=1)
    axes.set_xlabel("d / L0" if part["relative"][0] else "1 / L0", fontsize=9)
    axes.set_ylabel(f"performance hit against {part['baseline'][0]}", fontsize=9)
    _left_out(axes, part, drawn, title, "not known")


def _markers(axes: Axes, rows: pl.DataFrame, x: str, y: str, best: str, look: tuple[str, str]) -> None:
    """Filled for the Pareto-optimal, hollow for others, with the intervals that there are."""
    for chosen, face in ((rows.filter(best), look[0]), (rows.filter(~pl.col(best)), "white")):
        wide = spread(chosen, x) if f"{x}_low" in rows.columns else None
        points = {"fmt": look[1], "markersize": 5, "linewidth": 1, "color": look[0], "markerfacecolor": face}
        at = (chosen[name].cast(pl.Float64).to_numpy() for name in (x, y))
        axes.errorbar(*at, xerr=wide, yerr=spread(chosen, y), **points)


def _left_out(axes: Axes, part: pl.DataFrame, drawn: pl.DataFrame, title: str, why: str) -> None:
    """The panel's title, and how many points are not in it."""
    number = len(part) - len(drawn)
    named(axes, title, f"{number} of {len(part)} left out: {why}" if number else "")
