"""The float64 evaluation that every run compares itself with."""

import numpy as np
import polars as pl
import pytest
import torch
from conftest import FAMILIES, random_weights
from reference import reference_effects, reference_model

from pipeline import checks
from pipeline.hooked import Hooked
from pipeline.hooks import Hook
from pipeline.models import Weights


def stored(kl: np.ndarray, ce: np.ndarray, agrees: np.ndarray) -> pl.DataFrame:
    values = {"kl": kl.astype(np.float32), "ce": ce.astype(np.float32), "top1_agrees": agrees}
    return pl.DataFrame(values, nan_to_null=True)


KL, CE, AGREES = (
    np.array([0.0, 0.001, 0.5, 2.0]),
    np.array([1.0, 2.0, 3.0, np.nan]),
    np.array([True, True, False, True]),
)


def test_errors_are_the_largest_over_the_tokens():
    kl, ce = KL + np.array([0, 2e-4, 5e-5, 1e-4]), CE + np.array([0, 1e-3, 0, 0])
    found = checks.errors(stored(kl, ce, ~AGREES), KL, CE, AGREES, "x")
    assert found["kl_worst"] == pytest.approx(2e-4, rel=1e-2)
    assert found["kl_worst_relative"] == pytest.approx(1e-4, rel=1e-2)  # of the tokens with a sizeable KL
    assert found["ce_worst"] == pytest.approx(1e-3, rel=1e-2)  # the last token has none
    assert found["top1_agreement"] == 0
    assert found["kl_mean_float64"] == pytest.approx(KL.mean())


def test_a_kl_that_is_nowhere_sizeable_has_no_relative_error():
    assert checks.errors(stored(KL * 0, CE, AGREES), KL * 0, CE, AGREES, "identity")["kl_worst_relative"] is None


@pytest.mark.parametrize("factor", [0.98, 1.02, 0.0])
def test_a_mean_that_is_off_by_more_than_a_percent_is_refused(factor):
    checks.errors(stored(KL * 1.005, CE, AGREES), KL, CE, AGREES, "fine")
    with pytest.raises(ValueError, match=r"an-sae, zero: mean KL .* in float64 over 4 tokens"):
        checks.errors(stored(KL * factor, CE, AGREES), KL, CE, AGREES, "an-sae, zero")


@pytest.mark.parametrize("family", ["gpt2", "gemma-2"])
@pytest.mark.parametrize("site", ["hook_resid_pre", "attn.hook_z", "hook_mlp_out"])
def test_the_evaluation_equals_the_reference_of_the_tests(family, site):
    weights = random_weights(**FAMILIES[family])
    wide = Hooked(Weights(weights.settings, {name: tensor.double() for name, tensor in weights.state.items()}))
    tokens, kept = torch.arange(12)[None], torch.arange(12)[None] < 2
    x_new = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        clean = checks._log_probabilities(wide, tokens)
        kl, ce, agrees = checks.compare(wide, Hook(1, site), tokens, kept, x_new, clean)
    expected = reference_effects(reference_model(weights), tokens, f"blocks.1.{site}", x_new, kept)
    np.testing.assert_allclose(kl, expected["kl"][0], rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(ce[:-1], expected["ce"][0], rtol=1e-9)
    assert np.isnan(ce[-1])
    assert (agrees == expected["top1_agrees"][0].numpy()).all()
