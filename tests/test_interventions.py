"""What every intervention promises, as equations, in float64 so that only algebra is tested."""

from inspect import signature

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pipeline.interventions import INTERVENTIONS, standard_normal

settings.register_profile("torch", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("torch")

EPS_MATCHED = ["eps_random"]
RETURNS_X_FOR_A_PERFECT_SAE = [
    "identity",
    "sae",
    "sae_norm",
    "sae_norm_corrected",
    "eps_random",
    "theta_random",
    "theta_random_sae_norm",
]


@st.composite
def cases(draw) -> dict[str, torch.Tensor]:
    """x, x_hat, noise and mean over width, scale and size of the error."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    seq, pos, d = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.sampled_from([2, 3, 16, 64]))
    scale, error = 10.0 ** draw(st.floats(-3, 4)), 10.0 ** draw(st.floats(-6, 1))
    x, e, noise = (torch.randn(seq, pos, d, generator=generator, dtype=torch.float64) for _ in range(3))
    mean = scale * torch.randn(d, generator=generator, dtype=torch.float64)
    return {"x": scale * x, "x_hat": scale * (x + error * e), "noise": noise, "mean": mean}


def apply(name: str, case: dict[str, torch.Tensor]) -> torch.Tensor:
    function = INTERVENTIONS[name]
    return function(**{argument: case[argument] for argument in signature(function).parameters})


def norm(x: torch.Tensor) -> torch.Tensor:
    return x.norm(dim=-1)


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(-1) / (norm(a) * norm(b))


@pytest.mark.parametrize("name", INTERVENTIONS)
@given(case=cases())
def test_inputs_are_not_modified_and_not_returned(name, case):
    before = {key: value.clone() for key, value in case.items()}
    x_new = apply(name, case)
    assert x_new.shape == case["x"].shape
    assert x_new.dtype == case["x"].dtype
    x_new += 1
    for key, value in case.items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", INTERVENTIONS)
@given(case=cases())
def test_a_token_depends_on_nothing_but_itself(name, case):
    alone = {key: value if key == "mean" else value[:1, -1:] for key, value in case.items()}
    assert torch.equal(apply(name, case)[:1, -1:], apply(name, alone))


@pytest.mark.parametrize("name", RETURNS_X_FOR_A_PERFECT_SAE)
@given(case=cases())
def test_a_perfect_sae_leaves_x_unchanged(name, case):
    case |= {"x_hat": case["x"].clone()}
    assert_close(apply(name, case), case["x"], rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", EPS_MATCHED)
@given(case=cases())
def test_eps_matched_interventions_keep_the_distance_to_x(name, case):
    # Adding a small vector to a large x rounds: the tolerance is that of x, not of the error.
    tolerance = 1e-13 * norm(case["x"]).max().item()
    expected = norm(case["x_hat"] - case["x"])
    assert_close(norm(apply(name, case) - case["x"]), expected, rtol=1e-9, atol=tolerance)


@given(case=cases())
def test_eps_random_leans_neither_towards_x_nor_away(case):
    # The same noise with the other sign must be the mirror image about x: the direction knows nothing of x.
    plus = apply("eps_random", case) - case["x"]
    minus = apply("eps_random", case | {"noise": -case["noise"]}) - case["x"]
    assert_close(plus, -minus, rtol=1e-6, atol=1e-12 * norm(case["x"]).max().item())


@pytest.mark.parametrize("name", ["theta_random", "theta_random_sae_norm"])
@given(case=cases())
def test_theta_random_keeps_the_angle_to_x(name, case):
    assert_close(cosine(apply(name, case), case["x"]), cosine(case["x_hat"], case["x"]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["theta_random", "sae_norm_corrected"])
@given(case=cases())
def test_these_keep_the_norm_of_x(name, case):
    assert_close(norm(apply(name, case)), norm(case["x"]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["theta_random_sae_norm", "sae_norm", "sae"])
@given(case=cases())
def test_these_have_the_norm_of_the_reconstruction(name, case):
    assert_close(norm(apply(name, case)), norm(case["x_hat"]), rtol=1e-9, atol=0)


@given(case=cases())
def test_sae_norm_keeps_the_direction_of_x_and_sae_norm_corrected_that_of_x_hat(case):
    assert_close(cosine(apply("sae_norm", case), case["x"]), torch.ones(case["x"].shape[:2]).double())
    assert_close(cosine(apply("sae_norm_corrected", case), case["x_hat"]), torch.ones(case["x"].shape[:2]).double())


@given(case=cases())
def test_ablations_write_the_same_vector_everywhere(case):
    assert not apply("zero", case).any()
    assert torch.equal(apply("mean", case), case["mean"].expand_as(case["x"]))


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_vectors_without_length_give_finite_numbers(name):
    zeros = torch.zeros(1, 2, 4)
    case = {"x": zeros, "x_hat": zeros, "noise": torch.randn(1, 2, 4), "mean": torch.ones(4)}
    assert torch.isfinite(apply(name, case)).all()
    assert torch.isfinite(apply(name, case | {"x": torch.ones(1, 2, 4)})).all()


def test_random_directions_are_uniform_on_the_sphere():
    x = torch.zeros(1, 1, 3).double()
    noise = torch.stack([standard_normal(0, "eps_random", s, 0, (1, 3)) for s in range(4000)]).double()
    x = x.expand(4000, 1, 3)
    directions = apply("eps_random", {"x": x, "x_hat": x + 1, "noise": noise}).squeeze(1) / 3**0.5
    assert_close(directions.mean(0), torch.zeros(3).double(), rtol=0, atol=0.04)
    assert_close(directions.T @ directions / 4000, torch.eye(3).double() / 3, rtol=0, atol=0.03)


def test_noise_is_a_function_of_seed_intervention_sequence_and_draw():
    first = standard_normal(0, "eps_random", 5, 0, (4, 8))
    assert torch.equal(first, standard_normal(0, "eps_random", 5, 0, (4, 8)))
    for other in [(1, "eps_random", 5, 0), (0, "theta_random", 5, 0), (0, "eps_random", 6, 0), (0, "eps_random", 5, 1)]:
        changed = standard_normal(*other, (4, 8))
        assert abs(torch.corrcoef(torch.stack([first.flatten(), changed.flatten()]))[0, 1]) < 0.6
        assert not torch.equal(first, changed)


def test_noise_does_not_touch_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    standard_normal(3, "eps_random", 0, 0, (2, 2))
    assert torch.equal(torch.rand(1), expected)
