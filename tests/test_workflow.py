"""The workflow as a user meets it: a small run in a copy of the project, then what a dry run wants after a change."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from conftest import ROOT

TINY = "tests/configs/tiny.yaml"
AFTERWARDS = {"summary": 1, "figures": 5, "report": 1, "all": 1}


def snakemake(project: Path, *arguments: str, config: str = TINY) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "snakemake", "--configfile", config, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=project, env=environment, text=True, capture_output=True, check=False)


def wanted(project: Path, *arguments: str, config: str = TINY) -> dict[str, int]:
    """Rule -> number of jobs that a dry run would start."""
    found = snakemake(project, "--dry-run", *arguments, config=config)
    assert found.returncode == 0, found.stdout + found.stderr
    if "Nothing to be done" in found.stdout + found.stderr:
        return {}
    table = (found.stdout + found.stderr).rpartition("Job stats:")[2].partition("total")[0]
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}


def copy_project(target: Path) -> Path:
    for name in ("pipeline", "workflow", "profiles", "tests/configs"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "config.yaml"):
        shutil.copy(ROOT / name, target / name)
    (target / "demo").symlink_to(ROOT / "demo")
    return target


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A copy of the project with a finished run of the tiny configuration."""
    project = copy_project(tmp_path_factory.mktemp("project"))
    run = snakemake(project, "--cores", "2")
    assert run.returncode == 0, run.stdout + run.stderr
    return project


@contextmanager
def changed(path: Path, change: Callable[[str], str]) -> Iterator[None]:
    before = path.read_text()
    after = change(before)
    assert after != before
    path.write_text(after)
    try:
        yield
    finally:
        path.write_text(before)


def with_config(project: Path, **changes) -> str:
    """A configuration that differs from the tiny one, as a path within the project."""
    config = yaml.safe_load((project / TINY).read_text())
    name = "tests/configs/changed.yaml"
    (project / name).write_text(
        yaml.safe_dump(config | {key: change(config.get(key)) for key, change in changes.items()})
    )
    return name


def test_the_run_ends_with_a_report_and_says_where_it_is(finished):
    page = (finished / "results/report.html").read_text()
    headline = (finished / "results/headline.txt").read_text().strip()
    assert "KL ratio" in headline
    for name in ("kl_by_layer", "loss_by_layer", "kl_histograms", "loss_histograms", "kl_by_position"):
        assert f'id="{name}"' in page
        for ending in (".svg", ".png", ".parquet"):
            assert (finished / f"results/figures/{name}{ending}").stat().st_size > 1000
    summary = pl.read_parquet(finished / "results/summary/effects.parquet")
    # (5 with an SAE: identity, sae, eps_random) x 2 SAEs, (identity, zero, mean) x 2 hooks, each in two token classes
    assert summary.height == (3 * 2 + 3 * 2) * 2
    assert (summary.filter(pl.col("intervention") == "identity")["kl_mean"] == 0).all()
    assert (summary.filter(pl.col("intervention") == "sae")["kl_mean"] > 0.001).all()


def test_a_second_run_does_nothing(finished):
    assert wanted(finished) == {}


def test_a_second_run_does_nothing_when_snakemake_has_lost_its_notes(finished):
    notes = finished / ".snakemake"
    notes.rename(finished / "elsewhere")
    try:
        assert wanted(finished) == {}
        assert wanted(finished, config=with_config(finished, seed=lambda _: 1)) == {"effects": 2, **AFTERWARDS}
    finally:
        shutil.rmtree(notes)
        (finished / "elsewhere").rename(notes)


def test_a_new_sae_adds_its_own_reconstructions_and_effects_and_nothing_else(finished):
    config = with_config(finished, saes=lambda saes: [*saes, {"id": "new", "path": "demo/saes/resid3-l1-2"}])
    assert wanted(finished, config=config) == {"reconstructions": 1, "effects": 1, **AFTERWARDS}


def test_a_new_experiment_adds_its_own_effects_and_nothing_else(finished):
    new = {"id": "new", "interventions": ["identity", "sae_norm"]}
    config = with_config(finished, experiments=lambda experiments: [*experiments, new])
    assert wanted(finished, config=config) == {"effects": 2, **AFTERWARDS}


def test_a_removed_sae_only_makes_the_summaries_again(finished):
    assert wanted(finished, config=with_config(finished, saes=lambda saes: saes[:1])) == AFTERWARDS


def test_a_comment_a_docstring_or_white_space_in_the_source_reruns_nothing(finished):
    with ExitStack() as stack:
        for name in ("interventions", "engine", "effects", "summary", "store"):
            stack.enter_context(changed(finished / f"pipeline/{name}.py", retold))
        assert wanted(finished) == {}


def retold(source: str) -> str:
    """The same code under another module docstring, with more white space and a comment."""
    return '"""Other words."""\n\n\n' + source.partition('"""\n')[2] + "\n# more\n"


def test_a_changed_intervention_reruns_what_used_it(finished):
    source = finished / "pipeline/interventions.py"
    with changed(
        source, lambda text: text.replace("_norm(x_hat - x) * _unit(noise)", "2 * _norm(x_hat - x) * _unit(noise)")
    ):
        assert wanted(finished) == {"effects": 2, **AFTERWARDS}
    with changed(source, lambda text: text.replace("torch.zeros_like(x)", "torch.zeros_like(x) + 0")):
        assert wanted(finished) == {"ablations": 2, **AFTERWARDS}
    with changed(source, lambda text: text.replace("return x_hat * _ratio(_norm(x), _norm(x_hat))", "return x_hat")):
        assert wanted(finished) == {}  # sae_norm_corrected is not part of this configuration


def test_a_new_intervention_reruns_nothing(finished):
    new = "\n\n@INTERVENTIONS.register\ndef halved(x: Acts) -> Acts:\n    return x / 2\n"
    with changed(finished / "pipeline/interventions.py", lambda text: text + new):
        assert wanted(finished) == {}


def test_a_changed_figure_reruns_itself(finished):
    with changed(
        finished / "pipeline/figures.py", lambda text: text.replace("mean loss increase, nats", "loss increase")
    ):
        assert wanted(finished) == {"figures": 1, "report": 1, "all": 1}


def test_a_changed_metric_leaves_activations_and_reconstructions_alone(finished):
    with changed(finished / "pipeline/metrics.py", lambda text: text.replace("SMALL = 1e-2", "SMALL = 1e-3")):
        assert wanted(finished) == {"clean": 1, "effects": 2, "ablations": 2, **AFTERWARDS}


def test_a_changed_seed_reruns_what_is_random(finished):
    assert wanted(finished, config=with_config(finished, seed=lambda _: 7)) == {"effects": 2, **AFTERWARDS}


def test_new_weights_under_the_same_path_rerun_everything_of_that_sae(finished, tmp_path):
    shutil.copytree(ROOT / "demo/saes/resid3-topk-16", tmp_path / "sae")
    config = with_config(finished, saes=lambda saes: [saes[0] | {"path": str(tmp_path / "sae")}, saes[1]])
    same = wanted(finished, config=config)  # the path is part of the provenance
    shutil.copy(ROOT / "demo/saes/resid3-l1-2/sae_weights.safetensors", tmp_path / "sae")
    assert wanted(finished, config=config) == same == {"reconstructions": 1, "effects": 1, **AFTERWARDS}


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign"])
def test_a_lost_or_damaged_item_is_made_again(finished, damage):
    path = finished / "results/effects/main/resid/heldout/0-of-1.parquet"
    before, times = path.read_bytes(), os.stat(path)
    try:
        if damage == "missing":
            path.unlink()
        else:
            other = finished / "results/effects/main/transcoder/heldout/0-of-1.parquet"
            path.write_bytes(before[:5000] if damage == "truncated" else other.read_bytes())
            os.utime(path, (times.st_atime, times.st_mtime))
        assert wanted(finished) == {"effects": 1, **AFTERWARDS}
    finally:
        path.write_bytes(before)
        os.utime(path, (times.st_atime, times.st_mtime))
    assert wanted(finished) == {}


def effects_of(project: Path) -> dict[str, pl.DataFrame]:
    """Every table of effects and ablations, all shards of each, in a fixed order of rows."""
    found, order = {}, ["intervention", "sequence", "position"]
    for pattern in ("results/effects/main/*/heldout", "results/ablations/main/demo/heldout/*"):
        for folder in project.glob(pattern):
            table = pl.read_parquet(folder / "*.parquet").with_columns(pl.col("intervention").cast(pl.String))
            found[folder.parent.name + folder.name] = table.sort(order)
    return found


def test_four_shards_give_the_same_numbers_per_token_as_one(finished, tmp_path):
    project = copy_project(tmp_path / "sharded")
    config = with_config(project, shards=lambda _: 4, saes=lambda saes: saes[1:])
    run = snakemake(project, "--cores", "2", "--until", "effects", "ablations", config=config)
    assert run.returncode == 0, run.stdout + run.stderr
    whole, sharded = effects_of(finished), effects_of(project)
    assert set(sharded) == {"transcoderheldout", "heldoutblocks.3.hook_mlp_out"}
    assert len(list(project.glob("results/effects/main/transcoder/heldout/*.parquet"))) == 4
    for name in sharded:
        assert whole[name].equals(sharded[name]), name


def test_a_killed_job_leaves_nothing_that_looks_finished(finished, tmp_path):
    project = copy_project(tmp_path / "killed")
    shutil.copytree(finished / "results", project / "results")
    target = project / "results/activations/demo/heldout/blocks.3.hook_resid_pre/0-of-1.h5"
    target.unlink()
    # The stage kills its own process when the first batch has been written.
    line = "            for first, last in batches.ranges(start, stop):\n"
    indent = " " * 16
    kill = f"{line}{indent}if first:\n{indent}    import os\n\n{indent}    os.kill(os.getpid(), 9)\n"
    source = project / "pipeline/activations.py"
    source.write_text(source.read_text().replace(line, kill))
    run = snakemake(project, "--cores", "1", str(target.relative_to(project)))
    assert run.returncode != 0
    assert not target.exists()
    assert [path.suffix for path in target.parent.iterdir()] == [".part"]
    source.write_text((ROOT / "pipeline/activations.py").read_text())
    run = snakemake(project, "--cores", "1", str(target.relative_to(project)))
    assert run.returncode == 0, run.stdout + run.stderr
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert target.read_bytes() == (finished / target.relative_to(project)).read_bytes()


def test_an_intervention_of_ones_own_runs_and_is_in_the_figures(finished, tmp_path):
    project = copy_project(tmp_path / "own")
    shutil.copytree(finished / "results", project / "results")
    source = project / "pipeline/interventions.py"
    new = "@INTERVENTIONS.register\ndef towards_the_mean(x_hat: Acts, mean: Acts):\n    return (x_hat + mean) / 2\n"
    source.write_text(f"{source.read_text()}\n\n{new}")
    experiment = {"id": "own", "interventions": ["towards_the_mean"], "saes": ["resid"]}
    config = with_config(project, experiments=lambda experiments: [*experiments, experiment])
    run = snakemake(project, "--cores", "2", "results/figures/kl_by_layer.parquet", config=config)
    assert run.returncode == 0, run.stdout + run.stderr
    drawn = pl.read_parquet(project / "results/figures/kl_by_layer.parquet")
    (row,) = drawn.filter(pl.col("intervention") == "towards_the_mean").rows(named=True)
    assert row["kl_mean"] > 0
    summary = pl.read_parquet(project / "results/summary/effects.parquet").filter(pl.col("experiment") == "own")
    assert set(summary["intervention"]) == {"identity", "towards_the_mean"}


def test_a_wrong_configuration_is_told_before_anything_runs(finished):
    config = with_config(finished, experiments=lambda _: [{"id": "main", "interventions": ["eps_randon"]}])
    found = snakemake(finished, "--cores", "1", config=config)
    assert found.returncode != 0
    message = found.stdout + found.stderr
    assert "Unknown intervention 'eps_randon'. Did you mean 'eps_random'?" in message
    assert "Traceback" not in message


def test_rules_and_stages_and_patterns_have_the_same_names():
    from pipeline.plan import PATTERNS

    rules = {path.stem for path in (ROOT / "workflow/rules").glob("*.smk")} - {"common"}
    assert rules == set(PATTERNS)
    for name in rules:
        text = (ROOT / f"workflow/rules/{name}.smk").read_text()
        assert f"rule {name}:" in text
        assert f"python -m pipeline.{name} " in text
        assert (ROOT / f"pipeline/{name}.py").exists()


def test_an_ablation_only_configuration_runs(tmp_path):
    project = copy_project(tmp_path / "ablations")
    config = with_config(
        project,
        saes=lambda saes: saes[:1],
        corpora=lambda corpora: [corpora[0] | {"contexts": 8}],
        experiments=lambda _: [{"id": "main", "interventions": ["zero"]}],
    )
    run = snakemake(project, "--cores", "2", config=config)
    assert run.returncode == 0, run.stdout + run.stderr
    table = pl.read_parquet(project / "results/summary/effects.parquet")
    assert set(table["intervention"]) == {"identity", "zero"}  # the control is always run
    assert np.isfinite(table["kl_mean"].to_numpy()).all()
