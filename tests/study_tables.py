"""Tables of analyses made by hand, with exactly the columns that the analyses give: what figures and report show."""

import numpy as np
import polars as pl
from fakes import ROOT
from tables import HOOK, PLACE, around

from pipeline import (
    atlas,
    compounding,
    compute,
    correlates,
    curvature,
    dark_matter,
    dose,
    draws,
    ladder,
    metric_tables,
    normalised,
    single,
)
from pipeline.frontier import RESAMPLED, Replicates
from pipeline.labels import COMPONENTS

LABELS = {"model": pl.String, "corpus": pl.String, "experiment": pl.String, "hook": pl.String, "sae": pl.String}
LABELS |= {"layer": pl.Int32}
CORRELATIONS = {"target": pl.String, "covariate": pl.String, "n_tokens": pl.Int64}
CORRELATIONS |= dict.fromkeys(("spearman", "spearman_low", "spearman_high"), pl.Float64)


def labelled(rows, schema, sae="early", layer=1, **changes):
    """The rows with what they are about in front; a `sae` of None is a hook's own."""
    labels = {"model": "tiny", "corpus": "story", "experiment": "main", "hook": HOOK, "sae": sae, "layer": layer}
    return pl.DataFrame([labels | row | changes for row in rows], schema=LABELS | dict(schema))


def rungs(sae="early", layer=1, names=ladder.RUNGS, ratio=1.5, spread=0.1, **changes):
    """The i-th rung has a mean KL of i + 1; the SAE's ratio to each is the same."""
    rows = []
    for i, name in enumerate(names):
        row = {"intervention": name, "n_tokens": 1500} | around(i + 1, 0.5, "kl_mean")
        rows.append(row | around(1 if name == "sae" else ratio, spread, "sae_ratio"))
    return labelled(rows, ladder.SCHEMA, sae, layer, **changes)


def doses(sae="early", layer=1, alphas=(0, 0.1, 1, 2), **changes):
    """KL of alpha squared, twice that along the error."""
    rows = []
    for family, factor in (("error_scaled", 2), ("eps_random_scaled", 1)):
        for i, alpha in enumerate(alphas):
            row = {"family": family, "alpha": alpha, "n_tokens": 1500} | around(factor * alpha**2, 0.001, "kl_mean")
            if i > 1:
                row |= around(2, 0.1, "exponent") | {"exponent_at": (alphas[i - 1] * alpha) ** 0.5}
            rows.append(row)
    return labelled(rows, dose.ROWS, sae, layer, **changes)


def cosines(sae="early", layer=1, **changes):
    """The turns towards an SAE's error, and at random, which belong to the hook."""
    parts = []
    for family, owner, factor in (("theta_error_at", sae, 2), ("theta_random_at", None, 1)):
        rows = [
            {"family": family, "cosine": cosine, "n_tokens": 1500} | around(factor * (1 - cosine), 0.001, "kl_mean")
            for cosine in (0.9, 0.95)
        ]
        parts.append(labelled(rows, dose.COSINES, owner, layer, **changes))
    return pl.concat(parts)


def parts_of_errors(sae="early", layer=1, **changes):
    numbers = zip(dark_matter.PARTS, (0.1, 0.2, 0.7), (0.3, -0.1, 0.8), strict=True)
    rows = [
        {"part": part, "power_share": power, "n_tokens": 1500, "kl_share_alone": 0.4}
        | around(share, 0.05, "kl_share")
        | around(share / 2, 0.05, "delta_ce_share")
        for part, power, share in numbers
    ]
    return labelled(rows, dark_matter.SCHEMA, sae, layer, **changes)


def curvatures(sae="early", layer=1, **changes):
    """`eps_random` has no excess, by definition."""
    numbers = {"excess": 0.5, "excess_curvature": 0.4, "excess_beyond": 0.1}
    row = {"intervention": "sae", "n_tokens": 100} | around(0.2, 0.01, "kl_mean")
    for name, value in numbers.items():
        row |= around(value, 0.05, name)
    rows = [row, {"intervention": "eps_random", "n_tokens": 100} | around(0.1, 0.01, "kl_mean")]
    return labelled(rows, curvature.SCHEMA, sae, layer, **changes)


def positions(sae="early", layer=1, patched=(16, 32), **changes):
    """The KL falls by ten per position; that of noise is half as large, and the zero ablation belongs to the hook."""
    found = []
    for place in patched:
        for offset in range(3):
            for name, value in (("sae", 1), ("eps_random", 0.5), ("identity", 0)):
                kl = value * 10.0**-offset * place
                row = {"intervention": name, "patched": place, "offset": offset, "n": 40}
                found.append(row | around(kl, kl / 10, "kl_mean"))
    zero = {"intervention": "zero", "patched": patched[0], "offset": 0, "n": 40} | around(9, 1, "kl_mean")
    made = labelled(found, single.SCHEMA, sae, layer, **changes)
    return pl.concat([made, labelled([zero], single.SCHEMA, None, layer, **changes)])


def drawn(sae="early", layer=1, names=("act_cov_random", "eps_random"), **changes):
    """Four tokens in the opposite order of their medians; the SAE is beyond chance at the second of the table."""
    rows = []
    for name in names:
        for i in range(4):
            median = 0.1 * (4 - i)
            kl = {"kl_p5": median / 2, "kl_median": median, "kl_p95": 2 * median, "kl_sae": 3 * median}
            rows.append(kl | {"intervention": name, "sequence": i, "patched": 32, "q": 0.01 if i == 1 else 0.5})
    return labelled(rows, draws.SCHEMA, sae, layer, **changes)


def sets(**changes):
    """Two single SAEs and the two together."""
    rows = []
    for name, size, value in (("a", 1, 1.0), ("b", 1, 1.0), ("a+b", 2, 1.25), ("all", 3, 0.75)):
        for i, intervention in enumerate(("sae", "eps_random")):
            row = {"set": name, "size": size, "intervention": intervention, "n_tokens": 1500}
            rows.append(row | around(value + i / 100, 0.1, "super_additivity") | around(0.5, 0.1, "kl_mean"))
    return labelled(rows, compounding._SCHEMA, None, None, hook=None, **changes)


def correlations(sae="early", layer=1, **changes):
    rows = [
        {"target": target, "covariate": covariate, "n_tokens": 1500} | around(0.5, 0.1, "spearman")
        for target in correlates.TARGETS
        for covariate in correlates.COVARIATES
    ]
    return labelled(rows, CORRELATIONS, sae, layer, **changes)


def metrics(sae="early", layer=1, kl=0.5, lost=0.4, **changes):
    """Random noise loses as much as the SAE."""
    numbers = {("nats_lost", None): lost, ("kl", None): kl, ("loss_recovered", "zero"): 1 - lost / 4}
    numbers |= {("effective_compute", "Kaplan 2020"): 1 / (1 + lost)}
    rows = [
        {"intervention": name, "metric": metric, "baseline": baseline, "unit": normalised.UNITS[metric]}
        | around(value, 0.01, "value")
        for name in ("sae", "eps_random")
        for (metric, baseline), value in numbers.items()
    ]
    return labelled(rows, normalised.ROWS, sae, layer, **changes)


def verdicts():
    """On three SAEs at one hook, of which the one with the least KL loses the most nats."""
    numbers = {"early": (0.1, 0.3), "late": (0.2, 0.2), "coder": (0.3, 0.1)}
    return metric_tables.verdicts(pl.concat(metrics(sae, 1, *values) for sae, values in numbers.items()))


def calibrated():
    text = (ROOT / "calibrations" / "kaplan.csv").read_text()
    return compute.calibration_rows([compute.calibration(text, "kaplan", 1, 0.95, 0)])


def ablated(**changes):
    """A stream and two heads in two layers; the zero ablation costs a nat more than in the layer before."""
    parts = []
    for layer in (0, 1):
        for component, head in (("resid_pre", None), ("z", 0), ("z", 1)):
            about = {"component": component, "head": head, "n_tokens": 1500}
            rows = [about | {"intervention": name} for name in ("zero", "mean")]
            for i, row in enumerate(rows, 1):
                row |= around((layer + 1) / i, 0.1, "delta_ce_mean") | around(1 / i, 0.1, "kl_mean")
                row |= around((layer + 1) / i / 10, 0.01, "nats_at_90")
            schema = atlas.SCHEMA | {"component": pl.String, "head": pl.Int64}
            hook = f"blocks.{layer}.{COMPONENTS[component]}"
            parts.append(labelled(rows, schema, None, layer, hook=hook, **changes))
    return pl.concat(parts)


def families(**changes):
    """Two families of three SAEs each: the performance hit is 1 / L0 in the one and twice that in the other."""
    rows = []
    for family, factor in (("one", 1), ("two", 2)):
        for l0 in (10.0, 20.0, 40.0):
            hit = factor / l0
            numbers = {"l0": l0, "ce": 3 + 10 * hit, "ce_clean": 3, "ce_base": 13, "kl": hit, "nats_lost": 10 * hit}
            row = {"hook": HOOK, "layer": 1, "sae": f"{family}-{l0:g}", "family": family, "d": 16}
            for name, value in (numbers | {"hit": hit}).items():
                row |= around(value, value / 50, name)
            rows.append(row)
    table, generator = pl.DataFrame(rows), np.random.default_rng(0)
    noise = np.concatenate([np.zeros((1, len(table))), generator.normal(0, 0.01, (100, len(table)))])
    values = {name: table[name].to_numpy() * (1 + noise * (name == "ce")) for name in RESAMPLED}
    labels = {name: PLACE[name] for name in metric_tables.STUDY} | {"baseline": "zero", "relative": False}
    return [metric_tables.Families(labels | changes, table, Replicates(values, 0.95), "pareto", ())]


def saes(*names, **changes):
    """Rows of the table of SAEs: errors a tenth of the norm, a cosine of 0.93."""
    row = {"model": "tiny", "corpus": "story", "hook": HOOK, "layer": 1}
    row |= {"eps_mean": 1.0, "norm_mean": 10.0, "cos_mean": 0.93}
    return pl.DataFrame([row | {"sae": name} | changes for name in names])


# The table of every analysis that a figure takes, by the name it takes it by: of each SAE, and of several together.
TABLES = {
    "rungs": rungs,
    "doses": doses,
    "cosines": cosines,
    "dark_matter": parts_of_errors,
    "curvature": curvatures,
    "single_positions": positions,
    "draws": drawn,
    "correlations": correlations,
    "metrics": metrics,
}
TOGETHER = {
    "compounding": sets,
    "atlas": ablated,
    "metric_ranks": lambda: verdicts().ranks,
    "metric_agreements": lambda: verdicts().agreements,
    "frontier_points": lambda: metric_tables.frontier_points(families()),
    "frontier_fits": lambda: metric_tables.frontier_fits(families()),
}
