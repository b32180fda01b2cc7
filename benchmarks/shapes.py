"""The model that is measured, of GPT-2-small's shape with random weights, and the plain way to evaluate it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from pipeline import engine, models
from pipeline.decoder import Decoder, decoder
from pipeline.hooks import Hook
from pipeline.models import Weights
from pipeline.types import Acts, Tokens

GPT2 = {"n_layers": 12, "d_model": 768, "n_heads": 12, "d_head": 64, "d_mlp": 3072, "d_vocab": 50257, "n_ctx": 128}
SMALL = {"n_layers": 2, "d_model": 64, "n_heads": 4, "d_head": 16, "d_mlp": 256, "d_vocab": 500, "n_ctx": 128}
SEQUENCES = 8
# Lengths of the six noises relative to the activation. With the identity and two constants: nine interventions.
NOISES = (0.1, 0.14, 0.18, 0.22, 0.26, 0.3)


@dataclass(frozen=True)
class Subject:
    """A model both ways: TransformerLens's own, and the pipeline's decoder over the same weights."""

    model: HookedTransformer
    decoder: Decoder
    tokens: Tokens

    @property
    def layers(self) -> int:
        return self.model.cfg.n_layers


def random_model(small: bool) -> HookedTransformer:
    """A GPT-2 with random weights, larger than at its initialisation, so that its KLs are like a trained model's."""
    settings = {"act_fn": "gelu_new", "normalization_type": "LN", "seed": 0, "device": "cpu"}
    model = HookedTransformer(HookedTransformerConfig.from_dict((SMALL if small else GPT2) | settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or ".b_" in name:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        model.embed.W_E *= 10
        model.unembed.W_U *= 5
    return model


def weights_of(model: HookedTransformer) -> Weights:
    """The same model as the stage `weights` stores it."""
    return Weights(models._plain(model.cfg.to_dict()), models._parameters(model))


def subject(small: bool) -> Subject:
    model = random_model(small)
    return Subject(model, decoder(weights_of(model)), random_tokens(SEQUENCES, model.cfg.n_ctx, model.cfg.d_vocab))


def random_tokens(sequences: int, length: int, vocabulary: int, seed: int = 0) -> Tokens:
    return torch.randint(vocabulary, (sequences, length), generator=torch.Generator().manual_seed(seed))


def noisy(x: Tensor, size: float, seed: int) -> Tensor:
    """x plus a vector of random direction, `size` times as long."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return x + size * x.norm(dim=-1, keepdim=True) * noise / noise.norm(dim=-1, keepdim=True)


def ordinary(x: Acts) -> list[Acts]:
    """The identity, and noise of several lengths."""
    return [x.clone(), *(noisy(x, size, seed) for seed, size in enumerate(NOISES))]


def constants(x: Acts) -> list[Acts]:
    """Zero and the mean, at every token."""
    return [torch.zeros_like(x), x.mean((0, 1)).expand_as(x).clone()]


def stored(decoder: Decoder, tokens: Tokens, hook: Hook) -> tuple[engine.Batch, engine.Site]:
    """What the stages before `effects` leave for it; every token is replaced."""
    ((x, stream),) = decoder.read(tokens, [hook])
    kept = torch.zeros_like(tokens, dtype=torch.bool)
    return engine.Batch(0, len(tokens), tokens, kept, decoder.clean(tokens)), engine.Site(hook, x, stream)


# The plain way: a whole forward pass for every intervention, with one hook, and both distributions by their definition.


def writing(x_new: Acts) -> Callable:
    """A hook that puts `x_new` in place of the whole activation."""
    return lambda activation, hook: x_new


def writing_at(position: int, x_new: Tensor) -> Callable:
    """A hook that puts `x_new` `seq d` in place of the activation at one position."""

    def substitute(activation: Tensor, hook) -> Tensor:
        activation = activation.clone()
        activation[:, position] = x_new
        return activation

    return substitute


def plain(
    model: HookedTransformer, tokens: Tokens, hook: str, hooks: Iterable[Callable], span: slice = slice(None)
) -> dict[str, Tensor]:
    """`kl`, `ce` and `top1_agrees`, `intervention seq pos`, at the positions in `span`."""
    log_p = model(tokens)[:, span].log_softmax(-1)
    found = [plain_values(model, tokens, hook, each, log_p, span) for each in hooks]
    return {name: torch.stack([values[name] for values in found]) for name in found[0]}


def plain_values(
    model: HookedTransformer, tokens: Tokens, hook: str, substitute: Callable, log_p: Tensor, span: slice = slice(None)
) -> dict[str, Tensor]:
    """The same for one intervention, where the clean log-softmax is there already."""
    log_q = model.run_with_hooks(tokens, fwd_hooks=[(hook, substitute)])[:, span].log_softmax(-1)
    target = engine.next_tokens(tokens)[:, span]
    return {
        "kl": F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1),
        "ce": -log_q.gather(-1, target[..., None]).squeeze(-1),
        "top1_agrees": log_q.argmax(-1) == log_p.argmax(-1),
    }
