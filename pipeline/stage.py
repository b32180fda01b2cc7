"""How a stage is started: `python -m pipeline.<stage> --out FILES`, with the job as JSON on its standard input.

The job is a list of items as planned, each with its settings, its inputs with their fingerprints, and its file. It is
no argument, which Linux limits to 128 kB: a table names every shard. Most stages make one item a job; those that pay
much for starting make several (`run_batch`).
"""

import argparse
import json
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import fingerprint, locks, seals, store

log = logging.getLogger("faithful")


@dataclass(frozen=True)
class Call:
    """What a stage is asked to make. `inputs` are the files by role, each role's in the order of the plan. `family` is
    the fingerprint of all but the number of draws: what items have in common that differ in nothing else."""

    key: dict[str, str]
    settings: dict
    inputs: dict[str, list[Path]]
    outputs: list[Path]
    fingerprint: str
    threads: int
    device: str
    budget: int
    family: str = ""

    def input(self, role: str) -> Path:
        (path,) = self.inputs[role]
        return path

    @property
    def output(self) -> Path:
        return self.outputs[0]

    @property
    def name(self) -> str:
        """The item in a few words, for messages."""
        return " ".join(self.key.values())


def run(stage: str, work: Callable[[Call], None]) -> None:
    """The `main` of a stage that makes one item: read the command line, refuse stale code and stale inputs, do the
    work."""

    def one(items: list[dict], arguments: argparse.Namespace, waited: bool) -> None:
        (item,) = items
        whole = all(path.exists() for path in arguments.outputs)
        if waited and whole and store.is_current(Path(item["path"]), item["fingerprint"]):
            log.info("%s: made by the other process", stage)
            return
        work(replace(_call(stage, item, arguments), outputs=arguments.outputs))

    _main(stage, one)


def run_batch(stage: str, work: Callable[[list[Call]], None]) -> None:
    """The `main` of a stage that makes several items: those whose file is current are left alone, and the stamp is
    written when all are there.

    Where the work on several fails, each is tried alone, so that one bad SAE does not stop the others.
    """

    def several(items: list[dict], arguments: argparse.Namespace, waited: bool) -> None:
        pending = [item for item in items if _is_pending(item)]
        log.info("%s: %d of %d items to make", stage, len(pending), len(items))
        calls = [_call(stage, item, arguments) for item in pending]
        try:
            if calls:
                work(calls)
        except ValueError as error:
            if len(calls) == 1:
                raise
            log.error("error: %s", error)
            _one_by_one(calls, work)
        stamp = json.dumps({item["path"]: item["fingerprint"] for item in items}, indent=1)
        store.write_text(arguments.outputs[0], stamp + "\n")

    _main(stage, several)


def _is_pending(item: dict) -> bool:
    """Whether an item's file has to be made: that of one to be dropped only while something needs it."""
    made = store.is_current(Path(item["path"]), item["fingerprint"])
    return not made and not (item["needed_by"] and _all_made(item["needed_by"]))


def _all_made(marks: list[list[str]]) -> bool:
    return all(store.is_current(Path(path), mark) for path, mark in marks)


def drop(items: list[dict]) -> None:
    """Remove those inputs of the items that are to be dropped and that nothing needs any more."""
    needed_by = {path: marks for item in items for path, marks in item["drop"]}
    for path, marks in needed_by.items():
        if Path(path).exists() and _all_made(marks):
            Path(path).unlink(missing_ok=True)
            log.info("dropped %s, which nothing needs any more", path)


def _one_by_one(calls: list[Call], work: Callable[[list[Call]], None]) -> None:
    failed = []
    for call in calls:
        if not store.is_current(call.output, call.fingerprint):
            log.info("now alone: %s", call.name)
            try:
                work([call])
            except ValueError as error:
                failed.append(f"{call.name}: {error}")
    if failed:
        raise ValueError("\n".join(failed))


def _main(stage: str, work: Callable[[list[dict], argparse.Namespace, bool], None]) -> None:
    """A ValueError or OSError is a message for the user: it is printed without a traceback, and the exit status is
    1."""
    arguments = _parser(stage).parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    items, began = json.load(sys.stdin), time.monotonic()
    try:
        with locks.alone(Path(item["path"]) for item in items) as waited:
            work(items, arguments, waited)
        drop(items)
    except (ValueError, OSError) as error:
        log.error("error: %s", error)
        raise SystemExit(1) from None
    log.info("%s: done in %.1f s", stage, time.monotonic() - began)


def _parser(stage: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m pipeline.{stage}", description=f"The stage '{stage}'; started by Snakemake."
    )
    parser.add_argument("--out", dest="outputs", nargs="+", required=True, type=Path, help="output files")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--budget", type=int, default=256, help="memory for logits, in MiB")
    return parser


def _call(stage: str, item: dict, arguments: argparse.Namespace) -> Call:
    if item["stage"] != stage:
        raise ValueError(f"A job of the stage '{item['stage']}' was given to '{stage}'.")
    if fingerprint.code_digest(stage, frozenset(item["names"])) != item["code"]:
        raise ValueError(f"The source of '{stage}' changed after this job was planned. Run snakemake again.")
    return Call(
        item["key"],
        item["settings"],
        _inputs(stage, item["inputs"]),
        [Path(item["path"])],
        item["fingerprint"],
        arguments.threads,
        arguments.device,
        arguments.budget,
        _family(item),
    )


def _family(item: dict) -> str:
    settings = {name: value for name, value in item["settings"].items() if name != "draws"}
    upstream = [[role, expected] for role, _, expected in item["inputs"]]
    return fingerprint.digest([item["stage"], item["key"], settings, item["code"], upstream])


def _inputs(stage: str, planned: list[list[str]]) -> dict[str, list[Path]]:
    inputs = defaultdict(list)
    for role, name, expected in planned:
        path = Path(name)
        if not path.exists():
            raise ValueError(f"The input '{path}' of '{stage}' is missing. Run snakemake again to make it.")
        found = store.read_fingerprint(path)
        if found != expected:
            raise ValueError(
                f"{path} has the fingerprint {found}, expected {expected}: it was made with other "
                "settings. Delete it and run again."
            )
        if path.suffix != ".h5":  # whose chunks are checked when they are read
            seals.verified(path)
        inputs[role].append(path)
    return dict(inputs)
