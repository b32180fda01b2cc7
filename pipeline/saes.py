"""Sparse autoencoders and transcoders, as sae_lens runs them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline import hub
from pipeline.types import Acts


@dataclass(frozen=True)
class Reconstruction:
    """What an SAE makes of activations: its output and its features, `seq pos d` and `seq pos feature`."""

    x_hat: Acts
    features: Tensor


@dataclass(frozen=True)
class Autoencoder:
    """A loaded SAE or transcoder. `module` is sae_lens's; calling this runs its forward pass as sae_lens defines it."""

    module: torch.nn.Module

    def __call__(self, x: Acts) -> Reconstruction:
        """x_hat is `sae(x)`, with skip connection and input scaling where the SAE has them; the features are those that
        its forward pass made on the way, or `encode(x)` where it has another way."""
        made, encode = [], self.module.encode

        def encode_and_keep(x: Acts) -> Tensor:
            made.append(encode(x))
            return made[-1]

        self.module.encode = encode_and_keep
        try:
            x_hat = self.module(x)
        finally:
            del self.module.encode
        features = made[0] if made else encode(x)
        return Reconstruction(x_hat, features.to_dense() if features.is_sparse else features)

    def bias(self, x: Acts) -> Tensor:
        """What the decoder writes when all features are 0, `SAE.decode(0)`; where the input's scale is undone, it is
        that of x."""
        return self.module.decode(torch.zeros_like(self.encode(x)))

    @property
    def scales_each_token(self) -> bool:
        """Whether the decoder undoes a scaling that is each token's own, so that its bias is too."""
        return self.module.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale")

    def encode(self, x: Acts) -> Tensor:
        """Features, `seq pos feature`."""
        features = self.module.encode(x)
        return features.to_dense() if features.is_sparse else features

    @property
    def d_sae(self) -> int:
        return self.module.cfg.d_sae


def load(source: Mapping, device: str = "cpu") -> Autoencoder:
    """An SAE from where a job's settings say."""
    return load_release(source, device) if "release" in source else load_folder(Path(source["path"]), device)


def load_folder(folder: Path, device: str = "cpu") -> Autoencoder:
    """An SAE that sae_lens or sparsify has saved, in float32. ValueError where a weight is not finite."""
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    converter = _sparsify if is_sparsify(folder) else loaders.sae_lens_disk_loader
    with _fitting(str(folder)):
        module = SAE.load_from_disk(str(folder), device=device, dtype="float32", converter=converter)
    return _ready(module, str(folder))


def is_sparsify(folder: Path) -> bool:
    """Whether a folder holds an SAE in the format of EleutherAI's sparsify."""
    return (folder / "sae.safetensors").exists()


def _sparsify(folder: str, device: str, cfg_overrides: dict | None) -> tuple[dict, dict]:
    """sae_lens's converter, which takes `W_dec` for the transpose of what sparsify writes, put right."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    cfg, state = loaders.sparsify_disk_loader(folder, device, cfg_overrides)
    with safe_open(Path(folder) / "sae.safetensors", framework="pt") as file:
        if "W_dec" in file.keys():  # noqa: SIM118
            state["W_dec"] = state["W_dec"].T.contiguous()
    return cfg, state


def load_release(source: Mapping, device: str = "cpu") -> Autoencoder:
    """An SAE of a release, as `SAE.from_pretrained` loads it, in float32. ValueError where a weight is not finite, and
    where the repository is not at the planned commit any more (sae_lens takes no revision)."""
    from sae_lens import SAE

    what = f"'{source['sae_id']}' of '{source['release']}'"
    hub.refuse_forced_unpickling()
    with hub.explained(what), _fitting(what):
        module = SAE.from_pretrained(source["release"], source["sae_id"], device=device, dtype="float32")
    found = hub.cached_commit(source["repo"])
    if found != source["commit"]:
        raise ValueError(
            f"{what}: '{source['repo']}' is at commit {found}, but this job was planned with {source['commit']}. "
            f"Delete what {hub.SOURCES} holds of this release, and run again."
        )
    return _ready(module, what)


@contextmanager
def _fitting(what: str) -> Iterator[None]:
    """Weights that do not fit their configuration, or are more than weights, as a ValueError."""
    try:
        yield
    except (RuntimeError, KeyError, UnpicklingError) as error:
        raise ValueError(f"{what}: sae_lens can't load these weights: {error}") from None


def _ready(module: torch.nn.Module, what: str) -> Autoencoder:
    """Heads of `hook_z` come side by side here, so sae_lens's own reshaping is switched off."""
    module = module.eval()
    for name, tensor in module.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{what}: the weight '{name}' of this SAE holds values that are not finite.")
    if module.cfg.reshape_activations == "hook_z" or (module.cfg.metadata.hook_name or "").endswith("_z"):
        module.turn_off_forward_pass_hook_z_reshaping()
    return Autoencoder(module)


# What planning reads of a configuration.
SAID = ("architecture", "d_in", "d_out", "d_sae", "normalize_activations", "reshape_activations")


def described(release: str, names: list[str] | None) -> dict:
    """The configurations of SAEs of a release as sae_lens reads them, and the repository with its commit; without
    names, the configuration of the SAE in a folder."""
    from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor, get_repo_id_and_folder_name

    if names is None:
        return _said(_translated(Path(release)))
    found = {}
    for name in names:
        cfg = _configuration(release, name)
        if cfg.get("normalize_activations") == "expected_average_only_in" and get_norm_scaling_factor(release, name):
            cfg["normalize_activations"] = "none"  # `from_pretrained` folds the factor into the weights
        found[name] = _said(cfg)
    repo = get_repo_id_and_folder_name(release, names[0])[0]
    return {"repo": repo, "commit": hub.commit_of(repo), "saes": found}


def _said(cfg: dict) -> dict:
    return {key: cfg[key] for key in SAID if key in cfg} | {"metadata": cfg.get("metadata") or {}}


def _translated(folder: Path) -> dict:
    from sae_lens.loading import pretrained_sae_loaders as loaders

    read = loaders.get_sparsify_config_from_disk if is_sparsify(folder) else loaders.get_sae_lens_config_from_disk
    try:
        return loaders.handle_config_defaulting(read(folder, "cpu"))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: sae_lens can't read its cfg.json: {error!r}.") from None


def _configuration(release: str, name: str) -> dict:
    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

    what = f"SAE '{name}' of '{release}'"
    try:
        with hub.explained(what):
            return load_sae_config_from_huggingface(release, name)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{what}: sae_lens can't read its configuration: {error!r}.") from None
