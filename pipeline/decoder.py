"""A decoder that can be stopped at a hook, and started again there with another activation.

Two implementations with the same four methods, chosen by `decoder`:
`Lean` runs the GPT-2 family (learned positions, LayerNorm, sequential blocks) on TransformerLens's weights with
one QKV product and fused attention, and imports no TransformerLens; `Hooked` is a HookedTransformer, for all the
others.

All activations are `seq pos d`, with the heads of `hook_z` side by side. `stream` is what a run that starts at a hook
needs beside the patched activation: the residual stream before the part of the block that the hook is in.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.hooks import Hook, parse_hook
from pipeline.models import Weights
from pipeline.types import Acts, Hidden, Logits, Residual, Tokens

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def decoder(weights: Weights) -> "Lean | Hooked":
    """The fastest implementation that computes this architecture exactly."""
    return Lean(weights) if lean_can_run(weights.settings) else Hooked(weights)


def lean_can_run(settings: dict) -> bool:
    """Whether a configuration is of the GPT-2 family: everything that `Lean` leaves out is absent or switched off."""
    expected = {
        "normalization_type": ("LN", "LNPre"),
        "positional_embedding_type": ("standard",),
        "act_fn": tuple(ACTIVATIONS),
        "attn_only": (False,),
        "parallel_attn_mlp": (False,),
        "gated_mlp": (False,),
        "final_rms": (False,),
        "use_local_attn": (False,),
        "use_normalization_before_and_after": (False,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "use_attn_scale": (True,),
        "attention_dir": ("causal",),
        "use_qk_norm": (False,),
        "post_embedding_ln": (False,),
        "num_experts": (None,),
        "n_key_value_heads": (None, settings.get("n_heads")),
        "attn_scale": (None, math.sqrt(settings["d_head"])),
    }
    zeros = ("attn_scores_soft_cap", "output_logits_soft_cap")
    matches = all(name not in settings or settings[name] in allowed for name, allowed in expected.items())
    return matches and all((settings.get(name) or -1) <= 0 for name in zeros)


@dataclass(frozen=True)
class Lean:
    """The GPT-2 family. A block is: mid = pre + attention(ln1(pre)), post = mid + mlp(ln2(mid))."""

    weights: Weights

    def clean(self, tokens: Tokens) -> Residual:
        """The final residual stream, before the last normalisation."""
        return self._blocks(self._embed(tokens), 0)

    def read(self, tokens: Tokens, hook: Hook) -> tuple[Acts, Residual | None]:
        """The activation at a hook, and the stream that `resume` needs there; None where that is the activation itself.

        Runs no block beyond the hook's.
        """
        x = self._embed(tokens)
        for layer in range(hook.layer):
            x = self._mlp(layer, self._attention(layer, x))
        if hook.site == "hook_resid_pre":
            return x, None
        z = self._z(hook.layer, x)
        if hook.site == "attn.hook_z":
            return z, x
        attention = self._project_z(hook.layer, z)
        if hook.site == "hook_attn_out":
            return attention, x
        mid = x + attention
        if hook.site == "hook_resid_mid":
            return mid, None
        if hook.site == "ln2.hook_normalized":  # before gain and bias, as TransformerLens has it
            return F.layer_norm(mid, mid.shape[-1:], eps=self.weights.settings["eps"]), None
        out = self._mlp_out(hook.layer, self._norm(mid, f"blocks.{hook.layer}.ln2"))
        return (out, mid) if hook.site == "hook_mlp_out" else (mid + out, None)

    def resume(self, hook: Hook, stream: Residual | None, x_new: Acts) -> Residual:
        """The final residual stream of a run in which the activation at `hook` is `x_new`."""
        layer = hook.layer
        if hook.site == "hook_resid_pre":
            return self._blocks(x_new, layer)
        if hook.site == "hook_resid_post":
            return self._blocks(x_new, layer + 1)
        if hook.site == "hook_mlp_out":
            return self._blocks(stream + x_new, layer + 1)
        mid = {
            "attn.hook_z": lambda: stream + self._project_z(layer, x_new),
            "hook_attn_out": lambda: stream + x_new,
            "hook_resid_mid": lambda: x_new,
        }[hook.site]()
        return self._blocks(self._mlp(layer, mid), layer + 1)

    def unembedding(self) -> "Unembedding":
        return Unembedding(
            partial(self._norm, name="ln_final"), self._get("unembed.W_U"), self._get("unembed.b_U"), 0.0
        )

    def _get(self, name: str) -> Tensor:
        return self.weights.state[name]

    @cached_property
    def _qkv(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer the three attention products as one: weight `3*n_heads*d_head d_model`, and bias."""
        found = []
        for layer in range(self.weights.layers):
            parts = [self._get(f"blocks.{layer}.attn.W_{name}") for name in "QKV"]  # each: head d_model d_head
            biases = [self._get(f"blocks.{layer}.attn.b_{name}") for name in "QKV"]
            weight = torch.cat([part.permute(0, 2, 1).flatten(0, 1) for part in parts])
            found.append((weight.contiguous(), torch.cat([bias.flatten() for bias in biases])))
        return found

    def _embed(self, tokens: Tokens) -> Residual:
        return F.embedding(tokens, self._get("embed.W_E")) + self._get("pos_embed.W_pos")[: tokens.shape[1]]

    def _blocks(self, x: Residual, first: int) -> Residual:
        for layer in range(first, self.weights.layers):
            x = self._mlp(layer, self._attention(layer, x))
        return x

    def _norm(self, x: Tensor, name: str) -> Tensor:
        state = self.weights.state
        return F.layer_norm(
            x, x.shape[-1:], state.get(f"{name}.w"), state.get(f"{name}.b"), self.weights.settings["eps"]
        )

    def _z(self, layer: int, x: Residual) -> Acts:
        heads = self.weights.settings["n_heads"]
        q, k, v = (
            F.linear(self._norm(x, f"blocks.{layer}.ln1"), *self._qkv[layer]).unflatten(-1, (3, heads, -1)).unbind(2)
        )
        z = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return z.transpose(1, 2).flatten(2)

    def _project_z(self, layer: int, z: Acts) -> Residual:
        return z @ self._get(f"blocks.{layer}.attn.W_O").flatten(0, 1) + self._get(f"blocks.{layer}.attn.b_O")

    def _attention(self, layer: int, x: Residual) -> Residual:
        return x + self._project_z(layer, self._z(layer, x))

    def _mlp_out(self, layer: int, normalised: Residual) -> Residual:
        name, act = f"blocks.{layer}.mlp", ACTIVATIONS[self.weights.settings["act_fn"]]
        hidden = act(normalised @ self._get(f"{name}.W_in") + self._get(f"{name}.b_in"))
        return hidden @ self._get(f"{name}.W_out") + self._get(f"{name}.b_out")

    def _mlp(self, layer: int, mid: Residual) -> Residual:
        return mid + self._mlp_out(layer, self._norm(mid, f"blocks.{layer}.ln2"))


@dataclass(frozen=True)
class Hooked:
    """Any HookedTransformer. Runs start at the hooked layer, and the hook must fire exactly once with the right
    shape."""

    weights: Weights

    @cached_property
    def model(self):
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        settings = self.weights.settings | {"dtype": getattr(torch, self.weights.settings["dtype"])}
        model = HookedTransformer(HookedTransformerConfig.from_dict(settings), move_to_device=False)
        missing, surplus = model.load_state_dict(self.weights.state, strict=False)
        missing = [name for name in missing if not name.endswith((".mask", ".IGNORE", ".rotary_sin", ".rotary_cos"))]
        if missing or surplus:
            raise ValueError(f"The stored weights do not fit the model: missing {missing}, not expected {surplus}.")
        return model.eval().to(next(iter(self.weights.state.values())).device)

    def clean(self, tokens: Tokens) -> Residual:
        """As `Lean.clean`."""
        return self.model(tokens, stop_at_layer=self.weights.layers)

    def read(self, tokens: Tokens, hook: Hook) -> tuple[Acts, Residual | None]:
        """As `Lean.read`; the stream is the residual stream before the whole block."""
        start = f"blocks.{hook.layer}.hook_resid_pre"
        self._check(hook)
        kept: dict[str, Tensor] = {}
        taps = [(name, partial(_keep, kept)) for name in dict.fromkeys((start, hook.name))]
        with self.model.hooks(fwd_hooks=taps):
            self.model(tokens, stop_at_layer=hook.layer + 1)
        if hook.name not in kept:
            raise ValueError(f"The hook '{hook.name}' did not fire.")
        x = kept[hook.name].flatten(2)
        return x, None if hook.site in ("hook_resid_pre", "hook_resid_post") else kept[start]

    def resume(self, hook: Hook, stream: Residual | None, x_new: Acts) -> Residual:
        """As `Lean.resume`."""
        last = self.weights.layers
        if stream is None:
            layer = hook.layer + (hook.site == "hook_resid_post")
            return x_new if layer == last else self.model(x_new, start_at_layer=layer, stop_at_layer=last)
        self._check(hook)
        fired: list[str] = []
        with self.model.hooks(fwd_hooks=[(hook.name, partial(_replace, x_new, fired))]):
            final = self.model(stream, start_at_layer=hook.layer, stop_at_layer=last)
        if len(fired) != 1:
            raise ValueError(f"The hook '{hook.name}' fired {len(fired)} times, expected once.")
        return final

    def _check(self, hook: Hook) -> None:
        if hook.name not in self.model.mod_dict:
            raise ValueError(f"This architecture has no hook '{hook.name}'. Use an SAE of another hook.")

    def unembedding(self) -> "Unembedding":
        cap = self.weights.settings.get("output_logits_soft_cap") or 0.0
        return Unembedding(self.model.ln_final, self.model.unembed.W_U, self.model.unembed.b_U, max(cap, 0.0))


def _keep(kept: dict, activation: Tensor, hook) -> None:
    kept[hook.name] = activation.detach().clone()


def _replace(x_new: Tensor, fired: list, activation: Tensor, hook) -> Tensor:
    if activation.flatten(2).shape != x_new.shape or activation.dtype != x_new.dtype:
        raise ValueError(
            f"'{hook.name}' holds {activation.dtype} {list(activation.shape)}, but "
            f"{x_new.dtype} {list(x_new.shape)} was to be written."
        )
    fired.append(hook.name)
    return x_new.view(activation.shape)


@dataclass(frozen=True)
class Unembedding:
    """Final residual stream -> logits, in two steps so that differences can be taken between them.

    logits = cap(hidden @ W_U + b_U), with cap(z) = c tanh(z / c) where `soft_cap` c > 0, and the identity where it is
    0.
    """

    normalise: Callable[[Tensor], Tensor]
    W_U: Tensor
    b_U: Tensor
    soft_cap: float

    def hidden(self, final: Residual) -> Hidden:
        """The normalised final stream, a row per token, in float32 or better."""
        return wide(self.normalise(final).flatten(0, 1))

    def products(self, hidden: Hidden) -> Logits:
        """hidden @ W_U + b_U, before the cap, in float32 or better."""
        return torch.addmm(wide(self.b_U), hidden, wide(self.W_U))

    def logits(self, products: Logits) -> Logits:
        """The cap applied to `products`."""
        return self.soft_cap * torch.tanh(products / self.soft_cap) if self.soft_cap else products

    def difference(self, hidden: Hidden, other: Hidden, products: Logits) -> Logits:
        """Logits of `other` minus those of `hidden`, whose `products` are given, through the product of the difference.

        So small differences keep their digits. Under the cap with a = products / c and b = difference / c it is
        c tanh(b) sech²(a) / (1 + tanh(a) tanh(b)); for large b, where nothing cancels, c (tanh(a + b) - tanh(a)).
        """
        d = (other - hidden) @ wide(self.W_U)
        if not self.soft_cap:
            return d
        a, b = products / self.soft_cap, d / self.soft_cap
        t, s = a.tanh(), b.tanh()
        return self.soft_cap * torch.where(b.abs() < 0.5, s / a.cosh().square() / (1 + t * s), (a + b).tanh() - t)


def wide(x: Tensor) -> Tensor:
    """float32, or float64 where it is that already: from the logits on nothing is computed in less."""
    return x if x.dtype == torch.float64 else x.float()


def hook_of(name: str, weights: Weights) -> Hook:
    """A hook by name, checked against the model's number of layers."""
    return parse_hook(name, weights.layers)
