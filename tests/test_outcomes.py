"""Which tables of results and figures a study has, and what they are made from."""

import polars as pl
import pytest
from fakes import PAIR, alone, everything, experiments, of_kind
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import config, outcomes, selection
from pipeline.plan import Plan

KINDS = {entry["id"]: entry for entry in experiments()}
SERIES = [{"id": "s", "axis": "steps", "points": [{"at": 1, "sae": "early"}, {"at": 2, "sae": "late"}]}]


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """A study of every kind of experiment, with atlas, metrics and families."""
    return everything(tmp_path_factory.mktemp("every"))


@pytest.fixture(scope="module")
def whole(every):
    return Plan(config.load(every))


def planned(every, *entries, series=(), **changes):
    """The plan of these experiments alone."""
    named = [{"id": f"x{i}"} | entry for i, entry in enumerate(entries)]
    return Plan(config.load(alone(every, *named, series=list(series), **changes)))


def planned_kind(every, kind):
    return Plan(config.load(of_kind(every, kind)))


# Which experiment an analysis is about.

METRICS = {"metrics", "calibrated", "metric_ranks", "metric_agreements", "metric_flips"}
FRONTIERS = {"frontier_points", "frontier_fits", "frontier_factors"}
ABOUT = {
    "main": {"curvature", "correlations", *METRICS},
    "families": {"curvature", "correlations", *METRICS, *FRONTIERS},
    "ladder": {"rungs", *METRICS},
    "dark": {"dark_matter", *METRICS},
    "dose": {"doses", "exponents", "cosines"},
    "single": {"single_positions"},
    "draws": {"draws", "draws_found"},
    "together": {"compounding"},
    "atlas": {"atlas"},
}
# Analyses of tables with a row for every token. Those of other scopes have rows of one position, and other columns.
OF_EVERY_TOKEN = {"rungs", "doses", "exponents", "cosines", "dark_matter", "curvature", "correlations"}
OF_EVERY_TOKEN |= {"atlas", *METRICS, *FRONTIERS}


def test_every_analysis_says_what_it_is_about_and_every_figure_that_is_asked_about_exists(whole):
    told = [*outcomes.ABOUT, *outcomes.METRICS, *outcomes.FRONTIERS]
    assert sorted(told) == sorted(whole.analyses) == sorted(set.union(*ABOUT.values()))
    assert set(outcomes.SHOWN) <= set(whole.figures)


def test_a_figure_takes_what_there_is(whole):
    known = {"summary", "effects", "extremes", "top_tokens", "saes", "series", *whole.analyses}
    assert {argument for arguments in whole.figures.values() for argument in arguments} <= known


@pytest.mark.parametrize("kind", ABOUT)
def test_a_kind_of_experiment_has_its_own_analyses(every, kind):
    made = planned_kind(every, kind)
    assert {job.key["analysis"] for job in made.jobs.values() if job.stage == "analyses"} == ABOUT[kind]


def test_an_analysis_reads_only_what_it_asks_for_of_the_experiments_it_is_about(whole):
    found = {
        job.key["analysis"]: {(role, upstream.key.get("experiment")) for role, upstream in job.inputs}
        for job in whole.jobs.values()
        if job.stage == "analyses"
    }
    expected = {
        "single_positions": {("effects", "single"), ("ablations", "single")},
        "draws": {("effects", "draws")},
        "draws_found": {("effects", "draws")},
        "rungs": {("effects", "ladder")},
        "doses": {("effects", "dose")},
        "exponents": {("effects", "dose")},
        "cosines": {("effects", "dose"), ("ablations", "dose")},
        "dark_matter": {("effects", "dark"), ("errors", None)},
        "compounding": {("compounds", "together")},
        "curvature": {("curvatures", "main")},
        "correlations": {("effects", "main")},
        "atlas": {("ablations", "atlas")},
        "metrics": {("effects", "main"), ("ablations", "main")},
    }
    expected |= {name: {("effects", "main"), ("ablations", "main")} for name in FRONTIERS}
    expected = {name: {("tokens", None), *inputs} for name, inputs in expected.items()}
    # Made from other tables of results, or from the configuration alone.
    expected |= {name: {("metrics", None)} for name in ("metric_ranks", "metric_agreements", "metric_flips")}
    assert found == expected | {"calibrated": set()}


@pytest.mark.parametrize("shards", [1, 3])
def test_an_analysis_reads_every_shard_of_every_sae_once(every, shards):
    made = Plan(config.load(every | {"shards": shards}))
    counts = {"single_positions": 3 + 3, "rungs": 1, "correlations": 3, "compounding": 1}  # SAEs, and their hooks
    counts |= {"metrics": 3 + 3, "atlas": 2 * 2}  # layers, and components
    for name, count in counts.items():
        paths = [upstream.path for role, upstream in made[f"results/summary/{name}.parquet"].inputs if role != "tokens"]
        assert len(paths) == len(set(paths)) == count * shards


@pytest.mark.parametrize("scope", ["single", "draws"])
@pytest.mark.parametrize("kind", ["ladder", "dark", "dose"])
def test_what_is_for_every_token_is_never_given_the_rows_of_one_position(every, kind, scope):
    """Their tables have `patched`, and several rows for a token."""
    entry = KINDS[kind] | {"id": "one", "scope": scope, "positions": [4], "horizon": 2, "draws": 3}
    entry["interventions"] = list(dict.fromkeys([*PAIR, *entry["interventions"]]))
    read = [
        upstream.settings["scope"]
        for job in planned(every, entry, KINDS[kind]).jobs.values()
        if job.key.get("analysis") in OF_EVERY_TOKEN
        for role, upstream in job.inputs
        if role in ("effects", "ablations")
    ]
    assert set(read) == {"all"}
    alone = planned(every, entry)
    assert not OF_EVERY_TOKEN & {job.key.get("analysis") for job in alone.jobs.values()}


def test_an_analysis_is_told_of_the_configuration_what_it_needs_and_no_more(whole):
    found = {job.key["analysis"]: job.settings for job in whole.jobs.values() if job.stage == "analyses"}
    told = {name: settings.keys() - {"seed", "bootstrap"} for name, settings in found.items()}
    needed = {"metrics": {"calibrations", "bigram_smoothing"}, "calibrated": {"calibrations"}}
    needed |= {name: {"families"} for name in FRONTIERS}  # against the zero ablation: bigrams are not looked at
    assert told == {name: needed.get(name, set()) for name in whole.analyses}
    asked = {"families": {"one": ["early"], "two": ["late"]}, "widths": {"early": 16, "late": 16}}
    asked |= {"baseline": "zero", "points": "pareto", "relative": False, "matched": []}
    assert all(found[name]["families"] == asked for name in FRONTIERS)


def test_frontiers_are_made_from_the_saes_of_families_alone(whole):
    for name in FRONTIERS:
        inputs = whole[f"results/summary/{name}.parquet"].inputs
        assert {job.key["sae"] for role, job in inputs if role == "effects"} == {"early", "late"}


def test_a_family_is_measured_where_it_is_run_also_where_that_is_no_general_experiment(every):
    """The configuration is accepted, so its families are there."""
    entries = {"id": "main", "interventions": ["sae", "zero"], "saes": ["late"]}, KINDS["ladder"] | {"id": "ladder"}
    entries[1]["interventions"] = [*KINDS["ladder"]["interventions"], "zero"]
    made = planned(every, *entries, metrics=every["metrics"])
    inputs = made["results/summary/frontier_points.parquet"].inputs
    assert {job.key["sae"] for role, job in inputs if role == "effects"} == {"early", "late"}


def test_metrics_are_of_saes_at_every_token(every):
    for entry in (KINDS["single"], KINDS["draws"], KINDS["together"], ABLATIONS):
        assert not METRICS & {job.key.get("analysis") for job in planned(every, entry).jobs.values()}
    made = planned(every, SAE_ALONE, metrics={"calibrations": []})
    assert {job.key["analysis"] for job in made.jobs.values() if job.stage == "analyses"} == METRICS - {"calibrated"}


def test_the_ladder_and_dark_matter_need_the_sae_beside_them(every):
    ladder = {"interventions": ["eps_random", "act_cov_random"]}
    dark = {"interventions": ["eps_random", "linear_error_restored"]}
    shrunk = {"interventions": ["sae", "shrinkage_restored"]}
    made = planned(every, ladder, dark, shrunk)
    assert [outcomes.about(made, name) for name in ("rungs", "dark_matter")] == [[], []]


# Figures.

# Of what is in the general summary; the figures of an experiment alone.
GENERAL = {"kl_by_layer", "loss_by_layer"}
PER_TOKEN = {"kl_histograms", "loss_histograms", "kl_by_position"}
# Of three SAEs or more.
VERDICTS = {"effective_compute", "metric_verdicts"}
FIGURES = {
    "main": {*GENERAL, *PER_TOKEN, *VERDICTS, "plane", "curvature_excess", "top_25", "rank_correlations"},
    "ladder": {*GENERAL, *PER_TOKEN, "effective_compute", "plane", "ladder"},
    "dark": {*GENERAL, *PER_TOKEN, "effective_compute", "dark_matter_shares"},
    "dose": {*GENERAL, "dose_response", "cosine_grid"},
    "single": {"single_token", "single_token_horizon"},
    "draws": {"draws_by_token"},
    "together": {"sets_of_saes"},
    "atlas": {"atlas_by_layer", "atlas_heads"},
}
FIGURES |= {"families": FIGURES["main"] | {"frontier"}}
ABLATIONS = {"interventions": ["zero", "mean"]}
SAE_ALONE = {"interventions": ["sae", "zero"]}


def figures(*given, **more):
    return set(outcomes.figures(planned(*given, **more)))


def test_the_study_of_every_kind_has_every_figure(whole):
    assert set(outcomes.figures(whole)) == set(whole.figures) == {"training_series"}.union(*FIGURES.values())


@pytest.mark.parametrize("kind", FIGURES)
def test_a_kind_of_experiment_has_its_own_figures_and_none_without_data(every, kind):
    assert set(outcomes.figures(planned_kind(every, kind))) == FIGURES[kind]


def test_of_two_saes_there_are_metrics_and_no_verdicts(every):
    assert "metric_verdicts" not in figures(every, SAE_ALONE | {"saes": ["early", "late"]})


def test_without_a_calibration_there_is_no_effective_compute(every):
    assert "effective_compute" not in figures(every, SAE_ALONE, metrics={"calibrations": []})


@pytest.mark.parametrize(
    ("components", "shown"),
    [(["z"], {"atlas_heads"}), (["mlp_out", "resid_mid"], {"atlas_by_layer"})],
    ids=["heads", "streams"],
)
def test_an_atlas_of_heads_is_a_figure_of_its_own(every, components, shown):
    assert figures(every, atlas={"components": components}) == shown


def test_ablations_have_no_figure_of_saes(every):
    assert figures(every, ABLATIONS, series=SERIES) == GENERAL


def test_without_a_random_direction_there_is_no_ratio_to_show(every):
    shown = figures(every, SAE_ALONE, series=SERIES)
    assert shown == {*GENERAL, *PER_TOKEN, *VERDICTS, "training_series"}
    # Nor where SAE and random direction are in two experiments.
    assert "plane" not in figures(every, SAE_ALONE, {"interventions": ["eps_random"]})


def test_what_a_special_experiment_has_is_in_the_general_figures_only_where_no_other_has_it(every):
    assert "plane" not in figures(every, SAE_ALONE, KINDS["ladder"])
    assert "plane" in figures(every, ABLATIONS, KINDS["ladder"])
    assert "training_series" in figures(every, ABLATIONS, KINDS["ladder"], series=SERIES)


def test_a_series_of_saes_that_no_experiment_has_is_not_drawn(every):
    assert "training_series" in figures(every, {"interventions": PAIR, "saes": ["late"]}, series=SERIES)
    assert "training_series" not in figures(every, {"interventions": PAIR, "saes": ["coder"]}, series=SERIES)
    assert "training_series" not in figures(every, KINDS["single"], series=SERIES)
    assert "training_series" not in figures(every, {"interventions": PAIR})


def test_one_position_without_an_sae_has_a_table_and_no_figure(every):
    made = planned(every, KINDS["single"] | {"interventions": ["zero"]})
    assert [job.key for job in made.jobs.values() if job.stage == "analyses"] == [{"analysis": "single_positions"}]
    assert outcomes.figures(made) == []


def test_doses_that_are_all_zero_or_negative_are_not_drawn_on_a_logarithmic_axis(every):
    assert "dose_response" not in figures(every, KINDS["dose"] | {"alphas": [-1, 0]})
    assert "dose_response" in figures(every, {"interventions": ["error_scaled(0.5)"]})


def test_turns_that_need_no_sae_are_drawn_beside_saes_that_there_are(every):
    turns = {"interventions": ["theta_random_at(0.9)"]}
    assert "cosine_grid" not in figures(every, turns)
    assert "cosine_grid" not in figures(every, turns | {"saes": ["late"]}, SAE_ALONE | {"saes": ["early"]})
    assert "cosine_grid" in figures(every, turns, SAE_ALONE)


INTERVENTIONS = ["sae", "eps_random", "zero", "act_cov_random", "error_scaled(0.5)", "theta_random_at(0.9)", "mean"]
CHOICES = st.lists(st.sampled_from(INTERVENTIONS), min_size=1, max_size=3, unique=True)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.lists(CHOICES, min_size=1, max_size=3))
def test_the_plan_takes_the_experiments_for_general_that_the_summary_is_read_for(every, chosen):
    made = planned(every, *[{"interventions": labels} for labels in chosen])
    rows = [
        {"experiment": job.key["experiment"], "intervention": label}
        for role, job in outcomes.summary(made).inputs
        if role in ("effects", "ablations")
        for label in job.settings["interventions"]
    ]
    general = set(selection.general(pl.DataFrame(rows))["experiment"])
    assert {experiment.id for experiment in outcomes._general(made)} == general


def test_the_figures_of_tokens_read_only_the_tables_of_general_experiments(whole):
    for name in PER_TOKEN:
        job = whole[f"results/figures/{name}.parquet"]
        read = {upstream.key["experiment"] for role, upstream in job.inputs if role == "effects"}
        assert read == {"main"}


def test_a_figure_reads_the_tables_that_its_arguments_name_and_the_summary(whole):
    for name, arguments in whole.figures.items():
        roles = {role for role, _ in whole[f"results/figures/{name}.parquet"].inputs}
        assert roles == {"summary"} | (set(arguments) - {"saes", "series"})


def test_only_the_figure_of_series_is_told_of_them(whole):
    told = {job.key["figure"]: job.settings for job in whole.jobs.values() if job.stage == "figures"}
    points = [[10.0, "early"], [20.0, "late"]]
    assert told.pop("training_series") == {"series": [{"id": "training", "axis": "training steps", "points": points}]}
    assert set(map(str, told.values())) == {"{}"}


# Summary and report.


def test_the_summary_is_of_the_experiments_that_replace_every_token_and_of_all_saes(whole):
    inputs = outcomes.summary(whole).inputs
    tables = {upstream.key["experiment"] for role, upstream in inputs if role in ("effects", "ablations")}
    assert tables == {"main", "ladder", "dark", "dose"}
    assert {upstream.key["sae"] for role, upstream in inputs if role == "scores"} == {"early", "late", "coder"}
    assert len(inputs) == len(set(inputs))


@pytest.mark.parametrize("kind", ["single", "draws"])
def test_saes_of_single_positions_are_in_the_table_of_saes(every, kind):
    inputs = outcomes.summary(planned(every, KINDS[kind])).inputs
    assert {role for role, _ in inputs} == {"tokens", "scores", "moments"}


def test_sets_alone_need_no_reconstructions_moments_or_activations(every):
    made = planned(every, KINDS["together"])
    assert {role for role, _ in outcomes.summary(made).inputs} == {"tokens"}
    assert not {"reconstructions", "scores", "moments", "activations"} & {job.stage for job in made.jobs.values()}


def test_the_report_shows_every_figure_analysis_example_and_check(whole):
    roles = {}
    for role, job in outcomes.report(whole).inputs:
        roles.setdefault(role, []).append(tuple(job.key.values()))
    assert roles["figures"] == [(name,) for name in outcomes.figures(whole)]
    assert {name for (name,) in roles["analyses"]} == set(whole.analyses)
    assert [key[0] for key in roles["checks"]] == ["main", "ladder", "dark", "dose", "single", "draws", "atlas"]
    assert len(roles["extremes"]) == len(roles["top_tokens"]) == 3  # SAEs
    assert len(roles["summary"]) == len(roles["paper"]) == 1


def test_the_table_of_a_paper_is_made_from_the_summary_and_the_metrics(every, whole):
    job = whole["results/paper/saes.parquet"]
    assert [(role, upstream.path) for role, upstream in job.inputs] == [
        ("summary", "results/summary/effects.parquet"),
        ("metrics", "results/summary/metrics.parquet"),
    ]
    assert (job.settings["columns"][0], job.settings["confidence"]) == ("l0", 0.95)
    assert [entry["id"] for entry in every["experiments"] if has_a_paper(planned(every, entry))] == [
        "main",
        "ladder",
        "dark",
    ]
    assert not has_a_paper(planned_kind(every, "atlas"))


def has_a_paper(made):
    return "results/paper/saes.parquet" in made.jobs


def test_every_result_is_above_the_report(whole):
    """So that it is made again when something below it is."""
    above, pending = set(), [outcomes.report(whole)]
    while pending:
        job = pending.pop()
        if job.path not in above:
            above.add(job.path)
            pending += [upstream for _, upstream in job.inputs]
    assert above == set(whole.jobs)
