"""The rows of the summary, against numbers worked out by hand from two short sequences."""

from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from tables import HOOK, INTERVALS, PLACE, POINTS, arrays, call, table, tokens

from pipeline import moments, summary

# Two sequences of four tokens. The first token of each is special, and so is the second of the second; the last has no
# next token. Ordinary are five: 1, 2, 3 of the first and 2, 3 of the second.
SPECIAL = [[1, 0, 0, 0], [1, 1, 0, 0]]
NONE = np.nan
CE_CLEAN = [[1, 2, 3, NONE], [1, 1, 2, NONE]]
SAE = (
    [[8, 1, 2, 3], [8, 4, 5, 9]],
    [[5, 2.5, 5, NONE], [2, 2, 2.5, NONE]],
    [[0, 1, 0, 1], [0, 0, 1, 1]],
)
EPS = ([[4, 2, 2, 1], [2, 4, 1, 2]], CE_CLEAN, [[1, 1, 1, 1], [1, 1, 1, 1]])
CONTROL = (np.zeros((2, 4)), CE_CLEAN, np.ones((2, 4)))
VALUES = {"sae": SAE, "eps_random": EPS, "identity": CONTROL}
COLUMNS = {*PLACE, "intervention", "tokens", "n_tokens", *POINTS, *INTERVALS}
COLUMNS |= {name + end for name in INTERVALS for end in ("_low", "_high")}


def summarise(folder, **inputs):
    """The tables of effects and of SAEs that the stage writes. The tokens are those of the inputs' folder."""
    inputs = {"tokens": [folder / "tokens.h5"]} | inputs
    outputs = [folder / "effects.parquet", folder / "saes.parquet"]
    summary.work(call(outputs, inputs))
    return tuple(map(pl.read_parquet, outputs))


def rows(found, intervention, kind):
    (row,) = found.filter(intervention=intervention, tokens=kind).rows(named=True)
    return row


def close(row, **expected):
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-9), name


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("effects")
    return summarise(folder, effects=[table(folder / "0.parquet", SPECIAL, CE_CLEAN, VALUES)])[0]


def test_a_study_without_an_experiment_of_every_token_gives_tables_of_no_rows(tmp_path, found):
    table(tmp_path / "0.parquet", SPECIAL, CE_CLEAN, VALUES)  # for the tokens beside it
    effects, saes = summarise(tmp_path)
    assert (effects.height, saes.height) == (0, 0)
    assert effects.schema == found.schema
    assert {"sae", "l0_mean", "l0_mean_low", "explained_variance"} <= set(saes.columns)


def test_every_column_is_there_and_every_row_says_what_it_is_of(found):
    assert set(found.columns) >= COLUMNS
    assert found.select(*PLACE).unique().rows(named=True) == [PLACE]
    assert found["layer"].unique().to_list() == [1]
    kinds = [(intervention, kind) for intervention in VALUES for kind in ("all", "ordinary")]
    assert sorted(found.select("intervention", "tokens").rows()) == sorted(kinds)


def test_ordinary_leaves_special_tokens_out(found):
    # KL: 1, 2, 3, 5 and 9; the quantiles are between the fourth and the fifth, at 3.6, 3.96 and 3.996 of 0 to 4.
    row = rows(found, "sae", "ordinary")
    close(row, n_tokens=5, kl_mean=4, kl_median=3, kl_p90=7.4, kl_p99=8.84, kl_p999=8.984, top1_agreement=0.8)


def test_all_keeps_them(found):
    row = rows(found, "sae", "all")
    close(row, n_tokens=8, kl_mean=5, kl_median=4.5, kl_p90=8.3, top1_agreement=0.5, kl_ratio=40 / 18)


def test_tokens_without_a_next_one_count_for_kl_and_not_for_cross_entropy(found):
    row = rows(found, "sae", "ordinary")
    close(row, ce_mean=10 / 3, ce_clean_mean=7 / 3, delta_ce_mean=1, delta_ce_median=0.5)
    row = rows(found, "sae", "all")
    close(row, ce_mean=19 / 6, ce_clean_mean=10 / 6, delta_ce_mean=1.5, delta_ce_median=1)


def test_the_kl_ratio_is_a_ratio_of_means_and_not_a_mean_of_ratios(found):
    close(rows(found, "sae", "ordinary"), kl_ratio=4 / 1.6)  # per token it would be 2.8, per sequence 2.93
    close(rows(found, "eps_random", "ordinary"), kl_ratio=1, kl_ratio_low=1, kl_ratio_high=1)
    close(rows(found, "identity", "ordinary"), kl_ratio=0, kl_mean=0, top1_agreement=1, delta_ce_mean=0)


def test_intervals_go_from_one_sequence_alone_to_the_other(found):
    # A quarter of the resamples is the first sequence twice and a quarter the second: more than an interval's tails.
    row = rows(found, "sae", "ordinary")
    close(row, kl_mean_low=2, kl_mean_high=7, kl_ratio_low=6 / 5, kl_ratio_high=14 / 3)
    close(row, ce_mean_low=2.5, ce_mean_high=3.75, ce_clean_mean_low=2, ce_clean_mean_high=2.5)
    close(row, delta_ce_mean_low=0.5, delta_ce_mean_high=1.25, top1_agreement_low=2 / 3, top1_agreement_high=1)


def test_ablations_have_no_sae_and_no_ratio(tmp_path):
    zero = {"zero": SAE, "identity": CONTROL}
    made = {
        "effects": [table(tmp_path / "a.parquet", SPECIAL, CE_CLEAN, VALUES)],
        "ablations": [table(tmp_path / "b.parquet", SPECIAL, CE_CLEAN, zero, sae=None)],
    }
    found = summarise(tmp_path, **made)[0]
    row = rows(found.filter(pl.col("sae").is_null()), "zero", "ordinary")
    assert row["sae"] is None
    assert [row[f"kl_ratio{end}"] for end in ("", "_low", "_high")] == [None] * 3
    close(row, kl_mean=4, kl_mean_low=2, kl_mean_high=7)
    assert found["sae"].null_count() == 4


@pytest.mark.parametrize("sae", [None, "early"])
def test_a_study_of_one_kind_of_table_is_summarised(tmp_path, sae):
    role = "effects" if sae else "ablations"
    path = table(tmp_path / "0.parquet", SPECIAL, CE_CLEAN, {"zero": SAE}, sae=sae)
    effects, saes = summarise(tmp_path, **{role: [path]})
    assert (len(effects), len(saes)) == (2, 0)
    assert set(effects.columns) >= COLUMNS


def test_a_baseline_without_any_effect_gives_no_ratio(tmp_path):
    path = table(tmp_path / "0.parquet", SPECIAL, CE_CLEAN, {"sae": SAE, "eps_random": CONTROL})
    assert rows(summarise(tmp_path, effects=[path])[0], "sae", "ordinary")["kl_ratio"] is None


def shards(folder, special, ce_clean, values):
    """The same numbers in two files, the later sequences first."""
    parts = []
    for first in (1, 0):
        cut = {name: [value[first : first + 1] for value in triple] for name, triple in values.items()}
        parts += [table(folder / f"{first}.parquet", special, ce_clean[first : first + 1], cut, first=first)]
    return parts


def test_two_shards_give_the_same_rows_as_one_in_whatever_order(tmp_path, found):
    again = summarise(tmp_path, effects=shards(tmp_path, SPECIAL, CE_CLEAN, VALUES))[0]
    assert again.sort("intervention", "tokens").equals(found.sort("intervention", "tokens"), null_equal=True)


def test_a_missing_shard_is_an_error_and_not_a_smaller_mean(tmp_path):
    paths = shards(tmp_path, SPECIAL, CE_CLEAN, VALUES)
    with pytest.raises(ValueError, match=r"4 rows.*expected 8.*Delete"):
        summarise(tmp_path, effects=paths[:1])


def test_each_sae_hook_corpus_and_experiment_has_rows_of_its_own(tmp_path):
    others = [{}, {"sae": "late"}, {"experiment": "second"}, {"hook": "blocks.2.hook_resid_pre", "sae": "later"}]
    paths = [table(tmp_path / f"{i}.parquet", SPECIAL, CE_CLEAN, VALUES, **place) for i, place in enumerate(others)]
    found = summarise(tmp_path, effects=paths)[0]
    assert found.select(*PLACE).unique().height == len(others)
    assert len(found) == 6 * len(others)
    assert found.filter(sae="later")["layer"].unique().to_list() == [2]


# SAEs: six sequences of five tokens, the first of each special and of a norm that would swamp the others.

ORDINARY = 6 * 4


def activation(mean):
    """`seq pos d`, around `mean`."""
    x = np.random.default_rng(0).normal(mean, 1, (6, 5, 3)).astype(np.float32)
    x[:, 0] = 3000
    return x


def fit(folder, x, x_hat, cuts=(0, 6), counts=(1, 1, 1, 1), **per_token):
    """The row of an SAE that turns x into x_hat, with the moments that the stage `moments` finds for x."""
    special = np.zeros(x.shape[:2], bool)
    special[:, 0] = True
    paths = {"tokens": [tokens(folder, special)]}
    paths["activations"] = [arrays(folder / "x.h5", "seq pos d", {"activation": x}, first=0)]
    key = {"model": "tiny", "corpus": "story", "hook": HOOK}
    moments.work(call([folder / "moments.h5"], paths, key))
    sides = {"norm": x, "sae_norm": x_hat, "eps": x_hat - x}
    values = {name: np.linalg.norm(side, axis=-1).astype(np.float32) for name, side in sides.items()}
    values |= {name: np.ones(x.shape[:2], np.float32) for name in ("l0", "l1", "cos")} | per_token
    parts, labels = [], {"read": HOOK, "write": HOOK, "architecture": "topk", "d_in": x.shape[-1], "sae": "early"}
    for i, (first, last) in enumerate(pairwise(cuts)):
        path, part = folder / f"{i}.h5", {name: value[first:last] for name, value in values.items()}
        part["feature_count"] = np.array(counts) * (i == 0)
        axes = dict.fromkeys(values, "seq pos") | {"feature_count": "feature"}
        parts += [arrays(path, axes, part, first=first, **labels, model="tiny", corpus="story")]
    (row,) = summarise(folder, moments=[folder / "moments.h5"], scores=parts)[1].rows(named=True)
    return row


def ends(row, name):
    return [row[name], row[f"{name}_low"], row[f"{name}_high"]]


@pytest.mark.parametrize("mean", [0, 5, 500])
def test_the_corpus_mean_explains_no_variance_however_far_it_is_from_zero(tmp_path, mean):
    x = activation(mean)
    x_hat = np.broadcast_to(x[:, 1:].mean((0, 1), dtype=np.float64), x.shape)
    np.testing.assert_allclose(ends(fit(tmp_path, x, x_hat), "explained_variance"), 0, atol=1e-6)


@pytest.mark.parametrize("mean", [0, 500])
def test_x_itself_explains_all_variance(tmp_path, mean):
    assert ends(fit(tmp_path, activation(mean), activation(mean)), "explained_variance") == [1, 1, 1]


def test_explained_variance_is_what_the_definition_says(tmp_path):
    x = activation(5)
    x_hat = x + np.random.default_rng(1).normal(0, 0.5, x.shape).astype(np.float32)
    ordinary, made = x[:, 1:].reshape(-1, 3).astype(np.float64), x_hat[:, 1:].reshape(-1, 3)
    expected = 1 - ((ordinary - made) ** 2).sum() / ((ordinary - ordinary.mean(0)) ** 2).sum()
    value, low, high = ends(fit(tmp_path, x, x_hat), "explained_variance")
    assert value == pytest.approx(expected, rel=1e-5)
    assert low < value < high


def test_numbers_of_an_sae_are_means_over_ordinary_tokens(tmp_path):
    l0 = np.tile(np.float32([900, 1, 2, 3, 6]), (6, 1))
    row = fit(tmp_path, 2 * activation(5), activation(5), l0=l0, l1=2 * l0, cos=l0 / 1000)
    close(row, n_tokens=ORDINARY, d_in=3, d_sae=4, l0_mean=3, l1_mean=6)
    assert row["cos_mean"] == pytest.approx(0.003)
    assert ends(row, "norm_ratio") == pytest.approx([0.5] * 3)
    assert [row[name] for name in ("hook", "hook_in", "layer", "sae", "model")] == [HOOK, HOOK, 1, "early", "tiny"]


def test_a_feature_is_dead_when_it_never_fires_and_dense_above_a_tenth_of_the_tokens(tmp_path):
    row = fit(tmp_path, activation(0), activation(0), counts=(0, 1, 2, 3, 24))  # a tenth are 2.4
    assert (row["dead_features"], row["dense_features"]) == (1 / 5, 2 / 5)


def test_two_shards_of_scores_give_the_same_row_as_one(tmp_path):
    x = activation(5)
    x_hat, l0 = x * np.linspace(0.5, 1, 5, dtype=np.float32)[None, :, None], np.arange(30.0, dtype=np.float32)
    one, two = (fit(tmp_path, x, x_hat, cuts, l0=l0.reshape(6, 5)) for cuts in ((0, 6), (0, 4, 6)))
    assert one == two


@pytest.mark.parametrize("last", [1, 4])  # numpy would repeat a single sequence to stand for all
def test_a_missing_shard_of_scores_is_an_error(tmp_path, last):
    with pytest.raises(ValueError, match="expected"):
        fit(tmp_path, activation(5), activation(5), cuts=(0, last))
