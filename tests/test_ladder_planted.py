"""A planted difference is recovered, from the files of the stages up to the rungs of the ladder.

The SAE's error is written by hand behind the last block of a small random model, so that what it costs is known: along
one direction that the unembedding is very sensitive to, where the spectrum of the errors explains everything; and
against each token's most probable next token, where nothing but the token's own direction and its sign does.
"""

import h5py
import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from conftest import random_weights
from tables import arrays, call

from pipeline import activations, clean, effects, errors, models, moments, reconstructions, tables
from pipeline.ladder import RUNGS, ladder_rows
from pipeline.models import Weights
from pipeline.statistics import Bootstrap

HOOK = "blocks.1.hook_resid_post"  # behind it, there is nothing but the last normalisation and the unembedding
SEQUENCES, POSITIONS, WIDTH, VOCABULARY = 64, 12, 16, 40
FLOAT32 = {"precision": {"blocks": "float32", "difference": "float32"}}


def direction(seed):
    """A unit vector without a part along (1, ..., 1), which the normalisation would take away."""
    u = np.random.default_rng(seed).normal(size=WIDTH)
    return (u - u.mean()) / np.linalg.norm(u - u.mean())


def weights(rank_one, scale) -> Weights:
    """The random model with its unembedding scaled, plus a term that reads the direction 0 alone."""
    plain = random_weights()
    reads = plain.state["ln_final.w"] ** -1 * torch.from_numpy(direction(0)).float()
    writes = torch.from_numpy(np.random.default_rng(1).normal(size=VOCABULARY)).float()
    unembedding = scale * plain.state["unembed.W_U"] + rank_one * reads[:, None] * writes
    return Weights(plain.settings, plain.state | {"unembed.W_U": unembedding})


def gradient_of_the_first_choice(weights, x):
    """Of the log-probability of each token's most probable next one by x, as unit vectors `seq pos d`."""
    state = {name: tensor.double() for name, tensor in weights.state.items()}
    x = torch.from_numpy(x).double().requires_grad_()
    normal = F.layer_norm(x, (WIDTH,), state["ln_final.w"], state["ln_final.b"], weights.settings["eps"])
    log_p = (normal @ state["unembed.W_U"] + state["unembed.b_U"]).log_softmax(-1)
    (gradient,) = torch.autograd.grad(log_p.max(-1).values.sum(), x)
    return (gradient / gradient.norm(dim=-1, keepdim=True)).numpy()


def rungs(folder, weights, error):
    """The ladder of an SAE with that error, as a function of x: every file is one that a stage has made but x_hat."""
    rng = np.random.default_rng(0)
    token = rng.integers(VOCABULARY, size=(SEQUENCES, POSITIONS), dtype=np.int32)
    special = np.zeros(token.shape, bool)
    special[:, 0] = True
    inputs = {"tokens": [arrays(folder / "tokens.h5", "seq pos", {"token": token, "special": special})]}
    models.save(weights, folder / "weights.safetensors", "f00d")
    inputs["weights"] = [folder / "weights.safetensors"]
    place, shard = {"model": "tiny", "corpus": "story"}, {"shard": "0-of-1"}
    for role in ("clean", "activations", "reconstructions", "moments", "errors"):
        inputs[role] = [folder / f"{role}.h5"]
    with torch.inference_mode():
        clean.work(call(inputs["clean"], inputs, place | shard, **FLOAT32))
        activations.work([call(inputs["activations"], inputs, place | {"hook": HOOK} | shard, **FLOAT32)])
    with h5py.File(folder / "activations.h5") as file:
        x = file["activation"][:]
    x_hat = (x + error(x)).astype(np.float32)
    per_token = reconstructions.per_token(*map(torch.from_numpy, (x, x_hat, x)), torch.tensor([0]))
    numbers = {name: value.numpy() for name, value in per_token.items()}
    axes = dict.fromkeys(numbers, "seq pos") | {"x_hat": "seq pos d"}
    arrays(folder / "reconstructions.h5", axes, numbers | {"x_hat": x_hat}, first=0)
    moments.work(call(inputs["moments"], inputs, place | {"hook": HOOK}))
    errors.work([call(inputs["errors"], inputs, {"sae": "early", "corpus": "story"}, model="tiny", hook=HOOK)])
    settings = {"interventions": list(RUNGS), "scope": "all", "draws": 4, "patch_special": False, "hook": HOOK}
    asked = call([folder / "effects.parquet"], inputs, {"sae": "early", "corpus": "story"}, **settings | FLOAT32)
    with torch.inference_mode():
        effects.work([asked])
    table = pl.read_parquet(asked.output)
    assert set(tables.SAE_COLUMNS) <= set(table.columns)
    rows = ladder_rows(table, Bootstrap.over(SEQUENCES, 400, 0.95, 0))
    assert rows["intervention"].to_list() == list(RUNGS)
    assert set(rows["n_tokens"]) == {SEQUENCES * (POSITIONS - 1)}
    return {row["intervention"]: row for row in rows.rows(named=True)}


def size(x):
    """A twentieth of each token's norm: small enough that KL goes with the square of what is written."""
    return np.linalg.norm(x, axis=-1, keepdims=True) / 20


@pytest.fixture(scope="module")
def spectrum(tmp_path_factory):
    """e = ±eps u, where the sign is a coin's and u what the unembedding reads."""
    signs = np.random.default_rng(2).choice([-1, 1], size=(SEQUENCES, POSITIONS, 1))
    return rungs(
        tmp_path_factory.mktemp("spectrum"), weights(rank_one=10, scale=0.1), lambda x: signs * size(x) * direction(0)
    )


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """e against the gradient of each token's first choice, in a model that is sure of it, and long enough to change
    its mind."""
    sure = weights(rank_one=0, scale=4)
    return rungs(
        tmp_path_factory.mktemp("aligned"), sure, lambda x: -4 * size(x) * gradient_of_the_first_choice(sure, x)
    )


def ratio(rows, name):
    """The SAE's mean KL by that of a rung, with the ends of its interval."""
    return tuple(rows[name][f"sae_ratio{end}"] for end in ("_low", "", "_high"))


def test_of_isotropic_noise_one_part_in_the_width_goes_along_the_sensitive_direction(spectrum):
    """E (u·g)² = 1 / 16 for a random unit vector g, and KL goes with the square: the planted ratio is the width."""
    low, value, high = ratio(spectrum, "eps_random")
    assert low < WIDTH < high
    assert value == pytest.approx(WIDTH, rel=0.15)  # the interval's half-width, of 704 tokens


@pytest.mark.parametrize("name", ["error_cov_random", "shuffled_error", "flipped_error"])
def test_errors_along_one_direction_are_explained_by_their_spectrum(spectrum, name):
    """All of these are ±eps u. That the signs are not the SAE's leaves a difference of third order, whose sign is a
    coin's: its mean over 704 tokens is within 15 % of the KL, half an interval, and 1 is in the interval."""
    low, value, high = ratio(spectrum, name)
    assert low < 1 < high
    assert value == pytest.approx(1, abs=0.15)


def test_the_spectrum_of_the_errors_is_all_of_the_gap_and_that_of_the_activations_nothing(spectrum):
    assert spectrum["error_cov_random"]["share"] == pytest.approx(1, abs=0.05)
    for name in ("act_cov_random", "real_difference"):
        low, _, _ = ratio(spectrum, name)
        assert low > WIDTH / 2  # no more of them along the sensitive direction than of isotropic noise, about


def test_errors_against_each_tokens_own_first_choice_are_worse_than_every_rung(aligned):
    """Another token's error has another first choice to weigh against, and the same with the other sign makes the model
    surer of what it is sure of already: 5 to 16 times less, of which 3 leaves room for other roundings."""
    for name in RUNGS[:-1]:
        low, _, _ = ratio(aligned, name)
        assert low > 3, name


def test_what_is_each_tokens_own_is_most_of_the_gap_and_the_spectrum_the_least(aligned):
    share = {name: row["share"] for name, row in aligned.items()}
    assert share["error_cov_random"] < 0.4
    assert share["sae"] > 0.5  # the sign of the token's own direction
    way = {name: row["log_from_random"] for name, row in aligned.items()}
    assert way["error_cov_random"] < way["shuffled_error"] < way["flipped_error"] < way["sae"]
