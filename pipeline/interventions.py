"""What is written in place of an activation. METHODS calls it x_new; every function here is one intervention.

An intervention takes what it needs, by name: `x` the activation, `x_hat` the SAE's reconstruction, `noise` a standard
normal vector per token that depends on (seed, intervention, sequence, draw) only, `mean` the corpus mean of x. The
names decide the rest: without `x_hat` it is run once per hook, not per SAE; with `noise` it is run again for another
seed.

All are `seq pos d` except `mean`, ` d`. None changes its arguments.
"""

import hashlib
from collections.abc import Callable, Mapping
from inspect import signature

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.registry import Registry
from pipeline.types import Acts

INTERVENTIONS = Registry("intervention")


@INTERVENTIONS.register
def identity(x: Acts) -> Acts:
    """x itself: the control of the patch and of the resumed run. Its KL is the noise floor, 0 in float32."""
    return x.clone()


@INTERVENTIONS.register
def sae(x_hat: Acts) -> Acts:
    """The reconstruction."""
    return x_hat.clone()


@INTERVENTIONS.register
def sae_norm_corrected(x: Acts, x_hat: Acts) -> Acts:
    """x_hat rescaled to |x|: removes shrinkage, keeps the error in direction. Gurnee 2024."""
    return x_hat * _ratio(_norm(x), _norm(x_hat))


@INTERVENTIONS.register
def sae_norm(x: Acts, x_hat: Acts) -> Acts:
    """x rescaled to |x_hat|: the shrinkage alone, direction kept. Gurnee 2024."""
    return x * _ratio(_norm(x_hat), _norm(x))


@INTERVENTIONS.register
def eps_random(x: Acts, x_hat: Acts, noise: Acts) -> Acts:
    """x plus a vector of random direction as long as the SAE's error: |x_new - x| = |x_hat - x|. Gurnee 2024."""
    return x + _norm(x_hat - x) * _unit(noise)


@INTERVENTIONS.register
def theta_random(x: Acts, x_hat: Acts, noise: Acts) -> Acts:
    """x turned in a random direction by the angle between x and x_hat, norm kept: |x_new| = |x|. Gurnee 2024."""
    return _norm(x) * _turned(x, x_hat, noise)


@INTERVENTIONS.register
def theta_random_sae_norm(x: Acts, x_hat: Acts, noise: Acts) -> Acts:
    """The same turn with the reconstruction's length: |x_new| = |x_hat|. Gurnee 2024."""
    return _norm(x_hat) * _turned(x, x_hat, noise)


@INTERVENTIONS.register
def zero(x: Acts) -> Acts:
    """0. Bricken et al. 2023; the usual baseline of 'loss recovered'."""
    return torch.zeros_like(x)


@INTERVENTIONS.register
def mean(x: Acts, mean: Float[Tensor, " d"]) -> Acts:
    """The mean of x over the whole corpus, special tokens left out."""
    return mean.expand_as(x).clone()


def arguments(name: str) -> list[str]:
    """What an intervention takes, by name."""
    return list(signature(INTERVENTIONS[name]).parameters)


def x_new(name: str, sources: Mapping[str, Callable[[], Tensor]]) -> Acts:
    """What an intervention writes; of the `sources` those that it takes are fetched."""
    return INTERVENTIONS[name](**{argument: sources[argument]() for argument in arguments(name)})


def standard_normal(
    seed: int, intervention: str, sequence: int, draw: int, shape: tuple[int, int]
) -> Float[Tensor, "pos d"]:
    """The noise of one sequence, made on the CPU from a hash of what it is for: batch, shard, device and order change
    nothing.

    A hash, because neighbouring small seeds give generators whose streams are not independent.
    """
    digest = hashlib.sha256(f"{seed}/{intervention}/{sequence}/{draw}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.randn(shape, generator=generator)


def _norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True)


def _unit(x: Tensor) -> Tensor:
    return _ratio(x, _norm(x))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is 0: a vector without length has no direction to keep."""
    return torch.where(
        denominator > 0, numerator / denominator.where(denominator > 0, torch.ones_like(denominator)), 0.0
    )


def _turned(x: Tensor, x_hat: Tensor, noise: Tensor) -> Tensor:
    """A unit vector at the angle of (x, x_hat) from x, in the plane of x and the noise."""
    direction = _unit(x)
    along = (_unit(x_hat) * direction).sum(-1, keepdim=True)
    # The sine from the residual, not from sqrt(1 - cos²), which loses half the digits near cos = 1.
    sine = _norm(_unit(x_hat) - along * direction)
    across = _unit(noise - (noise * direction).sum(-1, keepdim=True) * direction)
    return along * direction + sine * across
