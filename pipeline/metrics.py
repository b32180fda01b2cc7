"""KL, cross-entropy and top-1 agreement of patched runs against the clean run, per token, in nats.

Nothing of shape `seq pos v` is ever held: the work goes over chunks of tokens, and a chunk's clean logits serve every
run. Each run costs one product with W_U and one compiled pass over the vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from pipeline import rows, workers
from pipeline.logits import Unembedding
from pipeline.types import Hidden, Logits, TokenValues

# Memory for the logits of the chunks in work, in MiB, where the caller does not say.
BUDGET = 256
# Tokens per chunk, at most: on a CPU more would leave the cache, on a GPU more gains nothing.
MOST_TOKENS = {"cpu": 256, "cuda": 4096}
# Below this the plain e^x - 1 - x has lost digits, and the series is used for small x (see `excess`).
SMALL = 1e-2
# Below this |x| six terms of the series are exact to float32; above it the plain form is.
SERIES_LIMIT = 0.3


@dataclass(frozen=True)
class Fixed:
    """A patched run of which several sequences are the same: the hidden states of the distinct ones, `token d_model`,
    and which of them each sequence is."""

    hidden: Hidden
    which: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return len(self.hidden) // (max(self.which) + 1)


@dataclass(frozen=True)
class Clean:
    """The clean distribution P at some tokens, kept while every run is compared with it."""

    hidden: Hidden
    products: Logits | None  # before the soft cap, where there is one
    probability: Logits  # up to a factor for each token, so that the largest is 1
    total: Tensor  # token: the sum of `probability`
    top1: Tensor  # token
    target: Tensor  # token: the next token
    cross_entropy: TokenValues  # -log P[target]

    @classmethod
    def of(cls, hidden: Hidden, target: Tensor, unembedding: Unembedding, out: Tensor | None = None) -> "Clean":
        products = unembedding.products(hidden, out=None if unembedding.soft_cap else out)
        logits = unembedding.logits(products)
        products = products if unembedding.soft_cap else None
        at_target = logits.gather(-1, target[:, None]).squeeze(-1)
        largest, top1 = logits.max(-1)
        if workers.compiled(hidden):
            p, total = logits, torch.empty_like(largest)
            rows.clean_rows(*_numpy(p, largest, total))
        else:
            p = (logits - largest[:, None]).exp_()
            total = p.sum(-1)
        return cls(hidden, products, p, total, top1, target, largest + total.log() - at_target)

    def entropy(self) -> TokenValues:
        """-sum_v P log P."""
        return torch.special.entr(self.probability).sum(-1) / self.total + self.total.log()


def excess(p: Logits, x: Logits) -> TokenValues:
    """sum_v p (e^x - 1 - x): not negative, and 0 for x = 0.

    Where the sum is small, e^x - 1 - x would cancel, and its series x²/2 + x³/6 + ... + x⁶/720 takes its place.
    """
    total = torch.linalg.vecdot(p, x.expm1().sub_(x))
    series = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720))))
    terms = torch.where(x.abs() < SERIES_LIMIT, series, x.expm1() - x)
    return torch.where(total < SMALL, torch.linalg.vecdot(p, terms), total)


def tensor_form(p: Logits, d: Logits, total: Tensor, top1: Tensor) -> tuple[TokenValues, TokenValues, Tensor]:
    """What `rows.patched_rows` computes, for rows of `p` beside those of `d`, on any device and in any precision."""
    p = p / total[:, None]
    mean = torch.linalg.vecdot(p, d)
    x = d - mean[:, None]
    kl = excess(p, x).log1p()
    q = p * x.exp()
    return kl, mean, q.gather(-1, top1[:, None]).squeeze(-1) >= q.amax(-1)


@cache
def _tensor_form(device: str) -> Callable:
    """`tensor_form`, fused into a few kernels by PyTorch's compiler on a GPU."""
    return torch.compile(tensor_form, dynamic=True) if device == "cuda" else tensor_form


def compare(clean: Clean, d: Logits, at: Tensor, unembedding: Unembedding) -> tuple[TokenValues, TokenValues, Tensor]:
    """KL(P || Q), cross-entropy of Q and whether the top tokens agree, for rows `d` of logit differences; row i
    belongs to the clean token `at[i]`.

    The difference comes from the product of the difference of the hidden states, so that a small change keeps all its
    digits. With x = d - sum_v p d, the mean of x under P is 0, and

        KL(P || Q) = log sum_v p e^d - sum_v p d = log(1 + sum_v p (e^x - 1 - x)),

    whose terms are all >= 0: nothing cancels, and no log-sum of Q is needed. An error in the mean enters squared only.
    Relative error against float64 below 1e-5 from 1e-7 to 100 nats, never negative, and 0 where Q = P.
    """
    if workers.compiled(d):
        kl, mean = torch.empty(len(d)), torch.empty(len(d))
        agrees = torch.empty(len(d), dtype=torch.bool)
        rows.patched_rows(*_numpy(d, at, clean.probability, clean.total, clean.top1, kl, mean, agrees))
    else:
        # `at` repeats the clean tokens in order, so that views do instead of copies.
        parts = [
            _tensor_form(d.device.type)(
                clean.probability[: len(part)], part, clean.total[: len(part)], clean.top1[: len(part)]
            )
            for part in d.split(len(clean.top1))
        ]
        kl, mean, agrees = (torch.cat(column) for column in zip(*parts, strict=True))
    huge = (~kl.isfinite()).nonzero().squeeze(-1)
    if len(huge):  # the KL is large, and is summed as logarithms
        log_p = unembedding.logits(unembedding.products(clean.hidden[at[huge]])).log_softmax(-1)
        log_q = log_p + d[huge]
        mean[huge] = torch.linalg.vecdot(log_p.exp(), d[huge])
        kl[huge] = (log_q.logsumexp(-1) - mean[huge]).clamp_min(0)
        agrees[huge] = log_q.gather(-1, clean.top1[at[huge], None]).squeeze(-1) >= log_q.amax(-1)
    gain = d.gather(-1, clean.target[at, None]).squeeze(-1) - mean
    return kl, clean.cross_entropy[at] + (kl - gain), agrees


def clean_values(hidden: Hidden, target: Tensor, unembedding: Unembedding, budget: int = BUDGET) -> dict[str, Tensor]:
    """`ce`, `entropy` (nats) and `top1` (a token id) of the clean run, each ` token`."""

    def work(part: slice, space: _Workspace) -> tuple[Tensor, ...]:
        clean = Clean.of(hidden[part], target[part], unembedding, space.logits(hidden[part]))
        return clean.cross_entropy, clean.entropy(), clean.top1

    chunks = _chunks(hidden, unembedding, budget)
    found = _run(work, [(part,) for part in chunks], hidden, unembedding, chunks[0].stop)
    return dict(zip(("ce", "entropy", "top1"), map(torch.cat, zip(*found, strict=True)), strict=True))


def patched_values(
    hidden: Hidden,
    patched: Sequence[Hidden | Fixed],
    target: Tensor,
    unembedding: Unembedding,
    budget: int = BUDGET,
) -> dict[str, Tensor]:
    """`kl`, `ce` (nats) and `top1_agrees` of several patched runs against one clean run, each `run token`.

    A run is `token d_model`, or `Fixed` where it is the same for every sequence. Where tokens are few, several runs
    share a product. `budget` is the memory for logits, in MiB.
    """
    chunks = _chunks(hidden, unembedding, budget)
    rows = chunks[0].stop
    together = max(1, _most_tokens(hidden, unembedding, budget) // rows) if len(chunks) == 1 else 1
    fixed = {id(run): _FixedLogits.of(run, unembedding) for run in patched if isinstance(run, Fixed)}

    def work(part: slice, runs: Sequence[Hidden | Fixed], space: _Workspace) -> tuple[Tensor, ...]:
        clean = Clean.of(hidden[part], target[part], unembedding, space.logits(hidden[part]))
        values = []
        for group in _groups(runs, together):
            if isinstance(group[0], Fixed):
                columns = fixed[id(group[0])].compare(clean, part.start, unembedding, space)
            else:
                change = torch.cat([run[part] - clean.hidden for run in group])
                at = torch.arange(len(clean.top1), device=hidden.device).repeat(len(group))
                products = None if clean.products is None else clean.products.repeat(len(group), 1)
                columns = compare(
                    clean, unembedding.difference(change, products, space.difference(change)), at, unembedding
                )
            values.append([column.view(len(group), -1) for column in columns])
        return tuple(torch.cat(column) for column in zip(*values, strict=True))

    shares = _shares(patched, 1 if len(chunks) >= workers.count(hidden) else workers.count(hidden))
    found = _run(work, [(part, share) for part in chunks for share in shares], hidden, unembedding, together * rows)
    by_chunk = [found[i : i + len(shares)] for i in range(0, len(found), len(shares))]
    whole = [[torch.cat(column) for column in zip(*share, strict=True)] for share in by_chunk]
    kl, ce, agrees = (torch.cat(column, dim=1) for column in zip(*whole, strict=True))
    return {"kl": kl, "ce": ce, "top1_agrees": agrees}


@dataclass(frozen=True)
class _FixedLogits:
    """What is needed of a run with few distinct sequences: log Q, and the row of it for every token."""

    log_q: Logits
    top1: Tensor
    row: Tensor
    length: int

    @classmethod
    def of(cls, run: Fixed, unembedding: Unembedding) -> "_FixedLogits":
        logits = unembedding.logits(unembedding.products(run.hidden))
        rows = torch.arange(len(logits), device=logits.device).view(-1, run.length)[list(run.which)].flatten()
        return cls(logits.sub_(logits.logsumexp(-1, keepdim=True)), logits.argmax(-1), rows, run.length)

    def compare(
        self, clean: Clean, first: int, unembedding: Unembedding, space: "_Workspace"
    ) -> tuple[TokenValues, TokenValues, Tensor]:
        """As the function `compare`, for clean tokens that begin at the token `first` of whole sequences."""
        # Where P is 0, its logarithm does not matter, but must be a number.
        d = torch.log(clean.probability, out=space.difference(clean.hidden)).clamp_min_(-88.0)
        rows = self.row[first : first + len(d)]
        start = 0
        while start < len(d):  # a piece for each sequence that the chunk touches, whose rows follow each other
            piece = d[start : start + self.length - (first + start) % self.length]
            torch.sub(self.log_q[rows[start] : rows[start] + len(piece)], piece, out=piece)
            start += len(piece)
        kl, _, _ = compare(clean, d, torch.arange(len(d), device=d.device), unembedding)
        return kl, -self.log_q[rows, clean.target], self.top1[rows] == clean.top1


@dataclass
class _Workspace:
    """Buffers for one worker's logits, so that no chunk pays for fresh memory. None under a cap, or in tensor form."""

    buffers: list[Tensor]

    @classmethod
    def of(cls, rows: int, like: Hidden, unembedding: Unembedding) -> "_Workspace":
        made = workers.compiled(like) and not unembedding.soft_cap
        return cls([torch.empty(rows, unembedding.W_U.shape[1]) for _ in range(2)] if made else [])

    def logits(self, hidden: Hidden) -> Logits | None:
        return self.buffers[0][: len(hidden)] if self.buffers else None

    def difference(self, change: Hidden) -> Logits | None:
        return self.buffers[1][: len(change)] if self.buffers else None


def _most_tokens(hidden: Hidden, unembedding: Unembedding, budget: int) -> int:
    """Tokens of a chunk that the budget allows, at least one."""
    # Of the size of a chunk's logits: two in the compiled loops, about six in tensor form, and more under a cap.
    buffers = (2 if workers.compiled(hidden) else 6) + 4 * bool(unembedding.soft_cap)
    row = buffers * workers.count(hidden) * unembedding.W_U.shape[1] * hidden.element_size()
    return max(1, min(budget * 2**20 // row, MOST_TOKENS[hidden.device.type]))


def _chunks(hidden: Hidden, unembedding: Unembedding, budget: int) -> list[slice]:
    """Tokens in pieces that the budget allows, alike in size, and as many as there are workers where they suffice."""
    least = 32  # fewer rows make slow products
    pieces = max(-(-len(hidden) // _most_tokens(hidden, unembedding, budget)), 1)
    pieces = max(pieces, min(workers.count(hidden), len(hidden) // least))
    size = -(-len(hidden) // pieces)
    return [slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size)]


def _groups(runs: Sequence[Hidden | Fixed], together: int) -> Iterator[Sequence[Hidden | Fixed]]:
    """Runs that share a product: up to `together` of them, and those that are fixed alone."""
    group: list[Hidden] = []
    for run in runs:
        if group and (isinstance(run, Fixed) or len(group) == together):
            yield group
            group = []
        if isinstance(run, Fixed):
            yield [run]
        else:
            group.append(run)
    if group:
        yield group


def _shares(runs: Sequence, count: int) -> list[Sequence]:
    """The runs in order, in `count` parts or fewer."""
    size = max(1, -(-len(runs) // count))
    return [runs[start : start + size] for start in range(0, len(runs), size)]


def _run(work: Callable, tasks: list[tuple], like: Hidden, unembedding: Unembedding, rows: int) -> list[tuple]:
    """The results of `work(*task, workspace)` in order, by as many workers as there are tasks for."""
    count = min(workers.count(like), len(tasks))
    spaces: SimpleQueue[_Workspace] = SimpleQueue()
    for _ in range(count):
        spaces.put(_Workspace.of(rows, like, unembedding))

    def one(task: tuple) -> tuple[Tensor, ...]:
        space = spaces.get()
        try:
            with torch.inference_mode():
                return work(*task, space)
        finally:
            spaces.put(space)

    return workers.share(one, tasks, count)


def _numpy(*tensors: Tensor) -> list[np.ndarray]:
    """The tensors' memory as arrays."""
    return [tensor.numpy() for tensor in tensors]
