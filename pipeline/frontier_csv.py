"""Frontiers of any SAEs, from a CSV of (family, l0, ce, clean, baseline): `python -m pipeline.frontier_csv data.csv`.

Writes the points, the fitted curves and the factors between families as CSV, and prints the main numbers. What they are
is said in `frontier` and `families`; there are no sequences to resample, so the intervals come from the scatter of the
points about their curves. No torch.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple, NoReturn

import polars as pl

from pipeline import families, frontier, store
from pipeline.fits import MODELS, Scatter
from pipeline.wording import cell, number

POINTS = ("x", "hit", "nats_lost", "pareto")


class Results(NamedTuple):
    """The three tables: `frontier.points`, `frontier.fit`, and `families.compare` of several pairs."""

    points: pl.DataFrame
    fits: pl.DataFrame
    factors: pl.DataFrame


# How the header of each file begins or ends; what has another one is not ours.
HEADERS = {"points": "," + ",".join(POINTS), "fits": ",".join(frontier.FITS), "factors": ",".join(families.SCHEMA)}


class Parser(argparse.ArgumentParser):
    """Raises ValueError for a wrong command line, instead of printing how it is used."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. Ask for --help.")


def results(
    table: pl.DataFrame, chosen: Sequence[str], scatter: Scatter, points: str, relative: bool, at: Sequence[float]
) -> Results:
    """Of a table of `frontier.read_csv`. All pairs of families are compared, in the table's order; where some are
    `chosen`, the first of them with each other one. ValueError as in `frontier.fit` and `families.compare`."""
    names = table["family"].unique(maintain_order=True).to_list()
    pairs = [(chosen[0], other) for other in chosen[1:]] if chosen else combinations(names, 2)
    compared = [families.compare(table, *pair, scatter, points, relative, at) for pair in pairs]
    factors = pl.concat([pl.DataFrame(schema=families.SCHEMA), *compared])
    return Results(frontier.points(table, relative), frontier.fit(table, scatter, points, relative), factors)


def report(found: Results) -> str:
    """The main numbers: every fit, then every factor, each followed by its warning."""
    fits = [
        (
            row["family"],
            row["curve"],
            f"{row['n']} {row['points']}",
            ", ".join(f"{name} = {cell(row, name)}" for name in MODELS[row["curve"]].parameters),
            "–" if row["aicc"] is None else f"{row['aicc']:.1f}",  # what counts is by how much two of them differ
            *(number(row[name]) for name in ("loo", "loo_hit")),
        )
        for row in found.fits.rows(named=True)
    ]
    factors = [
        (
            f"{row['first']} : {row['second']}",
            row["curve"],
            row["quantity"] + ("" if row["l0"] is None else f" at L0 = {number(row['l0'])}"),
            cell(row, "value"),
        )
        for row in found.factors.rows(named=True)
    ]
    parts = [
        _aligned(("family", "curve", "points", "parameters", "AICc", "loo", "loo of the hit"), fits, found.fits),
        _aligned(("families", "curve", "quantity", "value"), factors, found.factors) if factors else "",
    ]
    return "\n".join(filter(None, parts))


def _aligned(header: tuple[str, ...], rows: list[tuple[str, ...]], table: pl.DataFrame) -> str:
    """Columns of equal width; below a row, its warning."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    warnings = ["", *(f"    {warning}\n" if warning else "" for warning in table["warning"])]
    return "".join(f"{line.rstrip()}\n{warning}" for line, warning in zip(lines, warnings, strict=True))


def outputs(folder: Path, source: Path) -> dict[str, Path]:
    """`points.csv`, `fits.csv` and `factors.csv` in a folder, by the names of Results. ValueError where one of them is
    `source`, or is there and does not come from here."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder for the results. Give another --out.")
    paths = {name: folder / f"{name}.csv" for name in Results._fields}
    for name, path in paths.items():
        if path.exists() and path.resolve() == source.resolve():
            raise ValueError(f"{path} is the data itself, and would be overwritten. Give another --out.")
        if path.exists() and not _ours(path, HEADERS[name]):
            raise ValueError(
                f"{path} does not come from here, expected a header with '{HEADERS[name].strip(',')}'. Give another "
                "--out, or move it away."
            )
    return paths


def _ours(path: Path, header: str) -> bool:
    with open(path, encoding="utf-8", errors="replace") as file:
        first = file.readline().rstrip("\r\n")
    return first.endswith(header) if header.startswith(",") else first == header


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 2 for what the user can put right, after a line about it."""
    try:
        asked = _parser().parse_args(arguments)
        scatter = _scatter(asked)
        if not asked.data.is_file():
            raise ValueError(f"{asked.data} is no file, expected a CSV with a line per SAE.")
        table = frontier.read_csv(asked.data, _names(asked.names), asked.families)
        paths = outputs(asked.out, asked.data)
        found = results(table, asked.families, scatter, asked.points, asked.relative, asked.at)
        for name, path in paths.items():
            store.write_text(path, getattr(found, name).write_csv())
    except (ValueError, OSError, pl.exceptions.PolarsError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    sys.stdout.write(report(found))
    return 0


def _scatter(asked: argparse.Namespace) -> Scatter:
    if asked.samples < 1:
        raise ValueError(f"--samples is {asked.samples}, expected 1 or more.")
    if not 0 < asked.confidence < 1:
        raise ValueError(f"--confidence is {asked.confidence:g}, expected a share between 0 and 1, as 0.95.")
    return Scatter(asked.samples, asked.confidence, asked.seed)


def _names(pairs: Iterable[str]) -> dict[str, str]:
    """`family=arch` as in `frontier.read_csv`."""
    names = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not (name and equals and column) or name in names:
            raise ValueError(f"--names has '{pair}', expected names like family=arch, each once.")
        names[name] = column
    return names


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m pipeline.frontier_csv", description=__doc__.partition("\n")[0], allow_abbrev=False)
    default = Scatter()
    parser.add_argument("data", type=Path, help="a CSV with a line per SAE")
    parser.add_argument("--names", nargs="*", default=[], help="what the CSV calls a column: family=arch baseline=zero")
    parser.add_argument("--families", nargs="*", default=[], help="only these, the first compared with each other one")
    parser.add_argument("--points", choices=frontier.CHOICES, default=frontier.CHOICES[0], help="which ones are fitted")
    parser.add_argument("--relative", action="store_true", help="L0 / d for L0; the CSV then needs a column d")
    parser.add_argument("--at", nargs="*", type=float, default=[], help="the L0 to compare losses at")
    parser.add_argument("--samples", type=int, default=default.samples, help="resamples of an interval")
    parser.add_argument("--confidence", type=float, default=default.confidence, help="the mass of an interval")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the resamples")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the three tables")
    return parser


if __name__ == "__main__":
    sys.exit(main())
