"""Names of the hub: from a cache made by hand, through the unmodified loaders of TransformerLens and transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DEMO, PLAIN
from hubs import COMMIT, LATER, gpt2, offline, repository

from pipeline import config, hub, models

PROCESSED = dict.fromkeys(PLAIN, True)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache, and a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return offline(tmp_path / "home", monkeypatch)


def entry(**changes):
    return {"id": "tiny", "name": "gpt2-small", "processing": {}, "allow_pickle": False} | changes


def named(**changes):
    from pipeline import inputs

    return inputs.model(entry(**changes))


def test_a_name_of_transformer_lens_is_resolved_to_repository_commit_and_sizes(home):
    gpt2(home)
    found = named()
    assert dict(found.source) == {"name": "gpt2-small", "repo": "gpt2", "commit": COMMIT, "allow_pickle": False}
    assert (found.geometry.n_layers, found.geometry.d_model) == (6, 128)


def test_what_was_resolved_is_remembered_and_needs_the_cache_no_more(home):
    gpt2(home)
    first = named()
    shutil.rmtree(home)
    assert named() == first
    (record,) = Path("results/sources").iterdir()
    record.unlink()
    with pytest.raises(ValueError, match=r"'gpt2' is not in the cache .* and the hub can't be reached"):
        named()


@pytest.mark.parametrize("processing", [PLAIN, PROCESSED], ids=["plain", "processed"])
def test_a_model_by_its_name_has_the_bits_of_the_same_model_in_a_folder(home, processing):
    gpt2(home)
    by_name = models.load_source(named().source, processing)
    folder = models.load_folder(DEMO / "model", processing)
    assert by_name.state.keys() == folder.state.keys()
    assert all(torch.equal(by_name.state[name], tensor) for name, tensor in folder.state.items())
    differ = {name for name, value in folder.settings.items() if by_name.settings[name] != value}
    assert differ <= {"model_name", "tokenizer_name", "tokenizer_prepends_bos"}


def test_a_repository_that_transformer_lens_does_not_know_is_loaded_as_a_folder(home):
    repository(home, "someone/finetuned", {path.name: path for path in (DEMO / "model").iterdir()})
    found = named(name="someone/finetuned")
    weights, folder = models.load_source(found.source, PLAIN), models.load_folder(DEMO / "model", PLAIN)
    assert all(torch.equal(weights.state[name], tensor) for name, tensor in folder.state.items())


def test_the_planned_commit_is_loaded_although_the_branch_has_moved_on(home):
    gpt2(home)
    found = named()
    repository(home, "gpt2", {"config.json": "{}"}, commit=LATER)
    assert named().source["commit"] == COMMIT
    assert models.load_source(found.source, PLAIN).layers == 6


def test_a_revision_is_a_branch_a_tag_or_a_commit(home):
    gpt2(home)
    repository(home, "gpt2", {"config.json": DEMO / "model" / "config.json"}, commit=LATER, ref="step-1")
    commits = [named(revision=name).source["commit"] for name in ("main", "step-1", LATER, COMMIT)]
    assert commits == [COMMIT, LATER, LATER, COMMIT]
    with pytest.raises(ValueError, match=r"'gpt2' at 'step-2' is not in the cache"):
        named(revision="step-2")


def test_a_name_that_nothing_has_is_answered_with_the_nearest(home):
    with pytest.raises(ValueError, match=r"Unknown model 'gpt2-smol'\. Near it: gpt2-small"):
        named(name="gpt2-smol")


def test_a_repository_that_is_not_in_the_cache_says_so(home):
    with pytest.raises(ValueError, match=r"Model 'tiny': 'someone/gone' is not in the cache .* or set HF_HOME"):
        named(name="someone/gone")


def test_a_repository_without_configuration_says_so(home):
    repository(home, "gpt2", {"README.md": "none"})
    with pytest.raises(ValueError, match=r"Model 'tiny': 'gpt2' at 0123\w+ has no config\.json"):
        named()


def test_the_names_are_those_that_transformer_lens_knows():
    from transformer_lens import loading_from_pretrained

    assert hub.model_names() == loading_from_pretrained.make_model_alias_map()


# Security: what is loaded is data.


def test_the_models_whose_code_transformer_lens_would_run_are_known():
    from transformer_lens import loading_from_pretrained

    assert hub.TRUSTED_MODELS == loading_from_pretrained.NEED_REMOTE_CODE_MODELS


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "microsoft/phi-2"])
def test_a_model_with_code_that_transformer_lens_would_run_is_refused(home, name):
    settings = json.loads((DEMO / "model" / "config.json").read_text())
    code = f"open({str(home / 'ran')!r}, 'w')"
    files = {path.name: path for path in (DEMO / "model").iterdir()} | {"code.py": code}
    settings |= {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    repository(home, name, files | {"config.json": json.dumps(settings)})
    with pytest.raises(ValueError, match="comes with code of its own, and TransformerLens would run it"):
        named(name=name)
    source = {"name": name, "repo": name, "commit": COMMIT, "allow_pickle": True}
    with pytest.raises(ValueError, match="comes with code of its own"):
        models.load_source(source, PLAIN)
    assert not (home / "ran").exists()


@pytest.mark.parametrize("name", ["gpt2-small", "someone/else"])
def test_code_of_a_repository_is_never_run(home, name):
    settings = json.loads((DEMO / "model" / "config.json").read_text())
    code = f"open({str(home / 'ran')!r}, 'w')"
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", None]}
    files = {path.name: path for path in (DEMO / "model").iterdir()} | {"code.py": code}
    files |= {"config.json": json.dumps(settings | {"auto_map": auto_map})}
    repository(home, {"gpt2-small": "gpt2"}.get(name, name), files)
    assert models.load_source(named(name=name).source, PLAIN).layers == 6
    assert not (home / "ran").exists()


@pytest.mark.parametrize("name", ["gelu-2l", "attn-only-1l"])
def test_models_that_transformer_lens_unpickles_without_limits_are_refused(home, name):
    with pytest.raises(ValueError, match="by unpickling anything"):
        named(name=name)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def pickled(folder: Path, extra: dict) -> Path:
    from safetensors.torch import load_file

    path = folder / "pytorch_model.bin"
    torch.save(load_file(DEMO / "model" / "model.safetensors") | extra, path)
    return path


@pytest.mark.parametrize("name", ["gpt2-small", "someone/else"])
def test_pickled_weights_are_read_only_with_consent_and_never_run(home, tmp_path, name):
    files = {path.name: path for path in (DEMO / "model").iterdir() if path.suffix != ".safetensors"}
    repo = {"gpt2-small": "gpt2"}.get(name, name)
    repository(home, repo, files | {"pytorch_model.bin": pickled(tmp_path, {})})
    with pytest.raises(ValueError, match="allow_pickle: true"):
        models.load_source(named(name=name).source, PLAIN)
    trusted = named(name=name, allow_pickle=True).source
    weights, folder = models.load_source(trusted, PLAIN), models.load_folder(DEMO / "model", PLAIN)
    assert all(torch.equal(weights.state[key], tensor) for key, tensor in folder.state.items())
    repository(home, repo, {"pytorch_model.bin": pickled(tmp_path, {"evil": Evil(tmp_path / "ran")})})
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        models.load_source(trusted, PLAIN)
    assert not (tmp_path / "ran").exists()


def test_an_environment_that_forces_unpickling_is_refused(home, monkeypatch):
    gpt2(home)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ValueError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set"):
        models.load_source(named().source, PLAIN)


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../gpt2", "a/../b", "a//b", "a/./b", "a\\..\\b", "a/b\n"], ids=repr
)
def test_a_name_that_leads_elsewhere_is_refused(name):
    with pytest.raises(ValueError, match=r"leads out of its place"):
        hub.check_path("Here", name)


@pytest.mark.parametrize("name", ["a b/c", "a/b/c", "../x", "/x", "x/..", ".x/y", "x/\n"], ids=repr)
@pytest.mark.parametrize("key", ["name", "revision"])
def test_a_name_in_the_configuration_that_is_none_of_the_hub_is_refused(tmp_path, key, name):
    from fakes import study

    if (key, name) == ("revision", "a/b/c"):
        pytest.skip("a branch may have such a name")
    given = study(tmp_path)
    given["models"] = [{"id": "tiny", "name": "gpt2"} | {key: name}]
    with pytest.raises(ValueError, match=rf"models\[0\]\.{key}: .* is no name of"):
        config.load(given)


# Snakemake itself refuses the first two, and would take the third for a function.
TAGS = ["!!python/object/apply:os.system ['touch ran']", "!!python/object:pathlib.Path {}", "!!python/name:os.system"]


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_that_asks_for_python_is_refused_by_the_workflow(tmp_path, tag):
    import os
    import subprocess
    import sys

    from conftest import ROOT

    (tmp_path / "evil.yaml").write_text(f"seed: {tag}\n")
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(tmp_path)]
    command += ["--configfile", "evil.yaml", "--dry-run", "--workflow-profile", "none"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)
    assert ran.returncode != 0
    said = ran.stdout + ran.stderr
    assert "not valid JSON or YAML" in said or "could not determine a constructor for the tag" in said, said
    assert not (tmp_path / "ran").exists()
