"""The decoder that runs a model: `Lean` where it computes the architecture exactly, `Hooked` for all the others."""

from pipeline.hooked import Hooked
from pipeline.hooks import Hook, parse_hook
from pipeline.lean import Lean, can_run
from pipeline.models import Weights

Decoder = Lean | Hooked


def decoder(weights: Weights, tf32: bool = False, tf32_logits: bool = False) -> Decoder:
    """The fastest implementation that computes this architecture exactly."""
    return (Lean if can_run(weights.settings) else Hooked)(weights, tf32, tf32_logits)


def in_precision(weights: Weights, precision: dict[str, str], device: str) -> Decoder:
    """The decoder in the precision that a job asks for. ValueError where the device has no TF32."""
    if "tf32" in precision.values() and not device.startswith("cuda"):
        raise ValueError(
            f"precision: tf32 needs a GPU, but this job runs on '{device}'. Set it to float32, or `device` in the "
            "profile to cuda."
        )
    return decoder(weights, precision["blocks"] == "tf32", precision.get("difference") == "tf32")


def hook_of(name: str, weights: Weights) -> Hook:
    """A hook by name, checked against the model's number of layers."""
    return parse_hook(name, weights.layers)
