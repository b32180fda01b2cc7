"""Whatever happens to a run, after a plain re-run its numbers are those of one that was left alone. FAITHFUL_KILLS says
how many random faults to try (3 where it is not set); `python -m tests.faults` does it over the demo."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import faults
import pytest
import yaml

SMALL = "tests/configs/small.yaml"
# Without figures: every kind of file is there, and every stage that takes long.
TARGETS = ("results/summary/effects.parquet", "results/paper/saes.parquet")
H5 = "results/reconstructions/resid/heldout/0-of-1.h5"
CLEAN = "results/clean/demo/heldout/0-of-1.h5"
EFFECTS = "results/effects/main/resid/heldout/0-of-1.parquet"
FINAL = "results/summary/saes.parquet"


def small(folder: Path) -> Path:
    """A project with one SAE and eight contexts."""
    made = faults.project(folder)
    config = yaml.safe_load((made / "tests/configs/tiny.yaml").read_text())
    changes = {"saes": config["saes"][:1], "corpora": [config["corpora"][0] | {"contexts": 8}]}
    (made / SMALL).write_text(yaml.safe_dump(config | changes))
    return made


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Path:
    """A run that was left alone."""
    made = small(tmp_path_factory.mktemp("calm"))
    faults.undisturbed(made, SMALL, *TARGETS)
    return made


def copy(calm: Path, folder: Path, *without: str) -> Path:
    """A copy of a run, but for some files or folders of results and what follows from them."""
    made = small(folder)
    shutil.copytree(calm / "results", made / "results")
    for name in without:
        path = made / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return made


def ran(folder: Path) -> str:
    """The words of a plain run that goes well."""
    run = faults.start(folder, SMALL, *TARGETS)
    said = (run.wait(), (folder / "run.log").read_text())
    assert said[0] == 0, said[1]
    return said[1]


def failed(folder: Path) -> str:
    run = faults.start(folder, SMALL, *TARGETS)
    assert run.wait() != 0
    return (folder / "run.log").read_text()


def until(condition: Callable[[], object], run: subprocess.Popen) -> None:
    while not condition():
        assert run.poll() is None, "the run ended too early"
        time.sleep(0.01)


def test_killed_runs_end_with_the_numbers_of_one_that_was_left_alone(calm, tmp_path):
    rough, record = small(tmp_path / "rough"), faults.Record()
    kills = int(os.environ.get("FAITHFUL_KILLS", 3))
    faults.disturbed(rough, SMALL, kills, random.Random(kills), 2, record, *TARGETS)
    assert record.faults.total() == kills
    assert record.again == []
    assert faults.differences(calm, rough) == []


def test_a_run_beside_another_is_refused_and_harms_nothing(calm, tmp_path):
    project = copy(calm, tmp_path / "two", "results/effects", "results/batches/effects")
    first = faults.start(project, SMALL, *TARGETS)
    until(lambda: list(project.glob(".snakemake/locks/*.lock")), first)
    first.send_signal(signal.SIGSTOP)  # so that it is there for as long as it takes
    try:
        (project / "run.log").rename(project / "first.log")
        assert "Directory cannot be locked" in failed(project)
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait() == 0, (project / "first.log").read_text()
    assert faults.differences(calm, project) == []


def test_a_run_goes_on_after_a_killed_one_whose_jobs_outlived_it_and_whose_lock_is_left(calm, tmp_path):
    project = copy(calm, tmp_path / "stale", CLEAN, "results/effects", "results/batches/effects")
    killed = faults.start(project, SMALL, *TARGETS)
    until((project / CLEAN).with_name(".making-0-of-1.h5.lock").exists, killed)
    (orphan,) = faults.jobs(project)
    orphan.suspend()  # it is still there when the next run comes to the same file
    killed.kill()
    killed.wait()
    assert list(project.glob(".snakemake/locks/*.lock"))
    run = faults.start(project, SMALL, *TARGETS)
    log = project / "results/logs/clean/demo/heldout/0-of-1.log"
    until(lambda: log.exists() and "waiting for another process" in log.read_text(), run)
    orphan.resume()
    assert run.wait() == 0, (project / "run.log").read_text()
    assert "made by the other process" in log.read_text()
    assert faults.differences(calm, project) == []


def test_a_damaged_input_is_named_and_made_again_once_it_is_deleted(calm, tmp_path):
    project = copy(calm, tmp_path / "damaged", "results/effects", "results/batches/effects")
    path = project / H5
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # among the numbers
    path.write_bytes(content)
    said = failed(project)
    assert f"{H5} is damaged" in said
    assert "Delete it and run again." in said
    assert "Traceback" not in (project / "results/logs/effects/main/demo/heldout/0-of-1/0.log").read_text()
    path.unlink()
    ran(project)
    assert faults.differences(calm, project) == []


def test_truncated_and_damaged_tables_are_made_again_without_asking(calm, tmp_path):
    project = copy(calm, tmp_path / "tables")
    kept = faults.finished(project)
    (project / EFFECTS).write_bytes((project / EFFECTS).read_bytes()[:-100])
    content = bytearray((project / FINAL).read_bytes())
    content[100] ^= 1
    (project / FINAL).write_bytes(content)
    ran(project)
    now = faults.finished(project)
    assert {path for path in kept if now[path] != kept[path]} >= {EFFECTS, FINAL}
    assert all(now[path] == kept[path] for path in kept if path.endswith((".h5", ".safetensors")))
    assert faults.differences(calm, project) == []


def test_a_file_that_is_taken_away_in_the_middle_is_made_again_by_the_next_run(calm, tmp_path):
    project = copy(calm, tmp_path / "taken", CLEAN, "results/effects", "results/batches/effects")
    run = faults.start(project, SMALL, *TARGETS)
    until(lambda: (project / CLEAN).exists(), run)
    (project / CLEAN).unlink()
    assert run.wait() != 0
    ran(project)
    assert faults.differences(calm, project) == []


def test_a_full_disk_is_said_and_a_run_goes_on_when_there_is_room(calm, tmp_path):
    project = copy(calm, tmp_path / "full", "results/effects", "results/batches/effects")
    results = tmp_path / "disk"
    results.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", results], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    try:
        shutil.copytree(project / "results", results, dirs_exist_ok=True)
        shutil.rmtree(project / "results")
        (project / "results").symlink_to(results)
        filler = results / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(results).free - 2**20))
        said = failed(project)
        assert "Free some space and run again." in said
        filler.unlink()
        ran(project)
        assert faults.differences(calm, project) == []
    finally:
        subprocess.run(["umount", results], check=True)
