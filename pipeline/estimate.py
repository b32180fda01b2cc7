"""What a study takes before anything of it runs: jobs, disk, memory and floating-point operations of every stage.

Arithmetic on the plan: no model is loaded. Operations are those of matrix products (2 for a multiplication and an
addition), disk is what the files hold, and memory that of the largest job. On the demo all are within a quarter of what
was measured (LOG.md). A corpus without `contexts` is measured by its file. Needs no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.hooks import RESIDUAL_SITES, Geometry, parse_hook
from pipeline.inputs import Corpus
from pipeline.jobs import Batch, Job
from pipeline.labels import parsed
from pipeline.plan import Plan

FLOAT = 4
# Characters of English text to a token, about, where nothing else says how long a corpus is.
CHARACTERS = 4.0
# Bytes of a row of a per-token table, compressed, as measured: without the columns of an SAE, and with them.
ROW, ROW_OF_SAE = 16, 30
# Rows of the sample that `moments` and `errors` keep.
SAMPLE = 16_384
# What a process holds beside weights, activations and logits, in bytes, by what it imports; as measured.
LIGHT, TORCH, SAE_LENS = 150e6, 450e6, 600e6
# Reverse and forward mode together cost about as much as so many passes.
CURVATURE = 4
# Stages of which each job runs a model or an SAE.
RUNS_A_MODEL = ("clean", "activations", "effects", "ablations", "compounds", "curvatures", "top_tokens", "checks")


@dataclass(frozen=True)
class Cost:
    """Bytes on disk, floating-point operations, and bytes of memory of one file's job."""

    disk: int | float = 0
    flop: int | float = 0
    memory: int | float = LIGHT


def tokens_of(corpus: Corpus) -> int:
    """How many tokens a corpus has: exactly where `contexts` or token ids say so, else by the size of its file; 0 for a
    dataset of unknown length."""
    if corpus.contexts is not None:
        return corpus.contexts * corpus.context
    if "path" not in corpus.source:
        return 0
    path = Path(corpus.source["path"])
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r", allow_pickle=False).size
    return int(path.stat().st_size / CHARACTERS)


def passes(geometry: Geometry, context: int, first: int = 0) -> float:
    """Floating-point operations of one token from block `first` to the logits."""
    d, heads = geometry.d_model, geometry.n_heads * geometry.d_head
    block = 2 * (4 * d * heads + 2 * d * geometry.d_mlp) + 4 * (context / 2) * heads
    return (geometry.n_layers - first) * block + 2 * d * geometry.d_vocab


def parameters(geometry: Geometry) -> int:
    d, heads = geometry.d_model, geometry.n_heads * geometry.d_head
    embeddings = (2 * geometry.d_vocab + geometry.n_ctx) * d
    return embeddings + geometry.n_layers * (4 * d * heads + 2 * d * geometry.d_mlp)


def cost(plan: Plan, job: Job) -> Cost:
    """One job's share; stages that are not named here are too small to count."""
    study, key, settings = plan.study, job.key, job.settings
    sae = study.saes.get(key.get("sae", ""))
    model = study.models.get(key.get("model") or settings.get("model", "") if sae is None else sae.model)
    if model is None or "corpus" not in key:
        return Cost(disk=FLOAT * parameters(model.geometry), memory=SAE_LENS) if job.stage == "weights" else Cost()
    g, corpus = model.geometry, study.corpora[key["corpus"]]
    tokens = tokens_of(corpus) / (study.shards if "shard" in key else 1)
    hook = sae.write if sae else parse_hook(key["hook"]) if "hook" in key else None
    width = hook.width(g) if hook else g.d_model
    at_work = FLOAT * parameters(g) + TORCH
    if job.stage == "tokens":
        return Cost(5 * tokens)
    if job.stage == "clean":
        return Cost(FLOAT * tokens * (g.d_model + 3), tokens * passes(g, corpus.context), at_work)
    if job.stage == "activations":
        stream = 0 if hook.site in RESIDUAL_SITES else g.d_model
        return Cost(FLOAT * tokens * (width + stream), 0.0, at_work)
    if job.stage in ("moments", "errors"):
        fit = 3 * width**2 if job.stage == "errors" else width**2
        return Cost(FLOAT * (min(SAMPLE, tokens) * width + fit), 2 * tokens * fit, LIGHT + 24 * width**2)
    if job.stage == "reconstructions":
        size = sae.d_sae * (sae.d_in + width)
        return Cost(FLOAT * tokens * (width + 7), 4 * tokens * size, SAE_LENS + FLOAT * size)
    if job.stage == "scores":
        return Cost(FLOAT * tokens * 7)
    if job.stage in ("effects", "ablations"):
        rows = _rows(settings, tokens, corpus)
        size = ROW_OF_SAE if sae else ROW
        return Cost(size * rows, rows * passes(g, corpus.context, hook.layer), at_work)
    if job.stage == "compounds":
        runs = len(settings["sets"]) * (len(settings["interventions"]) + 1)
        rows = runs * min(tokens, (settings["contexts"] or np.inf) * corpus.context / study.shards)
        return Cost(ROW * rows, rows * passes(g, corpus.context), at_work + SAE_LENS)
    if job.stage == "curvatures":
        rows = len(settings["interventions"]) * settings["contexts"] * corpus.context
        return Cost(2 * ROW * rows, CURVATURE * rows * passes(g, corpus.context, hook.layer), at_work)
    return Cost(memory=at_work if job.stage in RUNS_A_MODEL else LIGHT)


def _rows(settings: dict, tokens: int | float, corpus: Corpus) -> int | float:
    """How many rows a table of effects has: a row for each token, intervention and draw."""
    draws = settings.get("draws", 1)
    random = ("random", "resample", "real_difference", "shuffled")
    runs = sum(draws if any(part in parsed(label)[0] for part in random) else 1 for label in settings["interventions"])
    if settings.get("contexts") is not None:
        tokens = min(tokens, settings["contexts"] * corpus.context)
    if "positions" in settings:
        tokens = tokens / corpus.context * len(settings["positions"]) * (settings["horizon"] + 1)
    return runs * tokens


def rows(plan: Plan) -> Iterator[dict]:
    """A row per stage: its jobs, files, disk, operations, and the memory of its largest job."""
    jobs: dict[str, list[Job]] = {}
    for job in plan.jobs.values():
        jobs.setdefault(job.stage, []).append(job)
    for stage, made in jobs.items():
        costs = [cost(plan, job) for job in made]
        steps = {plan.step(job).path: plan.step(job) for job in made}
        flop = sum(each.flop for each in costs)
        if stage == "activations":
            flop = sum(_pass_of(plan, step) for step in steps.values())
        yield {
            "stage": stage,
            "jobs": len(steps),
            "files": len(made),
            "disk": sum(each.disk for each in costs),
            "flop": flop,
            "memory": max(each.memory for each in costs),
        }


def _pass_of(plan: Plan, step: Job | Batch) -> int | float:
    """One pass makes all hooks of a batch, up to the last."""
    key, study = step.jobs[0].key, plan.study
    corpus, geometry = study.corpora[key["corpus"]], study.models[key["model"]].geometry
    reached = max(parse_hook(job.key["hook"]).layer for job in step.jobs)
    below = passes(geometry, corpus.context) - passes(geometry, corpus.context, reached)
    return tokens_of(corpus) / study.shards * below


def text(plan: Plan) -> str:
    """The estimate as a table for people, with sums."""
    found = list(rows(plan))
    total = {name: sum(row[name] for row in found) for name in ("jobs", "files", "disk", "flop")}
    found.append({"stage": "all"} | total | {"memory": max(row["memory"] for row in found)})
    lines = [f"{'stage':16}{'jobs':>7}{'files':>8}{'disk':>11}{'FLOP':>10}{'memory of a job':>17}"]
    for row in found:
        flop = f"{row['flop']:.1e}" if row["flop"] else "-"
        lines.append(
            f"{row['stage']:16}{row['jobs']:>7}{row['files']:>8}{_size(row['disk']):>11}{flop:>10}"
            f"{_size(row['memory']):>17}"
        )
    guessed = [corpus.id for corpus in plan.study.corpora.values() if corpus.contexts is None]
    notes = [f"No `contexts` for {', '.join(guessed)}: a file is taken by its size, a dataset for nothing."]
    notes = notes if guessed else []
    return "\n".join([*lines, "", *_speeds(total["flop"]), *notes])


def _size(size: int | float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _speeds(flop: int | float) -> list[str]:
    """What the operations alone take at the speeds that are usual; start-up and everything else come on top."""
    kinds = {"two CPU cores at 0.3 TFLOP/s": 0.3e12, "a GPU at 50 TFLOP/s in float32": 50e12}
    return [f"Products alone: {flop / speed / 3600:.2g} h on {name}." for name, speed in kinds.items()]
