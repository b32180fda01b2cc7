"""A study of names, from a cache of the hub made by hand, is the same study as of local folders."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import DEMO, ROOT
from hubs import gpt2, published, repository
from polars.testing import assert_frame_equal
from test_workflow import copy_project
from tokenizers import Tokenizer

from pipeline import corpora

RELU = DEMO / "saes" / "resid3-l1-2"
NAMES = {
    "models": [{"id": "m", "name": "gpt2-small"}],
    "corpora": [{"id": "text", "dataset": "someone/texts", "context": 24}],
    "saes": [{"release": "gpt2-small-res-jb", "sae_ids": "blocks.*.hook_resid_pre", "layers": [1, 3], "id": "res"}],
}
FOLDERS = {
    "models": [{"id": "m", "path": str(DEMO / "model"), "processing": {"center_writing_weights": True}}],
    "corpora": [{"id": "text", "path": "text.parquet", "context": 24}],
    "saes": [
        {"id": f"res-blocks.{n}.hook_resid_pre", "path": str(RELU), "hook": f"blocks.{n}.hook_resid_pre"}
        for n in (1, 3)
    ],
}
EXPERIMENTS = [{"id": "main", "interventions": ["sae", "eps_random", "zero"], "examples": 1, "saes": ["res-*"]}]
REST = {"experiments": EXPERIMENTS, "bootstrap": {"samples": 100}, "metrics": {"calibrations": ["kaplan"]}}


def cache(home: Path, table: Path) -> None:
    gpt2(home)
    files = {}
    for layer in (1, 3):
        name = f"blocks.{layer}.hook_resid_pre"
        files[f"{name}/cfg.json"] = published(RELU, hook_point=name)
        files[f"{name}/sae_weights.safetensors"] = RELU / "sae_weights.safetensors"
    repository(home, "jbloom/GPT2-Small-SAEs-Reformatted", files)
    repository(home, "someone/texts", {"data/train-0.parquet": table}, kind="datasets")


def run(project: Path, home: Path, config: dict, *arguments: str) -> str:
    (project / "study.yaml").write_text(yaml.safe_dump(config | REST))
    command = [sys.executable, "-m", "snakemake", "--configfile", "study.yaml", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, cwd=project, env=environment, text=True, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def some_texts() -> tuple[list[str], int]:
    """The first texts that give 16 contexts, and how many they give: a file's are spread, a dataset's are the first."""
    tokenizer, texts = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json")), []
    for row in pl.read_ndjson(DEMO / "text" / "heldout.jsonl").iter_rows(named=True):
        texts.append(row["text"])
        ids = (tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
        if (contexts := len(corpora.pack(ids, 24, 0, True))) >= 16:
            break
    return texts, contexts


@pytest.fixture(scope="module")
def projects(tmp_path_factory) -> dict[str, Path]:
    """The same study run twice: by names and by folders."""
    home, made = tmp_path_factory.mktemp("home"), {}
    texts, contexts = some_texts()
    NAMES["corpora"][0]["contexts"] = contexts
    for kind, config in {"names": NAMES, "folders": FOLDERS}.items():
        made[kind] = copy_project(tmp_path_factory.mktemp(kind) / "project")
        shutil.copytree(ROOT / "calibrations", made[kind] / "calibrations", dirs_exist_ok=True)
        pq.write_table(pa.table({"text": texts}), made[kind] / "text.parquet")
        if kind == "names":
            cache(home, made[kind] / "text.parquet")
        run(made[kind], home, config, "--cores", "2")
    return made | {"home": home}


@pytest.mark.parametrize("table", ["effects/main", "ablations/main", "top_tokens/main"])
def test_a_study_by_names_has_the_numbers_of_the_study_by_folders(projects, table):
    files = sorted(
        path.relative_to(projects["names"]) for path in projects["names"].glob(f"results/{table}/**/*.parquet")
    )
    assert len(files) >= 1
    for file in files:
        assert_frame_equal(pl.read_parquet(projects["names"] / file), pl.read_parquet(projects["folders"] / file))


def test_a_second_run_finds_nothing_to_do_even_without_the_cache(projects, tmp_path):
    assert "Nothing to be done" in run(projects["names"], tmp_path, NAMES, "--cores", "1")


def test_what_was_used_is_in_the_report(projects):
    page = (projects["names"] / "results" / "report.html").read_text()
    for said in ("gpt2-small", "jbloom/GPT2-Small-SAEs-Reformatted", "someone/texts", "center_writing_weights"):
        assert said in page
    assert page.count("0123456789abcdef0123456789abcdef01234567") >= 3
