"""The tables of the report: which columns of the results they show, and what those are called. Needs no torch."""

import polars as pl

from pipeline.hooks import parse_hook
from pipeline.paper_table import heading

LABELS = ("model", "corpus", "experiment")
EFFECTS = {
    "sae": "SAE",
    "hook": "hook",
    "intervention": "intervention",
    "kl_mean": "mean KL, nats",
    "kl_median": "median",
    "kl_p99": "p99",
    "kl_p999": "p99.9",
    "kl_ratio": "KL ratio",
    "delta_ce_mean": "loss increase, nats",
    "top1_agreement": "top-1 agreement",
}
SAES = {
    "sae": "SAE",
    "architecture": "architecture",
    "hook": "hook",
    "l0_mean": "L0",
    "explained_variance": "explained variance",
    "cos_mean": "cosine",
    "norm_ratio": "norm ratio",
    "dead_features": "never fired",
    "dense_features": "dense",
}
# By their file: title and columns. What is not here is in figures, and too long for a page.
ANALYSES = {
    "rungs": (
        "The ladder",
        {
            "intervention": "error of the same length",
            "n_tokens": "tokens",
            "kl_mean": "mean KL, nats",
            "log_step": "log step from the rung before",
            "log_from_random": "log of KL / KL of eps_random",
            "sae_ratio": "KL of the SAE / this KL",
            "share": "share of the gap to the SAE",
        },
    ),
    "exponents": (
        "Dose response: exponents and plateaus",
        {
            "family": "direction",
            "n_alphas": "lengths",
            "exponent_small": "exponent at small lengths",
            "exponent_at_one": "exponent at the error's length",
            "plateau": "end of the plateau, error lengths",
        },
    ),
    "dark_matter": (
        "Dark matter: parts of the error",
        {
            "part": "part",
            "n_tokens": "tokens",
            "power_share": "share of the power",
            "kl_share": "share of the KL",
            "kl_share_alone": "share of the KL, taken away alone",
            "delta_ce_share": "share of the loss increase",
        },
    ),
    "curvature": (
        "Local curvature",
        {
            "intervention": "intervention",
            "n_tokens": "tokens",
            "kl_mean": "mean KL, nats",
            "kl_second_order_mean": "mean KL to second order, nats",
            "beyond_second_order": "KL / KL to second order",
            "excess": "log of KL / KL of eps_random",
            "excess_curvature": "of it by curvature",
            "excess_beyond": "of it beyond",
            "spearman": "rank correlation of both KLs",
        },
    ),
    "draws_found": (
        "Draws: tokens at which the SAE is worse than chance",
        {
            "intervention": "draws of",
            "n_tokens": "tokens",
            "n_draws": "draws per token",
            "level": "false discovery rate",
            "share": "share of tokens worse than chance",
            "percentile_median": "median percentile of the SAE",
            "ratio_median": "median of KL / mean KL of the draws",
        },
    ),
    "compounding": (
        "Sets of SAEs",
        {
            "set": "set",
            "size": "SAEs",
            "intervention": "intervention",
            "n_tokens": "tokens",
            "kl_mean": "mean KL, nats",
            "single_sum": "sum of single mean KLs, nats",
            "super_additivity": "KL / sum of single KLs",
            "delta_ce_mean": "loss increase, nats",
            "kl_ratio": "KL ratio to eps_random",
        },
    ),
    "metric_flips": (
        "Pairs of SAEs that two metrics order the other way round",
        {
            "place": "place",
            "metric_a": "metric",
            "prefers_a": "prefers",
            "metric_b": "other metric",
            "prefers_b": "prefers instead",
            "gap_a": "gap by the metric, share of its range",
            "gap_b": "gap by the other",
            "clear": "intervals apart by both",
        },
    ),
    "calibrated": (
        "Calibrations of effective compute",
        {
            "name": "calibration",
            "kind": "kind",
            "corpus": "corpus",
            "n_points": "points",
            "misfit": "misfit of the log loss",
            "lowest_loss": "from a loss of, nats",
            "highest_loss": "to, nats",
            "floor": "floor, nats",
            "exponent": "exponent",
            "source": "source",
        },
    ),
    "frontier_fits": (
        "Curves of performance hit by 1 / L0",
        {
            "family": "family",
            "curve": "curve",
            "points": "points",
            "n": "number",
            "intervals": "intervals from",
            "m": "m",
            "c": "c",
            "a": "a",
            "k": "k",
            "x_half": "x_half",
            "aicc": "AICc",
            "errors": "errors of",
            "loo_hit": "leave-one-out error of the hit",
            "warning": "warning",
        },
    ),
    "frontier_factors": (
        "Factors between families",
        {
            "first": "family",
            "second": "against",
            "curve": "curve or loss",
            "quantity": "quantity",
            "l0": "L0",
            "intervals": "intervals from",
            "value": "value",
            "warning": "warning",
        },
    ),
    "atlas": (
        "What 90 % recovered leaves",
        {
            "component": "component",
            "layer": "layer",
            "head": "head",
            "intervention": "ablation",
            "n_tokens": "tokens",
            "delta_ce_mean": "loss increase, nats",
            "kl_mean": "mean KL, nats",
            "nats_at_90": "nats lost at 90 % recovered",
        },
    ),
}
# Of a table that can be long, so many rows stand on the page.
MOST = {"metric_flips": 30}


def paper(table: pl.DataFrame, columns: list[str]) -> dict:
    """The summary table as the page shows it."""
    labels = {"sae": "SAE", "hook": "hook"} | several(table)
    shown_columns = labels | {column: heading(column) for column in columns}
    return {"name": "paper", "title": "Summary", "columns": shown_columns, "rows": shown(table), "file": "paper/saes"}


def analysis(name: str, table: pl.DataFrame) -> dict:
    """A table of results as the page shows it, its columns by title; those that hold nothing are left out."""
    title, columns = ANALYSES[name]
    about = {"sae": "SAE", "hook": "hook"} if "sae" in table.columns else {}
    columns = about | several(table) | columns
    columns = {column: text for column, text in columns.items() if table[column].null_count() < max(len(table), 1)}
    if len(table) > MOST.get(name, len(table)):
        title = f"{title}, the worst {MOST[name]} of {len(table):,}"
    rows = shown(table.head(MOST.get(name, len(table))))
    return {"name": name, "title": title, "columns": columns, "rows": rows, "file": f"summary/{name}"}


def several(table: pl.DataFrame) -> dict[str, str]:
    """Columns for those of LABELS that differ within a table."""
    return {name: name for name in LABELS if name in table.columns and table[name].n_unique() > 1}


def shown(table: pl.DataFrame) -> list[dict]:
    """The rows, with their hooks in short, as `3.resid_pre`, and parts in words."""
    rows = table.rows(named=True)
    for row in rows:
        if row.get("hook"):
            row["hook"] = parse_hook(row["hook"]).short
        if "part" in row:
            row["part"] = row["part"].replace("_", " ")
    return rows
