"""The per-token tables of effects and ablations: a row per token, intervention and draw. Needs no torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pyarrow as pa

from pipeline import seals, store
from pipeline.stage import Call, log

# The label of an intervention, and the number of a draw.
Run = tuple[str, int]
VALUES = ("kl", "ce", "top1_agrees")
SAE_COLUMNS = ("l0", "l1", "norm", "sae_norm", "eps", "cos", "dense")
UNITS = {"kl": "nats", "ce": "nats", "ce_clean": "nats", "entropy_clean": "nats", "l0": "features"}
UNITS["dense"] = "features"
UNITS |= dict.fromkeys(("l1", "norm", "sae_norm", "eps"), "activation")
# Rows of a row group, about: what is held in memory while a table is written.
GROUP_ROWS = 2**18


@dataclass(frozen=True)
class Rows:
    """Which tokens a table is about. `sequences` are those of the spool, in its order; its columns are the tokens at
    `positions`. Where one position at a time is replaced, `patched` says which one for each column."""

    tokens: h5py.File
    clean: h5py.File
    reconstructions: h5py.File | None
    sequences: np.ndarray
    positions: np.ndarray
    patched: np.ndarray | None
    patch_special: bool

    def columns(self, place: slice) -> dict[str, np.ndarray]:
        """The columns that do not depend on the run, of some sequences: each `seq column`. `next_token` is masked
        where there is none."""
        ids, special = (self._read(self.tokens[name], place, 0) for name in ("token", "special"))
        start = int(self.clean.attrs["first"])
        shape = (len(ids), len(self.positions))
        none_next = np.broadcast_to(self.positions == ids.shape[1] - 1, shape)
        found = {
            "sequence": np.broadcast_to(self.sequences[place, None].astype(np.int32), shape),
            "position": np.broadcast_to(self.positions.astype(np.int32), shape),
            "token": ids[:, self.positions],
            "next_token": np.ma.masked_array(np.roll(ids, -1, axis=1)[:, self.positions], none_next),
            "special": special[:, self.positions],
            "ce_clean": self._read(self.clean["ce"], place, start)[:, self.positions],
            "entropy_clean": self._read(self.clean["entropy"], place, start)[:, self.positions],
        }
        if self.patched is not None:
            found = {"patched": np.broadcast_to(self.patched.astype(np.int32), shape)} | found
        if self.reconstructions is not None:
            at = self.positions if self.patched is None else self.patched
            found |= {name: self._read(self.reconstructions[name], place, start)[:, at] for name in SAE_COLUMNS}
        return found

    def counted(self, place: slice) -> np.ndarray:
        """Which tokens have a row, `seq column`: of one position, only where that token is replaced."""
        special = self._read(self.tokens["special"], place, 0)
        if self.patched is None or self.patch_special:
            return np.ones((len(special), len(self.positions)), bool)
        return ~special[:, self.patched]

    def _read(self, dataset: h5py.Dataset, place: slice, start: int) -> np.ndarray:
        """The rows of these sequences, of a dataset that begins with the sequence `start`."""
        wanted = self.sequences[place] - start
        if not len(wanted):
            return dataset[:0]
        return dataset[wanted[0] : wanted[-1] + 1][wanted - wanted[0]]


def rows(
    settings: dict, tokens: h5py.File, clean: h5py.File, reconstructions: h5py.File | None, sequences: np.ndarray
) -> Rows:
    """The rows that an experiment's settings ask for. ValueError where every token that it would replace is special."""
    if "positions" not in settings:
        positions, patched = np.arange(clean["ce"].shape[1]), None
    else:
        after = np.arange(settings["horizon"] + 1)
        patched = np.repeat(settings["positions"], len(after))
        positions = (np.array(settings["positions"])[:, None] + after).flatten()
        if not settings["patch_special"] and tokens["special"][:][:, settings["positions"]].all():
            raise ValueError(
                f"Every token at the positions {settings['positions']} is special and left alone, so nothing would be "
                "replaced. Choose other `positions`, or set `patch_special: true`."
            )
    return Rows(tokens, clean, reconstructions, sequences, positions, patched, settings["patch_special"])


@dataclass(frozen=True)
class Known:
    """An earlier table of the same item with another number of draws, and the runs that it has."""

    path: Path
    runs: frozenset[Run] = frozenset()

    def read(self, run: Run, first: int, last: int) -> list[np.ndarray]:
        """VALUES of a run in the sequences from `first` to `last`, as they stand in the table."""
        label, draw = run
        rows = pl.scan_parquet(self.path).filter(pl.col("sequence").is_between(first, last), pl.col("draw") == draw)
        table = rows.filter(pl.col("intervention") == label).select(VALUES).collect()
        return [table[name].cast(pl.Float32).fill_null(np.nan).to_numpy() for name in VALUES]


def known(call: Call, block: int) -> Known:
    """The runs that the file in the item's place has already: of each intervention the first draw and whole blocks of
    the later ones, because those that share a call round alike."""
    if not call.output.exists() or not call.family or _family(call.output) != call.family:
        return Known(call.output)
    found = pl.scan_parquet(call.output).group_by(pl.col("intervention").cast(pl.String)).agg(pl.col("draw").max())
    runs = {(label, draw) for label, most in found.collect().rows() for draw in range(most // block * block + 1)}
    return Known(call.output, frozenset(runs))


def _family(path: Path) -> str | None:
    try:
        return store.table_attributes(seals.verified(path)).get("family")
    except (ValueError, pa.ArrowException):  # a damaged file; it is made again
        return None


def write(
    call: Call, hook: str, runs: list[Run], made: list[Run], spool: store.Spool, known: Known, rows: Rows
) -> None:
    """One Parquet file: row groups of some sequences and one run. The spool has the runs that were `made`."""
    attributes = {"model": call.settings.get("model"), "hook": hook} | call.key
    settings = {name: call.settings.get(name) for name in ("scope", "patch_special", "seed")}
    settings["family"] = call.family
    place_of = {run: i for i, run in enumerate(made)}

    def values(run: Run, place: slice, counted: np.ndarray) -> list[np.ndarray]:
        if run in known.runs:
            return known.read(run, *(int(rows.sequences[place][i]) for i in (0, -1))) if counted.any() else [EMPTY] * 3
        return [value[counted] for value in spool.get(place_of[run], place)]

    groups = _groups(call, runs, values, rows)
    store.write_table(call.output, groups, call.fingerprint, UNITS, **attributes, **settings)


Values = Callable[[Run, slice, np.ndarray], list[np.ndarray]]
EMPTY = np.zeros(0, np.float32)


def _groups(call: Call, runs: list[Run], values_of: Values, rows: Rows) -> Iterator[pa.Table]:
    """A table for some sequences and each run; `values_of` gives the values of a run at the counted tokens."""
    step = max(1, GROUP_ROWS // len(rows.positions))
    totals, counts = np.zeros(len(runs)), 0
    for start in range(0, max(1, len(rows.sequences)), step):
        place = slice(start, min(start + step, len(rows.sequences)))
        counted = rows.counted(place)
        shared = {name: _column(value, counted) for name, value in rows.columns(place).items()}
        counts += counted.sum()
        for i, (label, draw) in enumerate(runs):
            kl, ce, agrees = values_of((label, draw), place, counted)
            _check(label, kl)
            totals[i] += kl.sum(dtype=np.float64)
            number = len(shared["sequence"])
            kind = {
                "intervention": repeated(label, number),
                "scope": repeated(call.settings["scope"], number),
                "draw": pa.array(np.full(number, draw, np.int32)),
            }
            values = {"kl": kl, "ce": ce, "top1_agrees": agrees.astype(bool)}
            yield pa.table(kind | shared | {name: pa.array(value, from_pandas=True) for name, value in values.items()})
    for (label, draw), total in zip(runs, totals, strict=True):
        if draw == 0:
            log.info("%s: %s: mean KL %.6g nats", call.name, label, total / max(counts, 1))


def _check(label: str, kl: np.ndarray) -> None:
    if np.isnan(kl).any():
        raise ValueError(
            f"The KL of '{label}' is not a number at {int(np.isnan(kl).sum())} tokens. This is a bug in Faithful; "
            "please report it."
        )


def _column(value: np.ndarray, counted: np.ndarray) -> pa.Array:
    """The counted values; NaN (no next token) becomes null."""
    return pa.array(value[counted], from_pandas=True)


def repeated(value: str, number: int) -> pa.DictionaryArray:
    """A column of one text."""
    return pa.DictionaryArray.from_arrays(np.zeros(number, np.int32), [value])
