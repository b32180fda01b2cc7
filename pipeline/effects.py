"""Stage `effects`: what replacing an activation does to the next-token distribution, per token and intervention."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from inspect import signature

import h5py
import numpy as np
import pyarrow as pa
import torch

from pipeline import batches, decoder, engine, models, store
from pipeline.interventions import INTERVENTIONS, standard_normal
from pipeline.stage import Call, log, run
from pipeline.types import Acts

SAE_COLUMNS = ("l0", "l1", "norm", "sae_norm", "eps", "cos")
UNITS = {"kl": "nats", "ce": "nats", "ce_clean": "nats", "entropy_clean": "nats", "l0": "features"}
UNITS |= dict.fromkeys(("l1", "norm", "sae_norm", "eps"), "activation")


def work(call: Call) -> None:
    torch.set_num_threads(call.threads)
    with ExitStack() as stack:
        files = {role: stack.enter_context(store.arrays(call.input(role), axes)) for role, axes in wanted(call).items()}
        values = measure(call, files, call.settings["hook"])
        columns = {name: files["reconstructions"][name][:] for name in SAE_COLUMNS}
        attributes = {"model": call.settings["model"], "hook": call.settings["hook"]} | call.key
        write(call, files, values, columns, attributes)


def wanted(call: Call) -> dict[str, dict[str, str]]:
    """The files of a patching stage and the datasets it wants of each."""
    axes = {
        "tokens": {"token": "seq pos", "special": "seq pos"},
        "clean": {"final": "seq pos d_model", "ce": "seq pos", "entropy": "seq pos"},
        "activations": {"activation": "seq pos d"},
        "reconstructions": {"x_hat": "seq pos d"},
        "moments": {"mean": "d"},
    }
    return {role: datasets for role, datasets in axes.items() if role in call.inputs}


def measure(call: Call, files: dict[str, h5py.File], hook: str) -> dict[str, np.ndarray]:
    """`kl`, `ce` and `top1_agrees` of every intervention of the job over its shard, `intervention seq pos`."""
    weights = models.load(call.input("weights"), call.device)
    substitution = engine.Substitution(decoder.decoder(weights), decoder.hook_of(hook, weights))
    makers = [maker(call, name, files) for name in call.settings["interventions"]]
    parts = []
    for batch in _batches(call, files):
        x_news = [make(batch) for make in makers]
        values = substitution.effects(batch, x_news)
        parts.append({name: value[:, : batch.count].cpu().numpy() for name, value in values.items()})
        if len(parts) % 16 == 0:
            log.info("%d of %d sequences", len(parts) * batches.BATCH, len(files["clean"]["ce"]))
    values = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
    for name, kl in zip(call.settings["interventions"], values["kl"], strict=True):
        log.info("%s: mean KL %.6g nats", name, kl.mean(dtype=np.float64))
    return values


def maker(call: Call, name: str, files: dict[str, h5py.File]) -> Callable[[engine.Batch], Acts]:
    """Intervention by name -> the function that makes its x_new for a batch, fetching what its arguments ask for."""
    start = int(files["activations"].attrs["first"])
    sources = {
        "x": lambda batch: batch.x,
        "x_hat": lambda batch: _rows(
            files["reconstructions"]["x_hat"], batch.first - start, batch.first - start + batch.count, call.device
        ),
        "noise": lambda batch: _noise(call.settings["seed"], name, batch),
        "mean": lambda batch: torch.from_numpy(files["moments"]["mean"][:]).to(batch.x),
    }
    arguments = list(signature(INTERVENTIONS[name]).parameters)
    return lambda batch: INTERVENTIONS[name](**{argument: sources[argument](batch) for argument in arguments})


def _noise(seed: int, name: str, batch: engine.Batch) -> Acts:
    sequences = [batch.first + min(i, batch.count - 1) for i in range(batches.BATCH)]
    return torch.stack([standard_normal(seed, name, sequence, 0, batch.x.shape[1:]) for sequence in sequences]).to(
        batch.x
    )


def _rows(dataset: h5py.Dataset, first: int, last: int, device: str) -> torch.Tensor:
    return batches.filled(torch.from_numpy(dataset[first:last]).to(device))


def _batches(call: Call, files: dict[str, h5py.File]) -> Iterator[engine.Batch]:
    tokens, x = files["tokens"], files["activations"]
    start, stop = batches.shard_bounds(len(tokens["token"]), call.key["shard"])
    for first, last in batches.ranges(start, stop):
        special = _rows(tokens["special"], first, last, call.device)
        place = (first - start, last - start, call.device)
        yield engine.Batch(
            first,
            last - first,
            tokens=_rows(tokens["token"], first, last, call.device).long(),
            kept=torch.zeros_like(special) if call.settings["patch_special"] else special,
            x=_rows(x["activation"], *place),
            stream=_rows(x["stream"], *place) if "stream" in x else None,
            final=_rows(files["clean"]["final"], *place),
        )


def write(
    call: Call,
    files: dict[str, h5py.File],
    values: dict[str, np.ndarray],
    columns: dict[str, np.ndarray],
    attributes: dict,
) -> None:
    """One Parquet file, a row group per intervention; `columns` are further per-token values `seq pos`, the same in
    each."""
    first = int(files["clean"].attrs["first"])
    shape = values["kl"].shape[1:]
    tokens = files["tokens"]["token"][first : first + shape[0]]
    after = np.ma.masked_array(np.roll(tokens, -1, axis=1), np.broadcast_to(np.arange(shape[1]) == shape[1] - 1, shape))
    shared = {
        "sequence": np.broadcast_to(np.arange(first, first + shape[0], dtype=np.int32)[:, None], shape),
        "position": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "token": tokens,
        "next_token": after,
        "special": files["tokens"]["special"][first : first + shape[0]],
        "ce_clean": files["clean"]["ce"][:],
        "entropy_clean": files["clean"]["entropy"][:],
    } | columns
    shared = {name: _column(value) for name, value in shared.items()}
    names = call.settings["interventions"]
    groups = (
        _group(name, call.settings["scope"], shared, {key: value[i] for key, value in values.items()})
        for i, name in enumerate(names)
    )
    store.write_table(
        call.output, groups, call.fingerprint, UNITS, **attributes, patch_special=call.settings["patch_special"]
    )


def _column(value: np.ndarray) -> pa.Array:
    """Flat; NaN (no next token) becomes null."""
    return pa.array(value.flatten(), from_pandas=True)


def _group(name: str, scope: str, shared: dict[str, pa.Array], values: dict[str, np.ndarray]) -> pa.Table:
    rows = len(shared["token"])
    kind = {
        "intervention": _repeated(name, rows),
        "scope": _repeated(scope, rows),
        "draw": pa.array(np.zeros(rows, np.int32)),
    }
    if np.isnan(values["kl"]).any():
        raise ValueError(
            f"The KL of '{name}' is not a number at {int(np.isnan(values['kl']).sum())} "
            "tokens. This is a bug in Faithful; please report it."
        )
    return pa.table(kind | shared | {key: _column(value) for key, value in values.items()})


def _repeated(value: str, rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), [value])


def main() -> None:
    with torch.inference_mode():
        run("effects", work)


if __name__ == "__main__":
    main()
