"""Kills a run at random moments, and its jobs, until it is through all the same; then its numbers have to be those of a
run that was left alone, bit for bit, and nothing that was finished may have been made again.

`python -m tests.faults --kills 50 --config config.yaml --seed 0` does so in a scratch folder. Linux and macOS.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("h5", "parquet", "safetensors")
# What is compared byte for byte: all tables, those of figures and of single tokens too, and what is made of them.
TABLES = ("**/*.parquet", "paper/*", "headline.txt", "figures/*.svg")
# To a job: it alone is killed. To Snakemake: killed while its jobs go on, with all of its jobs, or asked to end.
FAULTS = ("job", "job", "orphans", "all", "terminate", "interrupt")
POLL = 0.5  # seconds


def project(target: Path) -> Path:
    """A copy of the workflow to run in; the demo is linked."""
    for name in ("pipeline", "workflow", "profiles", "calibrations", "tests/configs", "config"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "config.yaml"):
        shutil.copy(ROOT / name, target / name)
    (target / "demo").symlink_to(ROOT / "demo")
    return target


def start(folder: Path, config: str, *targets: str) -> subprocess.Popen:
    """A plain run, of everything or of some targets, in a process group of its own, whose output goes to `run.log`."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--configfile", config, "--", *targets]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with open(folder / "run.log", "w") as log:
        options = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        return subprocess.Popen(command, cwd=folder, env=environment, **options)


def jobs(folder: Path) -> list[psutil.Process]:
    """The stages that run in a folder, orphans too."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if command[1:2] == ["-m"] and command[2].startswith("pipeline.") and process.cwd() == str(folder.resolve()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, IndexError):
            continue
    return found


def outputs(process: psutil.Process) -> set[str]:
    """What Snakemake removes when this job is killed: its item, where it makes one; items of a batch are not among
    these."""
    try:
        command = process.cmdline()
    except psutil.NoSuchProcess:
        return set()
    first = command[command.index("--out") + 1]  # the item, or the stamp of a batch
    return set() if first.endswith(".json") else {first}


def finished(folder: Path) -> dict[str, int]:
    """Every file that holds numbers, with its inode: with another one it was written again. Times say nothing, because
    Snakemake touches. A link in `kept` sees to it that no inode is given away twice."""
    found, kept = {}, folder / "kept"
    kept.mkdir(exist_ok=True)
    for path in (path for kind in KINDS for path in folder.glob(f"results/**/[!.]*.{kind}")):
        with suppress(FileNotFoundError):
            inode = path.stat().st_ino
            with suppress(FileExistsError):
                os.link(path, kept / str(inode))
            found[str(path.relative_to(folder))] = inode
    return found


@dataclass
class Record:
    """What happened: faults by kind, starts of Snakemake, and finished files that were made again."""

    faults: Counter = field(default_factory=Counter)
    runs: int = 0
    again: list[str] = field(default_factory=list)


def disturbed(
    folder: Path, config: str, faults: int, random: random.Random, pause: float, record: Record, *targets: str
) -> None:
    """Run until all is made, with so many faults on the way, about `pause` seconds between two while jobs run.
    RuntimeError where a run that nothing happened to fails."""
    known: dict[str, int] = {}
    while True:
        run = start(folder, config, *targets)
        record.runs += 1
        hurt, lost, due = False, set(), None
        while run.poll() is None:
            time.sleep(POLL)
            if due is None and jobs(folder):
                due = time.monotonic() + random.uniform(0, 2 * pause)
            if record.faults.total() < faults and due is not None and time.monotonic() >= due:
                kind = random.choice(FAULTS)
                struck = strike(folder, run, kind, random)
                hurt, lost = hurt or struck is not None, lost | (struck or set())
                record.faults[kind] += struck is not None
                due = time.monotonic() + random.uniform(0, 2 * pause)
                print(f"{record.faults.total()}: {kind if struck is not None else 'no job to kill'}", flush=True)
            now = finished(folder)
            again = [path for path in known if now.get(path) != known[path] and path not in lost]
            if again:
                print(f"run {record.runs}: again: {' '.join(again)}", flush=True)
            record.again += again
            known = now
        if run.returncode == 0:
            return
        if not hurt:
            logs = "".join(path.read_text()[-2000:] for path in newest(folder))
            raise RuntimeError(f"A run that was left alone failed.\n{(folder / 'run.log').read_text()[-4000:]}\n{logs}")


def newest(folder: Path) -> list[Path]:
    """The last logs of jobs."""
    return sorted(folder.glob("results/logs/**/*.log"), key=lambda path: path.stat().st_mtime)[-2:]


def strike(folder: Path, run: subprocess.Popen, kind: str, random: random.Random) -> set[str] | None:
    """Do it. The files that may be made again for it, or None where there was nothing to strike."""
    running = jobs(folder)
    if kind == "job":
        if not running:
            return None
        victim = random.choice(running)
        lost = outputs(victim)
        end(victim)
        return lost
    lost = set().union(*map(outputs, running)) if kind != "orphans" else set()
    if kind in ("orphans", "all"):
        run.kill()
        run.wait()
        for process in running if kind == "all" else []:
            end(process)
    elif kind == "terminate":
        run.terminate()
    else:
        os.killpg(run.pid, signal.SIGINT)  # as Ctrl-C in a terminal
    return lost


def end(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def undisturbed(folder: Path, config: str, *targets: str) -> float:
    """A run that is left alone; its seconds."""
    began, run = time.monotonic(), start(folder, config, *targets)
    if run.wait():
        raise RuntimeError((folder / "run.log").read_text()[-4000:])
    return time.monotonic() - began


def differences(one: Path, other: Path) -> list[str]:
    """The results of which two folders do not hold the same numbers; tables to the byte."""
    tables = sorted({path.relative_to(one) for pattern in TABLES for path in one.glob(f"results/{pattern}")})
    found = [str(path) for path in tables if not same_bytes(one / path, other / path)]
    arrays = [path.relative_to(one) for path in one.glob("results/**/*.h5")]
    return found + [str(path) for path in arrays if not same_arrays(one / path, other / path)]


def same_bytes(one: Path, other: Path) -> bool:
    return other.exists() and one.read_bytes() == other.read_bytes()


def same_arrays(one: Path, other: Path) -> bool:
    if not other.exists():
        return False
    with h5py.File(one) as a, h5py.File(other) as b:
        if dict(a.attrs) != dict(b.attrs) or list(a) != list(b):
            return False
        return all(np.array_equal(a[name][:], b[name][:], equal_nan=a[name].dtype.kind == "f") for name in a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--config", default="config.yaml", help="relative to the project")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, help="seconds between faults, about (default: from the undisturbed run)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes from what it starts with &
    with tempfile.TemporaryDirectory() as scratch:
        calm, rough = (project(Path(scratch) / name) for name in ("calm", "rough"))
        seconds = undisturbed(calm, arguments.config)
        print(f"undisturbed: {seconds:.0f} s", flush=True)
        generator, record, rounds, began = random.Random(arguments.seed), Record(), 0, time.monotonic()
        while record.faults.total() < arguments.kills:
            for name in ("results", "kept"):
                shutil.rmtree(rough / name, ignore_errors=True)
            rounds += 1
            pause = arguments.pause or max(4, seconds / arguments.kills)
            disturbed(rough, arguments.config, arguments.kills, generator, pause, record)
            different = differences(calm, rough)
            print(f"round {rounds}: {record}; different: {different}", flush=True)
            if different or record.again:
                raise SystemExit(1)
    seconds = time.monotonic() - began
    print(f"{record.faults.total()} faults, {record.runs} runs, {rounds} rounds, {seconds:.0f} s: the same numbers")


if __name__ == "__main__":
    main()
