"""Effects of every intervention, at every token and at one position; and several SAEs in one job: the numbers of each
alone, kept as they are made, and no SAE spoils another's."""

import logging
from dataclasses import replace
from itertools import pairwise, product

import h5py
import numpy as np
import polars as pl
import pytest
import torch
from conftest import random_weights
from reference import reference_effects, reference_model
from scipy.linalg import sqrtm
from tables import arrays, call
from test_sources import LABELS

from pipeline import activations, clean, effects, engine, errors, interventions, labels, models, moments, stage, store
from pipeline import tables as per_token_tables
from pipeline.batches import BATCH

HOOKS = {"a": "blocks.0.attn.hook_z", "b": "blocks.1.hook_resid_pre", "c": "blocks.1.hook_resid_pre"}
OF_SAE = ["identity", "sae", "eps_random"]
SEQUENCES, POSITIONS, WIDTH = 2 * BATCH + 4, 12, 16
RUNS = 3 * 2 + 2  # each SAE and its noise; the control of `b` and `c`, which are at one hook, is the same
FLOAT32 = {"precision": {"blocks": "float32", "difference": "float32"}}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return all_made(tmp_path_factory.mktemp("made"))


def all_made(folder):
    """A folder with all that effects read: a random model, its clean run, and noisy copies of its activations."""
    models.save(random_weights(), folder / "weights.safetensors", "f00d")
    token = np.random.default_rng(0).integers(40, size=(SEQUENCES, POSITIONS), dtype=np.int32)
    special = np.zeros(token.shape, bool)
    special[:, 0] = special[2, 6] = special[9, [1, 3]] = True
    arrays(folder / "tokens.h5", "seq pos", {"token": token, "special": special})
    inputs = {"tokens": [folder / "tokens.h5"], "weights": [folder / "weights.safetensors"]}
    with torch.inference_mode():
        clean.work(call([folder / "clean.h5"], inputs, {"shard": "0-of-1"}, **FLOAT32))
        activations.work([activations_call(folder, hook) for hook in sorted(set(HOOKS.values()))])
    for hook in set(HOOKS.values()):
        both = {"tokens": inputs["tokens"], "activations": [folder / f"{hook}.h5"]}
        moments.work(call([folder / f"{hook}.mean.h5"], both, {"hook": hook}))
    for seed, (sae, hook) in enumerate(HOOKS.items()):
        noisy(folder / f"{sae}.h5", folder / f"{hook}.h5", seed)
        of_sae = {"activations": [folder / f"{hook}.h5"], "moments": [folder / f"{hook}.mean.h5"]}
        of_sae |= {"tokens": inputs["tokens"], "reconstructions": [folder / f"{sae}.h5"]}
        errors.work([call([folder / f"{sae}.errors.h5"], of_sae, {"sae": sae, "corpus": "story"}, hook=hook)])
    return folder


def activations_call(folder, hook, out=None):
    inputs = {"tokens": [folder / "tokens.h5"], "weights": [folder / "weights.safetensors"]}
    key = {"model": "tiny", "corpus": "story", "hook": hook, "shard": "0-of-1"}
    return call([out or folder / f"{hook}.h5"], inputs, key, **FLOAT32)


def noisy(path, activation, seed):
    """A file as `reconstructions` writes it: the activation with noise of a tenth of it. Each SAE's columns say where
    they are from, and every second one has a bias of each token."""
    with h5py.File(activation) as file:
        x = file["activation"][:]
    place = np.arange(x.shape[0] * x.shape[1], dtype=np.float32).reshape(x.shape[:2])
    values = {name: place + 1000 * i for i, name in enumerate(per_token_tables.SAE_COLUMNS)}
    rng = np.random.default_rng(seed)
    values["x_hat"] = x * (1 + rng.normal(size=x.shape).astype(np.float32) / 10)
    values["bias"] = rng.normal(size=x.shape if seed % 2 else x.shape[2:]).astype(np.float32)
    axes = dict.fromkeys(values, "seq pos") | {"x_hat": "seq pos d", "bias": "seq pos d" if seed % 2 else "d"}
    shapes = {name: value.shape for name, value in values.items()}
    place = {"sae": path.stem, "write": activation.stem}
    with store.new_arrays(path, "f00d", axes, shapes, first=0, **place) as file:
        for name, value in values.items():
            file[name][:] = value


def asked(made, folder, sae, reconstructions=None, names=OF_SAE, **changes):
    hook = HOOKS[sae]
    inputs = {name: [made / f"{name}.h5"] for name in ("tokens", "clean")}
    inputs |= {"weights": [made / "weights.safetensors"], "activations": [made / f"{hook}.h5"]}
    inputs |= {"reconstructions": [reconstructions or made / f"{sae}.h5"], "moments": [made / f"{hook}.mean.h5"]}
    inputs |= {"errors": [made / f"{sae}.errors.h5"]}
    settings = {"interventions": names, "scope": "all", "patch_special": False, "model": "tiny", "hook": hook}
    key = {"experiment": "main", "sae": sae, "corpus": "story", "shard": "0-of-1"}
    return call([folder / f"{sae}.parquet"], inputs, key, **settings | FLOAT32 | changes)


@pytest.fixture
def counted(monkeypatch):
    """The (first sequence, patched runs) of every micro-batch that is computed."""
    found, effects_of = [], engine.Substitution.effects

    def count(self, batch, patches):
        patches = list(patches)
        found.append((batch.first, len(patches)))
        return effects_of(self, batch, patches)

    monkeypatch.setattr(engine.Substitution, "effects", count)
    return found


def written(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """The files of the three SAEs, each made alone."""
    folder = tmp_path_factory.mktemp("alone")
    with torch.inference_mode():
        for sae in HOOKS:
            effects.work([asked(made, folder, sae)])
    return written(folder)


def test_the_tables_are_whole(whole, made, tmp_path):
    assert list(whole) == ["a.parquet", "b.parquet", "c.parquet"]  # and no spool
    (tmp_path / "a.parquet").write_bytes(whole["a.parquet"])
    table = pl.read_parquet(tmp_path / "a.parquet")
    assert len(table) == len(OF_SAE) * SEQUENCES * POSITIONS
    means = dict(table.group_by(pl.col("intervention").cast(pl.String)).agg(pl.col("kl").mean()).rows())
    assert means["identity"] == 0
    assert means["sae"] > 0
    attributes = store.table_attributes(tmp_path / "a.parquet")
    told = {"model": "tiny", "hook": HOOKS["a"], "sae": "a", "experiment": "main", "corpus": "story"}
    assert {name: attributes[name] for name in told} == told
    with h5py.File(made / "clean.h5") as file:
        control = table.filter(pl.col("intervention").cast(pl.String) == "identity")
        np.testing.assert_array_equal(control["ce_clean"].to_numpy(), file["ce"][:].flatten())
    assert control["ce"].null_count() == SEQUENCES  # the last position has no next token


@pytest.mark.parametrize("saes", ["abc", "cab", "bc"])
def test_saes_together_give_the_bytes_that_each_gives_alone(made, whole, tmp_path, saes):
    effects.work([asked(made, tmp_path, sae) for sae in saes])
    assert written(tmp_path) == {f"{sae}.parquet": whole[f"{sae}.parquet"] for sae in sorted(saes)}


def test_the_memory_for_logits_changes_no_number(made, whole, tmp_path):
    effects.work([replace(asked(made, tmp_path, sae), budget=64) for sae in HOOKS])
    assert written(tmp_path) == whole


def test_a_micro_batch_is_computed_once_for_all_saes_and_the_control_once_a_hook(made, tmp_path, counted):
    effects.work([asked(made, tmp_path, sae) for sae in HOOKS])
    assert counted == [(first, RUNS) for first in range(0, SEQUENCES, BATCH)]


def interrupted(made, folder, monkeypatch, saes, batches):
    """A job of these SAEs that dies after some micro-batches."""
    effects_of, left = engine.Substitution.effects, list(range(batches))

    def die(self, batch, patches):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return effects_of(self, batch, patches)

    calls = [asked(made, folder, sae) for sae in saes]
    with monkeypatch.context() as patch:
        patch.setattr(engine.Substitution, "effects", die)
        with pytest.raises(KeyboardInterrupt):
            effects.work(calls)


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_an_interrupted_job_goes_on_where_it_was(made, whole, tmp_path, monkeypatch, counted, batches):
    interrupted(made, tmp_path, monkeypatch, "abc", batches)
    assert list(written(tmp_path)) == [f".{sae}.parquet.f00d.spool" for sae in "abc"]
    counted.clear()
    effects.work([asked(made, tmp_path, sae) for sae in HOOKS])
    assert counted == [(first, RUNS) for first in range(BATCH * batches, SEQUENCES, BATCH)]
    assert written(tmp_path) == whole


def test_saes_that_are_at_different_places_go_on_from_there(made, whole, tmp_path, monkeypatch, counted):
    interrupted(made, tmp_path, monkeypatch, "ac", 2)
    counted.clear()
    effects.work([asked(made, tmp_path, sae) for sae in "abc"])
    assert counted == [(0, 3), (BATCH, 3), (2 * BATCH, RUNS)]
    assert written(tmp_path) == whole


def test_a_spool_of_other_settings_is_not_gone_on_from(made, whole, tmp_path, monkeypatch):
    interrupted(made, tmp_path, monkeypatch, "b", 2)
    (tmp_path / ".b.parquet.f00d.spool").rename(tmp_path / ".b.parquet.dead.spool")
    effects.work([asked(made, tmp_path, "b")])
    assert written(tmp_path) == {"b.parquet": whole["b.parquet"]}


def test_a_job_killed_while_it_wrote_a_micro_batch_computes_that_again(made, whole, tmp_path, monkeypatch):
    """Of the second micro-batch, only the first three sequences were written."""
    interrupted(made, tmp_path, monkeypatch, "b", 2)
    spool = store.Spool(tmp_path / "b.parquet", "f00d", (3, len(OF_SAE), SEQUENCES, POSITIONS))
    spool.values[0, -1, BATCH + 3 :] = np.nan
    effects.work([asked(made, tmp_path, "b")])
    assert written(tmp_path) == {"b.parquet": whole["b.parquet"]}


def overflowing(made, folder):
    """Reconstructions of `b` that make the model overflow in the second micro-batch."""
    path = folder / "huge.h5"
    noisy(path, made / f"{HOOKS['b']}.h5", 1)
    with h5py.File(path, "r+") as file:
        file["x_hat"][BATCH + 1] = 3e38
    return path


def test_an_sae_that_makes_the_model_overflow_is_named_and_the_others_are_made(made, whole, tmp_path, caplog):
    made_huge = overflowing(made, tmp_path)
    folder = tmp_path / "out"
    calls = [asked(made, folder, sae, made_huge if sae == "b" else None) for sae in "abc"]
    with pytest.raises(ValueError, match=r"at 'blocks\.1\.hook_resid_pre' is not finite \(micro-batch at sequence 8"):
        effects.work(calls)
    with pytest.raises(ValueError, match=r"^main b story 0-of-1: A run patched at 'blocks\.1\.hook_resid_pre'"):
        stage._one_by_one(calls, effects.work)
    tables = {name: content for name, content in written(folder).items() if name.endswith(".parquet")}
    assert tables == {name: whole[name] for name in ("a.parquet", "c.parquet")}


def test_the_mean_kl_of_every_intervention_is_in_the_log(made, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "faithful"):
        effects.work([asked(made, tmp_path, sae) for sae in "ab"])
    said = [message for message in caplog.messages if "mean KL" in message]
    assert [message.partition(": mean KL")[0] for message in said] == [
        f"main {sae} story 0-of-1: {name}" for sae in "ab" for name in OF_SAE
    ]


def test_ablations_of_several_hooks_need_no_sae_and_give_the_bytes_of_each_alone(made, tmp_path):
    def ablation(folder, sae):
        one = asked(made, folder, sae, names=["identity", "zero", "mean"])
        key = {"experiment": "main", "model": "tiny", "corpus": "story", "hook": HOOKS[sae], "shard": "0-of-1"}
        inputs = {role: paths for role, paths in one.inputs.items() if role not in ("reconstructions", "errors")}
        settings = {name: value for name, value in one.settings.items() if name not in ("model", "hook")}
        return replace(one, key=key, inputs=inputs, settings=settings)

    effects.work([ablation(tmp_path / "together", sae) for sae in "ab"])
    for sae in "ab":
        effects.work([ablation(tmp_path / "alone", sae)])
    assert written(tmp_path / "together") == written(tmp_path / "alone")
    table = pl.read_parquet(tmp_path / "alone/a.parquet")
    assert not set(per_token_tables.SAE_COLUMNS) & set(table.columns)
    means = dict(table.group_by(pl.col("intervention").cast(pl.String)).agg(pl.col("kl").mean()).rows())
    assert means["identity"] == 0 < min(means["zero"], means["mean"])


def test_hooks_together_give_the_activations_that_each_gives_alone(made, tmp_path):
    hooks = ["blocks.1.hook_mlp_out", HOOKS["b"], HOOKS["a"], "blocks.0.hook_resid_post"]
    activations.work([activations_call(made, hook, tmp_path / f"{hook}.h5") for hook in hooks])
    for hook in hooks:
        activations.work([activations_call(made, hook, tmp_path / "alone.h5")])
        with h5py.File(tmp_path / "alone.h5") as alone, h5py.File(tmp_path / f"{hook}.h5") as together:
            assert dict(alone.attrs) == dict(together.attrs)
            assert together.attrs["hook"] == hook
            assert set(alone) == set(together)
            for name in alone:
                np.testing.assert_array_equal(alone[name], together[name], err_msg=f"{hook} {name}")


# Every intervention in every scope, against float64. What each is given is put together here once more, in float64.

SEED, HORIZON = 5, 3
ONE = {"scope": "single", "positions": [0, 1, 6, 8], "horizon": HORIZON, "seed": SEED, "contexts": None}


def dataset(path, name):
    with h5py.File(path) as file:
        return file[name][:]


def wide_x_new(made, sae, label, draw):
    """What the intervention writes at every token, `seq pos d` in float64."""
    activation, reconstruction = made / f"{HOOKS[sae]}.h5", made / f"{sae}.h5"
    moment, error = made / f"{HOOKS[sae]}.mean.h5", made / f"{sae}.errors.h5"
    x, x_hat = (dataset(*of).astype(np.float64) for of in ((activation, "activation"), (reconstruction, "x_hat")))
    name, places = labels.parsed(label)[0], dataset(moment, "sample_place").tolist()

    def noise():
        one = [interventions.standard_normal(SEED, name, i, draw, x.shape[1:]).numpy() for i in range(len(x))]
        return np.stack(one).astype(np.float64)

    def rows(argument):
        """Which row of the sample, `seq pos`: past the token's own, and for `another` past that of `other` too."""
        found, other = np.zeros(x.shape[:2], int), rows("other") if argument == "another" else None
        for i in range(len(x)):
            drawn = interventions.random_rows(SEED, f"{name}/{argument}", i, draw, POSITIONS, len(places)).tolist()
            for position, row in enumerate(drawn):
                while places[row] == [i, position] or (other is not None and other[i, position] == row):
                    row = (row + 1) % len(places)
                found[i, position] = row
        return found

    def fitted(kind):
        fold = 1 - np.arange(len(x)) // 8 % 2  # the other one
        mean_x, mean_error = (dataset(error, f"mean_{of}")[fold][:, None] for of in ("x", "error"))
        factor = dataset(error, kind)[fold]
        of_x = (
            np.einsum("spd,sde->spe", x - mean_x, factor) if factor.ndim == 3 else (x - mean_x) * factor[:, None, None]
        )
        return mean_error + of_x

    given = {
        "x": lambda: x,
        "x_hat": lambda: x_hat,
        "mean": lambda: dataset(moment, "mean"),
        "bias": lambda: np.broadcast_to(dataset(reconstruction, "bias"), x.shape),
        "noise": noise,
        "act_noise": lambda: noise() @ sqrtm(dataset(moment, "covariance")).real,
        "error_noise": lambda: noise() @ sqrtm(dataset(error, "covariance")).real,
        "other": lambda: dataset(moment, "sample")[rows("other")],
        "another": lambda: dataset(moment, "sample")[rows("another")],
        "other_error": lambda: dataset(error, "sample")[rows("other_error")],
        "linear_error": lambda: fitted("weight"),
        "simple_error": lambda: fitted("slope"),
    }
    made_from = {name: lambda of=of: torch.from_numpy(of().astype(np.float64)) for name, of in given.items()}
    half = x.shape[-1] // 2  # the model has two heads
    return interventions.x_new(
        label, made_from | {"head": lambda: torch.arange(2 * half) // half == labels.parsed(label)[1]}
    )


@pytest.fixture(scope="module")
def of_all_interventions(made, tmp_path_factory):
    """(SAE, scope) -> its table of every intervention in two draws."""
    folder, found = tmp_path_factory.mktemp("all"), {}
    scopes = {"all": {"scope": "all", "seed": SEED}, "single": ONE}
    with torch.inference_mode():
        for sae, (scope, settings) in product("ab", scopes.items()):
            effects.work([asked(made, folder / scope, sae, names=LABELS, draws=2, **settings)])
            found[sae, scope] = pl.read_parquet(folder / scope / f"{sae}.parquet")
    return found


@pytest.fixture(scope="module")
def reference(made):
    """The model in float64, and what it is run on."""
    tokens = torch.from_numpy(dataset(made / "tokens.h5", "token")).long()
    return reference_model(random_weights()), tokens, torch.from_numpy(dataset(made / "tokens.h5", "special"))


def of_run(table, label, draw):
    return table.filter(pl.col("intervention").cast(pl.String) == label, pl.col("draw") == draw)


def runs():
    """Every intervention at the attention heads in its first draw and in the residual stream in its last."""
    return [
        (sae, label, draw if effects.is_random(label) else 0) for sae, draw in (("a", 0), ("b", 1)) for label in LABELS
    ]


def compare(found, expected, place, name):
    """Stored values beside float64 ones, `seq pos`, at (sequences, positions). The bound is that of test_engine.py, ten
    times as wide: of `sae_norm`, the normalisation takes most of the change away, and its rounding stays."""
    kl = expected["kl"].numpy()[place]
    error = np.abs(found["kl"].cast(pl.Float64).to_numpy() - kl)
    assert (error <= np.maximum(1e-3 * kl, 5e-5 * np.sqrt(np.maximum(kl, 0))) + 2e-9).all(), name
    ce = np.pad(expected["ce"].numpy(), ((0, 0), (0, 1)), constant_values=np.nan)[place]
    np.testing.assert_allclose(found["ce"].cast(pl.Float64).to_numpy(), ce, rtol=0, atol=2e-4, err_msg=name)
    assert (found["top1_agrees"].to_numpy() == expected["top1_agrees"].numpy()[place]).mean() > 0.99, name
    if name != "identity":
        assert kl.max() > 1e-3, name


@pytest.mark.parametrize(("sae", "label", "draw"), runs())
def test_every_intervention_at_every_token_agrees_with_float64(made, of_all_interventions, reference, sae, label, draw):
    model, tokens, special = reference
    found = of_run(of_all_interventions[sae, "all"], label, draw)
    assert len(found) == SEQUENCES * POSITIONS
    expected = reference_effects(model, tokens, HOOKS[sae], wide_x_new(made, sae, label, draw), special)
    compare(found, expected, (found["sequence"].to_numpy(), found["position"].to_numpy()), label)


@pytest.mark.parametrize(("sae", "label", "draw"), runs())
def test_every_intervention_at_one_position_agrees_with_float64(
    made, of_all_interventions, reference, sae, label, draw
):
    model, tokens, special = reference
    table, x_new = of_run(of_all_interventions[sae, "single"], label, draw), wide_x_new(made, sae, label, draw)
    assert sorted(set(table["patched"])) == [1, 6, 8]  # all tokens at 0 are special
    for position in (1, 6, 8):
        found = table.filter(pl.col("patched") == position)
        assert len(found) == (SEQUENCES - int(special[:, position].sum())) * (HORIZON + 1)
        assert set(found["position"] - position) == set(range(HORIZON + 1))
        kept = torch.ones_like(special)
        kept[:, position] = False
        expected = reference_effects(model, tokens, HOOKS[sae], x_new, kept)
        compare(found, expected, (found["sequence"].to_numpy(), found["position"].to_numpy()), label)


def test_the_control_is_zero_in_every_scope(of_all_interventions):
    for table in of_all_interventions.values():
        assert of_run(table, "identity", 0)["kl"].abs().max() < 1e-9
    assert of_run(of_all_interventions["b", "all"], "identity", 0)["kl"].abs().max() == 0


def test_at_one_position_the_first_effect_is_that_of_no_later_replacement(of_all_interventions):
    """At the first ordinary position, replacing it alone is replacing all up to there: the same KL in both scopes."""
    every, one = (of_run(of_all_interventions["b", scope], "sae", 0) for scope in ("all", "single"))
    first = every.filter(pl.col("position") == 1, ~pl.col("special")).sort("sequence")
    alone = one.filter(pl.col("position") == 1, pl.col("patched") == 1).sort("sequence")
    assert first["sequence"].equals(alone["sequence"])
    np.testing.assert_allclose(alone["kl"], first["kl"], rtol=1e-3, atol=1e-6)


def test_at_one_position_special_tokens_are_left_out_or_replaced_as_asked(made, tmp_path, reference):
    model, tokens, special = reference
    effects.work([asked(made, tmp_path, "b", **ONE | {"patch_special": True})])
    table = pl.read_parquet(tmp_path / "b.parquet")
    assert len(table) == len(OF_SAE) * SEQUENCES * 4 * (HORIZON + 1)
    found = of_run(table, "sae", 0).filter(pl.col("patched") == 0)
    kept = torch.ones_like(special)
    kept[:, 0] = False
    expected = reference_effects(model, tokens, HOOKS["b"], wide_x_new(made, "b", "sae", 0), kept)
    compare(found, expected, (found["sequence"].to_numpy(), found["position"].to_numpy()), "sae")
    for row in found.filter(pl.col("sequence") == 3).rows(named=True):
        assert row["special"] == (row["position"] == 0)
        assert [row[name] for name in per_token_tables.SAE_COLUMNS] == [36 + 1000 * i for i in range(7)]


# Many draws at one position.

DRAWS = {"scope": "draws", "positions": [6], "horizon": 1, "seed": SEED, "contexts": None}
KEY = ["intervention", "draw", "sequence", "patched", "position"]


def drawn(made, folder, sae="b", names=("sae", "eps_random", "shuffled_error"), **settings):
    effects.work([asked(made, folder, sae, names=list(names), **DRAWS | settings)])
    table = pl.read_parquet(folder / f"{sae}.parquet")
    return table.with_columns(pl.col("intervention", "scope").cast(pl.String)).sort(KEY)


@pytest.fixture(scope="module")
def seventy(made, tmp_path_factory):
    with torch.inference_mode():
        return drawn(made, tmp_path_factory.mktemp("draws"), draws=70)


def test_every_random_intervention_has_its_draws_and_the_others_one(seventy):
    assert effects.BLOCK == 32
    counts = dict(seventy.group_by("intervention").agg(pl.col("draw").n_unique()).rows())
    assert counts == {"sae": 1, "eps_random": 70, "shuffled_error": 70}
    means = of_run(seventy, "eps_random", 0)["kl"].mean(), of_run(seventy, "eps_random", 69)["kl"].mean()
    assert len({*means, of_run(seventy, "sae", 0)["kl"].mean()}) == 3


@pytest.mark.parametrize("draws", [1, 5, 33, 40])
def test_more_draws_leave_the_first_ones_bit_for_bit_as_they_were(made, tmp_path, seventy, draws):
    fewer = drawn(made, tmp_path, draws=draws)
    assert fewer.equals(seventy.filter(pl.col("draw") < draws))


def test_the_draws_after_the_first_do_not_depend_on_other_interventions_and_none_on_other_positions(
    made, tmp_path, seventy
):
    other = drawn(made, tmp_path / "other", names=["eps_random", "resample"], draws=40)
    later = pl.col("draw").is_between(1, 39), pl.col("intervention") == "eps_random"
    assert other.filter(*later).equals(seventy.filter(*later))
    two = drawn(made, tmp_path / "two", positions=[2, 6], draws=40)
    assert two.filter(pl.col("patched") == 6).equals(seventy.filter(pl.col("draw") < 40))


def test_the_draws_agree_with_float64_up_to_the_last(made, seventy, reference):
    model, tokens, special = reference
    kept = torch.ones_like(special)
    kept[:, 6] = False
    for name, draw in (("eps_random", 1), ("eps_random", 31), ("shuffled_error", 32), ("shuffled_error", 69)):
        found = of_run(seventy, name, draw)
        expected = reference_effects(model, tokens, HOOKS["b"], wide_x_new(made, "b", name, draw), kept)
        compare(found, expected, (found["sequence"].to_numpy(), found["position"].to_numpy()), name)


def test_an_earlier_table_with_fewer_draws_is_gone_on_from(made, tmp_path, seventy, counted_at):
    """Of 40 draws, the first and one whole block of later ones are kept; the rest is made."""
    settings = DRAWS | {"names": ["sae", "eps_random", "shuffled_error"]}
    for draws in (40, 70):
        counted_at.clear()
        effects.work([replace(asked(made, tmp_path, "b", **settings, draws=draws), family="f")])
    assert counted_at == [32] * 2 * 2 * 3  # draws 33 to 69 in two blocks, two interventions, three micro-batches
    table = pl.read_parquet(tmp_path / "b.parquet").with_columns(pl.col("intervention", "scope").cast(pl.String))
    assert table.sort(KEY).equals(seventy)


@pytest.fixture
def counted_at(monkeypatch):
    """How many runs each call at one position had."""
    found, effects_at = [], engine.Substitution.effects_at

    def count(self, batch, site, prefix, position, horizon, x_new):
        found.append(x_new.shape[1])
        return effects_at(self, batch, site, prefix, position, horizon, x_new)

    monkeypatch.setattr(engine.Substitution, "effects_at", count)
    return found


@pytest.mark.parametrize("calls", [0, 2, 5])
def test_an_interrupted_job_of_draws_goes_on_where_it_was(made, tmp_path, monkeypatch, seventy, calls):
    """Five calls to a micro-batch: the first draws together, and two blocks each of the later ones of two."""
    effects_at, left = engine.Substitution.effects_at, list(range(calls))

    def die(*arguments):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return effects_at(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Substitution, "effects_at", die)
        with pytest.raises(KeyboardInterrupt):
            drawn(made, tmp_path, draws=40)
    assert [path.suffix for path in tmp_path.iterdir()] == [".spool"]
    assert drawn(made, tmp_path, draws=40).equals(seventy.filter(pl.col("draw") < 40))
    assert [path.suffix for path in tmp_path.iterdir()] == [".parquet"]


# Some contexts, and shards.


@pytest.mark.parametrize(("contexts", "batches"), [(1, [0]), (8, [0]), (9, [0, 2]), (20, [0, 1, 2]), (99, [0, 1, 2])])
def test_contexts_are_chosen_by_whole_micro_batches(made, tmp_path, seventy, contexts, batches):
    table = drawn(made, tmp_path, contexts=contexts, draws=5)
    wanted = pl.col("draw") < 5, (pl.col("sequence") // BATCH).is_in(batches)
    assert table.equals(seventy.filter(*wanted))
    assert len(table) > 0


def sharded(path, folder, first, last):
    """The file of some sequences, cut from that of all."""
    with h5py.File(path) as whole, h5py.File(folder / path.name, "w") as part:
        part.attrs.update(dict(whole.attrs) | {"first": first})
        for name, values in whole.items():
            rows = values[first:last] if str(values.attrs["axes"]).startswith("seq ") else values[:]
            part.create_dataset(name, data=rows).attrs["axes"] = values.attrs["axes"]
        part.attrs["checksum"] = store._of_attributes(part)
    return folder / path.name


def shard(made, folder, one, first, last):
    """The call of a shard."""
    folder.mkdir(parents=True, exist_ok=True)
    of_shard = ("clean", "activations", "reconstructions")
    inputs = {
        role: [sharded(path, folder, first, last) if role in of_shard else path for path in paths]
        for role, paths in one.inputs.items()
    }
    return replace(one, inputs=inputs, outputs=[folder / one.output.name])


# One of every kind of argument.
SOME = ["sae", "act_cov_random", "real_difference", "shuffled_error", "linear_error_restored", "decoder_bias", "mean"]
SCOPES = {"all": {"scope": "all", "seed": SEED}, "draws": DRAWS | {"draws": 5}, "single": ONE}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("sae", ["a", "b"])
def test_shards_give_the_rows_that_the_whole_gives(made, tmp_path, scope, sae):
    one = asked(made, tmp_path / "whole", sae, names=SOME, **SCOPES[scope])
    effects.work([one])
    whole = pl.read_parquet(one.output)
    folders = [tmp_path / str(first) for first in (0, 8, 16)]
    for folder, (first, last) in zip(folders, pairwise((0, 8, 16, 20)), strict=True):
        effects.work([shard(made, folder, one, first, last)])
    parts = pl.concat([pl.read_parquet(folder / f"{sae}.parquet") for folder in folders])
    key = [name for name in KEY if name in parts.columns]
    cast = pl.col("intervention", "scope").cast(pl.String)
    assert parts.with_columns(cast).sort(key).equals(whole.with_columns(cast).sort(key))


def test_a_shard_without_a_chosen_micro_batch_has_an_empty_table_of_the_same_columns(made, tmp_path):
    one = asked(made, tmp_path / "whole", "b", names=SOME, **DRAWS | {"draws": 5, "contexts": 9})
    effects.work([one])
    whole, parts = pl.read_parquet(one.output), []
    for first, last in ((0, 8), (8, 16), (16, 20)):
        part = shard(made, tmp_path / str(first), one, first, last)
        effects.work([part])
        parts.append(pl.read_parquet(part.output))
        assert not list(part.output.parent.glob(".*"))
    assert parts[1].is_empty()
    assert parts[1].schema == whole.schema
    assert sum(map(len, parts)) == len(whole) > 0
    together = pl.scan_parquet([tmp_path / str(first) / "b.parquet" for first in (8, 0, 16)])
    assert together.select(pl.len()).collect().item() == len(whole)


def test_several_saes_at_one_position_give_the_rows_of_each_alone(made, tmp_path):
    settings = DRAWS | {"draws": 2, "names": SOME}
    effects.work([asked(made, tmp_path / "together", sae, **settings) for sae in "abc"])
    for sae in "abc":
        effects.work([asked(made, tmp_path / "alone", sae, **settings)])
    assert written(tmp_path / "together") == written(tmp_path / "alone")
