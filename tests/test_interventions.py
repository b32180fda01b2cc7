"""What every intervention promises, as equations, in float64 so that only algebra is tested."""

from inspect import signature

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pipeline import labels
from pipeline.interventions import INTERVENTIONS, random_rows, standard_normal, x_new

settings.register_profile("torch", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("torch")

LADDER = ["error_cov_random", "act_cov_random", "real_difference", "shuffled_error"]
EPS_MATCHED = ["eps_random", "flipped_error", *LADDER]
# What an intervention is given per token; the rest is the same at every token.
PER_TOKEN = ["x", "x_hat", "noise", "act_noise", "error_noise", "other", "another", "other_error", "linear_error"]
PER_TOKEN += ["simple_error", "bias"]
RETURNS_X_FOR_A_PERFECT_SAE = [
    "identity",
    "sae",
    "sae_norm",
    "sae_norm_corrected",
    "eps_random",
    "theta_random",
    "theta_random_sae_norm",
    "flipped_error",
    *LADDER,
    "error_scaled",
    "eps_random_scaled",
    "act_cov_random_scaled",
]


@st.composite
def cases(draw) -> dict[str, torch.Tensor]:
    """Everything that an intervention may ask for, over width, scale and size of the error."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    seq, pos, d = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.sampled_from([2, 3, 16, 64]))
    scale, error = 10.0 ** draw(st.floats(-3, 4)), 10.0 ** draw(st.floats(-6, 1))
    given = {name: torch.randn(seq, pos, d, generator=generator, dtype=torch.float64) for name in PER_TOKEN}
    given |= {"x": scale * given["x"], "x_hat": scale * (given["x"] + error * given["x_hat"])}
    given["mean"] = scale * torch.randn(d, generator=generator, dtype=torch.float64)
    given["head"] = torch.arange(d) < d // 2
    return given | {"alpha": draw(st.floats(-2, 2)), "cosine": draw(st.floats(-1, 1))}


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
    before = {key: torch.as_tensor(value).clone() for key, value in case.items()}
    x_new = apply(name, case)
    assert x_new.shape == case["x"].shape
    assert x_new.dtype == case["x"].dtype
    x_new += 1
    for key, value in case.items():
        assert torch.equal(torch.as_tensor(value), before[key]), key


@pytest.mark.parametrize("name", INTERVENTIONS)
@given(case=cases())
def test_a_token_depends_on_nothing_but_itself(name, case):
    alone = {key: value[:1, -1:] if key in PER_TOKEN else value for key, value in case.items()}
    assert torch.equal(apply(name, case)[:1, -1:], apply(name, alone))


@pytest.mark.parametrize("name", RETURNS_X_FOR_A_PERFECT_SAE)
@given(case=cases())
def test_a_perfect_sae_leaves_x_unchanged(name, case):
    case |= {"x_hat": case["x"].clone()}
    assert_close(apply(name, case), case["x"], rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", LADDER)
@given(case=cases())
def test_a_rung_goes_along_the_vector_that_it_is_given(name, case):
    given_by = {"error_cov_random": "error_noise", "act_cov_random": "act_noise", "shuffled_error": "other_error"}
    along = case[given_by[name]] if name in given_by else case["other"] - case["another"]
    step = apply(name, case) - case["x"]
    tolerance = 1e-10 * (1 + (norm(case["x"]) / norm(step)).max().item())  # x rounds the step
    assert_close(cosine(step, along), torch.ones(step.shape[:2]).double(), rtol=0, atol=tolerance)


@given(case=cases())
def test_flipped_and_scaled_errors_are_multiples_of_the_error(case):
    e, tolerance = case["x_hat"] - case["x"], 1e-13 * case["x"].abs().max().item()
    assert_close(apply("flipped_error", case) - case["x"], -e, rtol=1e-9, atol=tolerance)
    assert_close(apply("error_scaled", case) - case["x"], case["alpha"] * e, rtol=1e-9, atol=tolerance)
    assert_close(apply("error_scaled", case | {"alpha": 1.0}), apply("sae", case), rtol=1e-9, atol=tolerance)


@pytest.mark.parametrize("name", ["eps_random", "act_cov_random"])
@given(case=cases())
def test_a_scaled_random_vector_keeps_its_direction(name, case):
    tolerance = 1e-12 * case["x"].abs().max().item()
    step = apply(f"{name}_scaled", case) - case["x"]
    assert_close(step, case["alpha"] * (apply(name, case) - case["x"]), rtol=1e-9, atol=tolerance)


@pytest.mark.parametrize("name", ["theta_random_at", "theta_error_at"])
@given(case=cases())
def test_a_turn_has_the_cosine_asked_for_and_keeps_the_norm(name, case):
    x_new = apply(name, case)
    assert_close(norm(x_new), norm(case["x"]), rtol=1e-9, atol=0)
    assert_close(cosine(x_new, case["x"]), torch.full(x_new.shape[:2], case["cosine"]).double(), rtol=0, atol=1e-7)


@given(case=cases())
def test_a_turn_towards_the_reconstruction_meets_it_at_its_own_cosine(case):
    one = {key: value[:1, :1] if key in PER_TOKEN else value for key, value in case.items()}
    one["cosine"] = cosine(one["x"], one["x_hat"]).item()
    assert_close(
        apply("theta_error_at", one), apply("sae_norm_corrected", one), rtol=1e-6, atol=1e-6 * norm(one["x"]).item()
    )


@given(case=cases())
def test_the_restored_parts_of_the_error_add_up(case):
    e = case["x_hat"] - case["x"]
    case |= {"linear_error": 0.3 * e, "simple_error": 0.1 * e}
    tolerance = 1e-13 * case["x"].abs().max().item()
    for name, left in {
        "shrinkage_restored": 0.9,
        "linear_error_restored": 0.7,
        "nonlinear_error_restored": 0.3,
    }.items():
        assert_close(apply(name, case) - case["x"], left * e, rtol=1e-9, atol=tolerance)


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


@pytest.mark.parametrize(("name", "source"), [("resample", "other"), ("decoder_bias", "bias"), ("sae", "x_hat")])
@given(case=cases())
def test_these_write_what_they_are_given(name, source, case):
    assert torch.equal(apply(name, case), case[source])


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_vectors_without_length_give_finite_numbers(name):
    zeros = torch.zeros(1, 2, 4)
    case = dict.fromkeys(PER_TOKEN, zeros) | {"noise": torch.randn(1, 2, 4), "mean": torch.ones(4)}
    case |= {"alpha": 0.5, "cosine": 0.5, "head": torch.arange(4) < 2}
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


def test_random_rows_are_a_function_of_their_purpose_and_cover_the_sample():
    first = random_rows(0, "resample/other", 5, 0, 4000, 10)
    assert torch.equal(first, random_rows(0, "resample/other", 5, 0, 4000, 10))
    assert not torch.equal(first, random_rows(0, "real_difference/other", 5, 0, 4000, 10))
    assert torch.bincount(first, minlength=10).min() > 300  # 400 of each expected


def test_a_label_is_a_name_and_a_strength():
    for name, strength in (("sae", None), ("error_scaled", 0.5), ("error_scaled", -1.0), ("theta_error_at", 1e-05)):
        assert labels.parsed(labels.label(name, strength)) == (name, strength)
    case = {"x": lambda: torch.zeros(1, 1, 2), "x_hat": lambda: torch.ones(1, 1, 2)}
    assert x_new("error_scaled(-0.5)", case).tolist() == [[[-0.5, -0.5]]]


def test_noise_does_not_touch_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    standard_normal(3, "eps_random", 0, 0, (2, 2))
    assert torch.equal(torch.rand(1), expected)
