"""The workflow on a cluster: the profiles agree with the rules, and a real one-node Slurm gives the same numbers."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import polars as pl
import pytest
import yaml
from conftest import ROOT
from snakemake.profiles import ProfileConfigFileParser
from snakemake.resources import Resource
from test_workflow import TINY, changed, copy_project, items, ran, rows_of, wanted

START = ROOT / "tests/slurm/start.sh"
NOT_THERE = 69  # the exit status of start.sh where there can be no Slurm
PROFILES = ["default", "gpu", "slurm", "kubernetes"]


def profile_file(name: str) -> Path:
    (path,) = [path for path in (ROOT / "profiles" / name).glob("*.yaml") if path.stem in ("profile", "config")]
    return path


def profile(name: str) -> dict:
    return yaml.safe_load(profile_file(name).read_text())


def rules_where(text: str) -> set[str]:
    return {path.stem for path in (ROOT / "workflow/rules").glob("*.smk") if text in path.read_text()}


def resource(rule: str, name: str, attempt: int) -> int:
    """What a job of a rule asks for at an attempt, evaluated by Snakemake."""
    found = profile("slurm")["default-resources"] | profile("slurm")["set-resources"].get(rule, {})
    asked = Resource.from_cli_expression(name, str(found[name]), with_threads_arg=False)
    return asked.evaluate(wildcards=None, input=[], attempt=attempt, rulename=rule, async_run=None).value


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_names_only_rules_that_there_are_and_is_read_by_snakemake(name):
    found, rules = profile(name), rules_where("rule ") - {"common"}
    for key in ("set-resources", "set-threads", "groups"):
        assert set(found.get(key, {})) <= rules
    with profile_file(name).open() as stream:
        assert set(ProfileConfigFileParser().parse(stream)) == set(found)


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_schedules_as_the_default_one(name):
    keys = ("rerun-incomplete", "keep-going", "show-failed-logs", "scheduler", "scheduler-subsample", "rerun-triggers")
    assert {key: profile(name)[key] for key in keys} == {key: profile("default")[key] for key in keys}


@pytest.mark.parametrize("name", ["gpu", "slurm", "kubernetes"])
def test_the_rules_that_run_a_model_ask_for_a_gpu_and_no_others(name):
    asked = profile(name)["set-resources"]
    assert {rule for rule, resources in asked.items() if resources.get("gpu") == 1} == rules_where("{resources.device}")
    assert all((resources.get("device") == "cuda") == (resources.get("gpu") == 1) for resources in asked.values())


@pytest.mark.parametrize("rule", sorted(rules_where("rule ") - {"common"}))
def test_memory_and_time_grow_with_every_attempt(rule):
    for name in ("mem_mb", "runtime"):
        asked = [resource(rule, name, attempt) for attempt in (1, 2, 3)]
        assert asked == [asked[0], 2 * asked[0], 3 * asked[0]]
    if rule in rules_where("{resources.device}"):
        assert [resource(rule, "logits_mib", attempt) for attempt in (1, 2, 3)] == [4096, 2048, 1365]


@dataclass(frozen=True)
class Run:
    """What a run on Slurm has left: the project, what Snakemake said, and Slurm's own list of the jobs."""

    project: Path
    output: str
    jobs: list[dict[str, str]]

    def of(self, rule: str) -> list[dict[str, str]]:
        return [job for job in self.jobs if job["Comment"].startswith(f"rule_{rule}_")]


@pytest.fixture(scope="module")
def slurm() -> None:
    """Skips where a Slurm is not wanted or cannot be had."""
    if os.environ.get("FAITHFUL_SLURM") != "1":
        pytest.skip("needs root and a few minutes: FAITHFUL_SLURM=1 starts a Slurm here and runs the workflow on it")
    if find_spec("snakemake_executor_plugin_slurm") is None:
        pytest.skip("needs snakemake-executor-plugin-slurm: pip install -r requirements.lock")
    tried = subprocess.run([START, "true"], text=True, capture_output=True, check=False)
    if tried.returncode == NOT_THERE:
        pytest.skip(tried.stderr.strip().splitlines()[-1])
    assert tried.returncode == 0, tried.stderr


@pytest.fixture(scope="module")
def one_machine(slurm, tmp_path_factory) -> Path:
    """The run to compare with: no shards, no Slurm, profiles/default."""
    project = copy_project(tmp_path_factory.mktemp("one"))
    ran(project)
    return project


def failing_once(project: Path, stage: str, shard: str):
    """While entered, the stage's first job for that shard fails. stage.py is part of no fingerprint."""
    place = "    items, began = json.load(sys.stdin), time.monotonic()\n"
    failure = f"""    if stage == "{stage}" and items[0]["key"]["shard"] == "{shard}" and not Path("failed").exists():
        Path("failed").touch()
        raise SystemExit("failed on purpose")
"""
    return changed(project / "pipeline/stage.py", lambda text: text.replace(place, place + failure))


def on_the_cpu(project: Path, name: str) -> list[str]:
    """The command that runs the workflow by a profile, edited for machines without a GPU."""
    edited = project / f"profiles/{name}/config.yaml"
    edited.write_text(edited.read_text().replace("device: cuda", "device: cpu"))
    command = [sys.executable, "-m", "snakemake", "--workflow-profile", f"profiles/{name}", "--configfile", TINY]
    # One thread, as on one machine: with more, the last digits may differ.
    return [*command, "--set-threads", *(f"{rule}=1" for rule in sorted(rules_where("{resources.device}")))]


@pytest.fixture(scope="module")
def on_slurm(slurm, tmp_path_factory) -> Run:
    """A run of the same in three shards, of which one job fails at its first attempt. No GPU is used, but Slurm thinks
    that it has two and gives them out."""
    project = copy_project(tmp_path_factory.mktemp("slurm"))
    command = [*on_the_cpu(project, "slurm"), "--config", "shards=3"]
    command += ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "2"]
    # What Slurm knows of the jobs is asked for before it stops.
    script = '"$@" > output.txt 2>&1; status=$?; scontrol --oneliner show job > jobs.txt; exit $status'
    with failing_once(project, "ablations", "1-of-3"):
        run = subprocess.run([START, "bash", "-c", script, "-", *command], cwd=project, capture_output=True, text=True)
    output = (project / "output.txt").read_text()
    assert run.returncode == 0, run.stderr + output
    lines = (project / "jobs.txt").read_text().splitlines()
    return Run(project, output, [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines])


def test_slurm_gives_the_numbers_of_one_machine(on_slurm, one_machine):
    for stage in ("effects", "ablations"):
        whole, sharded = rows_of(one_machine, stage), rows_of(on_slurm.project, stage)
        assert set(whole) == set(sharded)
        for name, table in sharded.items():
            assert len(list((on_slurm.project / name).glob("*.parquet"))) == 3
            assert table.equals(whole[name]), name
    for kind in ("summary", "paper", "figures"):
        names = {path.relative_to(one_machine) for path in one_machine.glob(f"results/{kind}/*.parquet")}
        assert names
        for name in names:
            assert pl.read_parquet(one_machine / name).equals(pl.read_parquet(on_slurm.project / name)), name
    headline = "results/headline.txt"
    assert (one_machine / headline).read_text() == (on_slurm.project / headline).read_text()


def test_what_slurm_has_made_is_current_on_one_machine(on_slurm):
    before = items(on_slurm.project)
    assert wanted(on_slurm.project, "--config", "shards=3") == {}
    assert items(on_slurm.project) == before


def test_every_stage_ran_as_jobs_of_slurm_and_every_shard_as_its_own(on_slurm):
    assert {job["JobState"] for job in on_slurm.jobs} == {"COMPLETED", "FAILED"}
    for rule in ("clean", "activations", "reconstructions", "effects", "ablations"):
        done = [job for job in on_slurm.of(rule) if job["JobState"] == "COMPLETED"]
        assert sorted(re.search(r"\d-of-3", job["Comment"])[0] for job in done) == ["0-of-3", "1-of-3", "2-of-3"]
        assert {job["TresPerJob"] for job in on_slurm.of(rule)} == {"gres:gpu:1"}
    assert len(on_slurm.of("checks")) == 1


def test_small_rules_share_a_job_that_asks_for_the_most_memory_and_all_the_time(on_slurm):
    shared = {
        "prepare": ("tokens_weights", "24000M", "02:00:00"),
        "moments": ("moments", "12000M", "01:00:00"),  # two hooks
        "scores": ("scores", "4000M", "00:15:00"),  # three shards
        "tables": ("analyses_summary", "16000M", "01:30:00"),
        "page": ("figures_paper_report", "8000M", "01:30:00"),
    }
    for group, (rules, memory, time) in shared.items():
        (job,) = on_slurm.of(group)
        assert (job["Comment"], job["NumCPUs"]) == (f"rule_{group}_{rules}", "1")
        assert (job["MinMemoryNode"], job["TimeLimit"]) == (memory, time)
    assert len(on_slurm.jobs) == len(shared) + 5 * 3 + 1 + 1  # those, five stages of three shards, checks, a second try


def test_a_failed_job_is_tried_again_with_more_memory_and_time(on_slurm):
    tries = [job for job in on_slurm.of("ablations") if "1-of-3" in job["Comment"]]
    tries.sort(key=lambda job: int(job["JobId"]))
    assert [job["JobState"] for job in tries] == ["FAILED", "COMPLETED"]
    assert [job["MinMemoryNode"] for job in tries] == ["24000M", "48000M"]
    assert [job["TimeLimit"] for job in tries] == ["08:00:00", "16:00:00"]
    assert "Trying to restart job" in on_slurm.output


KUBECTL = """#!{python}
# Stands in for kubectl: a job that is made has run at once, here, and is kept with how it ended.
import os, subprocess, sys, yaml
from pathlib import Path

jobs = Path(os.environ["STAND_IN"])
if sys.argv[1] == "create":
    manifest = yaml.safe_load(sys.stdin)
    name = manifest["metadata"]["generateName"] + str(len(list(jobs.iterdir())))
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    run = subprocess.run(container["command"], cwd=container["workingDir"], capture_output=True, text=True)
    manifest["status"] = "Failed" if run.returncode else "Complete"
    manifest["output"] = run.stdout + run.stderr
    (jobs / name).write_text(yaml.safe_dump(manifest))
    print(name)
elif sys.argv[1:3] == ["get", "job"]:
    print("there", yaml.safe_load((jobs / sys.argv[3]).read_text())["status"])
"""


def test_the_profile_for_kubernetes_makes_jobs_and_makes_a_failed_one_again_with_more_memory(tmp_path):
    """Up to kubectl; no cluster is asked."""
    if find_spec("snakemake_executor_plugin_cluster_generic") is None:
        pytest.skip("needs snakemake-executor-plugin-cluster-generic: pip install -r requirements.lock")
    project, jobs, programs = copy_project(tmp_path / "project"), tmp_path / "jobs", tmp_path / "bin"
    jobs.mkdir()
    programs.mkdir()
    (programs / "kubectl").write_text(KUBECTL.format(python=sys.executable))
    (programs / "kubectl").chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "STAND_IN": str(jobs)}
    command = [*on_the_cpu(project, "kubernetes"), "--seconds-between-status-checks", "1", "--until", "clean"]
    with failing_once(project, "clean", "0-of-1"):
        run = subprocess.run(command, cwd=project, env=environment, text=True, capture_output=True)
    made = [yaml.safe_load(path.read_text()) for path in sorted(jobs.iterdir())]
    assert run.returncode == 0, run.stderr + "".join(job["output"] for job in made)
    assert (project / "results/clean/demo/heldout/0-of-1.h5").exists()
    asked = [job["spec"]["template"]["spec"]["containers"][0]["resources"] for job in made]
    assert sorted(job["limits"]["memory"] for job in asked[:2]) == ["24000M", "8000M"]  # weights and tokens
    assert [job["limits"] for job in asked[2:]] == [
        {"memory": "24000M", "nvidia.com/gpu": 1},
        {"memory": "48000M", "nvidia.com/gpu": 1},
    ]
    assert [job["spec"]["activeDeadlineSeconds"] for job in made[2:]] == [7200, 14400]
    assert [job["status"] for job in made] == ["Complete", "Complete", "Failed", "Complete"]
    assert {job["spec"]["template"]["spec"]["containers"][0]["workingDir"] for job in made} == {str(project)}
