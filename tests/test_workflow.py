"""The workflow as a user meets it: a small run in a copy of the project, then what a dry run wants after a change."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT

from pipeline import paper_table

TINY, STUDY = "tests/configs/tiny.yaml", "tests/configs/study.yaml"
# What is made again after the effects of an SAE. Analyses: the metrics, and the ranks, agreements and flips by them;
# calibrations are fitted again only where the bootstrap is another.
AFTERWARDS = {"checks": 1, "summary": 1, "analyses": 4, "figures": 7, "paper": 1, "report": 1, "all": 1}
RESAMPLED = AFTERWARDS | {"analyses": 5}
# After an experiment that does not run `sae`, of which there are no metrics.
UNMEASURED = {rule: count for rule, count in AFTERWARDS.items() if rule != "analyses"}
# Of three SAEs there are verdicts too.
OF_THREE = AFTERWARDS | {"figures": 8}


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


def copy_project(target: Path, source: Path = ROOT) -> Path:
    for name in ("pipeline", "workflow", "profiles", "calibrations", "tests/configs"):
        shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "config.yaml"):
        shutil.copy(source / name, target / name)
    (target / "demo").symlink_to(ROOT / "demo")
    return target


def copy_run(finished: Path, target: Path) -> Path:
    """A copy of a project with what a finished run has made, and without Snakemake's notes."""
    project = copy_project(target, finished)
    shutil.copytree(finished / "results", project / "results")
    return project


def ran(project: Path, *arguments: str, config: str = TINY) -> None:
    run = snakemake(project, "--cores", "2", *arguments, config=config)
    assert run.returncode == 0, run.stdout + run.stderr


def items(project: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of every file that holds numbers."""
    found = [path for kind in ("h5", "parquet", "safetensors") for path in project.glob(f"results/**/*.{kind}")]
    return {str(path.relative_to(project)): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def contents(found: dict[str, tuple[int, bytes]]) -> dict[str, bytes]:
    return {path: content for path, (_, content) in found.items()}


def made(before: dict, after: dict, *kinds: str) -> set[str]:
    """The files that are there before and after and were written in between; of some stages only, where they are
    named."""
    return {path for path in before if (not kinds or path.split("/")[1] in kinds) and after[path] != before[path]}


def log(project: Path, name: str) -> str:
    return (project / f"results/logs/{name}.log").read_text()


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


def with_config(project: Path, base: str = TINY, /, **changes) -> str:
    """A configuration that differs from the tiny one (or another), as a path within the project."""
    config = yaml.safe_load((project / base).read_text())
    name = "tests/configs/changed.yaml"
    (project / name).write_text(
        yaml.safe_dump(config | {key: change(config.get(key)) for key, change in changes.items()})
    )
    return name


def test_the_run_ends_with_a_report_and_says_where_it_is(finished):
    page = (finished / "results/report.html").read_text()
    headline = (finished / "results/headline.txt").read_text().strip()
    assert "KL ratio" in headline
    general = ["kl_by_layer", "loss_by_layer", "plane", "kl_histograms", "loss_histograms", "kl_by_position"]
    for name in (*general, "effective_compute"):
        assert f'id="{name}"' in page
        for ending in (".svg", ".png", ".parquet"):
            assert (finished / f"results/figures/{name}{ending}").stat().st_size > 1000
    summary = pl.read_parquet(finished / "results/summary/effects.parquet")
    # (5 with an SAE: identity, sae, eps_random) x 2 SAEs, (identity, zero, mean) x 2 hooks, each in two token classes
    assert summary.height == (3 * 2 + 3 * 2) * 2
    assert (summary.filter(pl.col("intervention") == "identity")["kl_mean"] == 0).all()
    assert (summary.filter(pl.col("intervention") == "sae")["kl_mean"] > 0.001).all()


def test_the_table_of_a_paper_says_what_the_summary_and_the_metrics_say(finished):
    table = pl.read_parquet(finished / "results/paper/saes.parquet")
    assert table["sae"].to_list() == ["resid", "transcoder"]
    of_saes = pl.read_parquet(finished / "results/summary/saes.parquet")
    effects = pl.read_parquet(finished / "results/summary/effects.parquet")
    effects = effects.filter(pl.col("intervention") == "sae", pl.col("tokens") == "ordinary")
    for sae, l0, lost, divergence in table.select("sae", "l0", "nats_lost", "kl").rows():
        assert l0 == of_saes.filter(sae=sae)["l0_mean"].item()
        assert (lost, divergence) == pytest.approx(effects.filter(sae=sae).select("delta_ce_mean", "kl_mean").row(0))
    for ending in ("csv", "md", "tex"):
        assert "transcoder" in (finished / f"results/paper/saes.{ending}").read_text()


def test_a_second_run_does_nothing(finished):
    assert wanted(finished) == {}


def test_a_second_run_does_nothing_when_snakemake_has_lost_its_notes(finished):
    notes = finished / ".snakemake"
    notes.rename(finished / "elsewhere")
    try:
        assert wanted(finished) == {}
        assert wanted(finished, config=with_config(finished, seed=lambda _: 1)) == {"effects": 1, **RESAMPLED}
    finally:
        shutil.rmtree(notes)
        (finished / "elsewhere").rename(notes)


NEW = {"id": "new", "path": "demo/saes/resid3-l1-2"}


def test_a_new_sae_adds_its_own_reconstructions_and_effects_and_nothing_else(finished):
    config = with_config(finished, saes=lambda saes: [NEW, *saes])
    assert wanted(finished, config=config) == {"reconstructions": 1, "scores": 1, "effects": 1, **OF_THREE}


def test_when_a_new_sae_is_run_no_other_item_is_touched(finished, tmp_path):
    project = copy_run(finished, tmp_path / "grown")
    before = items(project)
    config = with_config(project, saes=lambda saes: [NEW, *saes])
    ran(project, "--until", "effects", config=config)
    after = items(project)
    assert {path: after[path] for path in before} == before
    new = {f"results/{stage}/new/heldout/0-of-1" for stage in ("reconstructions", "effects/main")}
    assert {path.rpartition(".")[0] for path in after.keys() - before.keys()} == new
    for stage, place in (("reconstructions", "demo"), ("effects", "main/demo")):
        assert "1 of 3 items to make" in log(project, f"{stage}/{place}/heldout/0-of-1/0")
    assert wanted(project, config=config) == {"scores": 1, **OF_THREE}


def test_a_new_experiment_adds_its_own_effects_and_nothing_else(finished):
    new = {"id": "new", "interventions": ["identity", "sae_norm"]}
    config = with_config(finished, experiments=lambda experiments: [*experiments, new])
    assert wanted(finished, config=config) == {"effects": 1, **UNMEASURED}


def test_an_atlas_adds_its_own_ablations_and_nothing_else(finished):
    config = with_config(finished, atlas=lambda _: {"components": ["attn_out", "z"], "layers": [1]})
    own = {"activations": 1, "moments": 2, "ablations": 1, "checks": 1, "analyses": 1, "figures": 2}
    assert wanted(finished, config=config) == {**own, "report": 1, "all": 1}


def test_families_add_their_frontiers_and_nothing_else(finished):
    families = [{"id": "one", "saes": ["resid"]}, {"id": "two", "saes": ["transcoder"]}]
    config = with_config(finished, metrics=lambda _: {"families": families})
    assert wanted(finished, config=config) == {"analyses": 3, "figures": 1, "report": 1, "all": 1}


def test_other_calibrations_run_no_model(finished):
    config = with_config(finished, metrics=lambda _: {"calibrations": ["kaplan"]})
    # All analyses that there are; of the figures, that of effective compute.
    assert wanted(finished, config=config) == {"analyses": 5, "paper": 1, "figures": 1, "report": 1, "all": 1}


def test_a_configuration_without_models_or_saes_changes_the_demo_and_another_takes_nothing_from_it(finished):
    config, of_the_demo = "tests/configs/changed.yaml", {"compounds", "curvatures"}
    (finished / config).write_text("seed: 1\n")
    assert of_the_demo <= set(wanted(finished, config=config))
    every = wanted(finished, "--forceall")
    assert not of_the_demo & set(every)
    assert (every["analyses"], every["figures"], every["paper"], every["checks"]) == (5, 7, 1, 1)


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
        assert wanted(finished) == {"effects": 1, **AFTERWARDS}
    with changed(source, lambda text: text.replace("torch.zeros_like(x)", "torch.zeros_like(x) + 0")):
        assert wanted(finished) == {"ablations": 1, **AFTERWARDS}
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
        assert wanted(finished) == {"clean": 1, "effects": 1, "ablations": 1, **AFTERWARDS}


def test_a_changed_seed_reruns_what_is_random(finished):
    assert wanted(finished, config=with_config(finished, seed=lambda _: 7)) == {"effects": 1, **RESAMPLED}


def test_new_weights_under_the_same_path_rerun_everything_of_that_sae(finished, tmp_path):
    shutil.copytree(ROOT / "demo/saes/resid3-topk-16", tmp_path / "sae")
    config = with_config(finished, saes=lambda saes: [saes[0] | {"path": str(tmp_path / "sae")}, saes[1]])
    same = wanted(finished, config=config)  # the path is part of the provenance
    shutil.copy(ROOT / "demo/saes/resid3-l1-2/sae_weights.safetensors", tmp_path / "sae")
    assert wanted(finished, config=config) == same == {"reconstructions": 1, "scores": 1, "effects": 1, **AFTERWARDS}


ITEMS = {
    "activations": "results/activations/demo/heldout/blocks.3.hook_resid_pre/0-of-1.h5",
    "reconstructions": "results/reconstructions/resid/heldout/0-of-1.h5",
    "scores": "results/scores/resid/heldout/0-of-1.h5",
    "effects": "results/effects/main/resid/heldout/0-of-1.parquet",
    "ablations": "results/ablations/main/demo/heldout/blocks.3.hook_resid_pre/0-of-1.parquet",
}
OTHERS = {"resid/": "transcoder/", "hook_resid_pre": "hook_mlp_out"}


def damaged(project: Path, stage: str, damage: str) -> Path:
    """An item that is missing, cut short, or of another SAE or hook; its time stays."""
    path = project / ITEMS[stage]
    content, times = path.read_bytes(), path.stat()
    if damage == "missing":
        path.unlink()
        return path
    (other,) = [ITEMS[stage].replace(ours, theirs) for ours, theirs in OTHERS.items() if ours in ITEMS[stage]]
    path.write_bytes(content[:5000] if damage == "truncated" else (project / other).read_bytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return path


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign"])
@pytest.mark.parametrize("stage", ["scores", "effects", "ablations"])
def test_a_lost_or_damaged_item_is_wanted_again_and_what_is_current_is_not(finished, stage, damage):
    path = finished / ITEMS[stage]
    before, times = path.read_bytes(), path.stat()
    try:
        damaged(finished, stage, damage)
        assert wanted(finished) == {stage: 1, "all": 1}
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert wanted(finished) == {}


def test_only_the_lost_and_damaged_items_are_made_again_and_as_they_were(finished, tmp_path):
    project = copy_run(finished, tmp_path / "damaged")
    before = items(project)
    damage = {"reconstructions": "truncated", "scores": "missing", "effects": "truncated", "ablations": "foreign"}
    for stage, kind in damage.items():
        damaged(project, stage, kind)
    ran(project)
    after = items(project)
    assert made(before, after) == {ITEMS[stage] for stage in damage}
    assert contents(after) == contents(before)
    for stage, place in (("scores", "demo"), ("effects", "main/demo"), ("ablations", "main/demo")):
        assert "1 of 2 items to make" in log(project, f"{stage}/{place}/heldout/0-of-1/0")
    assert wanted(project) == {}


def test_what_is_not_kept_goes_when_it_is_consumed_and_comes_back_where_it_is_asked_for(finished, tmp_path):
    project = copy_run(finished, tmp_path / "dropped")
    before = items(project)
    (project / ITEMS["effects"]).unlink()
    thrifty = with_config(project, keep=lambda _: [])
    ran(project, "--until", "effects", config=thrifty)
    after = items(project)
    gone = {path for path in before if path.split("/")[1] in ("activations", "reconstructions")}
    assert after.keys() == before.keys() - gone
    assert contents(after) == {path: content for path, content in contents(before).items() if path not in gone}
    assert wanted(project, config=thrifty) == {}
    new = with_config(
        project,
        thrifty,
        experiments=lambda each: [*each, {"id": "new", "interventions": ["sae_norm"], "saes": ["resid"]}],
    )
    ran(project, "--until", "effects", config=new)
    again = {ITEMS["activations"], ITEMS["reconstructions"]}  # which the checks of the new experiment wait for
    assert items(project).keys() - after.keys() == {"results/effects/new/resid/heldout/0-of-1.parquet", *again}
    for stage in ("activations", "reconstructions"):
        assert "1 of" in log(project, f"{stage}/demo/heldout/0-of-1/0")


def test_lost_activations_are_made_again_only_when_something_needs_them(finished, tmp_path):
    project = copy_run(finished, tmp_path / "lost")
    before = items(project)
    damaged(project, "activations", "missing")
    assert wanted(project) == {}
    damaged(project, "effects", "foreign")
    assert wanted(project) == {"activations": 1, "effects": 1, "all": 1}
    ran(project)
    after = items(project)
    assert made(before, after) == {ITEMS["activations"], ITEMS["effects"]}
    assert contents(after) == contents(before)
    assert "1 of 3 items to make" in log(project, "activations/demo/heldout/0-of-1/0")


def test_lost_activations_are_left_alone_by_a_new_experiment_at_another_hook(finished, tmp_path):
    project = copy_run(finished, tmp_path / "elsewhere")
    damaged(project, "activations", "missing")
    new = {"id": "new", "interventions": ["sae_norm"], "saes": ["transcoder"]}
    config = with_config(project, experiments=lambda experiments: [*experiments, new])
    assert wanted(project, config=config) == {"effects": 1, **UNMEASURED}


def test_files_that_were_touched_rerun_nothing(finished, tmp_path):
    project = copy_run(finished, tmp_path / "touched")
    for path in [*project.glob("results/**/*.h5"), *project.glob("pipeline/*.py")]:
        os.utime(path)
    assert wanted(project) == {}


def effects_of(project: Path) -> dict[str, pl.DataFrame]:
    """Every table of effects and ablations, all shards of each, in a fixed order of rows."""
    found, order = {}, ["intervention", "sequence", "position"]
    for pattern in ("results/effects/main/*/heldout", "results/ablations/main/demo/heldout/*"):
        for folder in project.glob(pattern):
            table = pl.read_parquet(folder / "*.parquet").with_columns(pl.col("intervention").cast(pl.String))
            found[folder.parent.name + folder.name] = table.sort(order)
    return found


def test_four_shards_give_the_same_numbers_per_token_as_one(finished, tmp_path):
    project = copy_project(tmp_path / "sharded", finished)
    config = with_config(project, shards=lambda _: 4, saes=lambda saes: saes[1:])
    run = snakemake(project, "--cores", "2", "--until", "effects", "ablations", config=config)
    assert run.returncode == 0, run.stdout + run.stderr
    whole, sharded = effects_of(finished), effects_of(project)
    assert set(sharded) == {"transcoderheldout", "heldoutblocks.3.hook_mlp_out"}
    assert len(list(project.glob("results/effects/main/transcoder/heldout/*.parquet"))) == 4
    for name in sharded:
        assert whole[name].equals(sharded[name]), name


def test_a_killed_job_of_activations_goes_on_where_it_was(finished, tmp_path):
    project = copy_run(finished, tmp_path / "killed")
    shutil.rmtree(project / "results/activations")
    stamp = "results/batches/activations/demo/heldout/0-of-1/0.json"
    (project / stamp).unlink()
    # Every micro-batch is marked and noted, and the fifth mark (of three hooks) kills the process. `store` only moves
    # bytes, so that the fingerprints stay.
    source, often = project / "pipeline/store.py", lambda text: text.replace("\nMARK = 128\n", "\nMARK = 8\n")
    last = "        write_text(self.mark_path, str(done))\n"
    note = f"{last}        with open({str(tmp_path / 'marks')!r}, 'a') as file:\n"
    note += "            print(self.mark_path.parent.name, done, file=file)\n"
    kill = f"{note}        if 'ln2' in str(self.mark_path) and done == 16:\n            os.kill(os.getpid(), 9)\n"
    with changed(source, lambda text: often(text).replace(last, kill)):
        run = snakemake(project, "--cores", "1", stamp)
    assert run.returncode != 0
    assert list(project.glob("results/activations/**/*.h5")) == []
    hooks = [line.split()[0] for line in (tmp_path / "marks").read_text().splitlines()[:3]]
    killed = hooks.index("blocks.3.ln2.hook_normalized") + 1
    assert len((tmp_path / "marks").read_text().splitlines()) == 3 + killed
    (tmp_path / "marks").unlink()
    with changed(source, lambda text: often(text).replace(last, note)):
        ran(project, stamp)
    expected = [f"{hook} {done}" for done in (16, 24, 32, 40) for hook in hooks]
    begun = [line for line in expected[:3] if line.split()[0] not in hooks[:killed]]  # the others had marked 16
    assert (tmp_path / "marks").read_text().splitlines() == begun + expected[3:]
    assert list(project.glob("results/activations/**/.*")) == []
    for path in finished.glob("results/activations/**/*.h5"):
        with h5py.File(path) as one, h5py.File(project / path.relative_to(finished)) as other:
            assert dict(one.attrs) == dict(other.attrs)
            assert list(one) == list(other)
            assert all((one[name][:] == other[name][:]).all() for name in one)


def test_a_killed_job_of_effects_goes_on_where_it_was(finished, tmp_path):
    project = copy_run(finished, tmp_path / "killed")
    shutil.rmtree(project / "results/effects")
    # Every write to a spool is noted, and the third (of `resid`, the second time) kills the process. `store` only
    # moves bytes, so that the fingerprints stay.
    last = "        self.values[:, :, first : first + values.shape[2]] = np.where(np.isnan(values), np.inf, values)\n"
    note = f"{last}        with open({str(tmp_path / 'puts')!r}, 'a') as file:\n"
    note += "            print(self.path.parent.parent.name, first, file=file)\n"
    kill = f"{note}        if first:\n            os.kill(os.getpid(), 9)\n"
    source = project / "pipeline/store.py"
    with changed(source, lambda text: text.replace(last, kill)):
        run = snakemake(project, "--cores", "1", "--until", "effects")
    assert run.returncode != 0
    left = sorted(project.glob("results/effects/main/*/heldout/.*.spool"))
    assert [path.parent.parent.name for path in left] == ["resid", "transcoder"]
    assert list(project.glob("results/effects/**/*.parquet")) == []
    assert (tmp_path / "puts").read_text().splitlines() == ["resid 0", "transcoder 0", "resid 8"]
    (tmp_path / "puts").unlink()
    with changed(source, lambda text: text.replace(last, note)):
        ran(project, "--until", "effects")
    expected = ["transcoder 8", *(f"{sae} {first}" for first in (16, 24, 32) for sae in ("resid", "transcoder"))]
    assert (tmp_path / "puts").read_text().splitlines() == expected
    assert list(project.glob("results/effects/**/.*")) == []
    for path in finished.glob("results/effects/**/*.parquet"):
        assert (project / path.relative_to(finished)).read_bytes() == path.read_bytes()


def test_batches_of_one_give_the_bytes_of_a_batch_of_all(finished, tmp_path):
    project = copy_run(finished, tmp_path / "alone")
    for name in ("activations", "reconstructions", "effects", "ablations", "batches"):
        shutil.rmtree(project / "results" / name)
    ran(project, "--until", "effects", "ablations", config=with_config(project, batch=lambda _: 1))
    stamps = [path.parent.name for path in project.glob("results/batches/*/**/*.json")]
    assert len(stamps) == 3 + 2 + 2 + 2  # hooks, and SAEs or the hooks where they write
    assert contents(items(project)) == contents(items(finished))


@pytest.mark.parametrize("size", [1, 2])
def test_another_size_of_batches_computes_no_item_again(finished, tmp_path, size):
    project = copy_run(finished, tmp_path / "other")
    before, config = items(project), with_config(project, batch=lambda _: size)
    ran(project, config=config)
    after = items(project)
    assert contents(after) == contents(before)
    assert made(before, after, *ITEMS) == set()
    logs = [path.read_text() for path in project.glob("results/logs/*/**/0-of-1/[12].log")]
    assert len(logs) == {1: 2 + 4, 2: 0}[size]  # a third hook, and the second of two SAEs or hooks
    assert all(" 0 of 1 items to make" in text for text in logs)
    assert wanted(project, config=config) == {}
    assert wanted(project) == {}


def test_an_sae_that_gives_no_numbers_fails_by_name_and_the_others_of_its_batch_are_made(finished, tmp_path):
    from safetensors.torch import load_file, save_file

    project = copy_run(finished, tmp_path / "bad")
    before = items(project)
    shutil.copytree(ROOT / "demo/saes/resid3-l1-2", tmp_path / "sae")
    weights = tmp_path / "sae/sae_weights.safetensors"
    save_file({name: 1e30 * tensor for name, tensor in load_file(weights).items()}, weights)
    damaged(project, "reconstructions", "truncated")
    bad = {"id": "broken", "path": str(tmp_path / "sae")}
    config = with_config(project, saes=lambda saes: [bad, *saes])
    run = snakemake(project, "--cores", "2", "--until", "reconstructions", config=config)
    assert run.returncode != 0
    said = log(project, "reconstructions/demo/heldout/0-of-1/0")
    assert "SAE 'broken' is not finite at sequence" in said.splitlines()[-1]
    assert "Traceback" not in said
    after = items(project)
    assert contents(after) == contents(before)
    assert made(before, after) == {ITEMS["reconstructions"]}
    ran(project)  # without it
    again = items(project)
    assert contents(again) == contents(after)
    assert made(after, again, *ITEMS) == set()


def test_an_intervention_of_ones_own_runs_and_is_in_the_figures(finished, tmp_path):
    project = copy_run(finished, tmp_path / "own")
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


def test_rules_and_stages_and_patterns_have_the_same_names():
    from pipeline.jobs import BATCHES, PATTERNS

    rules = {path.stem for path in (ROOT / "workflow/rules").glob("*.smk")} - {"common", "plan"}  # these make no file
    assert rules == set(PATTERNS)
    for name in rules:
        text = (ROOT / f"workflow/rules/{name}.smk").read_text()
        assert f"rule {name}:" in text
        assert f"python -m pipeline.{name} " in text
        assert (f'BATCHES["{name}"]' if name in BATCHES else f'PATTERNS["{name}"]') in text
        assert f'inputs("{name}")' in text
        assert (ROOT / f"pipeline/{name}.py").exists()


# A study of every kind of experiment.


@pytest.fixture(scope="module")
def studied(tmp_path_factory) -> Path:
    """A copy of the project with a finished run of the study."""
    project = copy_project(tmp_path_factory.mktemp("studied"))
    ran(project, config=STUDY)
    return project


def planned(project: Path, config: str, monkeypatch) -> dict[str, str]:
    """Path -> stage of every file that a configuration has."""
    from pipeline import config as configuration
    from pipeline.plan import Plan

    monkeypatch.chdir(project)
    plan = Plan(configuration.load(yaml.safe_load(Path(config).read_text())))
    return {path: job.stage for path, job in plan.jobs.items()}


def test_a_study_ends_with_every_table_and_figure_that_was_planned(studied, monkeypatch):
    files = planned(studied, STUDY, monkeypatch)
    assert [path for path in files if not (studied / path).exists()] == []
    assert set(files.values()) == {path.stem for path in (ROOT / "workflow/rules").glob("*.smk")} - {"common", "plan"}
    page = (studied / "results/report.html").read_text()
    names = [Path(path).stem for path, stage in files.items() if stage == "figures"]
    captions = {path.stem for path in (ROOT / "workflow/report").glob("*.rst")}
    assert set(names) == captions - {"metric_verdicts"}  # of three SAEs in one experiment
    for name in names:
        assert f'id="{name}"' in page
        for ending in (".svg", ".png"):
            assert (studied / f"results/figures/{name}{ending}").stat().st_size > 1000
    for path, stage in files.items():
        if stage in ("analyses", "figures"):
            assert pl.read_parquet(studied / path).height > 0, path


def test_the_tables_of_a_study_are_of_what_was_asked_for(studied):
    def table(name: str) -> pl.DataFrame:
        return pl.read_parquet(studied / f"results/summary/{name}.parquet")

    single = table("single_positions").filter(pl.col("sae") == "transcoder")
    assert set(single["patched"]) == {8, 12}
    assert set(single["offset"]) == set(range(5))
    draws = table("draws")
    assert set(draws["n_draws"]) == {20}
    assert draws["sequence"].n_unique() == 16
    sets = table("compounding").filter(pl.col("intervention") == "sae")
    assert sets["set"].to_list() == ["resid", "transcoder", "resid5", "resid+resid5", "resid+transcoder+resid5"]
    assert sets["super_additivity"].null_count() == 0
    with h5py.File(studied / "results/tokens/demo/heldout.h5") as tokens:
        assert set(sets["n_tokens"]) == {(~tokens["special"][:8]).sum()}  # one micro-batch
    assert table("rungs").height == 7
    assert set(table("doses")["alpha"]) == {0.5, 1, 2}
    assert table("cosines").height == 2
    extremes = pl.read_parquet(studied / "results/extremes/main/resid/heldout.parquet")
    assert extremes.filter(pl.col("kind") == "chosen").select("sequence", "position").rows() == [(3, 5)]
    summary = table("effects")
    assert set(summary["experiment"]) == {"main", "special"}
    assert summary.filter(pl.col("intervention") == "identity")["kl_mean"].max() == 0


def test_the_tables_of_metrics_and_of_the_atlas_are_of_what_was_asked_for(studied):
    def table(name: str) -> pl.DataFrame:
        return pl.read_parquet(studied / f"results/summary/{name}.parquet")

    atlas = table("atlas")
    places = [(layer, component) for layer in (0, 5) for component in ("attn_out", "z")]
    expected = {(*place, name) for place in places for name in ("zero", "mean", "resample")}
    assert set(atlas.select("layer", "component", "intervention").rows()) == expected
    assert set(atlas.filter(component="z")["head"]) == {0, 1, 2, 3}
    assert atlas.filter(component="attn_out")["head"].null_count() == 2 * 3
    assert set(atlas["n_tokens"]) == set(table("compounding")["n_tokens"])  # one micro-batch
    metrics = table("metrics")
    assert set(metrics["experiment"]) == {"main"}
    assert set(metrics.filter(metric="effective_compute")["baseline"]) == {"Kaplan 2020", "Chinchilla"}
    assert table("calibrated")["name"].to_list() == ["Kaplan 2020", "Chinchilla"]
    assert table("frontier_points").select("family", "sae").rows() == [("one", "resid"), ("two", "transcoder")]
    paper = pl.read_parquet(studied / "results/paper/saes.parquet")
    assert paper.columns[-9::3] == ["l0", "kl", "effective_compute[Kaplan 2020]"]


def test_a_second_run_of_a_study_does_nothing(studied):
    assert wanted(studied, config=STUDY) == {}


# What docs/results.md says of them.

PAGE = (ROOT / "docs/results.md").read_text()
LABELS = "labels"


def described() -> dict[str, dict[str, tuple[str, str]]]:
    """Table (or the folder of many) -> column -> type and unit, as the page says; LABELS are for all."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    tables = [LABELS]
    for line in PAGE.partition("## Labels")[2].splitlines():
        if "**`" in line:
            tables = re.findall(r"`([^`]+)`", line.partition("**")[2].partition("**")[0])
        if line.startswith("| `"):
            columns, kind, unit, _ = (cell.strip() for cell in line.strip("|").split("|"))
            for name, ends in re.findall(r"`([^`]+)`( ±)?", columns):
                for end in ("", "_low", "_high") if ends else ("",):
                    for table in tables:
                        assert name + end not in found.setdefault(table, {}), f"{table}: {name} is there twice"
                        found[table][name + end] = kind, unit
    return found


def stored(projects: list[Path], columns: list[str]) -> dict[str, dict[str, tuple[str, str]]]:
    """The same of the Parquet files of runs, without the data of figures and the paper's `columns`, that the
    configuration names."""
    named = {column + end for column in columns for end in ("", "_low", "_high")}
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for project in projects:
        for path in sorted(project.glob("results/*/**/*.parquet")):
            place = path.relative_to(project / "results")
            stage = place.parts[0]
            table = place.as_posix() if stage in ("summary", "paper") else f"{stage}/"
            kinds, schema = pl.read_parquet_schema(path), pq.read_schema(path)
            for name, kind in kinds.items():
                if stage != "figures" and not (stage == "paper" and name in named):
                    unit = (schema.field(name).metadata or {}).get(b"unit", b"").decode()
                    found.setdefault(table, {}).setdefault(name, set()).add((str(kind.base_type()), unit))
    return {table: {name: one for name, (one,) in columns.items()} for table, columns in found.items()}


def differences(page: dict, files: dict) -> list[str]:
    """What a page says and the files do not, and the other way round."""
    labels, own = page[LABELS], {table: columns for table, columns in page.items() if table != LABELS}
    found = [f"{table} is on the page, but no run makes it" for table in own.keys() - files.keys()]
    used = set()
    for table, columns in files.items():
        said = own.get(table, {})
        found += [f"{table}: {name} is on the page, but not in the files" for name in said.keys() - columns.keys()]
        for name, (kind, unit) in columns.items():
            used.add(name)
            kinds, expected = said.get(name) or labels.get(name, ("", ""))
            if kind not in kinds.split(" or ") or unit != expected:
                found.append(f"{table}: {name} is {kind} [{unit}], on the page {kinds or 'nothing'} [{expected}]")
    return found + [f"no table has the label {name}" for name in labels.keys() - used]


def test_every_column_is_on_the_page_with_its_type_and_unit_and_no_other_is(finished, studied):
    metrics = yaml.safe_load((ROOT / STUDY).read_text())["metrics"]
    assert differences(described(), stored([finished, studied], [*metrics["columns"], *paper_table.DEFAULT])) == []


@pytest.mark.parametrize("library", ["polars", "pandas", "duckdb"])
def test_the_examples_on_the_page_run_as_they_stand(studied, monkeypatch, library):
    module = pytest.importorskip(library, reason=f"{library} is not installed, and the pipeline does not need it")
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"{library}.")]
    monkeypatch.chdir(studied)
    expected = pl.read_parquet("results/summary/effects.parquet").filter(intervention="sae", tokens="ordinary")
    found = eval(line, {library: module})
    found = found.pl() if library == "duckdb" else pl.DataFrame(found)
    assert expected.height > 1
    assert found["kl_mean"].to_list() == expected["kl_mean"].to_list()


def changed_study(project: Path, kind: str, **changes) -> str:
    def change(experiments: list[dict]) -> list[dict]:
        return [entry | (changes if entry["id"] == kind else {}) for entry in experiments]

    return with_config(project, STUDY, experiments=change)


def test_more_draws_rerun_their_own_experiment_and_what_shows_it(studied):
    again = {"effects": 1, "checks": 1, "analyses": 2, "figures": 1, "report": 1, "all": 1}
    assert wanted(studied, config=changed_study(studied, "draws", draws=30)) == again


def test_other_contexts_of_sets_rerun_only_the_sets(studied):
    again = {"compounds": 1, "analyses": 1, "figures": 1, "report": 1, "all": 1}
    assert wanted(studied, config=changed_study(studied, "compound", contexts=16)) == again


def test_a_new_experiment_of_one_position_reruns_nothing_else(studied):
    new = {"id": "new", "scope": "single", "positions": [5], "horizon": 2, "interventions": ["sae", "zero"]}
    config = with_config(studied, STUDY, experiments=lambda experiments: [*experiments, new | {"saes": ["resid"]}])
    own = {"effects": 1, "ablations": 1, "checks": 1}
    shown = {"analyses": 1, "figures": 2, "report": 1, "all": 1}
    assert wanted(studied, config=config) == own | shown


def rows_of(project: Path, stage: str) -> dict[str, pl.DataFrame]:
    """Every table of a stage, all shards of each, in a fixed order of rows, by its folder."""
    found = {}
    for folder in {path.parent for path in project.glob(f"results/{stage}/**/*.parquet")}:
        table = pl.read_parquet(folder / "*.parquet").with_columns(pl.col(pl.Categorical).cast(pl.String))
        order = ["intervention", "draw", "set", "patched", "sequence", "position"]
        found[str(folder.relative_to(project))] = table.sort([name for name in order if name in table.columns])
    return found


def test_two_shards_of_a_study_give_the_same_numbers_per_token_as_one(studied, tmp_path):
    """Compounds and the atlas too, of which the second shard has no context."""
    project = copy_project(tmp_path / "sharded", studied)
    for name in ("tokens", "weights"):
        shutil.copytree(studied / "results" / name, project / "results" / name)
    changes = {"experiments": lambda experiments: experiments[1:], "series": lambda _: [], "metrics": lambda _: {}}
    config = with_config(project, STUDY, shards=lambda _: 2, **changes)
    ran(project, "--until", "effects", "ablations", "compounds", config=config)
    kinds = {"effects": ["draws", "single", "special"], "ablations": ["atlas", "single", "special"]}
    kinds |= {"compounds": ["compound"]}
    for stage, experiments in kinds.items():
        whole, sharded = rows_of(studied, stage), rows_of(project, stage)
        assert sorted({path.split("/")[2] for path in sharded}) == experiments
        for name, table in sharded.items():
            assert len(list((project / name).glob("*.parquet"))) == 2
            assert table.height > 0
            assert table.equals(whole[name]), name


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


def test_an_atlas_without_any_sae_ends_with_a_report(tmp_path):
    project = copy_project(tmp_path / "atlas")
    config = with_config(
        project,
        saes=lambda _: [],
        corpora=lambda corpora: [corpora[0] | {"contexts": 8}],
        experiments=lambda _: [],
        atlas=lambda _: {"components": ["mlp_out", "z"], "layers": [0], "interventions": ["zero"]},
    )
    ran(project, config=config)
    table = pl.read_parquet(project / "results/summary/atlas.parquet")
    assert table.select("component", "head").rows() == [("mlp_out", None), *(("z", head) for head in range(4))]
    assert np.isfinite(table["kl_mean"].to_numpy()).all()
    page = (project / "results/report.html").read_text()
    assert all(f'id="{name}"' in page for name in ("atlas_by_layer", "atlas_heads", "atlas"))
    assert wanted(project, config=config) == {}
