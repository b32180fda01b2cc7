"""Stage `figures`: one registered function per figure, named like its caption in workflow/report/.

A figure takes what it needs, by name: `summary` the table of effects, `effects` the per-token tables, lazily. It
returns the picture and the data that is plotted; both are stored. Needs no torch.
"""

import hashlib
from collections.abc import Callable, Iterable
from inspect import signature

import matplotlib
import pandas as pd
import polars as pl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline import store
from pipeline.registry import Registry
from pipeline.stage import Call, run

FIGURES = Registry("figure")

# One colour per intervention in every figure; the SAE's own in reds, random directions in blues, norms in greens.
COLOURS = {
    "sae": "#c1272d",
    "sae_norm_corrected": "#e8833a",
    "eps_random": "#2457a6",
    "theta_random": "#4f9bd9",
    "theta_random_sae_norm": "#8cc6ec",
    "sae_norm": "#3f9b57",
    "mean": "#8d8d8d",
    "zero": "#3b3b3b",
}
OTHER_COLOURS = sns.color_palette("husl", 8).as_hex()
PAIR = ("sae", "eps_random")
KL_CLIP, KL_BINS = 1.0, 50
LOSS_CLIP, LOSS_BINS = 2.0, 80
POSITION_BIN = 4
PANEL_COLUMNS = 4
# A panel shows one table of effects: its name (see `_place`), and its number in the order of layers and configuration.
PANEL = ("panel", "place", "layer", "sae")


@FIGURES.register
def kl_by_layer(summary: pl.DataFrame) -> tuple[Figure, pl.DataFrame]:
    return _by_layer(summary, "kl_mean", "mean KL(clean ‖ patched), nats", log=True)


@FIGURES.register
def loss_by_layer(summary: pl.DataFrame) -> tuple[Figure, pl.DataFrame]:
    return _by_layer(summary, "delta_ce_mean", "mean loss increase, nats", log=False)


@FIGURES.register
def kl_histograms(summary: pl.DataFrame, effects: pl.LazyFrame) -> tuple[Figure, pl.DataFrame]:
    data = _histogram(effects, pl.col("kl"), 0.0, KL_CLIP, KL_BINS)
    marks = _numbers(summary, "kl_p999")

    def draw(axes: Axes, part: pd.DataFrame, place: str) -> None:
        _steps(axes, part)
        for line, name in enumerate(PAIR):
            if (place, name) in marks:
                _note(axes, 0.95, 0.92 - 0.1 * line, f"p99.9: {marks[place, name]:.2f}", name)

    return _panels(data, draw, f"KL, nats (clipped at {KL_CLIP:g})", "share of tokens"), data


@FIGURES.register
def loss_histograms(summary: pl.DataFrame, effects: pl.LazyFrame) -> tuple[Figure, pl.DataFrame]:
    data = _histogram(effects, pl.col("ce") - pl.col("ce_clean"), -LOSS_CLIP, LOSS_CLIP, LOSS_BINS)
    marks = _numbers(summary, "delta_ce_mean")

    def draw(axes: Axes, part: pd.DataFrame, place: str) -> None:
        _steps(axes, part)
        for line, name in enumerate(PAIR):
            if (place, name) in marks:
                axes.axvline(marks[place, name], color=COLOURS[name], linestyle=":", linewidth=1.2)
                _note(axes, 0.97, 0.92 - 0.1 * line, f"mean: {marks[place, name]:+.3f}", name)

    return _panels(data, draw, f"loss increase, nats (clipped at ±{LOSS_CLIP:g})", "share of tokens"), data


@FIGURES.register
def kl_by_position(effects: pl.LazyFrame) -> tuple[Figure, pl.DataFrame]:
    first = (pl.col("position") // POSITION_BIN * POSITION_BIN).alias("position")
    per_sequence = effects.group_by(*PANEL, "intervention", first, "sequence").agg(pl.col("kl").mean())
    error = (pl.col("kl").std() / pl.len().sqrt()).alias("standard_error")
    data = per_sequence.group_by(*PANEL, "intervention", "position").agg(pl.col("kl").mean().alias("kl_mean"), error)
    data = data.sort("panel", "intervention", "position").collect()

    def draw(axes: Axes, part: pd.DataFrame, place: str) -> None:
        for name, line in part.groupby("intervention", observed=True):
            axes.plot(line["position"], line["kl_mean"], color=COLOURS[name])
            low, high = (line["kl_mean"] + side * 1.96 * line["standard_error"] for side in (-1, 1))
            axes.fill_between(line["position"], low.clip(lower=1e-9), high, color=COLOURS[name], alpha=0.2, linewidth=0)
        axes.set_yscale("log")

    return _panels(data, draw, f"position (means over {POSITION_BIN})", "mean KL, nats"), data


def _by_layer(summary: pl.DataFrame, column: str, label: str, log: bool) -> tuple[Figure, pl.DataFrame]:
    """A dot with its interval per SAE and intervention, SAEs in the order of layers, a panel per kind of hook."""
    wanted = [column, f"{column}_low", f"{column}_high"]
    rows = summary.filter(pl.col("tokens") == "ordinary", pl.col("intervention") != "identity")
    labels = ["model", "corpus", "experiment", "hook", "layer", "sae", "intervention"]
    made = rows.filter(pl.col("sae").is_not_null()).select(labels + wanted)
    free = rows.filter(pl.col("sae").is_null()).select([*labels, *wanted]).drop("sae")
    saes = made.select("model", "corpus", "experiment", "hook", "sae").unique(maintain_order=True)
    free = free.join(saes, on=["model", "corpus", "experiment", "hook"], how="left")
    # A hook without an SAE stands for itself.
    free = free.with_columns(pl.coalesce("sae", "hook")).select(made.columns)
    data = pl.concat([made, free], how="vertical_relaxed")
    data = data.with_columns(site=pl.col("hook").str.replace(r"blocks\.\d+\.", "")).sort(
        "site", "layer", maintain_order=True
    )
    data = data.with_columns(place=_place(data))
    sites = data["site"].unique(maintain_order=True).to_list()
    places = {
        site: data.filter(pl.col("site") == site)["place"].unique(maintain_order=True).to_list() for site in sites
    }
    figure = Figure(figsize=(max(7.0, 2.5 + 0.62 * sum(map(len, places.values()))), 5.2), layout="constrained")
    panels = figure.subplots(
        1, len(sites), sharey=log, squeeze=False, width_ratios=[0.6 + len(places[site]) for site in sites]
    )[0]
    for axes, site in zip(panels, sites, strict=True):
        part = data.filter(pl.col("site") == site)
        _dots(axes, part.to_pandas(), places[site], column)
        axes.set_title(site)
        axes.set_yscale("log") if log else _fit_to_saes(axes, part, column)
    panels[0].set_ylabel(label)
    _legend(figure, data)
    return figure, data


def _known_first(interventions: Iterable[str]) -> list[str]:
    """The interventions that occur: ours in the order of COLOURS, then those of others by name."""
    found = set(interventions)
    return [name for name in COLOURS if name in found] + sorted(found - set(COLOURS))


def _colour(intervention: str) -> str:
    """The colour of an intervention in every figure; one that has none here gets one by its name."""
    number = int.from_bytes(hashlib.sha256(intervention.encode()).digest()[:4], "big")
    return COLOURS.get(intervention, OTHER_COLOURS[number % len(OTHER_COLOURS)])


def _place(data: pl.DataFrame) -> pl.Expr:
    """What stands on the axis: the SAE, with corpus, experiment or model where there are several."""
    names = ["sae", *(name for name in ("model", "corpus", "experiment") if data[name].n_unique() > 1)]
    return pl.concat_str(pl.format("L{}", "layer"), *names, separator=" · ")


def _dots(axes: Axes, part: pd.DataFrame, places: list[str], column: str) -> None:
    names = _known_first(part["intervention"])
    for i, name in enumerate(names):
        points = part[part["intervention"] == name]
        at = [places.index(place) + 0.7 * ((i + 0.5) / len(names) - 0.5) for place in points["place"]]
        # An interval of no width may end a rounding error past its value.
        ends = (points[column] - points[f"{column}_low"], points[f"{column}_high"] - points[column])
        spread = [end.clip(lower=0) for end in ends]
        axes.errorbar(at, points[column], yerr=spread, fmt="o", markersize=4.5, linewidth=1.3, color=_colour(name))
    axes.set_xticks(range(len(places)), places, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.grid(axis="x", visible=False)


def _fit_to_saes(axes: Axes, data: pl.DataFrame, column: str) -> None:
    """Ablations are far above everything else on a linear axis; they are cut off and the axis fits the rest."""
    axes.axhline(0, color="0.5", linewidth=0.8)
    rest = data.filter(~pl.col("intervention").is_in(["zero", "mean"]))
    if rest.is_empty():
        return
    low, high = rest[f"{column}_low"].min(), rest[f"{column}_high"].max()
    margin = 0.06 * (high - low)
    axes.set_ylim(min(low, 0) - margin, high + margin)


def _legend(figure: Figure, data: pl.DataFrame) -> None:
    names = _known_first(data["intervention"])
    handles = [
        matplotlib.lines.Line2D([], [], color=_colour(name), marker="o", linestyle="", label=name) for name in names
    ]
    rows = -(-len(names) // int(figure.get_figwidth() / 1.75))
    columns = -(-len(names) // rows)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=8.5)


def _histogram(effects: pl.LazyFrame, value: pl.Expr, low: float, high: float, bins: int) -> pl.DataFrame:
    """Share of tokens per bin, values beyond the ends counted in the last bins; `left` is the bin's lower edge."""
    width = (high - low) / bins
    place = ((value.clip(low, high) - low) / width).floor().cast(pl.Int32).clip(0, bins - 1).alias("bin")
    counts = effects.filter(value.is_not_null()).group_by(*PANEL, "intervention", place).agg(pl.len().alias("tokens"))
    share = (pl.col("tokens") / pl.col("tokens").sum().over("place", "intervention")).alias("share")
    counts = counts.with_columns(share, (low + width * pl.col("bin")).alias("left"), pl.lit(width).alias("width"))
    return counts.sort("panel", "intervention", "bin").collect()


def _numbers(summary: pl.DataFrame, column: str) -> dict[tuple[str, str], float]:
    """(place, intervention) -> a number of the summary, over ordinary tokens."""
    rows = summary.filter(pl.col("tokens") == "ordinary", pl.col("sae").is_not_null())
    rows = rows.with_columns(place=_place(rows))
    return {(place, name): value for place, name, value in rows.select("place", "intervention", column).rows()}


def _steps(axes: Axes, part: pd.DataFrame) -> None:
    for name, bins in part.groupby("intervention", observed=True):
        axes.bar(
            bins["left"], bins["share"], width=bins["width"], align="edge", color=COLOURS[name], alpha=0.45, linewidth=0
        )
    axes.set_yscale("log")


def _note(axes: Axes, x: float, y: float, text: str, intervention: str) -> None:
    axes.text(x, y, text, transform=axes.transAxes, ha="right", va="top", fontsize=8, color=COLOURS[intervention])


def _panels(data: pl.DataFrame, draw: Callable[[Axes, pd.DataFrame, str], None], x: str, y: str) -> Figure:
    """A panel per table of effects, in the order of layers, with the same axes."""
    places = data["place"].unique(maintain_order=True).to_list()
    if not places:
        figure = Figure(figsize=(7, 1.2))
        figure.text(0.5, 0.5, f"No experiment ran {' or '.join(PAIR)}.", ha="center", va="center")
        return figure
    columns = min(PANEL_COLUMNS, len(places))
    rows = -(-len(places) // columns)
    figure = Figure(figsize=(0.6 + 2.9 * columns, 0.9 + 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, place in zip(panels, places, strict=False):
        draw(axes, data.filter(pl.col("place") == place).to_pandas(), place)
        axes.set_title(place, fontsize=9)
    for axes in panels[len(places) :]:
        axes.remove()
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    _legend(figure, data)
    return figure


def _read_summary(call: Call) -> pl.DataFrame:
    return pl.read_parquet(call.input("summary"))


def _read_effects(call: Call) -> pl.LazyFrame:
    """The per-token values of `sae` and `eps_random` for all tables of effects, ordinary tokens only, lazily."""
    rows = pl.DataFrame([store.table_attributes(path) for path in call.inputs["effects"]])
    rows = rows.with_columns(
        layer=pl.col("hook").str.extract(r"blocks\.(\d+)\.").cast(pl.Int64),
        path=pl.Series([str(path) for path in call.inputs["effects"]]),
    )
    rows = rows.with_columns(place=_place(rows)).sort("layer", maintain_order=True)
    order = {place: number for number, place in enumerate(rows["place"].unique(maintain_order=True))}
    parts = []
    for path, *labels in rows.select("path", "place", "layer", "sae").rows():
        columns = dict(zip(PANEL, (order[labels[0]], *labels), strict=True))
        literals = [pl.lit(value).alias(name) for name, value in columns.items()]
        parts.append(pl.scan_parquet(path).with_columns(*literals, pl.col("intervention").cast(pl.String)))
    return pl.concat(parts).filter(pl.col("intervention").is_in(list(PAIR)), ~pl.col("special"))


SOURCES = {"summary": _read_summary, "effects": _read_effects}


def work(call: Call) -> None:
    sns.set_theme(style="whitegrid", context="notebook", font_scale=0.85)
    # The same data gives the same SVG, byte for byte.
    matplotlib.rcParams["svg.hashsalt"] = "faithful"
    draw = FIGURES[call.key["figure"]]
    figure, data = draw(**{name: SOURCES[name](call) for name in signature(draw).parameters})
    table, svg, png = call.outputs
    for path, options in ((svg, {"metadata": {"Date": None}}), (png, {"dpi": 160})):
        with store.written(path) as part:
            figure.savefig(part, format=path.suffix.removeprefix("."), **options)
    store.write_table(table, [data.to_arrow()], call.fingerprint, {})


def main() -> None:
    run("figures", work)


if __name__ == "__main__":
    main()
