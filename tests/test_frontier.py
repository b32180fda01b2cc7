"""Frontiers: points, fits with both kinds of intervals, files; every degenerate input has a message or a null."""

import math

import numpy as np
import polars as pl
import pytest
from conftest import SHARED

from pipeline import frontier
from pipeline.fits import Scatter
from pipeline.frontier import FITS, Replicates
from pipeline.statistics import Bootstrap

L0 = np.array([8, 12, 20, 35, 60, 100, 180, 300], dtype=float)
FEW = Scatter(samples=200)
CSV = "family,l0,ce,clean,baseline\na,10,3.5,3,8\na,20,3.2,3,8\nb,10,3.4,3,8\n"


def table(l0, hit, family="a", clean=3.0, base=13.0) -> pl.DataFrame:
    """SAEs of one family by their hits; 10 nats between the clean loss and the baseline's."""
    names = [f"{family} {i}" for i in range(len(l0))]
    columns = {
        "family": family,
        "sae": names,
        "l0": [None if each is None else float(each) for each in l0],
        "ce": clean + (base - clean) * np.array(hit, float),
    }
    return pl.DataFrame(columns).with_columns(ce_clean=pl.lit(clean), ce_base=pl.lit(base))


def only(rows: pl.DataFrame, model: str, family: str = "a") -> dict:
    (row,) = rows.filter(pl.col("curve") == model, pl.col("family") == family).rows(named=True)
    return row


def hill(l0, x_half=0.2, k=1.3):
    return 1 / (1 + (x_half * l0) ** k)


def test_points_by_hand():
    found = frontier.points(table([10, 20, 40], [0.3, 0.4, 0.1]))
    assert found["x"].to_list() == [0.1, 0.05, 0.025]
    assert found["nats_lost"].to_list() == pytest.approx([3, 4, 1])
    assert found["hit"].to_list() == pytest.approx([0.3, 0.4, 0.1])
    assert found["pareto"].to_list() == [True, False, True]
    wide = table([10, 20], [0.3, 0.1]).with_columns(d=768, kl=0.5)
    assert frontier.points(wide, relative=True)["x"].to_list() == [76.8, 38.4]
    assert frontier.points(wide).columns == [*wide.columns, "x", "hit", "nats_lost", "pareto"]


def test_pareto_optimal_is_within_the_family_and_ties_go_to_the_smaller():
    both = pl.concat([table([10, 10, 20, 20], [0.3, 0.4, 0.3, 0.2]), table([5, 5], [0.1, 0.1], "b")])
    # Same L0 with a larger loss, and same loss with a larger L0, are beaten; two equal SAEs do not beat each other.
    assert frontier.points(both)["pareto"].to_list() == [True, False, False, True, True, True]


def test_points_without_an_l0_a_loss_or_a_baseline_are_null():
    found = frontier.points(
        table([0, None, 10, 20, 30], [0.1, 0.1, None, 0.2, 0.1]).with_columns(
            ce_base=pl.Series([13.0, 13, 13, 3, 2])  # the last two are no worse than the clean run
        )
    )
    assert found["x"].to_list() == [None, None, 0.1, 0.05, pytest.approx(1 / 30)]
    assert found["hit"].to_list() == [pytest.approx(0.1), pytest.approx(0.1), None, None, None]
    assert found["pareto"].to_list() == [False, False, False, True, True]
    rows = frontier.fit(found, FEW, "all")
    assert rows["n"].to_list() == [0] * 4
    assert only(rows, "linear")["warning"] == "5 of 5 points left out: no hit; no fit: 0 points for 2 parameters"


def test_fits_have_their_columns_and_recover_a_frontier():
    noisy = hill(L0) * np.exp(np.random.default_rng(0).normal(0, 0.05, L0.shape))
    both = pl.concat([table(L0, noisy), table(L0, hill(L0, 0.5, 1), "b")])
    rows = frontier.fit(both, FEW)
    assert dict(rows.schema) == FITS
    assert rows["family"].to_list() == ["a"] * 4 + ["b"] * 4
    row = only(rows, "hill")
    assert row["x_half_low"] < 0.2 < row["x_half_high"]
    assert row["k_low"] < 1.3 < row["k_high"]
    assert (row["n"], row["n_left_out"], row["errors"], row["points"]) == (8, 0, "log_hit", "pareto")
    assert row["aicc"] == min(rows.filter(pl.col("family") == "a")["aicc"])
    assert "x_half = 0.2" in row["warning"]
    assert "lies outside the data, x = 0.00333 to 0.125" in row["warning"]
    assert only(rows, "hill_1", "b")["x_half"] == pytest.approx(0.5, rel=1e-6)


def test_the_choice_of_points():
    some = table([10, 20, 30, 40], [0.4, 0.3, 0.9, 0.2])
    assert only(frontier.fit(some, FEW), "linear")["n"] == 3
    assert only(frontier.fit(some, FEW, "all"), "linear")["n"] == 4
    with pytest.raises(ValueError, match=r"Unknown choice of points 'best'. Known: pareto, all"):
        frontier.fit(some, FEW, "best")


def test_x_half_is_dimensionless_where_l0_is():
    wide = table(L0, hill(L0)).with_columns(d=100)
    assert only(frontier.fit(wide, FEW, relative=True), "hill")["x_half"] == pytest.approx(20)
    with pytest.raises(ValueError, match="and lacks d"):
        frontier.fit(wide.drop("d"), FEW, relative=True)
    with pytest.raises(ValueError, match="width d of some SAEs is missing or not positive"):
        frontier.fit(wide.with_columns(d=pl.Series([0] + [5] * 7)), FEW, relative=True)


def test_a_loss_below_the_clean_one_is_left_out_of_logarithms_only():
    rows = frontier.fit(table([10, 20, 30, 40], [0.3, 0.2, 0.1, -0.05]), FEW)
    assert (only(rows, "linear")["n"], only(rows, "linear")["warning"]) == (4, None)
    for model in ("power", "hill_1", "hill"):
        row = only(rows, model)
        assert (row["n"], row["n_left_out"]) == (3, 1)
        assert row["warning"].startswith("1 of 4 points left out: no hit above 0 to take the logarithm of")


def test_one_and_two_points_and_equal_l0_say_what_is_missing():
    one = frontier.fit(table([10], [0.3]), FEW)
    assert only(one, "linear")["warning"] == only(one, "hill")["warning"] == "no fit: 1 point for 2 parameters"
    assert only(one, "hill_1")["x_half"] == pytest.approx(0.1 * 0.7 / 0.3)
    assert "1 point for 1 parameter: the curve goes through" in only(one, "hill_1")["warning"]
    two = only(frontier.fit(table([10, 20], [0.3, 0.2]), FEW), "hill")
    assert two["converged"]
    assert [two[name] for name in ("aicc", "loo", "loo_hit", "k_low", "k_high", "x_half_low")] == [None] * 6
    assert "2 points for 2 parameters" in two["warning"]
    same = only(frontier.fit(table([10, 10, 10], [0.3, 0.2, 0.1]), FEW, "all"), "power")
    assert (same["converged"], same["warning"]) == (False, "no fit: all points have the same L0")
    assert [same[name] for name in ("a", "k", "aicc")] == [None] * 3


def test_no_number_of_any_degenerate_table_is_infinite_or_absurd():
    cases = {
        "falling": ([10, 20, 30, 40], [0.1, 0.2, 0.3, 0.4]),
        "flat": ([10, 20, 30, 40], [0.2, 0.2, 0.2, 0.2]),
        "no harm": ([10, 20, 30], [0.0, 0.0, 0.0]),
        "below": ([10, 20, 30], [-0.1, -0.2, -0.3]),
        "worse than the baseline": ([10, 20, 30, 40], [1.5, 1.4, 1.2, 1.1]),
        "at the baseline": ([10, 20, 30, 40], [1.0, 1.0, 1.0, 1.0]),
        "three": ([10, 11, 300], [0.5, 0.1, 0.3]),
        "close": ([10, 10.000001, 10.000002], [0.1, 0.3, 0.2]),
        "tiny": ([10, 100, 1000], [1e-9, 1e-10, 1e-12]),
    }
    for name, (l0, hit) in cases.items():
        rows = frontier.fit(table(l0, hit), FEW, "all")
        numbers = rows.select(pl.col(pl.Float64)).to_numpy().ravel()
        numbers = numbers[~np.isnan(numbers)]
        assert np.isfinite(numbers).all(), name
        assert (np.abs(numbers) < 1e9).all(), (name, numbers)
    assert (
        "the hit does not rise with 1/L0" in only(frontier.fit(table(*cases["falling"]), FEW, "all"), "hill")["warning"]
    )
    above = only(frontier.fit(table(*cases["worse than the baseline"]), FEW, "all"), "hill_1")
    assert above["x_half"] is None
    assert above["warning"]


def test_the_curve_of_a_row_is_what_was_fitted():
    rows = frontier.fit(table(L0, hill(L0, 0.4, 1)), FEW)
    for model in ("hill_1", "hill"):
        assert frontier.curve(only(rows, model), 1 / L0) == pytest.approx(hill(L0, 0.4, 1), rel=1e-6)
    line = frontier.fit(table(L0, 0.5 / L0 + 0.01), FEW)
    assert frontier.curve(only(line, "linear"), 1 / L0) == pytest.approx(0.5 / L0 + 0.01)
    power = frontier.fit(table(L0, 0.5 * L0**-0.7), FEW)
    assert frontier.curve(only(power, "power"), 1 / L0) == pytest.approx(0.5 * L0**-0.7)
    assert np.isnan(frontier.curve(only(frontier.fit(table([5], [0.1]), FEW), "hill"), 1 / L0)).all()


def measured(seed: int, sequences=60, samples=200, **kinds) -> tuple[pl.DataFrame, Replicates]:
    """Losses of sequences about the hits of some families, which share a factor of the sequence; of one Bootstrap."""
    generator = np.random.default_rng(seed)
    boot = Bootstrap.over(sequences, samples, 0.95, seed)
    hits = np.concatenate(list(kinds.values()))
    clean = 3 + generator.normal(0, 0.5, (sequences, 1))
    factor = np.exp(generator.normal(0, 0.4, (sequences, 1)) - 0.08)
    own = np.exp(generator.normal(0, 0.3, (sequences, len(hits))) - 0.045)
    columns = {"l0": np.tile(L0, len(kinds)) * np.exp(generator.normal(-0.005, 0.1, (sequences, len(hits))))}
    columns |= {
        "ce": clean + 10 * hits * factor * own,
        "ce_clean": clean + 0 * own,
        "ce_base": clean + 10 * factor + 0 * own,
    }
    values = {name: boot.replicates(column, np.ones_like(column)) for name, column in columns.items()}
    names = np.repeat(list(kinds), len(L0))
    estimates = {name: column[0] for name, column in values.items()}
    return pl.DataFrame({"family": names, "sae": names} | estimates), Replicates(values, 0.95)


# 150 studies: a coverage of 95 % is seen within 5.3 %, three standard errors; percentile intervals of 60 sequences
# whose losses are as skewed as here hold the truth 2 % less often than they say (500 studies: 92.6 and 92.8 %).
def test_intervals_over_sequences_cover_as_often_as_they_say():
    held = []
    for study in range(150):
        row = only(frontier.fit(*measured(study, a=hill(L0, 0.6, 0.9)), "all"), "hill")
        held.append([row["x_half_low"] <= 0.6 <= row["x_half_high"], row["k_low"] <= 0.9 <= row["k_high"]])
    assert np.mean(held, axis=0) == pytest.approx(0.95, abs=0.053)


def test_replicates_must_be_those_of_the_table():
    some, replicates = measured(0, a=hill(L0))
    with pytest.raises(ValueError, match="The first replicate of 'l0' is not the table's column"):
        frontier.fit(some.reverse(), replicates)
    with pytest.raises(
        ValueError, match=r"Replicates of 'l0' have the shape \(201, 8\), expected \(replicates, 7 SAEs\)"
    ):
        frontier.fit(some[:7], replicates)
    with pytest.raises(ValueError, match="Replicates of 'kl' have none"):
        frontier.fit(some.with_columns(kl=0.1), replicates)
    with pytest.raises(ValueError, match="and lacks ce_base"):
        frontier.fit(some.drop("ce_base"), replicates)


def test_a_single_sequence_gives_no_interval():
    row = only(frontier.fit(*measured(0, sequences=1, a=hill(L0))), "linear")
    assert row["m"] is not None
    assert (row["m_low"], row["m_high"]) == (None, None)


def written(path, text):
    (path / "some.csv").write_text(text)
    return path / "some.csv"


def test_a_file_is_a_table(tmp_path):
    found = frontier.read_csv(written(tmp_path, CSV))
    assert found.rows() == [
        ("a", 10, 3.5, 3, 8, "line 2"),
        ("a", 20, 3.2, 3, 8, "line 3"),
        ("b", 10, 3.4, 3, 8, "line 4"),
    ]
    assert found.columns == ["family", "l0", "ce", "ce_clean", "ce_base", "sae"]
    assert frontier.read_csv(tmp_path / "some.csv", families=["b"])["sae"].to_list() == ["line 4"]
    other = written(tmp_path, "arch,sae,l0,ce,clean,zero,kl,more\n x , s1,10,3.5,3,8,0.4,?\n")
    found = frontier.read_csv(other, {"family": "arch", "baseline": "zero"})
    assert found.row(0, named=True) == {
        "family": "x",
        "sae": "s1",
        "l0": 10,
        "ce": 3.5,
        "ce_clean": 3,
        "ce_base": 8,
        "kl": 0.4,
    }


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("baseline\n", "zero\n", "has columns family, l0, ce, clean, zero, and lacks baseline. Say in `names`"),
        ("a,20,3.2", "a,twenty,3.2", "line 3: 'l0' is 'twenty', expected a number."),
        ("a,20,3.2", "a,,3.2", "line 3: 'l0' is '', expected a number."),
        ("a,20,3.2", "a,20,nan", "line 3: 'ce' is 'nan', expected a number."),
        ("a,20,3.2", "a,inf,3.2", "line 3: 'l0' is 'inf', expected a number."),
        ("a,20,3.2", "a,0,3.2", "line 3: 'l0' is 0, expected more than 0."),
        ("a,20,3.2", "a,20,-1", "line 3: 'ce' is -1, expected 0 or more."),
        ("a,20,3.2", ",20,3.2", "line 3: there is no name of a family."),
        ("b,10,3.4,3,8", "b,10,3.4,3,3", "line 4: the baseline is 3, expected more than the clean loss, 3:"),
        ("b,10,3.4,3,8", "b,10,3.4,3,8,9,10", "is no table of comma-separated values"),
        (CSV[28:], "", "has a header and no line below it"),
        (CSV, "", "is no table of comma-separated values"),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path, before, after, message):
    path = written(tmp_path, CSV.replace(before, after))
    with pytest.raises(ValueError) as error:
        frontier.read_csv(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_unknown_families_and_names_of_columns_are_refused(tmp_path):
    path = written(tmp_path, CSV)
    with pytest.raises(ValueError, match=r"has no families c. Known: a, b."):
        frontier.read_csv(path, families=["a", "c"])
    with pytest.raises(ValueError, match=r"Unknown names of columns: base. Known: family, sae, l0"):
        frontier.read_csv(path, {"base": "baseline"})


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.exists(), reason=f"the published numbers are not at {SHARED}")
def test_the_published_gemma_frontiers_are_read_and_fitted():
    path = SHARED / "reference/gated_resid20.csv"
    published = frontier.read_csv(path, {"family": "arch", "baseline": "zero"})
    rows = frontier.fit(published, FEW)
    assert (only(rows, "linear", "baseline")["n"], only(rows, "linear", "gated")["n"]) == (6, 10)
    assert round(only(rows, "linear", "baseline")["m"] / only(rows, "linear", "gated")["m"], 2) == 2.77
    assert round(only(rows, "hill", "baseline")["k"] / only(rows, "hill", "gated")["k"], 2) == 1.27
    assert math.isclose(only(rows, "hill", "gated")["x_half"], 7.6257, rel_tol=1e-4)


def test_a_file_is_read_by_its_very_name_and_a_column_there_twice_is_refused(tmp_path):
    line = "family,l0,ce,clean,baseline\n{},10,3.1,3,5\n"
    for name in ("d1.csv", "d[1].csv"):
        (tmp_path / name).write_text(line.format(name[:2]))
    assert frontier.read_csv(tmp_path / "d[1].csv")["family"].to_list() == ["d["]
    (tmp_path / "twice.csv").write_text("family,family,l0,ce,clean,baseline\na,b,10,3.1,3,5\n")
    with pytest.raises(ValueError, match="has the column family twice"):
        frontier.read_csv(tmp_path / "twice.csv")
