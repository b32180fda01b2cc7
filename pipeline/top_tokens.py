"""Stage `top_tokens`: the predictions at the tokens of `extremes`, clean and patched: the top of them, and what moved.

Log-probabilities are stored nowhere, so each token's micro-batch is run again with what was written there before. That
the KL comes out as it was stored shows that it is the same run.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby

import h5py
import polars as pl
import torch
from jaxtyping import Float64
from torch import Tensor

from pipeline import batches, decoder, hub, interventions, models, store
from pipeline.batches import BATCH
from pipeline.decoder import Decoder
from pipeline.hooks import Hook
from pipeline.stage import Call, log, run_batch
from pipeline.texts import Texts
from pipeline.types import Acts, Residual

AXES = {
    "tokens": {"special": "seq pos"},
    "clean": {"final": "seq pos d_model"},
    "activations": {"activation": "seq pos d"},
    "reconstructions": {"x_hat": "seq pos d"},
}
ATTRIBUTES = ("experiment", "sae", "model", "corpus", "hook")
# Tokens from which the SAE takes most, for each example.
SHIFTED = 5
# How far a KL may be from the stored one: rounding on another device stays below, another seed does not.
RELATIVE, ABSOLUTE = 1e-3, 1e-6

LogProbabilities = Float64[Tensor, " v"]


@dataclass(frozen=True)
class Item:
    """One SAE of a job: its open files by role, in shards, and the model that they were made with."""

    call: Call
    model: Decoder
    hook: Hook
    files: dict[str, list[h5py.File]]

    @property
    def labels(self) -> list[str]:
        return self.call.settings["interventions"]

    def shard(self, role: str, sequence: int) -> h5py.File:
        """The file of a role that holds a sequence. ValueError where none does."""
        for file in self.files[role]:
            if 0 <= sequence - int(file.attrs["first"]) < len(file[next(iter(AXES[role]))]):
                return file
        raise ValueError(f"No file of the stage '{role}' holds sequence {sequence}. Delete them and run again.")

    def rows(self, role: str, name: str, first: int) -> Tensor:
        """The rows of the micro-batch that begins with a sequence, filled up."""
        file = self.shard(role, first)
        start = first - int(file.attrs["first"])
        return batches.filled(torch.from_numpy(file[name][start : start + BATCH])).to(self.call.device)


def work(calls: list[Call]) -> None:
    """Make the tables of all items; the model is read once."""
    call = calls[0]
    torch.set_num_threads(call.threads)
    weights = models.load(call.input("weights"), call.device)
    model = decoder.in_precision(weights, call.settings["precision"], call.device)
    for each in calls:
        _check_labels(each)
        with ExitStack() as stack:
            files = {
                role: [stack.enter_context(store.arrays(path, axes)) for path in each.inputs[role]]
                for role, axes in AXES.items()
            }
            make(Item(each, model, decoder.hook_of(each.settings["hook"], weights), files))


def _check_labels(call: Call) -> None:
    """ValueError for interventions that can't be run again here, before anything is computed."""
    labels, known = call.settings["interventions"], {"x", "x_hat", "noise"}
    unknown = [label for label in labels if set(interventions.arguments(label)) - known]
    if unknown or "sae" not in labels:
        raise ValueError(
            f"{call.name}: `interventions` is {', '.join(labels)}, expected 'sae', by which the tokens were selected, "
            "and others that are made from x, its reconstruction and noise alone."
        )


def make(item: Item) -> None:
    """The table of one SAE, sorted as `extremes` is."""
    call, path = item.call, item.call.input("extremes")
    tokens = pl.read_parquet(path).with_row_index("number")
    by_batch = sorted(tokens.rows(named=True), key=lambda row: (row["sequence"] // BATCH, row["number"]))
    texts, found = Texts.load(hub.tokenizer(call.settings)), {}
    for number, rows in groupby(by_batch, key=lambda row: row["sequence"] // BATCH):
        for token, log_p, log_q in predictions(item, BATCH * number, list(rows)):
            _check(item, token, log_p, log_q)
            found[token["number"]] = table(token, log_p, log_q, call.settings["top"], texts)
    attributes = store.table_attributes(path)
    units = {f"log_p_{name}": "nats" for name in ("clean", *item.labels)} | {"contribution": "nats"}
    made = pl.concat([found[number] for number in sorted(found)]) if found else _nothing(item.labels)
    store.write_table(
        call.output, [made.to_arrow()], call.fingerprint, units, **{name: attributes.get(name) for name in ATTRIBUTES}
    )
    log.info("%s: predictions at %d tokens", call.name, len(found))


def predictions(
    item: Item, first: int, tokens: list[dict]
) -> Iterator[tuple[dict, LogProbabilities, dict[str, LogProbabilities]]]:
    """Each of the tokens of a micro-batch, with log P and, by intervention, log Q of its next token."""
    clean = item.rows("clean", "final", first)
    patched = dict(patched_runs(item, first))
    for token in tokens:
        place = token["sequence"] - first, token["position"]
        yield token, *log_probabilities(item.model, clean, patched, place)


def patched_runs(item: Item, first: int) -> Iterator[tuple[str, Residual]]:
    """The final residual stream of a micro-batch under each intervention, every token replaced as in `effects`."""
    settings, file = item.call.settings, item.files["tokens"][0]
    special = torch.from_numpy(file["special"][first : first + BATCH])
    kept = batches.filled(special).to(item.call.device) & (not settings["patch_special"])
    x, x_hat = item.rows("activations", "activation", first), item.rows("reconstructions", "x_hat", first)
    has_stream = "stream" in item.shard("activations", first)
    stream = item.rows("activations", "stream", first) if has_stream else None
    sequences = range(first, first + len(special))
    for label in item.labels:
        sources = {
            "x": lambda: x,
            "x_hat": lambda: x_hat.to(x.dtype),
            "noise": lambda label=label: noise(settings["seed"], label, sequences, x),
        }
        x_new: Acts = torch.where(kept[..., None], x, interventions.x_new(label, sources))
        yield label, item.model.resume(item.hook, stream, x_new)


def noise(seed: int, label: str, sequences: range, x: Acts) -> Acts:
    """The noise that `effects` gave an intervention without a strength, at the first draw, where x is."""
    rows = [interventions.standard_normal(seed, label, sequence, 0, tuple(x.shape[1:])) for sequence in sequences]
    return batches.filled(torch.stack(rows)).to(x)


def log_probabilities(
    model: Decoder, clean: Residual, patched: dict[str, Residual], place: tuple[int, int]
) -> tuple[LogProbabilities, dict[str, LogProbabilities]]:
    """log P and, by intervention, log Q at one token, of the final streams.

    As in the engine, the patched logits are the clean ones plus the product of the difference: with two separate
    products in float32, a KL near 1e-6 would be the noise of their rounding.
    """
    unembedding = model.unembedding()

    def hidden(final: Residual) -> Tensor:
        return unembedding.hidden(final[place[0], place[1]][None, None])

    at = hidden(clean)
    products = unembedding.products(at)
    logits = unembedding.logits(products).double()
    log_q = {}
    for label, final in patched.items():
        change = unembedding.difference(hidden(final) - at, products)
        log_q[label] = (logits + change.double()).log_softmax(-1)[0].cpu()
    return logits.log_softmax(-1)[0].cpu(), log_q


def kl(log_p: LogProbabilities, log_q: LogProbabilities) -> float:
    """KL(P ‖ Q) in nats."""
    return float((log_p.exp() * (log_p - log_q)).sum())


def _check(item: Item, token: dict, log_p: LogProbabilities, log_q: dict[str, LogProbabilities]) -> None:
    """ValueError where a KL is not the stored one: then these are not the runs that were measured."""
    for label in item.labels:
        found, stored = kl(log_p, log_q[label]), token.get(f"kl_{label}")
        if stored is None:
            raise ValueError(
                f"{item.call.input('extremes')} has no KL of '{label}', so that a run of it can't be told to be the "
                "same. Take it out of `interventions`."
            )
        if abs(found - stored) > max(RELATIVE * stored, ABSOLUTE):
            raise ValueError(
                f"{item.call.name}: the KL of '{label}' at sequence {token['sequence']}, position "
                f"{token['position']} is {found:.6g} nats, but {stored:.6g} was measured. Seed, precision, `hook` and "
                "`patch_special` must be those of the experiment, and its files those that it was made from. Delete "
                "them and run again."
            )


def table(
    token: dict, log_p: LogProbabilities, log_q: dict[str, LogProbabilities], top: int, texts: Texts
) -> pl.DataFrame:
    """The rows of one token: the `top` candidates for the next token by clean probability, and the SHIFTED ones with
    the largest share p (log p - log q) of the KL of `sae`."""
    contribution = log_p.exp() * (log_p - log_q["sae"])
    lists = {"top": log_p.topk(min(top, len(log_p))), "shift": contribution.topk(min(SHIFTED, len(log_p)))}
    parts = []
    for name, (_, ids) in lists.items():
        values = {"log_p_clean": log_p, **{f"log_p_{label}": value for label, value in log_q.items()}}
        columns = {column: value[ids].numpy() for column, value in (values | {"contribution": contribution}).items()}
        labels = {column: token[column] for column in ("kind", "rank", "sequence", "position")}
        candidates = {"candidate": ids.tolist(), "candidate_text": [texts.text([i]) for i in ids.tolist()]}
        place = {"list": name, "order": list(range(1, len(ids) + 1))}
        parts.append(pl.DataFrame(labels | place | candidates | columns, schema_overrides=SCHEMA))
    return pl.concat(parts)


SCHEMA = {"kind": pl.String, "rank": pl.Int64, "sequence": pl.Int32, "position": pl.Int32}
SCHEMA |= {"list": pl.String, "order": pl.Int32, "candidate": pl.Int32, "candidate_text": pl.String}


def _nothing(labels: list[str]) -> pl.DataFrame:
    """The table of no token."""
    values = [*(f"log_p_{name}" for name in ("clean", *labels)), "contribution"]
    return pl.DataFrame(schema=SCHEMA | dict.fromkeys(values, pl.Float64))


def main() -> None:
    with torch.inference_mode():
        run_batch("top_tokens", work)


if __name__ == "__main__":
    main()
