"""Substitution: micro-batches of sequences through the rest of the model, with the activation replaced."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline import metrics
from pipeline.decoder import Hooked, Lean
from pipeline.hooks import Hook
from pipeline.types import Acts, Mask, Residual, Tokens


@dataclass(frozen=True)
class Substitution:
    """A decoder made ready to compare patched runs with the clean run."""

    decoder: Lean | Hooked
    hook: Hook

    def effects(self, batch: "Batch", x_news: Sequence[Acts]) -> dict[str, Tensor]:
        """`kl`, `ce` (nats) and `top1_agrees` of each replacement, `intervention seq pos`. At the last position `ce`
        is NaN."""
        unembedding = self.decoder.unembedding()
        hidden = unembedding.hidden(batch.final)
        patched = [unembedding.hidden(self.resume(batch, x_new)) for x_new in x_news]
        values = metrics.patched_values(hidden, patched, next_tokens(batch.tokens).flatten(), unembedding)
        values = {name: value.unflatten(1, batch.tokens.shape) for name, value in values.items()}
        values["ce"][..., -1] = torch.nan
        return values

    def resume(self, batch: "Batch", x_new: Acts) -> Residual:
        """The final residual stream with `x_new` in place of the activation; where `batch.kept` is set, it is left
        alone."""
        if x_new.shape != batch.x.shape or x_new.dtype != batch.x.dtype:
            raise ValueError(
                f"'{self.hook.name}' holds {batch.x.dtype} {list(batch.x.shape)}, but "
                f"{x_new.dtype} {list(x_new.shape)} was to be written."
            )
        return self.decoder.resume(self.hook, batch.stream, torch.where(batch.kept[..., None], batch.x, x_new))


@dataclass(frozen=True)
class Batch:
    """One micro-batch: batches.BATCH sequences, of which the first `count` are real and the rest filling."""

    first: int
    count: int
    tokens: Tokens
    kept: Mask  # where the activation is never replaced
    x: Acts
    stream: Residual | None
    final: Residual


def next_tokens(tokens: Tokens) -> Tokens:
    """The token after each; 0 after the last position, where there is none and `ce` is null."""
    return torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], dim=1)


def clean_values(decoder: Lean | Hooked, tokens: Tokens) -> dict[str, Tensor]:
    """`final` `seq pos d_model`, and `ce` (nats, NaN at the last position), `entropy` (nats), `top1`, each `seq
    pos`."""
    unembedding = decoder.unembedding()
    final = decoder.clean(tokens)
    values = metrics.clean_values(unembedding.hidden(final), next_tokens(tokens).flatten(), unembedding)
    values = {name: value.unflatten(0, tokens.shape) for name, value in values.items()}
    values["ce"][:, -1] = torch.nan
    return {"final": final, **values}
