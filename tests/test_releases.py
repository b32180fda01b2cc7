"""SAEs of sae_lens's releases: which are meant, what they are, and that they load as sae_lens loads them."""

import ast
import inspect
import json
import re
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import DEMO
from hubs import COMMIT, LATER, offline, published, repository

from pipeline import config, releases, saes

JB = "gpt2-small-res-jb"
REPO = "jbloom/GPT2-Small-SAEs-Reformatted"
# SAEs of the demo under the names of published ones; those of the release are ReLU SAEs.
PLACES = {"blocks.1.hook_resid_pre": "resid1-topk-16", "blocks.3.hook_resid_pre": "resid3-l1-2"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache, and a working directory of its own; sae_lens is asked here, because it is imported already."""
    monkeypatch.chdir(tmp_path)
    asked_here = lambda asked: {release: saes.described(release, names) for release, names in asked.items()}  # noqa: E731
    monkeypatch.setattr(releases, "_ask", asked_here)
    return offline(tmp_path / "home", monkeypatch)


def jb(home, **changes):
    """A part of gpt2-small-res-jb, in the format that it has: a flat cfg.json and safetensors."""
    folder = DEMO / "saes" / "resid3-l1-2"
    files = {}
    for layer in (1, 3, 5):
        name = f"blocks.{layer}.hook_resid_pre"
        files[f"{name}/cfg.json"] = published(folder, hook_point=name, **changes)
        files[f"{name}/sae_weights.safetensors"] = folder / "sae_weights.safetensors"
    return repository(home, REPO, files)


def entry(**changes):
    return {"release": JB, "allow_pickle": False} | changes


def ids(**changes):
    return [each["sae_id"] for each in releases.expanded(entry(**changes))]


# Which SAEs are meant.

RESID = [f"blocks.{layer}.hook_resid_pre" for layer in range(12)]
LAST = "blocks.11.hook_resid_post"
CHOSEN = {
    "one": ({"sae_id": RESID[6]}, [RESID[6]]),
    "a pattern": ({"sae_ids": "blocks.*.hook_resid_pre"}, RESID),
    "a list": ({"sae_ids": [RESID[3], RESID[1]]}, [RESID[3], RESID[1]]),
    "patterns that overlap": ({"sae_ids": ["blocks.1*", "*resid_post"]}, [RESID[1], *RESID[10:], LAST]),
    "all": ({}, [*RESID, LAST]),
    "layers": ({"layers": "0-10"}, RESID[:11]),
    "some layers": ({"layers": [6, 0]}, [RESID[6], RESID[0]]),
    "one layer": ({"layers": 6}, [RESID[6]]),
    "layers of a pattern": ({"sae_ids": "*resid_pre", "layers": "10-11"}, RESID[10:]),
    "another release": (
        {"release": "gemma-scope-2b-pt-res-canonical", "sae_ids": "layer_*/width_16k/canonical", "layers": [0, 25]},
        ["layer_0/width_16k/canonical", "layer_25/width_16k/canonical"],
    ),
}


@pytest.mark.parametrize(("given", "expected"), CHOSEN.values(), ids=CHOSEN)
def test_an_entry_stands_for_these_saes(home, given, expected):
    assert ids(**given) == expected


UNCLEAR = {
    "unknown release": ({"release": "gpt2-res-jb"}, r"Unknown release 'gpt2-res-jb'\. Near it: gpt2-small-res-jb"),
    "unknown id": ({"sae_id": "blocks.6.resid_pre"}, r"Unknown SAE 'blocks\.6\.resid_pre'\. Near it: blocks\.\d"),
    "a pattern as an id": ({"sae_id": "blocks.*"}, "Unknown SAE"),
    "a pattern that nothing matches": ({"sae_ids": ["blocks.6.hook_resid_pre", "*z"]}, r"Unknown SAE '\*z'"),
    "a layer that is not there": ({"layers": [10, 12]}, "there is none at layer 12, only at 0, 1,"),
    "two at a layer": ({"layers": "0-11"}, r"at layer 11 there are 2: .*resid_pre, .*resid_post\. Say which with"),
    "layers that lead out": ({"release": "someone/saes", "sae_id": "../../etc"}, "leads out of its place"),
    "absolute": ({"release": "someone/saes", "sae_ids": ["/etc"]}, "leads out of its place"),
    "a pattern without a list": ({"release": "someone/saes", "sae_ids": "*"}, "Name each of its SAEs"),
    "pickled": ({"release": "gpt2-small-hook-z-kk", "layers": 3}, "weights are pickled, .* set `allow_pickle: true`"),
}


@pytest.mark.parametrize(("given", "message"), UNCLEAR.values(), ids=UNCLEAR)
def test_an_entry_that_is_not_clear_is_refused_with_what_there_is(home, given, message):
    with pytest.raises(ValueError, match=message):
        ids(**given)


def test_names_are_made_of_release_and_id_and_are_good_for_files(home):
    schema = config._schema()["$defs"]["id"]["pattern"].removesuffix("\\Z")
    named = [each["id"] for each in releases.expanded(entry())]
    assert named[6] == "gpt2-small-res-jb-blocks.6.hook_resid_pre"
    for release, listed in releases._directory().items():
        if listed["loader"] != releases.SUMMED and "clt" not in "".join(listed["saes"].values()):
            named += [each["id"] for each in releases.expanded(entry(release=release, allow_pickle=True))]
    assert [name for name in named if not re.fullmatch(schema, name)] == []
    assert len(named[13:]) == len(set(named[13:])) > 1000


def test_an_id_of_ones_own_names_one_or_begins_the_names_of_many(home):
    (one,) = releases.expanded(entry(sae_id=RESID[6], id="six"))
    two = releases.expanded(entry(sae_ids=RESID[6:8], id="jb"))
    assert [each["id"] for each in (one, *two)] == ["six", f"jb-{RESID[6]}", f"jb-{RESID[7]}"]


def test_the_list_is_remembered(home, monkeypatch):
    assert len(ids()) == 13
    monkeypatch.setattr(releases, "_directory", dict)
    assert len(ids()) == 13


def test_every_converter_of_sae_lens_that_unpickles_is_known():
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def calls(function):
        tree = ast.parse(inspect.getsource(function))
        return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}

    found = {name for name, function in loaders.NAMED_PRETRAINED_SAE_LOADERS.items() if "torch.load" in calls(function)}
    assert found == set(releases.PICKLED)
    assert releases.SUMMED in loaders.NAMED_PRETRAINED_SAE_LOADERS


def test_a_cross_layer_transcoder_is_refused(home):
    known = [name for name, each in releases._directory().items() if each["loader"] == releases.SUMMED]
    for name in known:
        with pytest.raises(ValueError, match="adds up their decoders"):
            ids(release=name)


# What they are, and their weights.


def study(**saes):
    return {
        "models": [{"id": "tiny", "path": str(DEMO / "model")}],
        "corpora": [{"id": "text", "path": str(DEMO / "text" / "heldout.jsonl")}],
        "saes": [saes],
        "experiments": [{"id": "main", "interventions": ["sae"]}],
    }


def test_a_process_of_its_own_gives_the_same_answer(home, monkeypatch):
    jb(home)
    here = releases._ask({JB: RESID[1:2]})
    monkeypatch.undo()
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert releases._ask({JB: RESID[1:2]}) == here
    with pytest.raises(ValueError, match=r"SAE 'blocks\.7\.hook_resid_pre' of 'gpt2-small-res-jb' is not in the cache"):
        releases._ask({JB: RESID[7:8]})


def test_a_release_is_described_by_sae_lens_and_its_metadata_are_the_defaults(home):
    jb(home, context_size=64)
    found = config.load(study(release=JB, layers=[1, 3]))
    first, second = found.saes.values()
    assert (first.id, first.read.name) == ("gpt2-small-res-jb-blocks.1.hook_resid_pre", "blocks.1.hook_resid_pre")
    assert dict(second.source) == {"release": JB, "sae_id": RESID[3], "repo": REPO, "commit": COMMIT}
    assert (second.architecture, second.d_in, second.d_sae) == ("standard", 128, 768)
    # The release says that it was trained on centred weights, and sae_lens's old format that BOS came first.
    assert dict(found.models["tiny"].processing) == {
        "fold_ln": False,
        "center_writing_weights": True,
        "center_unembed": False,
    }
    assert (found.corpora["text"].context, found.corpora["text"].prepend_bos) == (64, True)


def test_what_was_described_needs_neither_sae_lens_nor_the_cache_again(home, monkeypatch):
    jb(home)
    first = config.load(study(release=JB, layers=[1, 3]))
    monkeypatch.setattr(releases, "_ask", lambda asked: pytest.fail(f"asked again: {asked}"))
    assert config.load(study(release=JB, layers=[1, 3])).saes == first.saes
    with pytest.raises(BaseException, match=r"asked again: {'gpt2-small-res-jb': \['blocks\.5"):
        config.load(study(release=JB, layers=[1, 5]))


def test_a_release_that_moved_on_between_two_saes_is_refused(home):
    jb(home)
    config.load(study(release=JB, layers=1))
    repository(home, REPO, {f"{RESID[3]}/cfg.json": published(DEMO / "saes" / "resid3-l1-2")}, commit=LATER)
    with pytest.raises(ValueError, match=rf"is at commit {LATER}, but this study uses {COMMIT}. Delete results/so"):
        config.load(study(release=JB, layers=[1, 3]))


def test_an_sae_that_is_not_in_the_cache_says_so(home):
    jb(home)
    with pytest.raises(ValueError, match=r"SAE 'blocks\.7\.hook_resid_pre' of 'gpt2-small-res-jb' is not in the cache"):
        config.load(study(release=JB, layers=7))


def test_a_configuration_that_sae_lens_cannot_read_is_named(home):
    repository(home, REPO, {"blocks.7.hook_resid_pre/cfg.json": json.dumps({"architecture": "magic"})})
    with pytest.raises(ValueError, match=r"blocks\.7\.hook_resid_pre"):
        config.load(study(release=JB, layers=7))


def test_a_normalisation_that_cannot_be_honoured_is_refused(home):
    jb(home, normalize_activations="expected_average_only_in")
    with pytest.raises(ValueError, match=r"normalize_activations 'expected_average_only_in' can't be honoured"):
        config.load(study(release=JB, layers=1))


@torch.inference_mode()
def test_an_sae_of_a_release_gives_the_bits_that_sae_lens_gives(home):
    from sae_lens import SAE

    jb(home)
    (found,) = config.load(study(release=JB, layers=3)).saes.values()
    sae, x = saes.load(found.source), torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    expected = SAE.from_pretrained(JB, RESID[3])
    folder = saes.load_folder(DEMO / "saes" / "resid3-l1-2")
    assert torch.equal(sae(x).x_hat, expected(x))
    assert torch.equal(sae(x).x_hat, folder(x).x_hat)
    assert 0 < (sae(x).features != 0).float().mean() < 1


def test_a_release_that_moved_on_after_planning_is_not_used(home):
    jb(home)
    (found,) = config.load(study(release=JB, layers=3)).saes.values()
    files = {path.relative_to(jb(home)).as_posix(): path.resolve() for path in jb(home).rglob("*") if path.is_file()}
    repository(home, REPO, files, commit=LATER)
    with pytest.raises(ValueError, match=rf"is at commit {LATER}, but this job was planned with {COMMIT}"):
        saes.load(found.source)


# Other formats, through sae_lens's converters.


def random_state(d_in=128, d_sae=24):
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def kissane(home, state):
    """gpt2-small-hook-z-kk: a pickled state and a configuration beside it."""
    path = home / "weights.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    name = releases._directory()["gpt2-small-hook-z-kk"]["saes"]["blocks.3.hook_z"]
    cfg = {"act_size": 128, "dict_size": 24, "act_name": "blocks.3.attn.hook_z"}
    files = {name: path, name.split(".pt")[0] + "_cfg.json": json.dumps(cfg)}
    repository(home, "ckkissane/attn-saes-gpt2-small-all-layers", files)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@torch.inference_mode()
def test_pickled_saes_are_read_only_with_consent_and_never_run(home):
    from sae_lens import SAE

    kissane(home, random_state())
    given = study(release="gpt2-small-hook-z-kk", layers=3)
    with pytest.raises(ValueError, match="`allow_pickle: true`"):
        config.load(deepcopy(given))
    given["saes"][0]["allow_pickle"] = True
    (found,) = config.load(given).saes.values()
    assert found.read.name == "blocks.3.attn.hook_z"
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    expected = SAE.from_pretrained("gpt2-small-hook-z-kk", "blocks.3.hook_z")
    assert torch.equal(saes.load(found.source)(x).x_hat, expected(x.unflatten(-1, (4, 32))).flatten(-2))
    kissane(home, random_state() | {"evil": Evil(home / "ran")})
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        saes.load(found.source)
    assert not (home / "ran").exists()


@torch.inference_mode()
def test_gemma_scope_is_read_from_npz_without_pickle(home):
    """At the sizes of the real model, which sae_lens takes from the name; all but a few features are 0."""
    release, name, width = "gemma-scope-2b-pt-res-canonical", "layer_0/width_16k/canonical", 16384
    few = random_state(2304, 16)
    arrays = {
        "w_enc": np.pad(few["W_enc"], ((0, 0), (0, width - 16))),
        "w_dec": np.pad(few["W_dec"], ((0, width - 16), (0, 0))),
        "b_enc": np.pad(few["b_enc"], (0, width - 16)),
        "b_dec": few["b_dec"].numpy(),
        "threshold": np.full(width, 0.5, np.float32),
    }
    path = home / "params.npz"
    path.parent.mkdir(parents=True)
    np.savez(path, **arrays)
    place = releases._directory()[release]["saes"][name]
    repository(home, "google/gemma-scope-2b-pt-res", {f"{place}/params.npz": path})
    source, cfg = releases.described([(release, name)])[release, name]
    expected = {"architecture": "jumprelu", "d_in": 2304, "d_sae": width, "normalize_activations": "none"}
    assert {key: cfg[key] for key in expected} == expected
    assert (cfg["metadata"]["hook_name"], cfg["metadata"]["context_size"]) == ("blocks.0.hook_resid_post", 1024)
    sae, x = saes.load(source), torch.randn(1, 3, 2304, generator=torch.Generator().manual_seed(0))
    features = x @ few["W_enc"] + few["b_enc"]
    expected = torch.where(features > 0.5, features, 0) @ few["W_dec"] + few["b_dec"]
    torch.testing.assert_close(sae(x).x_hat, expected, rtol=1e-4, atol=1e-2)


@torch.inference_mode()
def test_a_folder_of_sae_lens_before_6_is_translated(home, tmp_path):
    source, folder = DEMO / "saes" / "resid3-l1-2", tmp_path / "old"
    folder.mkdir()
    (folder / "cfg.json").write_text(published(source))
    (folder / "sae_weights.safetensors").write_bytes((source / "sae_weights.safetensors").read_bytes())
    (found,) = config.load(study(path=str(folder), id="it")).saes.values()
    assert (found.architecture, found.read.name, found.trained["context_size"]) == ("standard", RESID[3], 128)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(saes.load(found.source)(x).x_hat, saes.load_folder(source)(x).x_hat)


@torch.inference_mode()
def test_a_folder_of_sparsify_is_translated(home, tmp_path):
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader
    from safetensors.torch import save_file

    state, folder = random_state(), tmp_path / "pile" / "layers.3"
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps({"d_in": 128, "num_latents": 24, "k": 4, "expansion_factor": 1}))
    raw = {"encoder.weight": state["W_enc"].T.contiguous(), "encoder.bias": state["b_enc"], "b_dec": state["b_dec"]}
    save_file(raw | {"W_dec": state["W_dec"]}, folder / "sae.safetensors")
    given = study(path=str(folder), id="it")
    given["corpora"][0]["context"] = 16  # sae_lens takes 2048 where sparsify says nothing
    (found,) = config.load(given).saes.values()
    assert (found.architecture, found.read.name, found.d_sae) == ("topk", "blocks.3.hook_resid_post", 24)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    made = saes.load(found.source)(x)
    # sae_lens 6.54 itself can't load what sparsify writes, which is `latent d_in`: it expects the transpose.
    with pytest.raises(RuntimeError, match=r"size mismatch for W_dec"):
        SAE.load_from_disk(str(folder), dtype="float32", converter=sparsify_disk_loader)
    save_file(raw | {"W_dec": state["W_dec"].T.contiguous()}, folder / "sae.safetensors")
    expected = SAE.load_from_disk(str(folder), dtype="float32", converter=sparsify_disk_loader)
    assert torch.equal(made.x_hat, expected(x))
    assert ((made.features != 0).sum(-1) <= 4).all()


def test_weights_that_do_not_fit_their_configuration_are_named(home):
    folder = DEMO / "saes" / "resid3-l1-2"
    files = {f"{RESID[3]}/cfg.json": published(folder, hook_point=RESID[3], d_sae=24)}
    repository(home, REPO, files | {f"{RESID[3]}/sae_weights.safetensors": folder / "sae_weights.safetensors"})
    (found,) = config.load(study(release=JB, layers=3)).saes.values()
    with pytest.raises(ValueError, match=r"(?s)'blocks\.3\.hook_resid_pre' of .*size mismatch for W_"):
        saes.load(found.source)
