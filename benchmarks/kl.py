"""KL and cross-entropy of patched runs from the hidden states: ours against two plainer forms, and their errors.

`log-sums` takes log q - log p as the logit difference less the difference of two log-sums; `plain` is `kl_div` of two
log-softmaxes. Beside the time stands the largest relative error against float64 for a KL near 2e-7 and near 0.2 nats.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Options, Table, interleaved, ratios, scale
from pipeline import metrics
from pipeline.logits import Unembedding

RUNS = 7
CHUNK = 128  # tokens of the form `log-sums` at once


def run(options: Options) -> list[Table]:
    rounds = options.turns(7)
    small = table(128, 2048, 256 if options.small else 1024, rounds)
    return [small] if options.small else [small, table(768, 50257, 256, rounds)]


def table(width: int, vocabulary: int, tokens: int, rounds: int) -> Table:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, vocabulary, generator=generator) * 8 / width**0.5
    hidden = 0.5 * torch.randn(tokens, width, generator=generator)
    runs = [hidden + 0.05 * torch.randn(hidden.shape, generator=generator) for _ in range(RUNS)]
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    unembedding = Unembedding(lambda x: x, weight, torch.zeros(vocabulary))
    forms = {"ours": ours, "log-sums": log_sums, "plain": plain}
    times, _ = interleaved(
        {name: partial(form, hidden, runs, target, unembedding) for name, form in forms.items()}, rounds
    )
    rows = []
    for name, form in forms.items():
        small, large = (relative_error(form, size / 8, hidden[:256], target[:256], unembedding) for size in (1e-3, 1.0))
        rows.append(
            {
                "form": name,
                **ratios("form / ours", times[name], times["ours"]),
                **scale(times[name], "form"),
                "error at small KL": small,
                "error at large KL": large,
            }
        )
    caption = f"Forms of the KL: width {width}, vocabulary {vocabulary}, {tokens} tokens, {RUNS} runs, {rounds} rounds."
    return Table(caption, rows)


def ours(hidden: Tensor, runs: list[Tensor], target: Tensor, unembedding: Unembedding) -> Tensor:
    return metrics.patched_values(hidden, runs, target, unembedding)["kl"]


def log_sums(hidden: Tensor, runs: list[Tensor], target: Tensor, unembedding: Unembedding) -> Tensor:
    found = []
    for rows in torch.arange(len(hidden)).split(CHUNK):
        z = unembedding.products(hidden[rows])
        log_sum = z.logsumexp(-1, keepdim=True)
        p, top = (z - log_sum).exp(), z.argmax(-1)
        for run in runs:
            d = unembedding.difference(run[rows] - hidden[rows], z)
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
