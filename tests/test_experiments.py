"""An entry of `experiments` or `series`: what is given, what is filled in, and what is refused with which words."""

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


# What is refused. An entry, and the parts of the message in order.

DOSE = {"interventions": ["error_scaled"], "alphas": [0.5]}
BAD = {
    # Keys and values.
    "misspelt key": ({"positons": [4]}, "experiments[0]: Unknown key 'positons' … Did you mean 'positions'? … Known:"),
    "misspelt horizon": (kind("single") | {"horizn": 3}, "Unknown key 'horizn' … Did you mean 'horizon'?"),
    "misspelt alphas": (DOSE | {"alpha": [1]}, "Unknown key 'alpha' … Did you mean 'alphas'?"),
    "unknown scope": ({"scope": "singel"}, "experiments[0].scope: 'singel' is not one of ['all', 'single', 'draws',"),
    "unknown encode": (kind("together", encode="dirty"), "experiments[0].encode: 'dirty' is not one of ['patched',"),
    "one position": (kind("single", positions=4), "experiments[0].positions: found 4 (int), expected array"),
    "no position": (kind("single", positions=[]), "experiments[0].positions: []"),
    "a position twice": (kind("single", positions=[4, 4]), "experiments[0].positions: [4, 4] has non-unique"),
    "half a position": (kind("single", positions=[4.5]), "positions[0]: found 4.5 (float), expected integer"),
    "a position before the first": (kind("single", positions=[-1]), "positions[0]: -1 is less than the minimum of 0"),
    "a horizon back": (kind("single", horizon=-1), "horizon: -1 is less than the minimum of 0 … Positions after"),
    "no draws": ({"draws": 0}, "draws: 0 is less than the minimum of 1 … Draws of every random intervention"),
    "draws in words": ({"draws": "many"}, "draws: found 'many' (str), expected integer"),
    "no contexts": (kind("draws", contexts=0), "contexts: 0 is less than the minimum of 1"),
    "an alpha that YAML reads as text": (DOSE | {"alphas": ["1e-4"]}, "alphas[0]: found '1e-4' (str), expected number"),
    "an alpha twice": (DOSE | {"alphas": [1, 1.0]}, "alphas: [1, 1.0] has non-unique elements"),
    "an alpha too large": (DOSE | {"alphas": [11]}, "alphas[0]: 11 is greater than the maximum of 10"),
    "a cosine above 1": (kind("dose", cosines=[1.1]), "cosines[0]: 1.1 is greater than the maximum of 1"),
    "an alpha that is no number": (DOSE | {"alphas": [float("nan")]}, "'error_scaled' at a strength of nan; expected"),
    "one set": (kind("together", sets=["early", "late"]), "sets[0]: found 'early' (str), expected array"),
    "an SAE twice in a set": (
        kind("together", sets=[["early", "early"]]),
        "sets[0]: ['early', 'early'] has non-unique",
    ),
    "no curvature": (kind("main", curvature=0), "curvature: 0 is less than the minimum of 1"),
    "no examples": (kind("main", examples=0), "examples: 0 is less than the minimum of 1"),
    "a chosen token without a position": (kind("main", chosen=[[3]]), "chosen[0]: [3]"),
    "chosen before the first": (kind("main", chosen=[[0, -1]]), "chosen[0][1]: -1 is less than the minimum of 0"),
    "patch_special in words": ({"patch_special": "BOS"}, "patch_special: found 'BOS' (str), expected boolean"),
    # Names.
    "an intervention that is not known": (
        {"interventions": ["sae", "error_scald"], "alphas": [1]},
        "Experiment 'x': Unknown intervention 'error_scald' … Did you mean 'error_scaled'?",
    ),
    "a strength that is no number": (
        {"interventions": ["error_scaled(half)"]},
        "Experiment 'x': Unknown intervention 'error_scaled(half)' … Did you mean 'error_scaled'?",
    ),
    "an SAE that is not known": (
        {"saes": ["earlier"]},
        "Unknown SAE 'earlier' … Did you mean 'early'? … Known: coder,",
    ),
    "a corpus that is not known": ({"corpora": ["storey"]}, "Unknown corpus 'storey' … Did you mean 'story'?"),
    # Strengths.
    "no alphas": ({"interventions": ["error_scaled"]}, "'error_scaled' is run at several strengths … `alphas: [...]`"),
    "no cosines": (
        {"interventions": ["error_scaled", "theta_error_at"], "alphas": [1]},
        "'theta_error_at' is run at several strengths. Say which with `cosines: [...]`",
    ),
    "a strength of one that takes none": (
        {"interventions": ["sae(0.5)"]},
        "Experiment 'x': 'sae' takes no strength, but 'sae(0.5)' gives one. Write 'sae'.",
    ),
    "an alpha in the name that is too large": (
        {"interventions": ["error_scaled(11)"]},
        "'error_scaled' at a strength of 11; expected one from -10 to 10",
    ),
    "a cosine in the name that is none": (
        {"interventions": ["theta_random_at(1.5)"]},
        "'theta_random_at' at a strength of 1.5; expected one from -1 to 1",
    ),
    "a strength in the name and in the grid": (
        {"interventions": ["error_scaled", "error_scaled(0.50)"], "alphas": [0.1, 0.5]},
        "with its strengths, 'error_scaled(0.5)' is there 2 times … Name it once … 'error_scaled' and its grid",
    ),
    "a strength in the name in two ways": (
        {"interventions": ["error_scaled(1)", "error_scaled(1.0)", "error_scaled(1e0)"]},
        "'error_scaled(1)' is there 3 times among the interventions",
    ),
    "alphas for nothing": (
        {"alphas": [1]},
        "Experiment 'x': `alphas` are strengths, but no intervention … Leave them out, or name one of error_scaled,",
    ),
    "cosines for what has them in its name": (
        {"interventions": ["theta_error_at(0.5)"], "cosines": [0.9]},
        "`cosines` are strengths, but no intervention is run at them … name one of theta_random_at, theta_error_at",
    ),
    # One position.
    "no positions": (kind("single", positions=None), "the scope 'single' needs `positions: [...]`"),
    "no positions of draws": (kind("draws", positions=None), "the scope 'draws' needs `positions: [...]`"),
    "a position after the last": (
        kind("draws", positions=[3, 16]),
        "position 16 and its horizon end at position 16, but contexts have 16 tokens. Lower `positions`",
    ),
    "a horizon beyond the context": (
        kind("single", positions=[2, 8], horizon=8),
        "Experiment 'x': position 8 and its horizon end at position 16, but contexts have 16 tokens … or `horizon`",
    ),
    "the default horizon beyond the context": (
        kind("single", horizon=None),
        "position 4 and its horizon end at position 20, but contexts have 16 tokens",
    ),
    "the position of BOS": (
        kind("single", positions=[0, 4], patch_special=True),
        "Experiment 'x': position 0 holds BOS … Take 0 out of `positions`",
    ),
    # Draws.
    "one draw": (kind("draws", draws=1), "the scope 'draws' needs `draws`, at least 2 of every random intervention"),
    "the default number of draws": (kind("draws", draws=None), "the scope 'draws' needs `draws`, at least 2"),
    "draws without the SAE": (
        kind("draws", interventions=["eps_random", "theta_random"]),
        "the scope 'draws' compares 'sae' with random errors of its length. Name 'sae' and",
    ),
    "draws without a random error": (
        kind("draws", interventions=["sae", "flipped_error", "resample"]),
        "the scope 'draws' compares 'sae' with random errors … such as 'eps_random'",
    ),
    "draws of what is not random": (
        {"interventions": ["sae", "zero"], "draws": 3},
        "`draws` are 3, but no intervention is random. Leave `draws` out",
    ),
    # Examples and curvature.
    "curvature without the SAE": (
        kind("main", interventions=["eps_random", "zero"], examples=None),
        "`curvature` compares 'sae' with 'eps_random'. Name both",
    ),
    "examples without a random direction": (
        kind("main", interventions=["sae", "zero"], curvature=None),
        "`examples` compares 'sae' with 'eps_random'. Name both among the interventions",
    ),
    "chosen without examples": (
        kind("main", examples=None, chosen=[[0, 1]]),
        "`chosen` tokens are shown among `examples`. Say how many worst and best ones too",
    ),
    "chosen in a sequence after the last": (
        kind("main", chosen=[[39, 15], [40, 3]]),
        "`chosen` names sequence 40, position 3, but corpus 'story' has sequences 0 to 39 with positions 0 to 15",
    ),
    "chosen at a position after the last": (
        kind("main", chosen=[[3, 16]]),
        "`chosen` names sequence 3, position 16, but corpus 'story' has sequences 0 to 39 with positions 0 to 15",
    ),
    # Sets.
    "a set of what one can't say": (
        kind("together", interventions=["sae", "zero"]),
        "Experiment 'x': 'zero' is not known for several SAEs at once, only sae, eps_random, act_cov_random",
    ),
    "an SAE of a set that is not known": (
        kind("together", sets=[["early", "layt"]]),
        "Experiment 'x', `sets`: Unknown SAE 'layt'. Did you mean 'late'? Known: early, late",
    ),
    "an SAE of a set that the experiment leaves out": (
        kind("together", sets=[["early", "coder"]]),
        "`sets`: Unknown SAE 'coder' … Known: early, late",
    ),
    "one SAE together": (
        kind("together", saes=["early"]),
        "the scope 'compound' is about several SAEs at once. Give it a set of at least two",
    ),
    "sets of one SAE": (
        kind("together", sets=[["early"], ["late"]]),
        "the scope 'compound' is about several SAEs at once. Give it a set of at least two",
    ),
    "a set twice": (
        kind("together", sets=[["early", "late"], ["late", "early"]]),
        "Experiment 'x': The SAEs early, late do not give sets of different names. Name each SAE and each set once",
    ),
}


@pytest.mark.parametrize(("entry", "parts"), BAD.values(), ids=BAD)
def test_a_mistake_is_refused_with_what_was_found_expected_and_what_to_do(tmp_path, entry, parts):
    with pytest.raises(ValueError, match=in_order(parts)):
        load(tmp_path, **entry)


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


# Series.

POINT = {"at": 1, "sae": "early"}
BAD_SERIES = {
    "an SAE that is not known": (
        {"points": [POINT, {"at": 2, "sae": "latte"}]},
        "Series 's': Unknown SAE 'latte' … Did you mean 'late'? … Known: coder, early, late",
    ),
    "one point": ({"points": [POINT]}, "series[0].points"),
    "no axis": ({"axis": None}, "series[0].axis: found None (NoneType), expected string"),
    "misspelt key": ({"pionts": []}, "series[0]: Unknown key 'pionts' … Did you mean 'points'?"),
    "misspelt key of a point": (
        {"points": [POINT, {"at": 2, "sea": "late"}]},
        "series[0].points[1]: … 'sea' … Did you mean 'sae'?",
    ),
    "a place in words": (
        {"points": [POINT, {"at": "1e-4", "sae": "late"}]},
        "series[0].points[1].at: found '1e-4' (str), expected number",
    ),
    "a name that is no file name": ({"id": "a/b"}, "series[0].id: 'a/b' can't be a name"),
}


@pytest.mark.parametrize(("changes", "parts"), BAD_SERIES.values(), ids=BAD_SERIES)
def test_a_mistake_in_a_series_is_refused(tmp_path, changes, parts):
    entry = {"id": "s", "axis": "steps", "points": [POINT, {"at": 2, "sae": "late"}]} | changes
    with pytest.raises(ValueError, match=in_order(parts)):
        config.load(every_kind(tmp_path) | {"series": [entry]})


def test_two_series_of_one_id_are_refused(tmp_path):
    given = every_kind(tmp_path)
    with pytest.raises(ValueError, match="series: the id 'training' is used twice"):
        config.load(given | {"series": given["series"] * 2})


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


BAD_ATLAS = {
    "a component that is not known": (
        {"components": ["attn"]},
        "atlas.components[0]: 'attn' is not one of ['resid_pre'",
    ),
    "no component": ({"components": []}, "atlas.components: []"),
    "a component twice": ({"components": ["z", "z"]}, "atlas.components: ['z', 'z'] has non-unique"),
    "an intervention of an SAE": ({"interventions": ["sae"]}, "atlas.interventions[0]: 'sae' is not one of ['zero',"),
    "an intervention of a head": (
        {"interventions": ["zero_head"]},
        "atlas.interventions[0]: 'zero_head' is not one of",
    ),
    "a layer after the last": ({"layers": [0, 3]}, "`atlas`: layer 3, but model 'tiny' has layers 0 to 2."),
    "layers after the last": ({"layers": [7, 9, 1]}, "`atlas`: layer 9, but model 'tiny' has layers 0 to 2."),
    "a layer before the first": ({"layers": [-1]}, "atlas.layers: [-1] … A list of layers, or `all`"),
    "no layer": ({"layers": []}, "atlas.layers: [] … A list of layers, or `all`"),
    "one layer": ({"layers": 1}, "atlas.layers: 1 … A list of layers, or `all`"),
    "a layer twice": ({"layers": [1, 1]}, "atlas.layers: [1, 1] … A list of layers, or `all`"),
    "a model that is not known": (
        {"models": ["tinny"]},
        "`atlas`: Unknown model 'tinny'. Did you mean 'tiny'? Known: tiny.",
    ),
    "a corpus that is not known": (
        {"corpora": ["storey"]},
        "`atlas`: Unknown corpus 'storey'. Did you mean 'story'? Known: story.",
    ),
    "one context": ({"contexts": 1}, "atlas.contexts: 1 is less than the minimum of 2"),
    "misspelt key": ({"layer": [1]}, "atlas: Unknown key 'layer'. Did you mean 'layers'? Known: components, contexts,"),
    "a key of an experiment": ({"draws": 3}, "atlas: Unknown key 'draws' … Known: components, contexts, corpora,"),
    "special tokens in words": ({"patch_special": "BOS"}, "atlas.patch_special: found 'BOS' (str), expected boolean"),
}


@pytest.mark.parametrize(("entry", "parts"), BAD_ATLAS.values(), ids=BAD_ATLAS)
def test_a_mistake_in_an_atlas_is_refused(tmp_path, entry, parts):
    with pytest.raises(ValueError, match=in_order(parts)):
        atlas(tmp_path, **entry)


def test_an_atlas_without_a_value_is_refused(tmp_path):
    with pytest.raises(ValueError, match=in_order("atlas: found None (NoneType), expected object")):
        config.load(study(tmp_path) | yaml.safe_load("atlas:"))


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


def test_the_scope_of_the_atlas_is_not_for_experiments(tmp_path):
    with pytest.raises(ValueError, match="'atlas' is not one of"):
        load(tmp_path, scope="atlas")


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
