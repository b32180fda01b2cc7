"""The part `metrics` of a configuration: what it gives, and which families it refuses; the rest of that is in
test_bad_input.py."""

from dataclasses import fields

import pytest
import yaml
from fakes import ROOT, model, sae, study

from pipeline import config, paper_table
from pipeline.measures import Measures
from pipeline.metric_tables import TEXT
from pipeline.normalised import BASELINES
from pipeline.plan import Plan

SCHEMA = yaml.safe_load(config.SCHEMA.read_text())["properties"]["metrics"]["properties"]
LAWS = ("kaplan", "cerebras-gpt", "chinchilla", "chinchilla-refit")
OWN = "# name: {}\n# kind: law\n# source: s\n# corpus: c\n# lowest_flop: none\n# highest_flop: none\nparameter,value\n"
OWN += "scale_flop,1e20\nexponent,0.1\nfloor,1\n"
# Hooks of the SAEs; `early`, `middle` and `more` are at one.
SAES = {"early": "blocks.1.hook_resid_pre", "middle": "blocks.1.hook_resid_pre", "more": "blocks.1.hook_resid_pre"}
SAES |= {"late": "blocks.2.hook_resid_pre"}


def several(folder, interventions=("sae", "zero")) -> dict:
    """A correct study of these SAEs, with one experiment."""
    given = study(folder) | {"experiments": [{"id": "main", "interventions": list(interventions)}]}
    given["saes"] = [{"id": name, "path": sae(folder / name, hook=hook)} for name, hook in SAES.items()]
    return given


def loaded(folder, given=None, **metrics) -> Measures:
    return config.load((given or several(folder)) | {"metrics": metrics}).metrics


def family(name, *saes) -> dict:
    return {"id": name, "saes": list(saes)}


def own(folder, name="mine", file="mine.csv") -> str:
    (folder / file).write_text(OWN.format(name))
    return str(folder / file)


# What is right.


def test_what_is_left_out_gets_its_default(tmp_path):
    found = config.load(several(tmp_path)).metrics
    assert found == loaded(tmp_path)
    assert found.calibrations == tuple(ROOT / "calibrations" / f"{name}.csv" for name in LAWS)
    assert (found.bigram_smoothing, dict(found.families), found.baseline) == (100.0, {}, "zero")
    assert (found.points, found.relative, found.matched) == ("pareto", False, ())
    assert found.columns == paper_table.DEFAULT


def test_what_is_given_is_kept_in_its_order(tmp_path):
    families = [family("b", "more", "early"), family("a", "late")]
    given = {"calibrations": ["kaplan", own(tmp_path)], "bigram_smoothing": 3, "families": families, "points": "all"}
    given |= {"baseline": "unigram", "relative": True, "matched": [32.5, 8.5], "columns": ["kl", "l0"]}
    found = loaded(tmp_path, **given)
    assert [path.name for path in found.calibrations] == ["kaplan.csv", "mine.csv"]
    assert list(found.families.items()) == [("b", ("more", "early")), ("a", ("late",))]
    assert (found.bigram_smoothing, found.baseline, found.points, found.relative) == (3.0, "unigram", "all", True)
    assert (found.matched, found.columns) == ((32.5, 8.5), ("kl", "l0"))


def test_an_l0_to_compare_at_may_be_a_whole_number(tmp_path):
    assert loaded(tmp_path, matched=[32, 8]).matched == (32, 8)


def test_published_laws_are_found_by_name_and_own_files_from_the_working_directory(tmp_path, monkeypatch):
    given = several(tmp_path)
    own(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = loaded(tmp_path, given, calibrations=[*LAWS, "mine.csv"]).calibrations
    assert [path.is_file() for path in found] == [True] * 5
    assert {path.parent for path in found[:4]} == {ROOT / "calibrations"}
    assert found[4].resolve() == tmp_path / "mine.csv"


def test_every_file_that_is_published_is_a_default():
    assert sorted(SCHEMA["calibrations"]["default"]) == sorted(p.stem for p in (ROOT / "calibrations").glob("*.csv"))


def test_a_file_of_ones_own_may_have_the_name_of_a_published_one_if_it_calls_itself_otherwise(tmp_path):
    own(tmp_path, "my Kaplan", "kaplan.csv")
    found = loaded(tmp_path, calibrations=["kaplan", str(tmp_path / "kaplan.csv")]).calibrations
    assert found == (ROOT / "calibrations" / "kaplan.csv", tmp_path / "kaplan.csv")


def test_no_calibration_is_needed(tmp_path):
    assert loaded(tmp_path, calibrations=[]).calibrations == ()


def test_a_column_may_be_of_any_calibration_of_the_study_by_the_name_it_gives_itself(tmp_path):
    columns = ["effective_compute[Kaplan 2020]", "effective_compute[mine too]", "loss_recovered[bigram]"]
    found = loaded(tmp_path, calibrations=["kaplan", own(tmp_path, "mine too")], columns=columns)
    assert found.columns == tuple(columns)


@pytest.mark.parametrize("baseline", [*BASELINES, *TEXT])
def test_a_baseline_is_an_ablation_that_is_run_or_what_a_text_says_alone(tmp_path, baseline):
    interventions = ["sae", baseline] if baseline in BASELINES else ["sae"]
    given = several(tmp_path, interventions)
    assert loaded(tmp_path, given, baseline=baseline, families=[family("a", "early")]).baseline == baseline


def test_the_schema_has_the_baselines_columns_and_keys_that_the_code_has():
    assert set(SCHEMA["baseline"]["enum"]) == {*BASELINES, *TEXT}
    assert tuple(SCHEMA["columns"]["default"]) == paper_table.DEFAULT
    assert set(SCHEMA) == {field.name for field in fields(Measures)}


def test_each_sae_of_a_family_may_be_run_by_an_experiment_of_its_own(tmp_path):
    given = several(tmp_path)
    given["experiments"] = [
        {"id": "one", "interventions": ["sae", "zero"], "saes": ["early"]},
        {"id": "two", "interventions": ["zero", "sae"], "saes": ["middle"]},
    ]
    assert loaded(tmp_path, given, families=[family("a", "early", "middle")]).families["a"] == ("early", "middle")


def test_families_may_write_at_different_hooks_and_of_different_models(tmp_path):
    given = several(tmp_path)
    given["models"].append({"id": "big", "path": model(tmp_path / "big")})
    given["saes"] = [each | {"model": "big" if each["id"] == "more" else "tiny"} for each in given["saes"]]
    found = loaded(tmp_path, given, families=[family("a", "early"), family("b", "late"), family("c", "more")])
    assert list(found.families) == ["a", "b", "c"]


def test_without_families_the_baseline_of_the_frontier_need_not_be_run(tmp_path):
    assert loaded(tmp_path, several(tmp_path, ["sae"]), baseline="resample").baseline == "resample"


def test_a_family_of_two_models_is_refused(tmp_path):
    given = several(tmp_path)
    given["models"].append({"id": "big", "path": model(tmp_path / "big")})
    given["saes"] = [each | {"model": "big" if each["id"] == "middle" else "tiny"} for each in given["saes"]]
    message = "Family 'a': its SAEs write at big blocks.1.hook_resid_pre and tiny blocks.1.hook_resid_pre. A frontier"
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path, given, families=[family("a", "early", "middle")])


# Experiments that do not measure a family of `early` and `middle` against `zero`, and the SAE that is not measured.
ELSEWHERE = {
    "at one position": (
        [{"scope": "single", "interventions": ["sae", "zero"], "positions": [4], "horizon": 2}],
        "early",
    ),
    "in two experiments": ([{"interventions": ["sae"]}, {"interventions": ["zero"]}], "early"),
    "for other SAEs": ([{"interventions": ["sae", "zero"], "saes": ["late"]}], "early"),
    "for one of them": ([{"interventions": ["sae", "zero"], "saes": ["early", "late"]}], "middle"),
    "without the SAE": ([{"interventions": ["eps_random", "zero"]}], "early"),
    "of the SAEs together": (
        [{"scope": "compound", "interventions": ["sae"], "saes": ["early", "late"]}, {"interventions": ["zero"]}],
        "early",
    ),
}


@pytest.mark.parametrize(("experiments", "missing"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_sae_and_baseline_must_be_run_at_every_token_in_one_experiment(tmp_path, experiments, missing):
    given = several(tmp_path)
    given["experiments"] = [each | {"id": f"x{i}"} for i, each in enumerate(experiments)]
    message = f"Family 'a': no experiment that replaces every token runs 'sae' and 'zero' for '{missing}'. Add them"
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path, given, families=[family("a", "early", "middle")])


def test_an_ablation_of_the_atlas_is_no_baseline(tmp_path):
    given = several(tmp_path, ["sae"]) | {"atlas": {"interventions": ["zero"], "layers": [1]}}
    with pytest.raises(ValueError, match="runs 'sae' and 'zero' for 'early'"):
        loaded(tmp_path, given, families=[family("a", "early")])


def test_a_family_that_no_experiment_runs_is_refused_whatever_the_baseline(tmp_path):
    given = several(tmp_path, ["eps_random", "zero"])
    with pytest.raises(ValueError, match="Family 'a': no experiment that replaces every token runs 'sae' for 'early'"):
        loaded(tmp_path, given, families=[family("a", "early")], baseline="unigram")


def test_a_family_that_is_accepted_is_whole_in_the_plan(tmp_path):
    """Where the only experiment of every token that runs it is a ladder, beside a general one of other SAEs."""
    given, run = several(tmp_path), {"interventions": ["sae", "zero"]}
    given["experiments"] = [
        run | {"id": "main", "saes": ["late", "more"]},
        {"id": "ladder", "interventions": [*run["interventions"], "act_cov_random"], "saes": ["early", "middle"]},
        run | {"id": "one", "scope": "single", "positions": [4], "horizon": 2, "saes": ["early", "middle"]},
    ]
    plan = Plan(config.load(given | {"metrics": {"families": [family("a", "early", "middle")]}}))
    analyses = {job.key["analysis"]: job for job in plan.jobs.values() if job.stage == "analyses"}
    assert "frontier_points" in analyses
    found = [job.key for role, job in analyses["frontier_points"].inputs if role == "effects"]
    assert {(key["experiment"], key["sae"]) for key in found} == {("ladder", "early"), ("ladder", "middle")}
