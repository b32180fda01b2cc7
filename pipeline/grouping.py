"""The files of a stage by what they are about: all shards of the same model, corpus, experiment, hook and SAE together.
Needs no torch."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pipeline import store
from pipeline.hooks import parse_hook

PLACE = ("model", "corpus", "experiment", "hook", "sae")


@dataclass(frozen=True)
class Table:
    """All shards of what one job per shard has written, and what they are about; `sae` is None for ablations."""

    labels: dict[str, str | int | None]
    attributes: dict
    paths: list[Path]

    def read(self, *columns: str, intervention: str | None = None) -> pl.DataFrame:
        """Columns of all shards, with the intervention as text; of one intervention or of all. Sequences are numbered
        among those that are there, because a bootstrap draws from these."""
        table = pl.scan_parquet(self.paths)
        if intervention is not None:
            table = table.filter(pl.col("intervention") == intervention)
        table = table.select(columns).with_columns(pl.col("intervention").cast(pl.String))
        return table.with_columns(sequence=pl.col("sequence").rank("dense").cast(pl.Int64) - 1).collect()

    def interventions(self) -> list[str]:
        """The labels that it has rows of."""
        column = pl.scan_parquet(self.paths[0]).select(pl.col("intervention").unique(maintain_order=True))
        return column.collect()["intervention"].cast(pl.String).to_list()

    def labelled(self, rows: pl.DataFrame) -> pl.DataFrame:
        return rows.select(*(pl.lit(value).alias(name) for name, value in self.labels.items()), pl.all())


Tables = list[Table]


def grouped(paths: Iterable[Path]) -> Tables:
    """The files of one stage, with all shards of the same place together."""
    places = defaultdict(list)
    found = {}
    for path in paths:
        about = attributes(path)
        place = tuple(about.get(name) for name in PLACE)
        places[place].append(path)
        found[place] = about
    return [
        Table(dict(zip(PLACE, place, strict=True)) | {"layer": _layer(place)}, found[place], shards)
        for place, shards in places.items()
    ]


def _layer(place: tuple) -> int | None:
    hook = place[PLACE.index("hook")]
    return None if hook is None else parse_hook(hook).layer


def attributes(path: Path) -> dict:
    if path.suffix == ".parquet":
        return store.table_attributes(path)
    with store.arrays(path, {}) as file:
        return {name: value for name, value in file.attrs.items() if isinstance(value, str)}
