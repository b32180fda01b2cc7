"""Another workflow includes this one as a Snakemake module."""

import subprocess
import sys

import yaml
from fakes import ROOT

OUTER = """
configfile: "mine.yaml"


module faithful:
    snakefile:
        "{root}/Snakefile"
    config:
        config["faithful"]


use rule * from faithful as faithful_*


rule mine:
    default_target: True
    input:
        "results/{wanted}",
    output:
        "mine.txt",
    shell:
        "wc -c {{input}} > {{output}}"
"""


def run(folder, wanted, *arguments):
    (folder / "Snakefile").write_text(OUTER.format(root=ROOT, wanted=wanted))
    study = yaml.safe_load((ROOT / "tests/configs/tiny.yaml").read_text())
    (folder / "mine.yaml").write_text(yaml.safe_dump({"faithful": study}))
    if not (folder / "demo").exists():
        (folder / "demo").symlink_to(ROOT / "demo")
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_module_plans_what_its_including_workflow_asks_for(tmp_path):
    planned = run(tmp_path, "summary/effects.parquet", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    for rule in ("mine", "faithful_summary", "faithful_effects", "faithful_ablations", "faithful_weights"):
        assert f"rule {rule}:" in planned.stdout + planned.stderr
    assert "faithful_report" not in planned.stdout + planned.stderr


def test_the_jobs_of_a_module_find_their_package(tmp_path):
    made = run(tmp_path, "tokens/demo/heldout.h5")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "mine.txt").read_text().split()[1] == "results/tokens/demo/heldout.h5"
    again = run(tmp_path, "tokens/demo/heldout.h5", "--dry-run")
    assert "Nothing to be done" in again.stdout + again.stderr
