"""Sparse autoencoders and transcoders, as sae_lens runs them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

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
        """x_hat is `sae(x)`, with skip connection and input scaling where the SAE has them."""
        features = self.module.encode(x)
        return Reconstruction(self.module(x), features.to_dense() if features.is_sparse else features)

    @property
    def d_sae(self) -> int:
        return self.module.cfg.d_sae


def load_folder(folder: Path, device: str = "cpu") -> Autoencoder:
    """An SAE that sae_lens has saved, in float32. ValueError where a weight is not finite.

    Heads of `hook_z` come side by side here, so sae_lens's own reshaping is switched off.
    """
    from sae_lens import SAE

    module = SAE.load_from_disk(str(folder), device=device, dtype="float32").eval()
    for name, tensor in module.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{folder}: the weight '{name}' of this SAE holds values that are not finite.")
    if module.cfg.reshape_activations == "hook_z" or (module.cfg.metadata.hook_name or "").endswith("_z"):
        module.turn_off_forward_pass_hook_z_reshaping()
    return Autoencoder(module)
