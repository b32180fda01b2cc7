"""Per-token tables -> what the metrics of every SAE are, and the frontiers of families of SAEs. Needs no torch.

The formulas are in `normalised`, `compute`, `frontier` and `families`; here the tables of an SAE meet the ablations at
its hook, the text alone, and the SAEs of its family.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl

from pipeline import families, frontier, normalised, store
from pipeline.compute import Calibration, compute_rows
from pipeline.fits import Scatter
from pipeline.frontier import Replicates
from pipeline.grouping import Table
from pipeline.hooks import parse_hook
from pipeline.labels import COMPONENTS, PAIR, parsed
from pipeline.normalised import Pair, Sums, Verdicts
from pipeline.statistics import Bootstrap, divided, sequence_sums

# What predicts a text without a model.
TEXT = ("uniform", "unigram", "bigram")
Boot = Callable[[pl.DataFrame], Bootstrap]
COLUMNS = ("intervention", "draw", "sequence", "position", "special", "kl", "ce", "ce_clean")
# (model, corpus) -> what predicts its text without a model.
Texts = Mapping[tuple[str, str], dict[str, Pair]]
STUDY = ("model", "corpus", "experiment")
# The order of nats lost by another name.
ALIKE = ("bits_lost", "loss_added", "effective_compute", *(f"loss_recovered[{name}" for name in TEXT))


def text_losses(path: Path, smoothing: float | None) -> dict[str, Pair]:
    """What predicts the text without a model: `uniform`, `unigram`, `bigram`, each (total, count) ` sequence`, nats; no
    bigrams without their smoothing."""
    with store.arrays(path, {"token": "seq pos", "special": "seq pos", "unigram": "v"}) as file:
        token, special, size = file["token"][:], file["special"][:], file["unigram"].shape[0]
    losses = {
        "uniform": normalised.uniform_cross_entropy(special, size),
        "unigram": normalised.unigram_cross_entropy(token, special),
    }
    return losses | ({"bigram": normalised.bigram_cross_entropy(token, special, smoothing)} if smoothing else {})


def sums(tables: Sequence[Table]) -> dict[str, Sums]:
    """Intervention -> its sums over the ordinary tokens of each sequence; one intervention is in memory at a time."""
    found: dict[str, Sums] = {}
    for table in tables:
        for name in table.interventions():
            part = table.read(*COLUMNS, intervention=name)
            found |= normalised.token_sums(part, part["sequence"].n_unique())
    return found


def _at_the_hook(table: Table, ablations: Sequence[Table]) -> list[Table]:
    """The ablations of the same experiment at the hook that an SAE writes at."""
    same = ("model", "corpus", "experiment", "hook")
    return [each for each in ablations if all(each.labels[name] == table.labels[name] for name in same)]


def metric_rows(
    effects: Sequence[Table],
    ablations: Sequence[Table],
    texts: Texts,
    calibrations: Sequence[Calibration],
    boot: Boot,
) -> pl.DataFrame:
    """A row per SAE, intervention (the ablations at its hook among them), metric and baseline, as `normalised_rows`;
    the effective compute of PAIR."""
    parts = []
    for table in effects:
        found = sums([table, *_at_the_hook(table, ablations)])
        resample = boot(table.read("intervention", "sequence", intervention="identity"))
        text = texts[table.labels["model"], table.labels["corpus"]]
        pair = {name: found[name] for name in PAIR if name in found}
        rows = [normalised.normalised_rows(found, text, resample), compute_rows(pair, calibrations, resample)]
        parts.append(table.labelled(pl.concat(rows)))
    return pl.concat(parts, how="vertical_relaxed")


def verdicts(metrics: pl.DataFrame) -> Verdicts:
    """`normalised.verdicts` of every model, corpus and experiment, below each other. Of metrics that can only order
    SAEs alike, because all SAEs of a model share the clean loss and the text, one stands for all among the flips."""
    of_saes = metrics.filter(pl.col("intervention") == "sae")
    found = [
        [_labelled(part, dict(zip(STUDY, place, strict=True))) for part in normalised.verdicts(rows)]
        for place, rows in of_saes.partition_by(STUDY, as_dict=True, maintain_order=True).items()
    ]
    ranks, agreements, flips = (pl.concat(parts, how="vertical_relaxed") for parts in zip(*found, strict=True))
    pairs = pl.concat_str(pl.lit(" "), "metric_a", pl.lit(" "), "metric_b")
    alike = pairs.str.contains_any([f" {name}" for name in ALIKE])
    return Verdicts(ranks, agreements, flips.filter(~alike))


def _labelled(rows: pl.DataFrame, labels: Mapping[str, object]) -> pl.DataFrame:
    return rows.select(*(pl.lit(value).alias(name) for name, value in labels.items()), pl.all())


@dataclass(frozen=True)
class Families:
    """Families of SAEs in one (model, corpus, experiment): the `table` that `frontier` takes, and its resamples.

    Curves go through the `points` "pareto" or "all"; at the L0 `matched` families are compared."""

    labels: dict[str, str | bool]
    table: pl.DataFrame
    resampling: Replicates
    points: str
    matched: tuple[float, ...]

    def labelled(self, rows: pl.DataFrame) -> pl.DataFrame:
        return _labelled(rows, self.labels)


def families_of(
    effects: Sequence[Table],
    ablations: Sequence[Table],
    texts: Texts,
    asked: Mapping,
    boot: Boot,
) -> list[Families]:
    """The SAEs of all families, by where they were run. `asked` is the job's part of the configuration: `families`
    (name -> SAEs), `widths` (SAE -> d), `baseline`, `relative`, `points`, `matched`."""
    family = {sae: name for name, members in asked["families"].items() for sae in members}
    places: dict[tuple, list[Table]] = {}
    for table in effects:
        if table.labels["sae"] in family:
            places.setdefault(tuple(table.labels[name] for name in STUDY), []).append(table)
    found = []
    for place, tables in places.items():
        rows, columns = [], []
        tables.sort(key=lambda table: list(family).index(table.labels["sae"]))
        for table in tables:
            own = table.read(*COLUMNS, "l0", intervention="sae")
            resample = boot(own)
            values = _values(
                own, [table, *_at_the_hook(table, ablations)], texts[place[:2]], asked["baseline"], resample
            )
            sae = table.labels["sae"]
            labels = {name: table.labels[name] for name in ("hook", "layer", "sae")}
            rows.append(labels | {"family": family[sae], "d": asked["widths"][sae]} | _with_ends(values, resample))
            columns.append(values)
        replicates = {name: np.stack([values[name] for values in columns], axis=1) for name in frontier.RESAMPLED}
        labels = dict(zip(STUDY, place, strict=True)) | {name: asked[name] for name in ("baseline", "relative")}
        resampling = Replicates(replicates, resample.confidence)
        table = pl.DataFrame(rows).with_columns(pl.col(pl.Null).cast(pl.Float64))
        found.append(Families(labels, table, resampling, asked["points"], tuple(asked["matched"])))
    return found


def _values(
    own: pl.DataFrame, tables: Sequence[Table], text: Mapping[str, Pair], baseline: str, boot: Bootstrap
) -> dict[str, np.ndarray]:
    """Replicates of one SAE: what `frontier` resamples, and what follows from it."""
    sae = normalised.token_sums(own, boot.sequences)["sae"]
    base = text[baseline] if baseline in text else _baseline(tables, baseline, boot.sequences).ce
    ordinary = own.filter(~pl.col("special")).with_columns(cell=pl.lit(0))
    total, count = sequence_sums(ordinary, "l0", (boot.sequences, 1))
    values = {"l0": boot.replicates(total[:, 0], count[:, 0])}
    for name, pair in (("ce", sae.ce), ("ce_clean", sae.ce_clean), ("ce_base", base), ("kl", sae.kl)):
        values[name] = boot.replicates(*pair)
    return values


def _baseline(tables: Sequence[Table], name: str, sequences: int) -> Sums:
    for table in tables:
        if name in table.interventions():
            return normalised.token_sums(table.read(*COLUMNS, intervention=name), sequences)[name]
    raise AssertionError(f"the plan gave no '{name}' at {tables[0].labels}")


def _with_ends(values: Mapping[str, np.ndarray], boot: Bootstrap) -> dict[str, float | None]:
    """The estimates with their intervals, and those of nats lost and of the performance hit."""
    lost = values["ce"] - values["ce_clean"]
    hit = divided(lost, values["ce_base"] - values["ce_clean"])
    row: dict[str, float | None] = {}
    for name, replicates in (*values.items(), ("nats_lost", lost), ("hit", hit)):
        row |= boot.interval(replicates).columns(name)
    return row


def frontier_points(found: Sequence[Families]) -> pl.DataFrame:
    """A row per SAE: its L0, losses and performance hit with intervals, and whether its family has a better one."""
    parts = []
    for each in found:
        axes = frontier.axes(each.table, each.resampling, each.labels["relative"])
        columns = {"x": axes.x[0], "pareto": axes.pareto["nats_lost"], "pareto_kl": axes.pareto["kl"]}
        new = [pl.Series(*column, nan_to_null=True) for column in columns.items()]
        parts.append(each.labelled(each.table.with_columns(new)))
    return pl.concat(parts, how="vertical_relaxed")


def frontier_fits(found: Sequence[Families]) -> pl.DataFrame:
    """The curves of every family, as `frontier.fit`, in both kinds of intervals (column `intervals`)."""
    parts = []
    for each in found:
        for kind, resampling in _both(each):
            rows = frontier.fit(each.table, resampling, each.points, each.labels["relative"])
            parts.append(each.labelled(rows.with_columns(intervals=pl.lit(kind))))
    return pl.concat(parts, how="vertical_relaxed")


def frontier_factors(found: Sequence[Families]) -> pl.DataFrame:
    """How every two families differ, as `families.compare`; no row where there is only one."""
    labels = dict.fromkeys((*STUDY, "baseline"), pl.String) | {"relative": pl.Boolean}
    parts = [pl.DataFrame(schema=labels | families.SCHEMA | {"intervals": pl.String})]
    for each in found:
        for first, second in combinations(each.table["family"].unique(maintain_order=True), 2):
            for kind, resampling in _both(each):
                relative = each.labels["relative"]
                rows = families.compare(each.table, first, second, resampling, each.points, relative, each.matched)
                parts.append(each.labelled(rows.with_columns(intervals=pl.lit(kind))))
    return pl.concat(parts, how="diagonal_relaxed")


def _both(each: Families) -> Iterator[tuple[str, Replicates | Scatter]]:
    """What intervals may say: how sure the numbers of these SAEs are, and how other SAEs of the family would fall."""
    samples = len(each.resampling.values["ce"]) - 1
    yield "sequences", each.resampling
    yield "scatter", Scatter(samples, each.resampling.confidence)


def component(hook: str) -> str:
    """`blocks.3.attn.hook_z` -> `z`: as the atlas calls the site."""
    site = parse_hook(hook).site
    return next(name for name, known in COMPONENTS.items() if known == site)


def of_a_head(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows with the head that an intervention is about as a column of its own, null where it is about none."""
    found = [parsed(label) for label in rows["intervention"]]
    names = [name if head is None else name.removesuffix("_head") for name, head in found]
    heads = [None if head is None else int(head) for _, head in found]
    return rows.with_columns(pl.Series("intervention", names, pl.String), pl.Series("head", heads, pl.Int64))
