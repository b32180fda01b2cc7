"""Which jobs a study has, and which of them another study makes again."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
from fakes import HOOK, model, sae, study
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import config, fingerprint
from pipeline.batches import BATCH, shard_bounds
from pipeline.plan import BATCHES, Batch, Plan

AGGREGATES = {"summary", "figures", "report"}
ROWS = {"reconstructions", "effects", "ablations"}


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
    assert changed_stages(before, after) == {"effects", "checks"} | AGGREGATES
    effects = [path for path, job in before.jobs.items() if job.stage == "effects"]
    again = {path for path in effects if before[path].fingerprint != after[path].fingerprint}
    assert again == {path for path in effects if "/main/" in path}


def test_another_number_of_shards_gives_other_files(tmp_path):
    configuration = study(tmp_path)
    one, two = plan(configuration).jobs, plan(configuration | {"shards": 2}).jobs
    sharded = {path for path in one if "0-of-1" in path}
    assert {one[path].stage for path in sharded} == {"clean", "activations", "reconstructions", "effects", "ablations"}
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
    assert changed_stages(before, after) == {"checks"} | AGGREGATES
    new = {after[path].stage for path in after.jobs.keys() - before.jobs.keys()}
    assert new == {"reconstructions", "effects"} | (set() if hook == HOOK else {"activations", "moments", "ablations"})


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
            {"reconstructions", "effects", "checks"},
        ),
        (lambda c, folder: c["experiments"][0].update(patch_special=True), {"effects", "ablations", "checks"}),
        (lambda c, folder: c.update(bootstrap={"samples": 100}), set()),
        (
            lambda c, folder: c["models"][0].update(processing={"center_unembed": True}),
            {"weights", "clean", "activations", "moments", "checks"} | ROWS,
        ),
        (
            lambda c, folder: c["corpora"][0].update(prepend_bos=False),
            {"tokens", "clean", "activations", "moments", "checks"} | ROWS,
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
    } == stages | AGGREGATES


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
    configuration = study(tmp_path)
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
    made = plan(study(tmp_path))
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
    (tmp_path / "poem.txt").write_text("Two roads")
    configuration["corpora"].append({"id": "poem", "path": str(tmp_path / "poem.txt"), "context": 16})
    configuration["experiments"].append({"id": "more", "interventions": ["sae_norm", "zero"]})
    configuration["saes"] = [entry | {"model": "tiny"} for entry in configuration["saes"]]
    configuration["saes"].append({"id": "others", "path": sae(tmp_path / "others"), "model": "other"})
    made = plan(configuration)
    for stage, experiments in (("effects", 2), ("ablations", 2), ("activations", 1), ("reconstructions", 1)):
        batches = [step for step in made.steps.values() if step.stage == stage]
        assert len(batches) == experiments * 2 * 2 * 2  # models, corpora, shards
        for batch in batches:
            models = {job.key.get("model") or job.settings["model"] for job in batch.jobs}
            assert models == {batch.key["model"]}
            for name in batch.key.keys() - {"model", "batch"}:
                assert {job.key[name] for job in batch.jobs} == {batch.key[name]}


def test_every_job_is_made_by_one_step_and_a_batch_tells_what_its_jobs_tell(tmp_path):
    made = plan(study(tmp_path) | {"shards": 2, "batch": 2})
    for path, step in made.steps.items():
        assert path == step.path
        assert all(made.step(job) is step for job in step.jobs)
        assert json.loads(step.json) == [json.loads(json.dumps(job.told)) for job in step.jobs]
        given = [upstream.path for _, upstream in step.inputs]
        assert len(given) == len(set(given))
        assert set(given) == {upstream.path for job in step.jobs for _, upstream in job.inputs}
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


@pytest.mark.parametrize("stage", ["tokens", "weights", "clean", "activations", "moments", "summary", "checks"])
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
        ({"blocks": "tf32"}, {"clean", "activations", "moments", "checks"} | ROWS),
    ],
    ids=["nothing", "the default", "difference", "blocks"],
)
def test_another_precision_makes_again_what_is_computed_in_it(tmp_path, precision, stages):
    configuration = study(tmp_path)
    before, after = plan(configuration), plan(configuration | {"precision": precision})
    assert changed_stages(before, after) == (stages | AGGREGATES if stages else set())
