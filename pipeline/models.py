"""Language models: a Hugging Face folder or a name of the hub -> processed TransformerLens weights, and their file."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline import hub, seals
from pipeline.hooks import read_json

# Positions for which rotary tables are stored; no SAE that we know was trained on longer contexts.
CONTEXT = 8192


@dataclass(frozen=True)
class Weights:
    """What `weights` stores: TransformerLens's configuration as plain values, and its state dict."""

    settings: dict
    state: dict[str, torch.Tensor]

    @property
    def layers(self) -> int:
        return self.settings["n_layers"]


def load_source(source: Mapping, processing: Mapping[str, bool]) -> Weights:
    """The model from where a job's settings say: a folder, or a repository at a commit. One that TransformerLens knows
    by name is loaded by its `from_pretrained`, any other as a folder."""
    safe = not source.get("allow_pickle", False)
    if "path" in source:
        return load_folder(Path(source["path"]), processing, safe)
    if source["name"].lower() in hub.model_names():
        return load_name(source, processing, safe)
    files = ("*.json", "*.safetensors") if safe else ("*.json", "*.safetensors", "*.bin")
    return load_folder(hub.folder(source["repo"], source["commit"], files), processing, safe)


def load_name(source: Mapping, processing: Mapping[str, bool], safe: bool = True) -> Weights:
    """A model that TransformerLens knows, as `HookedTransformer.from_pretrained` loads it, in float32, at the planned
    commit, and running no code of the repository. ValueError where a weight is not finite."""
    from transformer_lens import HookedTransformer
    from transformers import AutoTokenizer

    repo, commit = source["repo"], source["commit"]
    what = f"Model '{source['name']}'"
    hub.check_code(what, repo, read_json(hub.folder(repo, commit, ("config.json",)) / "config.json"))
    with hub.explained(f"{what}: '{repo}' at {commit}"), _no_pickle_unless(safe, what):
        # TransformerLens alone would take the tokenizer of the newest commit.
        tokenizer = AutoTokenizer.from_pretrained(
            hub.folder(repo, commit, hub.TOKENIZER), add_bos_token=True, trust_remote_code=False
        )
        model = HookedTransformer.from_pretrained(
            source["name"],
            tokenizer=tokenizer,
            fold_value_biases=processing["fold_ln"],
            device="cpu",
            dtype="float32",
            revision=commit,
            use_safetensors=True if safe else None,
            trust_remote_code=False,
            **processing,
        )
    return checked(Weights(_plain(model.cfg.to_dict()), _parameters(model)), what)


@contextmanager
def _no_pickle_unless(safe: bool, what: str) -> Iterator[None]:
    """Weights that are pickled are an error that says what to do; without `safe` they are read with `weights_only`."""
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # else transformers asks a bot on the hub for another commit
    hub.refuse_forced_unpickling()
    try:
        yield
    except OSError as error:
        if safe and "safetensors" in str(error):
            advice = "Pickled weights are refused unless the configuration says `allow_pickle: true` for this model."
            raise ValueError(f"{what}: there are no safetensors weights. {advice} ({error})") from None
        raise
    except UnpicklingError as error:
        raise ValueError(f"{what}: its pickled weights are more than weights: {error}") from None


def load_folder(folder: Path, processing: Mapping[str, bool], safe: bool = True) -> Weights:
    """The model of a Hugging Face folder as TransformerLens reads it, in float32.

    `processing` holds fold_ln, center_writing_weights and center_unembed; value biases are folded with the LayerNorm,
    as `HookedTransformer.from_pretrained` does. Only safetensors are read where `safe`, and no code of the folder is
    run. ValueError where a weight is not finite.
    """
    from transformer_lens import HookedTransformer, loading_from_pretrained
    from transformers import AutoModelForCausalLM

    folder = Path(folder).resolve()
    with _no_pickle_unless(safe, str(folder)):
        source = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True if safe else None,
            trust_remote_code=False,
            local_files_only=True,
        )
    fold_ln = processing["fold_ln"]
    # TransformerLens guesses some architectures from the path ("llama", "gemma"): it is shown one that says nothing.
    with tempfile.TemporaryDirectory() as neutral:
        link = Path(neutral) / "model"
        link.symlink_to(folder)
        try:
            cfg = loading_from_pretrained.get_pretrained_model_config(
                str(link), fold_ln=fold_ln, device="cpu", dtype=torch.float32
            )
        except AttributeError as error:  # GPT-2 folders saved by transformers 5 lack `n_ctx`, for one
            message = f"{folder / 'config.json'} lacks a key that TransformerLens needs: {error}. Add it."
            raise ValueError(message) from error
        except NotImplementedError as error:
            raise ValueError(f"TransformerLens can't read {folder}: {error} Use a model of another family.") from error
        state = loading_from_pretrained.get_pretrained_state_dict(str(link), cfg, source, dtype=torch.float32)
    cfg.tokenizer_name = None  # the weights are all that is wanted here
    model = HookedTransformer(cfg, move_to_device=False)
    model.load_and_process_state_dict(state, fold_value_biases=fold_ln, **processing)
    return checked(Weights(_plain(model.cfg.to_dict()), _parameters(model)), folder)


def _plain(settings: dict) -> dict:
    """TransformerLens's settings as JSON values; what is not one (dtype, device, ...) goes as its name."""
    plain = {}
    for name, value in settings.items():
        try:
            plain[name] = json.loads(json.dumps(value))
        except TypeError:
            plain[name] = str(value).removeprefix("torch.")
    return plain


def _parameters(model) -> dict[str, torch.Tensor]:
    """The state dict without the buffers that follow from the configuration, and the tables of rotary positions."""
    named = {name: tensor.detach().contiguous().clone() for name, tensor in model.named_parameters()}
    return named | _rotary_tables(model)


def _rotary_tables(model) -> dict[str, torch.Tensor]:
    """`rotary.{kind}.cos` and `.sin`, `pos rotary_dim`, of the first CONTEXT positions, for each kind of attention."""
    tables = {}
    if model.cfg.positional_embedding_type == "rotary":
        for attention in (block.attn for block in model.blocks):
            if f"rotary.{attention.attn_type}.cos" not in tables:
                length, base = min(model.cfg.n_ctx, CONTEXT), attention._rotary_base()
                sin, cos = attention.calculate_sin_cos_rotary(model.cfg.rotary_dim, length, base, torch.float32)
                tables |= {f"rotary.{attention.attn_type}.sin": sin, f"rotary.{attention.attn_type}.cos": cos}
    return tables


def checked(weights: Weights, source: object) -> Weights:
    """The same weights. ValueError names the first parameter that holds a NaN or an infinity."""
    for name, tensor in weights.state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{source}: the weight '{name}' holds values that are not finite "
                f"({int((~torch.isfinite(tensor)).sum())} of them)."
            )
    return weights


def save(weights: Weights, path: Path, fingerprint: str) -> None:
    """Write weights as safetensors, with settings, fingerprint and checksum in the header."""
    metadata = {"fingerprint": fingerprint, "settings": json.dumps(weights.settings), "checksum": seals.UNSEALED}
    save_file(weights.state, path, metadata=metadata)
    seals.seal(path)


def load(path: Path, device: str = "cpu") -> Weights:
    """Read what `save` has written."""
    with safe_open(path, framework="pt", device=device) as file:
        return Weights(json.loads(file.metadata()["settings"]), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
