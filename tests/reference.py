"""An independent float64 evaluation, written to be obviously right: HookedTransformer in float64, a full forward pass
with one hook per intervention, both log-softmaxes whole, KL and cross-entropy by their definitions."""

from functools import lru_cache

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from pipeline.models import Weights


def reference_model(weights: Weights) -> HookedTransformer:
    model = HookedTransformer(HookedTransformerConfig.from_dict(weights.settings | {"dtype": torch.float64}))
    state = {name: tensor.double() for name, tensor in weights.state.items() if not name.startswith("rotary.")}
    model.load_state_dict(state, strict=False)
    return model.double().eval()


@torch.inference_mode()
def reference_activation(model, tokens: torch.Tensor, hook: str) -> torch.Tensor:
    """The activation at a hook, `seq pos d` float64, heads side by side."""
    return model.run_with_cache(tokens, names_filter=[hook])[1][hook].flatten(2)


@lru_cache(maxsize=1)
@torch.inference_mode()
def reference_clean(model, tokens: torch.Tensor) -> torch.Tensor:
    """log P, `seq pos v` float64."""
    return model(tokens).log_softmax(-1)


@torch.inference_mode()
def reference_effects(model, tokens: torch.Tensor, hook: str, x_new: torch.Tensor, kept: torch.Tensor) -> dict:
    """`kl`, `ce` (nats) and `top1_agrees`, `seq pos`, of do(activation at hook <- x_new) except where `kept`."""

    def substitute(activation, hook):
        new = x_new.double().view(activation.shape)
        where = kept.view(*kept.shape, *[1] * (activation.dim() - 2))
        return torch.where(where, activation, new)

    clean = reference_clean(model, tokens)
    patched = model.run_with_hooks(tokens, fwd_hooks=[(hook, substitute)]).log_softmax(-1)
    kl = (clean.exp() * (clean - patched)).sum(-1)
    ce = -patched[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return {"kl": kl, "ce": ce, "top1_agrees": clean.argmax(-1) == patched.argmax(-1)}
