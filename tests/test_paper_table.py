"""The paper's table: every number in its place, no digit that its interval does not support, no name that breaks it."""

import io
import re
import shutil
import subprocess

import numpy as np
import polars as pl
import pytest
from conftest import ROOT
from test_normalised import BOOT, sums, text

from pipeline import normalised, paper_table, summary
from pipeline.compute import calibration, compute_rows
from pipeline.normalised import normalised_rows
from pipeline.paper_table import (
    DEFAULT,
    LABELS,
    as_csv,
    as_latex,
    as_markdown,
    check_columns,
    heading,
    known_columns,
    rounded,
    tokens_of,
)

HOOK = "blocks.1.hook_resid_pre"
METRICS = dict.fromkeys(("model", "corpus", "experiment", "hook", "sae"), pl.String) | {"layer": pl.Int64}
METRICS |= normalised.ROWS
ODD = "a_b&c|d"


def metric(sae: str, name: str, value, width=None, **changes) -> dict:
    """A row of `metrics`, its interval `width` to each side; `name` is that of a column."""
    bare, _, baseline = name.rstrip("]").partition("[")
    ends = {} if width is None else {"value_low": value - width, "value_high": value + width}
    row = {"model": "tiny", "corpus": "story", "experiment": "main", "hook": HOOK, "sae": sae, "layer": 1}
    row |= {"intervention": "sae", "metric": bare, "baseline": baseline or None, "value": value, "unit": "nats"}
    return row | ends | changes


def some(*rows: dict) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=METRICS)


def described(*names: str, **changes) -> pl.DataFrame:
    """The table of SAEs: an L0 of 20.25 within 1.5, 512 features, of which 0.012345 never fired."""
    row = {"model": "tiny", "corpus": "story", "architecture": "relu", "hook": HOOK, "layer": 1, "n_tokens": 1500}
    row |= {"d_in": 64, "d_sae": 512, "dead_features": 0.012345}
    row |= {"l0_mean": 20.25, "l0_mean_low": 18.75, "l0_mean_high": 21.75}
    row |= {"explained_variance": 0.91234, "explained_variance_low": 0.91, "explained_variance_high": 0.915}
    return pl.DataFrame([row | {"sae": name} | changes for name in names], schema=summary.SAES)


TWO = some(
    metric("late", "nats_lost", 0.3, 0.02),
    metric("late", "loss_recovered[zero]", 0.9, 0.004),
    metric("late", "loss_recovered[mean]", 0.7),
    metric("early", "nats_lost", -0.0123, 0.0345),
    metric("early", "nats_lost", 7.0, intervention="zero"),
)
COLUMNS = ("l0", "nats_lost", "loss_recovered[zero]", "d_sae")
FOUND = paper_table.paper_table(TWO, described("early", "late"), COLUMNS)


def test_a_row_per_sae_in_the_order_of_the_metrics():
    assert FOUND.columns == [*LABELS, *(name + end for name in COLUMNS for end in ("", "_low", "_high"))]
    assert set(FOUND.dtypes[7:]) == {pl.Float64}
    assert FOUND.select(*LABELS).rows() == [
        ("tiny", "story", "main", sae, HOOK, 1, "relu") for sae in ("late", "early")
    ]
    late, early = FOUND.select(pl.exclude(LABELS)).rows()
    assert late == pytest.approx((20.25, 18.75, 21.75, 0.3, 0.28, 0.32, 0.9, 0.896, 0.904, 512, None, None))
    assert early[3:6] == pytest.approx((-0.0123, -0.0468, 0.0222))
    assert early[6:] == (None, None, None, 512, None, None)


def test_an_sae_has_a_row_per_model_corpus_and_experiment_with_the_numbers_of_that_corpus():
    places = [{}, {"experiment": "other"}, {"corpus": "letters"}, {"model": "big"}]
    rows = some(*(metric("a", "kl", 0.1 * i, **place) for i, place in enumerate(places)))
    saes = pl.concat([described("a", "b"), described("a", corpus="letters", l0_mean=9.0, architecture="topk")])
    found = paper_table.paper_table(rows, saes, ["kl", "l0"])
    assert found["kl"].to_list() == pytest.approx([0, 0.1, 0.2, 0.3])
    assert found["l0"].to_list() == [20.25, 20.25, 9, None]
    assert found["architecture"].to_list() == ["relu", "relu", "topk", None]
    shown = as_markdown(found, 0.95)
    assert "| model | corpus | experiment | architecture | KL (nats) | L0 |" in shown
    assert f"SAE: a; hook: {HOOK}; layer: 1. Values" in shown.replace("\\", "")


def test_a_column_that_no_row_has_is_null():
    found = paper_table.paper_table(TWO, described("late").drop("dead_features"), ["kl_score[mean]", "dead_features"])
    assert found.select(pl.exclude(LABELS)).dtypes == [pl.Float64] * 6
    assert found.select(pl.exclude(LABELS)).null_count().row(0) == (2,) * 6


def test_what_is_not_finite_is_null():
    found = paper_table.paper_table(some(metric("a", "kl", np.nan), metric("b", "kl", np.inf)), described(), ["kl"])
    assert found["kl"].to_list() == [None, None]


def test_an_sae_with_two_numbers_for_one_cell_is_refused():
    with pytest.raises(ValueError, match=r"several numbers for .*sae 'late', .*name 'nats_lost', expected one"):
        paper_table.paper_table(pl.concat([TWO, TWO]), described("late"), COLUMNS)
    with pytest.raises(ValueError, match=r"several numbers for .*sae 'late', expected one"):
        paper_table.paper_table(TWO, described("late", "late"), COLUMNS)
    with pytest.raises(ValueError, match="has 'l0' twice, expected it once"):
        paper_table.paper_table(TWO, described("late"), ["l0", "l0"])


def measured() -> tuple[pl.DataFrame, list[str]]:
    """What one SAE has of all metrics, and the names of the calibrations."""
    files = sorted((ROOT / "calibrations").glob("*.csv"))
    laws = [calibration(path.read_text(), path.stem, 20, 0.95, 0) for path in files]
    losses = {name: sums(3.3 if name == "sae" else 6.0, 0.2) for name in ("sae", "eps_random", *normalised.BASELINES)}
    texts = {name: text(7.0) for name in ("uniform", "unigram", "bigram")}
    rows = pl.concat([normalised_rows(losses, texts, BOOT), compute_rows(losses, laws, BOOT)])
    labels = {"model": "tiny", "corpus": "story", "experiment": "main", "hook": HOOK, "sae": "a"}
    return rows.with_columns(**{name: pl.lit(value) for name, value in labels.items()}, layer=1), [
        law.name for law in laws
    ]


def test_all_that_is_measured_can_be_a_column_and_nothing_else_can():
    rows, laws = measured()
    names = {f"{name}[{base}]" if base else name for name, base in rows.select("metric", "baseline").rows()}
    assert "effective_compute[Kaplan 2020]" in names
    known = known_columns(laws)
    assert len(known) == len(set(known))
    assert names == set(known) - set(paper_table.SAES)
    found = paper_table.paper_table(rows, described("a"), known)
    named = pl.concat_str("metric", pl.format("[{}]", "baseline"), ignore_nulls=True)
    own = rows.filter(pl.col("intervention") == "sae").select(named, "value", "value_low", "value_high").rows()
    assert [(name, *found.select(name, f"{name}_low", f"{name}_high").row(0)) for name, *_ in own] == own
    numbers = {name.removesuffix("_mean") for name, kind in summary.SAES.items() if kind != pl.String}
    ends = {name for name in numbers if name.endswith(("_low", "_high"))}
    assert set(paper_table.SAES) == numbers - ends - {"layer", "n_tokens"}


def test_names_are_checked_beforehand():
    check_columns(DEFAULT)
    check_columns(["effective_compute[Kaplan 2020]", "l0"], ["Kaplan 2020"])
    with pytest.raises(
        ValueError, match=r"Unknown column .* 'loss_recoverd\[zero\]'. Did you mean 'loss_recovered\[ze"
    ):
        check_columns(["l0", "loss_recoverd[zero]"])
    for wrong in ("loss_recovered", "kl[zero]", "kl_ratio[zero]", "l0_mean", "sae", "effective_compute[Kaplan 2020]"):
        with pytest.raises(ValueError, match=re.escape(f"'{wrong}'")) as error:
            check_columns([wrong], ["Chinchilla"])
        for name in ("l0", "nats_lost", "loss_recovered[bigram]", "effective_compute[Chinchilla]"):
            assert name in str(error.value).split("Known: ")[1]
    with pytest.raises(ValueError, match="has 'kl' twice"):
        check_columns(["kl", "l0", "kl"])


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        # Two significant digits of the half-width: 0.02 ends at the third place, 1.5 at the first.
        ((0.3, 0.28, 0.32), ("0.300", "0.280", "0.320")),
        ((20.25, 18.75, 21.75), ("20.2", "18.8", "21.8")),
        ((0.3, 0.16, 0.44), ("0.30", "0.16", "0.44")),
        ((0.5, 0.44, 0.56), ("0.500", "0.440", "0.560")),
        # 0.0996 is 0.10 to two digits.
        ((0.0996, 0.0, 0.1992), ("0.10", "0.00", "0.20")),
        # Four significant digits of the value at most, however narrow the interval.
        ((0.123456, 0.123455, 0.123457), ("0.1235", "0.1235", "0.1235")),
        ((12.34567, 12.34566, 12.34568), ("12.35", "12.35", "12.35")),
        ((12345.6, 12340.0, 12352.0), ("12350", "12340", "12350")),
        ((0.99996, 0.99995, 0.99997), ("1.000", "1.000", "1.000")),
        ((2.0, 2.0, 2.0), ("2.000", "2.000", "2.000")),
        # Wide ones take digits away, before the point too.
        ((1234.0, 234.0, 2234.0), ("1200", "200", "2200")),
        # Three without an interval.
        ((0.123456, None, None), ("0.123", None, None)),
        ((0.5, None, None), ("0.500", None, None)),
        ((54321.0, None, None), ("54300", None, None)),
        # With one end, its distance is the half-width.
        ((0.51234, 0.25, None), ("0.51", "0.25", None)),
        ((0.51234, None, 0.51434), ("0.5123", None, "0.5143")),
        # Signs, and none of a zero.
        ((-0.0123, -0.0468, 0.0222), ("-0.012", "-0.047", "0.022")),
        ((-0.0004, -0.05, 0.0492), ("0.000", "-0.050", "0.049")),
        ((0.0, -0.02, 0.02), ("0.000", "-0.020", "0.020")),
        ((0.0, None, None), ("0", None, None)),
        ((0.0, 0.0, 0.0), ("0", "0", "0")),
        # Powers of ten where all are small, or one is large.
        ((3.21e-7, 1.11e-7, 5.31e-7), ("3.2e-7", "1.1e-7", "5.3e-7")),
        ((1e-7, None, None), ("1.00e-7", None, None)),
        ((0.0, -3e-7, 3e-7), ("0", "-3.0e-7", "3.0e-7")),
        ((1234567.0, 1200000.0, 1300000.0), ("1.235e6", "1.200e6", "1.300e6")),
        ((1e-9, -0.02, 0.02), ("0.000", "-0.020", "0.020")),
    ],
)
def test_the_digits_are_those_that_the_interval_supports(numbers, expected):
    assert tuple(rounded(*numbers)) == expected


def test_headings_are_words_with_units():
    said = {name: heading(name) for name in ("l0", "nats_lost", "kl", "loss_recovered[zero]", "sae", "other[x]")}
    assert said == {
        "l0": "L0",
        "nats_lost": "nats lost",
        "kl": "KL (nats)",
        "loss_recovered[zero]": "loss recovered (zero)",
        "sae": "SAE",
        "other[x]": "other (x)",
    }
    assert heading("effective_compute[Kaplan 2020]") == "effective compute (Kaplan 2020)"
    assert all(heading(name) != name for name in known_columns(["x"]))


def test_csv_keeps_every_digit_and_every_column():
    found = pl.read_csv(io.StringIO(as_csv(FOUND)))
    assert found.columns == FOUND.columns
    assert found.cast(dict(FOUND.schema)).equals(FOUND)
    odd = paper_table.paper_table(some(metric('x,"y"', "kl", 1 / 3)), described('x,"y"'), ["kl"])
    again = pl.read_csv(io.StringIO(as_csv(odd)))
    assert (again["sae"][0], again["kl"][0]) == ('x,"y"', 1 / 3)


SHARED_LABELS = f"Model: tiny; corpus: story; experiment: main; hook: {HOOK}; layer: 1; architecture: relu."


def test_markdown_by_hand():
    assert as_markdown(FOUND, 0.95, 1500).splitlines() == [
        f"{SHARED_LABELS} Values with 95 % intervals in brackets, over 1,500 tokens.",
        "",
        "| SAE | L0 | nats lost | loss recovered (zero) | features |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| late | 20.2 [18.8, 21.8] | 0.300 [0.280, 0.320] | 0.9000 [0.8960, 0.9040] | 512 |",
        "| early | 20.2 [18.8, 21.8] | -0.012 [-0.047, 0.022] | – | 512 |",
    ]


def test_latex_by_hand():
    shared = SHARED_LABELS.replace("_", r"\_")
    assert as_latex(FOUND, 0.9, 1500).splitlines() == [
        r"% Needs \usepackage{booktabs}.",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{shared} Values with 90 \% intervals in brackets, over 1,500 tokens.}}",
        r"\begin{tabular}{lrrrr}",
        r"\toprule",
        r"SAE & L0 & nats lost & loss recovered (zero) & features \\",
        r"\midrule",
        r"late & 20.2 [18.8, 21.8] & 0.300 [0.280, 0.320] & 0.9000 [0.8960, 0.9040] & 512 \\",
        r"early & 20.2 [18.8, 21.8] & $-0.012$ [$-0.047$, 0.022] & -- & 512 \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def test_the_caption_says_what_is_known_and_refuses_a_confidence_in_percent():
    assert "Values with 99.9 % intervals in brackets.\n" in as_markdown(FOUND, 0.999)
    for writer in (as_markdown, as_latex):
        with pytest.raises(ValueError, match=r"confidence is 95\.0, expected a share between 0 and 1"):
            writer(FOUND, 95.0)


def test_counts_are_whole_and_one_end_has_a_dash_for_the_other():
    rows = some(metric("a", "kl", 0.51234) | {"value_low": 0.25}, metric("b", "kl", 3.2e-7))
    found = paper_table.paper_table(rows, described("a", "b", d_sae=123456), ["kl", "d_sae", "dead_features"])
    assert "| a | 0.51 [0.25, –] | 123456 | 0.0123 |" in as_markdown(found, 0.95)
    assert "| b | 3.20e-7 |" in as_markdown(found, 0.95)
    assert "a & 0.51 [0.25, --] &" in as_latex(found, 0.95)
    assert r"b & $3.20 \times 10^{-7}$ &" in as_latex(found, 0.95)


def test_a_single_row_keeps_the_name_of_its_sae():
    found = paper_table.paper_table(some(metric("only", "kl", 0.5)), described("only"), ["kl"])
    assert as_markdown(found, 0.95).splitlines()[2:] == ["| SAE | KL (nats) |", "| --- | ---: |", "| only | 0.500 |"]


def cells(latex: str) -> list[int]:
    """Of each line of the table, how many `&` are no letters."""
    body = latex.split(r"\toprule")[1].split(r"\bottomrule")[0]
    return [len(re.findall(r"(?<!\\)&", line)) for line in body.splitlines() if line.endswith(r"\\")]


def balanced(latex: str) -> bool:
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", latex):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


NAMES = (ODD, r"50%#$^~\x{y}", "[first]", "*star", "a--b", "<i>|", " two\nlines ", "__all__", "[a](b) `c`", "}{")


def odd_table() -> pl.DataFrame:
    rows = [metric(name, column, -0.5, 0.1) for name in NAMES for column in ("nats_lost", "effective_compute[50%_&]")]
    return paper_table.paper_table(some(*rows), described(*NAMES), ["l0", "nats_lost", "effective_compute[50%_&]"])


def test_no_name_breaks_latex():
    latex = as_latex(odd_table(), 0.95)
    assert cells(latex) == [3] * (len(NAMES) + 1)
    assert balanced(latex)
    assert r"effective compute (50\%\_\&) \\" in latex
    firsts = [line.split(" & ")[0] for line in latex.splitlines() if line.endswith(r"\\")][1:]
    assert firsts == [
        r"a\_b\&c\textbar{}d",
        r"50\%\#\$\textasciicircum{}\textasciitilde{}\textbackslash{}x\{y\}",
        "{[}first]",  # after \\ a bracket or a star would be read as its argument
        "{*}star",
        "a-{}-b",
        r"\textless{}i\textgreater{}\textbar{}",
        "two lines",
        r"\_\_all\_\_",
        "{[}a](b) `c`",
        r"\}\{",
    ]


def test_no_name_breaks_markdown():
    lines = as_markdown(odd_table(), 0.95).splitlines()[2:]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {5}
    firsts = [re.split(r" (?<!\\)\| ", line.removeprefix("| "))[0] for line in lines[2:]]
    assert firsts == [
        r"a_b&c\|d",
        r"50%#\$^\~\\x{y}",
        r"\[first\]",
        r"\*star",
        "a--b",
        r"\<i>\|",
        "two lines",
        r"\_\_all\_\_",
        r"\[a\](b) \`c\`",
        "}{",
    ]


@pytest.mark.parametrize("columns", [DEFAULT, []])
def test_an_empty_table_has_its_headings_alone(columns):
    found = paper_table.paper_table(some(), described(), columns)
    assert found.shape == (0, 7 + 3 * len(columns))
    assert set(found.dtypes[7:]) <= {pl.Float64}
    assert len(as_csv(found).splitlines()) == 1
    assert as_markdown(found, 0.95).splitlines()[0] == "Values with 95 % intervals in brackets."
    assert len(as_markdown(found, 0.95).splitlines()) == 4
    assert cells(as_latex(found, 0.95)) == [6 + len(columns)]
    assert tokens_of(found, described()) is None


def test_the_number_of_tokens_is_said_where_it_is_one():
    assert tokens_of(FOUND, described("early", "late")) == 1500
    assert tokens_of(FOUND, pl.concat([described("early"), described("late", n_tokens=99)])) is None
    assert tokens_of(FOUND, described("late")) is None


COMPILERS = [name for name in ("pdflatex", "lualatex", "tectonic") if shutil.which(name)]


@pytest.mark.skipif(not COMPILERS, reason="no pdflatex, lualatex or tectonic is installed")
def test_latex_compiles(tmp_path):
    body = as_latex(odd_table(), 0.95, 1500) + as_latex(FOUND, 0.95)
    head = r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs}\begin{document}"
    (tmp_path / "page.tex").write_text(f"{head}\n{body}\\end{{document}}\n")
    options = [] if COMPILERS[0] == "tectonic" else ["-interaction=nonstopmode", "-halt-on-error"]
    ran = subprocess.run([COMPILERS[0], *options, "page.tex"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:]
