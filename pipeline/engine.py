"""Substitution: micro-batches of sequences through the rest of the model, with an activation replaced."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline import metrics
from pipeline.decoder import Decoder
from pipeline.hooks import Hook
from pipeline.lean import Prefix
from pipeline.types import Acts, Mask, Residual, Tokens


@dataclass(frozen=True)
class Batch:
    """One micro-batch: batches.BATCH sequences, of which the first `count` are real and the rest filling."""

    first: int
    count: int
    tokens: Tokens
    kept: Mask  # where the activation is never replaced
    final: Residual  # the clean run's final residual stream


@dataclass(frozen=True)
class Site:
    """A hook with the clean activation there, and the stream that a run needs to start from it."""

    hook: Hook
    x: Acts
    stream: Residual | None


@dataclass(frozen=True)
class Substitution:
    """A decoder made ready to compare patched runs with the clean run.

    `budget` is the memory for logits in MiB; as much again goes to patched runs that wait for the clean logits.
    """

    decoder: Decoder
    budget: int = metrics.BUDGET

    def effects(self, batch: Batch, patches: Iterable[tuple[Site, Acts]]) -> dict[str, Tensor]:
        """`kl`, `ce` (nats) and `top1_agrees` of each replacement x_new at a site, `patch seq pos`.

        The clean logits are computed once for all patches, or for as many as fit into the budget. At the last position
        `ce` is NaN.
        """
        unembedding = self.decoder.unembedding()
        hidden, target = unembedding.hidden(batch.final), next_tokens(batch.tokens).flatten()
        found = [
            metrics.patched_values(hidden, runs, target, unembedding, self.budget)
            for runs in self._in_budget(self._run(batch, site, x_new) for site, x_new in patches)
        ]
        values = {name: torch.cat([part[name] for part in found]).unflatten(1, batch.tokens.shape) for name in found[0]}
        values["ce"][..., -1] = torch.nan
        return values

    def effects_at(
        self, batch: Batch, site: Site, prefix: Prefix, position: int, horizon: int, x_new: Tensor
    ) -> dict[str, Tensor]:
        """Effects of replacing the activation at one position only: `x_new` is `seq draw d`, and `kl`, `ce` and
        `top1_agrees` are `seq draw pos`, for `position` and the `horizon` positions after it.

        `prefix` is `decoder.prefix` at this site. ValueError where the context ends before the horizon, or the token
        is one that is never replaced.
        """
        length = batch.tokens.shape[1]
        if not 0 <= position <= position + horizon < length:
            raise ValueError(
                f"Position {position} with horizon {horizon} does not fit into a context of {length} tokens."
            )
        if batch.kept[:, position].any():
            raise ValueError(f"Position {position} holds a special token, which is never replaced.")
        span = slice(position, position + horizon + 1)
        final = self.decoder.resume_at(site.hook, prefix, position, horizon, x_new)
        _check_finite(final.flatten(0, 1), site.hook, batch.first)
        unembedding, sequences = self.decoder.unembedding(), len(final)
        hidden, target = unembedding.hidden(batch.final[:, span]), next_tokens(batch.tokens)[:, span].flatten()
        runs = unembedding.hidden(final.transpose(0, 1).flatten(0, 1)).unflatten(0, (final.shape[1], -1))
        values = metrics.patched_values(hidden, list(runs), target, unembedding, self.budget)
        values = {name: value.unflatten(1, (sequences, -1)).transpose(0, 1) for name, value in values.items()}
        if position + horizon == length - 1:
            values["ce"][..., -1] = torch.nan
        return values

    def _run(self, batch: Batch, site: Site, x_new: Acts) -> Tensor | metrics.Fixed:
        """The hidden states of a patched run, `token d_model`; of the distinct sequences alone where these are few.

        Sequences are the same where the run starts from nothing but one vector, written to every token but special
        ones at the same places with the same activation: zero and mean ablations of the residual stream.
        """
        x, unembedding = _merged(batch, site, x_new), self.decoder.unembedding()
        size = x.shape[1] * unembedding.W_U.shape[1] * unembedding.W_U.element_size()  # the logits of a sequence
        most = max(1, min(len(x) // 2, self.budget * 2**19 // size))
        which = same_sequences(x, batch.kept) if site.stream is None else None
        few = which is not None and len(set(which)) <= most
        final = self.decoder.resume(
            site.hook, site.stream, x[[which.index(i) for i in range(max(which) + 1)]] if few else x
        )
        _check_finite(final, site.hook, batch.first)
        hidden = unembedding.hidden(final)
        return metrics.Fixed(hidden, which) if few else hidden

    def _in_budget(self, runs: Iterable[Tensor | metrics.Fixed]) -> Iterator[Sequence[Tensor | metrics.Fixed]]:
        """The runs in groups that fit: waiting hidden states, and the logits of runs with few distinct sequences."""
        width = self.decoder.unembedding().W_U[0].nbytes
        group, size = [], 0
        for run in runs:
            group.append(run)
            size += len(run.hidden) * width if isinstance(run, metrics.Fixed) else run.nbytes
            if size >= self.budget * 2**20:
                yield group
                group, size = [], 0
        if group:
            yield group


def _merged(batch: Batch, site: Site, x_new: Acts) -> Acts:
    if x_new.shape != site.x.shape or x_new.dtype != site.x.dtype:
        raise ValueError(
            f"'{site.hook.name}' holds {site.x.dtype} {list(site.x.shape)}, but "
            f"{x_new.dtype} {list(x_new.shape)} was to be written."
        )
    return torch.where(batch.kept[..., None], site.x, x_new)


def _check_finite(final: Residual, hook: Hook, first: int) -> None:
    """ValueError where a patched run overflows: the compiled reductions expect numbers."""
    if not final.isfinite().all():
        row = int((~final.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(
            f"A run patched at '{hook.name}' is not finite (micro-batch at sequence {first}, row {row}): what was "
            "written there makes the model overflow. Check the SAE and its normalisation."
        )


def same_sequences(x: Acts, kept: Mask) -> tuple[int, ...] | None:
    """For each sequence the number of the distinct one that it is, where every token that is not kept has the same
    vector; None where they have not, which is found out first and fast."""
    replaced = x[~kept]
    if not len(replaced) or not (replaced[: len(x)] == replaced[0]).all() or not (replaced == replaced[0]).all():
        return None
    numbers: dict[int, int] = {}
    for i in range(len(x)):
        first = next(j for j in range(i + 1) if torch.equal(kept[j], kept[i]) and torch.equal(x[j], x[i]))
        numbers[i] = numbers[first] if first < i else len(set(numbers.values()))
    return tuple(numbers.values())


def next_tokens(tokens: Tokens) -> Tokens:
    """The token after each; 0 after the last position, where there is none and `ce` is null."""
    return torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], dim=1)


def clean_values(decoder: Decoder, tokens: Tokens, budget: int = metrics.BUDGET) -> dict[str, Tensor]:
    """`final` `seq pos d_model`, and `ce` (nats, NaN at the last position), `entropy` (nats), `top1`, each `seq
    pos`."""
    unembedding = decoder.unembedding()
    final = decoder.clean(tokens)
    values = metrics.clean_values(unembedding.hidden(final), next_tokens(tokens).flatten(), unembedding, budget)
    values = {name: value.unflatten(0, tokens.shape) for name, value in values.items()}
    values["ce"][:, -1] = torch.nan
    return {"final": final, **values}
