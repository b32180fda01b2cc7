"""An entry of `experiments` or `series`: what is given, what is filled in, and what is refused beside what else; most
of what is refused is in test_bad_input.py."""

from copy import deepcopy

import pytest
import yaml
from fakes import HOOK, PAIR, every_kind, experiments, in_order, model, sae, study

from pipeline import config, fingerprint
from pipeline.experiments import COMPOUND, GRIDS, ONLY, sets_of
from pipeline.hooks import WRITE_SITES
from pipeline.labels import COMPONENTS, OF_A_HEAD

SCHEMA = yaml.safe_load(config.SCHEMA.read_text())["properties"]["experiments"]["items"]["properties"]
KINDS = {entry["id"]: entry for entry in experiments()}


def load(folder, **changes):
    """The one experiment of a study, as it is when the entry has these keys."""
    entry = {"id": "x", "interventions": PAIR} | changes
    return config.load(every_kind(folder) | {"experiments": [entry]}).experiments["x"]


def kind(name, **changes):
    """An experiment of `every_kind` with changed keys; None takes a key away."""
    entry = deepcopy(KINDS[name]) | {"id": "x"} | changes
    return {key: value for key, value in entry.items() if value is not None}


def test_the_study_of_every_kind_is_correct(tmp_path):
    found = config.load(every_kind(tmp_path))
    assert [each.scope for each in found.experiments.values()] == ["all"] * 4 + ["single", "draws", "compound"]
    assert found.series["training"].points == ((10.0, "early"), (20.0, "late"))


# Defaults.


def test_what_is_left_out_gets_its_default(tmp_path):
    found = load(tmp_path)
    assert (found.scope, found.draws, found.patch_special, found.encode) == ("all", 1, False, "patched")
    assert (found.positions, found.horizon, found.contexts, found.sets) == ((), 0, None, None)
    assert (found.curvature, found.examples, found.chosen) == (None, None, ())
    assert (found.saes, found.corpora) == (("early", "late", "coder"), ("story",))


def test_a_single_position_is_followed_for_16_tokens_and_draws_for_none(tmp_path):
    given = every_kind(tmp_path)
    given["corpora"][0]["context"] = 32
    given["experiments"] = [kind("single", horizon=None), kind("draws") | {"id": "y"}]
    found = config.load(given).experiments
    assert (found["x"].horizon, found["y"].horizon) == (16, 0)


def test_what_is_given_is_kept(tmp_path):
    given = kind("single", positions=[9, 4], horizon=3, draws=5, contexts=7, patch_special=True, corpora=["story"])
    found = load(tmp_path, **given)
    assert (found.positions, found.horizon, found.draws, found.contexts) == ((9, 4), 3, 5, 7)
    assert (found.patch_special, found.corpora) == (True, ("story",))
    found = load(tmp_path, **kind("main", examples=3, curvature=5, chosen=[[39, 15], [0, 0]]))
    assert (found.examples, found.curvature, found.chosen) == (3, 5, ((39, 15), (0, 0)))
    found = load(tmp_path, **kind("together", sets=[["late", "early"]], encode="clean"))
    assert (found.sets, found.encode, found.contexts) == ((("late", "early"),), "clean", 16)


def test_a_strength_makes_an_intervention_of_its_own_in_the_order_of_the_configuration(tmp_path):
    found = load(tmp_path, **kind("dose", interventions=["sae", "theta_random_at", "error_scaled"], alphas=[2, 0.5]))
    assert found.interventions == ("sae", "theta_random_at(0.9)", "error_scaled(2)", "error_scaled(0.5)")


def test_strengths_may_be_given_in_the_name_and_without_a_grid(tmp_path):
    given = ["error_scaled(0.50)", "eps_random_scaled(-1)", "theta_error_at(.9)"]
    found = load(tmp_path, interventions=given)
    assert found.interventions == ("error_scaled(0.5)", "eps_random_scaled(-1)", "theta_error_at(0.9)")
    found = load(tmp_path, interventions=["error_scaled(3)", "eps_random_scaled"], alphas=[1])
    assert found.interventions == ("error_scaled(3)", "eps_random_scaled(1)")


def test_close_strengths_stay_apart(tmp_path):
    found = load(tmp_path, interventions=["theta_error_at"], cosines=[0.9999999, 0.99999999])
    assert found.interventions == ("theta_error_at(0.9999999)", "theta_error_at(0.99999999)")


def test_a_series_is_in_the_order_of_its_axis(tmp_path):
    points = [{"at": 1000, "sae": "late"}, {"at": 0.5, "sae": "coder"}, {"at": 30, "sae": "early"}]
    given = every_kind(tmp_path) | {"series": [{"id": "s", "axis": "steps", "points": points}]}
    found = config.load(given).series["s"]
    assert (found.axis, found.points) == ("steps", ((0.5, "coder"), (30.0, "early"), (1000.0, "late")))


SCOPES = {"all": "main", "single": "single", "draws": "draws", "compound": "together"}
VALUES = {"positions": [4], "horizon": 2, "contexts": 8, "alphas": [1], "cosines": [0.5], "draws": 2}
VALUES |= {"sets": [["early", "late"]], "encode": "clean", "curvature": 4, "examples": 2}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("key", ONLY)
def test_a_key_that_a_scope_has_no_use_for_is_refused_and_all_others_are_taken(tmp_path, key, scope):
    entry = kind(SCOPES[scope], **{key: VALUES[key]})
    if key in ("alphas", "cosines") and scope != "compound":
        entry["interventions"] = [*entry["interventions"], "error_scaled" if key == "alphas" else "theta_error_at"]
    if scope in ONLY[key]:
        load(tmp_path, **entry)
    else:
        with pytest.raises(ValueError, match=f"Experiment 'x': `{key}` has no meaning in the scope '{scope}', only in"):
            load(tmp_path, **entry)


def test_every_key_of_the_schema_is_for_some_scopes_or_for_all():
    general = {"id", "scope", "interventions", "saes", "corpora", "patch_special", "chosen"}
    assert general | set(ONLY) == set(SCHEMA)
    assert not general & set(ONLY)
    assert {scope for scopes in ONLY.values() for scope in scopes} == set(SCHEMA["scope"]["enum"])


def test_the_ends_of_strengths_are_those_of_the_schema():
    assert {grid: (SCHEMA[grid]["items"]["minimum"], SCHEMA[grid]["items"]["maximum"]) for grid in GRIDS} == GRIDS


def test_what_sets_can_be_run_under_exists():
    assert set(COMPOUND) <= set(fingerprint.registered("interventions", "INTERVENTIONS"))


def test_chosen_tokens_of_a_corpus_of_unknown_length_are_left_to_the_run(tmp_path):
    given = every_kind(tmp_path) | {"experiments": [kind("main", chosen=[[10**6, 15]], curvature=None)]}
    del given["corpora"][0]["contexts"]
    assert config.load(given).experiments["x"].chosen == ((10**6, 15),)
    given["experiments"][0]["chosen"] = [[0, 16]]
    with pytest.raises(ValueError, match="position 16, but corpus 'story' has positions 0 to 15"):
        config.load(given)


def test_position_0_is_an_ordinary_one_where_no_bos_is_prepended(tmp_path):
    given = every_kind(tmp_path) | {"experiments": [kind("single", positions=[0])]}
    given["corpora"][0]["prepend_bos"] = False
    assert config.load(given).experiments["x"].positions == (0,)


def test_positions_must_fit_into_the_shortest_of_the_corpora(tmp_path):
    given = every_kind(tmp_path) | {"experiments": [kind("draws", positions=[12])]}
    given["corpora"].append(given["corpora"][0] | {"id": "short", "context": 12})
    with pytest.raises(ValueError, match="but contexts have 12 tokens"):
        config.load(given)
    given["experiments"][0]["corpora"] = ["story"]
    config.load(given)


def test_curvature_of_more_contexts_than_the_first_shard_holds_is_refused_before_anything_runs(tmp_path):
    given = every_kind(tmp_path) | {"experiments": [kind("main", curvature=24)]}
    for shards, fits in ((1, True), (2, False)):  # 5 batches: the first of 2 shards has 2
        if fits:
            config.load(given | {"shards": shards})
            continue
        parts = "Experiment 'x': `curvature` asks for 24 contexts, but the first of 2 shards … 'story' holds 16 … Lower"
        with pytest.raises(ValueError, match=in_order(parts)):
            config.load(given | {"shards": shards})
    given["experiments"][0]["curvature"] = 16
    config.load(given | {"shards": 2})
    given["experiments"][0]["curvature"] = 1000  # of 40: all
    config.load(given)


# Sets of SAEs against the SAEs themselves.


def test_two_saes_of_one_hook_are_no_set(tmp_path):
    given = every_kind(tmp_path) | {"experiments": [kind("together", saes=["early", "late", "other"])]}
    given["saes"].append({"id": "other", "path": sae(tmp_path / "other", hook=HOOK)})
    parts = f"Experiment 'x': 'early' and 'other' are in a set, but both write at '{HOOK}'. Take one of them"
    with pytest.raises(ValueError, match=in_order(parts)):
        config.load(given)
    given["experiments"][0]["sets"] = [["early", "late"], ["other", "late"]]
    config.load(given)


def test_a_set_has_saes_of_one_model(tmp_path):
    given = every_kind(tmp_path)
    given["models"].append({"id": "second", "path": model(tmp_path / "second")})
    given["saes"] = [each | {"model": "tiny"} for each in given["saes"]]
    given["saes"][1]["model"] = "second"
    given["experiments"] = [kind("together", saes="all", sets=[["early", "late"]])]
    with pytest.raises(ValueError, match="the SAEs early, late are a set, but of several models"):
        config.load(given)
    given["experiments"] = [kind("together", saes="all")]  # early and coder, and late alone
    config.load(given)
    given["experiments"] = [kind("together", saes=["early", "late"])]
    with pytest.raises(ValueError, match="Give it a set of at least two"):
        config.load(given)


def test_an_sae_with_the_name_of_a_set_is_refused(tmp_path):
    given = every_kind(tmp_path) | {"experiments": [kind("together", saes=["all", "late"])]}
    given["saes"][0]["id"] = "all"
    given["series"] = []
    with pytest.raises(ValueError, match=in_order("Experiment 'x': The SAEs all, late do not give … no SAE as a set")):
        config.load(given)


def test_sets_that_are_given_are_run_beside_each_of_their_saes_alone():
    found = sets_of(["a", "b", "c", "d"], [["d", "b"], ["a", "b", "d"], ["b"]])
    assert [each["name"] for each in found] == ["a", "b", "d", "d+b", "a+b+d"]
    assert [each["saes"] for each in found] == [["a"], ["b"], ["d"], ["d", "b"], ["a", "b", "d"]]


def test_sets_of_other_saes_are_left_out():
    assert sets_of(["a", "b"], [["c", "d"]]) == []
    assert [each["name"] for each in sets_of(["a", "b"], [["c", "d"], ["a", "b"]])] == ["a", "b", "a+b"]


def test_an_intervention_with_two_strengths_or_an_unknown_argument_is_refused(tmp_path, monkeypatch):
    known = {"both": ["x", "alpha", "cosine"], "odd": ["x", "x_hatt"]}
    monkeypatch.setattr(fingerprint, "registered", lambda *_: known)
    with pytest.raises(ValueError, match="'both' takes a strength of each of alphas and cosines"):
        load(tmp_path, interventions=["both"])
    with pytest.raises(ValueError, match="Intervention 'odd': Unknown argument 'x_hatt'"):
        load(tmp_path, interventions=["odd"])


def test_the_entry_is_not_modified(tmp_path):
    given = study(tmp_path) | {"experiments": [kind("dose")]}
    before = deepcopy(given)
    config.load(given)
    assert given == before


# The atlas: an experiment of every component, without SAEs.

ATLAS_KEYS = yaml.safe_load(config.SCHEMA.read_text())["properties"]["atlas"]["properties"]


def atlas(folder, **entry):
    """The experiment of a study that has nothing but the atlas."""
    given = {name: every_kind(folder)[name] for name in ("models", "corpora")}
    return config.load(given | {"atlas": entry}).experiments["atlas"]


def test_an_atlas_of_nothing_but_its_name_is_every_component_but_the_heads_at_every_layer(tmp_path):
    found = atlas(tmp_path)
    assert (found.id, found.scope, found.interventions) == ("atlas", "atlas", ("zero", "mean", "resample"))
    assert found.components == ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    assert (found.layers, found.models, found.corpora, found.saes) == (None, ("tiny",), ("story",), ())
    assert (found.contexts, found.patch_special, found.draws, found.positions) == (None, False, 1, ())
    assert (found.curvature, found.examples, found.chosen, found.sets) == (None, None, (), None)


def test_what_is_given_of_an_atlas_is_kept_with_its_layers_in_order(tmp_path):
    given = {"components": ["z", "attn_out"], "layers": [2, 0], "interventions": ["resample", "zero"], "contexts": 9}
    found = atlas(tmp_path, **given, models=["tiny"], corpora=["story"], patch_special=True)
    assert (found.components, found.layers) == (("z", "attn_out"), (0, 2))
    assert (found.interventions, found.contexts, found.patch_special) == (("resample", "zero"), 9, True)
    assert (found.models, found.corpora) == (("tiny",), ("story",))


def test_an_atlas_stands_beside_experiments_and_after_them(tmp_path):
    given = every_kind(tmp_path)
    before = config.load(given).experiments
    found = config.load(given | {"atlas": {}}).experiments
    assert list(found) == [*before, "atlas"]
    assert {name: found[name] for name in before} == dict(before)


def test_only_an_atlas_has_models_components_and_layers(tmp_path):
    found = load(tmp_path)
    assert (found.models, found.components, found.layers) == ((), (), None)


def test_a_layer_must_be_there_in_every_model_that_is_chosen(tmp_path):
    given = study(tmp_path)
    given["models"].append({"id": "small", "path": model(tmp_path / "small", n_layer=2)})
    given["saes"] = [each | {"model": "tiny"} for each in given["saes"]]
    with pytest.raises(ValueError, match="`atlas`: layer 2, but model 'small' has layers 0 to 1"):
        config.load(given | {"atlas": {"layers": [2]}})
    found = config.load(given | {"atlas": {"layers": [2], "models": ["tiny"]}}).experiments["atlas"]
    assert (found.layers, found.models) == ((2,), ("tiny",))


def test_a_model_whose_attention_and_mlp_are_side_by_side_has_no_stream_between_them(tmp_path):
    given = study(tmp_path) | {"atlas": {"components": ["resid_pre", "resid_mid"]}}
    assert config.load(given).experiments["atlas"].components == ("resid_pre", "resid_mid")
    model(tmp_path / "tiny", model_type="gpt_neox")
    parts = (
        "`atlas`: model 'tiny' runs attention and MLP side by side and has no 'resid_mid'. Leave it out of … compone"
    )
    with pytest.raises(ValueError, match=in_order(parts)):
        config.load(given)
    for entry in ({}, {"components": ["resid_pre"]}):
        assert "resid_pre" in config.load(given | {"atlas": entry}).experiments["atlas"].components


def test_an_experiment_called_atlas_is_one_unless_there_is_an_atlas_beside_it(tmp_path):
    given = study(tmp_path) | {"experiments": [{"id": "atlas", "interventions": ["sae", "zero"]}]}
    assert config.load(given).experiments["atlas"].scope == "all"
    with pytest.raises(ValueError, match="experiments: the id 'atlas' is used twice"):
        config.load(given | {"atlas": {}})


@pytest.mark.parametrize("name", [*OF_A_HEAD.values(), "zero_head(0)"])
def test_a_head_is_for_the_atlas_alone(tmp_path, name):
    parts = f"Experiment 'x': '{name.removesuffix('(0)')}' is for the atlas alone. Put `z` among the `components` of"
    with pytest.raises(ValueError, match=in_order(parts)):
        load(tmp_path, interventions=["sae", name])


def test_what_the_atlas_ablates_is_what_can_be_written_and_is_in_the_schema():
    assert [hook for hook in COMPONENTS.values() if hook not in WRITE_SITES] == []
    assert ATLAS_KEYS["components"]["items"]["enum"] == list(COMPONENTS)
    assert ATLAS_KEYS["interventions"]["items"]["enum"] == list(OF_A_HEAD)
    known = fingerprint.registered("interventions", "INTERVENTIONS")
    assert {*OF_A_HEAD, *OF_A_HEAD.values()} <= set(known)
    assert {name for name in known if "head" in known[name]} == set(OF_A_HEAD.values())
