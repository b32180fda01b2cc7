"""A mistake in a configuration is a ValueError that says what was found, what was expected and what to do."""

import json
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from fakes import ROOT, in_order, model, sae, study
from jsonschema import Draft202012Validator

from pipeline import config, fingerprint
from pipeline.hooks import Hook, read_geometry


def entry(kind, **values):
    """A change of the first entry of a list of the configuration."""
    return lambda c, folder: c[kind][0].update(values)


def twice(kind):
    return lambda c, folder: c[kind].append(deepcopy(c[kind][0]))


def without(file):
    return lambda c, folder: (folder / file).unlink()


def first_sae(**settings):
    return lambda c, folder: sae(folder / "early", **settings)


def corpus_file(name, text):
    def change(c, folder):
        (folder / name).write_text(text)
        c["corpora"][0]["path"] = str(folder / name)

    return change


def second_model(c, folder):
    c["models"].append({"id": "other", "path": model(folder / "other")})


def trained(**metadata):
    """Metadata of an SAE."""
    return {"hook_name": "blocks.1.hook_resid_pre"} | metadata


def transcoder_into_a_narrower_place(c, folder):
    sae(folder / "early", hook="blocks.1.ln2.hook_normalized", hook_out="blocks.1.attn.hook_z")


UNPROCESSED = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False}
# What is changed in a correct study, and the parts of the message, in order.
BAD = {
    # Keys and values.
    "misspelt key": (
        lambda c, folder: c.update(shard=2),
        "top level: Unknown key 'shard' … Did you mean 'shards'? … Known: atlas, batch, bootstrap",
    ),
    "misspelt key of an entry": (
        entry("corpora", contxt=8),
        "corpora[0]: Unknown key 'contxt' … Did you mean 'context'? … prepend_bos",
    ),
    "misspelt key of a setting": (
        entry("models", processing={"fold_layernorm": True}),
        "models[0].processing: Unknown key 'fold_layernorm' … Known: center_unembed, center_writing_weights, fold_ln",
    ),
    "two mistakes": (
        lambda c, folder: (c.update(shards=0), c["saes"][0].pop("path")),
        "saes[0]: the key 'path' or 'release' is missing … shards: 0 is less",
    ),
    "missing key": (lambda c, folder: c["models"][0].pop("path"), "models[0]: the key 'path' or 'name' is missing"),
    "missing section": (lambda c, folder: c.pop("corpora"), "top level: the key 'corpora' is missing"),
    "empty section": (lambda c, folder: c.update(models=[]), "models: []"),
    "an experiment without SAEs": (lambda c, folder: c.update(saes=[]), "'main': there is no SAE … Name some"),
    "nothing to do": (lambda c, folder: c.update(experiments=[]), "nothing to do … Give `experiments`, or `atlas"),
    "no shards": (lambda c, folder: c.update(shards=0), "shards: 0 is less than the minimum of 1 … Into how many jobs"),
    "half a shard": (lambda c, folder: c.update(shards=1.5), "shards: found 1.5 (float) … expected integer"),
    "no SAEs in a job": (lambda c, folder: c.update(batch=0), "batch: 0 is less than the minimum of 1 … How many SAEs"),
    "unknown precision": (
        lambda c, folder: c.update(precision={"blocks": "bfloat16"}),
        "precision.blocks: 'bfloat16' is not one of ['float32', 'tf32']",
    ),
    "precision of something else": (
        lambda c, folder: c.update(precision={"block": "tf32"}),
        "precision: Unknown key 'block' … Did you mean 'blocks'? Known: blocks, difference",
    ),
    "contexts of one token": (entry("corpora", context=1), "corpora[0].context: 1 is less than the minimum of 2"),
    "a number that YAML reads as text": (
        lambda c, folder: c.update(yaml.safe_load("bootstrap: {confidence: 1e-4}")),
        "bootstrap.confidence: found '1e-4' (str) … expected number",
    ),
    "one id for a list": (
        entry("experiments", saes="early"),
        "experiments[0].saes: 'early' … A list of ids and patterns",
    ),
    "an intervention twice": (
        entry("experiments", interventions=["sae", "sae"]),
        "experiments[0].interventions … non-unique",
    ),
    # Ids.
    "id that YAML reads as false": (
        entry("saes", id=yaml.safe_load("no")),
        "saes[0].id: found False (bool) … expected string",
    ),
    "id that YAML reads as a number": (
        entry("saes", id=yaml.safe_load("7")),
        "saes[0].id: found 7 (int) … expected string",
    ),
    "id that YAML reads as a date": (
        entry("corpora", id=yaml.safe_load("2024-01-31")),
        "corpora[0].id: found … 2024 … expected string",
    ),
    "two models of one id": (twice("models"), "models: the id 'tiny' is used twice … rename one"),
    "two corpora of one id": (twice("corpora"), "corpora: the id 'story' is used twice … rename one"),
    "two SAEs of one id": (twice("saes"), "saes: the id 'early' is used twice … rename one"),
    "two experiments of one id": (twice("experiments"), "experiments: the id 'main' is used twice … rename one"),
    # Names that refer to something.
    "unknown intervention": (
        entry("experiments", interventions=["eps_randon"]),
        "Experiment 'main': Unknown intervention 'eps_randon' … mean 'eps_random'? Known: act_cov_random, … identity,",
    ),
    "unknown SAE": (
        entry("experiments", saes=["latte"]),
        "Experiment 'main': Unknown SAE 'latte' … Did you mean 'late'? … Known: early, late",
    ),
    "unknown corpus": (
        entry("experiments", corpora=["poem"]),
        "Experiment 'main': Unknown corpus 'poem' … Known: story",
    ),
    "unknown model": (
        entry("saes", model="tiney"),
        "SAE 'early': Unknown model 'tiney' … Did you mean 'tiny'? … Known: tiny",
    ),
    "SAE of one of two models": (
        second_model,
        "SAE 'early': there are 2 models … say which one with `model`: tiny, other",
    ),
    # Files.
    "no model there": (
        entry("models", path="gone"),
        "Model 'tiny': 'gone' does not exist … looked from / … Correct `path`",
    ),
    "no corpus there": (
        entry("corpora", path="gone.txt"),
        "Corpus 'story': 'gone.txt' does not exist … Correct `path`",
    ),
    "no SAE there": (entry("saes", path="gone"), "SAE 'early': 'gone' does not exist … Correct `path`"),
    "model without safetensors": (
        without("tiny/model.safetensors"),
        "Model 'tiny' … holds no *.safetensors … Expected a Hugging Face folder",
    ),
    "model without tokenizer": (
        without("tiny/tokenizer.json"),
        "Model 'tiny' … holds no tokenizer.json … Expected a Hugging Face folder",
    ),
    "model without config": (
        without("tiny/config.json"),
        "Model 'tiny' … holds no config.json … Expected a Hugging Face folder",
    ),
    "SAE without weights": (
        without("early/sae_weights.safetensors"),
        "SAE 'early' … holds no sae_weights.safetensors … Expected a folder",
    ),
    "SAE without cfg": (
        without("early/cfg.json"),
        "SAE 'early' … holds no cfg.json … Expected a folder that sae_lens has saved",
    ),
    "empty corpus": (corpus_file("void.txt", ""), "Corpus 'story' … void.txt' is empty … at least one context"),
    "corpus of unknown kind": (
        corpus_file("a.csv", "x"),
        "Corpus 'story' … ends in '.csv' … Known kinds of file: .txt, .jsonl, .parquet, .npy",
    ),
    # What does not fit together.
    "contexts longer than the model's": (
        entry("corpora", context=33),
        "Corpus 'story': contexts of 33 tokens … model 'tiny' has positions for 32 … Lower `context`",
    ),
    "contexts longer than the second model's": (
        lambda c, folder: (
            second_model(c, folder),
            model(folder / "other", n_positions=8),
            [each.update(model="tiny") for each in c["saes"]],
        ),
        "contexts of 16 tokens … model 'other' has positions for 8",
    ),
    "unknown hook": (
        first_sae(hook="blocks.1.hook_resid_pri"),
        "SAE 'early' … cfg.json … Unknown hook 'blocks.1.hook_resid_pri' … mean 'blocks.N.hook_resid_pre'? … blocks.N.",
    ),
    "hook that is not of a block": (first_sae(hook="hook_embed"), "Unknown hook 'hook_embed' … Known: blocks.N."),
    "hook that can only be read": (
        first_sae(hook="blocks.1.ln2.hook_normalized"),
        "SAE 'early' … Unknown hook 'blocks.1.ln2.hook_normalized'",
    ),
    "hook beyond the last layer": (
        first_sae(hook="blocks.3.hook_resid_pre"),
        "SAE 'early' … is at layer 3 … the model has layers 0 to 2",
    ),
    "SAE narrower than its hook": (
        first_sae(d_in=12),
        "SAE 'early' … d_in is 12 … 'blocks.1.hook_resid_pre' of model 'tiny' is 16 wide … trained on another model?",
    ),
    "SAE of heads as wide as the stream": (
        first_sae(hook="blocks.1.attn.hook_z"),
        "d_in is 16 … 'blocks.1.attn.hook_z' of model 'tiny' is 8 wide",
    ),
    "transcoder wider than where it writes": (
        transcoder_into_a_narrower_place,
        "SAE 'early' … d_out is 16 … 'blocks.1.attn.hook_z' … is 8 wide",
    ),
    "normalisation by a statistic": (
        first_sae(normalize_activations="expected_average_only_in"),
        "SAE 'early' … normalize_activations 'expected_average_only_in' can't be honoured … Fold it into the weights",
    ),
    "more shards than batches": (
        lambda c, folder: (c["corpora"][0].update(contexts=17), c.update(shards=4)),
        "Corpus 'story': 17 contexts make 3 batches of 8, too few for 4 shards. Lower `shards`",
    ),
    "SAEs trained with different weights": (
        lambda c, folder: (
            sae(folder / "early", kwargs={"fold_ln": True}),
            sae(folder / "late", hook="blocks.2.hook_resid_pre", kwargs={"fold_ln": False}),
        ),
        "Model 'tiny': SAEs were trained with fold_ln = True ('early'), fold_ln = False ('late'). Say which in models: "
        "processing: {fold_ln: ...}",
    ),
    "SAEs trained with and without BOS": (
        lambda c, folder: (
            sae(folder / "early", metadata=trained(prepend_bos=True)),
            sae(folder / "late", metadata=trained(prepend_bos=False)),
        ),
        "Corpus 'story': SAEs were trained with prepend_bos = True ('early'), prepend_bos = False ('late'). Say which "
        "with `prepend_bos`",
    ),
    "a path and a name": (entry("models", name="gpt2"), "models[0]: give 'path' or 'name', not both"),
    "a revision of a folder": (entry("models", revision="main"), "models[0]: 'name' must be given beside 'revision'"),
    "an SAE of a folder": (entry("saes", sae_id="a"), "saes[0]: 'release' must be given beside 'sae_id'"),
    "a name that is none": (
        lambda c, folder: c.update(models=[{"id": "tiny", "name": "../gpt2"}]),
        "models[0].name: '../gpt2' is no name of the hub",
    ),
    "an unknown name": (
        lambda c, folder: c.update(models=[{"id": "tiny", "name": "gpt2-smal"}]),
        "Model 'tiny': Unknown model 'gpt2-smal'. Near it: gpt2-small",
    ),
}


@pytest.mark.parametrize(("change", "parts"), BAD.values(), ids=BAD)
def test_a_mistake_is_refused_with_what_was_found_expected_and_what_to_do(tmp_path, change, parts):
    wrong = study(tmp_path)
    config.load(deepcopy(wrong))  # The mistake is the only one.
    change(wrong, tmp_path)
    with pytest.raises(ValueError, match=in_order(parts)):
        config.load(wrong)


@pytest.mark.parametrize("kind", ["models", "corpora", "saes", "experiments"])
@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a..b", ".hidden", "a.", "-a", "a b", "a\n"], ids=repr)
def test_an_id_that_is_no_good_file_name_is_refused(tmp_path, kind, name):
    wrong = study(tmp_path)
    wrong[kind][0]["id"] = name
    with pytest.raises(ValueError, match=re.escape(f"{kind}[0].id: {name!r} can't be a name") + ".*Use letters"):
        config.load(wrong)


@pytest.mark.parametrize("key", ["architecture", "d_in", "d_sae"])
def test_a_key_that_an_sae_lacks_is_named_with_its_file(tmp_path, key):
    right = study(tmp_path)
    cfg = tmp_path / "early" / "cfg.json"
    described = json.loads(cfg.read_text())
    del described[key]
    cfg.write_text(json.dumps(described))
    with pytest.raises(ValueError, match=rf"early.*cfg\.json.*{key}"):
        config.load(right)


@pytest.mark.parametrize("file", ["tiny/config.json", "early/cfg.json"])
def test_a_file_that_is_no_json_is_named(tmp_path, file):
    right = study(tmp_path)
    (tmp_path / file).write_text("{")
    with pytest.raises(ValueError, match=file):
        config.load(right)


@pytest.mark.parametrize("wrong", [{"shards": 2.0}, {"seed": 3.0}, {"seed": True}])
def test_a_whole_number_with_a_point_is_refused_because_it_would_seed_other_noise(tmp_path, wrong):
    with pytest.raises(ValueError, match="expected integer"):
        config.load(study(tmp_path) | wrong)


def test_what_is_left_out_gets_its_default(tmp_path):
    loaded = config.load(study(tmp_path))
    assert (loaded.seed, loaded.shards, dict(loaded.bootstrap)) == (0, 1, {"samples": 2000, "confidence": 0.95})
    assert (loaded.batch, dict(loaded.precision)) == (8, {"blocks": "float32", "difference": "float32"})
    assert dict(loaded.models["tiny"].processing) == UNPROCESSED
    corpus, experiment = loaded.corpora["story"], loaded.experiments["main"]
    assert (corpus.column, corpus.context, corpus.contexts, corpus.prepend_bos) == ("text", 16, None, True)
    assert (experiment.scope, experiment.patch_special) == ("all", False)
    assert (experiment.saes, experiment.corpora) == (("early", "late"), ("story",))
    assert loaded.saes["early"].model == "tiny"


def test_what_is_given_is_kept(tmp_path):
    given = study(tmp_path) | {"seed": 7, "bootstrap": {"samples": 500}, "batch": 3, "precision": {"blocks": "tf32"}}
    given["models"][0]["processing"] = {"center_unembed": True}
    given["experiments"][0] |= {"saes": ["late"], "patch_special": True}
    loaded = config.load(given)
    assert (loaded.seed, dict(loaded.bootstrap)) == (7, {"samples": 500, "confidence": 0.95})
    assert (loaded.batch, dict(loaded.precision)) == (3, {"blocks": "tf32", "difference": "float32"})
    assert dict(loaded.models["tiny"].processing) == UNPROCESSED | {"center_unembed": True}
    assert (loaded.experiments["main"].saes, loaded.experiments["main"].patch_special) == (("late",), True)


def test_what_the_configuration_leaves_open_is_as_the_saes_were_trained(tmp_path):
    given = study(tmp_path)
    del given["corpora"][0]["context"]
    kwargs = {"fold_ln": True, "center_unembed": False, "device": "cuda"}
    sae(tmp_path / "early", metadata=trained(prepend_bos=False, context_size=24, model_from_pretrained_kwargs=kwargs))
    loaded = config.load(given)
    corpus = loaded.corpora["story"]
    assert dict(loaded.models["tiny"].processing) == UNPROCESSED | {"fold_ln": True}
    assert (corpus.context, corpus.prepend_bos) == (24, False)
    given["models"][0]["processing"] = {"fold_ln": False}
    given["corpora"][0] |= {"context": 12, "prepend_bos": True}
    loaded = config.load(given)
    corpus = loaded.corpora["story"]
    assert dict(loaded.models["tiny"].processing) == UNPROCESSED
    assert (corpus.context, corpus.prepend_bos) == (12, True)


def test_a_hook_of_the_configuration_replaces_the_one_in_the_metadata(tmp_path):
    given = study(tmp_path)
    given["saes"][0]["hook"] = "blocks.0.hook_mlp_out"
    found = config.load(given).saes["early"]
    assert found.read == found.write == Hook(0, "hook_mlp_out")


def test_an_experiment_takes_saes_by_pattern(tmp_path):
    given = study(tmp_path)
    given["experiments"][0]["saes"] = ["l*", "*"]
    assert config.load(given).experiments["main"].saes == ("late", "early")
    given["experiments"][0]["saes"] = ["l*", "x*"]
    with pytest.raises(ValueError, match=r"Experiment 'main': Unknown SAE 'x\*'\. Known: early, late"):
        config.load(given)


def test_a_transcoder_reads_at_one_hook_and_writes_at_another(tmp_path):
    given = study(tmp_path)
    sae(tmp_path / "early", hook="blocks.1.ln2.hook_normalized", hook_out="blocks.1.hook_mlp_out")
    transcoder, plain = config.load(given).saes.values()
    assert (transcoder.read, transcoder.write) == (Hook(1, "ln2.hook_normalized"), Hook(1, "hook_mlp_out"))
    assert plain.read == plain.write == Hook(2, "hook_resid_pre")


def test_the_callers_configuration_is_not_modified(tmp_path):
    given = study(tmp_path)
    before = deepcopy(given)
    config.load(given)
    assert given == before


@pytest.mark.parametrize("file", ["config.yaml", "tests/configs/tiny.yaml", "tests/configs/study.yaml"])
def test_the_configurations_of_this_repository_are_correct(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = config.load(yaml.safe_load(Path(file).read_text()))
    known = fingerprint.registered("interventions", "INTERVENTIONS")
    labels = {label for experiment in found.experiments.values() for label in experiment.interventions}
    assert {label.partition("(")[0] for label in labels} <= set(known)


def test_the_schema_lets_no_object_have_unknown_keys():
    schema = yaml.safe_load(config.SCHEMA.read_text())
    Draft202012Validator.check_schema(schema)
    objects = [part for part in mappings(schema) if part.get("type") == "object"]
    assert len(objects) >= 7
    assert [part for part in objects if part.get("additionalProperties") is not False] == []


def mappings(schema):
    """Every mapping inside a schema, itself first."""
    if isinstance(schema, dict):
        yield schema
    for value in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from mappings(value)


def test_planning_imports_nothing_heavy():
    heavy = {"torch", "transformer_lens", "sae_lens", "seaborn", "scipy.optimize"}
    code = f"import sys, pipeline.config, pipeline.plan; print({heavy} & sys.modules.keys())"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def test_an_experiment_of_nothing_but_the_control_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'identity' is the control of other interventions"):
        config.load(study(tmp_path) | {"experiments": [{"id": "main", "interventions": ["identity"]}]})


# Studies of little: SAEs and experiments may be left out, as long as there is something to do.

NOTHING = "There is nothing to do. Give `experiments`, or `atlas: {}` for ablations without any SAE."
LITTLE = {
    "nothing": ({}, NOTHING),
    "empty lists": ({"saes": [], "experiments": []}, NOTHING),
    "SAEs that nothing is done with": ({"saes": None}, NOTHING),
    "an experiment without SAEs": (
        {"experiments": [{"id": "main", "interventions": ["sae"]}]},
        "Experiment 'main': there is no SAE in the configuration. Name some, or leave the experiment out.",
    ),
    "an experiment without SAEs beside an atlas": (
        {"experiments": [{"id": "main", "interventions": ["zero"]}], "atlas": {}},
        "Experiment 'main': there is no SAE in the configuration. Name some, or leave the experiment out.",
    ),
    "an experiment of an SAE that is not there": (
        {"experiments": [{"id": "main", "interventions": ["sae"], "saes": ["early"]}]},
        "Experiment 'main': Unknown SAE 'early'. Known: none.",
    ),
    "a series of no SAE": (
        {"atlas": {}, "series": [{"id": "s", "axis": "x", "points": [{"at": 1, "sae": "a"}, {"at": 2, "sae": "b"}]}]},
        "Series 's': Unknown SAE 'a'. Known: none.",
    ),
    "a family of no SAE": (
        {"atlas": {}, "metrics": {"families": [{"id": "f", "saes": ["early"]}]}},
        "Family 'f': Unknown SAE 'early'. Known: none.",
    ),
    "no model": ({"models": [], "atlas": {}}, "models: []"),
    "no corpus": ({"corpora": [], "atlas": {}}, "corpora: []"),
}


@pytest.mark.parametrize(("changes", "message"), LITTLE.values(), ids=LITTLE)
def test_a_study_of_too_little_is_refused(tmp_path, changes, message):
    given = study(tmp_path)
    saes = given.pop("saes")
    del given["experiments"]
    with pytest.raises(ValueError, match=re.escape(message)):
        config.load(
            given | {name: saes if name == "saes" and value is None else value for name, value in changes.items()}
        )


@pytest.mark.parametrize("changes", [{}, {"saes": []}, {"experiments": []}, {"saes": [], "experiments": []}], ids=repr)
def test_an_atlas_needs_neither_saes_nor_experiments(tmp_path, changes):
    given = {name: value for name, value in study(tmp_path).items() if name in ("models", "corpora")}
    found = config.load(given | changes | {"atlas": {}})
    assert (dict(found.saes), list(found.experiments), dict(found.series)) == ({}, ["atlas"], {})


def test_saes_may_stand_beside_an_atlas_without_an_experiment(tmp_path):
    given = study(tmp_path) | {"experiments": [], "atlas": {}}
    assert (list(config.load(given).saes), list(config.load(given).experiments)) == (["early", "late"], ["atlas"])


# Which families of models run attention and MLP side by side, by their Hugging Face configuration.
PARALLEL = {
    "gpt2": ({"model_type": "gpt2"}, False),
    "none": ({}, False),
    "pythia": ({"model_type": "gpt_neox", "use_parallel_residual": True}, True),
    "gpt-neox that does not say": ({"model_type": "gpt_neox"}, True),
    "gpt-neox in sequence": ({"model_type": "gpt_neox", "use_parallel_residual": False}, False),
    "gpt-neo": ({"model_type": "gpt_neo"}, False),
    "gpt-j": ({"model_type": "gptj"}, True),
    "phi": ({"model_type": "phi"}, True),
    "phi-3": ({"model_type": "phi3"}, False),
    "llama": ({"model_type": "llama"}, False),
    "falcon": ({"model_type": "falcon", "parallel_attn": True}, True),
    "falcon in sequence": ({"model_type": "falcon", "parallel_attn": False, "new_decoder_architecture": False}, False),
    "falcon of the new kind": ({"model_type": "falcon", "new_decoder_architecture": True}, True),
}


@pytest.mark.parametrize(("settings", "parallel"), PARALLEL.values(), ids=PARALLEL)
def test_whether_attention_and_mlp_are_side_by_side_is_read_from_the_model(tmp_path, settings, parallel):
    model(tmp_path / "tiny", **settings)
    assert read_geometry(tmp_path / "tiny").parallel is parallel
