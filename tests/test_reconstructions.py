"""What an SAE makes of stored activations: numbers per token by hand, and refusals of what is wrong."""

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tables import HOOK, arrays, call, tokens
from test_saes import D_IN, D_OUT, D_SAE, random_sae

from pipeline import reconstructions, saes, store
from pipeline.store import CHUNK

OUT = "blocks.1.hook_mlp_out"
SEQUENCES, POSITIONS = CHUNK + 3, 5  # a full micro-batch and a short one


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


DENSE = torch.tensor([1, 3])


def acts(*rows):
    """Vectors as one sequence, `seq pos d`."""
    return torch.tensor([rows], dtype=torch.float32)


def numbers(x, x_hat, features):
    values = reconstructions.per_token(acts(x), acts(x_hat), acts(features), DENSE)
    assert {value.shape for value in values.values()} == {(1, 1)}
    return {name: value.item() for name, value in values.items()}


def test_numbers_per_token_by_hand():
    found = numbers(x=[3, 4, 0], x_hat=[3, 0, 4], features=[0, 2, -0.5, 0])
    expected = {"l0": 2, "l1": 2.5, "norm": 5, "sae_norm": 5, "eps": 32**0.5, "cos": 9 / 25}
    expected["dense"] = 1  # of the two dense ones, only one fires
    assert found == pytest.approx(expected, rel=1e-6)


def test_numbers_are_of_each_token_alone():
    x, x_hat = acts([3, 4, 0], [0, 0, 2]), acts([6, 8, 0], [0, 0, -1])
    found = reconstructions.per_token(x, x_hat, acts([1, 0, 0, 0], [1, 2, 3, 4]), DENSE)
    expected = {"l0": [1, 4], "l1": [1, 10], "norm": [5, 2], "sae_norm": [10, 1], "eps": [5, 3], "cos": [1, -1]}
    expected["dense"] = [0, 2]
    assert {name: value[0].tolist() for name, value in found.items()} == expected


@pytest.mark.parametrize(("x", "x_hat"), [([0, 0], [0, 0]), ([0, 0], [3, 4]), ([3, 4], [0, 0])])
def test_vectors_of_zero_give_finite_numbers(x, x_hat):
    found = numbers(x, x_hat, features=[0, 0, 0, 0])
    assert np.isfinite(list(found.values())).all()
    assert (found["cos"], found["l0"], found["l1"]) == (0, 0, 0)


def test_the_cosine_never_leaves_its_range():
    x = torch.randn(8, 50, 300, generator=torch.Generator().manual_seed(0))
    for sign in (1, -1):
        cos = reconstructions.per_token(x, sign * x, x, DENSE)["cos"]
        assert (cos.abs() <= 1).all()
        torch.testing.assert_close(cos, torch.full_like(cos, sign))


def stored(width=D_IN, seed=0):
    """Random activations of 11 sequences, each of a scale of its own."""
    x = np.random.default_rng(seed).normal(size=(SEQUENCES, POSITIONS, width)).astype(np.float32)
    return x * np.arange(1, SEQUENCES + 1, dtype=np.float32)[:, None, None]


def asked(
    folder, module, read, write, first=0, special=None, read_at=HOOK, write_at=HOOK, density=None, dense_contexts=64
):
    """The call of the stage on a saved SAE, for activations that begin with the sequence `first` of the corpus; the
    corpus's first contexts are `density`, or the same."""
    special = np.zeros((first + len(read), POSITIONS)) if special is None else special
    module.save_model(folder / "sae")
    inputs = {"tokens": [tokens(folder, special)]}
    for role, x in (("read", read), ("write", write)):
        inputs[role] = [arrays(folder / f"{role}.h5", "seq pos d", {"activation": x}, first=first)]
    density = arrays(folder / "density.h5", "seq pos d", {"activation": read if density is None else density}, first=0)
    inputs["density"] = [density]
    settings = {"path": str(folder / "sae"), "content": "c0de", "model": "tiny", "read": read_at, "write": write_at}
    settings["dense_contexts"] = dense_contexts
    key = {"sae": "early", "corpus": "story", "shard": "0-of-1"}
    return call([folder / "made.h5"], inputs, key, **settings)


def worked(asked):
    reconstructions.work([asked])
    with h5py.File(asked.output) as file:
        return {name: file[name][:] for name in file}, dict(file.attrs)


def test_every_sequence_is_reconstructed_and_measured(tmp_path):
    x = stored()
    found, attributes = worked(asked(tmp_path, random_sae("topk"), x, x))
    sae = saes.load_folder(tmp_path / "sae")
    made = sae(torch.from_numpy(x))
    np.testing.assert_allclose(found["x_hat"], made.x_hat, rtol=1e-5, atol=1e-4)
    assert set(found) == {"x_hat", "feature_count", "bias", *reconstructions.PER_TOKEN}
    np.testing.assert_array_equal(found["bias"], sae.module.b_dec)
    fires = (made.features != 0).float().mean((0, 1))
    assert 0 < (fires > reconstructions.DENSE).sum() < D_SAE
    dense = (fires > reconstructions.DENSE).nonzero().squeeze(1)
    for name, expected in reconstructions.per_token(torch.from_numpy(x), made.x_hat, made.features, dense).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)
    told = {"fingerprint": "f00d", "architecture": "topk", "d_in": D_IN, "first": 0, "read": HOOK, "write": HOOK}
    told |= {"sae": "early", "model": "tiny", "corpus": "story"}
    assert {name: attributes[name] for name in told} == told


def test_a_transcoder_reads_at_one_hook_and_is_compared_with_the_other(tmp_path):
    read, write = stored(), stored(D_OUT, seed=1)
    found, attributes = worked(asked(tmp_path, random_sae("skip_transcoder"), read, write, write_at=OUT))
    sae = saes.load_folder(tmp_path / "sae")
    x_hat = sae(torch.from_numpy(read)).x_hat.numpy()
    np.testing.assert_allclose(found["x_hat"], x_hat, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found["norm"], np.linalg.norm(write, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(found["eps"], np.linalg.norm(found["x_hat"] - write, axis=-1), rtol=1e-4)
    assert (attributes["read"], attributes["write"], attributes["d_in"]) == (HOOK, OUT, D_IN)
    np.testing.assert_array_equal(found["bias"], sae.module.b_dec)  # without what the skip connection adds


@pytest.mark.parametrize("mode", ["layer_norm", "constant_norm_rescale"])
def test_an_sae_that_scales_each_token_has_a_bias_of_each_token(tmp_path, mode):
    x = stored()
    found, _ = worked(asked(tmp_path, random_sae("standard", normalize_activations=mode), x, x))
    sae = saes.load_folder(tmp_path / "sae")
    with store.arrays(tmp_path / "made.h5", {"bias": "seq pos d"}):
        assert found["bias"].shape == x.shape
    np.testing.assert_allclose(found["bias"], sae.bias(torch.from_numpy(x)), rtol=1e-5, atol=1e-5)
    assert not np.allclose(found["bias"][0], found["bias"][10])


def test_the_bias_is_not_that_of_the_features_that_fire(tmp_path):
    x = stored()
    for factor in (1, 5):
        found, _ = worked(asked(tmp_path, random_sae("standard"), factor * x, factor * x))
        np.testing.assert_array_equal(found["bias"], saes.load_folder(tmp_path / "sae").module.b_dec)


def test_a_shard_gives_the_bits_that_the_whole_gives(tmp_path):
    x = stored()
    special = np.random.default_rng(0).random((SEQUENCES, POSITIONS)) < 0.3
    whole, _ = worked(asked(tmp_path, random_sae("standard"), x, x, special=special))
    parts = []
    for first, last in ((0, CHUNK), (CHUNK, SEQUENCES)):
        part, attributes = worked(
            asked(tmp_path, random_sae("standard"), x[first:last], x[first:last], first, special, density=x)
        )
        assert attributes["first"] == first
        parts.append(part)
    for name in ("x_hat", *reconstructions.PER_TOKEN):
        assert np.array_equal(np.concatenate([part[name] for part in parts]), whole[name]), name
    assert np.array_equal(parts[0]["feature_count"] + parts[1]["feature_count"], whole["feature_count"])


def test_dense_features_are_those_of_ordinary_tokens_of_the_first_contexts(tmp_path, monkeypatch):
    monkeypatch.setattr(reconstructions, "DENSE", 0.5)
    x, special = stored(), np.zeros((16 + SEQUENCES, POSITIONS), bool)
    special[:, 0] = special[1] = True  # 8 ordinary tokens are left of the first three contexts
    asking = asked(tmp_path, random_sae("standard"), 9 * x, 9 * x, 16, special, density=x, dense_contexts=3)
    found, _ = worked(asking)
    sae = saes.load_folder(tmp_path / "sae")
    ordinary = sae(torch.from_numpy(x)).features[:3][torch.from_numpy(~special[:3])]
    dense = (ordinary != 0).sum(0) > 4
    assert 0 < dense.sum() < D_SAE
    fired = sae(torch.from_numpy(9 * x)).features[..., dense] != 0
    assert np.array_equal(found["dense"], fired.sum(-1))


def test_the_biases_of_shards_are_those_of_the_whole(tmp_path):
    x, sae = stored(), random_sae("standard", normalize_activations="layer_norm")
    whole, _ = worked(asked(tmp_path, sae, x, x))
    parts = [worked(asked(tmp_path, sae, part, part, first=first))[0] for first, part in ((0, x[:8]), (8, x[8:]))]
    assert np.array_equal(np.concatenate([part["bias"] for part in parts]), whole["bias"])


@pytest.mark.parametrize("first", [0, 16])
def test_features_are_counted_at_ordinary_tokens_only(tmp_path, first):
    x = stored()
    special = np.ones((first + SEQUENCES, POSITIONS), bool)
    special[first + 2, 1:3], special[first + 9, 4] = False, False
    found, _ = worked(asked(tmp_path, random_sae("topk"), x, x, first, special))
    features = saes.load_folder(tmp_path / "sae")(torch.from_numpy(x)).features.numpy()
    expected = (features[2, 1] != 0).astype(int) + (features[2, 2] != 0) + (features[9, 4] != 0)
    assert expected.any()
    assert np.array_equal(found["feature_count"], expected)
    assert found["feature_count"].shape == (D_SAE,)


@pytest.mark.parametrize(("place", "first"), [((2, 3), 0), ((9, 1), 0), ((9, 1), 24)])
def test_a_reconstruction_that_is_not_finite_is_named_by_sequence_and_position(tmp_path, place, first):
    x = stored()
    x[place] = np.nan
    with pytest.raises(ValueError, match=rf"'early' is not finite at sequence {first + place[0]}, position {place[1]}"):
        worked(asked(tmp_path, random_sae("standard"), x, x, first))
    assert not (tmp_path / "made.h5").exists()


def test_activations_that_the_sae_makes_too_large_are_named_too(tmp_path):
    x = stored()
    asking = asked(tmp_path, random_sae("standard"), x, x)
    path = tmp_path / "sae" / "sae_weights.safetensors"
    save_file({name: 1e30 * tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="not finite at sequence 0, position 0"):
        worked(asking)


def test_a_reconstruction_of_another_shape_than_the_activation_is_an_error(tmp_path):
    read, write = stored(), stored(D_OUT - 1)
    with pytest.raises(ValueError, match=rf"'early' gives .*{D_OUT}\], but '{OUT}' holds .*{D_OUT - 1}\]"):
        worked(asked(tmp_path, random_sae("transcoder"), read, write, write_at=OUT))
    assert not (tmp_path / "made.h5").exists()


def test_activations_of_another_kind_of_file_are_refused(tmp_path):
    x = stored()
    asking = asked(tmp_path, random_sae("standard"), x, x)
    arrays(asking.input("write"), "seq pos", {"activation": x[..., 0]}, first=0)
    with pytest.raises(ValueError, match=r"write\.h5: 'activation' has axes 'seq pos', expected 'seq pos d'"):
        worked(asking)
