"""The decoder: equal to TransformerLens and to transformers, resumable at every hook, and causal."""

import pytest
import torch
from conftest import DEMO, FAMILIES, random_weights
from torch.testing import assert_close

from pipeline.decoder import Hooked, Lean, decoder, lean_can_run
from pipeline.hooks import WRITE_SITES, Hook, parse_hook

LEAN = [name for name in FAMILIES if name.startswith("gpt2")]
SEQUENTIAL = [site for site in WRITE_SITES if site != "hook_resid_mid"]


def tokens(weights, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(weights.settings["d_vocab"], (3, weights.settings["n_ctx"]), generator=generator)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def sites(weights) -> list[str]:
    return SEQUENTIAL if weights.settings["parallel_attn_mlp"] else list(WRITE_SITES)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_lean_path_is_chosen_for_the_gpt2_family_only(name):
    assert isinstance(decoder(random_weights(**FAMILIES[name])), Lean if name in LEAN else Hooked)


@pytest.mark.parametrize(
    "change", [{"attn_only": True}, {"output_logits_soft_cap": 30.0}, {"use_attn_scale": False}, {"act_fn": "solu_ln"}]
)
def test_one_foreign_setting_is_enough_to_leave_the_lean_path(change):
    assert not lean_can_run(random_weights().settings | change)


@pytest.mark.parametrize("name", LEAN)
def test_lean_equals_transformer_lens_at_every_hook(name):
    weights = random_weights(**FAMILIES[name])
    lean, hooked, rows = Lean(weights), Hooked(weights), tokens(weights)
    assert_close(lean.clean(rows), hooked.clean(rows), rtol=1e-4, atol=1e-5)
    for layer in range(weights.layers):
        for site in (*WRITE_SITES, "ln2.hook_normalized"):
            x, _ = lean.read(rows, Hook(layer, site))
            assert_close(x, hooked.read(rows, Hook(layer, site))[0], rtol=1e-4, atol=1e-4, msg=f"{layer} {site}")


@pytest.mark.parametrize("name", LEAN)
def test_lean_equals_transformer_lens_when_patched_at_every_hook(name):
    weights = random_weights(**FAMILIES[name])
    lean, hooked, rows = Lean(weights), Hooked(weights), tokens(weights)
    for layer in range(weights.layers):
        for site in WRITE_SITES:
            hook = Hook(layer, site)
            x, stream = lean.read(rows, hook)
            x_new = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
            expected = hooked.resume(hook, hooked.read(rows, hook)[1], x_new)
            assert_close(lean.resume(hook, stream, x_new), expected, rtol=1e-4, atol=1e-4, msg=f"{layer} {site}")


def test_logits_equal_those_of_transformers(demo):
    from transformers import AutoModelForCausalLM

    rows = tokens(demo.weights)
    unembedding = demo.unembedding()
    logits = unembedding.logits(unembedding.products(unembedding.hidden(demo.clean(rows)))).unflatten(0, rows.shape)
    expected = AutoModelForCausalLM.from_pretrained(DEMO / "model")(rows).logits
    assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_weight_processing_does_not_change_the_predictions(demo):
    from pipeline import models

    rows = tokens(demo.weights)
    processing = {"fold_ln": True, "center_writing_weights": True, "center_unembed": True}
    processed = decoder(models.load_folder(DEMO / "model", processing))
    found = [
        u.logits(u.products(u.hidden(d.clean(rows)))).log_softmax(-1)
        for d in (demo, processed)
        for u in [d.unembedding()]
    ]
    assert_close(*found, rtol=1e-4, atol=1e-4)


def test_putting_back_the_same_activation_is_bit_exact_at_every_hook_of_every_family(family):
    rows = tokens(family.weights)
    clean = family.clean(rows)
    for layer in range(family.weights.layers):
        for site in sites(family.weights):
            hook = Hook(layer, site)
            x, stream = family.read(rows, hook)
            assert torch.equal(family.resume(hook, stream, x), clean), hook.name


def test_putting_back_the_same_activation_is_bit_exact_on_the_lean_path(demo):
    rows = tokens(demo.weights)
    clean = demo.clean(rows)
    for layer in range(demo.weights.layers):
        for site in WRITE_SITES:
            hook = Hook(layer, site)
            x, stream = demo.read(rows, hook)
            assert torch.equal(demo.resume(hook, stream, x), clean), hook.name


@pytest.mark.parametrize("kind", ["lean", "hooked"])
def test_a_patch_changes_only_the_same_and_later_positions(kind):
    weights = random_weights()
    model = Lean(weights) if kind == "lean" else Hooked(weights)
    rows = tokens(weights)
    clean = model.clean(rows)
    for site in WRITE_SITES:
        x, stream = model.read(rows, Hook(0, site))
        x_new = x.clone()
        # Not a constant: LayerNorm would not see it.
        x_new[:, 5] += torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(1))
        changed = (model.resume(Hook(0, site), stream, x_new) != clean).any(-1)
        assert not changed[:, :5].any(), site
        assert changed[:, 5].all(), site
        assert changed[:, 6:].any(), site


def test_a_hook_that_does_not_exist_in_the_architecture_is_an_error():
    weights = random_weights(**FAMILIES["pythia"])
    with pytest.raises(ValueError, match=r"no hook 'blocks\.0\.hook_resid_mid'"):
        Hooked(weights).read(tokens(weights), Hook(0, "hook_resid_mid"))
    x = torch.zeros(3, weights.settings["n_ctx"], 16)
    with pytest.raises(ValueError, match=r"no hook 'blocks\.0\.hook_resid_mid'"):
        Hooked(weights).resume(Hook(0, "hook_resid_mid"), x, x)


@pytest.mark.parametrize("wrong", [torch.zeros(3, 12, 15), torch.zeros(3, 12, 16).double()])
def test_an_activation_of_another_shape_or_type_is_refused(wrong):
    weights = random_weights()
    stream = torch.zeros(3, 12, 16)
    with pytest.raises(ValueError, match="was to be written"):
        Hooked(weights).resume(Hook(0, "hook_mlp_out"), stream, wrong)


def test_weights_that_do_not_fit_are_refused():
    weights = random_weights()
    del weights.state["blocks.0.attn.W_Q"]
    with pytest.raises(ValueError, match=r"missing \['blocks\.0\.attn\.W_Q'\]"):
        Hooked(weights).clean(tokens(weights))


@pytest.mark.parametrize(
    "name", ["blocks.2.hook_resid_pre", "blocks.0.hook_residpre", "hook_embed", "blocks.x.hook_z", ""]
)
def test_unknown_hooks_are_refused(name):
    with pytest.raises(ValueError, match=r"hook|layers"):
        parse_hook(name, n_layers=2)


def test_logit_differences_equal_differences_of_logits_under_a_soft_cap():
    weights = random_weights(**FAMILIES["gemma-2"])
    unembedding = Hooked(weights).unembedding()
    assert unembedding.soft_cap == 3.0
    a, b = (torch.randn(5, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for scale in (0.01, 0.1, 1.0):  # linear, bent and saturated parts of the cap
        one, other = unembedding.products(scale * a), unembedding.products(scale * b)
        expected = unembedding.logits(other) - unembedding.logits(one)
        assert_close(unembedding.difference(scale * a, scale * b, one), expected, rtol=1e-3, atol=1e-5)
