"""Stage `effects`: what replacing an activation does to the next-token distribution, per token and intervention.

The SAEs of a batch share every micro-batch's clean logits. What is measured goes to a spool file for each SAE as it is
made, and from there into its table; a killed job goes on from the spools.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import h5py
import numpy as np
import pyarrow as pa
import torch

from pipeline import batches, decoder, engine, interventions, models, store
from pipeline.hooks import Hook
from pipeline.stage import Call, log, run_batch
from pipeline.types import Acts

VALUES = ("kl", "ce", "top1_agrees")
SAE_COLUMNS = ("l0", "l1", "norm", "sae_norm", "eps", "cos")
UNITS = {"kl": "nats", "ce": "nats", "ce_clean": "nats", "entropy_clean": "nats", "l0": "features"}
UNITS |= dict.fromkeys(("l1", "norm", "sae_norm", "eps"), "activation")
# Rows of a row group, about: what is held in memory while a table is written.
GROUP_ROWS = 2**18


@dataclass(frozen=True)
class Item:
    """One SAE (or, for ablations, one hook) of a job: its open files, and where its values go."""

    call: Call
    hook: Hook
    files: dict[str, h5py.File]
    mean: torch.Tensor | None
    spool: store.Spool

    @property
    def names(self) -> list[str]:
        return self.call.settings["interventions"]

    def sources(self, first: int, last: int) -> dict[str, Acts]:
        """What the interventions ask for in a micro-batch and is no clean activation: `x_hat`, and the noise of each
        by name."""
        found = {}
        if "reconstructions" in self.files:
            start = int(self.files["reconstructions"].attrs["first"])
            found["x_hat"] = _rows(self.files["reconstructions"]["x_hat"], first - start, last - start)
        for name in self.names:
            if "noise" in interventions.arguments(name):
                shape = self.files["activations"]["activation"].shape[1:]
                found[name] = noise(self.call.settings["seed"], name, first, last - first, shape)
        return found


def work(calls: list[Call]) -> None:
    """Make the tables of all items; what they share (model, tokens, clean run) is read once."""
    call = calls[0]
    torch.set_num_threads(call.threads)
    weights = models.load(call.input("weights"), call.device)
    model = decoder.in_precision(weights, call.settings["precision"], call.device)
    with ExitStack() as stack:
        tokens, clean = (_opened(stack, call, role) for role in ("tokens", "clean"))
        shape = clean["ce"].shape
        items = [_item(stack, each, weights, shape) for each in calls]
        measure(items, engine.Substitution(model, call.budget), tokens, clean)
        for item in items:
            write(item, tokens, clean)
            item.spool.remove()


AXES = {
    "tokens": {"token": "seq pos", "special": "seq pos"},
    "clean": {"final": "seq pos d_model", "ce": "seq pos", "entropy": "seq pos"},
    "activations": {"activation": "seq pos d"},
    "reconstructions": {"x_hat": "seq pos d"},
    "moments": {"mean": "d"},
}


def _opened(stack: ExitStack, call: Call, role: str) -> h5py.File:
    return stack.enter_context(store.arrays(call.input(role), AXES[role]))


def _item(stack: ExitStack, call: Call, weights: models.Weights, shape: tuple[int, int]) -> Item:
    files = {
        role: _opened(stack, call, role)
        for role in ("activations", "reconstructions", "moments")
        if role in call.inputs
    }
    hook = decoder.hook_of(call.settings.get("hook") or call.key["hook"], weights)
    mean = torch.from_numpy(files["moments"]["mean"][:]).to(call.device) if "moments" in files else None
    store_shape = (len(VALUES), len(call.settings["interventions"]), *shape)
    return Item(call, hook, files, mean, store.Spool(call.output, call.fingerprint, store_shape))


def measure(items: list[Item], substitution: engine.Substitution, tokens: h5py.File, clean: h5py.File) -> None:
    """Fill the spools: every intervention of every item over the shard."""
    call, start = items[0].call, int(clean.attrs["first"])
    done = {item.call.output: item.spool.done for item in items}
    places = list(batches.ranges(start, start + len(clean["ce"])))
    places = [place for place in places if any(start + count < place[1] for count in done.values())]

    def read(place: tuple[int, int]) -> "_Read":
        return _Read.of(items, tokens, clean, start, *place)

    workers = 1 if call.device == "cpu" else 4
    for count, found in enumerate(batches.ahead(read, places, workers), 1):
        batch = found.batch(call)
        pending = [item for item in items if start + done[item.call.output] < batch.first + batch.count]
        runs = distinct_runs(pending)
        values = substitution.effects(batch, found.patches(runs))
        stacked = np.stack([values[name].float().cpu().numpy() for name in VALUES])[:, :, : batch.count]
        place = {run: i for i, run in enumerate(runs)}
        for item in pending:
            item.spool.put(batch.first - start, stacked[:, [place[_run(item, name)] for name in item.names]])
        if count % 16 == 0:
            log.info("%d of %d sequences", batch.first - start + batch.count, len(clean["ce"]))


Run = tuple[str, str]


def distinct_runs(items: list[Item]) -> dict[Run, tuple[Item, str]]:
    """Every run that the items ask for, once, with an item and an intervention that it is made from."""
    runs: dict[Run, tuple[Item, str]] = {}
    for item in items:
        for name in item.names:
            runs.setdefault(_run(item, name), (item, name))
    return runs


def _run(item: Item, name: str) -> Run:
    """What makes a run the one it is. Without an SAE's reconstruction or noise it is the same for all SAEs of a
    hook."""
    shared = set(interventions.arguments(name)) <= {"x", "mean"}
    return (item.hook.name if shared else str(item.call.output), name)


@dataclass(frozen=True)
class _Read:
    """One micro-batch as it was read: everything is on the CPU, in page-locked memory where a GPU waits for it."""

    first: int
    count: int
    device: str
    shared: dict[str, torch.Tensor]
    sites: dict[str, dict[str, torch.Tensor]]  # by hook
    sources: dict[object, dict[str, torch.Tensor]]  # by item

    @classmethod
    def of(cls, items: list[Item], tokens: h5py.File, clean: h5py.File, start: int, first: int, last: int) -> "_Read":
        place = (first - start, last - start)
        device = items[0].call.device

        def ready(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: rows.pin_memory() for name, rows in found.items()} if device.startswith("cuda") else found

        shared = {name: _rows(tokens[name], first, last) for name in ("token", "special")}
        shared["final"] = _rows(clean["final"], *place)
        sites = {}
        for item in items:
            if item.hook.name not in sites:
                file = item.files["activations"]
                wanted = [name for name in ("activation", "stream") if name in file]
                sites[item.hook.name] = ready({name: _rows(file[name], *place) for name in wanted})
        sources = {item.call.output: ready(item.sources(first, last)) for item in items}
        return cls(first, last - first, device, ready(shared), sites, sources)

    def on_device(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(self.device, non_blocking=True)

    def batch(self, call: Call) -> engine.Batch:
        special = self.on_device(self.shared["special"])
        kept = torch.zeros_like(special) if call.settings["patch_special"] else special
        token, final = (self.on_device(self.shared[name]) for name in ("token", "final"))
        return engine.Batch(self.first, self.count, token.long(), kept, final)

    def patches(self, runs: dict[Run, tuple[Item, str]]) -> Iterator[tuple[engine.Site, Acts]]:
        """What each run writes and where, made when it is wanted."""
        sites: dict[Hook, engine.Site] = {}
        for item, name in runs.values():
            if item.hook not in sites:
                arrays = {kind: self.on_device(rows) for kind, rows in self.sites[item.hook.name].items()}
                sites[item.hook] = engine.Site(item.hook, arrays["activation"], arrays.get("stream"))
            yield sites[item.hook], self.x_new(item, name, sites[item.hook].x)

    def x_new(self, item: Item, name: str, x: Acts) -> Acts:
        """What an intervention writes, from what its arguments ask for."""
        given = self.sources[item.call.output]
        sources: dict[str, Callable[[], torch.Tensor]] = {
            "x": lambda: x,
            "x_hat": lambda: self.on_device(given["x_hat"]),
            "noise": lambda: self.on_device(given[name]).to(x.dtype),
            "mean": lambda: item.mean.to(x.dtype),
        }
        return interventions.x_new(name, sources)


def noise(seed: int, name: str, first: int, count: int, shape: tuple[int, int]) -> Acts:
    """The noise of an intervention for the sequences of a micro-batch, `seq pos d`."""
    return batches.filled(
        torch.stack(
            [interventions.standard_normal(seed, name, sequence, 0, shape) for sequence in range(first, first + count)]
        )
    )


def _rows(dataset: h5py.Dataset, first: int, last: int) -> torch.Tensor:
    return batches.filled(torch.from_numpy(dataset[first:last]))


def write(item: Item, tokens: h5py.File, clean: h5py.File) -> None:
    """One Parquet file: row groups of some sequences and one intervention."""
    call = item.call
    for name, kl in zip(item.names, item.spool.values[0], strict=True):
        log.info("%s: %s: mean KL %.6g nats", call.name, name, kl.mean(dtype=np.float64))
    attributes = {"model": call.settings.get("model"), "hook": item.hook.name} | call.key
    store.write_table(
        call.output,
        _groups(item, tokens, clean),
        call.fingerprint,
        UNITS,
        **attributes,
        patch_special=call.settings["patch_special"],
    )


def _groups(item: Item, tokens: h5py.File, clean: h5py.File) -> Iterator[pa.Table]:
    sequences, length = clean["ce"].shape
    step = max(1, GROUP_ROWS // length)
    for start in range(0, sequences, step):
        place = slice(start, min(start + step, sequences))
        shared = _shared_columns(item, tokens, clean, place)
        for i, name in enumerate(item.names):
            kl, ce, agrees = item.spool.get(i, place)
            values = {"kl": kl, "ce": ce, "top1_agrees": agrees.astype(bool)}
            if np.isnan(kl).any():
                raise ValueError(
                    f"The KL of '{name}' is not a number at {int(np.isnan(kl).sum())} "
                    "tokens. This is a bug in Faithful; please report it."
                )
            kind = {
                "intervention": _repeated(name, kl.size),
                "scope": _repeated(item.call.settings["scope"], kl.size),
                "draw": pa.array(np.zeros(kl.size, np.int32)),
            }
            yield pa.table(kind | shared | {key: _column(value) for key, value in values.items()})


def _shared_columns(item: Item, tokens: h5py.File, clean: h5py.File, place: slice) -> dict[str, pa.Array]:
    """The columns that do not depend on the intervention, of some sequences of the shard."""
    first = int(clean.attrs["first"])
    shape = (place.stop - place.start, clean["ce"].shape[1])
    ids = tokens["token"][first + place.start : first + place.stop]
    after = np.ma.masked_array(np.roll(ids, -1, axis=1), np.broadcast_to(np.arange(shape[1]) == shape[1] - 1, shape))
    number = np.arange(first + place.start, first + place.stop, dtype=np.int32)
    columns = {
        "sequence": np.broadcast_to(number[:, None], shape),
        "position": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "token": ids,
        "next_token": after,
        "special": tokens["special"][first + place.start : first + place.stop],
        "ce_clean": clean["ce"][place],
        "entropy_clean": clean["entropy"][place],
    }
    if "reconstructions" in item.files:
        columns |= {name: item.files["reconstructions"][name][place] for name in SAE_COLUMNS}
    return {name: _column(value) for name, value in columns.items()}


def _column(value: np.ndarray) -> pa.Array:
    """Flat; NaN (no next token) becomes null."""
    return pa.array(value.flatten(), from_pandas=True)


def _repeated(value: str, rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), [value])


def main() -> None:
    with torch.inference_mode():
        run_batch("effects", work)


if __name__ == "__main__":
    main()
