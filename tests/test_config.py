"""A configuration -> a study: what is given, and what is filled in. What is refused is in test_bad_input.py."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import yaml
from fakes import ROOT, model, sae, study
from jsonschema import Draft202012Validator

from pipeline import config, fingerprint
from pipeline.hooks import Hook, read_geometry


def trained(**metadata):
    """Metadata of an SAE."""
    return {"hook_name": "blocks.1.hook_resid_pre"} | metadata


UNPROCESSED = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False}


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


# Studies of little: SAEs and experiments may be left out, as long as there is something to do.


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


def test_ready_token_ids_are_held_against_the_models_that_use_them_alone(tmp_path):
    given = study(tmp_path)
    given["models"].append({"id": "large", "path": model(tmp_path / "large", vocab_size=90)})
    np.save(tmp_path / "ids.npy", np.full((8, 16), 70))
    given["corpora"].append({"id": "ids", "path": str(tmp_path / "ids.npy"), "context": 16})
    given["saes"] = [each | {"model": name} for each, name in zip(given["saes"], ("tiny", "large"), strict=True)]
    pairs = {"early": "story", "late": "ids"}
    given["experiments"] = [
        {"id": sae, "interventions": ["sae"], "saes": [sae], "corpora": [corpus]} for sae, corpus in pairs.items()
    ]
    config.load(given)
    given["experiments"][0]["corpora"] = "all"
    with pytest.raises(ValueError, match=r"Corpus 'ids', model 'tiny': .* from 70 to 70, .* 50 tokens"):
        config.load(given)
