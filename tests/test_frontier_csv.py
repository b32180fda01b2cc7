"""The command line for a CSV of SAEs: its three files, what it prints, and one line for whatever is wrong."""

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from conftest import ROOT, SHARED
from polars.testing import assert_frame_equal

from pipeline import families, frontier
from pipeline.fits import MODELS, Scatter
from pipeline.frontier_csv import main

# Hits of 3 / L0, 1 / L0 and 2 / L0, of 10 nats between the clean loss and the baseline's.
SLOPES = {"a": 3, "b": 1, "c": 2}
L0 = (10, 20, 50, 100)
CSV = "family,l0,ce,clean,baseline\n" + "".join(
    f"{name},{l0},{3 + 10 * slope / l0},3,13\n" for name, slope in SLOPES.items() for l0 in L0
)
FILES = ("factors.csv", "fits.csv", "points.csv")


@pytest.fixture
def data(tmp_path) -> Path:
    (tmp_path / "data.csv").write_text(CSV)
    return tmp_path / "data.csv"


def table(folder: Path, name: str, schema=None) -> pl.DataFrame:
    return pl.read_csv(folder / f"{name}.csv", schema=schema, infer_schema_length=None)


def only(rows: pl.DataFrame, **where) -> dict:
    (row,) = rows.filter(**where).rows(named=True)
    return row


def refused(capsys, *arguments) -> str:
    """The line that is printed for a wrong command, after nothing else."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("error: ").rstrip("\n")


def test_the_files_hold_what_the_functions_give(data, tmp_path):
    assert main([str(data), "--samples", "50", "--seed", "3", "--at", "30", "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == list(FILES)
    read, scatter = frontier.read_csv(data), Scatter(50, 0.95, 3)
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    factors = [families.compare(read, *pair, scatter, at=[30.0]) for pair in pairs]
    expected = {"points": frontier.points(read), "fits": frontier.fit(read, scatter), "factors": pl.concat(factors)}
    for name, frame in expected.items():
        assert_frame_equal(table(tmp_path / "out", name, frame.schema), frame, check_exact=True)


def test_slopes_by_hand(data, tmp_path):
    assert main([str(data), "--samples", "50", "--out", str(tmp_path / "deep" / "out")]) == 0
    fits, factors = (table(tmp_path / "deep" / "out", name) for name in ("fits", "factors"))
    assert {name: only(fits, family=name, curve="linear")["m"] for name in SLOPES} == pytest.approx(SLOPES)
    ratios = factors.filter(quantity="slope_ratio").select("first", "second", "value").rows()
    assert [row[:2] for row in ratios] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [row[2] for row in ratios] == pytest.approx([3, 1.5, 0.5])
    assert set(fits["points"]) == {"pareto"}


def test_chosen_families_are_compared_with_the_first(data, tmp_path):
    out = tmp_path / "out"
    assert main([str(data), "--families", "c", "b", "a", "--samples", "50", "--out", str(out)]) == 0
    assert table(out, "factors").select("first", "second").unique(maintain_order=True).rows() == [
        ("c", "b"),
        ("c", "a"),
    ]
    assert main([str(data), "--families", "b", "--samples", "50", "--out", str(out)]) == 0
    assert table(out, "points")["family"].unique().to_list() == ["b"]
    assert table(out, "factors", families.SCHEMA).is_empty()


def test_options_reach_the_functions(tmp_path):
    lines = [f"{name},{l0},{3 + 10 * k / l0},3,13,100" for name, k in SLOPES.items() for l0 in L0]
    beaten = "a,200,9,3,13,100"
    path, out = tmp_path / "other.csv", tmp_path / "out"
    path.write_text("\n".join(["arch,l0,ce,clean,zero,d", *lines, beaten]) + "\n")
    given = [str(path), "--names", "family=arch", "baseline=zero", "--out", str(out), "--samples", "100"]
    assert main([*given, "--points", "all", "--relative", "--at", "0.3", "0.6"]) == 0
    row = only(table(out, "fits"), family="a", curve="linear")
    assert (row["points"], row["n"]) == ("all", 5)
    assert table(out, "points")["x"][0] == 10
    assert table(out, "factors")["l0"].unique().drop_nulls().to_list() == [0.3, 0.6]
    wide, seeds = [], []
    for confidence, seed in (("0.5", "0"), ("0.99", "0"), ("0.99", "1")):
        assert main([*given, "--points", "all", "--confidence", confidence, "--seed", seed]) == 0
        row = only(table(out, "fits"), family="a", curve="linear")
        wide.append(row["m_high"] - row["m_low"])
        seeds.append(row["m_low"])
    assert wide[0] < wide[1] / 2
    assert seeds[1] != seeds[2]
    assert row["n"] == 5
    assert main(given) == 0
    assert only(table(out, "fits"), family="a", curve="linear")["n"] == 4


def test_the_main_numbers_are_printed(data, tmp_path, capsys):
    noisy = CSV.replace("b,100,3.1,", "b,100,3.12,")
    data.write_text(noisy + "d,10,4,3,13\n")
    given = [str(data), "--families", "a", "b", "d", "--samples", "200", "--at", "20", "--out", str(tmp_path / "out")]
    assert main(given) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].split() == ["family", "curve", "points", "parameters", "AICc", "loo", "loo", "of", "the", "hit"]
    assert [line.split()[:3] for line in lines if line.split()[:1] == ["b"]] == [["b", name, "4"] for name in MODELS]
    fits, factors = (table(tmp_path / "out", name) for name in ("fits", "factors"))
    row = only(fits, family="b", curve="hill_1")
    line = next(line for line in lines if line.startswith("b       hill_1"))
    assert f"x_half = {row['x_half']:.3g} [{row['x_half_low']:.3g}, {row['x_half_high']:.3g}]" in line
    assert line.split()[-3:] == [f"{row['aicc']:.1f}", f"{row['loo']:.3g}", f"{row['loo_hit']:.3g}"]
    below = lines[lines.index(line) + 1]
    assert below == f"    {row['warning']}"
    assert "d       linear  1 pareto  c = –, m = –" in printed
    assert "    no fit: 1 point for 2 parameters" in lines
    ratio = only(factors, second="b", quantity="slope_ratio")
    (line,) = (line.split() for line in lines if line.startswith("a : b     linear"))
    assert line[4:6] == ["slope_ratio", f"{ratio['value']:.3g}"]
    assert "nats_lost  loss_ratio at L0 = 20 " in printed
    assert all(line == line.rstrip() for line in lines)


def test_a_second_run_replaces_the_first_and_leaves_other_files_alone(data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert main([str(data), "--samples", "50", "--out", str(out)]) == 0
    first = (out / "fits.csv").read_text()
    assert main([str(data), "--samples", "50", "--points", "all", "--out", str(out)]) == 0
    assert (out / "fits.csv").read_text() == first.replace(",pareto,", ",all,")
    assert sorted(path.name for path in out.iterdir()) == [*FILES[:2], "notes.txt", FILES[2]]
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_ours_is_not_overwritten(data, tmp_path, capsys, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("family,l0\nmine,1\n")
    assert f"out/{name} does not come from here, expected a header with '" in refused(capsys, data, "--out", out)
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_text() == "family,l0\nmine,1\n"


def test_the_data_are_not_overwritten(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(data), "--samples", "50", "--out", str(out)]) == 0
    before = (out / "points.csv").read_text()
    given = (out / "points.csv", "--names", "clean=ce_clean", "baseline=ce_base", "--families", "a", "--out")
    assert "points.csv is the data itself, and would be overwritten" in refused(capsys, *given, out)
    assert (out / "points.csv").read_text() == before
    assert main([str(argument) for argument in (*given, tmp_path / "again", "--samples", "50")]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CSV.replace("a,20,", "a,twenty,"), "data.csv, line 3: 'l0' is 'twenty', expected a number."),
        (CSV.replace("clean", "before"), "has columns family, l0, ce, before, baseline, and lacks clean."),
        ("family,l0,ce,clean,baseline\n", "has a header and no line below it"),
        ("", "is no table of comma-separated values"),
        (CSV.replace("b,10,4.0,3,13", "b,10,4.0,3,13,5,6"), "is no table of comma-separated values: found more fields"),
        (CSV.replace("b,10,4.0,3,13", "b,10,4.0,3,2"), "line 6: the baseline is 2, expected more than the clean"),
        ("family,l0,ce,clean,baseline\n\xff,1,2,3,4\n", "is no table of comma-separated values: invalid utf-8"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, capsys, text, message):
    (tmp_path / "data.csv").write_text(text, encoding="latin-1")
    assert message in refused(capsys, tmp_path / "data.csv", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--points", "best"], "argument --points: invalid choice: 'best' (choose from 'pareto', 'all'). Ask for"),
        (["--samples", "0"], "--samples is 0, expected 1 or more."),
        (["--samples", "many"], "argument --samples: invalid int value: 'many'. Ask for --help."),
        (["--confidence", "95"], "--confidence is 95, expected a share between 0 and 1, as 0.95."),
        (["--names", "arch"], "--names has 'arch', expected names like family=arch, each once."),
        (["--names", "family=family", "family=l0"], "--names has 'family=l0', expected names like"),
        (["--names", "base=zero"], "Unknown names of columns: base. Known: family, sae, l0"),
        (["--families", "a", "z"], "has no families z. Known: a, b, c."),
        (["--families", "a", "a"], "Asked to compare 'a' and 'a', expected two of the families a."),
        (["--at", "0"], "Asked to compare at an L0 of 0.0, expected a positive number."),
        (["--relative"], "The table of SAEs has columns family, l0, ce, ce_clean, ce_base, sae, and lacks d."),
        (["--colour", "red"], "unrecognized arguments: --colour red. Ask for --help."),
    ],
)
def test_a_wrong_option_is_one_line(data, tmp_path, capsys, options, message):
    assert message in refused(capsys, data, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_there_and_folders_that_are_none(data, tmp_path, capsys):
    assert refused(capsys, tmp_path / "no.csv", "--out", tmp_path / "out").endswith(
        "no.csv is no file, expected a CSV with a line per SAE."
    )
    assert "is no file" in refused(capsys, tmp_path, "--out", tmp_path / "out")
    assert "data.csv is a file, expected a folder for the results" in refused(capsys, data, "--out", data)
    assert "Not a directory" in refused(capsys, data, "--samples", 20, "--out", data / "below")
    assert "the following arguments are required: data, --out" in refused(capsys)


def test_as_a_command(data, tmp_path):
    command = [sys.executable, "-m", "pipeline.frontier_csv", str(data), "--samples", "20"]
    ran = subprocess.run([*command, "--out", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "a : b     linear     slope_ratio" in ran.stdout
    assert all((tmp_path / "out" / name).is_file() for name in FILES)
    ran = subprocess.run([*command, "--out", str(data)], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"error: {data} is a file, expected a folder for the results. Give another --out.\n"


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.exists(), reason=f"the published numbers are not at {SHARED}")
def test_the_published_factors_between_gemma_saes(tmp_path, capsys):
    path, names = SHARED / "reference/gated_resid20.csv", ["--names", "family=arch", "baseline=zero"]
    assert main([str(path), *names, "--families", "baseline", "gated", "--out", str(tmp_path / "out")]) == 0
    factors = table(tmp_path / "out", "factors")
    slope, k = only(factors, quantity="slope_ratio"), only(factors, quantity="k_ratio", curve="hill")
    assert (round(slope["value"], 2), round(k["value"], 2)) == (2.77, 1.27)
    assert slope["value_low"] < 2.77 < slope["value_high"]
    assert k["value_low"] < 1.27 < k["value_high"]
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["linear", "slope_ratio", "2.77"] in [words[3:6] for words in printed]
    assert ["hill", "k_ratio", "1.27"] in [words[3:6] for words in printed]
