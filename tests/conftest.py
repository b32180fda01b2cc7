"""Models for the tests: the demo's, and small random ones of several families, as `Weights`."""

from pathlib import Path

import pytest
import torch

from pipeline import models
from pipeline.hooked import Hooked
from pipeline.lean import Lean
from pipeline.models import Weights

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo"
SHARED = ROOT.parent / "shared"
PLAIN = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False}
torch.set_num_threads(1)  # the tests run in two processes


# Files that run the whole workflow, longest first: begun last, they would leave the other process with nothing to do.
WHOLE_RUNS = ("test_workflow", "test_faults", "test_named_study", "test_module", "test_ready")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(WHOLE_RUNS)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def demo_weights() -> Weights:
    return models.load_folder(DEMO / "model", PLAIN)


@pytest.fixture(scope="session")
def demo(demo_weights) -> Lean:
    return Lean(demo_weights)


def random_weights(seed: int = 0, **settings) -> Weights:
    """A random decoder of 2 layers and width 16 as TransformerLens initialises it; `settings` change its family."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    plain = {"n_layers": 2, "d_model": 16, "n_heads": 2, "d_head": 8, "d_mlp": 32, "n_ctx": 12, "d_vocab": 40}
    plain |= {"act_fn": "gelu_new", "normalization_type": "LN", "seed": seed, "device": "cpu"}
    model = HookedTransformer(HookedTransformerConfig.from_dict(plain | settings))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or ".b_" in name or name.endswith("b_U"):
            parameter.data += 0.1 * torch.randn_like(parameter)  # biases of 0 and gains of 1 would hide mistakes
        elif "W_pos" not in name:
            parameter.data *= 4
    return Weights(models._plain(model.cfg.to_dict()), models._parameters(model))


ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 8}
LOCAL = {"use_local_attn": True, "window_size": 4, "attn_types": ["global", "local"]}
GATED = {"normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu", "final_rms": True}
FAMILIES = {
    "gpt2": {},
    "gpt2 folded": {"normalization_type": "LNPre"},
    "gpt2 of stanford": {"scale_attn_by_inverse_layer_idx": True},
    "gpt-neo": LOCAL | {"use_attn_scale": False},
    "gpt-j": ROTARY | {"rotary_dim": 4, "rotary_adjacent_pairs": True, "parallel_attn_mlp": True},
    "pythia": ROTARY | {"rotary_dim": 4, "parallel_attn_mlp": True, "act_fn": "gelu"},
    "llama": ROTARY | GATED | {"n_key_value_heads": 1},
    "llama-3": ROTARY | GATED | {"use_NTK_by_parts_rope": True, "NTK_original_ctx_len": 6},
    "mistral": ROTARY | GATED | LOCAL | {"n_key_value_heads": 1},
    "gemma-2": ROTARY
    | GATED
    | LOCAL
    | {
        "normalization_type": "RMSPre",
        "act_fn": "gelu_pytorch_tanh",
        "output_logits_soft_cap": 3.0,
        "attn_scores_soft_cap": 5.0,
        "use_normalization_before_and_after": True,
        "n_key_value_heads": 1,
    },
    "gemma-3": ROTARY
    | GATED
    | LOCAL
    | {
        "act_fn": "gelu_pytorch_tanh",
        "use_qk_norm": True,
        "rotary_base": 1000000.0,
        "rotary_base_local": 100.0,
        "use_normalization_before_and_after": True,
    },
}


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request) -> Hooked:
    """Every family through the general decoder."""
    return Hooked(random_weights(**FAMILIES[request.param]))
