"""The ready configurations of config/: what can be known of them without the network. The cache holds the metadata that
planning reads, with the sizes of the real models, and no weights."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from hubs import COMMIT, offline, repository

from pipeline import config, releases, saes

GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
PYTHIA = {
    "model_type": "gpt_neox",
    "num_hidden_layers": 6,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
    "vocab_size": 50304,
    "use_parallel_residual": True,
}
GEMMA = {
    "model_type": "gemma2",
    "num_hidden_layers": 26,
    "hidden_size": 2304,
    "num_attention_heads": 8,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "vocab_size": 256000,
}


def of_sae_lens(home: Path, release: str, d_in: int, d_sae: int) -> None:
    """The configurations of a release in sae_lens's format of before version 6, each of the hook of its id."""
    listed = releases._directory()[release]
    cfg = {"d_in": d_in, "d_sae": d_sae, "dtype": "torch.float32", "context_size": 128}
    files = {f"{place}/cfg.json": json.dumps(cfg | {"hook_point": name}) for name, place in listed["saes"].items()}
    repository(home, listed["repo"], files)


def gpt2_small(home: Path) -> None:
    repository(home, "gpt2", {"config.json": json.dumps(GPT2)})
    repository(home, "Skylion007/openwebtext", {"README.md": ""}, kind="datasets", ref="refs/convert/parquet")
    of_sae_lens(home, "gpt2-small-res-jb", 768, 24576)
    kissane = releases._directory()["gpt2-small-hook-z-kk"]
    cfg = {"act_size": 768, "dict_size": 24576}
    files = {
        place.split(".pt")[0] + "_cfg.json": json.dumps(cfg | {"act_name": name.replace(".hook_z", ".attn.hook_z")})
        for name, place in kissane["saes"].items()
    }
    repository(home, kissane["repo"], files)


def pythia_70m(home: Path) -> None:
    repository(home, "EleutherAI/pythia-70m-deduped", {"config.json": json.dumps(PYTHIA)})
    repository(home, "NeelNanda/pile-10k", {"README.md": ""}, kind="datasets")
    for kind in ("res", "mlp", "att"):
        of_sae_lens(home, f"pythia-70m-deduped-{kind}-sm", 512, 32768)


def gemma_scope(home: Path) -> None:
    """Gemma Scope has no configurations: sae_lens takes them from the names."""
    repository(home, "google/gemma-2-2b", {"config.json": json.dumps(GEMMA)})
    repository(home, "NeelNanda/pile-10k", {"README.md": ""}, kind="datasets")
    for kind in ("res", "att", "mlp", "transcoders"):
        repository(home, f"google/gemma-scope-2b-pt-{kind}", {"README.md": ""})


CACHES = {"gpt2-small": gpt2_small, "pythia-70m": pythia_70m, "gemma-scope": gemma_scope}
# The SAEs, the tokens, and what they were trained with; then the jobs that a dry run would start.
SIZES = {"gpt2-small": (24, 16000, 128), "pythia-70m": (18, 1600, 128), "gemma-scope": (15, 256, 1024)}
JOBS = {
    "gpt2-small": {
        "tokens": 1,
        "weights": 1,
        "activations": 144,
        "clean": 16,
        "ablations": 208,
        "compounds": 16,
        "moments": 72,
        "reconstructions": 48,
        "scores": 48,
        "effects": 176,
        "errors": 2,
        "checks": 7,
        "curvatures": 2,
        "extremes": 2,
        "top_tokens": 2,
    },
    "pythia-70m": {
        "tokens": 1,
        "weights": 1,
        "activations": 8,
        "clean": 2,
        "compounds": 2,
        "moments": 30,
        "reconstructions": 6,
        "scores": 6,
        "ablations": 14,
        "effects": 12,
        "errors": 1,
        "checks": 5,
        "curvatures": 1,
        "extremes": 1,
        "top_tokens": 1,
    },
    "gemma-scope": {
        "tokens": 1,
        "weights": 1,
        "activations": 8,
        "clean": 4,
        "compounds": 4,
        "moments": 9,
        "reconstructions": 8,
        "scores": 8,
        "ablations": 8,
        "effects": 20,
        "errors": 1,
        "checks": 4,
        "extremes": 1,
        "top_tokens": 1,
    },
}
AFTERWARDS = ("summary", "analyses", "paper", "figures", "report", "all")


def test_every_ready_configuration_is_tested():
    assert {path.stem for path in (ROOT / "config").glob("*.yaml")} == set(CACHES)


@pytest.mark.parametrize("name", CACHES)
def test_a_ready_configuration_is_correct(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(releases, "_ask", lambda asked: {each: saes.described(each, asked[each]) for each in asked})
    CACHES[name](offline(tmp_path / "home", monkeypatch))
    study = config.load(yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text()))
    (corpus,), (model,) = study.corpora.values(), study.models.values()
    assert (len(study.saes), corpus.contexts, corpus.context) == SIZES[name]
    assert corpus.prepend_bos
    assert model.source["commit"] == corpus.source["commit"] == COMMIT
    assert model.processing["center_writing_weights"] == (name == "gpt2-small")


@pytest.mark.parametrize("name", CACHES)
def test_a_dry_run_of_a_ready_configuration_starts_these_jobs(name, tmp_path):
    for part in ("pipeline", "workflow", "profiles", "calibrations", "config"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("Snakefile", "config.yaml"):
        shutil.copy(ROOT / part, tmp_path / part)
    CACHES[name](tmp_path / "home")
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--configfile",
        f"config/{name}.yaml",
        "--dry-run",
        "--quiet",
        "rules",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)
    said = ran.stdout + ran.stderr
    assert ran.returncode == 0, said
    table = said.rpartition("Job stats:")[2].partition("total")[0]
    found = {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}
    assert {rule: count for rule, count in found.items() if rule not in AFTERWARDS} == JOBS[name]
    assert sum(found.values()) < 2000  # more take Snakemake itself too long
