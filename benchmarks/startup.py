"""Seconds until a job works: imports, weights, and the first micro-batch, each in a process of its own."""

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from benchmarks import demo, shapes
from benchmarks.measure import ROOT, Options, Table, Time, scale
from pipeline import models

LOAD = "from pathlib import Path; from pipeline import models; weights = models.load(Path({path!r})); "
TOUCH = "[tensor.sum() for tensor in weights.state.values()]"  # loading maps the file, and reads it here
FIRST = """
import torch
from pipeline import effects, engine
from pipeline.decoder import decoder
from pipeline.hooks import Hook
subject, tokens, hook = decoder(weights), torch.ones(8, 128, dtype=torch.long), Hook(3, "hook_resid_pre")
with torch.inference_mode():
    ((x, stream),) = subject.read(tokens, [hook])
    batch = engine.Batch(0, 8, tokens, tokens == 0, subject.clean(tokens))
    engine.Substitution(subject).effects(batch, [(engine.Site(hook, x, stream), 0.9 * x + 0.1 * x.flip(1))])
"""


def run(options: Options) -> list[Table]:
    with tempfile.TemporaryDirectory() as folder:
        path, own = Path(folder) / "gpt2.safetensors", Path(folder) / "demo.safetensors"
        models.save(shapes.weights_of(shapes.random_model(options.small)), path, "")
        models.save(models.load_folder(ROOT / "demo" / "model", demo.PROCESSING), own, "")
        codes = {
            "python": "pass",
            "import torch": "import torch",
            "import pipeline.effects": "import pipeline.effects",
            "import sae_lens": "import sae_lens",
            f"import pipeline.models, load {path.stat().st_size / 1e6:.0f} MB": LOAD.format(path=str(path)) + TOUCH,
            "first micro-batch of the demo's model": LOAD.format(path=str(own)) + FIRST,
        }
        times: dict[str, list[Time]] = {name: [] for name in codes}
        for _ in range(1 if options.small else options.turns(5)):
            for name, code in codes.items():
                times[name].append(_child(code, options.threads))
    torch_cpu = median(each.cpu for each in times["import torch"])
    rows = [
        {"what": name, "CPU / import torch": median(each.cpu for each in found) / torch_cpu, **scale(found, "process")}
        for name, found in times.items()
    ]
    tables = [Table("Start-up: the whole life of a process, bytecode and compiled loops from their caches.", rows)]
    jobs = list(_jobs())
    caption = "Start-up of the demo's jobs in the last run of the workflow: the share before the stage's own work."
    if not jobs:
        caption = "Start-up of the demo's jobs: skipped, as results/ holds no finished jobs with logs."
    return [*tables, Table(caption, jobs)]


def _child(code: str, threads: int) -> Time:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    setting = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=setting, check=True, capture_output=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Time(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall)


def _jobs() -> Iterator[dict[str, object]]:
    """Stage by stage: what Snakemake measured of its jobs, and what their logs say that the work took."""
    for stage in ("clean", "activations", "reconstructions", "ablations", "effects"):
        whole = work = 0.0
        count = 0
        for log in sorted((ROOT / "results" / "logs" / stage).rglob("*.log")):
            done = re.search(r"done in ([\d.]+) s", log.read_text(encoding="utf-8"))
            measured = (ROOT / "results" / "benchmarks" / log.relative_to(ROOT / "results" / "logs")).with_suffix(
                ".tsv"
            )
            if done and measured.exists():
                count, work = count + 1, work + float(done[1])
                whole += float(measured.read_text().splitlines()[1].split("\t")[0])
        if count:
            yield {"stage": stage, "jobs": count, "wall s": whole, "before the work": (whole - work) / whole}
