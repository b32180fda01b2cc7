"""What is written in place of an activation. METHODS calls it x_new; every function here is one intervention.

An intervention takes what it needs, by name (`config.ARGUMENTS` says what each is made from):

    x             the activation                    noise         a standard normal vector
    x_hat         the SAE's reconstruction          act_noise     normal, with the covariance of x over the corpus
    mean          the corpus mean of x              error_noise   normal, with that of the SAE's error x_hat - x
    bias          what the SAE writes when all      other         the activation at a random token of the corpus
                  of its features are 0             another       the same, at one more
    linear_error  the part of the error that is     other_error   the SAE's error at a random token
                  linear in x                       alpha         a strength, from the experiment's grid `alphas`
    simple_error  the error's mean and shrinkage    cosine        the same, from `cosines`
                                                    head          where x belongs to one attention head

The names decide the rest: one that takes nothing of an SAE is run once per hook, one that takes something random is run
again for another seed. What is random depends on (seed, intervention, sequence, draw) only.

All are `seq pos d` except `mean` and `head`, ` d`, and the strengths. None changes its arguments. The linear part of
the error is fitted on the half of the corpus that the token is not in.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from inspect import signature

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline import labels
from pipeline.registry import Registry
from pipeline.types import Acts

INTERVENTIONS = Registry("intervention")
# Arguments that are numbers, of an experiment's grid.
STRENGTHS = ("alpha", "cosine")


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


@INTERVENTIONS.register
def resample(other: Acts) -> Acts:
    """The activation of another, randomly chosen token of the corpus. Causal scrubbing (Chan et al. 2022)."""
    return other.clone()


@INTERVENTIONS.register
def zero_head(x: Acts, head: Bool[Tensor, " d"]) -> Acts:
    """`zero` for one head of `hook_z`, the others left as they are."""
    return torch.where(head, 0, x)


@INTERVENTIONS.register
def mean_head(x: Acts, mean: Float[Tensor, " d"], head: Bool[Tensor, " d"]) -> Acts:
    """`mean` for one head of `hook_z`, the others left as they are."""
    return torch.where(head, mean, x)


@INTERVENTIONS.register
def resample_head(x: Acts, other: Acts, head: Bool[Tensor, " d"]) -> Acts:
    """`resample` for one head of `hook_z`, the others left as they are."""
    return torch.where(head, other, x)


@INTERVENTIONS.register
def decoder_bias(bias: Acts) -> Acts:
    """What the SAE writes when all of its features are 0."""
    return bias.clone()


@INTERVENTIONS.register
def error_cov_random(x: Acts, x_hat: Acts, error_noise: Acts) -> Acts:
    """x plus a random vector with the covariance of the SAE's errors, as long as the error here."""
    return x + _norm(x_hat - x) * _unit(error_noise)


@INTERVENTIONS.register
def act_cov_random(x: Acts, x_hat: Acts, act_noise: Acts) -> Acts:
    """x plus a random vector with the covariance of the activations, as long as the error.

    The difference of two normal vectors with mean and covariance of x has that direction too: Lee & Heimersheim 2024,
    "cov-random mixture".
    """
    return x + _norm(x_hat - x) * _unit(act_noise)


@INTERVENTIONS.register
def real_difference(x: Acts, x_hat: Acts, other: Acts, another: Acts) -> Acts:
    """x plus the difference of two random corpus activations, made as long as the error. Lee & Heimersheim 2024."""
    return x + _norm(x_hat - x) * _unit(other - another)


@INTERVENTIONS.register
def shuffled_error(x: Acts, x_hat: Acts, other_error: Acts) -> Acts:
    """x plus the SAE's error at another token, made as long as the error here."""
    return x + _norm(x_hat - x) * _unit(other_error)


@INTERVENTIONS.register
def flipped_error(x: Acts, x_hat: Acts) -> Acts:
    """x - e with e = x_hat - x: the error with the other sign."""
    return 2 * x - x_hat


@INTERVENTIONS.register
def shrinkage_restored(x_hat: Acts, simple_error: Acts) -> Acts:
    """x_hat without the error's mean and without what is a multiple of x - mean(x): shrinkage."""
    return x_hat - simple_error


@INTERVENTIONS.register
def linear_error_restored(x_hat: Acts, linear_error: Acts) -> Acts:
    """x_hat + (W x + b), the least squares fit of x - x_hat on x: all but the nonlinear error. Engels et al. 2024."""
    return x_hat - linear_error


@INTERVENTIONS.register
def nonlinear_error_restored(x: Acts, linear_error: Acts) -> Acts:
    """x_hat + (x - x_hat - (W x + b)): only the linear error is left. Engels et al. 2024."""
    return x + linear_error


@INTERVENTIONS.register
def error_scaled(x: Acts, x_hat: Acts, alpha: float) -> Acts:
    """x + alpha e: the SAE at alpha 1, the flipped error at -1. Heimersheim & Mendel 2024; Lee & Heimersheim 2024."""
    return x + alpha * (x_hat - x)


@INTERVENTIONS.register
def eps_random_scaled(x: Acts, x_hat: Acts, noise: Acts, alpha: float) -> Acts:
    """x plus a vector of random direction, alpha times as long as the error; the same direction for every alpha."""
    return x + alpha * _norm(x_hat - x) * _unit(noise)


@INTERVENTIONS.register
def act_cov_random_scaled(x: Acts, x_hat: Acts, act_noise: Acts, alpha: float) -> Acts:
    """The same along a random vector with the covariance of the activations."""
    return x + alpha * _norm(x_hat - x) * _unit(act_noise)


@INTERVENTIONS.register
def theta_random_at(x: Acts, noise: Acts, cosine: float) -> Acts:
    """x turned in a random direction until its cosine with x is `cosine`; norm kept."""
    return _norm(x) * _at_cosine(_unit(x), noise, cosine)


@INTERVENTIONS.register
def theta_error_at(x: Acts, x_hat: Acts, cosine: float) -> Acts:
    """x turned towards x_hat until its cosine with x is `cosine`; norm kept."""
    return _norm(x) * _at_cosine(_unit(x), x_hat, cosine)


def arguments(label: str) -> list[str]:
    """What an intervention takes, by name."""
    return list(signature(INTERVENTIONS[labels.parsed(label)[0]]).parameters)


def x_new(label: str, sources: Mapping[str, Callable[[], Tensor]]) -> Acts:
    """What an intervention writes; of the `sources` those that it takes are fetched. A strength is in its label."""
    name, strength = labels.parsed(label)
    given = dict.fromkeys(STRENGTHS, strength)
    return INTERVENTIONS[name](
        **{argument: given[argument] if argument in given else sources[argument]() for argument in arguments(label)}
    )


def standard_normal(
    seed: int, intervention: str, sequence: int, draw: int, shape: tuple[int, int]
) -> Float[Tensor, "pos d"]:
    """The noise of one sequence, made on the CPU from a hash of what it is for: batch, shard, device and order change
    nothing."""
    return torch.randn(shape, generator=_generator(seed, intervention, sequence, draw))


def random_rows(
    seed: int, intervention: str, sequence: int, draw: int, positions: int, rows: int
) -> Int[Tensor, " pos"]:
    """A number below `rows` for each position of a sequence: which token of the corpus's sample it is given."""
    return torch.randint(rows, (positions,), generator=_generator(seed, intervention, sequence, draw))


def _generator(*purpose: int | str) -> torch.Generator:
    """By a hash, because neighbouring small seeds give generators whose streams are not independent."""
    digest = hashlib.sha256("/".join(map(str, purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


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
    return along * direction + sine * _across(direction, noise)


def _at_cosine(direction: Tensor, towards: Tensor, cosine: float) -> Tensor:
    """A unit vector at that cosine with a unit vector, in the plane of it and `towards`."""
    return cosine * direction + math.sqrt(1 - cosine**2) * _across(direction, towards)


def _across(direction: Tensor, towards: Tensor) -> Tensor:
    """The unit vector orthogonal to a unit vector in its plane with `towards`."""
    return _unit(towards - (towards * direction).sum(-1, keepdim=True) * direction)
