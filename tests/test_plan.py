"""Which jobs a study has, and which of them another study makes again."""

import json
import os
import shutil
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
from fakes import HOOK, PAIR, alone, calibration, everything, experiments, model, of_kind, sae, study
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import config, fingerprint, measures
from pipeline.batches import BATCH, shard_bounds
from pipeline.jobs import BATCHES, DROPPABLE, PATTERNS, Batch
from pipeline.plan import DENSE_CONTEXTS, Plan

AGGREGATES = {"summary", "paper", "figures", "report"}
ROWS = {"scores", "effects", "ablations"}
OF_A_SHARD = {"clean", "activations", "reconstructions"} | ROWS
KINDS = {entry["id"]: entry for entry in experiments()}


def plan(configuration):
    return Plan(config.load(configuration))


def of(stage, jobs):
    return [job for job in jobs.values() if job.stage == stage]


def changed_stages(before, after):
    """The stages of which a job that both plans have is to be made again."""
    shared = before.jobs.keys() & after.jobs.keys()
    return {before[path].stage for path in shared if before[path].fingerprint != after[path].fingerprint}


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 300), st.data())
def test_shards_hold_every_sequence_once_and_start_at_multiples_of_the_batch(sequences, data):
    count = data.draw(st.integers(1, -(-sequences // BATCH)))
    bounds = [shard_bounds(sequences, f"{index}-of-{count}") for index in range(count)]
    assert [sequence for start, stop in bounds for sequence in range(start, stop)] == list(range(sequences))
    assert all(start % BATCH == 0 and start < stop for start, stop in bounds)
    batches = [-(-(stop - start) // BATCH) for start, stop in bounds]
    assert max(batches) - min(batches) <= 1


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 300), st.integers(1, 20))
def test_more_shards_than_batches_are_refused(sequences, surplus):
    batches = -(-sequences // BATCH)
    with pytest.raises(ValueError, match=f"too few for {batches + surplus} shards. Set `shards` to {batches} or less"):
        shard_bounds(sequences, f"0-of-{batches + surplus}")


def test_the_plan_and_the_stages_have_the_same_batch():
    assert config.BATCH == BATCH


def test_a_changed_bos_makes_the_tokens_again(tmp_path):
    configuration = study(tmp_path)
    before = plan(configuration)
    (Path(configuration["models"][0]["path"]) / "tokenizer_config.json").write_text('{"bos_token": "!"}')
    assert "tokens" in changed_stages(before, plan(configuration))


def test_every_input_is_a_job_of_the_plan_and_every_row_is_a_target(tmp_path):
    made = plan(study(tmp_path) | {"shards": 2})
    assert all(made[upstream.path] is upstream for job in made.jobs.values() for _, upstream in job.inputs)
    targets = {job.path for job in made.targets}
    rows = {job.path for job in made.jobs.values() if job.stage in ROWS}
    assert targets == rows | {made.report().path}
    assert len(of("effects", made.jobs)) == len(of("ablations", made.jobs)) == 2 * 2


def test_a_changed_seed_makes_again_only_what_draws_noise(tmp_path):
    configuration = study(tmp_path)
    configuration["experiments"].append({"id": "calm", "interventions": ["sae", "zero", "mean"]})
    before, after = plan(configuration), plan(configuration | {"seed": 1})
    assert changed_stages(before, after) == {"effects", "checks", "analyses"} | AGGREGATES
    effects = [path for path, job in before.jobs.items() if job.stage == "effects"]
    again = {path for path in effects if before[path].fingerprint != after[path].fingerprint}
    assert again == {path for path in effects if "/main/" in path}


def test_another_number_of_shards_gives_other_files(tmp_path):
    configuration = study(tmp_path)
    one, two = plan(configuration).jobs, plan(configuration | {"shards": 2}).jobs
    sharded = {path for path in one if "0-of-1" in path}
    assert {one[path].stage for path in sharded} == OF_A_SHARD
    assert not sharded & two.keys()
    assert {path.replace("0-of-1", "1-of-2") for path in sharded} <= two.keys()


@pytest.mark.parametrize("hook", [HOOK, "blocks.0.attn.hook_z"], ids=["at a known hook", "at a new hook"])
def test_another_sae_makes_nothing_again_but_the_summary_and_what_shows_it(tmp_path, hook):
    configuration = study(tmp_path)
    more = deepcopy(configuration)
    path = sae(tmp_path / "third", hook=hook, d_in=16 if hook == HOOK else 8)
    more["saes"].insert(0, {"id": "third", "path": path})
    before, after = plan(configuration), plan(more)
    assert before.jobs.keys() < after.jobs.keys()
    assert changed_stages(before, after) == {"checks", "analyses"} | AGGREGATES
    new = {after[path].stage for path in after.jobs.keys() - before.jobs.keys()}
    of_the_hook = set() if hook == HOOK else {"activations", "moments", "ablations"}
    # The verdicts are those of three SAEs.
    assert new == {"reconstructions", "scores", "effects", "figures"} | of_the_hook


def test_another_experiment_makes_nothing_again_but_the_summary_and_what_shows_it(tmp_path):
    configuration = study(tmp_path)
    before = plan(configuration)
    configuration["experiments"].append({"id": "more", "interventions": ["theta_random"], "saes": ["late"]})
    assert changed_stages(before, plan(configuration)) == AGGREGATES


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        (
            lambda c, folder: sae(folder / "late", hook="blocks.2.hook_resid_pre", k=3),
            {"reconstructions", "scores", "effects", "checks"},
        ),
        (lambda c, folder: c["experiments"][0].update(patch_special=True), {"effects", "ablations", "checks"}),
        (lambda c, folder: c.update(bootstrap={"samples": 100}), set()),
        (
            lambda c, folder: c["models"][0].update(processing={"center_unembed": True}),
            {"weights", "moments", "checks"} | OF_A_SHARD,
        ),
        (
            lambda c, folder: c["corpora"][0].update(prepend_bos=False),
            {"tokens", "moments", "checks"} | OF_A_SHARD,
        ),
    ],
    ids=["content of an SAE", "patched special tokens", "bootstrap", "processing", "packing"],
)
def test_a_change_makes_again_what_depends_on_it(tmp_path, change, stages):
    configuration = study(tmp_path)
    before = plan(configuration)
    fingerprints = {path: job.fingerprint for path, job in before.jobs.items()}
    change(configuration, tmp_path)
    after = plan(configuration)
    assert {
        job.stage for path, job in after.jobs.items() if job.fingerprint != fingerprints[path]
    } == stages | AGGREGATES | {"analyses"}


def test_an_experiment_of_sae_interventions_alone_has_no_ablations(tmp_path):
    configuration = study(tmp_path)
    configuration["experiments"][0]["interventions"] = ["identity", "sae", "eps_random"]
    jobs = plan(configuration).jobs
    assert of("ablations", jobs) == []
    assert [job.settings["interventions"] for job in of("effects", jobs)] == [["identity", "sae", "eps_random"]] * 2


def test_an_experiment_without_sae_interventions_has_no_effects(tmp_path):
    configuration = study(tmp_path)
    configuration["experiments"][0]["interventions"] = ["zero", "mean"]
    jobs = plan(configuration).jobs
    assert [job.settings["interventions"] for job in of("ablations", jobs)] == [["identity", "zero", "mean"]] * 2
    assert of("effects", jobs) == []


def test_an_intervention_that_needs_no_sae_is_an_ablation_and_the_control_is_in_both(tmp_path):
    jobs = plan(study(tmp_path)).jobs
    assert {tuple(job.settings["interventions"]) for job in of("effects", jobs)} == {("identity", "sae", "eps_random")}
    assert {tuple(job.settings["interventions"]) for job in of("ablations", jobs)} == {("identity", "zero", "mean")}


def test_the_saes_of_a_hook_share_its_ablations(tmp_path):
    configuration = study(tmp_path)
    sae(tmp_path / "late")
    assert len(of("ablations", plan(configuration).jobs)) == 1


def test_only_the_mean_ablation_reads_the_moments(tmp_path):
    configuration = study(tmp_path)
    configuration["experiments"].append({"id": "calm", "interventions": ["zero"]})
    roles = {
        job.key["experiment"]: {role for role, _ in job.inputs} for job in of("ablations", plan(configuration).jobs)
    }
    assert roles["main"] - roles["calm"] == {"moments"}


def test_two_plans_of_one_configuration_say_the_same(tmp_path):
    configuration = everything(tmp_path)
    turned = json.loads(json.dumps(configuration), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert list(turned) != list(configuration)
    one, two = plan(configuration).jobs, plan(turned).jobs
    assert {path: job.json for path, job in one.items()} == {path: job.json for path, job in two.items()}


def test_twice_the_jobs_read_no_more_code(tmp_path, monkeypatch):
    parse, parsed = fingerprint.ast.parse, []
    monkeypatch.setattr(
        fingerprint.ast, "parse", lambda *given, **named: parsed.append(given) or parse(*given, **named)
    )
    counts = []
    for shards in (1, 2):
        parsed.clear()
        jobs = plan(study(tmp_path) | {"shards": shards}).jobs
        assert all(job.code for job in jobs.values())
        counts.append(len(parsed))
    assert counts[1] <= counts[0]


def test_a_job_tells_its_stage_where_its_inputs_are_and_what_they_must_be(tmp_path):
    made = plan(everything(tmp_path))
    for job in made.jobs.values():
        (told,) = json.loads(job.json)
        assert told == json.loads(json.dumps(job.told))
        assert told["inputs"] == [
            [role, upstream.path, made[upstream.path].fingerprint] for role, upstream in job.inputs
        ]
        assert (told["stage"], told["fingerprint"], told["code"]) == (job.stage, job.fingerprint, job.code)
        assert (told["path"], told["key"], told["settings"]) == (job.path, job.key, job.settings)


@pytest.mark.parametrize("shards", [1, 2])
def test_the_first_sae_at_every_hook_and_every_ablation_are_checked_on_the_first_shard(tmp_path, shards):
    configuration = study(tmp_path) | {"shards": shards}
    configuration["saes"].append({"id": "second", "path": sae(tmp_path / "second")})
    (job,) = of("checks", plan(configuration).jobs)
    given = [(role, upstream.key) for role, upstream in job.inputs]
    assert [key["sae"] for role, key in given if role == "effects"] == ["early", "late"]
    assert [key["hook"] for role, key in given if role == "ablations"] == [HOOK, "blocks.2.hook_resid_pre"]
    assert {key["shard"] for role, key in given if role in ROWS} == {f"0-of-{shards}"}


# Experiments of every kind.


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """A study of every kind of experiment, with atlas, metrics and families; its files are left as they are."""
    return everything(tmp_path_factory.mktemp("every"))


@pytest.fixture(scope="module")
def whole(every):
    """Its plan."""
    return plan(every)


def name_of(job):
    """A job's stage with its experiment or analysis."""
    return " ".join([job.stage, *(job.key[name] for name in ("experiment", "analysis") if name in job.key)])


def again(before, after):
    """What both plans have and the second one makes again, without the figures (their inputs say it)."""
    shared = before.jobs.keys() & after.jobs.keys()
    changed = {name_of(after[path]) for path in shared if before[path].fingerprint != after[path].fingerprint}
    return changed - {"figures"}


def new(before, after):
    return {name_of(after[path]) for path in after.jobs.keys() - before.jobs.keys()} - {"figures"}


def drawn_again(before, after):
    """The figures that both plans have and the second one makes again."""
    shared = [job for job in of("figures", after.jobs) if job.path in before.jobs]
    return {job.key["figure"] for job in shared if job.fingerprint != before[job.path].fingerprint}


# Of an experiment by itself: its own jobs, and those that these are made from.
OWN = {
    "main": {"effects", "ablations", "curvatures", "extremes", "top_tokens", "checks"},
    "ladder": {"effects", "checks"},
    "dark": {"effects", "checks"},
    "dose": {"effects", "ablations", "checks"},
    "single": {"effects", "ablations", "checks"},
    "draws": {"effects", "checks"},
    "together": {"compounds"},
    "atlas": {"ablations", "checks"},
}
MODEL = {"tokens", "weights", "clean"}
# Scores and moments are of the summary.
SHARED = {name: {*MODEL, "activations", "reconstructions", "scores", "moments"} for name in OWN}
SHARED |= {name: SHARED[name] | {"errors"} for name in ("ladder", "dark")} | {"together": MODEL}
SHARED |= {name: SHARED[name] | {"paper"} for name in ("main", "ladder", "dark")}  # SAEs alone, at every token
SHARED |= {"atlas": SHARED["atlas"] - {"reconstructions", "scores"}}


@pytest.mark.parametrize("kind", OWN)
def test_an_experiment_has_its_own_jobs_and_what_they_are_made_from_and_no_others(every, kind):
    made = plan(of_kind(every, kind))
    of_it = {job.stage for job in made.jobs.values() if job.key.get("experiment") == kind}
    assert of_it == OWN[kind]
    rest = {job.stage for job in made.jobs.values() if "experiment" not in job.key}
    assert rest - {"summary", "analyses", "figures", "report"} == SHARED[kind]
    assert {job.path for job in made.targets} == {
        job.path for job in made.jobs.values() if job.stage in (OWN[kind] - {"checks"}) | {"report", "scores"}
    }


PATCHED = {"tokens", "weights", "clean", "activations"}
ROLES = {
    "effects main": PATCHED | {"reconstructions"},
    "effects ladder": PATCHED | {"reconstructions", "moments", "errors"},
    "effects dark": PATCHED | {"reconstructions", "errors"},
    "effects dose": PATCHED | {"reconstructions"},
    "effects single": PATCHED | {"reconstructions"},
    "effects draws": PATCHED | {"reconstructions"},
    "ablations main": PATCHED | {"moments"},
    "ablations dose": PATCHED,
    "ablations single": PATCHED,
    "ablations atlas": PATCHED | {"moments"},
    "errors": {"tokens", "moments", "activations", "reconstructions"},
    "curvatures main": {"tokens", "weights", "activations", "reconstructions", "effects"},
    "extremes main": {"tokens", "effects"},
    "top_tokens main": PATCHED | {"reconstructions", "extremes"},
    "compounds together": MODEL,
}


def test_a_job_is_made_from_what_its_interventions_ask_for_and_from_nothing_else(every):
    made = plan(every | {"shards": 2})
    found = {name_of(job): set() for job in made.jobs.values()}
    for job in made.jobs.values():
        found[name_of(job)] |= {role for role, _ in job.inputs}
    assert {name: roles for name, roles in found.items() if name.partition(" ")[0] in STAGES_OF_EXPERIMENTS} == ROLES


STAGES_OF_EXPERIMENTS = {name.partition(" ")[0] for name in ROLES}


def test_a_job_of_one_shard_reads_its_own_shard_and_one_of_the_corpus_reads_all(every):
    for job in plan(every | {"shards": 2}).jobs.values():
        # How densely an SAE fires is looked at once, on the first shard.
        shards = {part.key["shard"] for role, part in job.inputs if "shard" in part.key and role != "density"}
        if "shard" in job.key:
            assert shards <= {job.key["shard"]}
        elif job.stage in ("curvatures", "checks"):
            assert shards == {"0-of-2"}
        elif job.stage in ("errors", "extremes", "top_tokens", "moments"):
            assert shards == {"0-of-2", "1-of-2"}


@pytest.mark.parametrize("kind", ["single", "draws"])
def test_one_position_is_told_where_and_how_often_and_all_tokens_are_not(whole, kind):
    told = {name: job.settings for name, job in ((name_of(job), job) for job in whole.jobs.values())}
    places = {name: told[f"effects {kind}"][name] for name in ("positions", "horizon", "contexts")}
    assert places == {"positions": [4], "horizon": KINDS[kind].get("horizon", 0), "contexts": None}
    assert not {"positions", "horizon", "contexts"} & told["effects main"].keys()
    assert told["effects draws"]["draws"] == 8


def test_a_strength_is_an_intervention_of_its_own_and_goes_where_it_belongs(whole):
    told = {name_of(job): job.settings.get("interventions") for job in whole.jobs.values()}
    scaled = [f"{name}_scaled({alpha})" for name in ("error", "eps_random") for alpha in ("0.5", "1")]
    assert told["effects dose"] == ["identity", *scaled, "theta_error_at(0.9)"]
    assert told["ablations dose"] == ["identity", "theta_random_at(0.9)"]


def test_only_what_draws_noise_is_told_the_seed(every):
    for job in plan(every | {"seed": 5}).jobs.values():
        name = name_of(job)
        if name in ("effects dark", "ablations main", "ablations single"):
            assert not job.settings.keys() & {"seed", "draws"}
        elif name in ROLES and name not in ("errors", "extremes main"):
            assert job.settings["seed"] == 5


def test_single_tokens_are_looked_at_for_the_pair_alone(whole):
    for stage in ("curvatures", "top_tokens"):
        assert {tuple(job.settings["interventions"]) for job in of(stage, whole.jobs)} == {tuple(PAIR)}
        assert all(job.names == set(PAIR) for job in of(stage, whole.jobs))


# What a change makes again. The key that is changed, and all that is made again but figures.


def changed(configuration, kind, **changes):
    """A copy with other keys of one experiment; None takes a key away."""
    configuration = deepcopy(configuration)
    for entry in configuration["experiments"]:
        if entry["id"] == kind:
            entry |= changes
            for key in [key for key, value in entry.items() if value is None]:
                del entry[key]
    return configuration


VERDICTS = {"analyses metric_ranks", "analyses metric_agreements", "analyses metric_flips"}
METRICS = {"analyses metrics", *VERDICTS}
FRONTIERS = {"analyses frontier_points", "analyses frontier_fits", "analyses frontier_factors"}
SUMMARY = {"summary", "paper", "report"}
DOSE = {"effects dose", "checks dose", "analyses doses", "analyses exponents", "analyses cosines"} | SUMMARY
SINGLE = {"effects single", "ablations single", "checks single", "analyses single_positions", "report"}
DRAWS = {"effects draws", "checks draws", "analyses draws", "analyses draws_found", "report"}
TOGETHER = {"compounds together", "analyses compounding", "report"}
LADDER = {"effects ladder", "checks ladder", "analyses rungs"} | SUMMARY
SELECTED = {"extremes main", "top_tokens main", "report"}
MAIN = {"effects main", "curvatures main", "checks main", "analyses curvature", "analyses correlations"}
MAIN |= SELECTED | METRICS | FRONTIERS | SUMMARY
ATLAS = {"ablations atlas", "checks atlas", "analyses atlas", "report"}
CHANGES = {
    "more draws": ("draws", {"draws": 16}, DRAWS),
    "contexts of draws": ("draws", {"contexts": 16}, DRAWS),
    "draws of the ladder": ("ladder", {"draws": 3}, LADDER),
    "positions": ("single", {"positions": [4, 5]}, SINGLE),
    "horizon": ("single", {"horizon": 3}, SINGLE),
    "contexts": ("single", {"contexts": 8}, SINGLE),
    "special tokens at one position": ("single", {"patch_special": True}, SINGLE),
    "one more alpha": ("dose", {"alphas": [0.5, 1, 2]}, DOSE),
    "another cosine": ("dose", {"cosines": [0.8]}, DOSE | {"ablations dose"}),
    "contexts of sets": ("together", {"contexts": 24}, TOGETHER),
    "what sets encode": ("together", {"encode": "clean"}, TOGETHER),
    "other sets": ("together", {"saes": ["early", "late", "coder"], "sets": [["coder", "late"]]}, TOGETHER),
    "another intervention of sets": ("together", {"interventions": [*PAIR, "act_cov_random"]}, TOGETHER),
    "fewer examples": ("main", {"examples": 1}, SELECTED),
    "a chosen token": ("main", {"chosen": [[3, 4]]}, SELECTED),
    "curvature": ("main", {"curvature": 16}, {"curvatures main", "analyses curvature", "report"}),
    "special tokens": ("main", {"patch_special": True}, MAIN | {"ablations main"}),
    "one more intervention of the SAE": ("main", {"interventions": [*PAIR, "sae_norm", "zero", "mean"]}, MAIN),
    "one more ablation": (
        "main",
        {"interventions": [*PAIR, "zero", "mean", "resample"]},
        {"ablations main", "checks main"} | METRICS | FRONTIERS | SUMMARY,
    ),
}


@pytest.mark.parametrize(("kind", "changes", "expected"), CHANGES.values(), ids=CHANGES)
def test_a_change_of_one_experiment_makes_it_again_and_what_shows_it(every, whole, kind, changes, expected):
    assert again(whole, plan(changed(every, kind, **changes))) == expected


def test_another_seed_makes_again_all_that_is_random_and_every_interval(every, whole):
    before, after = whole, plan(every | {"seed": 1})
    random = {f"effects {kind}" for kind in ("main", "ladder", "dose", "single", "draws")}
    random |= {name.replace("effects", "checks") for name in random} | {"ablations dose", "compounds together"}
    random |= {"curvatures main", "extremes main", "top_tokens main", "ablations atlas", "checks atlas"}
    assert again(before, after) == random | {f"analyses {name}" for name in before.analyses} | SUMMARY


def test_another_bootstrap_computes_nothing_of_a_model_again(every, whole):
    before, after = whole, plan(every | {"bootstrap": {"samples": 101}})
    assert again(before, after) == {f"analyses {name}" for name in before.analyses} | SUMMARY


def test_another_series_draws_a_figure_again(every, whole):
    series = [every["series"][0] | {"axis": "tokens seen"}]
    assert changed_stages(whole, plan(every | {"series": series})) == {"figures", "report"}


# What else is made again where the experiment is new: tables of all that replace every token. The metrics are about
# `main`, and without it about `ladder` and `dark`, which have purposes of their own.
SHOWN = dict.fromkeys(("ladder", "dark", "dose"), SUMMARY) | {"main": SUMMARY | METRICS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_experiment_of_any_kind_leaves_all_others_current(every, kind):
    others = [entry for entry in every["experiments"] if entry["id"] != kind]
    rest = {"atlas": every["atlas"], "series": every["series"]}
    before, after = (plan(alone(every, *entries, **rest)) for entries in (others, every["experiments"]))
    assert again(before, after) == SHOWN.get(kind, {"report"})
    of_its_own = {f"{stage} {kind}" for stage in OWN[kind]}
    assert of_its_own <= new(before, after)
    analyses = {f"analyses {name}" for name in after.analyses}
    # Other rows of the corpus were there already, but for `moments` of an SAE and the like.
    assert new(before, after) - of_its_own - analyses <= {"errors", "moments"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_experiment_of_a_kind_leaves_the_first_current(every, whole, kind):
    more = every | {"experiments": [*every["experiments"], KINDS[kind] | {"id": "second"}]}
    before, after = whole, plan(more)
    assert {name.split()[0] for name in again(before, after)} <= {"analyses", *SUMMARY}
    assert new(before, after) == {f"{stage} second" for stage in OWN[kind]}


@pytest.mark.parametrize("hook", [HOOK, "blocks.1.attn.hook_z"], ids=["at a known hook", "at a new hook"])
def test_a_new_sae_computes_its_own_and_leaves_all_others_current(every, whole, tmp_path, hook):
    path = sae(tmp_path / "third", hook=hook, d_in=16 if hook == HOOK else 8)
    more = every | {"saes": [{"id": "third", "path": path}, *every["saes"]]}
    before, after = whole, plan(more)
    shown = {"checks main", "checks single", "analyses single_positions"} | METRICS | SUMMARY  # it is in no family
    assert again(before, after) == shown | {"analyses curvature", "analyses correlations"}
    own = {"reconstructions", "scores", "effects main", "effects single"}
    own |= {"curvatures main", "extremes main", "top_tokens main"}
    of_the_hook = {"activations", "moments", "ablations main", "ablations single"}
    assert new(before, after) == own | (set() if hook == HOOK else of_the_hook)
    made = {job.key.get("sae", "third") for path, job in after.jobs.items() if path not in before.jobs}
    assert made == {"third"}


def test_an_experiment_that_names_its_saes_knows_nothing_of_another(tmp_path):
    configuration = everything(tmp_path)
    new_one = {"id": "third", "path": sae(tmp_path / "third", hook="blocks.0.hook_resid_pre")}
    configuration = changed(configuration, "together", saes=None)
    more = configuration | {"saes": [*configuration["saes"], new_one]}
    assert "compounds together" in again(plan(configuration), plan(more))
    one_set = {"saes": None, "sets": [["early", "coder"]]}
    before, after = (plan(changed(each, "together", **one_set)) for each in (configuration, more))
    assert "compounds together" not in again(before, after)


def test_other_weights_of_an_sae_make_again_what_it_is_in(tmp_path):
    configuration = everything(tmp_path)
    before = plan(configuration)
    before_it = {path: job.fingerprint for path, job in before.jobs.items()}
    with open(tmp_path / "late" / "sae_weights.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")  # trained for longer
    after = plan(configuration)
    changed_jobs = [job for path, job in after.jobs.items() if job.fingerprint != before_it[path]]
    assert {job.key["sae"] for job in changed_jobs if "sae" in job.key} == {"late"}
    names = {name_of(job) for job in changed_jobs}
    assert {"compounds together", "curvatures main", "extremes main", "top_tokens main", "effects single"} <= names
    assert not {"effects draws", "effects dose", "analyses rungs", "analyses draws", "ablations main"} & names


# Metrics, families and the atlas.


def measured(given, **changes):
    """A copy with other `metrics`."""
    return deepcopy(given) | {"metrics": deepcopy(given["metrics"]) | changes}


COMPUTED = {"analyses calibrated", "paper", "report"} | METRICS
FAMILIES = [{"id": "one", "saes": ["early"]}, {"id": "two", "saes": ["coder"]}]
# What is changed, and all that is made again, with its figures: nothing that runs a model.
MEASURES = {
    "one law less": ({"calibrations": ["kaplan"]}, COMPUTED, {"effective_compute", "metric_verdicts"}),
    "another family": ({"families": FAMILIES}, FRONTIERS | {"report"}, {"frontier"}),
    "another baseline": ({"baseline": "unigram"}, FRONTIERS | {"report"}, {"frontier"}),
    "the smoothing of bigrams": (
        {"bigram_smoothing": 3},
        METRICS | {"paper", "report"},
        {"effective_compute", "metric_verdicts"},
    ),
    "other columns": ({"columns": ["l0", "kl"]}, {"paper", "report"}, set()),
}


@pytest.mark.parametrize(("changes", "expected", "figures"), MEASURES.values(), ids=MEASURES)
def test_what_metrics_are_measured_against_makes_again_what_is_made_with_it(every, whole, changes, expected, figures):
    after = plan(measured(every, **changes))
    assert again(whole, after) == expected
    assert drawn_again(whole, after) == figures
    assert new(whole, after) == set()


def test_a_changed_calibration_file_makes_again_only_what_is_made_with_it(tmp_path):
    configuration = everything(tmp_path)
    before = plan(configuration)
    calibration(tmp_path / "own.csv", floor=1.25)
    after = plan(configuration)
    assert again(before, after) == COMPUTED
    assert drawn_again(before, after) == {"effective_compute", "metric_verdicts"}


def test_a_published_law_is_the_same_wherever_the_project_lies(every, whole, tmp_path, monkeypatch):
    shutil.copytree(measures.PUBLISHED, tmp_path / "calibrations")
    monkeypatch.setattr(measures, "PUBLISHED", tmp_path / "calibrations")
    assert again(whole, plan(every)) == set()


def test_the_first_families_make_nothing_again_but_the_report(every, whole):
    before = plan(measured(every, families=[]))
    assert again(before, whole) == {"report"}
    assert new(before, whole) == FRONTIERS


@pytest.mark.parametrize("corpus", ["story", "poem"], ids=["on a known corpus", "on a new corpus"])
def test_a_new_atlas_makes_nothing_else_stale(tmp_path, corpus):
    configuration = everything(tmp_path)
    (tmp_path / "poem.txt").write_text("Two roads diverged in a yellow wood")
    configuration["corpora"].append({"id": "poem", "path": str(tmp_path / "poem.txt"), "context": 16})
    for entry in configuration["experiments"]:
        entry["corpora"] = ["story"]
    atlas = configuration.pop("atlas")
    before, after = plan(configuration), plan(configuration | {"atlas": atlas | {"corpora": [corpus]}})
    assert again(before, after) == {"report"}
    assert drawn_again(before, after) == set()
    own = (ATLAS - {"report"}) | {"activations", "moments"}
    assert new(before, after) == own | ({"tokens", "clean"} if corpus == "poem" else set())


def test_another_atlas_makes_only_itself_again(every, whole):
    after = plan(every | {"atlas": every["atlas"] | {"contexts": 8}})
    assert again(whole, after) == ATLAS
    assert drawn_again(whole, after) == {"atlas_by_layer", "atlas_heads"}


def ablated(made):
    """(hook, interventions) of every job of the atlas."""
    jobs = [job for job in of("ablations", made.jobs) if job.key["experiment"] == "atlas"]
    return {job.key["hook"]: job.settings["interventions"] for job in jobs}


def test_the_atlas_ablates_streams_whole_and_attention_head_by_head(whole):
    heads = [f"{name}_head({head})" for name in ("zero", "mean", "resample") for head in (0, 1)]
    sites = {"hook_resid_pre": ["zero", "mean", "resample"], "attn.hook_z": heads}
    expected = {f"blocks.{layer}.{site}": ["identity", *names] for layer in (0, 2) for site, names in sites.items()}
    assert ablated(whole) == expected
    told = [job.settings for job in of("ablations", whole.jobs) if job.key["experiment"] == "atlas"]
    assert {(each["scope"], each["contexts"]) for each in told} == {("all", 16)}


def test_an_atlas_needs_no_sae_and_is_all_components_but_z_at_all_layers(every):
    made = plan(alone(every, atlas={}, saes=[]))
    streams = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"]
    assert set(ablated(made)) == {f"blocks.{layer}.{site}" for layer in range(3) for site in streams}
    shown = {"summary", "analyses", "figures", "report"}
    assert {job.stage for job in made.jobs.values()} == MODEL | {"activations", "moments", *OWN["atlas"], *shown}


def test_streams_that_a_parallel_model_lacks_are_left_out_unless_they_are_asked_for(tmp_path):
    configuration = alone(everything(tmp_path), atlas={"layers": [1]})
    mid = "blocks.1.hook_resid_mid"
    for parallel in (True, False):
        model(tmp_path / "tiny", model_type="gpt_neox", use_parallel_residual=parallel)
        assert (mid in ablated(plan(configuration))) is not parallel
    model(tmp_path / "tiny", model_type="gpt_neox")  # as Pythia is, which does not say it
    assert len(ablated(plan(configuration))) == 4
    configuration["atlas"]["components"] = ["resid_pre", "resid_mid"]
    with pytest.raises(ValueError, match="model 'tiny' runs attention and MLP side by side and has no 'resid_mid'"):
        plan(configuration)


def test_a_stream_is_left_out_of_the_parallel_model_alone(tmp_path):
    configuration = alone(everything(tmp_path), atlas={"layers": [1]}, saes=[])
    configuration["models"].append({"id": "wide", "path": model(tmp_path / "wide", model_type="gptj")})
    hooks = {"tiny": set(), "wide": set()}
    for job in of("ablations", plan(configuration).jobs):
        hooks[job.key["model"]].add(job.key["hook"])
    assert hooks["tiny"] - hooks["wide"] == {"blocks.1.hook_resid_mid"}
    assert hooks["wide"] < hooks["tiny"]


# What a change of the code makes again.


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package, of which plans take the code."""
    copy = tmp_path / "package"
    shutil.copytree(fingerprint.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("code_digest", "registered"):
        monkeypatch.setattr(fingerprint, name, partial(getattr(fingerprint, name), package=copy))
    return copy


def edit(package, module, old, text):
    path = package / f"{module}.py"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, text))
    os.utime(path, ns=(path.stat().st_mtime_ns + 10**9,) * 2)


NEW_INTERVENTION = "@INTERVENTIONS.register\ndef halved(x: Acts) -> Acts:\n    return x / 2\n\n\ndef arguments("
WITH_NOISE = {f"effects {kind}" for kind in ("main", "ladder", "single", "draws")}
WITH_NOISE |= {name.replace("effects", "checks") for name in WITH_NOISE}
WITH_NOISE |= {"curvatures main", "extremes main", "top_tokens main", "compounds together"}
WITH_NOISE |= {f"analyses {name}" for name in ("rungs", "single_positions", "draws", "draws_found", "compounding")}
WITH_NOISE |= {"analyses curvature", "analyses correlations"} | METRICS | FRONTIERS | SUMMARY
EDITS = {
    "a new intervention": ("interventions", "def arguments(", NEW_INTERVENTION, set()),
    "a random direction": (
        "interventions",
        "return x + _norm(x_hat - x) * _unit(noise)",
        "return x - _norm(x_hat - x) * _unit(noise)",
        WITH_NOISE,
    ),
    "a rung of the ladder": (
        "interventions",
        "return x + _norm(x_hat - x) * _unit(act_noise)",
        "return x - _norm(x_hat - x) * _unit(act_noise)",
        LADDER,
    ),
    "a dose": ("interventions", "return x + alpha * (x_hat - x)", "return x_hat * alpha + x * (1 - alpha)", DOSE),
    "a head's ablation": ("interventions", "torch.where(head, 0, x)", "torch.where(head, x * 0, x)", ATLAS),
    "what no experiment names": ("interventions", "return 2 * x - x_hat", "return x - (x_hat - x)", set()),
    "a new kind of argument": (
        "labels",
        '"cosine": ("cosines",),',
        '"cosine": ("cosines",), "sine": ("cosines",),',
        set(),
    ),
    "a figure": ("figures", "mean loss increase, nats", "loss increase", {"report"}),
    "an analysis": ("analyses", "dose_summary(table, boot(table))", "dose_summary(table, None)", "analyses exponents"),
    "a new analysis": (
        "analyses",
        "def _each(",
        "@ANALYSES.register\ndef nothing(effects: Tables):\n    return None\n\n\ndef _each(",
        None,
    ),
}


@pytest.mark.parametrize(("module", "old", "text", "expected"), EDITS.values(), ids=EDITS)
def test_an_edit_makes_again_what_is_made_with_the_function(tmp_path, package, module, old, text, expected):
    configuration = everything(tmp_path)
    before = plan(configuration)
    edit(package, module, old, text)
    if expected is None:  # It must say what it is about.
        with pytest.raises(KeyError, match="nothing"):
            plan(configuration)
        return
    after = plan(configuration)
    assert again(before, after) == ({expected, "report"} if isinstance(expected, str) else expected)


# Sets of SAEs.


def compounds(made):
    return {job.key["model"]: job for job in made.jobs.values() if job.stage == "compounds"}


def test_sets_are_of_saes_in_the_order_of_layers(tmp_path):
    configuration = changed(everything(tmp_path), "together", saes=["coder", "late", "early"])
    configuration["saes"].reverse()
    told = compounds(plan(configuration))["tiny"].settings
    assert [each["id"] for each in told["saes"]] == ["early", "coder", "late"]  # the last two are of one layer
    names = ["early", "coder", "late", "first 2", "all", "early+late", "coder+late"]
    assert [each["name"] for each in told["sets"]] == names
    assert told["interventions"] == PAIR


def test_what_sets_need_is_asked_for_and_no_more(every):
    def roles(**changes):
        (job,) = compounds(plan(changed(every, "together", **changes))).values()
        return {(role, upstream.key.get("hook")) for role, upstream in job.inputs} - {(role, None) for role in MODEL}

    hooks = {HOOK, "blocks.2.hook_resid_pre"}
    assert roles() == set()
    assert roles(interventions=["sae", "act_cov_random"]) == {("moments", hook) for hook in hooks}
    assert roles(encode="clean") == {("activations", hook) for hook in hooks}
    both = {HOOK, "blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out"}
    sets = {"saes": "all", "sets": [["early", "coder"]]}
    assert roles(encode="clean", **sets) == {("activations", hook) for hook in both}


def test_sets_are_told_what_to_encode_and_where_and_how_the_model_is_run(every):
    def told(**changes):
        (job,) = compounds(plan(changed(every, "together", **changes) | {"seed": 3})).values()
        return {name: job.settings[name] for name in ("encode", "contexts", "patch_special", "seed", "interventions")}

    plain = {"encode": "patched", "contexts": 16, "patch_special": False, "seed": 3, "interventions": PAIR}
    assert told() == told(interventions=["identity", *PAIR]) == plain
    assert told(encode="clean", contexts=8) == plain | {"encode": "clean", "contexts": 8}
    given = {"interventions": ["sae"], "contexts": None, "patch_special": True}
    assert told(**given) == plain | given | {"seed": 0}


def test_every_model_has_its_own_sets(tmp_path):
    configuration = everything(tmp_path)
    configuration["models"].append({"id": "other", "path": model(tmp_path / "other")})
    configuration["saes"] = [entry | {"model": "tiny"} for entry in configuration["saes"]]
    for layer in range(2):
        name = f"other{layer}"
        path = sae(tmp_path / name, hook=f"blocks.{layer}.hook_resid_pre")
        configuration["saes"].append({"id": name, "path": path, "model": "other"})
    sets = [["early", "late"], ["other1", "other0"]]
    jobs = compounds(plan(changed(configuration, "together", saes="all", sets=sets)))
    told = {name: [each["name"] for each in job.settings["sets"]] for name, job in jobs.items()}
    assert told == {"tiny": ["early", "late", "early+late"], "other": ["other0", "other1", "other1+other0"]}
    assert [each["id"] for each in jobs["other"].settings["saes"]] == ["other0", "other1"]
    jobs = compounds(plan(changed(configuration, "together", saes="all", sets=sets[:1])))
    assert set(jobs) == {"tiny"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_study_is_planned_without_reading_code_for_every_job(tmp_path, kind, monkeypatch):
    parse, parsed = fingerprint.ast.parse, []
    monkeypatch.setattr(
        fingerprint.ast, "parse", lambda *given, **named: parsed.append(named) or parse(*given, **named)
    )
    counts = []
    for copies in (1, 4):
        entries = [KINDS[kind] | {"id": f"copy{i}"} for i in range(copies)]
        parsed.clear()
        plan(alone(everything(tmp_path), *entries))
        # `registered` looks at the interventions once for each experiment.
        counts.append(len(parsed) - copies)
    assert counts[1] <= counts[0]


# Batches.


def groups(made, stage):
    """The SAEs or hooks of each batch of a stage, by the stamp's path."""
    batches = [step for step in made.steps.values() if step.stage == stage]
    assert all(isinstance(step, Batch) for step in batches)
    return {step.path: [job.key.get("sae") or job.key["hook"] for job in step.jobs] for step in batches}


def with_saes(folder, count):
    """A study of that many SAEs at one hook."""
    saes = [{"id": f"s{i}", "path": sae(folder / f"s{i}")} for i in range(count)]
    return study(folder) | {"saes": saes}


@pytest.mark.parametrize(("size", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (8, [5])])
def test_items_are_batched_in_the_order_of_the_configuration(tmp_path, size, sizes):
    made = plan(with_saes(tmp_path, 5) | {"batch": size})
    for stage, place in (("effects", "main/tiny"), ("reconstructions", "tiny")):
        found = groups(made, stage)
        assert list(found) == [f"results/batches/{stage}/{place}/story/0-of-1/{i}.json" for i in range(len(sizes))]
        assert [len(names) for names in found.values()] == sizes
        assert [name for names in found.values() for name in names] == [f"s{i}" for i in range(5)]
    assert len(groups(made, "ablations")) == len(groups(made, "activations")) == 1  # one hook


def test_a_batch_has_one_stage_experiment_model_corpus_and_shard(tmp_path):
    configuration = study(tmp_path) | {"shards": 2}
    configuration["models"].append({"id": "other", "path": model(tmp_path / "other")})
    (tmp_path / "poem.txt").write_text("Two roads diverged in a yellow wood")
    configuration["corpora"].append({"id": "poem", "path": str(tmp_path / "poem.txt"), "context": 16})
    configuration["experiments"].append({"id": "more", "interventions": ["sae_norm", "zero"]})
    configuration["saes"] = [entry | {"model": "tiny"} for entry in configuration["saes"]]
    configuration["saes"].append({"id": "others", "path": sae(tmp_path / "others"), "model": "other"})
    made = plan(configuration)
    for stage, kinds in (("effects", 2), ("ablations", 2), ("activations", 1), ("reconstructions", 1)):
        batches = [step for step in made.steps.values() if step.stage == stage]
        assert len(batches) == kinds * 2 * 2 * 2  # models, corpora, shards
        for batch in batches:
            models = {job.key.get("model") or job.settings["model"] for job in batch.jobs}
            assert models == {batch.key["model"]}
            for name in batch.key.keys() - {"model", "batch"}:
                assert {job.key[name] for job in batch.jobs} == {batch.key[name]}


def test_every_job_is_made_by_one_step_and_a_batch_tells_what_its_jobs_tell(tmp_path):
    made = plan(everything(tmp_path) | {"shards": 2, "batch": 2})
    for path, step in made.steps.items():
        assert path == step.path
        assert all(made.step(job) is step for job in step.jobs)
        assert json.loads(step.json) == [json.loads(json.dumps(job.told)) for job in step.jobs]
        given = [upstream.path for _, upstream in step.inputs]
        assert len(given) == len(set(given))
        assert set(given) == {upstream.path for job in step.jobs for _, upstream in job.inputs}
    assert {step.stage for step in made.steps.values()} == set(PATTERNS)
    paths = [job.path for step in made.steps.values() for job in step.jobs]
    assert sorted(paths) == sorted(made.jobs)
    assert {step.stage for step in made.steps.values() if isinstance(step, Batch)} == set(BATCHES)


def test_the_size_of_batches_changes_no_fingerprint(tmp_path):
    one, eight = (plan(with_saes(tmp_path, 3) | {"batch": size}).jobs for size in (1, 8))
    assert {path: job.told for path, job in one.items()} == {path: job.told for path, job in eight.items()}


def stages_to_make(made: Plan, **states: str) -> set[str]:
    """The stages that run where every file is current but those of some stages."""
    steps = made.to_make(lambda path: states.get(made[path].stage, "current"))
    return {made.steps[path].stage for path in steps}


@pytest.mark.parametrize("stage", sorted(ROWS | {"report"}))
def test_a_missing_result_is_made_again_and_nothing_else(tmp_path, stage):
    assert stages_to_make(plan(study(tmp_path)), **{stage: "missing"}) == {stage}


@pytest.mark.parametrize(
    "stage",
    [*sorted(MODEL), "activations", "reconstructions", "moments", "summary", "analyses", "paper", "figures", "checks"],
)
def test_what_is_missing_and_asked_for_by_nothing_is_not_made(tmp_path, stage):
    made = plan(study(tmp_path))
    assert stages_to_make(made, **{stage: "missing"}) == set()
    assert stages_to_make(made, **{stage: "stale"}) == {stage}


def test_what_is_missing_and_asked_for_is_made_all_the_way_up(tmp_path):
    made = plan(study(tmp_path))
    missing = dict.fromkeys(["tokens", "weights", "activations", "moments", "clean"], "missing")
    # The moments are asked for by the summary and by the mean ablation, which are current.
    assert stages_to_make(made, **missing, effects="stale") == {"effects", *missing} - {"moments"}
    assert stages_to_make(made, **missing, reconstructions="stale") == {
        "reconstructions",
        "activations",
        "tokens",
        "weights",
    }


@pytest.mark.parametrize(
    ("precision", "stages"),
    [
        ({}, None),
        ({"blocks": "float32"}, None),
        ({"difference": "tf32"}, {"effects", "ablations", "checks"}),
        ({"blocks": "tf32"}, {"moments", "checks"} | OF_A_SHARD),
    ],
    ids=["nothing", "the default", "difference", "blocks"],
)
def test_another_precision_makes_again_what_is_computed_in_it(tmp_path, precision, stages):
    configuration = study(tmp_path)
    before, after = plan(configuration), plan(configuration | {"precision": precision})
    assert changed_stages(before, after) == (stages | AGGREGATES | {"analyses"} if stages else set())


# What is dropped when it is consumed (`keep`).


def test_what_is_kept_is_needed_by_nothing_that_a_stage_would_look_at(whole):
    assert not any(job.told["needed_by"] or job.told["drop"] for job in whole.jobs.values())


def consumers(made, path):
    """All lasting items that are made from a file, directly or through another that is dropped."""
    found = set()
    for job in made.jobs.values():
        if path in {upstream.path for _, upstream in job.inputs}:
            found |= consumers(made, job.path) if job.stage in DROPPABLE else {job.path}
    return found


def test_a_dropped_item_is_needed_by_all_that_lasts_of_it_however_far_down(every, whole):
    made = plan(every | {"keep": [], "shards": 2})
    for job in made.jobs.values():
        expected = consumers(made, job.path) if job.stage in DROPPABLE else set()
        assert job.needed_by.keys() == expected
        assert job.told["needed_by"] == [[path, made[path].fingerprint] for path in job.needed_by]
    assert plan(every | {"keep": []}).jobs.keys() == whole.jobs.keys()
    assert changed_stages(whole, plan(every | {"keep": []})) == set()


def test_the_last_that_needs_an_item_is_told_that_it_may_go(every):
    made = plan(every | {"keep": []})
    for job in made.jobs.values():
        told = {path: [mark[0] for mark in marks] for path, marks in job.told["drop"]}
        assert all(told[path] == list(made[path].needed_by) for path in told)
        if job.stage not in DROPPABLE:
            assert {path for path in made.jobs if job.path in made[path].needed_by} == told.keys()


def test_reconstructions_alone_are_dropped_where_activations_are_kept(every):
    made = plan(every | {"keep": ["activations"]})
    assert {job.stage for job in made.jobs.values() if job.needed_by} == {"reconstructions"}


@pytest.mark.parametrize(
    ("contexts", "shards", "read"),
    [(None, 4, 4), (64, 4, 4), (65, 4, 4), (128, 4, 2), (136, 4, 2), (160, 2, 1), (160, 20, 8), (160, 1, 1)],
)
def test_dense_features_are_told_from_the_shards_of_the_first_contexts(tmp_path, contexts, shards, read):
    configuration = study(tmp_path) | {"shards": shards}
    configuration["corpora"][0]["contexts"] = contexts
    if contexts is None:
        del configuration["corpora"][0]["contexts"]
    made = plan(configuration)
    for job in of("reconstructions", made.jobs):
        asked = [upstream.key["shard"] for role, upstream in job.inputs if role == "density"]
        assert asked == made.shards[:read]
    bounds = [shard_bounds(contexts or 10**6, shard)[0] for shard in made.shards]
    assert contexts is None or sum(first < DENSE_CONTEXTS for first in bounds) == read
