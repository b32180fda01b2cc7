"""Stage `checks`: the stored numbers of the first tokens against an evaluation in float64, as part of every run.

It shares nothing with the engine but the weights and what was written in place of the activation: TransformerLens in
float64, a whole forward pass for every intervention, both log-softmaxes, KL and cross-entropy by their definitions. One
SAE is checked at every hook, and every ablation.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import torch
from torch import Tensor

from pipeline import batches, decoder, models, store
from pipeline.hooked import Hooked
from pipeline.hooks import Hook
from pipeline.sources import Sources
from pipeline.stage import Call, log, run

# Tokens to check at every hook.
TOKENS = 512
# Above this KL, in nats, the relative error of single tokens is reported; below, float32 itself leaves more.
SIZEABLE = 2.5e-3
# A mean KL that is off by more than this share means that something is broken, or too coarse to be used.
TOLERANCE = 0.01
UNITS = dict.fromkeys(("kl_mean", "kl_mean_float64", "kl_worst", "ce_worst"), "nats")


def work(call: Call) -> None:
    torch.set_num_threads(call.threads)
    weights = models.load(call.input("weights"), call.device)
    wide = Hooked(replace(weights, state={name: tensor.double() for name, tensor in weights.state.items()}))
    with store.arrays(call.input("tokens"), {"token": "seq pos", "special": "seq pos"}) as file:
        count = max(1, TOKENS // file["token"].shape[1])
        tokens = torch.from_numpy(file["token"][:count]).long().to(call.device)
        special = torch.from_numpy(file["special"][:count]).to(call.device)
    rows = [
        row
        for table in (*call.inputs.get("effects", []), *call.inputs.get("ablations", []))
        for row in check_table(call, table, wide, tokens, special)
    ]
    table = pl.DataFrame(rows, schema_overrides={"sae": pl.String})
    store.write_table(call.output, [table.to_arrow()], call.fingerprint, UNITS, **call.key)
    worst = max(row["kl_worst"] for row in rows)
    log.info("%d interventions on %d tokens: largest error of a token's KL %.2g nats", len(rows), tokens.numel(), worst)


def check_table(call: Call, path: Path, wide: Hooked, tokens: Tensor, special: Tensor) -> Iterator[dict]:
    """A row for each intervention of one table, from its first sequences; of one position at a time, at the first
    position, and of several draws the first."""
    attributes = store.table_attributes(path)
    hook, sae = decoder.hook_of(attributes["hook"], wide.weights), attributes.get("sae")
    stored = pl.scan_parquet(path).filter(pl.col("sequence") < len(tokens), pl.col("draw") == 0).collect()
    kept = torch.zeros_like(special) if attributes["patch_special"] else special
    if "patched" in stored.columns:
        if stored.is_empty():
            return
        stored = stored.filter(pl.col("patched") == stored["patched"][0])
        kept = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens) != stored["patched"][0]
    with ExitStack() as stack:
        files = {role: _file(stack, call, role, hook, sae) for role in ("activations", "moments")}
        files |= {role: _file(stack, call, role, hook, sae) if sae else None for role in ("reconstructions", "errors")}
        given = {role: file for role, file in files.items() if file}
        sources = Sources(given, call.settings["seed"], call.device, wide.weights.settings["n_heads"])
        count = min(len(tokens), len(files["activations"]["activation"]))
        tokens, kept = tokens[:count], kept[:count]
        clean = [_log_probabilities(wide, row[None]) for row in tokens]
        for label in stored["intervention"].cast(pl.String).unique(maintain_order=True):
            patched = x_new(sources, label, count)
            values = [
                compare(wide, hook, *each)
                for each in zip(tokens.split(1), kept.split(1), patched.split(1), clean, strict=True)
            ]
            expected = [np.stack(column) for column in zip(*values, strict=True)]
            part = stored.filter(pl.col("intervention") == label)
            place = tuple(part.select("sequence", "position").to_numpy().T)
            labels = {"hook": hook.name, "sae": sae, "intervention": label, "n_tokens": len(part)}
            at_places = [column[place] for column in expected]
            yield labels | errors(part, *at_places, what=f"{sae or hook.name}, {label}")


def _file(stack: ExitStack, call: Call, role: str, hook: Hook, sae: str | None) -> h5py.File | None:
    """The first shard of an input at this hook (and of this SAE), or None where the plan gave none."""
    for path in call.inputs.get(role, []):
        file = stack.enter_context(store.arrays(path, {}))
        if file.attrs.get("write", file.attrs.get("hook")) == hook.name and file.attrs.get("sae") in (None, sae):
            return file
    return None


def x_new(sources: Sources, label: str, count: int) -> Tensor:
    """What the intervention wrote into the first sequences, from the stored arrays: float32, `seq pos d`."""
    parts = []
    for first, last in batches.ranges(0, count):  # each of one fold, as the effects were made
        x = batches.filled(torch.from_numpy(sources.files["activations"]["activation"][first:last]).to(sources.device))
        parts.append(sources.x_new((label, 0), x, sources.fetch([(label, 0)], first, last))[: last - first])
    return torch.cat(parts)


def compare(wide: Hooked, hook: Hook, tokens: Tensor, kept: Tensor, patched: Tensor, log_p: Tensor) -> tuple:
    """KL, cross-entropy and top-1 agreement of one sequence by their definitions, ` pos` in float64."""
    log_q = _log_probabilities(wide, tokens, [(hook.name, partial(_write, patched[0], kept[0]))])
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    ce = -log_q[:-1].gather(-1, tokens[0, 1:, None]).squeeze(-1)
    agrees = log_p.argmax(-1) == log_q.argmax(-1)
    return tuple(value.cpu().numpy() for value in (kl, torch.nn.functional.pad(ce, (0, 1), value=torch.nan), agrees))


def _write(patched: Tensor, kept: Tensor, activation: Tensor, hook) -> Tensor:
    """The hook: `patched` `pos d` instead of the activation, except where `kept`."""
    clean = activation[0].flatten(1)
    return torch.where(kept[:, None], clean, patched.to(clean)).view(activation.shape)


def _log_probabilities(wide: Hooked, tokens: Tensor, fwd_hooks: list = ()) -> Tensor:
    """log P of one sequence, `pos v` in float64."""
    return wide.model.run_with_hooks(tokens, fwd_hooks=list(fwd_hooks))[0].log_softmax(-1)


def errors(part: pl.DataFrame, kl: np.ndarray, ce: np.ndarray, agrees: np.ndarray, what: str) -> dict:
    """Stored values beside the float64 ones. ValueError where the mean KL is off by more than TOLERANCE."""
    stored = part["kl"].cast(pl.Float64).to_numpy()
    error, sizeable = np.abs(stored - kl), kl > SIZEABLE
    ce_error = np.abs(part["ce"].cast(pl.Float64).to_numpy() - ce)
    if abs(stored.mean() - kl.mean()) > TOLERANCE * kl.mean() + 1e-6:
        raise ValueError(
            f"{what}: mean KL {stored.mean():.6g}, but {kl.mean():.6g} in float64 over {len(kl)} tokens. The precision "
            "is too low (see `precision` in the configuration), or this is a bug in Faithful."
        )
    return {
        "kl_mean": stored.mean(),
        "kl_mean_float64": kl.mean(),
        "kl_worst": error.max(),
        "kl_worst_relative": (error[sizeable] / kl[sizeable]).max() if sizeable.any() else None,
        "ce_worst": np.nanmax(ce_error),
        "top1_agreement": float((part["top1_agrees"].to_numpy() == agrees).mean()),
    }


def main() -> None:
    with torch.inference_mode():
        run("checks", work)


if __name__ == "__main__":
    main()
