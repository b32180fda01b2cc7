"""Wrong configurations and files, and the message for each: what was found, what was expected, what to do. All are
refused when a run is planned, before any model is loaded."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fakes import HOOK, PAIR, ROOT, SIZES, everything, in_order, model, sae, safetensors
from fakes import experiments as every_experiment

from pipeline import config, hub
from pipeline.plan import Plan


def planned(file: Path) -> Plan:
    """What a dry run does with a configuration file."""
    config.check_plain(file)
    return Plan(config.load(yaml.safe_load(file.read_text(encoding="utf-8"))))


# How a configuration `c` is spoiled, or its files in `folder`.


def top(**values):
    return lambda c, folder: c.update(values)


def first(kind, **values):
    """A change of the first entry of a list of the configuration."""
    return lambda c, folder: c[kind][0].update(values)


def twice(kind):
    return lambda c, folder: c[kind].append(deepcopy(c[kind][0]))


def text(content):
    """Another text in place of the configuration file's."""
    return lambda c, folder: (folder / "bad.yaml").write_text(content)


def parsed(content):
    """Keys as YAML reads them."""
    return lambda c, folder: c.update(yaml.safe_load(content))


def without(file):
    return lambda c, folder: (folder / file).unlink()


def content(file, data):
    return lambda c, folder: (folder / file).write_bytes(data.encode() if isinstance(data, str) else data)


def cut(file, size):
    return lambda c, folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def json_keys(file, **values):
    """Keys of a JSON file; None takes one away."""

    def change(c, folder):
        found = json.loads((folder / file).read_text()) | values
        (folder / file).write_text(json.dumps({key: value for key, value in found.items() if value is not None}))

    return change


def metadata(**values):
    return json_keys("early/cfg.json", metadata={"hook_name": HOOK} | values)


def early(**settings):
    """Another SAE in the first one's folder."""
    return lambda c, folder: sae(folder / "early", **settings)


def corpus(name, data, **values):
    """Another file as the corpus."""

    def change(c, folder):
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
        c["corpora"][0].update({"path": name} | values)

    return change


def parquet(**columns):
    def change(c, folder):
        pq.write_table(pa.table(columns), folder / "a.parquet")
        c["corpora"][0]["path"] = "a.parquet"

    return change


def token_ids(array):
    def change(c, folder):
        np.save(folder / "ids.npy", array)
        c["corpora"][0].update(path="ids.npy")

    return change


def ids(*shape, value=7, dtype=int):
    return token_ids(np.full(shape, value, dtype))


def one(**entry):
    """One experiment in place of all."""
    return lambda c, folder: c.update(experiments=[{"id": "x", "interventions": PAIR} | entry])


def kind(name, **changes):
    """One of every kind with changed keys in place of all; None takes a key away."""
    (found,) = [entry for entry in every_experiment() if entry["id"] == name]
    return one(**{key: value for key, value in (found | {"id": "x"} | changes).items() if value is not None})


def atlas(**entry):
    return top(atlas=entry)


def metrics(**entry):
    return top(metrics=entry)


def families(*members):
    return metrics(families=[{"id": name, "saes": list(saes)} for name, *saes in members])


def law(data):
    """A calibration of one's own."""
    return lambda c, folder: ((folder / "mine.csv").write_text(data), c.update(metrics={"calibrations": ["mine.csv"]}))


def series(**entry):
    good = {"id": "s", "axis": "steps", "points": [POINT, {"at": 2, "sae": "late"}]}
    return top(series=[good | entry])


def both(*changes):
    return lambda c, folder: [change(c, folder) for change in changes] and None


def second_model(c, folder):
    c["models"].append({"id": "other", "path": model(folder / "other")})


def named_model(c, folder):
    """The model by name, as an earlier plan found it, and an SAE of another one."""
    c["models"] = [{"id": "tiny", "name": "gpt2"}]
    found = {"repo": "gpt2", "commit": "0" * 40, "config": SIZES}
    hub.remember(hub.remembered("model", "gpt2", "main"), found)
    json_keys("early/cfg.json", metadata={"hook_name": HOOK, "model_name": "pythia-70m"})(c, folder)


def filled(value):
    """Weights of an SAE that are all the same."""
    shapes = {"W_enc": (16, 64), "b_enc": (64,), "W_dec": (64, 16), "b_dec": (16,)}
    return lambda c, folder: safetensors(folder / "early/sae_weights.safetensors", shapes, value=value)


def weights(**shapes):
    whole = {"W_enc": (16, 64), "b_enc": (64,), "W_dec": (64, 16), "b_dec": (16,)} | shapes
    shapes = {name: shape for name, shape in whole.items() if shape}
    return lambda c, folder: safetensors(folder / "early/sae_weights.safetensors", shapes)


def pickled_instead(c, folder):
    (folder / "early/sae_weights.safetensors").rename(folder / "early/sae.pt")


POINT = {"at": 1, "sae": "early"}
DOSE = {"interventions": ["error_scaled"], "alphas": [0.5]}
PICKLE = pickle.dumps({"W": [0.0] * 50})
ZIP = b"PK\x03\x04\x00\x00\x08\x08\x00\x00" + bytes(60)
LAW = "# name: n\n# kind: law\n# source: s\n# corpus: c\n# lowest_flop: none\n# highest_flop: none\nparameter,value\n"
LAW += "scale_flop,1e20\nexponent,0.1\nfloor,1\n"
POINTS = "# kind: points\n# source: s\n# corpus: c\nflop,loss\n"
UNTRAINED = "Others, such as batchtopk, are those of training: save the SAE with `save_inference_model`."
# What is spoiled in a correct study, and the parts of the message, in order.
BAD = {
    # The file.
    "no YAML": (text("models: [{id: tiny"), "bad.yaml is no YAML: … line 1, column 19. Look at the indents and brack"),
    "a tab as indent": (
        text("models:\n\t- id: tiny\n"),
        "bad.yaml is no YAML: … cannot start any token, line 2, column 1",
    ),
    "a tag that is code": (
        text("seed: !!python/name:os.system\n"),
        "bad.yaml is no plain YAML: could not determine a constructor for the tag … line 1, column 7. Leave tags",
    ),
    "a template": (
        text("__use_yte__: true\nseed: 1\n"),
        "is a template (`__use_yte__`), which is code. Write the values",
    ),
    "a key twice": (
        text("seed: 1\nmodels: []\nseed: 2\n"),
        "bad.yaml is no plain YAML: the key 'seed' is there twice, of which one would be ignored, line 1, column 1. "
        "Delete one of them.",
    ),
    "a key twice in an entry": (
        text("models:\n  - {id: a, path: b, path: c}\n"),
        "the key 'path' is there twice … line 2",
    ),
    "a list": (text("- seed: 1\n"), "bad.yaml holds [{'seed': 1}], expected keys with values, such as `models: [...]`"),
    "no text": (lambda c, folder: (folder / "bad.yaml").write_bytes(b"\xff\xfe"), "bad.yaml is no text in UTF-8"),
    # Keys and values.
    "misspelt key": (top(shard=2), "top level: Unknown key 'shard'. Did you mean 'shards'? Known: atlas, batch, boots"),
    "misspelt key of an entry": (
        first("corpora", contxt=8),
        "corpora[0]: Unknown key 'contxt'. Did you mean 'context'? … prepend_bos",
    ),
    "misspelt key of a setting": (
        first("models", processing={"fold_layernorm": True}),
        "models[0].processing: Unknown key 'fold_layernorm' … Known: center_unembed, center_writing_weights, fold_ln",
    ),
    "a device, which is the profile's": (top(device="cuda"), "top level: Unknown key 'device' … Known: atlas, batch,"),
    "two mistakes": (
        both(top(shards=0), lambda c, folder: c["saes"][0].pop("path")),
        "The configuration is wrong: … saes[0]: the key 'path' or 'release' is missing … shards: found 0",
    ),
    "missing key": (lambda c, folder: c["models"][0].pop("path"), "models[0]: the key 'path' or 'name' is missing"),
    "an entry without id": (lambda c, folder: c["corpora"][0].pop("id"), "corpora[0]: the key 'id' is missing."),
    "missing section": (lambda c, folder: c.pop("corpora"), "top level: the key 'corpora' is missing"),
    "empty section": (top(models=[]), "models: found an empty list, expected a list of 1 or more."),
    "a section that is no list": (
        top(models={"id": "a"}),
        "models: found {'id': 'a'}, expected a list. Begin every entry with a dash.",
    ),
    "an entry that is no mapping": (top(saes=["early"]), "saes[0]: found 'early', expected keys with values."),
    "no shards": (top(shards=0), "shards: found 0, expected 1 or more. Into how many jobs"),
    "half a shard": (top(shards=1.5), "shards: found 1.5, expected a whole number. Into how many jobs"),
    "shards with a point": (top(shards=2.0), "shards: found 2.0, expected a whole number."),
    "a seed with a point": (top(seed=3.0), "seed: found 3.0, expected a whole number. Seed of every random"),
    "a seed that is true": (top(seed=True), "seed: found true, expected a whole number."),
    "a seed in words": (top(seed="seven"), "seed: found 'seven', expected a whole number."),
    "no SAEs in a job": (top(batch=0), "batch: found 0, expected 1 or more. How many SAEs or hooks one job takes"),
    "unknown precision": (
        top(precision={"blocks": "bfloat16"}),
        "precision.blocks: Unknown value 'bfloat16'. … Known: float32, tf32. The transformer blocks.",
    ),
    "precision of something else": (
        top(precision={"block": "tf32"}),
        "precision: Unknown key 'block'. Did you mean 'blocks'? Known: blocks, difference.",
    ),
    "precision for all": (top(precision="tf32"), "precision: found 'tf32', expected keys with values. Where a GPU may"),
    "all confidence": (
        top(bootstrap={"confidence": 1}),
        "bootstrap.confidence: found 1, expected less than 1. Mass of",
    ),
    "no confidence": (top(bootstrap={"confidence": 0}), "bootstrap.confidence: found 0, expected more than 0. Mass of"),
    "confidence in percent": (
        top(bootstrap={"confidence": 95}),
        "bootstrap.confidence: found 95, expected less than 1.",
    ),
    "few resamples": (top(bootstrap={"samples": 10}), "bootstrap.samples: found 10, expected 100 or more. Number of"),
    "a number that YAML reads as text": (
        parsed("bootstrap: {confidence: 1e-4}"),
        "bootstrap.confidence: found '1e-4', expected a number. It is text to YAML: write … 1e-4 as 1.0e-4.",
    ),
    # Ids.
    "id that YAML reads as false": (
        lambda c, folder: c["saes"][0].update(yaml.safe_load("id: no")),
        "saes[0].id: found false, expected text. Put it in quotes.",
    ),
    "id that YAML reads as a number": (first("saes", id=7), "saes[0].id: found 7, expected text. Put it in quotes."),
    "id that YAML reads as a date": (
        lambda c, folder: c["corpora"][0].update(yaml.safe_load("id: 2024-01-31")),
        "corpora[0].id: found 2024-01-31 (a date), expected text. Put it in quotes.",
    ),
    "id of nothing": (first("saes", id=None), "saes[0].id: found nothing, expected text."),
    "two models of one id": (twice("models"), "models: the id 'tiny' is used twice … rename one"),
    "two corpora of one id": (twice("corpora"), "corpora: the id 'story' is used twice … rename one"),
    "two SAEs of one id": (twice("saes"), "saes: the id 'early' is used twice … rename one"),
    "two experiments of one id": (twice("experiments"), "experiments: the id 'main' is used twice … rename one"),
    "two series of one id": (twice("series"), "series: the id 'training' is used twice … rename one"),
    "an experiment called atlas beside the atlas": (
        first("experiments", id="atlas"),
        "experiments: the id 'atlas' is used twice … rename one",
    ),
    # Too little.
    "nothing to do": (
        lambda c, folder: (c.update(experiments=[]), c.pop("atlas")),
        "There is nothing to do. Give `experiments`, or `atlas: {}` for ablations without any SAE.",
    ),
    "experiments without SAEs": (
        top(saes=[]),
        "Experiment 'main': there is no SAE in the configuration. Name some, or leave the experiment out.",
    ),
    "a series of no SAE": (top(saes=[], experiments=[]), "Series 'training': Unknown SAE 'early'. Known: none."),
    "a family of no SAE at all": (
        top(saes=[], experiments=[], series=[]),
        "Family 'one': Unknown SAE 'early'. Known: none.",
    ),
    # Models.
    "no model there": (
        first("models", path="gone"),
        "Model 'tiny': 'gone' does not exist (looked from / … ). Correct `path`, or run in the folder it starts from.",
    ),
    "model that is a file": (
        first("models", path="story.txt"),
        "Model 'tiny': 'story.txt' is a file, expected the Hugg",
    ),
    "model without safetensors": (
        without("tiny/model.safetensors"),
        "Model 'tiny' … holds no *.safetensors. Expected a Hugging Face folder with safetensors weights.",
    ),
    "model that is pickled": (
        lambda c, folder: (folder / "tiny/model.safetensors").rename(folder / "tiny/pytorch_model.bin"),
        "Model 'tiny' … holds no *.safetensors. … Its *.bin is pickled: convert it, or set `allow_pickle: true` if you",
    ),
    "model without tokenizer": (
        without("tiny/tokenizer.json"),
        "Model 'tiny' … holds no tokenizer.json. Expected a Hug",
    ),
    "model without config": (without("tiny/config.json"), "Model 'tiny' … holds no config.json. Expected a Hugging"),
    "model's config that is no JSON": (
        content("tiny/config.json", '{"n_layer": 3'),
        "Model 'tiny': … tiny/config.json' is not JSON: … Copy, download or save it again.",
    ),
    "model's config that is a list": (
        content("tiny/config.json", "[]"),
        "tiny/config.json' holds a JSON list, expected an",
    ),
    "model of unknown architecture": (
        json_keys("tiny/config.json", architectures=["MambaForCausalLM"]),
        "tiny/config.json': its architecture is ['MambaForCausalLM'], which TransformerLens can't read from a folder. "
        "Expected one of … GPT2LMHeadModel, … LlamaForCausalLM … A model that it knows can be given by `name`.",
    ),
    "model that is no decoder": (
        json_keys("tiny/config.json", architectures=["BertForMaskedLM"]),
        "its architecture is ['BertForMaskedLM'], which TransformerLens can't read",
    ),
    "model that does not say its architecture": (
        json_keys("tiny/config.json", architectures=None),
        "tiny/config.json': its architecture is None, which TransformerLens can't read from a folder.",
    ),
    "model without its number of layers": (
        json_keys("tiny/config.json", n_layer=None),
        "tiny/config.json' has none of num_hidden_layers / n_layer: expected a Hugging Face decoder's configuration.",
    ),
    "model whose number of layers is text": (
        json_keys("tiny/config.json", n_layer="3"),
        "tiny/config.json': n_layer is '3', expected a whole number above 0. Correct the file.",
    ),
    "GPT-2 without n_ctx": (
        json_keys("tiny/config.json", n_ctx=None),
        'tiny/config.json\' lacks the key n_ctx, which TransformerLens needs. Add "n_ctx": 32.',
    ),
    "model that is cut short": (
        cut("tiny/model.safetensors", 900),
        "Model 'tiny': … tiny/model.safetensors' is cut short: 900 bytes, expected 33 … Copy or download it again.",
    ),
    "model that is cut short in its header": (
        cut("tiny/model.safetensors", 40),
        "tiny/model.safetensors' is cut short: 40 bytes, expected … of header alone. Copy or download it again.",
    ),
    "model that is a pointer of Git LFS": (
        content("tiny/model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"),
        "tiny/model.safetensors' is a pointer of Git LFS, without the content. Fetch it with `git lfs pull`.",
    ),
    "pickle that is called safetensors": (
        content("tiny/model.safetensors", ZIP),
        "tiny/model.safetensors' is pickled (torch.save). Pickles can run code: save the tensors with",
    ),
    "model of which a part is missing": (
        content("tiny/model.safetensors.index.json", json.dumps({"weight_map": {"a": "model-2.safetensors"}})),
        "Model 'tiny': … holds no model-2.safetensors, which model.safetensors.index.json names. Copy or download it",
    ),
    "tokenizer that is cut short": (
        content("tiny/tokenizer.json", '{"model": {"vocab"'),
        "Model 'tiny': … tiny/tokenizer.json' is no JSON, or cut short. Copy or download it again.",
    ),
    "a path and a name": (first("models", name="gpt2"), "models[0]: give 'path' or 'name', not both"),
    "a revision of a folder": (first("models", revision="main"), "models[0]: 'name' must be given beside 'revision'"),
    "a name that leads out": (
        top(models=[{"id": "a", "name": "../gpt2"}]),
        "models[0].name: '../gpt2' is no name of the",
    ),
    "an unknown name": (
        top(models=[{"id": "tiny", "name": "gpt2-smal"}]),
        "Model 'tiny': Unknown model 'gpt2-smal'. Near it: gpt2-small",
    ),
    "a model that is unpickled without limits": (
        top(models=[{"id": "tiny", "name": "NeelNanda/SoLU_1L512W_C4_Code"}]),
        "Model 'tiny': TransformerLens reads 'NeelNanda/SoLU_1L512W_C4_Code' by unpickling anything. Use another model",
    ),
    # SAEs.
    "no SAE there": (first("saes", path="gone"), "SAE 'early': 'gone' does not exist … Correct `path`"),
    "SAE that is a file": (
        first("saes", path="story.txt"),
        "SAE 'early': 'story.txt' is a file, expected the folder that",
    ),
    "SAE without weights": (
        without("early/sae_weights.safetensors"),
        "SAE 'early' … holds no sae_weights.safetensors. Expected a folder that sae_lens has saved.",
    ),
    "SAE whose weights are pickled": (
        pickled_instead,
        "SAE 'early' … holds no sae_weights.safetensors … Its sae.pt is pickled: save the SAE with sae_lens.",
    ),
    "SAE without cfg": (
        without("early/cfg.json"),
        "SAE 'early' … holds no cfg.json. Expected a folder that sae_lens has",
    ),
    "SAE whose cfg is no JSON": (
        content("early/cfg.json", "{d_in: 16}"),
        "SAE 'early': … early/cfg.json' is not JSON: … line 1 column 2 … Copy, download or save it again.",
    ),
    "SAE whose cfg is empty": (content("early/cfg.json", ""), "SAE 'early': … early/cfg.json' is not JSON"),
    **{
        f"SAE without {key}": (
            json_keys("early/cfg.json", **{key: None}),
            f"SAE 'early' … early/cfg.json) has no '{key}'. Expected what sae_lens writes; save the SAE again.",
        )
        for key in ("architecture", "d_in", "d_sae")
    },
    "SAE whose width is text": (
        json_keys("early/cfg.json", d_in="16"),
        "early/cfg.json): d_in is '16', expected a whole number above 0. Correct it, or save it again.",
    ),
    "SAE of unknown architecture": (
        json_keys("early/cfg.json", architecture="topkk"),
        f"SAE 'early' … Unknown architecture 'topkk'. Did you mean 'topk'? Known: abstopk, gated, … {UNTRAINED}",
    ),
    "SAE of an architecture of training": (
        json_keys("early/cfg.json", architecture="batchtopk"),
        f"SAE 'early' … Unknown architecture 'batchtopk'. … {UNTRAINED}",
    ),
    "SAE whose metadata is a list": (json_keys("early/cfg.json", metadata=[1]), "metadata is [1], expected an object."),
    "SAE whose metadata is of another kind": (
        metadata(context_size="long"),
        "early/cfg.json): metadata.context_size is 'long', expected a whole number above 0. Correct it, or save",
    ),
    "SAE that does not say where it reads": (
        json_keys("early/cfg.json", metadata={"model_name": "x"}),
        "SAE 'early' … has no metadata.hook_name. Say where it reads with `hook`, or save it with sae_lens 6.",
    ),
    "SAE whose weights are a pickle": (
        content("early/sae_weights.safetensors", PICKLE),
        "SAE 'early': … sae_weights.safetensors' is pickled. Pickles can run code: save the tensors with safetensors.",
    ),
    "SAE whose weights are cut short": (
        cut("early/sae_weights.safetensors", 5000),
        "SAE 'early': … sae_weights.safetensors' is cut short: 5000 bytes, expected 8 … Copy or download it again.",
    ),
    "SAE whose weights are something else": (
        content("early/sae_weights.safetensors", "weights!"),
        "sae_weights.safetensors' is no safetensors file: it begins with b'weights!'. Save the tensors with",
    ),
    "SAE whose weights are empty": (
        content("early/sae_weights.safetensors", ""),
        "is no safetensors file: it is empty.",
    ),
    "SAE whose weights are a web page": (
        content("early/sae_weights.safetensors", "<!doctype html><html>Sign in</html>"),
        "sae_weights.safetensors' is a web page. Download the file itself.",
    ),
    "SAE whose weights have another header": (
        content("early/sae_weights.safetensors", (11).to_bytes(8, "little") + b'{"W_enc":1}'),
        "sae_weights.safetensors' has a header that is not of safetensors. Save it again.",
    ),
    "SAE that lacks tensors": (
        weights(W_enc=None, b_dec=None),
        "SAE 'early': … has no W_enc, b_dec, which an SAE of architecture 'topk' consists of; found W_dec, b_enc. Save",
    ),
    "SAE whose weights are of another width": (
        weights(W_dec=(64, 12)),
        "SAE 'early': W_dec in … has the shape [64, 12], but by cfg.json it is [64, 16]. Are the two files of one SAE?",
    ),
    "SAE with NaN": (
        filled(np.nan),
        "SAE 'early': … sae_weights.safetensors': 1024 of the 1024 values of 'W_dec' are not finite. Train or save it",
    ),
    "SAE with an infinity": (filled(np.inf), "of the 1024 values of 'W_dec' are not finite."),
    "unknown hook": (
        early(hook="blocks.1.hook_resid_pri"),
        "SAE 'early' … cfg.json): Unknown hook 'blocks.1.hook_resid_pri'. Did you mean 'blocks.N.hook_resid_pre'? "
        "Known: blocks.N. … Correct `hook`, or use the model that it was trained on.",
    ),
    "unknown hook in the configuration": (
        first("saes", hook="resid_pre"),
        "Unknown hook 'resid_pre' … Known: blocks.N.attn.hook_z,",
    ),
    "hook that is not of a block": (early(hook="hook_embed"), "Unknown hook 'hook_embed' … Known: blocks.N."),
    "hook that can only be read": (
        early(hook="blocks.1.ln2.hook_normalized"),
        "SAE 'early' … Unknown hook 'blocks.1.ln2.hook_normalized'",
    ),
    "hook beyond the last layer": (
        early(hook="blocks.3.hook_resid_pre"),
        "SAE 'early' … is at layer 3, but the model has layers 0 to 2. Correct `hook`, or use the model that it was",
    ),
    "SAE narrower than its hook": (
        early(d_in=12),
        "SAE 'early' … d_in is 12, but 'blocks.1.hook_resid_pre' of model 'tiny' is 16 wide. Was it trained on another",
    ),
    "SAE of heads as wide as the stream": (
        early(hook="blocks.1.attn.hook_z"),
        "d_in is 16, but 'blocks.1.attn.hook_z' of model 'tiny' is 8 wide",
    ),
    "transcoder wider than where it writes": (
        early(hook="blocks.1.ln2.hook_normalized", hook_out="blocks.1.attn.hook_z"),
        "SAE 'early' … d_out is 16, but 'blocks.1.attn.hook_z' … is 8 wide",
    ),
    "normalisation by a statistic": (
        early(normalize_activations="expected_average_only_in"),
        "SAE 'early' … normalize_activations 'expected_average_only_in' can't be honoured. Fold it into the weights wi",
    ),
    "SAE of another model than the one that is named": (
        named_model,
        "SAE 'early' … its metadata say that it was trained on 'pythia-70m', but model 'tiny' is 'gpt2'. Add the other "
        "model, or say `model: tiny` in this entry if you mean it.",
    ),
    "unknown model": (
        first("saes", model="tiney"),
        "SAE 'early': Unknown model 'tiney'. Did you mean 'tiny'? Known: tiny.",
    ),
    "SAE of one of two models": (
        second_model,
        "SAE 'early': there are 2 models, so say which one with `model`: tiny, other",
    ),
    "an SAE of a folder": (first("saes", sae_id="a"), "saes[0]: 'release' must be given beside 'sae_id'"),
    "a folder without id": (lambda c, folder: c["saes"][0].pop("id"), "saes[0]: 'id' must be given beside 'path'"),
    "an unknown release": (
        top(saes=[{"release": "gpt2-small-res-jbb"}]),
        "`saes`: Unknown release 'gpt2-small-res-jbb'. Near it: gpt2-small-res-jb",
    ),
    "an unknown SAE of a release": (
        top(saes=[{"release": "gpt2-small-res-jb", "sae_id": "blocks.12.hook_resid_pre"}]),
        "SAEs of 'gpt2-small-res-jb': Unknown SAE 'blocks.12.hook_resid_pre'. Near it: blocks.",
    ),
    "a pattern that no SAE of a release matches": (
        top(saes=[{"release": "gpt2-small-res-jb", "sae_ids": "blocks.*.hook_mlp_out"}]),
        "SAEs of 'gpt2-small-res-jb': Unknown SAE 'blocks.*.hook_mlp_out'. Near it: blocks.",
    ),
    "layers that a release has not": (
        top(saes=[{"release": "gpt2-small-res-jb", "layers": "11-13", "sae_ids": "*resid_pre"}]),
        "SAEs of 'gpt2-small-res-jb': there is none at layer 12, only at 0, 1, 2",
    ),
    "layers in words": (
        top(saes=[{"release": "gpt2-small-res-jb", "layers": "all"}]),
        "saes[0].layers: found 'all'. Expected: Only those at these layers: 6, [0, 6, 11]",
    ),
    "a release that is pickled": (
        top(saes=[{"release": "gpt2-small-hook-z-kk", "layers": 0}]),
        "its weights are pickled, which is refused by default. If you trust … set `allow_pickle: true` in this entry",
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
        both(
            metadata(prepend_bos=True),
            json_keys("late/cfg.json", metadata={"hook_name": "blocks.2.hook_resid_pre", "prepend_bos": False}),
        ),
        "Corpus 'story': SAEs were trained with prepend_bos = True ('early'), prepend_bos = False ('late'). Say which "
        "with `prepend_bos`",
    ),
    # Corpora.
    "no corpus there": (
        first("corpora", path="gone.txt"),
        "Corpus 'story': 'gone.txt' does not exist … Correct `path`",
    ),
    "corpus that is a folder": (
        first("corpora", path="tiny"),
        "'tiny' is a folder, expected a file: .txt, .jsonl, .parq",
    ),
    "corpus of unknown kind": (
        corpus("a.csv", "x"),
        "Corpus 'story': 'a.csv' ends in '.csv'. Known kinds of file: .txt, .jsonl, .parquet, .npy",
    ),
    "empty corpus": (corpus("void.txt", ""), "Corpus 'story': 'void.txt' is empty. It must hold at least one context"),
    "text that is too short": (
        corpus("a.txt", "Once."),
        "Corpus 'story': 'a.txt' has 5 bytes, too few for 40 contexts of 16 tokens, which are at least 600 bytes. Use "
        "a longer text, or lower `context` or `contexts`.",
    ),
    "text that is not in UTF-8": (
        corpus("a.txt", "Zwölf Töchter. ".encode("latin-1") * 99),
        "Corpus 'story': a.txt is no text in UTF-8: found byte 0xf6 (invalid start byte). Save it as UTF-8.",
    ),
    "text that is binary": (
        corpus("a.txt", ZIP * 20),
        "Corpus 'story': a.txt is no text: it holds NUL bytes. Expected UTF-8, not UTF-16 or a",
    ),
    "JSONL that is not in UTF-8": (
        corpus("a.jsonl", b'{"text": "Zw\xf6lf"}\n' * 99),
        "Corpus 'story': a.jsonl is no text in UTF-8: found byte 0xf6",
    ),
    "a line that is no JSON": (
        corpus("a.jsonl", '{"text": "one"}\n{"text": "tw\n'),
        "Corpus 'story': a.jsonl, line 2: not JSON: Invalid control character at, column 13. Expected an object on eve",
    ),
    "a line that is no object": (
        corpus("a.jsonl", '["one"]\n'),
        "a.jsonl, line 1: found a JSON list, expected an object",
    ),
    "a line without the column": (
        corpus("a.jsonl", '{"text": "one"}\n\n{"texts": "two", "id": 2}\n'),
        "Corpus 'story': a.jsonl, line 3: Unknown column 'text'. Did you mean 'texts'? Known: id, texts. Say which "
        "holds the text with `column`.",
    ),
    "a line whose text is a number": (
        corpus("a.jsonl", '{"text": 2}\n'),
        "a.jsonl, line 1: 'text' holds 2, expected text. Name another with `column`.",
    ),
    "Parquet without the column": (
        parquet(content=["one"], id=[1]),
        "Corpus 'story': a.parquet: Unknown column 'text'. … Known: content, id. Say which holds the text with `column",
    ),
    "Parquet whose column holds numbers": (
        parquet(text=[1, 2]),
        "a.parquet: the column 'text' holds int64, expected text. Name another with `column`.",
    ),
    "Parquet without rows": (
        parquet(text=pa.array([], pa.string())),
        "a.parquet has no rows. It must hold at least one",
    ),
    "what is no Parquet": (
        corpus("a.parquet", "text\none\n"),
        "Corpus 'story': a.parquet can't be read as Parquet, or is cut short: … Save or copy it again.",
    ),
    "ids that are no .npy": (
        corpus("ids.npy", "1 2 3"),
        "Corpus 'story': ids.npy is no .npy file. Save the ids with numpy.save.",
    ),
    "ids that are cut short": (
        both(ids(40, 16), cut("ids.npy", 1000)),
        "Corpus 'story': ids.npy can't be read as .npy: … Save the ids again with numpy.save.",
    ),
    "ids on one axis": (
        ids(640),
        "ids.npy holds int64 of shape (640,), expected whole numbers of shape `[context, position]`. Save packed token",
    ),
    "ids on three axes": (ids(40, 16, 1), "ids.npy holds int64 of shape (40, 16, 1), expected whole numbers"),
    "ids that are no whole numbers": (
        ids(40, 16, dtype=float),
        "ids.npy holds float64 of shape (40, 16), expected whole",
    ),
    "ids that are truth values": (
        ids(40, 16, dtype=bool),
        "ids.npy holds bool of shape (40, 16), expected whole numbers",
    ),
    "ids in other contexts": (
        ids(40, 17),
        "ids.npy holds contexts of 17 tokens, but `context` is 16. Set it to 17.",
    ),
    "ids in too few contexts": (
        ids(39, 16),
        "Corpus 'story': 'ids.npy' holds 39 contexts, but 40 are wanted. Lower `contexts`, or use a longer file.",
    ),
    "id beyond the vocabulary": (
        ids(40, 16, value=50),
        "Corpus 'story', model 'tiny': ids.npy holds ids from 50 to 50, but the model's vocabulary has 50 tokens. Make "
        "them with the model's own tokenizer.",
    ),
    "id beyond int32": (
        ids(40, 16, value=2**32),
        "ids from 4294967296 to 4294967296, but the model's vocabulary has 50",
    ),
    "negative id": (ids(40, 16, value=-1), "ids from -1 to -1, but the model's vocabulary has 50 tokens"),
    "contexts of one token": (
        first("corpora", context=1),
        "corpora[0].context: found 1, expected 2 or more. Tokens per",
    ),
    "contexts longer than the model's": (
        first("corpora", context=33),
        "Corpus 'story': contexts of 33 tokens, but model 'tiny' has positions for 32. Lower `context`.",
    ),
    "contexts longer than the second model's": (
        lambda c, folder: (
            second_model(c, folder),
            model(folder / "other", n_positions=8),
            [each.update(model="tiny") for each in c["saes"]],
        ),
        "contexts of 16 tokens, but model 'other' has positions for 8",
    ),
    "more shards than batches": (
        both(first("corpora", contexts=17), top(shards=4)),
        "Corpus 'story': 17 contexts make 3 batches of 8, too few for 4 shards. Lower `shards`",
    ),
    "a dataset of unknown length": (
        top(corpora=[{"id": "story", "dataset": "someone/texts"}]),
        "corpora[0]: 'contexts' must be given beside 'dataset'.",
    ),
    "a subset of a file": (first("corpora", subset="en"), "corpora[0]: 'dataset' must be given beside 'subset'."),
    # Names in experiments.
    "unknown intervention": (
        first("experiments", interventions=["eps_randon"]),
        "Experiment 'main': Unknown intervention 'eps_randon'. Did you mean 'eps_random'? Known: act_cov_random, … ide",
    ),
    "unknown SAE": (
        one(saes=["latte"]),
        "Experiment 'x': Unknown SAE 'latte'. Did you mean 'late'? Known: coder, early,",
    ),
    "a pattern that matches no SAE": (
        one(saes=["l*", "x*"]),
        "Experiment 'x': Unknown SAE 'x*'. Known: coder, early, late.",
    ),
    "unknown corpus": (
        one(corpora=["storey"]),
        "Experiment 'x': Unknown corpus 'storey'. Did you mean 'story'? Known: st",
    ),
    "one id for a list": (
        one(saes="early"),
        "experiments[0].saes: found 'early'. Expected: A list of ids and patterns such as",
    ),
    "an intervention twice": (
        one(interventions=["sae", "sae"]),
        "experiments[0].interventions: 'sae' is there twice. Name",
    ),
    "no intervention": (
        one(interventions=[]),
        "experiments[0].interventions: found an empty list, expected a list of 1 or more",
    ),
    "one intervention": (
        one(interventions="sae"),
        "interventions: found 'sae', expected a list. Write [sae]. Names of func",
    ),
    "the control alone": (
        one(interventions=["identity"]),
        "Experiment 'x': 'identity' is the control of other interventions",
    ),
    "a head outside the atlas": (
        one(interventions=["sae", "zero_head(0)"]),
        "Experiment 'x': 'zero_head' is for the atlas alone. Put `z` among the `components` of `atlas`.",
    ),
    # Keys and values of experiments.
    "misspelt positions": (
        one(positons=[4]),
        "experiments[0]: Unknown key 'positons'. Did you mean 'positions'? Known:",
    ),
    "misspelt alphas": (one(**DOSE, alpha=[1]), "Unknown key 'alpha'. Did you mean 'alphas'?"),
    "unknown scope": (
        one(scope="singel"),
        "experiments[0].scope: Unknown value 'singel'. Did you mean 'single'? Known: all,",
    ),
    "the scope of the atlas": (
        one(scope="atlas"),
        "experiments[0].scope: Unknown value 'atlas'. … Known: all, compound,",
    ),
    "unknown encode": (
        kind("together", encode="dirty"),
        "experiments[0].encode: Unknown value 'dirty'. Known: clean, patch",
    ),
    "one position": (
        kind("single", positions=4),
        "positions: found 4, expected a list. Write [4].",
    ),
    "no position": (
        kind("single", positions=[]),
        "experiments[0].positions: found an empty list, expected a list of 1 or more",
    ),
    "a position twice": (kind("single", positions=[4, 4]), "experiments[0].positions: 4 is there twice. Name it once."),
    "half a position": (kind("single", positions=[4.5]), "positions[0]: found 4.5, expected a whole number."),
    "a position before the first": (kind("single", positions=[-1]), "positions[0]: found -1, expected 0 or more."),
    "a horizon back": (kind("single", horizon=-1), "horizon: found -1, expected 0 or more. Positions after"),
    "no draws": (one(draws=0), "draws: found 0, expected 1 or more. Draws of every random intervention"),
    "draws in words": (one(draws="many"), "draws: found 'many', expected a whole number."),
    "no contexts": (kind("draws", contexts=0), "contexts: found 0, expected 1 or more."),
    "an alpha that YAML reads as text": (
        one(**DOSE | {"alphas": ["1e-4"]}),
        "alphas[0]: found '1e-4', expected a number.",
    ),
    "an alpha twice": (one(**DOSE | {"alphas": [1, 1.0]}), "alphas: 1.0 is there twice. Name it once."),
    "an alpha too large": (one(**DOSE | {"alphas": [11]}), "alphas[0]: found 11, expected 10 or less."),
    "an alpha that is no number": (
        one(**DOSE | {"alphas": [float("nan")]}),
        "'error_scaled' at a strength of nan; expected",
    ),
    "a cosine above 1": (kind("dose", cosines=[1.1]), "cosines[0]: found 1.1, expected 1 or less."),
    "one set": (kind("together", sets=["early", "late"]), "sets[0]: found 'early', expected a list. Write [early]."),
    "an SAE twice in a set": (
        kind("together", sets=[["early", "early"]]),
        "sets[0]: 'early' is there twice. Name it once.",
    ),
    "no curvature": (kind("main", curvature=0), "curvature: found 0, expected 1 or more. Contexts on which"),
    "no examples": (kind("main", examples=0), "examples: found 0, expected 1 or more. How many worst"),
    "a chosen token without a position": (
        kind("main", chosen=[[3]]),
        "chosen[0]: found [3], expected a list of 2 or more.",
    ),
    "chosen before the first": (kind("main", chosen=[[0, -1]]), "chosen[0][1]: found -1, expected 0 or more."),
    "patch_special in words": (one(patch_special="BOS"), "patch_special: found 'BOS', expected true or false. Whether"),
    # Strengths.
    "a misspelt intervention with a strength": (
        one(interventions=["sae", "error_scald"], alphas=[1]),
        "Experiment 'x': Unknown intervention 'error_scald'. Did you mean 'error_scaled'?",
    ),
    "a strength that is no number": (
        one(interventions=["error_scaled(half)"]),
        "Experiment 'x': Unknown intervention 'error_scaled(half)'. Did you mean 'error_scaled'?",
    ),
    "no alphas": (
        one(interventions=["error_scaled"]),
        "'error_scaled' is run at several strengths. Say which with `alphas: [",
    ),
    "no cosines": (
        one(interventions=["error_scaled", "theta_error_at"], alphas=[1]),
        "'theta_error_at' is run at several strengths. Say which with `cosines: [...]`",
    ),
    "a strength of one that takes none": (
        one(interventions=["sae(0.5)"]),
        "Experiment 'x': 'sae' takes no strength, but 'sae(0.5)' gives one. Write 'sae'.",
    ),
    "an alpha in the name that is too large": (
        one(interventions=["error_scaled(11)"]),
        "'error_scaled' at a strength of 11; expected one from -10 to 10",
    ),
    "a cosine in the name that is none": (
        one(interventions=["theta_random_at(1.5)"]),
        "'theta_random_at' at a strength of 1.5; expected one from -1 to 1",
    ),
    "a strength in the name and in the grid": (
        one(interventions=["error_scaled", "error_scaled(0.50)"], alphas=[0.1, 0.5]),
        "with its strengths, 'error_scaled(0.5)' is there 2 times … Name it once … 'error_scaled' and its grid",
    ),
    "a strength in the name in two ways": (
        one(interventions=["error_scaled(1)", "error_scaled(1.0)", "error_scaled(1e0)"]),
        "'error_scaled(1)' is there 3 times among the interventions",
    ),
    "alphas for nothing": (
        one(alphas=[1]),
        "Experiment 'x': `alphas` are strengths, but no intervention … Leave them out, or name one of error_scaled,",
    ),
    "cosines for what has them in its name": (
        one(interventions=["theta_error_at(0.5)"], cosines=[0.9]),
        "`cosines` are strengths, but no intervention is run at them … name one of theta_random_at, theta_error_at",
    ),
    # One position, and draws.
    "no positions": (
        kind("single", positions=None),
        "the scope 'single' needs `positions: [...]`, the positions to repl",
    ),
    "no positions of draws": (kind("draws", positions=None), "the scope 'draws' needs `positions: [...]`"),
    "a position after the last": (
        kind("draws", positions=[3, 16]),
        "position 16 and its horizon end at position 16, but contexts have 16 tokens. Lower `positions`",
    ),
    "a horizon beyond the context": (
        kind("single", positions=[2, 8], horizon=8),
        "Experiment 'x': position 8 and its horizon end at position 16, but contexts have 16 tokens. … or `horizon`",
    ),
    "the default horizon beyond the context": (
        kind("single", horizon=None),
        "position 4 and its horizon end at position 20, but contexts have 16 tokens",
    ),
    "the position of BOS": (
        kind("single", positions=[0, 4], patch_special=True),
        "Experiment 'x': position 0 holds BOS … Take 0 out of `positions`",
    ),
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
        one(interventions=["sae", "zero"], draws=3),
        "`draws` are 3, but no intervention is random. Leave `draws` out",
    ),
    # Examples, curvature and sets.
    "curvature without the SAE": (
        kind("main", interventions=["eps_random", "zero"], examples=None),
        "`curvature` compares 'sae' with 'eps_random'. Name both",
    ),
    "curvature of more than the first shard holds": (
        both(kind("main", curvature=24), top(shards=2)),
        "Experiment 'x': `curvature` asks for 24 contexts, but the first of 2 shards … 'story' holds 16 … Lower",
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
        "`sets`: Unknown SAE 'coder'. Known: early, late",
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
    # The atlas.
    "an atlas without a value": (
        parsed("atlas:"),
        "atlas: found nothing, expected keys with values. Write {} where every",
    ),
    "a component that is not known": (
        atlas(components=["attn"]),
        "atlas.components[0]: Unknown value 'attn'. Did you mean 'attn_out'? Known: attn_out, mlp_out,",
    ),
    "no component": (atlas(components=[]), "atlas.components: found an empty list, expected a list of 1 or more."),
    "a component twice": (atlas(components=["z", "z"]), "atlas.components: 'z' is there twice. Name it once."),
    "an intervention of an SAE": (
        atlas(interventions=["sae"]),
        "atlas.interventions[0]: Unknown value 'sae'. Known: mean, r",
    ),
    "an intervention of a head": (
        atlas(interventions=["zero_head"]),
        "atlas.interventions[0]: Unknown value 'zero_head'. Did you mean 'zero'? Known: mean,",
    ),
    "a layer after the last": (atlas(layers=[0, 3]), "`atlas`: layer 3, but model 'tiny' has layers 0 to 2."),
    "layers after the last": (atlas(layers=[7, 9, 1]), "`atlas`: layer 9, but model 'tiny' has layers 0 to 2."),
    "a layer before the first": (atlas(layers=[-1]), "atlas.layers: found [-1]. Expected: A list of layers, or `all`"),
    "no layer": (atlas(layers=[]), "atlas.layers: found an empty list. Expected: A list of layers, or `all`"),
    "one layer": (atlas(layers=1), "atlas.layers: found 1. Expected: A list of layers, or `all`"),
    "a layer twice": (atlas(layers=[1, 1]), "atlas.layers: found [1, 1]. Expected: A list of layers, or `all`"),
    "a model that is not known": (
        atlas(models=["tinny"]),
        "`atlas`: Unknown model 'tinny'. Did you mean 'tiny'? Known: ti",
    ),
    "a corpus that is not known": (
        atlas(corpora=["storey"]),
        "`atlas`: Unknown corpus 'storey'. Did you mean 'story'?",
    ),
    "one context": (atlas(contexts=1), "atlas.contexts: found 1, expected 2 or more. About how many"),
    "misspelt layers": (
        atlas(layer=[1]),
        "atlas: Unknown key 'layer'. Did you mean 'layers'? Known: components, contexts,",
    ),
    "a key of an experiment": (atlas(draws=3), "atlas: Unknown key 'draws'. … Known: components, contexts, corpora,"),
    "special tokens in words": (
        atlas(patch_special="BOS"),
        "atlas.patch_special: found 'BOS', expected true or false.",
    ),
    # Metrics.
    "a law that is not known": (
        metrics(calibrations=["kaplan", "kaplann"]),
        "`calibrations`: Unknown law 'kaplann'. Did you mean 'kaplan'? Known: cerebras-gpt, chinchilla, "
        "chinchilla-refit, kaplan. A CSV of your own is given by its path, such as my/runs.csv.",
    ),
    "a law in a folder": (metrics(calibrations=["laws/kaplan"]), "Unknown law 'laws/kaplan'. … Known: cerebras-gpt"),
    "a published law with its ending": (
        metrics(calibrations=["kaplan.csv"]),
        "`calibrations`: 'kaplan.csv' is a path, and there is no such file here (/ … ). The published law is 'kaplan', "
        "without the ending; a CSV of your own is given by its path, such as my/kaplan.csv.",
    ),
    "a file that is not there": (
        metrics(calibrations=["my/laws.csv"]),
        "`calibrations`: 'my/laws.csv' does not exist (looked from / … ). Correct the path.",
    ),
    "a folder as a calibration": (
        both(lambda c, folder: (folder / "laws.csv").mkdir(), metrics(calibrations=["laws.csv"])),
        "`calibrations`: 'laws.csv' does not exist",
    ),
    "one law": (
        metrics(calibrations="kaplan"),
        "metrics.calibrations: found 'kaplan', expected a list. Write [kaplan].",
    ),
    "a law twice": (
        metrics(calibrations=["kaplan", "kaplan"]),
        "metrics.calibrations: 'kaplan' is there twice. Name it",
    ),
    "two laws of one name": (
        both(content("a.csv", LAW), content("b.csv", LAW), metrics(calibrations=["a.csv", "b.csv"])),
        "`calibrations`: 2 are called 'n'. Rename one in its `# name:` line.",
    ),
    "a calibration that is empty": (
        law(""),
        "`calibrations`: 'mine.csv' is no calibration. mine: no kind, source, corpus. Begin the file with lines such "
        "as '# kind: ...'. The format is in calibrations/README.md.",
    ),
    "a calibration with an unknown key": (law(LAW + "# scope: all\n"), "mine: unknown key 'scope'. Known: name, kind,"),
    "a calibration with words for numbers": (
        law(LAW.replace("0.1", "tenth")),
        "'mine.csv' is no calibration. mine: line 9 has 'tenth', expected a positive number.",
    ),
    "a calibration of too few points": (
        law(POINTS + "1e17,4\n1e18,3\n"),
        "mine: 2 different amounts of compute, expected 5 or more",
    ),
    "a calibration that shows no law": (
        law(POINTS + "".join(f"1e{n},3\n" for n in range(15, 21))),
        "mine: no power law",
    ),
    "a calibration that is no text": (
        both(content("mine.csv", b"\xff\xfe\x00"), metrics(calibrations=["mine.csv"])),
        "`calibrations`: 'mine.csv' is no text: … Expected a CSV file in UTF-8.",
    ),
    "a column that is not known": (
        metrics(columns=["l0", "loss_recoverd[zero]"]),
        "Unknown column of the paper's table 'loss_recoverd[zero]'. Did you mean 'loss_recovered[zero]'? Known: bits_l",
    ),
    "a column of a calibration that is not there": (
        metrics(columns=["effective_compute[Kaplan 2020]"], calibrations=[]),
        "Unknown column of the paper's table 'effective_compute[Kaplan 2020]'. … Known: bits_lost",
    ),
    "a column twice": (metrics(columns=["kl", "kl"]), "metrics.columns: 'kl' is there twice. Name it once."),
    "no column": (metrics(columns=[]), "metrics.columns: found an empty list, expected a list of 1 or more."),
    "an SAE of a family that is not known": (
        families(("a", "early", "latte")),
        "Family 'a': Unknown SAE 'latte'. Did you mean 'late'? Known: coder, early, late.",
    ),
    "an SAE in two families": (
        families(("a", "early"), ("b", "early")),
        "Family 'b': 'early' is in family 'a' too. Leave it in one of them.",
    ),
    "an SAE twice in a family": (
        families(("a", "early", "early")),
        "families[0].saes: 'early' is there twice. Name it once.",
    ),
    "a family at two hooks": (
        families(("a", "late", "early")),
        "Family 'a': its SAEs write at tiny blocks.1.hook_resid_pre and tiny blocks.2.hook_resid_pre. A frontier is of "
        "one hook of one model; make several.",
    ),
    "a family twice": (
        families(("a", "early"), ("a", "late")),
        "Family 'a' is there twice. Every family needs an id of its own; rename one.",
    ),
    "a family of no SAE": (
        families(("a",)),
        "metrics.families[0].saes: found an empty list, expected a list of 1 or more",
    ),
    "a family without a name": (
        metrics(families=[{"saes": ["early"]}]),
        "metrics.families[0]: the key 'id' is missing",
    ),
    "a baseline that no experiment runs": (
        metrics(families=[{"id": "a", "saes": ["early"]}], baseline="resample"),
        "Family 'a': no experiment that replaces every token runs 'resample' and 'sae' for 'early'. Add them to one, "
        "or set `baseline: unigram`.",
    ),
    "a baseline that is not known": (
        metrics(baseline="zeros"),
        "metrics.baseline: Unknown value 'zeros'. Did you mean 'zero'? Known: bigram, … The baseline of the frontier's",
    ),
    "points that are not known": (metrics(points="best"), "metrics.points: Unknown value 'best'. Known: all, pareto."),
    "an L0 of nothing": (metrics(matched=[32, 0]), "metrics.matched[1]: found 0, expected more than 0."),
    "no smoothing": (metrics(bigram_smoothing=0), "metrics.bigram_smoothing: found 0, expected more than 0. How many"),
    "misspelt calibrations": (
        metrics(calibration=["kaplan"]),
        "metrics: Unknown key 'calibration'. Did you mean 'calibra",
    ),
    # Series.
    "an SAE of a series that is not known": (
        series(points=[POINT, {"at": 2, "sae": "latte"}]),
        "Series 's': Unknown SAE 'latte'. Did you mean 'late'? Known: coder, early, late",
    ),
    "one point": (
        series(points=[POINT]),
        "series[0].points: found [{'at': 1, 'sae': 'early'}], expected a list of 2",
    ),
    "no axis": (series(axis=None), "series[0].axis: found nothing, expected text. What the axis shows, with its unit."),
    "misspelt points": (series(pionts=[]), "series[0]: Unknown key 'pionts'. Did you mean 'points'?"),
    "misspelt key of a point": (
        series(points=[POINT, {"at": 2, "sea": "late"}]),
        "series[0].points[1]: … 'sea' … Did you mean 'sae'?",
    ),
    "a place in words": (
        series(points=[POINT, {"at": "1e-4", "sae": "late"}]),
        "series[0].points[1].at: found '1e-4', expected a number. It is text to YAML",
    ),
}
# An id becomes part of paths below results/.
BAD |= {
    f"the id {name!r} in {kind}": (
        first(kind, id=name),
        f"{kind}[0].id: {name!r} can't be a name … Use letters, digits",
    )
    for kind in ("models", "corpora", "saes", "experiments", "series")
    for name in ("", ".", "..", "a/b", "../a", "a..b", ".hidden", "a.", "-a", "a b", "a\n")
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A correct study of every kind of experiment, with relative paths."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "good.yaml").write_text(yaml.safe_dump(everything(folder)).replace(f"{folder}/", ""))
    return folder


def spoiled(good: Path, folder: Path, change, monkeypatch) -> Path:
    """A copy of the good study with one thing wrong, as its configuration file; its folder is the working one."""
    shutil.copytree(good, folder, dirs_exist_ok=True)
    monkeypatch.chdir(folder)
    given = yaml.safe_load((folder / "good.yaml").read_text())
    file = folder / "bad.yaml"
    change(given, folder)
    if not file.exists():
        file.write_text(yaml.safe_dump(given, sort_keys=False))
    return file


def test_the_study_that_is_spoiled_is_correct(good, monkeypatch):
    monkeypatch.chdir(good)
    assert len(planned(Path("good.yaml")).jobs) > 50


@pytest.mark.parametrize(("change", "parts"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_refused_with_what_was_found_expected_and_what_to_do(
    good, tmp_path, monkeypatch, change, parts
):
    file = spoiled(good, tmp_path, change, monkeypatch)
    with pytest.raises(ValueError, match=in_order(parts)):
        planned(file)


# One of each stage of planning: the schema, a model, an SAE's weights, a corpus.
HEAVY = {"torch", "transformer_lens", "sae_lens"}
SOME = ("unknown intervention", "model that is cut short", "SAE with NaN", "id beyond the vocabulary")


def test_no_model_and_nothing_that_loads_one_is_imported_before_the_refusal(good, tmp_path, monkeypatch):
    files = [str(spoiled(good, tmp_path / name.replace(" ", "-"), BAD[name][0], monkeypatch)) for name in SOME]
    code = (
        "import os, sys, yaml\nfrom pathlib import Path\nfrom pipeline import config\nfrom pipeline.plan import Plan\n"
        "for name in sys.argv[1:]:\n    os.chdir(Path(name).parent)\n    try:\n"
        "        config.check_plain(Path(name))\n        Plan(config.load(yaml.safe_load(Path(name).read_text())))\n"
        f"    except ValueError:\n        print(sorted({HEAVY} & sys.modules.keys()))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code, *files], env=environment, capture_output=True, text=True)
    assert ran.stdout.splitlines() == ["[]"] * len(SOME), ran.stderr


def snakemake(file: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), *arguments]
    command += ["--directory", str(file.parent), "--configfile", str(file)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    "name", ["a key twice", "unknown intervention", "SAE that lacks tensors", "what is no Parquet"]
)
def test_a_dry_run_says_it_without_a_traceback(good, tmp_path, monkeypatch, name):
    change, parts = BAD[name]
    file = spoiled(good, tmp_path, change, monkeypatch)
    ran = snakemake(file, "--dry-run")
    said = ran.stdout + ran.stderr  # Snakemake says it on stdout when the run is dry
    assert ran.returncode == 1
    assert "Traceback" not in said
    assert re.search(in_order(parts), said), said


def test_a_run_says_it_on_stderr_and_starts_nothing(good, tmp_path, monkeypatch):
    file = spoiled(good, tmp_path, BAD["unknown intervention"][0], monkeypatch)
    ran = snakemake(file, "--cores", "1")
    assert ran.returncode == 1
    assert re.search(in_order(BAD["unknown intervention"][1]), ran.stderr), ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", ["no YAML", "a template", "a tag that is code"])
def test_make_looks_at_a_configuration_before_snakemake_reads_it(good, tmp_path, monkeypatch, name):
    file = spoiled(good, tmp_path, BAD[name][0], monkeypatch)
    ran = subprocess.run(
        [sys.executable, "-m", "pipeline.config", "config.yaml", str(file)], cwd=ROOT, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert re.search(in_order(BAD[name][1]), ran.stderr), ran.stderr
    assert "Traceback" not in ran.stderr
    recipe = (ROOT / "Makefile").read_text().partition("\nrun:")[2].partition("\n\n")[0].splitlines()
    assert [line.split("-m ")[1].split()[0] for line in recipe[1:]] == ["pipeline.config", "snakemake"]
