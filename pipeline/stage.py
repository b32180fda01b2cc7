"""How a stage is started: `python -m pipeline.<stage> --job JSON --in FILES --out FILES`."""

import argparse
import json
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline import fingerprint, store

log = logging.getLogger("faithful")


@dataclass(frozen=True)
class Call:
    """What a stage is asked to do. `inputs` are the files by role, each role's in the order of the plan."""

    key: dict[str, str]
    settings: dict
    inputs: dict[str, list[Path]]
    outputs: list[Path]
    fingerprint: str
    threads: int
    device: str

    def input(self, role: str) -> Path:
        (path,) = self.inputs[role]
        return path

    @property
    def output(self) -> Path:
        return self.outputs[0]


def run(stage: str, work: Callable[[Call], None]) -> None:
    """The `main` of every stage: read the command line, refuse stale code and stale inputs, do the work.

    A ValueError or OSError is a message for the user: it is printed without a traceback, and the exit status is 1.
    """
    arguments = _parser(stage).parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    job, began = json.loads(arguments.job), time.monotonic()
    try:
        work(_call(stage, job, arguments))
    except (ValueError, OSError) as error:
        log.error("error: %s", error)
        raise SystemExit(1) from None
    log.info("%s: done in %.1f s", stage, time.monotonic() - began)


def _parser(stage: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m pipeline.{stage}", description=f"The stage '{stage}'; started by Snakemake."
    )
    parser.add_argument("--job", required=True, help="the job as planned, in JSON")
    parser.add_argument(
        "--in", dest="inputs", nargs="*", default=[], type=Path, help="input files, in the order of the plan"
    )
    parser.add_argument("--out", dest="outputs", nargs="+", required=True, type=Path, help="output files")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="torch device")
    return parser


def _call(stage: str, job: dict, arguments: argparse.Namespace) -> Call:
    if job["stage"] != stage:
        raise ValueError(f"A job of the stage '{job['stage']}' was given to '{stage}'.")
    if fingerprint.code_digest(stage, frozenset(job["names"])) != job["code"]:
        raise ValueError(f"The source of '{stage}' changed after this job was planned. Run snakemake again.")
    if len(arguments.inputs) != len(job["inputs"]):
        raise ValueError(
            f"'{stage}' was given {len(arguments.inputs)} input files, but the job has {len(job['inputs'])}."
        )
    inputs = defaultdict(list)
    for (role, expected), path in zip(job["inputs"], arguments.inputs, strict=True):
        if not path.exists():
            raise ValueError(f"The input '{path}' of '{stage}' is missing. Run snakemake again to make it.")
        found = store.read_fingerprint(path)
        if found != expected:
            raise ValueError(
                f"{path} has the fingerprint {found}, expected {expected}: it was made with other "
                "settings. Delete it and run again."
            )
        inputs[role].append(path)
    return Call(
        job["key"],
        job["settings"],
        dict(inputs),
        arguments.outputs,
        job["fingerprint"],
        arguments.threads,
        arguments.device,
    )
