"""Small hand-made results for the stages that need no model: tokens, effects, rows of a summary, and their calls."""

from pathlib import Path

import numpy as np
import polars as pl

from pipeline import store, tables
from pipeline.stage import Call

HOOK = "blocks.1.hook_resid_pre"
PLACE = {"model": "tiny", "corpus": "story", "hook": HOOK, "sae": "early", "experiment": "main"}
LABELS = PLACE | {"layer": 1, "intervention": "sae", "tokens": "ordinary", "n_tokens": 1500}
INTERVALS = ("kl_mean", "ce_mean", "ce_clean_mean", "delta_ce_mean", "top1_agreement", "kl_ratio")
POINTS = ("kl_median", "kl_p90", "kl_p99", "kl_p999", "delta_ce_median")


def call(outputs, inputs, key=None, **settings) -> Call:
    settings = {"seed": 0, "bootstrap": {"samples": 400, "confidence": 0.95}} | settings
    return Call(key or {}, settings, inputs, outputs, "f00d", 1, "cpu", 1)


def arrays(path: Path, axes: str | dict, values: dict, **attributes) -> Path:
    """An HDF5 file of datasets that all have the same axes, or each its own."""
    values = {name: np.asarray(value) for name, value in values.items()}
    shapes = {name: (value.shape, str(value.dtype)) for name, value in values.items()}
    axes = dict.fromkeys(values, axes) if isinstance(axes, str) else axes
    with store.new_arrays(path, "f00d", axes, shapes, **attributes) as file:
        for name, value in values.items():
            file[name][:] = value
    return path


def tokens(folder: Path, special) -> Path:
    special = np.asarray(special, bool)
    values = {"token": np.arange(special.size, dtype=np.int32).reshape(special.shape), "special": special}
    return arrays(folder / "tokens.h5", "seq pos", values, model="tiny", corpus="story")


def table(path: Path, special, ce_clean, values: dict, first: int = 0, **place) -> Path:
    """A table of effects, written as the stages write it. `values`: intervention -> its (kl, ce, top1_agrees) from the
    sequence `first` on; a `sae` of None makes it one of ablations."""
    ce_clean = np.asarray(ce_clean, np.float32)
    clean = {"ce": ce_clean, "entropy": np.ones_like(ce_clean)}
    paths = tokens(path.parent, special), arrays(path.with_suffix(".h5"), "seq pos", clean, first=first)
    stacked = np.stack([np.asarray(triple, np.float32) for triple in values.values()], axis=1)
    key = {name: value for name, value in (PLACE | place).items() if value is not None}
    asked = call([path], {}, key, interventions=list(values), scope="all", patch_special=False, model=key["model"])
    spool = store.Spool(path, "f00d", stacked.shape)
    spool.put(0, stacked)
    with store.arrays(paths[0], {}) as words, store.arrays(paths[1], {}) as file:
        sequences = np.arange(first, first + len(ce_clean))
        rows = tables.rows(asked.settings, words, file, None, sequences)
        runs = [(name, 0) for name in values]
        tables.write(asked, key["hook"], runs, runs, spool, tables.Known(path), rows)
    spool.remove()
    return path


def row(**changes) -> dict:
    """A row of the summary of effects: every number 0.5, in an interval of 0.1 to each side."""
    numbers = dict.fromkeys(POINTS, 0.5)
    for name in INTERVALS:
        numbers |= {name: 0.5, f"{name}_low": 0.4, f"{name}_high": 0.6}
    return LABELS | numbers | changes


def around(value: float, spread: float = 0.1, column: str = "kl_ratio") -> dict:
    """A column and the ends of its interval."""
    return {column: float(value), f"{column}_low": value - spread, f"{column}_high": value + spread}


def frame(rows: list[dict]) -> pl.DataFrame:
    return pl.DataFrame(rows, infer_schema_length=None)
