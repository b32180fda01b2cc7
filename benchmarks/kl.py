"""KL and cross-entropy of patched runs: ours against two plainer forms, interleaved, as ratios of CPU time.

    python benchmarks/kl.py            # vocabularies of the demo and of GPT-2
    python benchmarks/kl.py --small    # a second or two, to see that it still runs

`log-sums` takes log q - log p as the logit difference less the difference of two log-sums; `plain` is `kl_div` of two
log-softmaxes. Beside the time stands the largest relative error against float64 for a KL near 2e-7 and near 0.2 nats.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import metrics
from pipeline.decoder import Unembedding

RUNS = 7


def ours(hidden: Tensor, runs: list[Tensor], target: Tensor, unembedding: Unembedding) -> Tensor:
    return metrics.patched_values(hidden, runs, target, unembedding)["kl"]


def log_sums(hidden: Tensor, runs: list[Tensor], target: Tensor, unembedding: Unembedding) -> Tensor:
    found = []
    for rows in torch.arange(len(hidden)).split(metrics.CHUNK_TOKENS):
        z = unembedding.products(hidden[rows])
        log_sum = z.logsumexp(-1, keepdim=True)
        p, top = (z - log_sum).exp(), z.argmax(-1)
        for run in runs:
            d = unembedding.difference(hidden[rows], run[rows], z)
            logits = z + d
            q_sum = logits.logsumexp(-1, keepdim=True)
            x = d - (q_sum - log_sum)
            series = p * x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720))))
            found.append(torch.where(x.abs() < 0.3, series, (logits - q_sum).exp() - p - p * x).sum(-1))
            _ = (q_sum - log_sum).squeeze(-1) - d.gather(-1, target[rows, None]).squeeze(-1), logits.argmax(-1) == top
    return torch.stack(found).view(-1, len(runs), found[0].shape[0]).transpose(0, 1).flatten(1)


def plain(hidden: Tensor, runs: list[Tensor], target: Tensor, unembedding: Unembedding) -> Tensor:
    clean = unembedding.products(hidden).log_softmax(-1)
    found = []
    for run in runs:
        patched = unembedding.products(run).log_softmax(-1)
        found.append(F.kl_div(patched, clean, log_target=True, reduction="none").sum(-1))
        _ = -patched.gather(-1, target[:, None]), patched.argmax(-1) == clean.argmax(-1)
    return torch.stack(found)


def relative_error(form: Callable, size: float, hidden: Tensor, target: Tensor, unembedding: Unembedding) -> float:
    other = hidden + size * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    p, q = ((h.double() @ unembedding.W_U.double()).log_softmax(-1) for h in (hidden, other))
    expected = (p.exp() * (torch.expm1(q - p) - (q - p))).sum(-1)
    chosen = expected > 1e-7
    found = form(hidden, [other], target, unembedding)[0].double()
    return ((found - expected).abs() / expected)[chosen].max().item()


def measure(width: int, vocabulary: int, tokens: int, repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, vocabulary, generator=generator) * 8 / width**0.5
    hidden = 0.5 * torch.randn(tokens, width, generator=generator)
    runs = [hidden + 0.05 * torch.randn(hidden.shape, generator=generator) for _ in range(RUNS)]
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    unembedding = Unembedding(lambda x: x, weight, torch.zeros(vocabulary), 0.0)
    forms = {"ours": ours, "log-sums": log_sums, "plain": plain}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for repeat in range(repeats + 1):
        for name, form in forms.items():
            began = time.process_time()
            form(hidden, runs, target, unembedding)
            if repeat:  # the first round warms up
                seconds[name].append(time.process_time() - began)
    print(f"width {width}, vocabulary {vocabulary}, {tokens} tokens, {RUNS} runs, {repeats} rounds:")
    for name, form in forms.items():
        ratio = median(other / mine for other, mine in zip(seconds[name], seconds["ours"], strict=True))
        errors = [relative_error(form, size / 8, hidden[:256], target[:256], unembedding) for size in (1e-3, 1.0)]
        shown = f"error {errors[0]:.0e} at small KL, {errors[1]:.0e} at large"
        print(f"  {name:9} {ratio:5.2f} x our CPU time   {shown}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="only see that it runs")
    small = parser.parse_args().small
    torch.set_num_threads(1)
    with torch.inference_mode():
        measure(128, 2048, 256 if small else 1024, 1 if small else 9)
        if not small:
            measure(768, 50257, 256, 5)


if __name__ == "__main__":
    main()
