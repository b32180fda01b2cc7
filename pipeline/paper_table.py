"""The summary table that a paper prints: a row per SAE, chosen numbers with their intervals, as CSV, Markdown or LaTeX.

A column is called as in the results: `l0`, `explained_variance` and others of the table of SAEs, without `_mean`; or a
metric of `normalised` and `compute`, with its baseline in brackets: `nats_lost`, `loss_recovered[zero]`. No torch.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import polars as pl

from pipeline import normalised
from pipeline.normalised import BASELINES, RANDOM
from pipeline.registry import unknown

# What a row is about, and how it is headed.
LABELS = {name: name for name in ("model", "corpus", "experiment", "sae", "hook", "layer", "architecture")}
LABELS["sae"] = "SAE"
PLACE = ("model", "corpus", "sae")
KEY = (*PLACE, "experiment")
# Columns of the table of SAEs, which may be called `<name>_mean` there, with the unit where it is no plain number.
SAES = {
    "l0": "L0",
    "l1": "L1",
    "explained_variance": "explained variance",
    "cos": "cosine",
    "norm_ratio": "norm ratio",
    "eps": "error norm",
    "norm": "activation norm",
    "dead_features": "never fired (share of features)",
    "dense_features": "dense (share of features)",
    "d_in": "input width",
    "d_sae": "features",
}
METRICS = {
    "nats_lost": "nats lost",
    "bits_lost": "bits lost",
    "loss_added": "loss added (share of clean loss)",
    "kl": "KL (nats)",
    "kl_ratio": "KL ratio",
    "loss_recovered": "loss recovered",
    "kl_score": "KL score",
    "effective_compute": "effective compute",
}
# The baselines that a metric is never without; those of `effective_compute` are the calibrations of a study.
NEEDS = {"kl_ratio": (RANDOM,), "loss_recovered": (*BASELINES, "uniform", "unigram", "bigram"), "kl_score": BASELINES}
UNITS = normalised.UNITS | dict.fromkeys(("l1", "eps", "norm"), "activation") | {"l0": "features"}
UNITS |= dict.fromkeys(("explained_variance", "dead_features", "dense_features"), "share")
# Known exactly, so that no digit of theirs is rounded away.
COUNTS = ("d_in", "d_sae")
DEFAULT = ("l0", "explained_variance", "nats_lost", "loss_added", "kl")
DEFAULT += ("kl_ratio[eps_random]", "loss_recovered[zero]", "kl_score[zero]")
ENDS = ("", "_low", "_high")
# Significant digits: of half an interval, of a value at most, and of one without an interval.
OF_INTERVAL, AT_MOST, PLAIN = 2, 4, 3
# Outside these, numbers are printed with a power of ten.
SMALL, LARGE = 1e-4, 1e6
# A float holds these many decimal digits whatever it is.
FLOAT_DIGITS = 15


def known_columns(calibrations: Iterable[str] = ()) -> list[str]:
    """All that a column can be called, given the names of a study's calibrations."""
    needs = NEEDS | {"effective_compute": tuple(calibrations)}
    metrics = [[f"{name}[{base}]" for base in needs[name]] if name in needs else [name] for name in METRICS]
    return [*SAES, *(name for names in metrics for name in names)]


def units(columns: Iterable[str]) -> dict[str, str]:
    """The units of those columns that have one."""
    bare = {column: column.partition("[")[0] for column in columns}
    return {column: UNITS[name] for column, name in bare.items() if name in UNITS}


def check_columns(columns: Sequence[str], calibrations: Iterable[str] = ()) -> None:
    """ValueError, with the known names, for a column that no study with these calibrations can have, and for one that
    is asked for twice."""
    known = known_columns(calibrations)
    for column in columns:
        if column not in known:
            raise ValueError(unknown("column of the paper's table", column, known))
    _require_different(columns)


def _require_different(columns: Sequence[str]) -> None:
    for column in columns:
        if list(columns).count(column) > 1:
            raise ValueError(f"The paper's table has '{column}' twice, expected it once. Delete one of them.")


def paper_table(metrics: pl.DataFrame, saes: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """A row per model, corpus, experiment and SAE, in the order of `metrics`: LABELS, then for each column its value,
    `<column>_low` and `<column>_high`, Float64. Null is what is not defined or not there, and ends that nothing has.

    `metrics` has the rows of `normalised_rows` and `compute_rows`, labelled by `model`, `corpus`, `experiment`, `hook`,
    `sae` and `layer`; those of the intervention `sae` count. `saes` has the columns SAES of `summary`.

    Raises ValueError for a column that is asked for twice, and where an SAE has a number twice.
    """
    _require_different(columns)
    name = pl.when(pl.col("baseline").is_null()).then("metric").otherwise(pl.format("{}[{}]", "metric", "baseline"))
    rows = metrics.filter(pl.col("intervention").cast(pl.String) == "sae").with_columns(name=name)
    _require_once(rows.select(*KEY, "name"))
    _require_once(saes.select(PLACE))
    table = rows.select(*KEY, "hook", "layer").unique(KEY, keep="first", maintain_order=True)
    table = _joined(table, saes.select(*PLACE, "architecture"), PLACE)
    for column in columns:
        table = _joined(table, *(_of_saes(saes, column) if column in SAES else _of_metrics(rows, column)))
    return table.select(*LABELS, *(column + end for column in columns for end in ENDS))


def _require_once(rows: pl.DataFrame) -> None:
    twice = rows.filter(rows.is_duplicated())
    if len(twice):
        found = ", ".join(f"{name} '{value}'" for name, value in twice.row(0, named=True).items())
        raise ValueError(f"There are several numbers for {found}, expected one. Give the rows of one run only.")


def _joined(table: pl.DataFrame, numbers: pl.DataFrame, key: Sequence[str]) -> pl.DataFrame:
    return table.join(numbers, on=key, how="left", maintain_order="left")


def _of_saes(saes: pl.DataFrame, column: str) -> tuple[pl.DataFrame, Sequence[str]]:
    """A column with its ends, and what its rows go by."""
    source = f"{column}_mean" if f"{column}_mean" in saes.columns else column
    return saes.select(*PLACE, *_triple(saes, source, column)), PLACE


def _of_metrics(rows: pl.DataFrame, column: str) -> tuple[pl.DataFrame, Sequence[str]]:
    return rows.filter(pl.col("name") == column).select(*KEY, *_triple(rows, "value", column)), KEY


def _triple(table: pl.DataFrame, source: str, column: str) -> list[pl.Expr]:
    """The numbers of `source` by their new names; null for what is not there or not finite."""
    numbers = [pl.col(source + end) if source + end in table.columns else pl.lit(None) for end in ENDS]
    numbers = [number.cast(pl.Float64) for number in numbers]
    finite = [pl.when(number.is_finite()).then(number) for number in numbers]
    return [number.alias(column + end) for number, end in zip(finite, ENDS, strict=True)]


def tokens_of(table: pl.DataFrame, saes: pl.DataFrame) -> int | None:
    """How many tokens the numbers of a `paper_table` are over; None where its rows differ in it, or it is not known."""
    found = _joined(table, saes.select(*PLACE, "n_tokens"), PLACE)["n_tokens"].unique()
    return found[0] if len(found) == 1 else None


def heading(column: str) -> str:
    """A label or a column in words, with its unit and in brackets its baseline; as it is where it is not known."""
    name, _, baseline = column.removesuffix("]").partition("[")
    words = (LABELS | SAES | METRICS).get(name, name)
    return f"{words} ({baseline})" if baseline else words


def rounded(value: float, low: float | None, high: float | None) -> list[str | None]:
    """The three numbers with as many digits as the interval supports: two significant ones of its half-width, at most
    four of the value, and three of a value without an interval. With one end, its distance is the half-width.

    `-0.12`, or `-1.2e-7` where all are very small or large. None for an end that is None.
    """
    ends = [end for end in (low, high) if end is not None]
    half = (high - low) / 2 if len(ends) == 2 else max((abs(end - value) for end in ends), default=0.0)
    largest = max(abs(number) for number in (value, *ends))
    places = _places(value, AT_MOST if ends else PLAIN)
    if half > 0:
        supported = _places(half, OF_INTERVAL)
        places = min(places, supported) if value else supported
    plain = SMALL <= largest < LARGE
    return [None if number is None else _written(number, places, plain) for number in (value, low, high)]


def _exponent(number: float, digits: int) -> int:
    """The power of ten of the first digit, once rounded to these many digits."""
    return int(f"{number:.{digits - 1}e}".partition("e")[2])


def _places(number: float, digits: int) -> int:
    """Decimal places that show these many significant digits; negative where those before the point are too many."""
    return digits - 1 - _exponent(number, digits)


def _written(number: float, places: int, plain: bool) -> str:
    number = round(number, places)
    if plain:
        return f"{number:z.{max(places, 0)}f}"
    if number == 0:
        return "0"
    power = _exponent(number, FLOAT_DIGITS)
    digits, _, _ = f"{number:.{max(places + power, 0)}e}".partition("e")
    return f"{digits}e{power}"


def as_csv(table: pl.DataFrame) -> str:
    """A `paper_table` with all digits and a column for each end; nothing for null."""
    return table.write_csv()


def as_markdown(table: pl.DataFrame, confidence: float, tokens: int | None = None) -> str:
    """A `paper_table` as a table of `value [low, high]`, under a line that says what all its rows share."""
    style = Style(_markdown_text, str, "–")
    rows = [_headings(table, style), ["---" if name in LABELS else "---:" for name in _shown(table)]]
    lines = ["| " + " | ".join(row) + " |" for row in (*rows, *_cells(table, style))]
    return "\n".join([_markdown_text(_caption(table, confidence, tokens)), "", *lines, ""])


def as_latex(table: pl.DataFrame, confidence: float, tokens: int | None = None) -> str:
    """A `paper_table` as a floating `table` of `value [low, high]`, its caption saying what all its rows share.
    `confidence` is the mass of the intervals, `tokens` the number that they are over, if it is one number."""
    style = Style(_latex_text, _latex_number, "--")
    headings, *rows = (" & ".join(row) + r" \\" for row in (_headings(table, style), *_cells(table, style)))
    lines = [
        r"% Needs \usepackage{booktabs}.",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex_text(_caption(table, confidence, tokens))}}}",
        rf"\begin{{tabular}}{{{''.join('l' if name in LABELS else 'r' for name in _shown(table))}}}",
        *(r"\toprule", headings, r"\midrule", *rows, r"\bottomrule"),
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join([*lines, ""])


@dataclass(frozen=True)
class Style:
    """How a page writes a text, a number as in `rounded`, and what is not there."""

    text: Callable[[str], str]
    number: Callable[[str], str]
    missing: str


def _same(table: pl.DataFrame) -> list[str]:
    """Labels that all rows share; not the SAE of a single row, which would leave it without a name."""
    same = [name for name in LABELS if table[name].n_unique() == 1]
    return [name for name in same if name != "sae" or len(same) < len(LABELS)]


def _shown(table: pl.DataFrame) -> list[str]:
    """Labels that differ, then the columns."""
    ends = {f"{name}{end}" for name in table.columns for end in ENDS[1:]}
    return [name for name in table.columns if name not in ends and name not in _same(table)]


def _caption(table: pl.DataFrame, confidence: float, tokens: int | None) -> str:
    """`Model: tiny; corpus: story. Values with 95 % intervals in brackets, over 1,500 tokens.`"""
    if not 0 < confidence < 1:
        raise ValueError(f"The confidence is {confidence}, expected a share between 0 and 1, as 0.95.")
    same = [f"{heading(name)}: {table[name][0]}" for name in _same(table) if table[name][0] is not None]
    shared = "; ".join(same) + ". " if same else ""
    over = "" if tokens is None else f", over {tokens:,} tokens"
    return f"{shared[:1].upper()}{shared[1:]}Values with {100 * confidence:.4g} % intervals in brackets{over}."


def _headings(table: pl.DataFrame, style: Style) -> list[str]:
    return [style.text(heading(name)) for name in _shown(table)]


def _cells(table: pl.DataFrame, style: Style) -> list[list[str]]:
    return [[_cell(row, name, style) for name in _shown(table)] for row in table.rows(named=True)]


def _cell(row: dict, name: str, style: Style) -> str:
    if row[name] is None:
        return style.missing
    if name in LABELS:
        return style.text(str(row[name]))
    if name in COUNTS:
        return style.number(f"{row[name]:.0f}")
    found = rounded(*(row[name + end] for end in ENDS))
    value, low, high = (style.missing if number is None else style.number(number) for number in found)
    return value if found[1] is found[2] is None else f"{value} [{low}, {high}]"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _markdown_text(text: str) -> str:
    """With a backslash before what would be markup: a `|` ends a cell, and `_` marks up but inside a word."""
    return re.sub(r"[\\|`*<~$\[\]]|(?<![^\W_])_|_(?![^\W_])", lambda found: "\\" + found[0], _one_line(text))


LATEX = {letter: "\\" + letter for letter in "_&%#${}"}
LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
# Other letters in the fonts that are the default.
LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
# Arguments of the end of a line, if a row begins with them.
LATEX |= {"[": "{[}", "*": "{*}"}


def _latex_text(text: str) -> str:
    """With all special characters escaped, and nothing drawn together: `--` would become a dash."""
    return re.sub(r"([-',`])(?=\1)", r"\1{}", _one_line(text).translate(str.maketrans(LATEX)))


def _latex_number(text: str) -> str:
    """In mathematics where it has a sign or a power of ten."""
    digits, _, power = text.partition("e")
    if power:
        return rf"${digits} \times 10^{{{power}}}$"
    return f"${digits}$" if digits.startswith("-") else digits
