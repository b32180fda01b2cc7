"""Metrics of every SAE from its table of tokens, the ablations at its hook and the text; verdicts; families.

The small tables are of three sequences of four tokens. Special are the first of each and the second of the second:
eight ordinary tokens have a KL, five of them a loss. What must not count is 99.
"""

import math
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from tables import HOOK, PLACE
from token_tables import part

from pipeline import families, frontier, labels, metric_tables, normalised, store
from pipeline.compute import calibration, compute_rows
from pipeline.fits import Scatter
from pipeline.frontier import Replicates
from pipeline.grouping import grouped
from pipeline.metric_tables import component, families_of, metric_rows, of_a_head, text_losses
from pipeline.normalised import Sums, normalised_rows
from pipeline.statistics import Bootstrap

LATE = "blocks.2.hook_resid_pre"
SPECIAL = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
FOLLOWED = ~SPECIAL & (np.arange(4) < 3)
TOKENS = np.array([[7, 0, 1, 2], [7, 7, 0, 1], [7, 0, 3, 4]], np.int32)
LABELS = ["model", "corpus", "experiment", "hook", "sae", "layer"]
HEAD = "# name: {}\n# kind: law\n# source: s\n# corpus: c\n# lowest_flop: {}\n# highest_flop: {}\nparameter,value\n"


def law(*header):
    return calibration(HEAD.format(*header) + "scale_flop,1e20\nexponent,0.5\nfloor,0.1\n", "file", 1, 0.95, 0)


# The second is of losses from 0.13 to 0.42.
LAW, NARROW = law("law", "none", "none"), law("narrow", 1e21, 1e23)


def boot(table) -> Bootstrap:
    return Bootstrap.over(table["sequence"].n_unique(), 200, 0.95, 0)


def losses(*values):
    """`seq pos` of the five losses; the last position has none."""
    found = np.full(SPECIAL.shape, 99.0)
    found[FOLLOWED], found[:, 3] = values, np.nan
    return found


def kl(*values):
    """`seq pos` of the eight KLs."""
    found = np.full(SPECIAL.shape, 99.0)
    found[~SPECIAL] = values
    return found


CLEAN = np.nan_to_num(losses(0.5, 1, 0.5, 0.25, 0.75), nan=99.0)  # 3: 0.6 of each
# (KL, loss) by intervention. Sums: the SAE 1 and 3.5, the decoder's bias 8 and 8, two draws of noise 0.5 and 3.25.
OF_SAE = {
    "identity": [(kl(*[0] * 8), losses(0.5, 1, 0.5, 0.25, 0.75))],
    "sae": [(kl(0.5, 0, 0.25, 0, 0.125, 0.125, 0, 0), losses(1, 0.75, 0.75, 0.25, 0.75))],
    "eps_random": [
        (kl(0.25, 0, 0, 0, 0, 0, 0, 0), losses(0.5, 1, 0.5, 0.5, 0.75)),
        (kl(0, 0, 0, 0.25, 0.25, 0.25, 0, 0), losses(0.5, 1, 0.75, 0.25, 0.75)),
    ],
    "decoder_bias": [(kl(*[1] * 8), losses(2, 1, 1, 2, 2))],
}
# The zero ablation at the hook of the first SAE: 16 and 13; at that of the second: 4 and 5.5; elsewhere much more.
EARLY_ZERO = {"zero": [(kl(4, 1, 1, 1, 4, 1, 1, 3), losses(2, 3, 4, 2, 2))]}
LATE_ZERO = {"zero": [(kl(*[0.5] * 8), losses(1, 1, 1.5, 1, 1))]}
OTHER_ZERO = {"zero": [(kl(*[50] * 8), losses(*[50] * 5))]}


def rows_of(values, **columns) -> pl.DataFrame:
    """The per-token table of (KL, loss) by intervention and draw."""
    shared = {"special": SPECIAL, "ce_clean": CLEAN} | columns
    return pl.concat(
        part(name, of_kl, draw, ce=ce, **shared)
        for name, draws in values.items()
        for draw, (of_kl, ce) in enumerate(draws)
    )


def written(folder, table, shards=1, **place):
    """The files of a table, its sequences cut into shards; a `sae` of None makes it one of ablations."""
    about, paths = {name: value for name, value in (PLACE | place).items() if value is not None}, []
    cuts = np.linspace(0, table["sequence"].max() + 1, shards + 1).astype(int)
    for start, stop in pairwise(cuts):
        rows = table.filter(pl.col("sequence").is_between(start, stop - 1))
        paths.append(folder / f"{len(list(folder.iterdir()))}.parquet")
        store.write_table(paths[-1], [rows.to_arrow()], "f00d", {}, **about)
    return paths


def text(folder):
    """The text of the corpus, and what predicts it: eight words, a smoothing of two."""
    axes, path = {"token": "seq pos", "special": "seq pos", "unigram": "v"}, folder / "tokens.h5"
    arrays = {"token": TOKENS, "special": SPECIAL, "unigram": np.arange(8)}
    shapes = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
    with store.new_arrays(path, "f00d", axes, shapes) as file:
        for name, array in arrays.items():
            file[name][:] = array
    return text_losses(path, 2.0)


@pytest.fixture(params=[1, 3], ids=["one file", "three shards"])
def shards(request):
    return request.param


@pytest.fixture
def study(tmp_path, shards):
    """Two SAEs at two hooks, and the ablation at each."""
    (tmp_path / "tables").mkdir()

    def made(values, **place):
        return written(tmp_path / "tables", rows_of(values), shards, **place)

    effects = [*made(OF_SAE), *made(OF_SAE, sae="late", hook=LATE)]
    ablations = [*made(OF_SAE | EARLY_ZERO, sae=None), *made(LATE_ZERO, sae=None, hook=LATE)]
    return effects, ablations, {("tiny", "story"): text(tmp_path)}, made


def found_of(effects, ablations, texts, laws=(LAW,)):
    return metric_rows(grouped(effects), grouped(ablations), texts, list(laws), boot)


def numbers(rows, sae):
    """(metric, baseline) -> value, of the SAE itself."""
    rows = rows.filter(pl.col("sae") == sae, pl.col("intervention") == "sae")
    return dict(zip(rows.select("metric", "baseline").rows(), rows["value"], strict=True))


def close(found, expected, tolerance=1e-6):
    """That a table has the columns of another, with their values."""
    assert len(found) == len(expected) > 0
    for name in expected.columns:
        if expected[name].dtype.is_float():
            both = found[name].to_numpy(), expected[name].to_numpy()
            np.testing.assert_allclose(*both, rtol=tolerance, atol=1e-12, err_msg=name)
        else:
            assert found[name].to_list() == expected[name].to_list(), name


# The unigrams of the five next tokens: one word twice, three once.
ENTROPY = (2 * math.log(5 / 2) + 3 * math.log(5)) / 5


def test_the_metrics_of_two_saes_by_hand(study):
    found = found_of(*study[:3])
    same = {
        ("nats_lost", None): 0.1,
        ("bits_lost", None): 0.1 / math.log(2),
        ("loss_added", None): 0.1 / 0.6,
        ("kl", None): 0.125,
        ("kl_ratio", "eps_random"): 2,
        ("loss_recovered", "decoder_bias"): 0.9,
        ("kl_score", "decoder_bias"): 0.875,
        ("loss_recovered", "uniform"): 1 - 0.1 / (math.log(8) - 0.6),
        ("loss_recovered", "unigram"): 1 - 0.1 / (ENTROPY - 0.6),
        ("effective_compute", "law"): (0.6 / 0.5) ** -2,
    }
    early, late = numbers(found, "early"), numbers(found, "late")
    assert {name: early[name] for name in same} == pytest.approx(same)
    assert {name: late[name] for name in same} == pytest.approx(same)
    # The same 0.1 nats are 5 % of what zero loses at one hook and 20 % at the other, the same KL 6.25 % and 25 %.
    zero = [("loss_recovered", "zero"), ("kl_score", "zero")]
    assert [early[name] for name in zero] == pytest.approx([0.95, 0.9375])
    assert [late[name] for name in zero] == pytest.approx([0.8, 0.75])
    assert set(early) == set(late) == {*same, *zero, ("loss_recovered", "bigram")}


def by_hand(intervention_values):
    """Sums of each sequence, from the arrays: draws averaged, special tokens and missing losses left out."""

    def pair(array, kept):
        return np.where(kept, array, 0).sum(1), kept.sum(1)

    found = {}
    for name, draws in intervention_values.items():
        of_kl, ce = (np.mean([draw[i] for draw in draws], axis=0) for i in (0, 1))
        found[name] = Sums(pair(of_kl, ~SPECIAL), pair(ce, FOLLOWED), pair(CLEAN, FOLLOWED))
    return found


def test_rows_and_intervals_are_those_of_the_sums_and_labelled(study):
    found, texts = found_of(*study[:3]), study[2]["tiny", "story"]
    resample = Bootstrap.over(3, 200, 0.95, 0)
    for sae, hook, layer, zero in (("early", HOOK, 1, EARLY_ZERO), ("late", LATE, 2, LATE_ZERO)):
        sums = by_hand(OF_SAE | zero)
        pair = {name: sums[name] for name in ("sae", "eps_random")}
        expected = pl.concat([normalised_rows(sums, texts, resample), compute_rows(pair, [LAW], resample)])
        own = found.filter(sae=sae)
        assert own.select(LABELS).unique().rows() == [("tiny", "story", "main", hook, sae, layer)]
        assert own.columns == [*LABELS, *normalised.ROWS]
        key = ["intervention", "metric", "baseline"]
        close(own.drop(LABELS).sort(key), expected.sort(key), 1e-9)
    (lost,) = found.filter(sae="early", intervention="sae", metric="nats_lost").rows(named=True)
    assert lost["value_low"] < 0.1 < lost["value_high"]


def test_effective_compute_is_of_the_sae_and_its_noise_alone_and_one_per_calibration(study):
    found = found_of(*study[:3])
    effective = found.filter(metric="effective_compute")
    assert set(effective["intervention"]) == {"sae", "eps_random"}
    assert "effective_compute" not in set(found_of(*study[:3], laws=[])["metric"])
    two = found_of(*study[:3], laws=[NARROW, LAW]).filter(metric="effective_compute", sae="late", intervention="sae")
    assert two.select("baseline", "value").rows() == [("narrow", None), ("law", pytest.approx((0.6 / 0.5) ** -2))]
    assert two["reason"].to_list() == ["the loss 0.6 is outside 0.132 to 0.416 nats, the range of narrow", None]


DECOYS = {
    "model": {"model": "big"},
    "corpus": {"corpus": "poems"},
    "experiment": {"experiment": "atlas"},
    "hook": {"hook": "blocks.1.hook_resid_mid"},
    "layer": {"hook": "blocks.3.hook_resid_pre"},
}


@pytest.mark.parametrize("place", DECOYS.values(), ids=DECOYS)
@pytest.mark.parametrize("first", [True, False])
def test_an_ablation_at_another_place_is_never_used(study, place, first):
    effects, ablations, texts, made = study
    decoy = made(OTHER_ZERO, sae=None, **place)
    both = [*decoy, *ablations] if first else [*ablations, *decoy]
    assert found_of(effects, both, texts).equals(found_of(effects, ablations, texts))
    alone = numbers(found_of(effects, decoy, texts), "early")
    assert {baseline for metric, baseline in alone if metric == "kl_score"} == {"decoder_bias"}
    assert ("loss_recovered", "zero") not in alone


def test_an_sae_without_ablations_or_noise_has_the_metrics_that_need_none(study):
    _, _, texts, made = study
    few = {name: OF_SAE[name] for name in ("identity", "sae")}
    found = numbers(found_of(made(few, sae="few"), [], texts), "few")
    names = {metric for metric, _ in found}
    assert names == {"nats_lost", "bits_lost", "loss_added", "kl", "loss_recovered", "effective_compute"}
    assert {baseline for _, baseline in found} == {None, "uniform", "unigram", "bigram", "law"}


def test_each_sae_is_beside_the_text_of_its_own_model_and_corpus(study):
    _, _, texts, made = study
    texts = texts | {("tiny", "poems"): {"uniform": (np.array([4.0, 2, 4]), np.array([2, 1, 2]))}}
    found = found_of([*made(OF_SAE, sae="a", corpus="poems"), *made(OF_SAE, sae="b")], [], texts)
    assert numbers(found, "a")["loss_recovered", "uniform"] == pytest.approx(1 - 0.1 / 1.4)
    assert ("loss_recovered", "unigram") not in numbers(found, "a")
    assert numbers(found, "b")["loss_recovered", "uniform"] == pytest.approx(1 - 0.1 / (math.log(8) - 0.6))


def test_ablations_of_other_tokens_are_refused(study):
    effects, _, texts, made = study
    fewer = {"zero": [(of_kl, np.where(TOKENS == 3, np.nan, ce)) for of_kl, ce in EARLY_ZERO["zero"]]}
    with pytest.raises(ValueError, match=r"has 4 tokens and .* 5, expected the same ones in every sequence"):
        found_of(effects, made(fewer, sae=None), texts)


def test_the_text_alone_is_predicted_by_its_words_and_pairs(tmp_path):
    found = text(tmp_path)
    assert list(found) == list(metric_tables.TEXT)
    assert [count.tolist() for _, count in found.values()] == [[2, 1, 2]] * 3
    assert found["uniform"][0].tolist() == pytest.approx([2 * math.log(8), math.log(8), 2 * math.log(8)])
    entropy = [math.log(5 / 2) + math.log(5), math.log(5 / 2), 2 * math.log(5)]
    assert found["unigram"][0].tolist() == pytest.approx(entropy)
    for smoothing in (2.0, 5.0):
        expected = normalised.bigram_cross_entropy(TOKENS, SPECIAL, smoothing)[0]
        assert text_losses(tmp_path / "tokens.h5", smoothing)["bigram"][0].tolist() == pytest.approx(expected.tolist())
    assert list(text_losses(tmp_path / "tokens.h5", None)) == ["uniform", "unigram"]


# What tables are read as.


def test_one_intervention_is_read_at_a_time(study):
    table = next(each for each in grouped(study[0]) if each.labels["sae"] == "early")
    assert table.interventions() == list(OF_SAE)
    for name in OF_SAE:
        own = table.read("intervention", "draw", "sequence", "kl", intervention=name)
        every = table.read("intervention", "draw", "sequence", "kl").filter(pl.col("intervention") == name)
        assert own.equals(every)
        assert set(own["intervention"]) == {name}
        assert len(own) == 12 * len(OF_SAE[name])
    assert table.read("intervention", "sequence", intervention="zero").is_empty()


def test_sequences_of_one_intervention_are_numbered_among_its_own(tmp_path):
    table = rows_of(OF_SAE).filter((pl.col("intervention").cast(pl.String) != "sae") | (pl.col("sequence") > 0))
    (found,) = grouped(written(tmp_path, table, 3))
    assert set(found.read("intervention", "sequence", intervention="sae")["sequence"]) == {0, 1}
    assert set(found.read("intervention", "sequence")["sequence"]) == {0, 1, 2}


# Verdicts.

ALIKE = {"bits_lost", "loss_added", "effective_compute[law]", "effective_compute[b]", "loss_recovered[uniform]"}
ALIKE |= {"loss_recovered[unigram]", "loss_recovered[bigram]"}
OWN = {"nats_lost", "kl", "kl_score[zero]", "kl_ratio[eps_random]", "loss_recovered[zero]", "loss_recovered[mean]"}


def measured(**changes) -> pl.DataFrame:
    """Four SAEs at two hooks by every metric: by nats a < b < c < d, by KL c < d < a < b; zero loses more at the hook
    of c and d, so that by the loss recovered against it they come first."""
    rows = []
    for i, sae in enumerate("abcd"):
        lost, of_kl, base = 0.1 + 0.1 * i, 0.1 + 0.1 * ((i + 2) % 4), 1 if i < 2 else 10
        found = {"nats_lost": lost, "bits_lost": lost / math.log(2), "loss_added": lost / 3, "kl": of_kl}
        found |= {"kl_score[zero]": 1 - of_kl / base, "kl_ratio[eps_random]": of_kl / (1 if i % 2 else 3)}
        found |= {"loss_recovered[zero]": 1 - lost / base, "loss_recovered[mean]": 1 - lost / (5 - i)}
        found |= {f"loss_recovered[{name}]": 1 - lost / 4 for name in ("uniform", "unigram", "bigram")}
        found |= {f"effective_compute[{name}]": (1 + lost) ** -5 for name in ("law", "b")}
        place = {"model": "tiny", "corpus": "story", "experiment": "main", "hook": HOOK if i < 2 else LATE, "sae": sae}
        for name, value in found.items():
            metric, _, baseline = name.rstrip("]").partition("[")
            row = place | {"layer": 1, "intervention": "sae", "metric": metric, "baseline": baseline or None}
            row |= {"value": value, "value_low": value - 0.001, "value_high": value + 0.001}
            rows.append(row | {"unit": normalised.UNITS[metric], "reason": None} | changes)
    return pl.DataFrame(rows, schema_overrides={"reason": pl.String})


def named(rows):
    return {*rows["metric_a"], *rows["metric_b"]}


def test_flips_leave_out_what_can_only_order_saes_as_nats_lost_does():
    found, plain = metric_tables.verdicts(measured()), normalised.verdicts(measured())
    assert named(plain.flips) == ALIKE | OWN  # of every metric there are flips, to leave out or to keep
    kept = plain.flips.filter(~pl.col("metric_a").is_in(list(ALIKE)), ~pl.col("metric_b").is_in(list(ALIKE)))
    assert found.flips.drop("model", "corpus", "experiment").equals(kept)
    assert named(found.flips) == OWN


def test_what_is_left_out_orders_no_two_saes_otherwise_than_nats_lost():
    flips, both = normalised.verdicts(measured()).flips, [*ALIKE, "nats_lost"]
    assert flips.filter(pl.col("metric_a").is_in(both), pl.col("metric_b").is_in(both)).is_empty()


def test_ranks_and_agreements_keep_every_metric():
    found, plain = metric_tables.verdicts(measured()), normalised.verdicts(measured())
    for name in ("ranks", "agreements"):
        rows = getattr(found, name)
        assert rows.columns[:3] == ["model", "corpus", "experiment"]
        assert rows.drop("model", "corpus", "experiment").equals(getattr(plain, name))
    assert set(found.ranks["metric"]) == ALIKE | OWN
    assert named(found.agreements) == ALIKE | OWN


@pytest.mark.parametrize("name", ["model", "corpus", "experiment"])
def test_verdicts_are_within_one_model_corpus_and_experiment(name):
    other = measured(**{name: "other"}).with_columns(value=-pl.col("value"))
    found = metric_tables.verdicts(pl.concat([measured(), other]))
    for given, rows in ((measured(), False), (other, True)):
        alone = metric_tables.verdicts(given)
        for table, expected in zip(found, alone, strict=True):
            assert table.filter((pl.col(name) == "other") == rows).equals(expected)


def test_verdicts_are_of_saes_and_not_of_ablations():
    every = pl.concat([measured(), measured(intervention="zero"), measured(intervention="eps_random")])
    for found, expected in zip(metric_tables.verdicts(every), metric_tables.verdicts(measured()), strict=True):
        assert found.equals(expected)


# Families.

L0 = {"TopK": (64, 4, 8, 16, 32), "L1": (6, 12, 24, 48, 50), "odd": (10, 20)}
LOST = {"TopK": (0.05, 1, 0.6, 0.3, 0.15), "L1": (1.2, 0.9, 0.5, 0.2, 0.4), "odd": (0.8, 0.7)}
MEMBERS = {family: tuple(f"{family} {l0}" for l0 in found) for family, found in L0.items()}
SEQUENCES, POSITIONS = 12, 5


def arrays_of(seed, l0, lost):
    """Columns, `seq pos`, of an intervention: its loss and KL rise by what is lost, more in some sequences."""
    rng, shape = np.random.default_rng(seed), (SEQUENCES, POSITIONS)
    special = np.zeros(shape, bool)
    special[:, 0] = special[3, 2] = True
    clean = np.random.default_rng(0).gamma(9, 1 / 3, shape)
    rise = lost * rng.gamma(4, 1 / 4, (SEQUENCES, 1)) * rng.gamma(4, 1 / 4, shape)
    found = {"ce_clean": clean, "ce": clean + rise, "kl": rise * rng.uniform(0.5, 1, shape)}
    found = {name: array.astype(np.float32) for name, array in found.items()}
    found["l0"] = (rng.uniform(0.5, 1.5, shape) * l0).astype(np.float32)
    found["ce"][special] = found["kl"][special] = found["l0"][special] = 99
    found["ce"][:, -1] = np.nan
    return found | {"special": special}


def of_family(family):
    pairs = enumerate(zip(MEMBERS[family], L0[family], LOST[family], strict=True))
    return {sae: arrays_of(sum(map(ord, family)) + i, l0, lost) for i, (sae, l0, lost) in pairs}


SAES = {sae: arrays for family in L0 for sae, arrays in of_family(family).items()}
SAES["L1 50"]["kl"] /= 100  # by nats lost, another of its family is better; by KL, none
BASES = {"zero": arrays_of(1, 1, 8.0), "decoder_bias": arrays_of(2, 1, 5.0)}
WORDS = (np.linspace(30, 60, 12), np.array([3] * 3 + [2] + [3] * 8))  # a baseline of the text
TEXTS = {("tiny", "story"): {"unigram": WORDS}}


def runs_of(arrays) -> pl.DataFrame:
    """The table of an SAE: its control, itself, noise, and its decoder's bias."""
    quiet = arrays | {"ce": arrays["ce_clean"] + 0 * arrays["ce"], "kl": 0 * arrays["kl"]}
    every = {"identity": quiet, "sae": arrays, "eps_random": arrays_of(3, 1, 0.1)}
    every["decoder_bias"] = BASES["decoder_bias"]
    return pl.concat(part(name, **(each | {"l0": arrays["l0"]})) for name, each in every.items())


def zero_of(arrays) -> pl.DataFrame:
    """The table of an ablation, which has no L0."""
    return part("zero", **arrays).drop("l0")


def sums_of(arrays, name):
    kept = ~arrays["special"] & (True if name in ("kl", "l0") else ~np.isnan(arrays["ce"]))
    return np.where(kept, arrays[name].astype(float), 0).sum(1), kept.sum(1)


def table_of(names, base, resample):
    """By hand: the table that `frontier` takes, and its replicates."""
    replicates, rows = {name: [] for name in ("l0", "ce", "ce_clean", "kl", "ce_base")}, []
    for sae in names:
        for name, found in replicates.items():
            found.append(resample.replicates(*(base if name == "ce_base" else sums_of(SAES[sae], name))))
        estimates = {name: found[-1][0] for name, found in replicates.items()}
        rows.append({"family": sae.split()[0], "sae": sae, "d": 16} | estimates)
    stacked = {name: np.stack(found, axis=1) for name, found in replicates.items()}
    return pl.DataFrame(rows), Replicates(stacked, resample.confidence)


def asked(members, **changes) -> dict:
    """The job's part of the configuration, as JSON brings it."""
    found = {"families": {name: list(saes) for name, saes in members.items()}, "baseline": "zero", "points": "pareto"}
    found |= {"relative": False, "matched": [], "widths": {sae: 16 for saes in members.values() for sae in saes}}
    return found | changes


@pytest.fixture(scope="module")
def frontiers(tmp_path_factory):
    """The tables of all SAEs, not in the order of their families, and of the ablations, among others."""
    folder = tmp_path_factory.mktemp("frontiers")
    effects = [path for sae in sorted(SAES) for path in written(folder, runs_of(SAES[sae]), 2, sae=sae)]
    effects += written(folder, runs_of(arrays_of(9, 30, 0.1)), sae="of no family")
    ablations = written(folder, zero_of(arrays_of(7, 1, 99.0)), sae=None, hook=LATE)
    ablations += written(folder, zero_of(BASES["zero"]), 2, sae=None)
    ablations += written(folder, zero_of(arrays_of(8, 1, 99.0)), sae=None, experiment="atlas")
    return grouped(effects), grouped(ablations)


BASE = {"unigram": WORDS} | {name: sums_of(arrays, "ce") for name, arrays in BASES.items()}
RESAMPLE = Bootstrap.over(SEQUENCES, 200, 0.95, 0)
# Baseline, points, relative, matched.
CASES = [("zero", "pareto", False, []), ("decoder_bias", "all", False, [10.0, 20.5]), ("unigram", "all", True, [0.5])]


@pytest.fixture(params=CASES, ids=lambda case: " ".join(map(str, case[:3])))
def case(request, frontiers):
    """What is found, what it must be made from, and how it was asked for."""
    members = {name: MEMBERS[name] for name in ("TopK", "odd", "L1")}
    given = asked(members, **dict(zip(("baseline", "points", "relative", "matched"), request.param, strict=True)))
    names = [sae for saes in members.values() for sae in saes]
    table = table_of(names, BASE[request.param[0]], RESAMPLE)
    return families_of(*frontiers, TEXTS, given, boot), *table, request.param


PLACED = ["model", "corpus", "experiment", "baseline", "relative"]


def labelled(rows, baseline, relative):
    assert rows.select(PLACED).unique().rows() == [("tiny", "story", "main", baseline, relative)]


def test_frontier_points_are_those_of_the_same_numbers_by_hand(case):
    found, table, _, (baseline, _, relative, _) = case
    rows = metric_tables.frontier_points(found)
    labelled(rows, baseline, relative)
    assert rows.columns[:5] == PLACED
    assert rows.select("hook", "layer").unique().rows() == [(HOOK, 1)]
    close(rows, frontier.points(table, relative=relative))
    assert 0 < rows["pareto"].sum() < len(rows)
    of_kl = frontier.points(table.with_columns(ce=pl.col("ce_clean") + pl.col("kl")))
    assert rows["pareto_kl"].to_list() == of_kl["pareto"].to_list() != rows["pareto"].to_list()


def test_intervals_of_frontier_points_are_of_paired_resamples_of_the_sequences(case):
    rows, replicates = metric_tables.frontier_points(case[0]), dict(case[2].values)
    replicates["nats_lost"] = replicates["ce"] - replicates["ce_clean"]
    replicates["hit"] = replicates["nats_lost"] / (replicates["ce_base"] - replicates["ce_clean"])
    for name, of_saes in replicates.items():
        expected = [vars(RESAMPLE.interval(one)) for one in of_saes.T]
        expected = pl.DataFrame(expected).rename({"value": name, "low": f"{name}_low", "high": f"{name}_high"})
        close(rows, expected)


def test_frontier_fits_are_those_of_the_same_numbers_in_both_kinds_of_intervals(case):
    found, table, replicates, (baseline, points, relative, _) = case
    rows = metric_tables.frontier_fits(found)
    labelled(rows, baseline, relative)
    kinds = {"sequences": replicates, "scatter": Scatter(200, 0.95)}
    assert rows["intervals"].unique(maintain_order=True).to_list() == list(kinds)
    for kind, resampling in kinds.items():
        close(rows.filter(intervals=kind), frontier.fit(table, resampling, points, relative))


def test_frontier_factors_are_of_every_two_families_in_the_order_of_the_configuration(case):
    found, table, replicates, (baseline, points, relative, matched) = case
    rows = metric_tables.frontier_factors(found)
    labelled(rows, baseline, relative)
    pairs = [("TopK", "odd"), ("TopK", "L1"), ("odd", "L1")]
    assert rows.select("first", "second").unique(maintain_order=True).rows() == pairs
    for kind, resampling in {"sequences": replicates, "scatter": Scatter(200, 0.95)}.items():
        for first, second in pairs:
            expected = families.compare(table, first, second, resampling, points, relative, matched)
            close(rows.filter(intervals=kind, first=first, second=second), expected)


def test_families_and_their_saes_are_in_the_order_of_the_configuration(frontiers):
    members = {"L1": MEMBERS["L1"][::-1], "TopK": MEMBERS["TopK"]}
    (found,) = families_of(frontiers[0][::-1], frontiers[1], TEXTS, asked(members), boot)
    assert found.table["sae"].to_list() == [*members["L1"], *members["TopK"]]
    assert found.table["family"].to_list() == ["L1"] * 5 + ["TopK"] * 5


def test_the_width_is_that_of_each_sae(frontiers):
    given = asked({"odd": MEMBERS["odd"]}, widths={"odd 10": 16, "odd 20": 64}, relative=True)
    rows = metric_tables.frontier_points(families_of(*frontiers, TEXTS, given, boot))
    assert rows["d"].to_list() == [16, 64]
    assert (rows["x"] * rows["l0"]).to_list() == pytest.approx([16, 64])


ONE, TWO = MEMBERS["odd"]


def test_a_baseline_is_that_of_the_hook_where_the_sae_writes(tmp_path):
    """Two families at two hooks, each with what zero loses there."""
    effects, ablations, expected = [], [], []
    for sae, hook, seed, lost in ((ONE, HOOK, 1, 8.0), (TWO, LATE, 2, 2.0)):
        zero = arrays_of(seed, 1, lost)
        effects += written(tmp_path, runs_of(SAES[sae]), sae=sae, hook=hook)
        ablations += written(tmp_path, zero_of(zero), sae=None, hook=hook)
        expected.append(np.divide(*map(np.sum, sums_of(zero, "ce"))))
    found = families_of(grouped(effects), grouped(ablations), TEXTS, asked({"a": [ONE], "b": [TWO]}), boot)
    rows = metric_tables.frontier_points(found)
    assert rows["ce_base"].to_list() == pytest.approx(expected)
    assert rows.select("hook", "layer").rows() == [(HOOK, 1), (LATE, 2)]


@pytest.mark.parametrize("name", ["model", "corpus", "experiment"])
def test_places_are_frontiers_of_their_own(tmp_path, name):
    effects, ablations = [], []
    for place, lost in (({}, 4.0), ({name: "other"}, 8.0)):
        ablations += written(tmp_path, zero_of(arrays_of(20, 1, lost)), sae=None, **place)
        effects += [path for sae in (ONE, TWO) for path in written(tmp_path, runs_of(SAES[sae]), sae=sae, **place)]
    texts = TEXTS | {("other", "story"): {}, ("tiny", "other"): {}}
    found = families_of(grouped(effects), grouped(ablations), texts, asked({"a": [ONE], "b": [TWO]}), boot)
    assert [each.labels[name] for each in found] == [PLACE[name], "other"]
    rows = metric_tables.frontier_points(found)
    assert rows["sae"].to_list() == [ONE, TWO] * 2
    assert rows["nats_lost"][:2].to_list() == rows["nats_lost"][2:].to_list()
    assert rows["hit"][:2].to_list() == pytest.approx((2 * rows["hit"][2:]).to_list())
    factors = metric_tables.frontier_factors(found)
    assert len(factors.filter(pl.col(name) == "other")) == len(factors) / 2 > 0


def test_one_family_has_nothing_to_be_compared_with_and_its_table_has_columns(frontiers):
    rows = metric_tables.frontier_factors(families_of(*frontiers, TEXTS, asked({"TopK": MEMBERS["TopK"]}), boot))
    assert rows.is_empty()
    assert rows.columns == ["model", "corpus", "experiment", "baseline", "relative", *families.SCHEMA, "intervals"]


# What is not defined is null, with a reason: nothing that is stored is infinite or no number.

NEVER = {"l0": np.zeros((SEQUENCES, POSITIONS), np.float32)}


def no_worse(sae, share):
    """An SAE whose loss is this share of the clean one; with 1 its KL is 0 too."""
    arrays = SAES[sae]
    loss = (share * arrays["ce_clean"] + 0 * arrays["ce"]).astype(np.float32)
    return arrays | {"ce": loss} | ({"kl": 0 * arrays["kl"]} if share == 1 else {})


DEGENERATE = {
    "one SAE": {ONE: SAES[ONE]},
    "an SAE better than the model": {ONE: no_worse(ONE, 0.9), TWO: SAES[TWO]},
    "SAEs as good as the model": {ONE: no_worse(ONE, 1), TWO: no_worse(TWO, 1)},
    "an SAE that never fires": {ONE: SAES[ONE] | NEVER, TWO: SAES[TWO]},
    "SAEs that never fire": {ONE: SAES[ONE] | NEVER, TWO: SAES[TWO] | NEVER},
    "SAEs of one L0": {ONE: SAES[ONE], TWO: SAES[TWO] | {"l0": SAES[ONE]["l0"]}},
    "one sequence": {ONE: SAES[ONE], TWO: SAES[TWO]},
}


def both_of(folder, saes, zero=BASES["zero"], sequences=SEQUENCES, **changes):
    """(families, metrics): these SAEs as one family, beside another one without fault."""

    def files(table, **place):
        return written(folder, table.filter(pl.col("sequence") < sequences), **place)

    rest = {sae: SAES[sae] for sae in MEMBERS["L1"][:3]}
    effects = [path for sae, arrays in (saes | rest).items() for path in files(runs_of(arrays), sae=sae)]
    effects, ablations = grouped(effects), grouped(files(zero_of(zero), sae=None))
    texts = {("tiny", "story"): {"unigram": tuple(column[:sequences] for column in WORDS)}}
    found = families_of(effects, ablations, texts, asked({"odd": saes, "L1": rest}, **changes), boot)
    return found, metric_rows(effects, ablations, texts, [LAW, NARROW], boot)


@pytest.fixture(params=DEGENERATE, ids=DEGENERATE)
def degenerate(request, tmp_path):
    """(Name, families, metrics)."""
    sequences = 1 if request.param == "one sequence" else SEQUENCES
    return request.param, *both_of(tmp_path, DEGENERATE[request.param], sequences=sequences, points="all")


def stored(rows):
    """The table, every number of which is finite."""
    for name in rows.columns:
        if rows[name].dtype.is_float():
            assert rows[name].drop_nulls().is_finite().all(), f"{name}: {rows[name].to_list()}"
    return rows


def test_no_metric_is_infinite_or_no_number_and_a_null_has_a_reason(degenerate):
    name, _, metrics = degenerate
    assert stored(metrics)["value"].is_null().equals(metrics["value"].is_null() & metrics["reason"].is_not_null())
    found = {name: value for name, value in numbers(metrics, ONE).items() if name[1] != "narrow"}
    assert None not in found.values()
    if name == "an SAE better than the model":
        assert (found["nats_lost", None] < 0, found["loss_recovered", "zero"] > 1) == (True, True)
        assert found["effective_compute", "law"] > 1
    if name == "SAEs as good as the model":
        assert (found["nats_lost", None], found["loss_recovered", "zero"], found["kl_score", "zero"]) == (0, 1, 1)
        assert found["effective_compute", "law"] == 1


def test_no_point_of_a_frontier_is_infinite_or_no_number(degenerate):
    name, found, _ = degenerate
    points = stored(metric_tables.frontier_points(found)).filter(family="odd")
    never = [name.startswith("an SAE that never"), name == "SAEs that never fire"]
    assert points["x"].null_count() == never[0] + 2 * never[1]
    assert points["nats_lost"].null_count() == points["hit"].null_count() == 0
    assert points["hit_low"].is_null().all() == (name == "one sequence")


def test_no_fit_or_factor_is_infinite_or_no_number_and_a_null_has_a_warning(degenerate):
    name, found, _ = degenerate
    fits, factors = stored(metric_tables.frontier_fits(found)), stored(metric_tables.frontier_factors(found))
    assert len(fits) == 2 * 2 * 4
    power = fits.filter(family="odd", curve="power")
    assert set(power["k"].is_null()) == {name != "one sequence"}
    assert power["warning"].is_not_null().all()
    assert factors.filter(pl.col("value").is_null())["warning"].is_not_null().all()
    if name != "one sequence":
        assert factors.filter(quantity="k_ratio", curve="power")["value"].to_list() == [None, None]


@pytest.mark.parametrize("rise", [0, -1])
def test_a_baseline_that_is_not_above_the_clean_loss_gives_no_hit_and_nothing_recovered(tmp_path, rise):
    zero = BASES["zero"] | {"ce": BASES["zero"]["ce_clean"] + rise + 0 * BASES["zero"]["ce"]}
    found, metrics = both_of(tmp_path, {ONE: SAES[ONE], TWO: SAES[TWO]}, zero, points="all")
    points, fits = stored(metric_tables.frontier_points(found)), stored(metric_tables.frontier_fits(found))
    assert points.select("hit", "hit_low", "hit_high").null_count().row(0) == (5, 5, 5)
    assert points.select("nats_lost", "x").null_count().row(0) == (0, 0)
    assert all(" points left out: no hit" in warning for warning in fits["warning"])
    stored(metric_tables.frontier_factors(found))
    assert {points.schema[f"hit{end}"] for end in ("", "_low", "_high")} == {pl.Float64}
    recovered = stored(metrics).filter(metric="loss_recovered", baseline="zero")
    assert recovered["value"].is_null().all()
    assert all(reason.startswith("the loss of zero less the clean one is ") for reason in recovered["reason"])


# The atlas.

SITES = {f"blocks.{layer}.{site}": name for name, site in labels.COMPONENTS.items() for layer in (0, 11)}


@pytest.mark.parametrize(("hook", "name"), SITES.items())
def test_a_component_is_called_as_in_the_configuration(hook, name):
    assert component(hook) == name


def test_a_head_is_a_column_of_its_own():
    given = ["zero", "mean_head(0)", "resample_head(11)", "zero_head(3)", "resample", "zero_head(100)"]
    assert given[1:4] == [
        labels.label(labels.OF_A_HEAD[name], float(head)) for name, head in (("mean", 0), ("resample", 11), ("zero", 3))
    ]
    found = of_a_head(pl.DataFrame({"intervention": given, "kl_mean": range(6)}))
    assert found.columns == ["intervention", "kl_mean", "head"]
    assert found["intervention"].to_list() == ["zero", "mean", "resample", "zero", "resample", "zero"]
    assert found["head"].to_list() == [None, 0, 11, 3, None, 100]
    assert (found["head"].dtype, found["kl_mean"].to_list()) == (pl.Int64, list(range(6)))


@pytest.mark.parametrize("names", [[], ["zero", "mean"]])
def test_where_there_is_no_head_the_column_is_null(names):
    found = of_a_head(pl.DataFrame({"intervention": names}, schema={"intervention": pl.String}))
    assert found["head"].to_list() == [None] * len(names)
    assert found.schema == {"intervention": pl.String, "head": pl.Int64}
