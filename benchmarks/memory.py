"""Peak resident memory over the model's own weights, each case in a process of its own.

The rise of VmHWM, which is set back when the weights are in place and a run of a few tokens has loaded the code.
"""

import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import ROOT, Options, Table, Time, timed
from pipeline import engine, models
from pipeline.decoder import Decoder, decoder
from pipeline.hooks import Hook
from pipeline.types import Acts, Tokens

INTERVENTIONS = (9, 27)
MANY = 3  # interventions where it is the tokens that grow


@dataclass(frozen=True)
class Case:
    """`batches` micro-batches of 8 sequences at the last layer, with some interventions."""

    way: str
    weights: str
    batches: int
    interventions: int
    threads: int


def run(options: Options) -> list[Table]:
    from benchmarks import shapes

    shape = shapes.SMALL if options.small else shapes.GPT2
    grown, plainly = ((2, 8), (2,)) if options.small else ((2, 8, 32), (2, 8))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        models.save(shapes.weights_of(shapes.random_model(options.small)), path, "")
        measured = partial(_measured, path, options.threads)
        interventions = [
            measured(way, 1, count) for count in (INTERVENTIONS[:1] if options.small else INTERVENTIONS) for way in WAYS
        ]
        tokens = [measured("ours", count, MANY) for count in grown] + [measured("plain", n, MANY) for n in plainly]
    for row in tokens:
        first = next(each for each in tokens if each["form"] == row["form"])
        per_batch, of_first = (each["CPU s"] / each["micro-batches"] for each in (row, first))
        row["CPU per token / that of the first"] = per_batch / of_first
    where = f"last of {shape['n_layers']} layers, d {shape['d_model']}, vocabulary {shape['d_vocab']}"
    weights = "Peak memory over the model's own weights"
    return [
        Table(f"{weights}, by the number of interventions on 8 x 128 tokens; {where}.", interventions),
        Table(f"{weights}, by the number of micro-batches of 8 x 128 tokens; {MANY} interventions, {where}.", tokens),
    ]


def _measured(path: Path, threads: int, way: str, batches: int, interventions: int) -> dict[str, object]:
    case = Case(way, str(path), batches, interventions, threads)
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", json.dumps(asdict(case))],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    mebibytes, cpu, wall = json.loads(found.stdout.splitlines()[-1])
    return {
        "form": way,
        "micro-batches": batches,
        "interventions": interventions,
        "rise, MiB": mebibytes,
        "CPU s": cpu,
        "wall s": wall,
    }


def measure(case: Case) -> tuple[float, Time]:
    """The rise of the peak in MiB, and the time, of one case in this process."""
    weights = models.load(Path(case.weights))
    hook = Hook(weights.layers - 1, "hook_resid_pre")
    length, vocabulary = weights.settings["n_ctx"], weights.settings["d_vocab"]
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(vocabulary, (8, length), generator=generator) for _ in range(case.batches)]
    work = WAYS[case.way](weights, hook)
    del weights
    work(batches[0][:2, :8], 2)
    with suppress(OSError):  # not on every kernel; the peak is then that of loading, and the rise a lower bound
        Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    time_taken, _ = timed(lambda: [work(tokens, case.interventions) for tokens in batches])
    return _peak() - before, time_taken


def _ours(weights: models.Weights, hook: Hook):
    subject = decoder(weights)

    def work(tokens: Tokens, count: int) -> dict[str, torch.Tensor]:
        batch, site = _stored(subject, tokens, hook)
        patches = ((site, _x_new(site.x, i)) for i in range(count))
        return engine.Substitution(subject).effects(batch, patches)

    return work


def _plain(weights: models.Weights, hook: Hook):
    from benchmarks import shapes
    from pipeline.hooked import Hooked

    model = Hooked(weights).model

    def work(tokens: Tokens, count: int) -> dict[str, torch.Tensor]:
        x = model.run_with_cache(tokens, names_filter=[hook.name], stop_at_layer=hook.layer + 1)[1][hook.name]
        return shapes.plain(model, tokens, hook.name, (shapes.writing(_x_new(x, i)) for i in range(count)))

    return work


WAYS = {"ours": _ours, "plain": _plain}


def _stored(subject: Decoder, tokens: Tokens, hook: Hook) -> tuple[engine.Batch, engine.Site]:
    ((x, stream),) = subject.read(tokens, [hook])
    kept = torch.zeros_like(tokens, dtype=torch.bool)
    return engine.Batch(0, len(tokens), tokens, kept, subject.clean(tokens)), engine.Site(hook, x, stream)


def _x_new(x: Acts, seed: int) -> Acts:
    return x + 0.2 * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def _peak() -> float:
    """The peak so far of this process's resident memory, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def main() -> None:
    """One case, started by `run`."""
    case = Case(**json.loads(sys.argv[1]))
    torch.set_num_threads(case.threads)
    with torch.inference_mode():
        mebibytes, time_taken = measure(case)
    print(json.dumps([mebibytes, time_taken.cpu, time_taken.wall]))


if __name__ == "__main__":
    main()
