"""Ablations of one attention head: its slice of `hook_z` is replaced and nothing else, at every stage on the way."""

from contextlib import ExitStack

import h5py
import numpy as np
import polars as pl
import pytest
import torch
from conftest import FAMILIES, random_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference_model
from tables import arrays, call

from pipeline import activations, clean, effects, interventions, models, moments, sources, store
from pipeline.batches import BATCH
from pipeline.interventions import INTERVENTIONS
from pipeline.labels import OF_A_HEAD, label
from pipeline.sources import Sources

# What is done to a head -> what it takes beside the activation.
GIVEN = {"zero": (), "mean": ("mean",), "resample": ("other",)}


@st.composite
def cases(draw):
    """(x, others by name, number of heads)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    heads, width = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    shape, kind = (draw(st.integers(1, 3)), 2, heads * width), draw(st.sampled_from([torch.float32, torch.float64]))
    x, other = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(kind)
    return x, {"other": other, "mean": torch.randn(shape[-1], generator=generator, dtype=torch.float64).to(kind)}, heads


def of_head(x, head, heads):
    """Where an activation belongs to a head, ` d`: heads lie side by side."""
    width = x.shape[-1] // heads
    return torch.tensor([head * width <= i < (head + 1) * width for i in range(x.shape[-1])])


def both(name, x, others, head, heads):
    """What the intervention of a head writes, and what that of all heads writes."""
    given = {argument: others[argument] for argument in GIVEN[name]}
    whole = INTERVENTIONS[name](**({} if name == "resample" else {"x": x}) | given)
    return INTERVENTIONS[OF_A_HEAD[name]](x=x, head=of_head(x, head, heads), **given), whole


@pytest.mark.parametrize("name", OF_A_HEAD)
@settings(deadline=None, derandomize=True, max_examples=25)
@given(case=cases())
def test_the_slice_of_the_head_is_that_of_the_whole_and_the_rest_is_left(name, case):
    x, others, heads = case
    width = x.shape[-1] // heads
    for head in range(heads):
        found, whole = both(name, x, others, head, heads)
        assert (found.shape, found.dtype) == (x.shape, x.dtype)
        own = slice(head * width, (head + 1) * width)
        assert torch.equal(found[..., own], whole[..., own])
        for rest in (slice(0, own.start), slice(own.stop, None)):
            assert torch.equal(found[..., rest], x[..., rest])


@pytest.mark.parametrize("name", OF_A_HEAD)
@settings(deadline=None, derandomize=True, max_examples=25)
@given(case=cases())
def test_what_is_done_to_each_head_adds_up_to_what_is_done_to_all(name, case):
    x, others, heads = case
    found = [both(name, x, others, head, heads) for head in range(heads)]
    steps = torch.stack([of_one - x for of_one, _ in found]).sum(0)
    assert torch.equal(steps, found[0][1] - x)


# What a head is, by its number in a label.

WIDTH, HEADS = 12, 3
CORPUS = torch.from_numpy(np.random.default_rng(0).normal(size=(2 * BATCH + 3, 6, WIDTH)).astype(np.float32))


@pytest.fixture
def made_from(tmp_path):
    """Sources at a hook of three heads of four, by the number of heads."""
    x = CORPUS.numpy()
    paths = [arrays(tmp_path / "activations.h5", "seq pos d", {"activation": x}, first=0)]
    values = {"mean": np.arange(WIDTH, dtype=float), "sample": x.reshape(-1, WIDTH)}
    values["sample_place"] = np.array([(i, j) for i in range(x.shape[0]) for j in range(x.shape[1])])
    axes = {"mean": "d", "sample": "token d", "sample_place": "token place"}
    shapes = {name: (value.shape, str(value.dtype)) for name, value in values.items()}
    paths.append(tmp_path / "moments.h5")
    with store.new_arrays(paths[1], "f00d", axes, shapes) as file:
        for name, value in values.items():
            file[name][:] = value
    with ExitStack() as stack:
        files = {path.stem: stack.enter_context(store.arrays(path, {})) for path in paths}
        yield lambda heads=HEADS, seed=0: Sources(files, seed, "cpu", heads)


def x_of(first=0):
    return CORPUS[first : first + BATCH]


def x_new(source, run, x, first=0):
    return source.x_new(run, x, source.fetch([run], first, first + BATCH))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("heads", [1, 2, 3, 12])
def test_a_label_names_the_head_whose_slice_is_replaced(made_from, heads, kind):
    x, whole = x_of().to(kind), x_new(made_from(heads), ("mean", 0), x_of().to(kind))
    for name, of_all in (("zero", torch.zeros_like(x)), ("mean", whole)):
        for head in range(heads):
            found = x_new(made_from(heads), (label(OF_A_HEAD[name], float(head)), 0), x)
            assert found.dtype == kind
            assert torch.equal(found, torch.where(of_head(x, head, heads), of_all, x))


def test_every_head_is_given_its_slice_of_the_same_other_token(made_from):
    """So that ablating all heads is moving the whole activation to another token; and that token is drawn anew."""
    x, rows, own = x_of(BATCH), CORPUS.flatten(0, 1), [slice(4 * head, 4 * head + 4) for head in range(HEADS)]

    def drawn(head, draw=0, seed=0):
        """Which token of the corpus each token's head is given."""
        found = x_new(made_from(seed=seed), (f"resample_head({head})", draw), x, BATCH)[..., own[head]]
        same = (found[:, :, None] == rows[:, own[head]]).all(-1)
        assert (same.sum(-1) == 1).all()
        return same.int().argmax(-1)

    first = drawn(0)
    assert torch.equal(drawn(1), first)
    assert torch.equal(drawn(2), first)
    itself = torch.arange(len(rows)).view(CORPUS.shape[:2])[BATCH : 2 * BATCH]
    for other in (itself, drawn(0, draw=1), drawn(0, seed=1)):
        assert (first != other).float().mean() > 0.9


def test_only_what_is_resampled_is_random():
    assert [sources.is_random(f"{name}(1)") for name in OF_A_HEAD.values()] == [False, False, True]


# The stage, against TransformerLens with a hook of its own.

FLOAT32 = {"precision": {"blocks": "float32", "difference": "float32"}}
HOOK = "blocks.1.attn.hook_z"
# Three heads of four in a stream of 16, so that neither width nor number can be taken for another; one head; and heads
# that share keys and values.
DECODERS = {"three": {"n_heads": 3, "d_head": 4}, "one": {"n_heads": 1, "d_head": 8}}
DECODERS["llama"] = FAMILIES["llama"] | {"n_heads": 2, "d_head": 8}


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request, tmp_path_factory):
    """(its weights, its files): a random decoder with the tokens, the clean run, and what is at the hook."""
    folder, weights = tmp_path_factory.mktemp(request.param), random_weights(**DECODERS[request.param])
    models.save(weights, folder / "weights.safetensors", "f00d")
    token = np.random.default_rng(0).integers(40, size=(BATCH + 3, 12), dtype=np.int32)
    special = np.zeros(token.shape, bool)
    special[:, 0] = special[2, 6] = True
    arrays(folder / "tokens.h5", "seq pos", {"token": token, "special": special})
    inputs = {"tokens": [folder / "tokens.h5"], "weights": [folder / "weights.safetensors"]}
    key = {"model": "tiny", "corpus": "story", "hook": HOOK, "shard": "0-of-1"}
    with torch.inference_mode():
        clean.work(call([folder / "clean.h5"], inputs, {"shard": "0-of-1"}, **FLOAT32))
        activations.work([call([folder / "activations.h5"], inputs, key, **FLOAT32)])
    moments.work(call([folder / "moments.h5"], inputs | {"activations": [folder / "activations.h5"]}, {"hook": HOOK}))
    return weights, folder


def table_of(folder, out, labels, **settings):
    """The table that the stage `ablations` writes."""
    inputs = {role: [folder / f"{role}.h5"] for role in ("tokens", "clean", "activations", "moments")}
    inputs["weights"] = [folder / "weights.safetensors"]
    key = {"experiment": "atlas", "model": "tiny", "corpus": "story", "hook": HOOK, "shard": "0-of-1"}
    settings = {"interventions": labels, "scope": "all", "patch_special": False, "seed": 0} | FLOAT32 | settings
    with torch.inference_mode():
        effects.work([call([out / "table.parquet"], inputs, key, **settings)])
    return pl.read_parquet(out / "table.parquet").with_columns(pl.col("intervention").cast(pl.String))


def evaluated(weights, folder, change):
    """`kl` and `ce` by a plain run in float64; `change` is done to the heads of ordinary tokens, `seq pos head d`."""
    with h5py.File(folder / "tokens.h5") as file:
        token, special = (torch.from_numpy(file[name][:]) for name in ("token", "special"))
    model, token = reference_model(weights), token.long()

    def hook(z, hook):
        return torch.where(special[..., None, None], z, change(z.clone()))

    with torch.inference_mode():
        before = model(token).log_softmax(-1)
        after = model.run_with_hooks(token, fwd_hooks=[(HOOK, hook)]).log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1)
    return kl.numpy(), -after[:, :-1].gather(-1, token[:, 1:, None]).squeeze(-1).numpy()


def agree(table, intervention, kl, ce):
    rows = table.filter(intervention=intervention).sort("sequence", "position")
    found, loss = (rows[name].cast(pl.Float64).to_numpy().reshape(kl.shape) for name in ("kl", "ce"))
    assert (np.abs(found - kl) <= np.maximum(1e-3 * kl, 5e-5 * np.sqrt(np.maximum(kl, 0))) + 2e-9).all(), intervention
    np.testing.assert_allclose(loss[:, :-1], ce, rtol=0, atol=2e-4, err_msg=intervention)


def test_ablated_heads_agree_with_a_plain_run_that_ablates_them(decoder, tmp_path):
    weights, folder = decoder
    heads, width = (weights.settings[name] for name in ("n_heads", "d_head"))
    names = [f"{name}({head})" for name in ("zero_head", "mean_head") for head in range(heads)]
    table = table_of(folder, tmp_path, ["identity", *names])
    with h5py.File(folder / "moments.h5") as file:
        mean = torch.from_numpy(file["mean"][:]).double().view(heads, width)
    means = []
    for head in range(heads):
        for name, value in (("zero_head", torch.zeros(width).double()), ("mean_head", mean[head])):

            def change(z, head=head, value=value):
                z[:, :, head] = value
                return z

            kl, ce = evaluated(weights, folder, change)
            agree(table, f"{name}({head})", kl, ce)
            means.append(kl.mean())
    assert table.filter(intervention="identity")["kl"].abs().max() < 1e-9
    assert min(means) > 1e-3
    assert len({round(mean, 4) for mean in means}) == len(means)  # another head, another effect


def test_a_resampled_head_agrees_with_a_plain_run_that_is_given_the_same_tokens(decoder, tmp_path):
    weights, folder = decoder
    heads, width = (weights.settings[name] for name in ("n_heads", "d_head"))
    head = heads - 1
    name = f"resample_head({head})"
    table = table_of(folder, tmp_path, ["identity", name], seed=5)
    with h5py.File(folder / "moments.h5") as file:
        sample, places = torch.from_numpy(file["sample"][:]).double(), file["sample_place"][:].tolist()
    rows = torch.zeros(BATCH + 3, 12, dtype=torch.long)
    for i in range(len(rows)):
        for j, row in enumerate(interventions.random_rows(5, "resample_head/other", i, 0, 12, len(places)).tolist()):
            rows[i, j] = (row + 1) % len(places) if places[row] == [i, j] else row

    def change(z):
        z[:, :, head] = sample[rows].view(*rows.shape, heads, width)[:, :, head]
        return z

    agree(table, name, *evaluated(weights, folder, change))


def test_the_one_head_of_a_model_is_all_of_its_attention(tmp_path, decoder):
    weights, folder = decoder
    names = ["identity", "zero", "zero_head(0)", "mean", "mean_head(0)"]
    table = table_of(folder, tmp_path, names)
    for name in ("zero", "mean"):
        of_one, of_all = (
            table.filter(intervention=label).drop("intervention").sort("sequence", "position")
            for label in (f"{name}_head(0)", name)
        )
        assert of_one.equals(of_all) == (weights.settings["n_heads"] == 1)
