"""The benchmark suite of the substitution engine, as one command: prints its tables, and keeps them.

    python -m benchmarks.run                        # everything; half an hour on two cores
    python -m benchmarks.run --small                # tiny sizes, under a minute, to see that everything still runs
    python -m benchmarks.run --only single storage  # some parts

The tables go to results/benchmarks/engine.md and .json, those of --small to engine-small; parts that did not run now
stay as they were. Each carries the machine it was measured on.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from datetime import date
from importlib import import_module
from pathlib import Path

if "--small" in sys.argv:  # where others use the cores, threads that wait for each other would spin for a minute
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from benchmarks.measure import ROOT, Options, Table, machine

PARTS = ("all_tokens", "demo", "single", "memory", "storage", "startup", "kl")
FOLDER = ROOT / "results" / "benchmarks"


def main() -> None:
    options, parts = _arguments()
    torch.set_num_threads(options.threads)
    path = FOLDER / ("engine-small.json" if options.small else "engine.json")
    for name in parts:
        print(f"# {name}\n", flush=True)
        load = os.getloadavg()[0]
        with torch.inference_mode():
            tables = import_module(f"benchmarks.{name}").run(options)
        for table in tables:
            print(table.markdown() + "\n", flush=True)
        _keep(path, name, machine(options.threads, load), tables)


def _arguments() -> tuple[Options, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny sizes: only see that it runs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, help="rounds of every comparison, instead of each part's own number")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads, all cores if not given")
    parser.add_argument(
        "--layers", nargs="+", type=int, metavar="N", help="layers of all_tokens, every one if not given"
    )
    given = parser.parse_args()
    return Options(given.small, given.rounds, given.threads, given.layers), given.only


def _keep(path: Path, part: str, made_on: dict[str, object], tables: list[Table]) -> None:
    """Put a part's tables among those that are kept already, as JSON and as Markdown."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found[part] = {
        "date": date.today().isoformat(),
        "machine": made_on,
        "tables": [asdict(table) for table in tables],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(_page(found), encoding="utf-8")


def _page(found: dict[str, dict]) -> str:
    lines = ["# Benchmarks of the engine", "", "Ratios are medians over rounds in which the forms take turns."]
    for part in PARTS:
        if part in found:
            made_on = ", ".join(f"{name} {value}" for name, value in found[part]["machine"].items())
            lines += ["", f"## {part}", "", f"{found[part]['date']}; {made_on}"]
            lines += [line for table in found[part]["tables"] for line in ("", Table(**table).markdown())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
