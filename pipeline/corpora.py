"""Texts of files and datasets, and token ids -> packed contexts. Documents are joined by BOS, cut into rows, and never
padded."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import hub
from pipeline.registry import Registry, unknown

READERS = Registry("kind of corpus file")


@READERS.register
def txt(path: Path, column: str) -> Iterator[str]:
    """The whole file as one document."""
    yield path.read_text(encoding="utf-8")


@READERS.register
def jsonl(path: Path, column: str) -> Iterator[str]:
    """One document a line, in the field `column` of a JSON object; nulls are left out."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield from _text(_row(line, f"{path}, line {number}"), column, f"{path}, line {number}")


def _row(line: str, place: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON: {error}.") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: found a JSON {type(row).__name__}, expected an object with the column of texts.")
    return row


def _text(row: dict, column: str, place: str) -> list[str]:
    """The text of a row in a list, or an empty list where it is null."""
    if column not in row:
        raise ValueError(f"{place}: " + unknown("column", column, row))
    if not isinstance(row[column], str | None):
        raise ValueError(f"{place}: '{column}' holds {row[column]!r}, expected text.")
    return [] if row[column] is None else [row[column]]


@READERS.register
def parquet(path: Path, column: str) -> Iterator[str]:
    """One document a row, in the column `column`; nulls are left out."""
    file = pq.ParquetFile(path)
    if column not in file.schema_arrow.names:
        raise ValueError(f"{path}: " + unknown("column", column, file.schema_arrow.names))
    kind = file.schema_arrow.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{path}: the column '{column}' holds {kind}, expected text.")
    for batch in file.iter_batches(columns=[column]):
        yield from (text for text in batch.column(0).to_pylist() if text is not None)


def documents(path: Path, column: str) -> Iterator[str]:
    """The texts of a corpus file, in order; the ending of its name says how it is read."""
    return READERS[path.suffix.removeprefix(".")](path, column)


def streamed(source: Mapping, column: str) -> Iterator[str]:
    """The texts of a dataset of the hub, in order, downloaded as they are asked for; without a network, those of the
    cache. `datasets` runs no code of a repository."""
    import datasets
    from huggingface_hub import constants

    what, name = f"Dataset '{source['dataset']}' at {source['commit']}", source["dataset"]
    if constants.HF_HUB_OFFLINE:
        name = str(hub.folder(source["dataset"], source["commit"], ("*",), "dataset"))
    try:
        with hub.explained(what):
            rows = datasets.load_dataset(
                name,
                source.get("subset"),
                split=source["split"],
                streaming=True,
                revision=None if constants.HF_HUB_OFFLINE else source["commit"],
            )
    except RuntimeError as error:  # a loading script, which is code
        raise ValueError(f"{what}: {error} Use a revision without a script, such as refs/convert/parquet.") from None
    for number, row in enumerate(rows):
        yield from _text(row, column, f"{what}, row {number}")


def enough(token_lists: Iterable[list[int]], length: int) -> Iterator[list[int]]:
    """The first documents' ids whose stream, with a BOS between them, has at least this length."""
    total = -1
    for ids in token_lists:
        yield ids
        total += len(ids) + 1
        if total >= length:
            return


def ready_tokens(path: Path, context: int, d_vocab: int) -> np.ndarray:
    """Token ids `seq pos` of an .npy file. ValueError for another shape, type or length, or ids outside the
    vocabulary."""
    tokens = np.load(path, allow_pickle=False)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"{path} holds {tokens.dtype} of shape {tokens.shape}, expected whole numbers of "
            "shape `[context, position]`."
        )
    if tokens.shape[1] != context:
        raise ValueError(
            f"{path} holds contexts of {tokens.shape[1]} tokens, but `context` is {context}. "
            f"Set it to {tokens.shape[1]}."
        )
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < d_vocab:
        raise ValueError(
            f"{path} holds ids from {tokens.min()} to {tokens.max()}, but the model's vocabulary has {d_vocab} tokens."
        )
    return tokens.astype(np.int32)


def pack(token_lists: Iterator[list[int]], context: int, bos: int, prepend_bos: bool) -> np.ndarray:
    """Documents' ids -> `seq pos` int32. Documents are joined by one BOS; an unfinished last row is dropped.

    With `prepend_bos` every row starts with a BOS of its own, followed by context - 1 tokens of the stream.
    """
    pieces = []
    for ids in token_lists:
        pieces += [np.asarray(ids, dtype=np.int32), np.array([bos], dtype=np.int32)]
    stream = np.concatenate(pieces[:-1]) if pieces else np.zeros(0, np.int32)
    width = context - prepend_bos
    rows = stream[: len(stream) // width * width].reshape(-1, width)
    return np.concatenate([np.full((len(rows), 1), bos, np.int32), rows], axis=1) if prepend_bos else rows
