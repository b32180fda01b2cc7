"""Several SAEs in one job: the numbers of each alone, kept as they are made, and no SAE spoils another's."""

import logging
from dataclasses import replace

import h5py
import numpy as np
import polars as pl
import pytest
import torch
from conftest import random_weights
from tables import arrays, call

from pipeline import activations, clean, effects, engine, models, moments, stage, store
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
    """A folder with all that effects read: a random model, its clean run, and noisy copies of its activations."""
    folder = tmp_path_factory.mktemp("made")
    models.save(random_weights(), folder / "weights.safetensors", "f00d")
    token = np.random.default_rng(0).integers(40, size=(SEQUENCES, POSITIONS), dtype=np.int32)
    special = np.zeros(token.shape, bool)
    special[:, 0] = True
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
    return folder


def activations_call(folder, hook, out=None):
    inputs = {"tokens": [folder / "tokens.h5"], "weights": [folder / "weights.safetensors"]}
    key = {"model": "tiny", "corpus": "story", "hook": hook, "shard": "0-of-1"}
    return call([out or folder / f"{hook}.h5"], inputs, key, **FLOAT32)


def noisy(path, activation, seed):
    """A file as `reconstructions` writes it: the activation with noise of a tenth of it."""
    with h5py.File(activation) as file:
        x = file["activation"][:]
    values = {name: np.ones(x.shape[:2], np.float32) for name in effects.SAE_COLUMNS}
    noise = np.random.default_rng(seed).normal(size=x.shape).astype(np.float32)
    values["x_hat"] = x * (1 + noise / 10)
    axes = dict.fromkeys(values, "seq pos") | {"x_hat": "seq pos d"}
    shapes = {name: value.shape for name, value in values.items()}
    with store.new_arrays(path, "f00d", axes, shapes, first=0) as file:
        for name, value in values.items():
            file[name][:] = value


def asked(made, folder, sae, reconstructions=None, names=OF_SAE, **changes):
    hook = HOOKS[sae]
    inputs = {name: [made / f"{name}.h5"] for name in ("tokens", "clean")}
    inputs |= {"weights": [made / "weights.safetensors"], "activations": [made / f"{hook}.h5"]}
    inputs |= {"reconstructions": [reconstructions or made / f"{sae}.h5"], "moments": [made / f"{hook}.mean.h5"]}
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
        inputs = {role: paths for role, paths in one.inputs.items() if role != "reconstructions"}
        settings = {name: value for name, value in one.settings.items() if name not in ("model", "hook")}
        return replace(one, key=key, inputs=inputs, settings=settings)

    effects.work([ablation(tmp_path / "together", sae) for sae in "ab"])
    for sae in "ab":
        effects.work([ablation(tmp_path / "alone", sae)])
    assert written(tmp_path / "together") == written(tmp_path / "alone")
    table = pl.read_parquet(tmp_path / "alone/a.parquet")
    assert not set(effects.SAE_COLUMNS) & set(table.columns)
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
