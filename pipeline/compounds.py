"""Stage `compounds`: sets of SAEs, at several layers of the model at once, per token, set and intervention.

Each SAE encodes the stream that the edits before it have changed already, and a random counterpart makes its vector as
long as the SAE's error would be there. With `encode: clean`, every SAE's error is that on the clean activation, and is
added to the changed stream. All runs of a micro-batch share its clean logits and its noise: what is random depends on
(seed, intervention, hook, sequence), so that two sets have the same noise at a hook that is in both.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace

import h5py
import numpy as np
import pyarrow as pa
import torch

from pipeline import batches, decoder, engine, interventions, models, sets, store, tables
from pipeline.hooks import Geometry, Hook
from pipeline.progress import tracked
from pipeline.registry import unknown
from pipeline.sources import root
from pipeline.stage import Call, log, run
from pipeline.types import Acts

VALUES = ("kl", "ce")
UNITS = dict.fromkeys(("kl", "ce", "ce_clean"), "nats")
ENCODE = ("patched", "clean")
AXES = {
    "tokens": {"token": "seq pos", "special": "seq pos"},
    "clean": {"final": "seq pos d_model", "ce": "seq pos"},
    "activations": {"activation": "seq pos d"},
    "moments": {"covariance": "d d"},
}
# Rows of a row group, about: what is held in memory while a table is written.
GROUP_ROWS = 2**18


@dataclass(frozen=True)
class Study:
    """All that a job works with: the model, its SAEs in sets, the interventions, and the open files."""

    call: Call
    model: decoder.Decoder
    compounds: list[sets.Compound]
    files: dict[str, h5py.File]
    activations: dict[str, h5py.File]  # by hook
    roots: dict[str, torch.Tensor]  # by hook: `d d`, the symmetric square root of the activation's covariance

    @property
    def runs(self) -> list[tuple[sets.Compound, str]]:
        return [(compound, name) for compound in self.compounds for name in self.call.settings["interventions"]]

    @property
    def members(self) -> list[sets.Member]:
        """Every SAE of the sets once."""
        return list({member.id: member for compound in self.compounds for member in compound.members}.values())

    @property
    def start(self) -> int:
        return int(self.files["clean"].attrs["first"])

    @property
    def places(self) -> list[tuple[int, int]]:
        """The micro-batches of this shard that are run: of `contexts` sequences, as many whole ones as hold them,
        spread evenly over the corpus; of all where there is no such number."""
        chosen = batches.chosen(len(self.files["tokens"]["token"]), self.call.settings["contexts"])
        return [place for place in chosen if self.start <= place[0] < self.start + len(self.files["clean"]["ce"])]

    @property
    def sequences(self) -> np.ndarray:
        """Their sequences, as numbers of the corpus."""
        return np.concatenate([np.zeros(0, np.int32), *(np.arange(*place, dtype=np.int32) for place in self.places)])

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.files["clean"]["ce"].shape[1]

    def fetch(self, place: tuple[int, int]) -> dict[object, torch.Tensor]:
        """A micro-batch on the CPU: the arrays of the files, the clean activations by hook, the noise as it is drawn
        by (intervention, argument, hook)."""
        first, last = place
        inside = slice(first - self.start, last - self.start)
        found = {name: _rows(self.files["tokens"][name], slice(first, last)) for name in ("token", "special")}
        found |= {"first": torch.tensor(first), "final": _rows(self.files["clean"]["final"], inside)}
        for name, file in self.activations.items():
            start = int(file.attrs["first"])
            found[name] = _rows(file["activation"], slice(first - start, last - start))
        settings = self.model.weights.settings
        geometry = Geometry(**{size.name: settings[size.name] for size in fields(Geometry) if size.name in settings})
        for name in self.call.settings["interventions"]:
            for argument in set(interventions.arguments(name)) & set(sets.NORMAL):
                for hook in {member.write for member in self.members}:
                    shape = (found["token"].shape[1], hook.width(geometry))
                    found[name, argument, hook] = self._noise(f"{name}/{hook.name}", range(first, last), shape)
        return found

    def _noise(self, purpose: str, sequences: range, shape: tuple[int, int]) -> Acts:
        seed = self.call.settings["seed"]
        return batches.filled(
            torch.stack([interventions.standard_normal(seed, purpose, each, 0, shape) for each in sequences])
        )

    def shared(self, fetched: dict[object, torch.Tensor], count: int) -> sets.Shared:
        """The same where the model is, with `count` real sequences, and with what takes computing."""
        on = {name: rows.to(self.call.device) for name, rows in fetched.items()}
        kept = torch.zeros_like(on["special"]) if self.call.settings["patch_special"] else on["special"]
        batch = engine.Batch(int(fetched["first"]), count, on["token"].long(), kept, on["final"])
        noise = {key: rows.to(on["final"].dtype) for key, rows in on.items() if isinstance(key, tuple)}
        for key in noise:
            if key[1] == "act_noise":
                noise[key] = noise[key] @ self.roots[key[2].name].to(noise[key].dtype)
        errors = {}
        if self.call.settings["encode"] == "clean":
            for member in self.members:
                x = on[member.write.name]
                errors[member.id] = member.x_hat(on[member.read.name], x) - x
        return sets.Shared(batch, noise, errors)


def _rows(dataset: h5py.Dataset, place: slice) -> torch.Tensor:
    return batches.filled(torch.from_numpy(dataset[place]))


def work(call: Call) -> None:
    """Make the table of one shard; a killed job goes on where it was."""
    torch.set_num_threads(call.threads)
    _check(call.settings)
    weights = models.load(call.input("weights"), call.device)
    model = decoder.in_precision(weights, call.settings["precision"], call.device)
    compounds = sets.load(call.settings, weights.layers, call.device)
    with ExitStack() as stack:
        files = {role: stack.enter_context(store.arrays(call.input(role), AXES[role])) for role in ("tokens", "clean")}
        activations = _by_hook(stack, call, "activations") if call.settings["encode"] == "clean" else {}
        moments = _by_hook(stack, call, "moments") if "act_noise" in _arguments(call.settings) else {}
        roots = {hook: torch.from_numpy(root(file["covariance"][:])).to(call.device) for hook, file in moments.items()}
        study = Study(call, model, compounds, files, activations, roots)
        _check_inputs(study)
        shape = (len(VALUES), len(study.runs), len(study.sequences), study.length)
        spool = store.Spool(call.output, call.fingerprint, shape)
        measure(study, spool)
        write(study, spool)
        spool.remove()


def _check(settings: dict) -> None:
    """ValueError where a setting is wrong, before anything is loaded."""
    if settings["encode"] not in ENCODE:
        raise ValueError(unknown("encode", settings["encode"], ENCODE))
    foreign = _arguments(settings) - set(sets.ARGUMENTS)
    if foreign:
        raise ValueError(
            f"Sets of SAEs can't be run under interventions that need {', '.join(sorted(foreign))}. Leave out those "
            f"that need anything but {', '.join(sets.ARGUMENTS)}."
        )
    names = [each["name"] for each in settings["sets"]]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{names.count(name)} sets have the name '{name}'. Rename all but one.")


def _arguments(settings: dict) -> set[str]:
    """What the interventions take, by name."""
    return {argument for name in settings["interventions"] for argument in interventions.arguments(name)}


def _by_hook(stack: ExitStack, call: Call, role: str) -> dict[str, h5py.File]:
    files = [stack.enter_context(store.arrays(path, AXES[role])) for path in call.inputs.get(role, [])]
    return {file.attrs["hook"]: file for file in files}


def _check_inputs(study: Study) -> None:
    """ValueError where an SAE's hook has no file of what is asked for there."""
    settings = study.call.settings
    for member in study.members:
        missing = [hook.name for hook in (member.read, member.write) if hook.name not in study.activations]
        if settings["encode"] == "clean" and missing:
            raise ValueError(f"There are no activations at '{missing[0]}' for SAE '{member.id}'.")
        if "act_noise" in _arguments(settings) and member.write.name not in study.roots:
            raise ValueError(f"There are no moments at '{member.write.name}' for SAE '{member.id}'.")


def measure(study: Study, spool: store.Spool) -> None:
    """Fill the spool: every set and intervention over the chosen micro-batches of the shard, in order."""
    substitution = engine.Substitution(study.model, study.call.budget)
    # To replace the last residual stream by that of a run is to compare the whole run, special tokens included.
    last, places, done = Hook(study.model.weights.layers - 1, "hook_resid_post"), study.places, spool.done
    ends = np.cumsum([stop - start for start, stop in places], dtype=int)
    pending = [(place, int(end)) for place, end in zip(places, ends, strict=True) if end > done]
    fetched = zip(pending, batches.ahead(study.fetch, [place for place, _ in pending]), strict=True)
    length = study.files["tokens"]["token"].shape[1]
    for (place, end), found in tracked(fetched, [(place[1] - place[0]) * length for place, _ in pending]):
        shared = study.shared(found, place[1] - place[0])
        batch = replace(shared.batch, kept=torch.zeros_like(shared.batch.kept))
        site = engine.Site(last, batch.final, None)
        runs = (sets.Run(compound, name, shared) for compound, name in study.runs)
        values = substitution.effects(batch, ((site, run.final(study.model)) for run in runs))
        stacked = np.stack([values[name].float().cpu().numpy() for name in VALUES])
        spool.put(end - batch.count, stacked[:, :, : batch.count])


def write(study: Study, spool: store.Spool) -> None:
    """One Parquet file: row groups of some sequences, one set and one intervention."""
    call = study.call
    for (compound, name), kl in zip(study.runs, spool.values[0], strict=True):
        if kl.size:
            log.info("%s: %s: mean KL %.6g nats", compound.name, name, kl.mean(dtype=np.float64))
    kept = {name: call.settings[name] for name in ("sets", "encode", "patch_special", "contexts", "seed")}
    store.write_table(call.output, _groups(study, spool), call.fingerprint, UNITS, **call.key | kept)


def _groups(study: Study, spool: store.Spool) -> Iterator[pa.Table]:
    """Of no rows where no chosen micro-batch is in the shard."""
    step = max(1, GROUP_ROWS // study.length)
    for start in range(0, max(len(study.sequences), 1), step):
        sequences = study.sequences[start : start + step]
        place, ce_clean = _place(study, sequences), study.files["clean"]["ce"][:][sequences - study.start]
        for i, (compound, name) in enumerate(study.runs):
            kl, ce = spool.get(i, slice(start, start + len(sequences)))
            if np.isnan(kl).any():
                raise ValueError(
                    f"The KL of set '{compound.name}' under '{name}' is not a number at {int(np.isnan(kl).sum())} "
                    "tokens. This is a bug in Faithful; please report it."
                )
            columns = {
                "set": tables.repeated(compound.name, kl.size),
                "size": np.full(kl.shape, len(compound.members), np.int32),
            }
            columns |= {"intervention": tables.repeated(name, kl.size)} | place
            columns |= {"kl": kl, "ce": ce, "ce_clean": ce_clean}
            yield pa.table({name: _column(value) for name, value in columns.items()})


def _place(study: Study, sequences: np.ndarray) -> dict[str, np.ndarray]:
    """Which token each row is of, `seq pos`."""
    shape = (len(sequences), study.length)
    return {
        "sequence": np.broadcast_to(sequences[:, None], shape),
        "position": np.broadcast_to(np.arange(study.length, dtype=np.int32), shape),
        **{name: study.files["tokens"][name][:][sequences] for name in ("token", "special")},
    }


def _column(value: np.ndarray | pa.Array) -> pa.Array:
    """Flat; NaN (no next token) becomes null."""
    return value if isinstance(value, pa.Array) else pa.array(value.flatten(), from_pandas=True)


def main() -> None:
    with torch.inference_mode():
        run("compounds", work)


if __name__ == "__main__":
    main()
