"""Stage `extremes`: the tokens at which an SAE changes the prediction most and least, and those that a study chose.

Which token, in what context, and all that is stored about it. No model, no torch; `top_tokens` adds the predictions.
"""

import json
from pathlib import Path

import h5py
import numpy as np
import polars as pl

from pipeline import hub, store
from pipeline.stage import Call, log, run_batch
from pipeline.texts import Texts

# The SAE and what it is compared with.
PAIR = ("sae", "eps_random")
PLACE = ["sequence", "position"]
ATTRIBUTES = ("experiment", "sae", "model", "corpus", "hook")
KINDS = ("worst", "best", "chosen")
# Tokens of context that are shown before a token.
CONTEXT = 24
# Per token, whatever is written there.
VALUES = ["token", "next_token", "special", "ce_clean", "entropy_clean", "eps", "norm", "l0", "cos"]
AXES = {"token": "seq pos", "unigram": "v"}
COLUMNS = ["kind", "rank", *PLACE, "token", "text", "context", "next_token", "next_text", "special", "kl_sae"]
COLUMNS += ["kl_eps_random", "ce_sae", "ce_eps_random", *VALUES[3:], "unigram_count", "rarity"]
UNITS = dict.fromkeys([name for name in COLUMNS if name[:3] in ("kl_", "ce_", "ent") or name == "rarity"], "nats")
UNITS |= {"eps": "activation", "norm": "activation", "l0": "features", "unigram_count": "tokens"}


def work(calls: list[Call]) -> None:
    for call in calls:
        make(call)


def make(call: Call) -> None:
    """The tokens of one table of effects."""
    table, settings = pair(call.inputs["effects"]), call.settings
    with store.arrays(call.input("tokens"), AXES) as file:
        kl = substituted(table, file["token"].shape[1])
        tokens = select(kl, settings["count"], settings["chosen"])
        rows = described(with_values(tokens, table), file, Texts.load(hub.tokenizer(settings)))
    attributes = attributes_of(call.inputs["effects"])
    store.write_table(call.output, [rows.to_arrow()], call.fingerprint, UNITS, **attributes)
    worst = rows.filter(pl.col("kind") == "worst")["kl_sae"].max()
    log.info("%s: %d tokens, the largest KL %.4g nats", call.name, len(rows), np.nan if worst is None else worst)


def pair(paths: list[Path]) -> pl.LazyFrame:
    """The rows of `sae` and `eps_random` in the shards of one table of effects, lazily."""
    table = pl.scan_parquet(paths).with_columns(pl.col("intervention").cast(pl.String))
    return table.filter(pl.col("intervention").is_in(PAIR))


def attributes_of(paths: list[Path]) -> dict[str, str]:
    """What the shards are of. ValueError where they are not all of the same."""
    found = {json.dumps({name: store.table_attributes(path).get(name) for name in ATTRIBUTES}) for path in paths}
    if len(found) != 1:
        raise ValueError(f"The tables of effects are of {len(found)} things, expected shards of one: {sorted(found)}.")
    return json.loads(found.pop())


def substituted(table: pl.LazyFrame, length: int) -> pl.DataFrame:
    """Where each row of `sae` is, its `kl`, and whether it may be selected. ValueError where it has not one row for
    every token of its sequences."""
    rows = table.filter(pl.col("intervention") == "sae").select(*PLACE, "next_token", "special", "kl").collect()
    expected = rows["sequence"].n_unique() * length
    if not len(rows) or len(rows) != expected:
        raise ValueError(
            f"The tables of effects have {len(rows)} rows of 'sae', expected {expected or 'some'}: one for each token "
            "of a sequence. The experiment must name it in the scope `all`; if it does, delete its tables and run "
            "again."
        )
    return rows


def select(kl: pl.DataFrame, count: int, chosen: list) -> pl.DataFrame:
    """`kind`, `rank` (from 1), `sequence`, `position`: the `count` worst and best tokens, and the chosen ones.

    Worst is the largest `kl`, at most one token of a sequence, so that one bad context does not fill the list; best is
    the smallest. Both are ordinary tokens with a next token; ties go to the earlier sequence and position. `chosen`
    holds pairs of sequence and position, which may be any token. ValueError where there is no such token.
    """
    schema = {name: kl.schema[name] for name in PLACE}
    wanted = pl.DataFrame(chosen, schema=schema, orient="row")
    missing = wanted.join(kl, on=PLACE, how="anti")
    if len(missing):
        raise ValueError(
            f"`chosen` names the sequence and position {list(missing.row(0))}, but the corpus has sequences 0 to "
            f"{kl['sequence'].max()} with positions 0 to {kl['position'].max()}. Correct `chosen`."
        )
    ordinary = kl.filter(~pl.col("special"), pl.col("next_token").is_not_null())
    worst = ordinary.sort("kl", *PLACE, descending=[True, False, False]).unique(
        "sequence", keep="first", maintain_order=True
    )
    parts = zip(KINDS, (worst.head(count), ordinary.sort("kl", *PLACE).head(count), wanted), strict=True)
    rank = pl.int_range(1, pl.len() + 1).alias("rank")
    return pl.concat([part.select(pl.lit(kind).alias("kind"), rank, *PLACE) for kind, part in parts])


def with_values(tokens: pl.DataFrame, table: pl.LazyFrame) -> pl.DataFrame:
    """The selected tokens with what is stored of them, in the same order; other sequences are not read."""
    sequences = tokens["sequence"].unique().to_list()
    rows = table.filter(pl.col("sequence").is_in(sequences)).select("intervention", *PLACE, *VALUES, "kl", "ce")
    parts = rows.collect().partition_by("intervention", as_dict=True)
    for name in PAIR:
        part = parts.get((name,), pl.DataFrame(schema=rows.collect_schema()))
        named = {"kl": f"kl_{name}", "ce": f"ce_{name}"}
        shared = VALUES if name == "sae" else []
        part = part.rename(named).select(*PLACE, *shared, *named.values())
        tokens = tokens.join(part, on=PLACE, how="left", maintain_order="left")
    if tokens["kl_eps_random"].null_count():
        raise ValueError(
            "The tables of effects have no rows of 'eps_random' for some tokens. The experiment must name it beside "
            "'sae'; if it does, delete its tables and run again."
        )
    return tokens


def described(tokens: pl.DataFrame, file: h5py.File, texts: Texts) -> pl.DataFrame:
    """The rows with texts, unigram counts and rarity, in the order of COLUMNS."""
    unigram = file["unigram"][:]
    token = tokens["token"].to_numpy()
    contexts = [
        texts.text(file["token"][sequence, max(0, position - CONTEXT) : position].tolist())
        for sequence, position in tokens.select(PLACE).rows()
    ]
    following = [None if i is None else texts.text([i]) for i in tokens["next_token"]]
    return tokens.with_columns(
        pl.Series("text", [texts.text([i]) for i in token.tolist()], pl.String),
        pl.Series("context", contexts, pl.String),
        pl.Series("next_text", following, pl.String),
        pl.Series("unigram_count", unigram[token]),
        pl.Series("rarity", rarity(unigram)[token]).fill_nan(None),
    ).select(COLUMNS)


def rarity(unigram: np.ndarray) -> np.ndarray:
    """-log of each token's share of the corpus's ordinary tokens, nats; NaN for tokens that are not among them."""
    counts = unigram.astype(np.float64)
    return np.where(counts > 0, np.log(max(counts.sum(), 1.0)) - np.log(np.maximum(counts, 1.0)), np.nan)


def main() -> None:
    run_batch("extremes", work)


if __name__ == "__main__":
    main()
