"""Axis names as types: `seq` sequences of a micro-batch, `pos` positions, `d` dimensions, `v` vocabulary."""

from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor

Acts = Float[Tensor, "seq pos d"]
Residual = Float[Tensor, "seq pos d_model"]
Tokens = Int[Tensor, "seq pos"]
Mask = Bool[Tensor, "seq pos"]
PerToken = Float[Tensor, "seq pos"]
# float32 or better: a KL near 1e-6 is noise in bfloat16
Hidden = Float32[Tensor, "token d_model"] | Float64[Tensor, "token d_model"]
Logits = Float32[Tensor, "token v"] | Float64[Tensor, "token v"]
TokenValues = Float32[Tensor, " token"] | Float64[Tensor, " token"]

__all__ = ["Acts", "Hidden", "Logits", "Mask", "PerToken", "Residual", "TokenValues", "Tokens"]
