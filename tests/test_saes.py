"""Every architecture of sae_lens, loaded from the folder that sae_lens saves, reconstructs as sae_lens does."""

import pytest
import torch
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopK
from safetensors.torch import load_file, save_file

from pipeline import headers, saes
from pipeline.inputs import TENSORS

D_IN, D_OUT, D_SAE, K = 16, 12, 32, 4
SETTINGS = {
    "topk": {"k": K},
    "abstopk": {"k": K},
    "matching_pursuit": {"max_iterations": K},
    "temporal": {"n_heads": 2, "bottleneck_factor": 4, "kval_topk": K},
}
# These are trained under their own name and saved for inference as another: `jumprelu`.
TRAINED = ("batchtopk", "matryoshka_batchtopk")


def randomised(module):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(module.named_parameters()):
        value = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.data = (value.abs() if name == "threshold" else value).to(parameter.dtype)
    return module.eval()


def random_sae(architecture, **settings):
    """One of sae_lens's, with random weights: no skip connection, bias or threshold is 0."""
    made, config = SAE_CLASS_REGISTRY[architecture]
    settings = {"d_in": D_IN, "d_sae": D_SAE} | SETTINGS.get(architecture, {}) | settings
    if "transcoder" in architecture:
        settings |= {"d_out": D_OUT, "apply_b_dec_to_input": False}
    return randomised(made(config(**settings)))


def activations():
    return 3 * torch.randn(8, 5, D_IN, generator=torch.Generator().manual_seed(1))


def reloaded(module, folder):
    module.save_model(folder)
    return saes.load_folder(folder)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("architecture", sorted(SAE_CLASS_REGISTRY))
def test_every_architecture_gives_the_bits_that_sae_lens_gives(tmp_path, architecture):
    module, x = random_sae(architecture), activations()
    made = reloaded(module, tmp_path)(x)
    assert torch.equal(made.x_hat, module(x))
    assert torch.equal(made.features, module.encode(x))
    assert made.x_hat.shape == (8, 5, D_OUT if "transcoder" in architecture else D_IN)
    assert made.features.shape == (8, 5, D_SAE)
    assert 0 < (made.features != 0).float().mean() < 1


def test_planning_knows_the_architectures_of_sae_lens_and_their_tensors(tmp_path):
    assert set(TENSORS) == set(SAE_CLASS_REGISTRY)
    sizes = {"d_in": D_IN, "d_sae": D_SAE}
    for architecture, expected in TENSORS.items():
        random_sae(architecture).save_model(tmp_path / architecture)
        found = headers.tensors(tmp_path / architecture / "sae_weights.safetensors")
        sizes["d_out"] = D_OUT if "transcoder" in architecture else D_IN
        shapes = {name: tuple(sizes[axis] for axis in axes) for name, axes in expected}
        known = {name: tensor.shape for name, tensor in found.items() if not name.startswith("attn_layers.")}
        assert known == shapes, architecture


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_planning_finds_the_same_weights_not_finite(tmp_path, kind, value):
    path, weight = tmp_path / "a.safetensors", torch.full((3, 5), 1e4, dtype=kind)
    save_file({"b": weight, "ids": torch.zeros(2, dtype=torch.int64)}, path)
    headers.check_finite(path, headers.tensors(path))
    weight[1, 2] = value
    save_file({"a": torch.zeros(0), "b": weight}, path)
    with pytest.raises(ValueError, match=r"1 of the 15 values of 'b' are not finite"):
        headers.check_finite(path, headers.tensors(path))


@pytest.mark.parametrize("mode", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_scaling_of_the_input_is_applied_and_undone(tmp_path, architecture, mode):
    module, x = random_sae(architecture, normalize_activations=mode), activations()
    sae = reloaded(module, tmp_path)
    x_hat = sae(x).x_hat
    assert torch.equal(x_hat, module(x))
    assert torch.equal(x_hat, sae(x).x_hat)  # a second call finds nothing left over from the first
    torch.testing.assert_close(sae(10 * x).x_hat, 10 * x_hat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", sorted(SAE_CLASS_REGISTRY))
def test_the_bias_is_what_is_written_when_no_feature_fires(tmp_path, architecture):
    sae = reloaded(random_sae(architecture), tmp_path)
    bias = sae.bias(activations())
    assert torch.equal(bias, sae.module.b_dec.expand_as(bias))
    assert bias.abs().max() > 0
    assert not sae.scales_each_token


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_where_the_scale_of_each_token_is_undone_the_bias_has_it(tmp_path, architecture):
    x = activations() + 1
    sae = reloaded(random_sae(architecture, normalize_activations="constant_norm_rescale"), tmp_path / "norm")
    assert sae.scales_each_token
    norm = x.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(sae.bias(x), sae.module.b_dec * norm / D_IN**0.5)
    sae = reloaded(random_sae(architecture, normalize_activations="layer_norm"), tmp_path / "layer")
    assert sae.scales_each_token
    mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    torch.testing.assert_close(sae.bias(x), sae.module.b_dec * deviation + mean, rtol=1e-4, atol=1e-4)
    x_hat = sae(x).x_hat
    sae.bias(10 * x)
    assert torch.equal(sae(x).x_hat, x_hat)  # and leaves nothing behind


def test_heads_of_a_bias_come_side_by_side(tmp_path):
    metadata = SAEMetadata(hook_name="blocks.0.attn.hook_z")
    sae = reloaded(random_sae("standard", reshape_activations="hook_z", metadata=metadata), tmp_path)
    assert torch.equal(sae.bias(activations()), sae.module.b_dec.expand(8, 5, D_IN))


def test_a_skip_connection_is_part_of_the_reconstruction(tmp_path):
    module, x = random_sae("skip_transcoder"), activations()
    made = reloaded(module, tmp_path)(x)
    torch.testing.assert_close(made.x_hat - module.decode(made.features), x @ module.W_skip.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", TRAINED)
def test_what_is_saved_for_inference_under_another_name_loads(tmp_path, architecture):
    made, config = SAE_TRAINING_CLASS_REGISTRY[architecture]
    widths = {"matryoshka_widths": [D_SAE // 2, D_SAE]} if architecture.startswith("matryoshka") else {}
    module = randomised(made(config(d_in=D_IN, d_sae=D_SAE, k=K, **widths)))
    module.topk_threshold.fill_(0.5)
    module.save_inference_model(tmp_path)
    sae, x = saes.load_folder(tmp_path), activations()
    assert sae.module.cfg.architecture() == "jumprelu"
    assert torch.equal(sae(x).x_hat, SAE.load_from_disk(str(tmp_path))(x))
    assert 0 < (sae(x).features != 0).float().mean() < 1


@pytest.mark.parametrize("hook", ["blocks.0.attn.hook_z", None])
def test_heads_come_side_by_side_for_an_sae_that_sae_lens_feeds_head_by_head(tmp_path, hook):
    module = random_sae("topk", reshape_activations="hook_z", metadata=SAEMetadata(hook_name=hook))
    x = activations()
    made = reloaded(module, tmp_path)(x)
    assert made.x_hat.shape == x.shape
    assert torch.equal(made.x_hat, module(x.unflatten(-1, (4, 4))).flatten(-2))


def test_features_are_dense_even_where_sae_lens_keeps_them_sparse(tmp_path):
    dense, sparse, x = reloaded(random_sae("topk"), tmp_path), saes.load_folder(tmp_path), activations()
    sparse.module.activation_fn = TopK(K, use_sparse_activations=True)
    assert sparse.module.encode(x).is_sparse
    made = sparse(x)
    assert not made.features.is_sparse
    assert torch.equal(made.features, dense(x).features)
    torch.testing.assert_close(made.x_hat, dense(x).x_hat)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_run_in_float32(tmp_path, kind):
    module = random_sae("standard", dtype=str(kind).removeprefix("torch."))
    made = reloaded(module, tmp_path)(activations())
    assert (made.x_hat.dtype, made.features.dtype) == (torch.float32, torch.float32)
    assert torch.equal(made.x_hat, module.to(dtype=torch.float32)(activations()))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["W_dec", "b_enc"])
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path, name, value):
    random_sae("standard").save_model(tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    state = load_file(path)
    state[name].view(-1)[-1] = value
    save_file(state, path)
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.*'{name}'.*not finite"):
        saes.load_folder(tmp_path)


def test_the_number_of_features_is_known(tmp_path):
    assert reloaded(random_sae("standard", d_sae=24), tmp_path).d_sae == 24


def test_a_loaded_sae_is_in_evaluation_mode(tmp_path):
    assert not reloaded(random_sae("jumprelu"), tmp_path).module.training
