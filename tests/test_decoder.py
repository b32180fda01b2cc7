"""The decoder: equal to TransformerLens and to transformers, resumable at every hook, and causal."""

import pytest
import torch
from conftest import DEMO, FAMILIES, random_weights
from torch.testing import assert_close

from pipeline.decoder import decoder, in_precision
from pipeline.hooked import Hooked
from pipeline.hooks import WRITE_SITES, Hook, parse_hook
from pipeline.lean import Lean, can_run


def tokens(weights, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(weights.settings["d_vocab"], (3, weights.settings["n_ctx"]), generator=generator)


def assert_near(found: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Within 2e-5 of the largest value, which is what the lean path promises against TransformerLens in float32."""
    assert found.shape == expected.shape, what
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max(), what


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def hooks(weights, sites=WRITE_SITES) -> list[Hook]:
    """Every hook of an architecture; parallel blocks have no `hook_resid_mid`."""
    left_out = "hook_resid_mid" if weights.settings["parallel_attn_mlp"] else ""
    return [Hook(layer, site) for layer in range(weights.layers) for site in sites if site != left_out]


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request) -> tuple[Lean, Hooked]:
    """A family on the lean path, and as TransformerLens runs it."""
    weights = random_weights(**FAMILIES[request.param])
    return Lean(weights), Hooked(weights)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_lean_path_is_chosen_for_the_families_it_knows(name):
    assert isinstance(decoder(random_weights(**FAMILIES[name])), Lean)


@pytest.mark.parametrize(
    "change",
    [
        {"attn_only": True},
        {"act_fn": "solu_ln"},
        {"positional_embedding_type": "alibi"},
        {"normalization_type": None},
        {"post_embedding_ln": True},
        {"num_experts": 8},
        {"clip_qkv": 8.0},
        {"use_attention_sinks": True},
        {"use_logn_attn": True},
        {"attention_dir": "bidirectional"},
        {"original_architecture": "Olmo2ForCausalLM"},
        {"a_setting_of_a_later_version": True},
    ],
)
def test_one_foreign_setting_is_enough_to_leave_the_lean_path(change):
    assert can_run(random_weights().settings)
    assert not can_run(random_weights().settings | change)


def test_an_architecture_that_lean_does_not_know_runs_on_transformer_lens():
    assert isinstance(decoder(random_weights(attn_only=True)), Hooked)


def test_lean_equals_transformer_lens_at_every_hook(pair):
    lean, hooked = pair
    rows = tokens(lean.weights)
    assert_near(lean.clean(rows), hooked.clean(rows))
    for hook in hooks(lean.weights, (*WRITE_SITES, "ln2.hook_normalized")):
        ((x, _),), ((expected, _),) = lean.read(rows, [hook]), hooked.read(rows, [hook])
        assert_near(x, expected, hook.name)


def test_lean_equals_transformer_lens_when_patched_at_every_hook(pair):
    lean, hooked = pair
    rows = tokens(lean.weights)
    for hook in hooks(lean.weights):
        ((x, stream),), ((_, whole),) = lean.read(rows, [hook]), hooked.read(rows, [hook])
        x_new = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        expected = hooked.resume(hook, whole, x_new)
        assert_near(lean.resume(hook, stream, x_new), expected, hook.name)


def test_lean_equals_transformer_lens_in_its_logits(pair):
    lean, hooked = pair
    final = hooked.clean(tokens(lean.weights))
    found, expected = (u.logits(u.products(u.hidden(final))) for u in (lean.unembedding(), hooked.unembedding()))
    assert_near(found, expected)


@pytest.mark.parametrize("position", [0, 5, 11])
def test_one_position_with_the_prefix_equals_the_whole_context(pair, position):
    lean, hooked = pair
    rows, horizon, draws = tokens(lean.weights), min(3, 11 - position), 2
    for hook in hooks(lean.weights):
        ((x, stream),), ((whole_x, whole),) = lean.read(rows, [hook]), hooked.read(rows, [hook])
        x_new = torch.randn(3, draws, x.shape[-1], generator=torch.Generator().manual_seed(1))
        found = lean.resume_at(hook, lean.prefix(hook, stream, x, position), position, horizon, x_new)
        assert_near(found, lean.resume_at(hook, lean.prefix(hook, stream, x), position, horizon, x_new), hook.name)
        expected = hooked.resume_at(hook, hooked.prefix(hook, whole, whole_x), position, horizon, x_new)
        assert found.shape == (3, draws, horizon + 1, 16)
        assert_near(found, expected, hook.name)


def test_several_hooks_in_one_pass_give_what_each_gives_alone(pair):
    for model in pair:
        rows, wanted = tokens(model.weights), hooks(model.weights)
        for hook, (x, stream) in zip(wanted, model.read(rows, wanted), strict=True):
            ((alone, stream_alone),) = model.read(rows, [hook])
            assert torch.equal(x, alone), hook.name
            assert (stream is None and stream_alone is None) or torch.equal(stream, stream_alone), hook.name


def test_putting_back_the_same_activation_is_bit_exact_at_every_hook(pair):
    for model in pair:
        rows = tokens(model.weights)
        clean = model.clean(rows)
        for hook in hooks(model.weights):
            ((x, stream),) = model.read(rows, [hook])
            assert torch.equal(model.resume(hook, stream, x), clean), hook.name


def test_contexts_beyond_the_stored_rotary_tables_are_refused():
    weights = random_weights(**FAMILIES["llama"])
    longer = torch.zeros(1, weights.settings["n_ctx"] + 1, dtype=torch.long)
    with pytest.raises(ValueError, match="prepared up to 12, but a context has 13"):
        Lean(weights).clean(longer)


def test_tf32_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="tf32 needs a GPU"):
        in_precision(random_weights(), {"blocks": "tf32", "difference": "float32"}, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_gpu_computes_what_the_cpu_computes(name):
    weights = random_weights(**FAMILIES[name])
    moved = type(weights)(weights.settings, {key: tensor.cuda() for key, tensor in weights.state.items()})
    rows = tokens(weights)
    assert_close(Lean(moved).clean(rows.cuda()).cpu(), Lean(weights).clean(rows), rtol=1e-4, atol=1e-4)


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


def test_putting_back_the_same_activation_is_bit_exact_on_the_trained_model(demo):
    rows = tokens(demo.weights)
    clean = demo.clean(rows)
    for hook in hooks(demo.weights):
        ((x, stream),) = demo.read(rows, [hook])
        assert torch.equal(demo.resume(hook, stream, x), clean), hook.name


@pytest.mark.parametrize("kind", ["lean", "hooked"])
def test_a_patch_changes_only_the_same_and_later_positions(kind):
    weights = random_weights()
    model = Lean(weights) if kind == "lean" else Hooked(weights)
    rows = tokens(weights)
    clean = model.clean(rows)
    for site in WRITE_SITES:
        ((x, stream),) = model.read(rows, [Hook(0, site)])
        x_new = x.clone()
        # Not a constant: LayerNorm would not see it.
        x_new[:, 5] += torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(1))
        changed = (model.resume(Hook(0, site), stream, x_new) != clean).any(-1)
        assert not changed[:, :5].any(), site
        assert changed[:, 5].all(), site
        assert changed[:, 6:].any(), site


@pytest.mark.parametrize("kind", [Lean, Hooked])
def test_a_hook_that_does_not_exist_in_the_architecture_is_an_error(kind):
    weights = random_weights(**FAMILIES["pythia"])
    with pytest.raises(ValueError, match=r"no hook 'blocks\.0\.hook_resid_mid'"):
        kind(weights).read(tokens(weights), [Hook(0, "hook_resid_mid")])
    x = torch.zeros(3, weights.settings["n_ctx"], 16)
    with pytest.raises(ValueError, match=r"no hook 'blocks\.0\.hook_resid_mid'"):
        kind(weights).resume(Hook(0, "hook_resid_mid"), x, x)


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
        assert_close(unembedding.difference(scale * (b - a), one), expected, rtol=1e-3, atol=1e-5)
