"""KL, cross-entropy and top-1 agreement: numbers worked out by hand, and float64 at every size of KL."""

import math

import numba
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pipeline import metrics, rows
from pipeline.logits import Unembedding


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


@pytest.mark.parametrize("tokens", [1, 31, 100, 700])
def test_where_chunks_are_cut_does_not_matter(tokens, monkeypatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 8), torch.randn(8, 50)
    runs, target = [hidden + 0.1 * torch.randn(tokens, 8) for _ in range(3)], torch.randint(50, (tokens,))
    unembedding = Unembedding(lambda x: x, weight, torch.zeros(50))
    whole = metrics.patched_values(hidden, runs, target, unembedding)
    monkeypatch.setitem(metrics.MOST_TOKENS, "cpu", 16)
    cut = metrics.patched_values(hidden, runs, target, unembedding)
    for name in whole:
        assert_close(cut[name], whole[name], rtol=1e-5, atol=1e-9)
        assert whole[name].shape == (3, tokens)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
@pytest.mark.parametrize("threads", [1, 2])
def test_few_tokens_with_many_runs_share_products_and_keep_their_order(count, threads):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8), torch.randn(8, 50)
    runs, target = [hidden + (i + 1) * 0.01 for i in range(count)], torch.randint(50, (5,))
    unembedding = Unembedding(lambda x: x, weight, torch.zeros(50))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = metrics.patched_values(hidden, runs, target, unembedding)
        alone = [metrics.patched_values(hidden, [run], target, unembedding) for run in runs]
    finally:
        torch.set_num_threads(before)
    for name in together:
        assert_close(together[name], torch.cat([each[name] for each in alone]), rtol=1e-4, atol=1e-9)


def test_a_run_of_few_distinct_sequences_equals_the_same_run_written_out():
    torch.manual_seed(0)
    hidden, weight = torch.randn(6 * 10, 8), torch.randn(8, 50)  # 6 sequences of 10 tokens
    target, distinct = torch.randint(50, (60,)), torch.randn(2 * 10, 8)
    which = (0, 1, 0, 0, 1, 1)
    one = distinct.view(2, 10, 8)[list(which)].flatten(0, 1)
    for soft_cap in (0.0, 3.0):
        unembedding = Unembedding(lambda x: x, weight, torch.randn(50), soft_cap)
        runs = [hidden + 0.1, metrics.Fixed(distinct, which), hidden - 0.1]
        found = metrics.patched_values(hidden, runs, target, unembedding)
        expected = metrics.patched_values(hidden, [runs[0], one, runs[2]], target, unembedding)
        for name in found:
            assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 8.0])
def test_the_compiled_rows_equal_the_tensor_form(size):
    torch.manual_seed(0)
    hidden, weight = 3 * torch.randn(40, 16), torch.randn(16, 5000)
    unembedding = Unembedding(lambda x: x, weight, torch.zeros(5000))
    clean = metrics.Clean.of(hidden, torch.zeros(40, dtype=torch.long), unembedding)
    d = size * torch.randn(40, 16) @ weight
    kl, ce, agrees = metrics.compare(clean, d, torch.arange(40), unembedding)
    wide, _, top = metrics.tensor_form(clean.probability.double(), d.double(), clean.total.double(), clean.top1)
    usual = wide.isfinite()
    assert_close(kl[usual].double(), wide[usual], rtol=1e-5, atol=0)
    assert torch.equal(agrees, top)
    assert kl.isfinite().all()
    assert ce.isfinite().all()


def test_the_exponential_of_the_compiled_rows_is_exact_to_float32():
    @numba.njit
    def apply(x, small, whole):
        for i in range(len(x)):
            small[i], whole[i] = rows.exponential(x[i])

    x = np.concatenate([np.linspace(-80, 88, 20001), np.geomspace(1e-6, 1, 999), -np.geomspace(1e-6, 1, 999)])
    x = x.astype(np.float32)
    small, whole = np.empty_like(x), np.empty_like(x)
    apply(x, small, whole)
    wide = x.astype(np.float64)
    series = wide**2 * (1 / 2 + wide * (1 / 6 + wide * (1 / 24 + wide * (1 / 120 + wide / 720))))
    expected = np.where(np.abs(wide) < 1e-2, series, np.expm1(wide) - wide)
    np.testing.assert_allclose(small, expected, rtol=2e-6)
    np.testing.assert_allclose(whole, np.exp(wide), rtol=5e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_a_gpu_agrees_with_the_cpu(size):
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64), torch.randn(64, 5000)
    other, target = hidden + size * torch.randn(300, 64), torch.zeros(300, dtype=torch.long)
    found = []
    for device in ("cpu", "cuda"):
        unembedding = Unembedding(lambda x: x, weight.to(device), torch.zeros(5000, device=device))
        moved = (hidden.to(device), [other.to(device)], target.to(device))
        found.append(metrics.patched_values(*moved, unembedding)["kl"].cpu())
    assert_close(found[1], found[0], rtol=1e-4, atol=1e-9)


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


def test_what_is_left_of_the_rounded_mean_is_taken_into_account():
    # Around 3000 a float32 mean is off by up to 1e-4, and a KL that ignored it by as much of itself.
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(30, 2000, generator=generator).softmax(-1)
    d = 3000 + 2 * torch.randn(30, 2000, generator=generator)
    kl, mean = torch.empty(30), torch.empty(30)
    agrees = torch.empty(30, dtype=torch.bool)
    arrays = (d, torch.arange(30), p, p.sum(-1), p.argmax(-1), kl, mean, agrees)
    rows.patched_rows(*(each.numpy() for each in arrays))
    wide = p.double() / p.double().sum(-1, keepdim=True)
    x = d.double() - (wide * d.double()).sum(-1, keepdim=True)
    assert_close(kl.double(), (wide * (x.expm1() - x)).sum(-1).log1p(), rtol=3e-6, atol=0)
