"""Our numbers beside those of sae_lens's own `run_evals`, for the same SAEs and tokens. Where the definitions are the
same, so are the numbers; elsewhere theirs follow from our stored values by their definition, and are not ours.
docs/run_evals.md says it in words."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import polars as pl
import pytest
import torch
from conftest import DEMO, ROOT
from datasets import Dataset
from reference import reference_effects, reference_model
from sae_lens import SAE
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import get_special_token_ids
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerFast

from pipeline import (
    activations,
    clean,
    config,
    corpora,
    effects,
    moments,
    reconstructions,
    scores,
    summary,
    tokens,
    weights,
)
from pipeline.batches import BATCH
from pipeline.hooked import Hooked
from pipeline.jobs import BATCHES, Job
from pipeline.normalised import normalised_rows, token_sums
from pipeline.plan import Plan
from pipeline.stage import Call
from pipeline.statistics import Bootstrap

SAES = ("resid3-topk-16", "resid3-l1-2", "z3-topk-16", "mlp3-topk-16")
TRANSCODER = "transcoder3"
# The SAE of the table in docs/run_evals.md.
SHOWN = "resid3-l1-2"
CONTEXTS, LENGTH = 16, 128
# Both sides round to float32 on different ways: their means are up to 1.1e-6 of them apart, at a KL of 0.009 nats; most
# are below 1e-7. A score divides by what the ablation adds to the loss, of which that is more: up to 4.9e-6.
SAME, SAME_SCORE = 5e-6, 2e-5
# Where definitions differ, the numbers must by more than any rounding; the least difference here is 2.3e-4.
APART = 1e-4
STAGES = {"tokens": tokens.work, "weights": weights.work, "clean": clean.work, "activations": activations.work}
STAGES |= {
    "moments": moments.work,
    "reconstructions": reconstructions.work,
    "scores": scores.work,
    "summary": summary.work,
}
STAGES |= {"effects": effects.work, "ablations": effects.work}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of sae_lens, about kwargs and tensors


@dataclass(frozen=True)
class Study:
    """A finished run of the stages up to the summary. In its experiment `kept` special tokens are left alone, in
    `replaced` they are replaced like any other."""

    folder: Path
    plan: Plan

    def arrays(self, job: Job) -> dict[str, np.ndarray]:
        """What a job has stored, floats in float64."""
        with h5py.File(self.folder / job.path) as file:
            found = {name: file[name][:] for name in file}
        return {name: value.astype(np.float64) if value.dtype.kind == "f" else value for name, value in found.items()}

    @property
    def tokens(self) -> dict[str, np.ndarray]:
        return self.arrays(self.plan.tokens("demo", "heldout"))

    def activation(self, sae: str, side: str = "write") -> np.ndarray:
        """x `seq pos d` where the SAE writes or reads."""
        entry = self.plan.study.saes[sae]
        hook = entry.write if side == "write" else entry.read
        return self.arrays(self.plan.activations("demo", "heldout", hook, "0-of-1"))["activation"]

    def reconstruction(self, sae: str) -> dict[str, np.ndarray]:
        return self.arrays(self.plan.reconstructions(self.plan.study.saes[sae], "heldout", "0-of-1"))

    def table(self, sae: str, intervention: str, experiment: str) -> pl.DataFrame:
        """The per-token table that has an intervention: one of the SAE, or of its hook."""
        wanted, entry = self.plan.study.experiments[experiment], self.plan.study.saes[sae]
        if intervention == "sae":
            job = self.plan.effects(wanted, entry, "heldout", "0-of-1")
        else:
            job = self.plan.ablations(wanted, "demo", "heldout", entry.write, "0-of-1")
        table = pl.read_parquet(self.folder / job.path).with_columns(pl.col("intervention").cast(pl.String))
        return table.filter(intervention=intervention).sort("sequence", "position")

    def effect(self, sae: str, intervention: str, experiment: str = "kept", kind: str = "ordinary") -> dict[str, float]:
        """The row of the summary for an intervention."""
        found = pl.read_parquet(self.folder / "results/summary/effects.parquet")
        owner = pl.col("sae") == sae if intervention == "sae" else pl.col("sae").is_null()
        place = {"hook": self.plan.study.saes[sae].write.name, "experiment": experiment}
        (row,) = found.filter(owner, intervention=intervention, tokens=kind, **place).rows(named=True)
        return row

    def fit(self, sae: str) -> dict[str, float]:
        """The SAE's row of the summary."""
        (row,) = pl.read_parquet(self.folder / "results/summary/saes.parquet").filter(sae=sae).rows(named=True)
        return row

    def scores(self, sae: str, sae_in: str, zero_in: str, everywhere: bool = False) -> dict[str, float]:
        """The two scores against zero ablation, under their names in `run_evals`: the SAE in one experiment, zeros in
        another; over ordinary tokens, or over all."""
        sums = {}
        for name, experiment in (("sae", sae_in), ("zero", zero_in)):
            table = self.table(sae, name, experiment)
            sums |= token_sums(table.with_columns(special=pl.lit(False)) if everywhere else table, CONTEXTS)
        rows = normalised_rows(sums, {}, Bootstrap.over(CONTEXTS, 100, 0.95, 0)).filter(intervention="sae")
        names = {"kl_div_score": "kl_score", "ce_loss_score": "loss_recovered"}
        return {theirs: rows.filter(metric=ours, baseline="zero")["value"].item() for theirs, ours in names.items()}


class Evals(NamedTuple):
    """What `run_evals` gives: its metrics without their groups, and those of features; and the tokens that it saw."""

    metrics: dict[str, float]
    features: dict[str, list[float]]
    given: list[torch.Tensor]


class Recorded(ActivationsStore):
    """Keeps what it hands out."""

    given: list[torch.Tensor]

    def get_batch_tokens(self, *arguments, **settings) -> torch.Tensor:
        self.given.append(super().get_batch_tokens(*arguments, **settings))
        return self.given[-1]


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    """A study of the demo's SAEs, run by the stages themselves in this process."""
    folder, interventions = tmp_path_factory.mktemp("study"), ["sae", "zero"]
    corpus = {"id": "heldout", "path": str(DEMO / "text/heldout.jsonl"), "context": LENGTH, "contexts": CONTEXTS}
    asked = {
        "models": [{"id": "demo", "path": str(DEMO / "model")}],
        "corpora": [corpus],
        "saes": [{"id": sae, "path": str(DEMO / "saes" / sae)} for sae in (*SAES, TRANSCODER)],
        "experiments": [
            {"id": "kept", "interventions": interventions},
            {"id": "replaced", "interventions": interventions, "patch_special": True},
        ],
        "bootstrap": {"samples": 100},
    }
    made = Study(folder, Plan(config.load(asked)))
    with torch.inference_mode():
        for job in made.plan.jobs.values():  # each after its inputs
            if job.stage in STAGES:
                run(job, folder)
    return made


def run(job: Job, folder: Path) -> None:
    inputs = defaultdict(list)
    for role, upstream in job.inputs:
        inputs[role].append(folder / upstream.path)
    outputs = [folder / job.path]
    if job.stage == "summary":
        outputs.append(outputs[0].with_name("saes.parquet"))
    call = Call(job.key, job.settings, dict(inputs), outputs, job.fingerprint, 1, "cpu", 64)
    STAGES[job.stage]([call] if job.stage in BATCHES else call)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(DEMO / "model")


@pytest.fixture(scope="module")
def model(demo_weights, tokenizer) -> HookedTransformer:
    made = Hooked(demo_weights).model
    made.set_tokenizer(tokenizer)
    return made


@pytest.fixture(scope="module")
def evals(study, model) -> Callable[..., Evals]:
    """`run_evals` as it comes, on the contexts of the study; special tokens are excluded, as is its default, or not."""

    @cache
    def found(sae: str, exclude: bool = True, batch: int = BATCH, batches: int = CONTEXTS // BATCH) -> Evals:
        module = SAE.load_from_disk(str(DEMO / "saes" / sae), device="cpu")
        rows = Dataset.from_dict({"tokens": study.tokens["token"].tolist()})
        store = Recorded.from_sae(model, module, rows, streaming=False, total_tokens=CONTEXTS)
        store.given = []
        asked = get_eval_everything_config(batch, batches, batches)
        groups, features = run_evals(module, store, model, ActivationScaler(), asked, exclude_special_tokens=exclude)
        metrics = {name: value for group in groups.values() for name, value in group.items()}
        return Evals(metrics, features, store.given)

    return found


def mean(values: np.ndarray, chosen: np.ndarray) -> float:
    return float(values[chosen].mean())


def explained_variance(x: np.ndarray, x_hat: np.ndarray) -> float:
    """Over rows `token d`: 1 - sum |x - x_hat|² / sum |x - mean(x)|²."""
    return float(1 - ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())


def same(theirs: float, ours: float) -> None:
    assert theirs == pytest.approx(ours, rel=SAME, abs=0)


def all_same(theirs: dict[str, float], ours: dict[str, float]) -> None:
    """That theirs are ours wherever ours has a value."""
    for name, value in ours.items():
        tolerance = SAME_SCORE if name.endswith("_score") else SAME
        assert theirs[name] == pytest.approx(value, rel=tolerance, abs=0), name


def apart(theirs: float, ours: float) -> None:
    assert abs(theirs - ours) > APART * abs(ours)


def test_both_see_the_same_tokens(study, evals):
    found = evals(SHOWN)
    seen = torch.cat(found.given).numpy()
    assert found.metrics["total_tokens_eval_reconstruction"] == CONTEXTS * LENGTH
    np.testing.assert_array_equal(seen, np.concatenate([study.tokens["token"]] * 2))  # once for effects, once for fit
    inside = study.tokens["special"][:, 1:].sum()
    assert study.tokens["special"][:, 0].all()
    assert inside > 0  # special tokens are not BOS alone


# The same definition: what each calls it.


def of_ours(study: Study, sae: str) -> dict[str, float]:
    """Our values under the names of `run_evals`: from the summary, or means of stored columns over ordinary tokens."""
    effect, fit = study.effect(sae, "sae"), study.fit(sae)
    found = {"kl_div_with_sae": effect["kl_mean"], "ce_loss_with_sae": effect["ce_mean"]}
    found |= {"ce_loss_without_sae": effect["ce_clean_mean"], "l2_norm_in": fit["norm_mean"]}
    found |= {"l0": fit["l0_mean"], "l1": fit["l1_mean"], "cossim": fit["cos_mean"]}
    found |= {"explained_variance": fit["explained_variance"], "l2_norm_out": fit["norm_ratio"] * fit["norm_mean"]}
    return found | {"mse": mean(study.reconstruction(sae)["eps"] ** 2, ~study.tokens["special"])}


@pytest.mark.parametrize("sae", SAES)
def test_with_the_defaults_of_both_what_is_measured_of_the_sae_agrees(study, evals, sae):
    all_same(evals(sae).metrics, of_ours(study, sae))


@pytest.mark.parametrize("sae", [*SAES, TRANSCODER])
def test_features_fire_as_often(study, evals, sae):
    ordinary = int((~study.tokens["special"]).sum())
    count, density = study.reconstruction(sae)["feature_count"], np.array(evals(sae).features["feature_density"])
    np.testing.assert_allclose(density, count / ordinary, rtol=SAME)
    assert study.fit(sae)["dead_features"] == (density == 0).mean()
    assert study.fit(sae)["dense_features"] == ((density * ordinary).round() > summary.DENSE * ordinary).mean()


def of_ours_alike(study: Study, sae: str) -> dict[str, float]:
    """The same where special tokens are replaced and counted like any other."""
    with_sae, zero = (study.effect(sae, name, "replaced", "all") for name in ("sae", "zero"))
    found = {"kl_div_with_ablation": zero["kl_mean"], "kl_div_with_sae": with_sae["kl_mean"]}
    found |= {"ce_loss_with_ablation": zero["ce_mean"], "ce_loss_with_sae": with_sae["ce_mean"]}
    found |= {"ce_loss_without_sae": with_sae["ce_clean_mean"]}
    return found | study.scores(sae, "replaced", "replaced", everywhere=True)


@pytest.mark.parametrize("sae", SAES)
def test_with_special_tokens_treated_alike_every_effect_agrees(study, evals, sae):
    """Theirs by `exclude_special_tokens=False`, ours by `patch_special`, and from the rows `all`."""
    theirs = evals(sae, exclude=False).metrics
    all_same(theirs, of_ours_alike(study, sae))
    apart(theirs["kl_div_with_sae"], study.effect(sae, "sae", "kept", "all")["kl_mean"])  # replaced or not matters
    apart(theirs["kl_div_with_sae"], study.effect(sae, "sae", "replaced", "ordinary")["kl_mean"])  # and so does counted


@pytest.mark.parametrize("sae", SAES)
def test_with_special_tokens_counted_the_fit_is_that_of_all_stored_tokens(study, evals, sae):
    """Ours leaves them out always; the stored values have them."""
    theirs, stored = evals(sae, exclude=False).metrics, study.reconstruction(sae)
    x, x_hat = (value.reshape(-1, value.shape[-1]) for value in (study.activation(sae), stored["x_hat"]))
    same(theirs["explained_variance"], explained_variance(x, x_hat))
    apart(theirs["explained_variance"], study.fit(sae)["explained_variance"])
    values = {"l0": stored["l0"], "l1": stored["l1"], "mse": stored["eps"] ** 2, "cossim": stored["cos"]}
    all_same(theirs, {name: float(value.mean()) for name, value in values.items()})
    apart(theirs["l1"], study.fit(sae)["l1_mean"])


# Other definitions: theirs follow from what we store.


@pytest.mark.parametrize("sae", SAES)
def test_their_zeros_go_to_special_tokens_too_while_the_sae_leaves_them_alone(study, evals, sae):
    """By their defaults, the mean is over ordinary tokens, as ours."""
    theirs = evals(sae).metrics
    everywhere, ours = study.effect(sae, "zero", "replaced"), study.effect(sae, "zero", "kept")
    same(theirs["kl_div_with_ablation"], everywhere["kl_mean"])
    apart(theirs["kl_div_with_ablation"], ours["kl_mean"])
    same(theirs["ce_loss_with_ablation"], everywhere["ce_mean"])
    apart(theirs["ce_loss_with_ablation"] - theirs["ce_loss_without_sae"], ours["delta_ce_mean"])
    mixed, alike = study.scores(sae, "kept", "replaced"), study.scores(sae, "kept", "kept")
    all_same(theirs, mixed)
    for name, score in alike.items():
        apart(1 - theirs[name], 1 - score)  # scores are near 1: what they lack to it is compared


def legacy(study: Study, sae: str, batch: int) -> float:
    """Mean over tokens of 1 - |x - x_hat|² / |x - m|², m the mean of the batch that the token is in."""
    x, x_hat, ordinary = study.activation(sae), study.reconstruction(sae)["x_hat"], ~study.tokens["special"]
    parts = []
    for first in range(0, CONTEXTS, batch):
        rows = slice(first, first + batch)
        chosen, made = x[rows][ordinary[rows]], x_hat[rows][ordinary[rows]]
        parts.append(1 - ((chosen - made) ** 2).sum(1) / ((chosen - chosen.mean(0)) ** 2).sum(1))
    return float(np.concatenate(parts).mean())


def bias(study: Study, sae: str, batch: int) -> float:
    """Mean over batches of (mean |x_hat|²) / (mean x · x_hat)."""
    stored, ordinary = study.reconstruction(sae), ~study.tokens["special"]
    squares, products = stored["sae_norm"] ** 2, stored["cos"] * stored["norm"] * stored["sae_norm"]
    parts = [slice(first, first + batch) for first in range(0, CONTEXTS, batch)]
    ratios = [mean(squares[rows], ordinary[rows]) / mean(products[rows], ordinary[rows]) for rows in parts]
    return float(np.mean(ratios))


@pytest.mark.parametrize("sae", SAES)
def test_their_legacy_explained_variance_is_a_mean_of_ratios_of_each_token(study, evals, sae):
    theirs = evals(sae).metrics["explained_variance_legacy"]
    same(theirs, legacy(study, sae, BATCH))
    apart(theirs, study.fit(sae)["explained_variance"])


@pytest.mark.parametrize("sae", SAES)
def test_their_ratios_of_norms_are_means_of_ratios(study, evals, sae):
    """`l2_ratio` over tokens, where ours is one of sums; `relative_reconstruction_bias` over batches."""
    theirs, stored, ordinary = evals(sae).metrics, study.reconstruction(sae), ~study.tokens["special"]
    same(theirs["l2_ratio"], mean(stored["sae_norm"] / stored["norm"], ordinary))
    apart(theirs["l2_ratio"], study.fit(sae)["norm_ratio"])
    same(theirs["relative_reconstruction_bias"], bias(study, sae, BATCH))


def test_the_batch_changes_what_is_taken_from_batches_and_nothing_else(study, evals):
    one, eight = evals(SHOWN, batch=1, batches=CONTEXTS).metrics, evals(SHOWN).metrics
    changed = {"explained_variance_legacy": legacy(study, SHOWN, 1)}
    changed["relative_reconstruction_bias"] = bias(study, SHOWN, 1)
    all_same(one, {name: changed.get(name, value) for name, value in eight.items()})
    for name, value in changed.items():
        apart(eight[name], value)


def test_their_fit_is_measured_on_the_contexts_after_those_of_the_effects(study, evals):
    """`run_evals` resets its dataset in between, but goes on with the iterator that it has: with one batch each, KL and
    loss are of the first, all else is of the second. It begins anew only where the contexts end, as they do elsewhere
    in this file."""
    found = evals(SHOWN, batches=1)
    first, second = np.arange(BATCH), np.arange(BATCH, 2 * BATCH)
    for given, rows in zip(found.given, (first, second), strict=True):
        np.testing.assert_array_equal(given.numpy(), study.tokens["token"][rows])
    ordinary, table = ~study.tokens["special"], study.table(SHOWN, "sae", "kept")
    kl = table["kl"].cast(pl.Float64).to_numpy().reshape(CONTEXTS, LENGTH)
    same(found.metrics["kl_div_with_sae"], mean(kl[first], ordinary[first]))
    x, x_hat = study.activation(SHOWN), study.reconstruction(SHOWN)["x_hat"]
    fits = [explained_variance(x[rows][ordinary[rows]], x_hat[rows][ordinary[rows]]) for rows in (first, second)]
    same(found.metrics["explained_variance"], fits[1])
    apart(found.metrics["explained_variance"], fits[0])


def test_a_transcoder_is_put_back_where_it_reads(study, evals):
    """They write the prediction of the output in place of the input, and compare it with the input."""
    theirs, entry = evals(TRANSCODER).metrics, study.plan.study.saes[TRANSCODER]
    assert entry.read != entry.write
    ordinary, stored = ~study.tokens["special"], study.reconstruction(TRANSCODER)
    x_hat = stored["x_hat"]
    for name in ("l0", "l1"):
        same(theirs[name], study.fit(TRANSCODER)[f"{name}_mean"])
    read = study.activation(TRANSCODER, "read")
    same(theirs["explained_variance"], explained_variance(read[ordinary], x_hat[ordinary]))
    assert theirs["explained_variance"] < 0 < 0.9 < study.fit(TRANSCODER)["explained_variance"]
    same(theirs["mse"], mean(((read - x_hat) ** 2).sum(-1), ordinary))


@pytest.fixture(scope="module")
def wide(demo_weights) -> HookedTransformer:
    """The model in float64."""
    return reference_model(demo_weights)


def test_the_kl_of_a_transcoder_is_theirs_at_the_input_and_ours_at_the_output(study, evals, wide):
    entry, ordinary = study.plan.study.saes[TRANSCODER], ~study.tokens["special"]
    token, special = (torch.from_numpy(study.tokens[name]) for name in ("token", "special"))
    x_hat = torch.from_numpy(study.reconstruction(TRANSCODER)["x_hat"])
    at = {
        hook: mean(reference_effects(wide, token.long(), hook.name, x_hat, special)["kl"].numpy(), ordinary)
        for hook in (entry.read, entry.write)
    }
    same(evals(TRANSCODER).metrics["kl_div_with_sae"], at[entry.read])
    same(study.effect(TRANSCODER, "sae")["kl_mean"], at[entry.write])
    assert at[entry.read] > 10 * at[entry.write]


# The text, and which tokens are special.


def test_the_text_itself_gives_the_same_contexts(study, model):
    """Packed by sae_lens: a BOS before every context and between documents. Ours takes some, spread over all."""
    texts = list(corpora.documents(DEMO / "text/heldout.jsonl", "text"))
    module = SAE.load_from_disk(str(DEMO / "saes" / SHOWN), device="cpu")
    rows = Dataset.from_dict({"text": texts})
    store = ActivationsStore.from_sae(model, module, rows, streaming=False, total_tokens=1)
    packed = torch.stack(list(store.iterable_sequences)).numpy()
    spread = np.linspace(0, len(packed) - 1, CONTEXTS).round().astype(int)
    np.testing.assert_array_equal(packed[spread], study.tokens["token"])


def test_where_a_document_ends_with_a_context_theirs_leaves_a_bos_out(tokenizer):
    documents, bos = [[1, 2, 3], [4, 5, 6]], tokenizer.bos_token_id
    theirs = concat_and_batch_sequences(iter(map(torch.tensor, documents)), 4, bos, None, bos)
    assert [row.tolist() for row in theirs] == [[bos, 1, 2, 3], [bos, 4, 5, 6]]
    assert corpora.pack(iter(documents), 4, bos, True).tolist() == [[bos, 1, 2, 3], [bos, bos, 4, 5]]


def test_special_are_more_tokens_by_ours_where_a_tokenizer_names_more(study, tokenizer):
    assert set(get_special_token_ids(tokenizer)) == set(tokenizer.all_special_ids) == {0}
    other = PreTrainedTokenizerFast.from_pretrained(DEMO / "model", additional_special_tokens=["<|user|>"])
    assert set(get_special_token_ids(other)) < set(other.all_special_ids)


# The page.


def page() -> Iterator[tuple[str, str, str]]:
    """Metric, their number and ours, of each row of docs/run_evals.md that has both."""
    for line in (ROOT / "docs/run_evals.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) > 4 and all(re.fullmatch(r"-?\d+\.\d+", cell) for cell in cells[3:5]):
            yield cells[0].strip("`"), cells[3], cells[4]


def test_the_page_names_every_metric_and_has_the_numbers_of_this_run(study, evals):
    by_default, alike = evals(SHOWN), evals(SHOWN, exclude=False).metrics
    ablated, fit = study.effect(SHOWN, "zero"), study.fit(SHOWN)
    ours = of_ours(study, SHOWN) | study.scores(SHOWN, "kept", "kept")
    ours |= {"kl_div_with_ablation": ablated["kl_mean"], "ce_loss_with_ablation": ablated["ce_mean"]}
    ours |= {"explained_variance_legacy": fit["explained_variance"], "l2_ratio": fit["norm_ratio"]}
    rows = []
    for theirs, mine in ((by_default.metrics, ours), (alike, of_ours_alike(study, SHOWN))):
        rows += [(name, value, mine[name]) for name, value in theirs.items() if name in mine]
    found = list(page())
    assert [name for name, _, _ in found] == [name for name, _, _ in rows]
    for (name, *printed), (_, *values) in zip(found, rows, strict=True):
        for text, value in zip(printed, values, strict=True):
            unit = 10.0 ** -len(text.partition(".")[2])
            assert float(text) == pytest.approx(value, rel=0, abs=unit), name  # the last digit may round the other way
    words = (ROOT / "docs/run_evals.md").read_text(encoding="utf-8")
    assert [name for name in (*by_default.metrics, *by_default.features) if f"`{name}`" not in words] == []
