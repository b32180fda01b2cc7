"""Stage `report`: one self-contained HTML page for readers, and the headline as a line of text."""

import base64
import json
from pathlib import Path

import jinja2
import polars as pl

from pipeline import store
from pipeline.hooks import parse_hook
from pipeline.stage import Call, log, run

FOLDER = Path(__file__).parent.parent / "workflow" / "report"
COLUMNS = {
    "sae": "SAE",
    "hook": "hook",
    "intervention": "intervention",
    "kl_mean": "KL mean",
    "kl_median": "median",
    "kl_p99": "p99",
    "kl_p999": "p99.9",
    "kl_ratio": "KL ratio",
    "delta_ce_mean": "loss increase",
    "top1_agreement": "top-1 agreement",
}
SAE_COLUMNS = {
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


def headline(effects: pl.DataFrame, confidence: str = "95 %") -> str:
    """The result in two sentences, from the KL ratios of `sae` to `eps_random` over ordinary tokens."""
    rows = effects.filter(pl.col("intervention") == "sae", pl.col("tokens") == "ordinary")
    rows = rows.filter(pl.col("kl_ratio").is_not_null()).sort("kl_ratio")
    if rows.is_empty():
        return "No experiment ran both 'sae' and 'eps_random', so there is no KL ratio to report."
    counts = {
        "more than": rows.filter(pl.col("kl_ratio_low") > 1).height,
        "less than": rows.filter(pl.col("kl_ratio_high") < 1).height,
        "about as much as": rows.filter(pl.col("kl_ratio_low") <= 1, pl.col("kl_ratio_high") >= 1).height,
    }
    unknown = rows.height - sum(counts.values())
    (first, number), *others = sorted(counts.items(), key=lambda item: -item[1])
    noun = "SAE" if rows["sae"].n_unique() == rows.height else "evaluation"
    rest = [f"{words.removesuffix(' than').removesuffix(' as')} for {n}" for words, n in others if n]
    rest += [f"without an interval for {unknown}"] if unknown else []
    text = (
        f"Substituting the SAE's reconstruction changes the next-token distribution {first} a random vector at the "
        f"same distance for {number} of {rows.height} {noun}{'s' if rows.height > 1 else ''}"
        f"{''.join(', ' + words for words in rest)} ({confidence} intervals)."
    )
    least, most = rows.row(0, named=True), rows.row(-1, named=True)
    if rows.height == 1:
        return f"{text} The KL ratio is {_interval(most, 'kl_ratio')} ({most['sae']})."
    return (
        f"{text} The KL ratio goes from {_interval(least, 'kl_ratio')} ({least['sae']}) to "
        f"{_interval(most, 'kl_ratio')} ({most['sae']}), with a median of {_number(rows['kl_ratio'].median())}."
    )


def _interval(row: dict, column: str) -> str:
    return f"{_number(row[column])} [{_number(row[column + '_low'])}, {_number(row[column + '_high'])}]"


def _number(value: float | str | None) -> str:
    """Three significant digits; a dash for what is not defined."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def cell(row: dict, column: str) -> str:
    """A table cell: the value, with its interval where there is one."""
    return _interval(row, column) if row.get(f"{column}_low") is not None else _number(row[column])


def noise_floor(effects: pl.DataFrame) -> dict:
    """The largest KL statistics that the control `identity` shows over all tokens of the run."""
    rows = effects.filter(pl.col("intervention") == "identity", pl.col("tokens") == "all")
    return {
        "jobs": rows.height,
        "kl": rows["kl_mean"].max(),
        "tail": rows["kl_p999"].max(),
        "top1": rows["top1_agreement"].min(),
    }


def checked(tables: list[pl.DataFrame]) -> dict:
    """The evaluation in float64 beside the stored numbers: how much was checked, and the largest errors."""
    rows = pl.concat(tables)
    sizeable = rows.filter(pl.col("kl_worst_relative").is_not_null(), pl.col("kl_mean_float64") > 0)
    return {
        "places": rows.height,
        "tokens": rows["n_tokens"].max(),
        "mean": (sizeable["kl_mean"] / sizeable["kl_mean_float64"] - 1).abs().max(),
        "token": rows["kl_worst_relative"].max(),
        "absolute": rows["kl_worst"].max(),
        "ce": rows["ce_worst"].max(),
        "top1": rows["top1_agreement"].min(),
    }


def work(call: Call) -> None:
    path = call.input("summary")
    summary, saes = pl.read_parquet(path), pl.read_parquet(path.with_name("saes.parquet"))
    page, line = call.outputs
    confidence = f"{100 * call.settings['bootstrap']['confidence']:g} %"
    text = headline(summary, confidence)
    rows = summary.filter(pl.col("tokens") == "ordinary", pl.col("intervention") != "identity")
    several = {name: name for name in ("model", "corpus", "experiment") if rows[name].n_unique() > 1}
    content = {
        "headline": text,
        "figures": [_figure(path) for path in call.inputs["figures"]],
        "columns": several | COLUMNS,
        "rows": [_shown(row) for row in rows.sort("layer", "hook", maintain_order=True).rows(named=True)],
        "sae_columns": {name: name for name in several if name != "experiment"} | SAE_COLUMNS,
        "saes": [_shown(row) for row in sorted(saes.rows(named=True), key=lambda row: row["layer"])],
        "noise": noise_floor(summary),
        "checks": checked([pl.read_parquet(path) for path in call.inputs["checks"]]),
        "tokens": rows["n_tokens"].max(),
        "confidence": confidence,
        "samples": call.settings["bootstrap"]["samples"],
        "config": json.dumps(call.settings, indent=2),
        "fingerprint": call.fingerprint,
        "versions": store.table_attributes(path)["packages"],
    }
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["cell"] = cell
    html = environment.from_string((FOLDER / "report.html.jinja").read_text(encoding="utf-8")).render(content)
    store.write_text(line, text + "\n")
    store.write_text(
        page, html.replace("<!doctype html>", f"<!doctype html>\n<!-- fingerprint {call.fingerprint} -->", 1)
    )
    log.info("%s", text)


def _shown(row: dict) -> dict:
    """A row with its hook in short, as `3.resid_pre`."""
    return row | {"hook": parse_hook(row["hook"]).short}


def _figure(table: Path) -> dict[str, str]:
    """A figure's title, caption and SVG; the files stand beside its data."""
    name = table.stem
    svg = base64.b64encode(table.with_suffix(".svg").read_bytes()).decode()
    return {
        "name": name,
        "title": name.replace("_", " ").replace("kl", "KL").replace("loss", "Loss"),
        "caption": (FOLDER / f"{name}.rst").read_text(encoding="utf-8"),
        "svg": svg,
    }


def main() -> None:
    run("report", work)


if __name__ == "__main__":
    main()
