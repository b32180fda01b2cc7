"""What interventions are made from: the right rows of the right files, and random numbers that depend on nothing but
what they are for."""

from contextlib import ExitStack

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from tables import arrays
from test_errors import stored

from pipeline import errors, interventions, sources, store
from pipeline.batches import BATCH
from pipeline.interventions import INTERVENTIONS
from pipeline.labels import label
from pipeline.sources import Sources, is_random, root

SEQUENCES, POSITIONS, D = 3 * BATCH + 3, 6, 4
STRENGTH = {"alpha": 0.5, "cosine": 0.8, "head": 1}
LABELS = [
    label(name, next((STRENGTH[each] for each in interventions.arguments(name) if each in STRENGTH), None))
    for name in INTERVENTIONS
]


def values():
    """x and x_hat with covariances that have nothing in common, and which tokens are special."""
    rng = np.random.default_rng(0)
    shape, (of_x, of_e) = (SEQUENCES, POSITIONS, D), rng.normal(size=(2, D, D))
    x = 10 + rng.normal(size=shape) @ of_x
    special = rng.random(shape[:2]) < 0.2
    return x, x + 0.3 + rng.normal(size=shape) @ of_e / 5, special


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of all stages, and of the shard of the sequences from BATCH on."""
    folder = tmp_path_factory.mktemp("stored")
    x, x_hat, special = values()
    errors.work([stored(folder, x, x_hat, special)])
    bias = np.random.default_rng(1).normal(size=x.shape)
    for first in (0, BATCH):
        of_sae = {"x_hat": x_hat[first:], "bias": bias[first:]}
        of_sae = {name: value.astype(np.float32) for name, value in of_sae.items()}
        arrays(folder / f"reconstructions.{first}.h5", "seq pos d", of_sae, first=first)
        activation = x[first:].astype(np.float32)
        arrays(folder / f"activations.{first}.h5", "seq pos d", {"activation": activation}, first=first)
    return folder


@pytest.fixture
def opened(folder):
    """Sources of a seed and of a shard, by the sequence that it begins with."""
    with ExitStack() as stack:

        def opened(seed=0, first=0, **others):
            paths = {role: folder / f"{role}.{first}.h5" for role in ("activations", "reconstructions")}
            paths |= {role: folder / f"{role}.h5" for role in ("moments", "errors")} | others
            files = {role: stack.enter_context(store.arrays(path, {})) for role, path in paths.items()}
            return Sources(files, seed, heads=2)

        yield opened


@pytest.fixture
def argument(monkeypatch):
    """What a run is given under a name, instead of what an intervention makes of it."""

    def argument(made_from, run, name, first=0, last=BATCH):
        x = activation(first, last)
        with monkeypatch.context() as patch:
            patch.setattr(sources.interventions, "x_new", lambda label, made: made[name]())
            return made_from.x_new(run, x, made_from.fetch([run], first, last))

    return argument


def activation(first=0, last=BATCH):
    """x of a micro-batch."""
    x = torch.from_numpy(values()[0][first:last].astype(np.float32))
    return torch.cat([x, x[:1].expand(BATCH - len(x), -1, -1)])


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(0, 6), st.floats(-3, 3))
def test_the_square_of_the_root_is_the_covariance_of_whatever_rank(seed, d, rank, scale):
    factor = 10.0**scale * np.random.default_rng(seed).normal(size=(d, min(rank, d)))
    covariance = factor @ factor.T
    found = root(covariance)
    assert np.isfinite(found).all()
    # A rounded eigenvalue of 0 has a root of 1e-8 of the largest; squared, 1e-16.
    assert_allclose(found @ found, covariance, rtol=0, atol=1e-13 * (1e-300 + np.abs(covariance).max()))
    assert_allclose(found, found.T, rtol=0, atol=1e-12 * (1e-300 + np.abs(found).max()))


@pytest.mark.parametrize(
    ("name", "noise", "which"), [("act_cov_random", "act_noise", "x"), ("error_cov_random", "error_noise", "e")]
)
def test_noise_has_the_covariance_of_the_activations_or_of_the_errors(opened, argument, name, noise, which):
    x, x_hat, special = values()
    rows = (x if which == "x" else x_hat - x)[~special]
    made_from = opened()
    drawn = [argument(made_from, (name, draw), noise, 8 * i, 8 * i + 8) for i in range(3) for draw in range(120)]
    drawn = torch.cat(drawn).flatten(0, 1).numpy().astype(np.float64)
    expected, largest = np.cov(rows.T, ddof=0), np.linalg.norm(np.cov(rows.T), 2)
    # 17,280 draws: an entry of the covariance is off by about 1 % of the largest eigenvalue.
    assert_allclose(np.cov(drawn.T), expected, rtol=0, atol=0.04 * largest)
    assert np.abs(drawn.mean(0)).max() < 0.04 * largest**0.5


def one_sample(folder, kept):
    """Moments of a corpus whose ordinary tokens are these few, (sequence, position)."""
    x, x_hat, _ = values()
    special = np.ones(x.shape[:2], bool)
    special[tuple(np.array(kept).T)] = False
    errors.work([stored(folder, x, x_hat, special)])
    return {role: folder / f"{role}.h5" for role in ("moments", "errors")}


@pytest.mark.parametrize("name", ["other", "another", "other_error"])
def test_a_row_of_the_sample_is_that_of_another_token_and_any_of_these(tmp_path, opened, argument, name):
    kept = [(0, 1), (1, 4), (8, 0)]
    made_from = opened(**one_sample(tmp_path, kept))
    x, x_hat = (value.astype(np.float32).astype(np.float64) for value in values()[:2])
    rows = np.array([(x_hat - x if name == "other_error" else x)[place] for place in kept]).astype(np.float32)
    run = {"other": "resample", "another": "real_difference", "other_error": "shuffled_error"}[name]
    for i, (sequence, position) in enumerate(kept):
        first = sequence - sequence % BATCH
        drawn = {
            tuple(argument(made_from, (run, draw), name, first, first + BATCH)[sequence - first, position].tolist())
            for draw in range(40)
        }
        assert drawn == {tuple(row) for row in np.delete(rows, i, 0).tolist()}
    elsewhere = [argument(made_from, (run, draw), name)[2, 2].tolist() for draw in range(40)]
    assert sorted(set(map(tuple, elsewhere))) == sorted(map(tuple, rows.tolist()))


def test_the_two_rows_of_a_difference_are_of_two_tokens_and_any_two(tmp_path, opened, argument):
    made_from, pairs = opened(**one_sample(tmp_path, [(0, 1), (1, 4), (2, 2), (8, 0)])), set()
    for draw in range(20):
        run = ("real_difference", draw)
        other, another = (argument(made_from, run, name)[..., 0] for name in ("other", "another"))
        assert (other != another).all()
        pairs |= set(zip(other.flatten().tolist(), another.flatten().tolist(), strict=True))
    assert len(pairs) == 4 * 3


RANDOM = [name for name in LABELS if is_random(name)]


def test_what_is_random_is_what_asks_for_something_random():
    assert {"eps_random", "theta_random_at(0.8)", "resample", "shuffled_error", "error_cov_random"} <= set(RANDOM)
    assert not {"identity", "sae", "zero", "mean", "decoder_bias", "linear_error_restored", "error_scaled(0.5)"} & set(
        RANDOM
    )


def drawn(made_from, run, first=0, last=BATCH):
    """All that is random of a run, `argument seq pos d`."""
    fetched = made_from.fetch([run], first, last)
    return torch.stack([value for key, value in fetched.items() if isinstance(key, tuple)])


@pytest.mark.parametrize("name", RANDOM)
def test_another_seed_draw_sequence_or_intervention_gives_other_numbers(opened, name):
    made_from = opened()
    first = drawn(made_from, (name, 0))
    assert torch.equal(first, drawn(made_from, (name, 0)))
    for other in (drawn(opened(seed=1), (name, 0)), drawn(made_from, (name, 1)), first.roll(1, dims=1)):
        assert (first != other).any(-1).float().mean() > 0.9  # a row of the sample may come twice
    positions = first.unbind(2)
    assert (positions[0] != positions[1]).any(-1).float().mean() > 0.8


def test_every_intervention_and_argument_has_random_numbers_of_its_own(opened):
    made_from = opened()
    found = [rows for name in RANDOM for rows in drawn(made_from, (name, 0))]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert (one != other).any(-1).float().mean() > 0.9


def test_a_strength_changes_nothing_that_is_drawn(opened):
    made_from = opened()
    for name in ("eps_random_scaled", "act_cov_random_scaled", "theta_random_at"):
        assert torch.equal(drawn(made_from, (f"{name}(0.5)", 3)), drawn(made_from, (f"{name}(-0.25)", 3)))


@pytest.mark.parametrize("name", LABELS)
def test_neither_the_batch_nor_the_shard_changes_a_number(opened, name):
    run, whole = (name, 2), opened()
    x = activation(8, 16)
    expected = whole.x_new(run, x, whole.fetch([run], 8, 16))
    among_many = whole.fetch([("eps_random", 0), ("sae", 0), run, ("real_difference", 1), (name, 0)], 8, 16)
    assert torch.equal(whole.x_new(run, x, among_many), expected)
    shard = opened(first=BATCH)
    assert torch.equal(shard.x_new(run, x, shard.fetch([run], 8, 16)), expected)
    fewer = whole.fetch([run], 8, 11)
    assert {rows.shape[0] for rows in fewer.values() if rows.ndim == 3} <= {BATCH}
    assert torch.equal(whole.x_new(run, x, fewer)[:3], expected[:3])


@pytest.mark.parametrize("name", LABELS)
def test_some_positions_have_the_numbers_of_all(opened, name):
    runs, made_from = [(name, 0), (name, 1)], opened()
    whole, some = made_from.fetch(runs, 16, 24), made_from.fetch(runs, 16, 24, [4, 1])
    assert list(some) == list(whole)
    for key, rows in some.items():
        assert torch.equal(rows, whole[key][:, [4, 1]] if rows.ndim == 3 else whole[key]), key
    x = activation(16, 24)
    there, all_of_it = made_from.x_new(runs[1], x[:, [4, 1]], some), made_from.x_new(runs[1], x, whole)
    torch.testing.assert_close(there, all_of_it[:, [4, 1]], rtol=1e-5, atol=1e-5)


def test_the_last_batch_is_filled_up_with_its_first_sequence(opened):
    runs = [(name, 0) for name in LABELS]
    for key, rows in opened().fetch(runs, 24, SEQUENCES).items():
        if rows.ndim == 3:
            assert len(rows) == BATCH, key
            assert torch.equal(rows[3:], rows[:1].expand(BATCH - 3, -1, -1)), key


@pytest.mark.parametrize("first", [0, BATCH, 2 * BATCH])
def test_the_fitted_error_is_that_of_the_other_fold(folder, opened, argument, first):
    x = activation(first, first + BATCH).double().numpy()
    with h5py.File(folder / "errors.h5") as file:
        other = 1 - first // BATCH % 2
        mean_x, mean_error, slope, weight = (file[name][other] for name in ("mean_x", "mean_error", "slope", "weight"))
    of = {"linear_error": mean_error + (x - mean_x) @ weight, "simple_error": mean_error + (x - mean_x) * slope}
    for name, expected in of.items():
        run = ("linear_error_restored" if name == "linear_error" else "shrinkage_restored", 0)
        assert_allclose(argument(opened(), run, name, first, first + BATCH), expected, rtol=1e-5, atol=1e-5)


def test_the_mean_is_that_of_the_corpus(opened):
    x, _, special = values()
    made_from = opened()
    found = made_from.x_new(("mean", 0), activation(), made_from.fetch([("mean", 0)], 0, BATCH))
    assert_allclose(found, np.broadcast_to(x[~special].mean(0), found.shape), rtol=1e-6)


def test_the_reconstruction_is_that_of_the_same_tokens(opened):
    made_from = opened(first=BATCH)
    found = made_from.x_new(("sae", 0), activation(16, 24), made_from.fetch([("sae", 0)], 16, 24))
    assert np.array_equal(found, values()[1][16:24].astype(np.float32))


def test_a_bias_of_each_token_is_that_of_the_token(folder, opened):
    made_from = opened()
    with h5py.File(folder / "reconstructions.0.h5") as file:
        expected = file["bias"][16:24]
    found = made_from.x_new(("decoder_bias", 0), activation(16, 24), made_from.fetch([("decoder_bias", 0)], 16, 24))
    assert np.array_equal(found, expected)


def test_a_bias_of_the_sae_is_the_same_everywhere(tmp_path, opened):
    bias = np.arange(D, dtype=np.float32)
    made_from = opened(reconstructions=arrays(tmp_path / "made.h5", "d", {"bias": bias}, first=0))
    run = ("decoder_bias", 0)
    for x, positions in ((activation(), None), (activation()[:, 2:3], [2])):
        fetched = made_from.fetch([run], 0, BATCH, positions)
        assert np.array_equal(made_from.x_new(run, x, fetched), np.broadcast_to(bias, x.shape))


def test_nothing_is_read_that_no_run_asks_for(opened):
    assert list(opened().fetch([("zero", 0), ("identity", 0), ("mean", 0)], 0, BATCH)) == ["first"]
    keys = list(opened().fetch([("real_difference", 3)], 0, BATCH))
    assert keys == ["first", "x_hat", ("real_difference", 3, "other"), ("real_difference", 3, "another")]


def test_ablations_need_no_sae(folder):
    paths = {"activations": folder / "activations.0.h5", "moments": folder / "moments.h5"}
    with ExitStack() as stack:
        files = {role: stack.enter_context(store.arrays(path, {})) for role, path in paths.items()}
        made_from = Sources(files, 0)
        for name in ("zero", "mean", "resample", "theta_random_at(0.8)"):
            x_new = made_from.x_new((name, 0), activation(), made_from.fetch([(name, 0)], 0, BATCH))
            assert torch.isfinite(x_new).all()


def test_a_wide_activation_is_given_wide_numbers(opened):
    made_from, x = opened(), activation().double()
    for name in LABELS:
        x_new = made_from.x_new((name, 0), x, made_from.fetch([(name, 0)], 0, BATCH))
        assert x_new.dtype == torch.float64, name
