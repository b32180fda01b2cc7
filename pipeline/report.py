"""Stage `report`: one self-contained HTML page for readers, and the headline as a line of text."""

import base64
import json
from pathlib import Path

import jinja2
import polars as pl

from pipeline import seals, selection, store
from pipeline.examples import examples
from pipeline.report_tables import ANALYSES, EFFECTS, SAES, analysis, paper, several, shown
from pipeline.stage import Call, log, run
from pipeline.wording import cell, headline, verdicts

FOLDER = Path(__file__).parent.parent / "workflow" / "report"
# The page's sections by their anchors: title, figures, tables of analyses. The last takes figures of one's own.
SECTIONS = {
    "every-token": (
        "Every token replaced",
        ("kl_by_layer", "loss_by_layer", "plane", "kl_histograms", "loss_histograms", "kl_by_position"),
        (),
    ),
    "kind-of-error": (
        "What kind of error it is",
        ("ladder", "dose_response", "cosine_grid", "dark_matter_shares", "curvature_excess"),
        ("rungs", "exponents", "dark_matter", "curvature"),
    ),
    "single-positions": (
        "Single positions replaced",
        ("single_token", "single_token_horizon", "draws_by_token"),
        ("draws_found",),
    ),
    "metrics": (
        "Metrics and their baselines",
        ("metric_verdicts", "effective_compute"),
        ("paper", "metric_flips", "calibrated"),
    ),
    "frontiers": ("Frontiers of families", ("frontier",), ("frontier_fits", "frontier_factors")),
    "ablation-atlas": ("Ablation atlas", ("atlas_by_layer", "atlas_heads"), ("atlas",)),
    "several-saes": ("Several SAEs at once", ("sets_of_saes",), ("compounding",)),
    "single-tokens": ("Single tokens", ("top_25", "rank_correlations"), ()),
    "training": ("Training", ("training_series",), ()),
    "further-figures": ("Further figures", (), ()),
}
# So many SAEs have their verdicts as sentences and all of their ladder in the open.
FEW = 4


def noise_floor(effects: pl.DataFrame) -> dict:
    """The largest KL statistics that the control `identity` shows over all tokens of the run."""
    rows = effects.filter(pl.col("intervention") == "identity", pl.col("tokens") == "all")
    return {
        "jobs": rows.height,
        "kl": rows["kl_mean"].max(),
        "tail": rows["kl_p999"].max(),
        "top1": rows["top1_agreement"].min(),
    }


def checked(tables: list[pl.DataFrame]) -> dict | None:
    """The evaluation in float64 beside the stored numbers: how much was checked, and the largest errors."""
    if not tables:
        return None
    rows = pl.concat(tables, how="vertical_relaxed")  # ablations alone have no SAE: a column of nulls
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


def sections(
    figures: list[Path], tables: dict[str, dict], found: list[dict], rungs: pl.DataFrame | None = None
) -> list[dict]:
    """What the page shows under each heading; headings with nothing below are left out. `tables` as they are shown, by
    name; `found`: the examples."""
    named = [name for _, names, _ in SECTIONS.values() for name in names]
    made = []
    for anchor, (title, names, analyses) in SECTIONS.items():
        own = [path for path in figures if path.stem not in named] if anchor == "further-figures" else []
        ordered = [path for name in names for path in figures if path.stem == name]
        section = {
            "id": anchor,
            "title": title,
            "verdicts": verdicts(rungs) if rungs is not None and "rungs" in analyses else None,
            "figures": [_figure(path) for path in [*ordered, *own]],
            "tables": [tables[name] for name in analyses if name in tables],
            "examples": found if anchor == "single-tokens" else [],
        }
        if section["figures"] or section["tables"] or section["examples"]:
            made.append(section)
    return made


def _figure(table: Path) -> dict[str, str]:
    """A figure's title, caption and SVG; the files stand beside its data. A caption's first paragraph is the title."""
    title, caption = (FOLDER / f"{table.stem}.rst").read_text(encoding="utf-8").split("\n\n", 1)
    svg = base64.b64encode(table.with_suffix(".svg").read_bytes()).decode()
    return {"name": table.stem, "title": title.strip().strip("*"), "caption": caption, "svg": svg}


def content(call: Call, text: str, confidence: str) -> dict:
    """What the template shows."""
    path = call.input("summary")
    summary, saes = pl.read_parquet(path), pl.read_parquet(seals.verified(path.with_name("saes.parquet")))
    tables = {path.stem: pl.read_parquet(path) for path in call.inputs.get("analyses", []) if path.stem in ANALYSES}
    shown_tables = {name: analysis(name, table) for name, table in tables.items()}
    for table in call.inputs.get("paper", []):
        shown_tables["paper"] = paper(pl.read_parquet(table), call.settings["metrics"]["columns"])
    rows = selection.general(summary).filter(pl.col("tokens") == "ordinary", pl.col("intervention") != "identity")
    found = examples(*(call.inputs.get(name, []) for name in ("extremes", "top_tokens")))
    return {
        "headline": text,
        "sections": sections(call.inputs["figures"], shown_tables, found, tables.get("rungs")),
        "few": FEW,
        "examples": found,
        "columns": several(rows) | EFFECTS,
        "rows": shown(rows.sort("layer", "hook", maintain_order=True)),
        "sae_columns": {name: text for name, text in several(rows).items() if name != "experiment"} | SAES,
        "saes": shown(saes.sort("layer", maintain_order=True)) if len(saes) else [],
        "noise": noise_floor(summary),
        "checks": checked([pl.read_parquet(path) for path in call.inputs.get("checks", [])]),
        "tokens": rows["n_tokens"].max(),
        "confidence": confidence,
        "samples": call.settings["bootstrap"]["samples"],
        "config": json.dumps({name: value for name, value in call.settings.items() if name != "page"}, indent=2),
        "fingerprint": call.fingerprint,
        "versions": store.table_attributes(path)["packages"],
    }


def work(call: Call) -> None:
    summary = selection.general(pl.read_parquet(call.input("summary")))
    rungs = [pl.read_parquet(path) for path in call.inputs.get("analyses", []) if path.stem == "rungs"]
    confidence = f"{100 * call.settings['bootstrap']['confidence']:g} %"
    text = headline(summary, confidence, *rungs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["cell"] = cell
    html = environment.get_template("report.html.jinja").render(content(call, text, confidence))
    page, line = call.outputs
    store.write_text(line, text + "\n")
    store.write_text(
        page, html.replace("<!doctype html>", f"<!doctype html>\n<!-- fingerprint {call.fingerprint} -->", 1)
    )
    log.info("%s", text)


def main() -> None:
    run("report", work)


if __name__ == "__main__":
    main()
