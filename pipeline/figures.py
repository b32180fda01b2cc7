"""Stage `figures`: one registered function per figure, named like its caption in workflow/report/.

A figure takes what it needs, by name: `summary` the table of effects, `effects` the per-token tables, lazily. It
returns the picture and the data that is plotted; both are stored. Needs no torch.
"""

from collections.abc import Callable
from inspect import signature

import matplotlib
import polars as pl
import seaborn as sns
from matplotlib.figure import Figure

from pipeline import (
    effect_charts,
    error_charts,
    frontier_charts,
    metric_charts,
    seals,
    selection,
    store,
    study_charts,
    token_figures,
)
from pipeline.charts import PAIR, PANEL, place_of, placed
from pipeline.hooks import parse_hook
from pipeline.registry import Registry
from pipeline.stage import Call, run

FIGURES = Registry("figure")
POINTS = {"series": pl.String, "axis": pl.String, "at": pl.Float64, "sae": pl.String}


@FIGURES.register
def kl_by_layer(summary: pl.DataFrame) -> tuple[Figure, pl.DataFrame]:
    return effect_charts.by_layer(summary, "kl_mean", "mean KL(clean ‖ patched), nats", log=True)


@FIGURES.register
def loss_by_layer(summary: pl.DataFrame) -> tuple[Figure, pl.DataFrame]:
    return effect_charts.by_layer(summary, "delta_ce_mean", "mean loss increase, nats", log=False)


@FIGURES.register
def plane(summary: pl.DataFrame, saes: pl.DataFrame) -> tuple[Figure, pl.DataFrame]:
    kl = _of_saes(summary.filter(pl.col("intervention") == "sae", pl.col("kl_ratio").is_not_null()))
    size = saes.select("model", "corpus", "sae", relative_error=pl.col("eps_mean") / pl.col("norm_mean"))
    data = kl.join(size, on=["model", "corpus", "sae"])
    return study_charts.plane(data), data


@FIGURES.register
def kl_histograms(summary: pl.DataFrame, effects: pl.LazyFrame) -> tuple[Figure, pl.DataFrame]:
    return effect_charts.kl_histograms(summary, effects)


@FIGURES.register
def loss_histograms(summary: pl.DataFrame, effects: pl.LazyFrame) -> tuple[Figure, pl.DataFrame]:
    return effect_charts.loss_histograms(summary, effects)


@FIGURES.register
def kl_by_position(effects: pl.LazyFrame) -> tuple[Figure, pl.DataFrame]:
    return effect_charts.kl_by_position(effects)


@FIGURES.register
def ladder(rungs: pl.DataFrame) -> tuple[Figure, pl.DataFrame]:
    return error_charts.ladder(rungs), rungs


@FIGURES.register
def dose_response(doses: pl.DataFrame) -> tuple[Figure, pl.DataFrame]:
    return error_charts.doses(doses), doses


@FIGURES.register
def cosine_grid(cosines: pl.DataFrame, summary: pl.DataFrame, saes: pl.DataFrame) -> tuple[Figure, pl.DataFrame]:
    return error_charts.cosines(cosines, summary, saes), cosines


@FIGURES.register
def dark_matter_shares(dark_matter: pl.DataFrame) -> tuple[Figure, pl.DataFrame]:
    return error_charts.dark_matter(dark_matter), dark_matter


@FIGURES.register
def curvature_excess(curvature: pl.DataFrame) -> tuple[Figure, pl.DataFrame]:
    return error_charts.curvature(curvature), curvature


@FIGURES.register
def single_token(single_positions: pl.DataFrame) -> tuple[Figure, pl.DataFrame]:
    return study_charts.single_pair(single_positions), single_positions


@FIGURES.register
def single_token_horizon(single_positions: pl.DataFrame) -> tuple[Figure, pl.DataFrame]:
    return study_charts.single_horizon(single_positions), single_positions


@FIGURES.register
def draws_by_token(draws: pl.DataFrame) -> tuple[Figure, pl.DataFrame]:
    return study_charts.draws(draws), draws


@FIGURES.register
def sets_of_saes(compounding: pl.DataFrame) -> tuple[Figure, pl.DataFrame]:
    return study_charts.compounding(compounding), compounding


@FIGURES.register
def top_25(extremes: pl.DataFrame, top_tokens: pl.DataFrame) -> tuple[Figure, pl.DataFrame]:
    one = [pl.col(name) == extremes[name][0] for name in ("experiment", "sae", "model", "corpus")]
    data = token_figures.worst_tokens(extremes.filter(one), top_tokens.filter(one))
    return token_figures.top_tokens_figure(data, extremes["sae"][0]), data


@FIGURES.register
def rank_correlations(correlations: pl.DataFrame) -> tuple[Figure, pl.DataFrame]:
    data = placed(correlations)
    return token_figures.correlations_figure(data), data


@FIGURES.register
def atlas_by_layer(atlas: pl.DataFrame) -> tuple[Figure, pl.DataFrame]:
    data = atlas.filter(pl.col("head").is_null())
    return metric_charts.atlas(data), data


@FIGURES.register
def atlas_heads(atlas: pl.DataFrame) -> tuple[Figure, pl.DataFrame]:
    data = atlas.filter(pl.col("head").is_not_null())
    return metric_charts.heads(data), data


@FIGURES.register
def metric_verdicts(metric_ranks: pl.DataFrame, metric_agreements: pl.DataFrame) -> tuple[Figure, pl.DataFrame]:
    return metric_charts.verdicts(metric_ranks, metric_agreements), metric_ranks


@FIGURES.register
def effective_compute(metrics: pl.DataFrame) -> tuple[Figure, pl.DataFrame]:
    data = metrics.filter(pl.col("metric") == "effective_compute", pl.col("intervention").is_in(PAIR))
    return metric_charts.effective_compute(data), data


@FIGURES.register
def frontier(frontier_points: pl.DataFrame, frontier_fits: pl.DataFrame) -> tuple[Figure, pl.DataFrame]:
    # The curves are the same whatever their intervals are made from.
    fits = frontier_fits.filter(pl.col("intervals") == frontier_fits["intervals"].first())
    return frontier_charts.frontier(frontier_points, fits), frontier_points


@FIGURES.register
def training_series(summary: pl.DataFrame, series: list) -> tuple[Figure, pl.DataFrame]:
    points = [
        {"series": each["id"], "axis": each["axis"], "at": float(at), "sae": sae}
        for each in series
        for at, sae in each["points"]
    ]
    rows = _of_saes(summary).filter(pl.col("intervention").is_in(PAIR))
    data = pl.DataFrame(points, schema=POINTS).join(rows, on="sae")
    return study_charts.series(data), data


def _of_saes(summary: pl.DataFrame) -> pl.DataFrame:
    """One row per SAE and intervention over ordinary tokens, of the first experiment that ran it."""
    rows = summary.filter(pl.col("tokens") == "ordinary", pl.col("sae").is_not_null())
    return rows.unique(["model", "corpus", "sae", "intervention"], keep="first", maintain_order=True)


def _read_summary(call: Call) -> pl.DataFrame:
    return selection.general(pl.read_parquet(call.input("summary")))


def _read_saes(call: Call) -> pl.DataFrame:
    return pl.read_parquet(seals.verified(call.input("summary").with_name("saes.parquet")))


def _read_rows(role: str) -> Callable[[Call], pl.DataFrame]:
    """All tables of one stage below each other, with what they are about."""

    def read(call: Call) -> pl.DataFrame:
        parts = []
        for path in call.inputs[role]:
            about = store.table_attributes(path)
            labels = [pl.lit(about.get(name)).alias(name) for name in ("model", "corpus", "experiment", "hook", "sae")]
            parts.append(pl.read_parquet(path).with_columns(*labels, layer=pl.lit(parse_hook(about["hook"]).layer)))
        return pl.concat(parts, how="diagonal_relaxed")

    return read


def _read_effects(call: Call) -> pl.LazyFrame:
    """The per-token values of `sae` and `eps_random` for all tables of effects, ordinary tokens only, lazily."""
    rows = pl.DataFrame([store.table_attributes(path) for path in call.inputs["effects"]])
    rows = rows.with_columns(
        layer=pl.col("hook").str.extract(r"blocks\.(\d+)\.").cast(pl.Int64),
        path=pl.Series([str(path) for path in call.inputs["effects"]]),
    )
    rows = rows.with_columns(place=place_of(rows)).sort("layer", maintain_order=True)
    order = {place: number for number, place in enumerate(rows["place"].unique(maintain_order=True))}
    parts = []
    for path, *labels in rows.select("path", "place", "layer", "sae").rows():
        columns = dict(zip(PANEL, (order[labels[0]], *labels), strict=True))
        literals = [pl.lit(value).alias(name) for name, value in columns.items()]
        parts.append(pl.scan_parquet(path).with_columns(*literals, pl.col("intervention").cast(pl.String)))
    return pl.concat(parts).filter(pl.col("intervention").is_in(list(PAIR)), ~pl.col("special"))


SOURCES: dict[str, Callable[[Call], object]] = {
    "summary": _read_summary,
    "saes": _read_saes,
    "effects": _read_effects,
    "extremes": _read_rows("extremes"),
    "top_tokens": _read_rows("top_tokens"),
    "series": lambda call: call.settings["series"],
}


def _source(name: str, call: Call) -> object:
    """What a figure takes by that name: one of SOURCES, or the table of an analysis."""
    return SOURCES[name](call) if name in SOURCES else pl.read_parquet(call.input(name))


def work(call: Call) -> None:
    sns.set_theme(style="whitegrid", context="notebook", font_scale=0.85)
    # The same data gives the same SVG, byte for byte.
    matplotlib.rcParams["svg.hashsalt"] = "faithful"
    draw = FIGURES[call.key["figure"]]
    figure, data = draw(**{name: _source(name, call) for name in signature(draw).parameters})
    table, svg, png = call.outputs
    for path, options in ((svg, {"metadata": {"Date": None}}), (png, {"dpi": 160})):
        with store.written(path) as part:
            figure.savefig(part, format=path.suffix.removeprefix("."), **options)
    store.write_table(table, [data.to_arrow()], call.fingerprint, {})


def main() -> None:
    run("figures", work)


if __name__ == "__main__":
    main()
