"""Loading models: what is refused, with the place named, and that the stored weights are what was loaded."""

import json
import shutil

import pytest
import torch
from conftest import DEMO, PLAIN
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from pipeline import activations, hub, models
from pipeline.decoder import decoder as decoder_of
from pipeline.decoder import in_precision
from pipeline.hooked import Hooked
from pipeline.lean import Lean


@pytest.fixture
def folder(tmp_path):
    """A copy of the demo's model that a test may damage."""
    return shutil.copytree(DEMO / "model", tmp_path / "model")


def test_saved_weights_come_back_bit_for_bit_with_fingerprint_and_settings(demo_weights, tmp_path):
    from pipeline.store import read_fingerprint

    path = tmp_path / "weights.safetensors"
    models.save(demo_weights, path, "0123abcd")
    again = models.load(path)
    assert again.settings == demo_weights.settings
    assert again.state.keys() == demo_weights.state.keys()
    assert all(torch.equal(again.state[name], tensor) for name, tensor in demo_weights.state.items())
    assert read_fingerprint(path) == "0123abcd"


def test_a_weight_that_is_not_finite_is_named(folder):
    state = load_file(folder / "model.safetensors")
    state["transformer.h.2.mlp.c_fc.weight"][3, 4] = torch.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"model: the weight 'blocks\.2\.mlp\.W_in' holds values that are not finite \(1 of"
    ):
        models.load_folder(folder, PLAIN)


def test_a_configuration_without_a_key_that_transformer_lens_needs_says_which(folder):
    settings = json.loads((folder / "config.json").read_text())
    del settings["n_ctx"]
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"config\.json lacks a key.*'n_ctx'"):
        models.load_folder(folder, PLAIN)


def test_a_folders_name_says_nothing_about_its_architecture(folder, demo_weights):
    # TransformerLens alone takes a path with "llama" in it for a Llama.
    weights = models.load_folder(folder.rename(folder.parent / "notes-on-llama"), PLAIN)
    assert weights.settings["original_architecture"] == "GPT2LMHeadModel"
    assert all(torch.equal(weights.state[name], tensor) for name, tensor in demo_weights.state.items())


def test_pickled_weights_are_never_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises((OSError, ValueError), match="safetensors"):
        models.load_folder(folder, PLAIN)


def test_an_activation_that_is_not_finite_is_named_with_its_place():
    x = torch.zeros(8, 4, 3)
    x[2, 1, 0] = torch.inf
    with pytest.raises(ValueError, match=r"'blocks\.1\.hook_resid_pre' is not finite at sequence 42, position 1"):
        activations.checked(40, "blocks.1.hook_resid_pre", x, None)
    assert list(activations.checked(0, "here", torch.zeros(8, 4, 3), x)) == ["activation", "stream"]


def tiny_folder(path, kind: str):
    """A random decoder of another family, saved by transformers."""
    import transformers

    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 24}
    if kind != "GPTNeoX":
        sizes |= {"num_key_value_heads": 1, "head_dim": 8}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.eval().save_pretrained(path)
    return model


@pytest.mark.parametrize("processing", [PLAIN, dict.fromkeys(PLAIN, True)], ids=["plain", "processed"])
@pytest.mark.parametrize("kind", ["GPTNeoX", "Llama", "Mistral", "Qwen2"])
def test_folders_of_other_families_predict_what_transformers_predicts(tmp_path, kind, processing):
    model = tiny_folder(tmp_path, kind)
    weights = models.load_folder(tmp_path, processing)
    assert isinstance(decoder_of(weights), Lean)
    rows = torch.randint(60, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(rows).logits.flatten(0, 1)
        for decoder in (Lean(weights), Hooked(weights)):
            unembedding = decoder.unembedding()
            logits = unembedding.logits(unembedding.products(unembedding.hidden(decoder.clean(rows))))
            assert_close(logits.log_softmax(-1), expected.log_softmax(-1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["GPTNeoX", "Llama"])
def test_a_stored_rotary_model_has_its_tables_and_runs_without_transformer_lens(tmp_path, kind):
    tiny_folder(tmp_path, kind)
    made = models.load_folder(tmp_path, PLAIN)
    models.save(made, tmp_path / "weights.safetensors", "f00d")
    again = models.load(tmp_path / "weights.safetensors")
    assert {name for name in again.state if name.startswith("rotary.")} == {"rotary.global.cos", "rotary.global.sin"}
    assert len(again.state["rotary.global.cos"]) == again.settings["n_ctx"]
    rows = torch.arange(16).view(2, 8)
    with torch.inference_mode():
        assert torch.equal(Lean(again).clean(rows), Lean(made).clean(rows))


FLOAT32 = {"blocks": "float32", "difference": "float32"}


@pytest.mark.parametrize("part", FLOAT32)
def test_tf32_is_refused_where_there_is_no_gpu(demo_weights, part):
    with pytest.raises(ValueError, match=r"tf32 needs a GPU, but this job runs on 'cpu'\. Set it to float32"):
        in_precision(demo_weights, FLOAT32 | {part: "tf32"}, "cpu")


@pytest.mark.parametrize(
    ("precision", "flags"),
    [
        (FLOAT32, (False, False)),
        (FLOAT32 | {"blocks": "tf32"}, (True, False)),
        (FLOAT32 | {"difference": "tf32"}, (False, True)),
        ({"blocks": "tf32"}, (True, False)),  # a stage that computes no differences
    ],
    ids=str,
)
def test_each_precision_sets_its_own_part(demo_weights, precision, flags):
    made = in_precision(demo_weights, precision, "cuda:0")
    assert (made.tf32, made.tf32_logits, made.unembedding().tf32) == (*flags, flags[1])


def test_a_family_that_transformer_lens_reads_by_name_only_is_refused(tmp_path):
    tiny_folder(tmp_path, "Gemma2")
    with pytest.raises(ValueError, match=r"can.t read .*Gemma2ForCausalLM"):
        models.load_folder(tmp_path, PLAIN)
    # Planning knows it, and which are read; those are read above.
    known = hub.architectures()
    assert "Gemma2ForCausalLM" not in known
    assert {f"{kind}ForCausalLM" for kind in ("GPTNeoX", "Llama", "Mistral", "Qwen2")} < set(known)
