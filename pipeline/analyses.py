"""Stage `analyses`: tables of rows per token -> one table of results each, with intervals; no model, no torch.

An analysis is a registered function. It takes what it needs, by name: the tables of a stage (`effects`, `compounds`,
`errors`, ...), each with the labels of what it is about, and `boot`, which makes a Bootstrap over some sequences.
"""

from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path

import numpy as np
import polars as pl

from pipeline import correlates, metric_tables, store
from pipeline.atlas import atlas_rows
from pipeline.compounding import super_additivity
from pipeline.compute import Calibration, calibration, calibration_rows
from pipeline.curvature import curvature_rows
from pipeline.dark_matter import dark_matter_rows
from pipeline.dose import cosine_rows, dose_rows, dose_summary
from pipeline.draws import draw_rows, draw_summary
from pipeline.grouping import Tables, attributes, grouped
from pipeline.ladder import ladder_rows
from pipeline.metric_tables import Families, Texts, component
from pipeline.registry import Registry
from pipeline.single import single_rows
from pipeline.stage import Call, log, run
from pipeline.statistics import Bootstrap

ANALYSES = Registry("analysis")
IN_NATS = ("kl", "kl_mean", "kl_sae", "kl_median", "delta_ce_mean", "kl_second_order_mean", "single_sum", "nats_lost")
IN_NATS += ("ce", "ce_clean", "ce_base", "ce_mean", "ce_clean_mean", "nats_at_90")
IN_NATS += (*(f"kl_{name}" for name in ("min", "p5", "p95", "max", "sd")), "lowest_loss", "highest_loss", "floor")
UNITS = dict.fromkeys(IN_NATS, "nats") | {"lowest_flop": "FLOP", "highest_flop": "FLOP", "log_scale": "log FLOP"}
UNITS |= {"hit": "share", "alpha": "error lengths", "plateau": "error lengths", "offset": "tokens"}
# What a table is about, where it is about none of them: nulls have no type of their own.
ABOUT = {"hook": pl.String, "sae": pl.String, "layer": pl.Int32}

Boot = Callable[[pl.DataFrame], Bootstrap]
TOKEN = ("intervention", "draw", "sequence", "position", "special", "kl", "ce", "ce_clean")


@ANALYSES.register
def single_positions(effects: Tables, ablations: Tables, boot: Boot) -> pl.DataFrame:
    """Per replaced position, intervention and distance from it: mean KL, loss increase, ratio to `eps_random`."""
    return _each([*effects, *ablations], (*TOKEN, "patched"), lambda table: single_rows(table, boot(table)))


@ANALYSES.register
def draws(effects: Tables) -> pl.DataFrame:
    """Per token and random intervention: the SAE's place among the draws."""
    parts = []
    for table in effects:
        rows = pl.scan_parquet(table.paths).select(*TOKEN, "patched", "token").collect()
        parts.append(table.labelled(draw_rows(rows)))
    return pl.concat(parts, how="vertical_relaxed")


@ANALYSES.register
def draws_found(effects: Tables) -> pl.DataFrame:
    """Per random intervention: at how many tokens the SAE is worse than chance, at a false discovery rate of 5 %."""
    parts = []
    for table in effects:
        rows = pl.scan_parquet(table.paths).select(*TOKEN, "patched", "token").collect()
        parts.append(table.labelled(draw_summary(draw_rows(rows))))
    return pl.concat(parts, how="vertical_relaxed")


@ANALYSES.register
def rungs(effects: Tables, boot: Boot) -> pl.DataFrame:
    """The ladder: per rung the mean KL, the step from the rung before, and the SAE's ratio to it."""
    return _each(effects, TOKEN, lambda table: ladder_rows(table, boot(table)))


@ANALYSES.register
def doses(effects: Tables, boot: Boot) -> pl.DataFrame:
    """Mean KL by multiples of the error's length, and the local exponent."""
    return _each(effects, TOKEN, lambda table: dose_rows(table, boot(table)))


@ANALYSES.register
def exponents(effects: Tables, boot: Boot) -> pl.DataFrame:
    """Exponents of the dose-response near 0 and at the SAE's own error, and where the plateau ends."""
    return _each(effects, TOKEN, lambda table: dose_summary(table, boot(table)))


@ANALYSES.register
def cosines(effects: Tables, ablations: Tables, boot: Boot) -> pl.DataFrame:
    """Mean KL by the cosine of what is written with the activation, at the activation's norm."""
    return _each([*effects, *ablations], TOKEN, lambda table: cosine_rows(table, boot(table)))


@ANALYSES.register
def dark_matter(effects: Tables, errors: Tables, boot: Boot) -> pl.DataFrame:
    """The parts of an SAE's error: their shares of its power, of the KL and of the loss increase."""
    power = {(table.labels["sae"], table.labels["corpus"]): _power(table.paths[0]) for table in errors}
    parts = []
    for table in effects:
        rows = table.read(*TOKEN)
        of_sae = power[table.labels["sae"], table.labels["corpus"]]
        parts.append(table.labelled(dark_matter_rows(rows, *of_sae, boot(rows))))
    return pl.concat(parts, how="vertical_relaxed")


@ANALYSES.register
def compounding(compounds: Tables, boot: Boot) -> pl.DataFrame:
    """Sets of SAEs: mean KL together against the sum of each alone."""
    parts = []
    for table in compounds:
        rows = table.read("set", "intervention", "sequence", "position", "special", "kl", "ce", "ce_clean")
        parts.append(table.labelled(super_additivity(rows, table.attributes["sets"], boot(rows))))
    return pl.concat(parts, how="vertical_relaxed")


@ANALYSES.register
def curvature(curvatures: Tables, boot: Boot) -> pl.DataFrame:
    """KL to second order beside the measured one."""
    columns = ("intervention", "sequence", "position", "special", "kl", "kl_second_order")
    return _each(curvatures, columns, lambda table: curvature_rows(table, boot(table)))


@ANALYSES.register
def correlations(effects: Tables, tokens: dict[tuple[str, str], Path], boot: Boot) -> pl.DataFrame:
    """Rank correlations of the KL with what is known of a token."""
    parts = []
    for table in effects:
        with store.arrays(tokens[table.labels["model"], table.labels["corpus"]], {"unigram": "v"}) as file:
            rows = correlates.read(table.paths, file["unigram"][:])
        parts.append(table.labelled(correlates.correlations(rows, boot(rows))))
    return pl.concat(parts, how="vertical_relaxed")


@ANALYSES.register
def atlas(ablations: Tables, boot: Boot) -> pl.DataFrame:
    """Per component, layer and ablation (and attention head): what the model loses, and what 90 % recovered leaves."""
    rows = _each(ablations, TOKEN, lambda table: atlas_rows(table, boot(table)))
    return metric_tables.of_a_head(rows.with_columns(component=pl.col("hook").map_elements(component, pl.String)))


@ANALYSES.register
def metrics(
    effects: Tables, ablations: Tables, texts: Texts, calibrations: list[Calibration], boot: Boot
) -> pl.DataFrame:
    """Per SAE and intervention: every metric against every baseline, and the effective compute by every calibration."""
    return metric_tables.metric_rows(effects, ablations, texts, calibrations, boot)


@ANALYSES.register
def calibrated(calibrations: list[Calibration]) -> pl.DataFrame:
    """Per calibration: its source, the range that it holds for, and its law."""
    return calibration_rows(calibrations)


@ANALYSES.register
def metric_ranks(metrics: pl.DataFrame) -> pl.DataFrame:
    """Per metric and SAE: its rank, 1 the best."""
    return metric_tables.verdicts(metrics).ranks


@ANALYSES.register
def metric_agreements(metrics: pl.DataFrame) -> pl.DataFrame:
    """Per two metrics: the rank correlations of the SAEs by both."""
    return metric_tables.verdicts(metrics).agreements


@ANALYSES.register
def metric_flips(metrics: pl.DataFrame) -> pl.DataFrame:
    """Pairs of SAEs that two metrics order the other way round, worst first."""
    return metric_tables.verdicts(metrics).flips


@ANALYSES.register
def frontier_points(families: list[Families]) -> pl.DataFrame:
    """Per SAE of a family: L0, losses and performance hit, and whether it is Pareto-optimal."""
    return metric_tables.frontier_points(families)


@ANALYSES.register
def frontier_fits(families: list[Families]) -> pl.DataFrame:
    """Per family and model of its curve: the parameters, and how well it fits."""
    return metric_tables.frontier_fits(families)


@ANALYSES.register
def frontier_factors(families: list[Families]) -> pl.DataFrame:
    """Per two families: the factors between them."""
    return metric_tables.frontier_factors(families)


def _each(tables: Tables, columns: tuple[str, ...], rows: Callable[[pl.DataFrame], pl.DataFrame]) -> pl.DataFrame:
    return pl.concat([table.labelled(rows(table.read(*columns))) for table in tables], how="vertical_relaxed")


def _power(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with store.arrays(path, {"power": "fold part", "count": "fold"}) as file:
        return file["power"][:], file["count"][:]


def _boot(settings: dict, table: pl.DataFrame) -> Bootstrap:
    options = settings["bootstrap"]
    return Bootstrap.over(table["sequence"].n_unique(), options["samples"], options["confidence"], settings["seed"])


def _tokens(paths: list[Path]) -> dict[tuple[str, str], Path]:
    """(model, corpus) -> its tokens."""
    found = {}
    for path in paths:
        about = attributes(path)
        found[about["model"], about["corpus"]] = path
    return found


def _given(call: Call) -> dict[str, Callable[[], object]]:
    """What an analysis may ask for beside tables, by name, made when it is asked for."""
    settings, options = call.settings, call.settings["bootstrap"]
    sources = {
        "boot": lambda: partial(_boot, settings),
        "tokens": lambda: _tokens(call.inputs["tokens"]),
        "texts": lambda: {
            place: metric_tables.text_losses(path, settings.get("bigram_smoothing"))
            for place, path in _tokens(call.inputs["tokens"]).items()
        },
        "calibrations": lambda: [
            calibration(text, name, **options, seed=settings["seed"]) for name, text in settings["calibrations"]
        ],
    }
    tables = {name: partial(grouped, call.inputs.get(name, [])) for name in ("effects", "ablations")}
    sources["families"] = lambda: metric_tables.families_of(
        *(read() for read in tables.values()), sources["texts"](), settings["families"], sources["boot"]()
    )
    return sources


def _argument(name: str, call: Call) -> object:
    """What an analysis takes by that name: one of `_given`, another analysis's table, or the tables of a stage."""
    given = _given(call)
    if name in given:
        return given[name]()
    return pl.read_parquet(call.input(name)) if name in ANALYSES else grouped(call.inputs.get(name, []))


def work(call: Call) -> None:
    analysis = ANALYSES[call.key["analysis"]]
    table = analysis(**{name: _argument(name, call) for name in signature(analysis).parameters})
    table = table.cast({name: kind for name, kind in ABOUT.items() if table.schema.get(name) == pl.Null})
    store.write_table(call.output, [table.to_arrow()], call.fingerprint, UNITS)
    log.info("%s: %d rows", call.key["analysis"], table.height)


def main() -> None:
    run("analyses", work)


if __name__ == "__main__":
    main()
