"""Stage `effects`: what replacing an activation does to the next-token distribution, per token and intervention.

The SAEs of a batch share every micro-batch's clean logits. What is measured goes to a spool file for each SAE as it is
made, and from there into its table (`rows_of_effects`); a killed job goes on from the spools.

In the scope `all`, every token is replaced. In `single` and `draws` one position at a time is, and the effects are read
there and at the `horizon` positions after it.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import h5py
import numpy as np
import torch

from pipeline import batches, decoder, engine, interventions, models, store, tables
from pipeline.hooks import Hook
from pipeline.labels import ARGUMENTS, OF_AN_SAE
from pipeline.progress import tracked
from pipeline.sources import Run, Sources, is_random
from pipeline.stage import Call, run_batch
from pipeline.types import Acts

AXES = {
    "tokens": {"token": "seq pos", "special": "seq pos"},
    "clean": {"final": "seq pos d_model", "ce": "seq pos", "entropy": "seq pos"},
    "activations": {"activation": "seq pos d"},
    "reconstructions": {"x_hat": "seq pos d"},
    "moments": {"mean": "d", "covariance": "d d", "sample": "token d"},
    "errors": {"covariance": "d d", "sample": "token d", "weight": "fold d d"},
}
# Runs of one position that share a call. The draws after the first are run in blocks of exactly so many, so that more
# draws change no digit of the ones before.
BLOCK = 32


class Place(NamedTuple):
    """A micro-batch: its sequences from `first` up to `last`, and the row of the spool where they begin."""

    first: int
    last: int
    row: int


@dataclass(frozen=True)
class Item:
    """One SAE (or, for ablations, one hook) of a job: its open files, the runs to make, and where their values go.
    `known` holds the runs that an earlier table of fewer draws has."""

    call: Call
    hook: Hook
    sources: Sources
    runs: list[Run]
    spool: store.Spool
    known: tables.Known

    def fetch(self, first: int, last: int) -> dict[object, torch.Tensor]:
        return self.sources.fetch(self.runs, first, last, self.call.settings.get("positions"))


def work(calls: list[Call]) -> None:
    """Make the tables of all items; what they share (model, tokens, clean run) is read once."""
    call = calls[0]
    torch.set_num_threads(call.threads)
    weights = models.load(call.input("weights"), call.device)
    model = decoder.in_precision(weights, call.settings["precision"], call.device)
    with ExitStack() as stack:
        tokens, clean = (_opened(stack, call, role) for role in ("tokens", "clean"))
        places = _places(call, len(tokens["token"]), int(clean.attrs["first"]), len(clean["ce"]))
        items = [_item(stack, each, weights, places, clean["ce"].shape[1]) for each in calls]
        sequences = np.concatenate([np.arange(place.first, place.last) for place in places] or [np.zeros(0, int)])
        about = [
            tables.rows(item.call.settings, tokens, clean, item.sources.files.get("reconstructions"), sequences)
            for item in items
        ]
        measure(items, engine.Substitution(model, call.budget), tokens, clean, places)
        for item, rows in zip(items, about, strict=True):
            tables.write(item.call, item.hook.name, _runs(item.call), item.runs, item.spool, item.known, rows)
            item.spool.remove()


def _opened(stack: ExitStack, call: Call, role: str) -> h5py.File:
    return stack.enter_context(store.arrays(call.input(role), AXES[role]))


def _places(call: Call, total: int, start: int, count: int) -> list[Place]:
    """The micro-batches of the shard that the experiment looks at."""
    ranges = batches.chosen(total, call.settings.get("contexts"))
    inside = [pair for pair in ranges if start <= pair[0] < start + count]
    rows = accumulate((last - first for first, last in inside), initial=0)
    return [Place(first, last, row) for (first, last), row in zip(inside, rows, strict=False)]


def _item(stack: ExitStack, call: Call, weights: models.Weights, places: list[Place], length: int) -> Item:
    roles = ("activations", "reconstructions", "moments", "errors")
    files = {role: _opened(stack, call, role) for role in roles if role in call.inputs}
    settings = call.settings
    hook = decoder.hook_of(settings.get("hook") or call.key["hook"], weights)
    known = tables.known(call, BLOCK if "positions" in settings else 1)
    runs = [run for run in _runs(call) if run not in known.runs]
    columns = len(settings["positions"]) * (settings["horizon"] + 1) if "positions" in settings else length
    shape = (len(tables.VALUES), len(runs), sum(place.last - place.first for place in places), columns)
    sources = Sources(files, settings.get("seed", 0), call.device, weights.settings["n_heads"])
    return Item(call, hook, sources, runs, store.Spool(call.output, call.fingerprint, shape), known)


def _runs(call: Call) -> list[Run]:
    return runs_of(call.settings["interventions"], call.settings.get("draws", 1))


def runs_of(labels: list[str], draws: int) -> list[Run]:
    """Every draw of every intervention; one of those that are not random."""
    return [(label, draw) for label in labels for draw in range(draws if is_random(label) else 1)]


def measure(
    items: list[Item], substitution: engine.Substitution, tokens: h5py.File, clean: h5py.File, places: list[Place]
) -> None:
    """Fill the spools: every run of every item in every micro-batch."""
    call, start = items[0].call, int(clean.attrs["first"])
    done = {item.call.output: item.spool.done for item in items}
    places = [place for place in places if min(done.values()) < place.row + place.last - place.first]

    def read(place: Place) -> "_Read":
        return _Read.of(items, tokens, clean, start, place)

    found_ahead = batches.ahead(read, places, 1 if call.device == "cpu" else 4)
    for found in tracked(found_ahead, [(place.last - place.first) * tokens["token"].shape[1] for place in places]):
        place = found.place
        pending = [item for item in items if done[item.call.output] < place.row + place.last - place.first]
        measured = _one_position if "positions" in call.settings else _every_token
        for item, values in measured(pending, substitution, found):
            item.spool.put(place.row, values[:, :, : place.last - place.first])


def _every_token(
    items: list[Item], substitution: engine.Substitution, found: "_Read"
) -> Iterator[tuple[Item, np.ndarray]]:
    """`value run seq pos` of each item, every token replaced; what several items ask for is run once."""
    wanted = distinct_runs(items)
    values = _stacked(substitution.effects(found.batch(), found.patches(wanted)))
    number = {key: i for i, key in enumerate(wanted)}
    for item in items:
        yield item, values[:, [number[_key(item, run)] for run in item.runs]]


Key = tuple[str, str, int]


def distinct_runs(items: list[Item]) -> dict[Key, tuple[Item, Run]]:
    """Every run that the items ask for, once, with an item that it is made from."""
    runs: dict[Key, tuple[Item, Run]] = {}
    for item in items:
        for run in item.runs:
            runs.setdefault(_key(item, run), (item, run))
    return runs


def _key(item: Item, run: Run) -> Key:
    """What makes a run the one it is. Where nothing in it is an SAE's, it is the same for all SAEs of a hook."""
    asked = {source for argument in interventions.arguments(run[0]) for source in ARGUMENTS[argument]}
    return (str(item.call.output) if asked & set(OF_AN_SAE) else item.hook.name, *run)


def _one_position(
    items: list[Item], substitution: engine.Substitution, found: "_Read"
) -> Iterator[tuple[Item, np.ndarray]]:
    """`value run seq column` of each item, one position replaced at a time; a column for each position and each of its
    horizon."""
    settings, batch = items[0].call.settings, found.batch()
    prefixes = {}
    for item in items:
        site, parts = found.site(item.hook), []
        for i, position in enumerate(settings["positions"]):
            if (item.hook, i) not in prefixes:
                prefixes[item.hook, i] = substitution.decoder.prefix(site.hook, site.stream, site.x, position)
            x_news = found.at_position(item, site.x[:, position : position + 1], i)
            values = [
                _stacked(
                    substitution.effects_at(
                        batch, site, prefixes[item.hook, i], position, settings["horizon"], torch.cat(x_new, dim=1)
                    )
                )
                for x_new in in_blocks(item.runs, x_news)
            ]
            parts.append(_unblocked(item.runs, values))
        yield item, np.concatenate(parts, axis=3)


def in_blocks(runs: list[Run], x_news: Iterator[Acts]) -> Iterator[list[Acts]]:
    """The first draw of every intervention together; then the others of each, BLOCK at a time, filled up."""
    made = dict(zip(runs, x_news, strict=True))
    for block in _blocks(runs):
        missing = BLOCK - len(block) if block[0][1] > 0 else 0
        yield [made[run] for run in block + [block[-1]] * missing]


def _blocks(runs: list[Run]) -> list[list[Run]]:
    first = [run for run in runs if run[1] == 0]
    blocks = [first] if first else []
    for label in dict.fromkeys(label for label, _ in runs):
        later = [run for run in runs if run[0] == label and run[1] > 0]
        blocks += [later[start : start + BLOCK] for start in range(0, len(later), BLOCK)]
    return blocks


def _unblocked(runs: list[Run], values: list[np.ndarray]) -> np.ndarray:
    """`value seq run pos` of each block -> `value run seq pos` in the order of the runs."""
    found = {
        run: value[:, :, i] for block, value in zip(_blocks(runs), values, strict=True) for i, run in enumerate(block)
    }
    return np.stack([found[run] for run in runs], axis=1)


def _stacked(values: dict[str, torch.Tensor]) -> np.ndarray:
    return np.stack([values[name].float().cpu().numpy() for name in tables.VALUES])


@dataclass(frozen=True)
class _Read:
    """One micro-batch as it was read: everything is on the CPU, in page-locked memory where a GPU waits for it."""

    place: Place
    call: Call
    shared: dict[str, torch.Tensor]
    sites: dict[str, dict[str, torch.Tensor]]  # by hook
    sources: dict[object, dict[object, torch.Tensor]]  # by item

    @classmethod
    def of(cls, items: list[Item], tokens: h5py.File, clean: h5py.File, start: int, place: Place) -> "_Read":
        inside = slice(place.first - start, place.last - start)
        call = items[0].call

        def ready(found: dict[object, torch.Tensor]) -> dict[object, torch.Tensor]:
            return {key: rows.pin_memory() for key, rows in found.items()} if call.device.startswith("cuda") else found

        shared = {name: _rows(tokens[name], slice(place.first, place.last)) for name in ("token", "special")}
        shared["final"] = _rows(clean["final"], inside)
        sites = {}
        for item in items:
            if item.hook.name not in sites:
                file = item.sources.files["activations"]
                wanted = [name for name in ("activation", "stream") if name in file]
                sites[item.hook.name] = ready({name: _rows(file[name], inside) for name in wanted})
        sources = {item.call.output: ready(item.fetch(place.first, place.last)) for item in items}
        return cls(place, call, ready(shared), sites, sources)

    def on_device(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(self.call.device, non_blocking=True)

    def batch(self) -> engine.Batch:
        """Of one position, special tokens are replaced too, and left out of the table."""
        settings = self.call.settings
        token, special, final = (self.on_device(self.shared[name]) for name in ("token", "special", "final"))
        everywhere = settings["patch_special"] or "positions" in settings
        kept = torch.zeros_like(special) if everywhere else special
        return engine.Batch(self.place.first, self.place.last - self.place.first, token.long(), kept, final)

    def site(self, hook: Hook) -> engine.Site:
        arrays = {kind: self.on_device(rows) for kind, rows in self.sites[hook.name].items()}
        return engine.Site(hook, arrays["activation"], arrays.get("stream"))

    def patches(self, runs: dict[Key, tuple[Item, Run]]) -> Iterator[tuple[engine.Site, Acts]]:
        """What each run writes and where, made when it is wanted."""
        sites: dict[Hook, engine.Site] = {}
        for item, run in runs.values():
            if item.hook not in sites:
                sites[item.hook] = self.site(item.hook)
            site = sites[item.hook]
            yield site, item.sources.x_new(run, site.x, self.sources[item.call.output])

    def at_position(self, item: Item, x: Acts, number: int) -> Iterator[Acts]:
        """What each run writes for the activation x `seq 1 d` at the experiment's position of that number."""
        given = self.sources[item.call.output]
        here = {key: rows[:, number : number + 1] if rows.ndim == 3 else rows for key, rows in given.items()}
        return (item.sources.x_new(run, x, here) for run in item.runs)


def _rows(dataset: h5py.Dataset, place: slice) -> torch.Tensor:
    return batches.filled(torch.from_numpy(dataset[place]))


def main() -> None:
    with torch.inference_mode():
        run_batch("effects", work)


if __name__ == "__main__":
    main()
