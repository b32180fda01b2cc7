"""KL, cross-entropy and top-1 agreement: numbers worked out by hand, and float64 at every size of KL."""

import math

import pytest
import torch
from torch.testing import assert_close

from pipeline import metrics
from pipeline.decoder import Unembedding


def identity_unembedding(d: int, soft_cap: float = 0.0) -> Unembedding:
    """logits = hidden, so that tests can write logits down."""
    return Unembedding(lambda x: x, torch.eye(d), torch.zeros(d), soft_cap)


def values(p_logits, q_logits, target: int = 0) -> dict[str, float]:
    p, q = torch.tensor([p_logits]), torch.tensor([q_logits])
    found = metrics.patched_values(p, [q], torch.tensor([target]), identity_unembedding(len(p_logits)))
    return {name: value.item() for name, value in found.items()}


def test_kl_of_two_coins_by_hand():
    # 3/4 ln(3/2) + 1/4 ln(1/2) = 0.1308120; cross-entropy of the first side under the fair coin: ln 2
    found = values([math.log(3), 0.0], [0.0, 0.0])
    assert found["kl"] == pytest.approx(0.1308120, abs=1e-7)
    assert found["ce"] == pytest.approx(math.log(2), abs=1e-7)


def test_kl_is_from_clean_to_patched_and_not_the_other_way():
    # KL((1/2, 1/2) || (3/4, 1/4)) = 1/2 ln(2/3) + 1/2 ln 2 = 0.1438410
    assert values([0.0, 0.0], [math.log(3), 0.0])["kl"] == pytest.approx(0.1438410, abs=1e-7)


def test_clean_entropy_and_cross_entropy_by_hand():
    # (1/2, 1/4, 1/4): entropy 3/2 ln 2, cross-entropy of the second token 2 ln 2
    logits = torch.tensor([[math.log(2), 0.0, 0.0]])
    found = metrics.clean_values(logits, torch.tensor([1]), identity_unembedding(3))
    assert found["entropy"].item() == pytest.approx(1.5 * math.log(2), abs=1e-6)
    assert found["ce"].item() == pytest.approx(2 * math.log(2), abs=1e-6)
    assert found["top1"].item() == 0


def test_top1_agreement_compares_the_largest_logits():
    assert values([2.0, 1.0, 0.0], [5.0, 4.0, 4.5])["top1_agrees"]
    assert not values([2.0, 1.0, 0.0], [1.0, 2.0, 0.0])["top1_agrees"]


def test_a_constant_added_to_all_logits_changes_nothing():
    found = values([1.0, 2.0, 0.5], [4.0, 5.0, 3.5])
    assert found["kl"] == pytest.approx(0.0, abs=1e-12)


def float64_kl(hidden, other, weight, soft_cap=0.0):
    def log_probabilities(h):
        z = h.double() @ weight.double()
        return (soft_cap * torch.tanh(z / soft_cap) if soft_cap else z).log_softmax(-1)

    p, q = log_probabilities(hidden), log_probabilities(other)
    # expm1 in float64 with the same non-negative terms; the plain form would itself lose digits at 1e-7.
    x = q - p
    return (p.exp() * (torch.expm1(x) - x)).sum(-1)


@pytest.mark.parametrize("soft_cap", [0.0, 30.0])
@pytest.mark.parametrize("size", [1e-4, 3e-4, 3e-3, 3e-2, 0.3, 1.0, 3.0])
def test_kl_has_a_relative_error_below_1e5_from_1e_minus_7_to_100_nats(size, soft_cap):
    torch.manual_seed(0)
    weight = torch.randn(64, 5000)
    hidden = 0.5 * torch.randn(200, 64)
    other = hidden + size * torch.randn(200, 64)
    unembedding = Unembedding(lambda x: x, weight, torch.zeros(5000), soft_cap)
    found = metrics.patched_values(hidden, [other], torch.zeros(200, dtype=torch.long), unembedding)["kl"][0].double()
    expected = float64_kl(hidden, other, weight, soft_cap)
    chosen = (expected > 1e-7) & (expected < 100)
    assert chosen.any()
    assert (found >= 0).all()
    assert ((found - expected).abs() / expected)[chosen].max() < 1e-5


def test_kl_is_exactly_zero_for_the_same_hidden_state():
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 16), torch.randn(16, 3000)
    unembedding = Unembedding(lambda x: x, weight, torch.randn(3000), 0.0)
    found = metrics.patched_values(hidden, [hidden.clone()], torch.zeros(300, dtype=torch.long), unembedding)
    assert (found["kl"] == 0).all()
    assert found["top1_agrees"].all()


def test_saturated_logits_give_finite_numbers():
    found = values([1000.0, 0.0, -1000.0], [-1000.0, 0.0, 1000.0], target=2)
    assert found["kl"] == pytest.approx(2000.0, rel=1e-6)
    assert found["ce"] == pytest.approx(0.0, abs=1e-4)
    assert values([1000.0, 0.0], [1000.0, 0.0])["kl"] == 0.0


def test_where_chunks_are_cut_does_not_matter(monkeypatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(100, 8), torch.randn(8, 50)
    runs, target = [hidden + 0.1 * torch.randn(100, 8) for _ in range(3)], torch.randint(50, (100,))
    unembedding = Unembedding(lambda x: x, weight, torch.zeros(50), 0.0)
    whole = metrics.patched_values(hidden, runs, target, unembedding)
    monkeypatch.setattr(metrics, "CHUNK_TOKENS", 16)
    cut = metrics.patched_values(hidden, runs, target, unembedding)
    for name in whole:
        assert_close(cut[name], whole[name], rtol=1e-5, atol=1e-9)
        assert whole[name].shape == (3, 100)


def test_a_common_shift_of_the_logits_costs_no_digits():
    # 0.7 added to every logit is no change of the distribution; float32 must not see one beside a KL of 1e-7.
    torch.manual_seed(0)
    p, step = torch.randn(50, 2000).double(), 4e-4 * torch.randn(50, 2000).double()
    q = p + step + 0.7
    unembedding = identity_unembedding(2000)
    found = metrics.patched_values(p.float(), [q.float()], torch.zeros(50, dtype=torch.long), unembedding)["kl"][0]
    expected = float64_kl(p.float(), q.float(), torch.eye(2000))
    assert expected.min() > 5e-8
    assert_close(found.double(), expected, rtol=1e-5, atol=0)
