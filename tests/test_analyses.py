"""Every analysis from files as the stages write them: all shards together, labels in front, its own numbers."""

from itertools import pairwise

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import study_tables
from fakes import ROOT
from polars.testing import assert_frame_equal
from tables import HOOK, PLACE, arrays, call
from token_tables import part

from pipeline import analyses, correlates, families, frontier, grouping, metric_tables, normalised, store
from pipeline.atlas import atlas_rows
from pipeline.compounding import super_additivity
from pipeline.compute import calibration, calibration_rows, compute_rows
from pipeline.curvature import curvature_rows
from pipeline.dark_matter import LEFT, dark_matter_rows
from pipeline.dose import cosine_rows, dose_rows, dose_summary
from pipeline.draws import draw_rows, draw_summary
from pipeline.fits import Scatter
from pipeline.ladder import ladder_rows
from pipeline.normalised import normalised_rows, token_sums
from pipeline.single import single_rows
from pipeline.statistics import Bootstrap

LABELS = ["model", "corpus", "experiment", "hook", "sae", "layer"]
SHAPE = (12, 5)
BOOT = Bootstrap.over(SHAPE[0], 400, 0.95, 0)
OF_A_HOOK = {name: value for name, value in PLACE.items() if name != "sae"}


def kl(seed, scale=1.0, shape=SHAPE):
    return scale * np.random.default_rng(seed).lognormal(size=shape).astype(np.float32)


def runs(*labels, first=0, **columns):
    """A table with these interventions, the KL of each its own."""
    return pl.concat([part(label, kl(i, 1 + i), first=first, **columns) for i, label in enumerate(labels)])


def write(folder, stage, table, shards=1, **place):
    """The files of a table, the sequences cut into shards; the numbers of sequences are as in the corpus."""
    labels = (PLACE if stage not in ("ablations", "compounds") else OF_A_HOOK) | place
    labels = {name: value for name, value in labels.items() if value is not None}
    cuts, paths = np.linspace(0, SHAPE[0], shards + 1).astype(int), []
    for i, (start, stop) in enumerate(pairwise(cuts)):
        rows = table.filter(pl.col("sequence").is_between(start, stop - 1))
        paths.append(folder / f"{stage} {labels.get('sae')} {i} of {shards}.parquet")
        store.write_table(paths[-1], [rows.to_arrow()], "f00d", {}, **labels)
    return paths


def tokens(folder, model="tiny"):
    """Token numbers as `part` gives them, none of them special, and how often each is there."""
    sequence, position = np.indices(SHAPE)
    token = (10 * sequence + position).astype(np.int32)
    values = {"token": token, "special": np.zeros(SHAPE, bool), "unigram": np.arange(1, 201)}
    axes = {"token": "seq pos", "special": "seq pos", "unigram": "v"}
    shapes = {name: (value.shape, str(value.dtype)) for name, value in values.items()}
    path = folder / f"{model}.tokens.h5"
    with store.new_arrays(path, "f00d", axes, shapes, model=model, corpus="story") as file:
        for name, value in values.items():
            file[name][:] = value
    return path


def made(folder, name, settings=None, **inputs):
    """The table that the stage writes."""
    path = folder / f"{name}.parquet"
    analyses.work(call([path], {"tokens": [tokens(folder)]} | inputs, {"analysis": name}, **(settings or {})))
    assert store.is_current(path, "f00d")
    return pl.read_parquet(path)


def labelled(rows, **place):
    """With the labels of PLACE in front, as the stage has to give them."""
    labels = PLACE | {"layer": 1} | place
    return rows.select(*(pl.lit(labels[name]).alias(name) for name in LABELS), pl.all())


def check(found, *expected):
    """Labels first, then the columns of the rows, with their values; the order of rows is that of the tables."""
    wanted = pl.concat(expected, how="vertical_relaxed")
    assert found.columns == wanted.columns
    assert found.columns[: len(LABELS)] == LABELS
    assert len(found) == len(wanted) > 0
    for name in found.columns:
        if wanted[name].dtype.is_float():
            np.testing.assert_allclose(found[name].to_numpy(), wanted[name].to_numpy(), rtol=1e-12, err_msg=name)
        else:
            assert found[name].to_list() == wanted[name].to_list(), name


# One test of each analysis, from one file and from several shards.


@pytest.fixture(params=[1, 3], ids=["one file", "three shards"])
def shards(request):
    return request.param


def test_single_positions_are_of_saes_and_of_hooks(tmp_path, shards):
    table, free = runs("sae", "eps_random", first=2, patched=2), runs("zero", first=2, patched=2)
    inputs = {"effects": write(tmp_path, "effects", table, shards)}
    inputs |= {"ablations": write(tmp_path, "ablations", free, shards)}
    found = made(tmp_path, "single_positions", **inputs)
    check(found, labelled(single_rows(table, BOOT)), labelled(single_rows(free, BOOT), sae=None))
    assert set(found["offset"]) == set(range(SHAPE[1]))
    assert found.filter(pl.col("sae").is_null())["intervention"].unique().to_list() == ["zero"]


def draws_table(sae=50.0):
    rows = [part("sae", np.full((12, 1), sae), patched=3, first=3)]
    rows += [part("eps_random", kl(draw, shape=(12, 1)), draw=draw, patched=3, first=3) for draw in range(25)]
    return pl.concat(rows)


def test_draws_are_of_every_token_and_counted_over_all_of_them(tmp_path, shards):
    inputs = {"effects": write(tmp_path, "effects", draws_table(), shards)}
    check(made(tmp_path, "draws", **inputs), labelled(draw_rows(draws_table())))
    found = made(tmp_path, "draws_found", **inputs)
    check(found, labelled(draw_summary(draw_rows(draws_table()))))
    assert found["n_tokens"].to_list() == [12]
    assert found["share"].to_list() == [1]  # 50 nats are more than any draw


def test_draws_keep_the_number_of_the_sequence_in_the_corpus(tmp_path):
    """The other analyses number sequences anew, for the bootstrap; the page says at which context a token is."""
    table = draws_table().filter(pl.col("sequence") >= 8)
    found = made(tmp_path, "draws", effects=write(tmp_path, "effects", table))
    assert found["sequence"].to_list() == [8, 9, 10, 11]


def test_the_rungs_of_a_ladder(tmp_path, shards):
    table = runs("eps_random", "act_cov_random", "flipped_error", "sae")
    found = made(tmp_path, "rungs", effects=write(tmp_path, "effects", table, shards))
    check(found, labelled(ladder_rows(table, BOOT)))
    assert found["intervention"].to_list() == ["eps_random", "act_cov_random", "flipped_error", "sae"]


def test_doses_and_their_exponents(tmp_path, shards):
    table = runs("error_scaled(0.5)", "error_scaled(1)", "error_scaled(2)", "theta_error_at(0.9)")
    inputs = {"effects": write(tmp_path, "effects", table, shards)}
    check(made(tmp_path, "doses", **inputs), labelled(dose_rows(table, BOOT)))
    check(made(tmp_path, "exponents", **inputs), labelled(dose_summary(table, BOOT)))


def test_cosines_are_of_saes_and_of_hooks(tmp_path, shards):
    table, free = runs("theta_error_at(0.9)", "error_scaled(1)"), runs("theta_random_at(0.9)", "theta_random_at(0.8)")
    inputs = {"effects": write(tmp_path, "effects", table, shards)}
    inputs |= {"ablations": write(tmp_path, "ablations", free, shards)}
    found = made(tmp_path, "cosines", **inputs)
    check(found, labelled(cosine_rows(table, BOOT)), labelled(cosine_rows(free, BOOT), sae=None))
    assert found["family"].to_list() == ["theta_error_at", "theta_random_at", "theta_random_at"]


def errors(folder, sae, power):
    """What `errors` stores of the parts of an SAE's error, as far as it is read."""
    path = folder / f"{sae}.errors.h5"
    values = {"power": np.array(power, float), "count": np.array([30.0, 10.0])}
    axes, shapes = {"power": "fold part", "count": "fold"}, {name: value.shape for name, value in values.items()}
    shapes = {name: (shape, "float64") for name, shape in shapes.items()}
    attributes = {"model": "tiny", "hook": HOOK, "sae": sae, "corpus": "story", "parts": ["a", "b"]}
    with store.new_arrays(path, "f00d", axes, shapes, **attributes) as file:
        for name, value in values.items():
            file[name][:] = value
    return path, (values["power"], values["count"])


def test_dark_matter_takes_the_power_of_the_same_sae(tmp_path, shards):
    table = runs(*LEFT)
    early, of_early = errors(tmp_path, "early", [[4, 3, 2, 1], [8, 4, 2, 1]])
    late, of_late = errors(tmp_path, "late", [[9, 8, 7, 6], [9, 8, 7, 6]])
    effects = [*write(tmp_path, "effects", table, shards, sae="late"), *write(tmp_path, "effects", table, shards)]
    found = made(tmp_path, "dark_matter", effects=effects, errors=[early, late])
    expected = [dark_matter_rows(table, *power, BOOT) for power in (of_late, of_early)]
    check(found, labelled(expected[0], sae="late"), labelled(expected[1]))
    assert found["power_share"].n_unique() > 3


SETS = [{"name": "a", "saes": ["a"]}, {"name": "b", "saes": ["b"]}, {"name": "all", "saes": ["a", "b"]}]


def test_sets_of_saes_are_those_of_the_file(tmp_path, shards):
    parts = [
        runs("sae", "eps_random").with_columns(kl=(2 + i) * pl.col("kl"), set=pl.lit(each["name"]))
        for i, each in enumerate(SETS)
    ]
    table = pl.concat(parts)
    paths = write(tmp_path, "compounds", table, shards, hook=None, sets=SETS)
    found = made(tmp_path, "compounding", compounds=paths)
    check(found, labelled(super_additivity(table, SETS, BOOT), hook=None, sae=None, layer=None))
    assert found.filter(pl.col("set") == "all")["super_additivity"].to_list() == pytest.approx([4 / 5] * 2)


def test_curvature_is_of_the_contexts_that_there_are(tmp_path):
    table = runs("sae", "eps_random").with_columns(kl_second_order=1.5 * pl.col("kl"))
    found = made(tmp_path, "curvature", curvatures=write(tmp_path, "curvatures", table))
    check(found, labelled(curvature_rows(table, BOOT)))
    few = table.filter(pl.col("sequence") >= 8)
    found = made(tmp_path, "curvature", curvatures=write(tmp_path, "curvatures", few))
    check(found, labelled(curvature_rows(few, Bootstrap.over(4, 400, 0.95, 0))))


def described(table):
    """With what correlations are with."""
    generator = np.random.default_rng(3)
    one = {name: generator.uniform(0.1, 1, len(table) // 2).astype(np.float32) for name in correlates.SHARED}
    return table.with_columns(pl.Series(name, np.tile(values, 2)) for name, values in one.items())


def test_correlations_are_with_the_unigram_counts_of_the_same_corpus(tmp_path, shards):
    table = described(runs("sae", "eps_random"))
    paths = write(tmp_path, "effects", table, shards)
    other = arrays(tmp_path / "other.h5", "v", {"unigram": np.ones(200, int)}, model="other", corpus="story")
    found = made(tmp_path, "correlations", effects=paths, tokens=[tokens(tmp_path), other])
    check(found, labelled(correlates.correlations(correlates.read(paths, np.arange(1, 201)), BOOT)))
    assert found.filter(pl.col("covariate") == "rarity")["spearman"].null_count() == 0


def test_the_atlas_has_components_and_heads_as_columns(tmp_path, shards):
    streams, heads = runs("identity", "zero", "mean"), runs("zero_head(0)", "zero_head(1)", "identity")
    z = "blocks.2.attn.hook_z"
    paths = [*write(tmp_path, "ablations", streams, shards)]
    (tmp_path / "heads").mkdir()
    paths += write(tmp_path / "heads", "ablations", heads, shards, hook=z)
    expected = labelled(atlas_rows(streams, BOOT), sae=None).with_columns(component=pl.lit("resid_pre"), head=None)
    of_heads = labelled(atlas_rows(heads, BOOT), sae=None, hook=z, layer=2)
    of_heads = of_heads.with_columns(intervention=pl.lit("zero"), component=pl.lit("z"), head=pl.Series([0, 1]))
    check(made(tmp_path, "atlas", ablations=paths), expected, of_heads)


KAPLAN = (ROOT / "calibrations" / "kaplan.csv").read_text()
LAWS = {"calibrations": [["kaplan", KAPLAN]]}
LATE = "blocks.2.hook_resid_pre"


def followed(*labels, **columns):
    """As `runs`, but the last token has no loss, as in a text."""
    loss = pl.when(pl.col("position") < SHAPE[1] - 1).then("ce")
    return runs(*labels, **columns).with_columns(ce=loss)


def test_metrics_are_of_an_sae_beside_the_ablations_at_its_hook(tmp_path, shards):
    table, elsewhere = followed("identity", "sae", "eps_random"), followed("zero")
    free = followed("mean", "resample", "zero")
    inputs = {"effects": write(tmp_path, "effects", table, shards)}
    (tmp_path / "late").mkdir()
    inputs["ablations"] = write(tmp_path / "late", "ablations", elsewhere, hook=LATE)
    inputs["ablations"] += write(tmp_path, "ablations", free, shards)
    found = made(tmp_path, "metrics", LAWS | {"bigram_smoothing": 50.0}, **inputs)
    sums = token_sums(table, 12) | token_sums(free, 12)
    sums = {name: sums[name] for name in ("identity", "sae", "eps_random", "mean", "resample", "zero")}
    text = metric_tables.text_losses(tokens(tmp_path), 50.0)
    pair = {name: sums[name] for name in ("sae", "eps_random")}
    of_pair = compute_rows(pair, [calibration(KAPLAN, "kaplan", 400, 0.95, 0)], BOOT)
    check(found, labelled(pl.concat([normalised_rows(sums, text, BOOT), of_pair])))
    values = {(row["metric"], row["baseline"]): row["value"] for row in found.filter(intervention="sae").to_dicts()}
    lost, zero = (float(kl(i, 1 + i)[:, :-1].mean()) for i in (1, 2))
    # Of 48 tokens that are followed, each next one is another, and the vocabulary has 200.
    shares = {"zero": lost / zero, "unigram": lost / (np.log(48) - 1), "uniform": lost / (np.log(200) - 1)}
    expected = {("loss_recovered", name): 1 - share for name, share in shares.items()} | {("nats_lost", None): lost}
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-6)  # losses are in float32


def test_calibrations_are_those_of_the_configuration(tmp_path):
    found = made(tmp_path, "calibrated", LAWS)
    assert_frame_equal(found, calibration_rows([calibration(KAPLAN, "kaplan", 400, 0.95, 0)]))
    assert found["name"].to_list() == ["Kaplan 2020"]


@pytest.mark.parametrize("name", ["ranks", "agreements", "flips"])
def test_verdicts_are_on_the_metrics_of_each_corpus(tmp_path, name):
    numbers = {"early": (0.1, 0.3), "late": (0.2, 0.2), "coder": (0.3, 0.1)}
    tables = [pl.concat(study_tables.metrics(sae, 1, *pair) for sae, pair in numbers.items())]
    tables += [study_tables.metrics("early", corpus="letters")]
    pl.concat(tables).write_parquet(tmp_path / "metrics.parquet")
    found = made(tmp_path, f"metric_{name}", metrics=[tmp_path / "metrics.parquet"])
    expected = []
    for corpus, table in zip(("story", "letters"), tables, strict=True):
        rows = getattr(normalised.verdicts(table.filter(intervention="sae")), name)
        labels = {"model": "tiny", "corpus": corpus, "experiment": "main"}
        expected.append(rows.select(*(pl.lit(value).alias(key) for key, value in labels.items()), pl.all()))
    alike = pl.any_horizontal(pl.col("^metric_.$").str.starts_with("effective_compute"))
    whole = pl.concat(expected)
    assert_frame_equal(found, whole.filter(~alike) if name == "flips" else whole)
    if name == "ranks":
        ranks = found.filter(metric="kl", corpus="story")
        assert dict(ranks.select("sae", "rank").rows()) == {"early": 1, "late": 2, "coder": 3}
    elif name == "agreements":
        assert set(found.filter(metric_a="nats_lost", metric_b="kl")["kendall"]) == {-1, None}
    else:
        columns = "metric_a", "prefers_a", "metric_b", "prefers_b"
        assert ("nats_lost", "coder", "kl", "early") in found.select(columns).rows()


# Two families of SAEs with their L0, and one SAE that is in none.
FAMILIES = {"one": {"a": 10.0, "b": 40.0}, "two": {"c": 10.0, "d": 20.0, "e": 40.0}}
SAES = {sae: l0 for members in FAMILIES.values() for sae, l0 in members.items()} | {"other": 5.0}


def of_an_sae(i, l0):
    """Loss and KL fall with L0."""
    losses = kl(i, 4 / l0)
    table = pl.concat([part("identity", 0 * losses, l0=l0), part("sae", losses, l0=np.full(SHAPE, l0))])
    return table.with_columns(ce=pl.when(pl.col("position") < SHAPE[1] - 1).then("ce"))


def by_hand():
    """The table that `frontier` takes, with its replicates."""
    free, rows, replicates = followed("zero"), [], {name: [] for name in ("l0", "ce", "ce_clean", "ce_base", "kl")}
    for i, (sae, l0) in enumerate(SAES.items()):
        if sae != "other":
            own = of_an_sae(i, l0).filter(pl.col("intervention") == "sae")
            known = own.filter(pl.col("ce").is_not_null())
            pairs = {"l0": (own, "l0"), "ce": (known, "ce"), "ce_clean": (known, "ce_clean"), "kl": (own, "kl")}
            for name, (table, column) in (pairs | {"ce_base": (free.drop_nulls("ce"), "ce")}).items():
                sums = table.group_by("sequence").agg(pl.col(column).cast(pl.Float64).sum(), n=pl.len())
                sums = sums.sort("sequence")
                replicates[name].append(BOOT.replicates(sums[column].to_numpy(), sums["n"].to_numpy()))
            row = {"family": "one" if sae in FAMILIES["one"] else "two", "sae": sae}
            rows.append(row | {name: found[-1][0] for name, found in replicates.items()})
    stacked = {name: np.stack(found, axis=1) for name, found in replicates.items()}
    return pl.DataFrame(rows), frontier.Replicates(stacked, 0.95)


PLACED = {"model": "tiny", "corpus": "story", "experiment": "main", "baseline": "zero", "relative": False}


def of_families(folder, name, shards):
    """The analysis of that name of all SAEs."""
    effects = []
    for i, (sae, l0) in enumerate(SAES.items()):
        effects += write(folder, "effects", of_an_sae(i, l0), shards, sae=sae)
    asked = {"families": {family: list(members) for family, members in FAMILIES.items()}, "points": "all"}
    asked |= {"widths": dict.fromkeys(SAES, 16), "baseline": "zero", "relative": False, "matched": [15.0]}
    ablations = write(folder, "ablations", followed("zero"), shards)
    return made(folder, name, {"families": asked}, effects=effects, ablations=ablations)


def same(found, expected):
    """The labels of families in front; the columns of a table, with their values."""
    assert found.select(*PLACED).unique().to_dicts() == [PLACED]
    assert found.columns[: len(PLACED)] == list(PLACED)
    assert_frame_equal(found.select(expected.columns), expected, rel_tol=1e-9)


def test_points_of_frontiers_are_of_the_saes_of_families(tmp_path, shards):
    found, (table, replicates) = of_families(tmp_path, "frontier_points", shards), by_hand()
    same(found, frontier.points(table))
    assert found["sae"].to_list() == ["a", "b", "c", "d", "e"]
    assert found["l0"].to_list() == [10, 40, 10, 20, 40]
    lost = replicates.values["ce"] - replicates.values["ce_clean"]
    assert found["nats_lost_low"].to_list() == pytest.approx([BOOT.interval(one).low for one in lost.T])


def test_fits_of_frontiers_have_intervals_of_two_kinds(tmp_path, shards):
    found, (table, replicates) = of_families(tmp_path, "frontier_fits", shards), by_hand()
    for kind, resampling in {"sequences": replicates, "scatter": Scatter(400, 0.95)}.items():
        same(found.filter(intervals=kind), frontier.fit(table, resampling, "all"))
    assert set(found["intervals"]) == {"sequences", "scatter"}


def test_factors_of_frontiers_are_between_two_families(tmp_path, shards):
    found, (table, replicates) = of_families(tmp_path, "frontier_factors", shards), by_hand()
    for kind, resampling in {"sequences": replicates, "scatter": Scatter(400, 0.95)}.items():
        same(found.filter(intervals=kind), families.compare(table, "one", "two", resampling, "all", False, [15.0]))
    assert set(found["l0"].drop_nulls()) == {15}


def test_every_analysis_is_tested_here():
    tested = {"single_positions", "draws", "draws_found", "rungs", "doses", "exponents", "cosines", "dark_matter"}
    tested |= {"compounding", "curvature", "correlations", "atlas", "metrics", "calibrated"}
    tested |= {"metric_ranks", "metric_agreements", "metric_flips"}
    assert set(analyses.ANALYSES) == tested | {"frontier_points", "frontier_fits", "frontier_factors"}


# What all have in common.


def test_tables_of_one_place_are_put_together_and_others_stay_apart(tmp_path):
    table = runs("sae")
    paths = [*write(tmp_path, "effects", table, 3), *write(tmp_path, "effects", table, 2, sae="late")]
    paths = [paths[i] for i in (3, 0, 1, 4, 2)]
    found = grouping.grouped(paths)
    assert [(each.labels["sae"], len(each.paths)) for each in found] == [("late", 2), ("early", 3)]
    assert [path for each in found for path in each.paths] == [paths[i] for i in (0, 3, 1, 2, 4)]
    assert found[1].labels == PLACE | {"layer": 1}


@pytest.mark.parametrize("label", ["model", "corpus", "experiment", "hook", "sae"])
def test_what_differs_in_any_label_is_another_table(tmp_path, label):
    other = {label: "blocks.2.hook_resid_pre" if label == "hook" else "other"}
    (tmp_path / "other").mkdir()
    paths = [*write(tmp_path, "effects", runs("sae")), *write(tmp_path / "other", "effects", runs("sae"), **other)]
    found = grouping.grouped(paths)
    assert [each.labels[label] for each in found] == [PLACE[label], other[label]]


def test_the_layer_is_that_of_the_hook_and_tables_of_no_sae_or_hook_say_so(tmp_path):
    (table,) = grouping.grouped(write(tmp_path, "effects", runs("sae"), hook="blocks.11.attn.hook_z"))
    assert table.labels["layer"] == 11
    (table,) = grouping.grouped(write(tmp_path, "compounds", runs("sae"), hook=None))
    assert (table.labels["hook"], table.labels["sae"], table.labels["layer"]) == (None, None, None)
    path, _ = errors(tmp_path, "early", [[1, 1, 1, 1]] * 2)
    (table,) = grouping.grouped([path])
    assert (table.labels["sae"], table.labels["corpus"], table.labels["layer"]) == ("early", "story", 1)


def test_sequences_are_numbered_among_those_that_are_there_over_all_shards(tmp_path):
    table = runs("sae", "eps_random").filter(pl.col("sequence").is_in([2, 3, 9]))
    (found,) = grouping.grouped(write(tmp_path, "effects", table, 3))
    rows = found.read("intervention", "sequence", "kl")
    assert rows.columns == ["intervention", "sequence", "kl"]
    assert set(rows["sequence"]) == {0, 1, 2}
    assert rows["intervention"].dtype == pl.String
    third = table.filter(pl.col("sequence") == 9)["kl"].sum()
    assert rows.filter(pl.col("sequence") == 2)["kl"].sum() == pytest.approx(third)


def test_intervals_are_those_of_the_configuration_and_units_are_on_the_columns(tmp_path):
    table = runs("eps_random", "act_cov_random", "sae")
    paths, out = write(tmp_path, "effects", table), tmp_path / "out.parquet"
    options = {"bootstrap": {"samples": 150, "confidence": 0.5}, "seed": 7}
    inputs = {"tokens": [tokens(tmp_path)], "effects": paths}
    analyses.work(call([out], inputs, {"analysis": "rungs"}, **options))
    check(pl.read_parquet(out), labelled(ladder_rows(table, Bootstrap.over(12, 150, 0.5, 7))))
    schema = pl.read_parquet_schema(out)
    assert schema["kl_mean"] == pl.Float64
    assert pq.read_schema(out).field("kl_mean").metadata[b"unit"] == b"nats"


def test_the_same_files_give_the_same_bits(tmp_path):
    table = runs("eps_random", "act_cov_random", "flipped_error", "sae")
    paths = write(tmp_path, "effects", table, 3)
    found = [made(tmp_path, "rungs", effects=paths) for _ in range(3)]
    assert found[0].equals(found[1])
    assert found[0].equals(found[2])
