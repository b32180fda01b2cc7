"""Stage `summary`: per-token tables -> a row per (SAE or hook, experiment, intervention, token class), with intervals.

Derived from stored values alone: no model, no SAE, no torch.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import polars as pl

from pipeline import store
from pipeline.hooks import parse_hook
from pipeline.stage import Call, log, run
from pipeline.statistics import Bootstrap, Interval

BASELINE = "eps_random"
TOKEN_CLASSES = {"all": lambda special: np.ones_like(special), "ordinary": np.logical_not}
PLACE = ("model", "corpus", "hook", "sae", "experiment")
QUANTILES = {"kl_median": 0.5, "kl_p90": 0.9, "kl_p99": 0.99, "kl_p999": 0.999}
# A feature that fires on more than this share of the ordinary tokens counts as dense.
DENSE = 0.1
# What is read of the scores.
PER_TOKEN = ("l0", "l1", "norm", "sae_norm", "eps", "cos")
AXES = dict.fromkeys(PER_TOKEN, "seq pos") | {"feature_count": "feature"}
UNITS = dict.fromkeys(["kl_mean", *QUANTILES, "ce_mean", "ce_clean_mean", "delta_ce_mean", "delta_ce_median"], "nats")
UNITS |= {"l0_mean": "features"} | dict.fromkeys(("l1_mean", "eps_mean", "norm_mean"), "activation")
UNITS |= dict.fromkeys(("explained_variance", "dead_features", "dense_features", "top1_agreement"), "share")


def _with_ends(*names: str) -> dict:
    return {name + end: pl.Float64 for name in names for end in ("", "_low", "_high")}


# What the two tables hold, also where a study gives them no row.
EFFECTS = dict.fromkeys(PLACE, pl.String) | {"layer": pl.Int64, "intervention": pl.String, "tokens": pl.String}
EFFECTS |= {"n_tokens": pl.Int64, **_with_ends("kl_mean"), **dict.fromkeys(QUANTILES, pl.Float64)}
EFFECTS |= _with_ends("ce_mean", "ce_clean_mean", "delta_ce_mean") | {"delta_ce_median": pl.Float64}
EFFECTS |= _with_ends("top1_agreement", "kl_ratio")
SAES = dict.fromkeys(("model", "corpus", "sae", "architecture", "hook_in", "hook"), pl.String)
SAES |= dict.fromkeys(("layer", "d_in", "d_sae", "n_tokens"), pl.Int64)
SAES |= _with_ends(*(f"{name}_mean" for name in ("l0", "l1", "cos", "eps", "norm")), "norm_ratio", "explained_variance")
SAES |= {"dead_features": pl.Float64, "dense_features": pl.Float64}


def work(call: Call) -> None:
    special = _special(call.inputs.get("tokens", []))
    boot = _bootstraps(call, special)
    effects = [row for place, paths in _places(call).items() for row in effect_rows(place, paths, special, boot)]
    by_sae = _by_sae(call.inputs.get("scores", []))
    saes = [sae_row(paths, call.inputs["moments"], special, boot) for paths in by_sae]
    made_with = _made_with([path for paths in call.inputs.values() for path in paths])
    # The table whose fingerprint is looked at goes last: when it is there, the other one is.
    for rows, schema, path in reversed(list(zip((effects, saes), (EFFECTS, SAES), call.outputs, strict=True))):
        table = pl.DataFrame(rows, schema=schema)
        store.write_table(path, [table.to_arrow()], call.fingerprint, UNITS, packages=made_with)
    log.info("%d rows of effects, %d SAEs", len(effects), len(saes))


def _made_with(paths: list[Path]) -> dict[str, str]:
    """Versions of the packages that the inputs were made with; several are listed."""
    found = defaultdict(set)
    for path in paths:
        for name, number in store.file_packages(path).items():
            found[name].add(number)
    return {name: ", ".join(sorted(numbers)) for name, numbers in found.items()}


def _special(paths: list[Path]) -> dict[tuple[str, str], np.ndarray]:
    """(model, corpus) -> the mask of special tokens `seq pos`."""
    masks = {}
    for path in paths:
        with store.arrays(path, {"special": "seq pos"}) as file:
            masks[file.attrs["model"], file.attrs["corpus"]] = file["special"][:]
    return masks


def _bootstraps(call: Call, special: dict) -> dict[int, Bootstrap]:
    """Number of sequences -> its resamples."""
    options = call.settings["bootstrap"]
    sizes = {len(mask) for mask in special.values()}
    return {
        size: Bootstrap.over(size, options["samples"], options["confidence"], call.settings["seed"]) for size in sizes
    }


def _places(call: Call) -> dict[tuple, list[Path]]:
    """(model, corpus, hook, sae, experiment) -> the shards of its table; `sae` is None for ablations."""
    places = defaultdict(list)
    for path in [*call.inputs.get("effects", []), *call.inputs.get("ablations", [])]:
        attributes = store.table_attributes(path)
        places[tuple(attributes.get(name) for name in PLACE)].append(path)
    return places


def effect_rows(place: tuple, paths: list[Path], special: dict, boot: dict[int, Bootstrap]) -> Iterator[dict]:
    """The rows of one table: interventions x token classes."""
    mask = special[place[0], place[1]]
    columns = ["intervention", "draw", "sequence", "position", "kl", "ce", "ce_clean", "top1_agrees"]
    table = pl.scan_parquet(paths).select(columns).collect()
    parts = {
        name: part.sort("draw", "sequence", "position")
        for (name,), part in table.partition_by("intervention", as_dict=True).items()
    }
    baseline = _grid(parts[BASELINE], "kl", mask.shape).mean(0) if BASELINE in parts else None
    for name, part in parts.items():
        for token_class, select in TOKEN_CLASSES.items():
            labels = dict(zip(PLACE, place, strict=True)) | {"layer": parse_hook(place[2]).layer}
            yield (
                labels
                | {"intervention": name, "tokens": token_class}
                | _statistics(part, select(mask), baseline, boot[len(mask)])
            )


def _grid(part: pl.DataFrame, column: str, shape: tuple[int, int]) -> np.ndarray:
    """A column as `draw seq pos`."""
    if len(part) % (shape[0] * shape[1]):
        raise ValueError(
            f"A table of effects has {len(part)} rows an intervention, expected {shape[0] * shape[1]} or a multiple. "
            "Delete its shards and run again."
        )
    return part[column].cast(pl.Float64).to_numpy().reshape(-1, *shape)


def _statistics(part: pl.DataFrame, chosen: np.ndarray, baseline: np.ndarray | None, boot: Bootstrap) -> dict:
    """The numbers of one row. `chosen` `seq pos` says which tokens count; CE leaves out those without a next token.

    Draws of one token are averaged before anything else, except for the quantiles of the KL, which are over all."""
    every_kl = _grid(part, "kl", chosen.shape)
    kl, ce, ce_clean, agrees = (
        _grid(part, name, chosen.shape).mean(0) for name in ("kl", "ce", "ce_clean", "top1_agrees")
    )
    followed = chosen & ~np.isnan(ce)
    delta = ce - ce_clean
    quantiles = dict(zip(QUANTILES, np.quantile(every_kl[:, chosen], list(QUANTILES.values())), strict=True))
    row = {"n_tokens": int(chosen.sum())}
    row |= _named("kl_mean", boot.mean(*_sums(kl, chosen))) | {name: float(value) for name, value in quantiles.items()}
    for name, values in (("ce_mean", ce), ("ce_clean_mean", ce_clean), ("delta_ce_mean", delta)):
        row |= _named(name, boot.mean(*_sums(values, followed)))
    row["delta_ce_median"] = float(np.median(delta[followed]))
    row |= _named("top1_agreement", boot.mean(*_sums(agrees, chosen)))
    empty = Interval(np.nan, np.nan, np.nan)
    ratio = empty if baseline is None else boot.ratio(_sums(kl, chosen), _sums(baseline, chosen))
    return _nulls(row | _named("kl_ratio", ratio))


def _nulls(row: dict) -> dict:
    """The row with null for what is not defined."""
    return {name: None if value != value else value for name, value in row.items()}


def _sums(values: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(total, count) ` sequence` over the chosen tokens."""
    return np.where(chosen, values, 0.0).sum(1), chosen.sum(1)


def _named(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _by_sae(paths: list[Path]) -> list[list[Path]]:
    """Shards of scores, grouped by SAE and corpus."""
    groups = defaultdict(list)
    for path in paths:
        groups[path.parent].append(path)
    return list(groups.values())


def sae_row(paths: list[Path], moments: list[Path], special: dict, boot: dict[int, Bootstrap]) -> dict:
    """One SAE on one corpus, over ordinary tokens: sparsity, fit, and which features fire never or nearly always."""
    with ExitStack() as stack:
        files = [stack.enter_context(store.arrays(path, AXES)) for path in paths]
        attributes = dict(files[0].attrs)
        values = {name: np.concatenate([file[name][:] for file in files]).astype(np.float64) for name in PER_TOKEN}
        fired = sum(file["feature_count"][:] for file in files)
    chosen = ~special[attributes["model"], attributes["corpus"]]
    hook = parse_hook(attributes["write"])
    labels = {name: attributes[name] for name in ("model", "corpus", "sae", "architecture")}
    labels |= {
        "hook_in": attributes["read"],
        "hook": attributes["write"],
        "layer": hook.layer,
        "d_in": int(attributes["d_in"]),
    }
    if values["eps"].shape != chosen.shape:
        found, expected = len(values["eps"]), len(chosen)
        raise ValueError(f"{paths[0].parent} holds {found} sequences, expected {expected}. Delete it and run again.")
    sums, resample = {name: _sums(value, chosen) for name, value in values.items()}, boot[len(chosen)]
    row = labels | {"d_sae": len(fired), "n_tokens": int(chosen.sum())}
    for name in ("l0", "l1", "cos", "eps", "norm"):
        row |= _named(f"{name}_mean", resample.mean(*sums[name]))
    row |= _named("norm_ratio", resample.ratio(sums["sae_norm"], sums["norm"]))
    row |= _named(
        "explained_variance", _explained_variance(values["eps"], chosen, _variance(moments, labels), resample)
    )
    return _nulls(
        row
        | {
            "dead_features": float((fired == 0).mean()),
            "dense_features": float((fired > DENSE * chosen.sum()).mean()),
        }
    )


def _variance(paths: list[Path], labels: dict) -> np.ndarray:
    """Sum of |x - mean(x)|² over the ordinary tokens of each sequence, ` sequence`, at the hook of an SAE."""
    wanted = tuple(labels[name] for name in ("model", "corpus", "hook"))
    for path in paths:
        with store.arrays(path, {"centred_square": "seq"}) as file:
            if tuple(file.attrs[name] for name in ("model", "corpus", "hook")) == wanted:
                return file["centred_square"][:]
    raise AssertionError(f"the plan gave no moments for {wanted}")


def _explained_variance(eps: np.ndarray, chosen: np.ndarray, variance: np.ndarray, boot: Bootstrap) -> Interval:
    """1 - sum |x - x_hat|² / sum |x - mean(x)|²: the corpus mean scores 0, x itself 1."""
    ones = np.ones(len(chosen))
    unexplained = boot.ratio((_sums(eps**2, chosen)[0], ones), (variance, ones))
    return Interval(1 - unexplained.value, 1 - unexplained.high, 1 - unexplained.low)


def main() -> None:
    run("summary", work)


if __name__ == "__main__":
    main()
