"""Texts of files and datasets, and token ids -> packed contexts. Documents are joined by BOS, cut into rows, and never
padded."""

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import hub
from pipeline.registry import Registry, unknown

READERS = Registry("kind of corpus file")
# How much of a text is looked at before a run: bytes of a .txt, lines of a .jsonl.
BYTES, LINES = 2**20, 1000


@READERS.register
def txt(path: Path, column: str) -> Iterator[str]:
    """The whole file as one document."""
    with _utf8(path):
        yield path.read_text(encoding="utf-8")


@contextmanager
def _utf8(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x} ({error.reason})"
        raise ValueError(f"{path} is no text in UTF-8: found {found}. Save it as UTF-8.") from None


@READERS.register
def jsonl(path: Path, column: str) -> Iterator[str]:
    """One document a line, in the field `column` of a JSON object; nulls are left out."""
    with _utf8(path), open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield from _text(_row(line, f"{path}, line {number}"), column, f"{path}, line {number}")


def _row(line: str, place: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place}: not JSON: {error.msg}, column {error.colno}. Expected an object on every line."
        ) from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: found a JSON {type(row).__name__}, expected an object with the column of texts.")
    return row


def _text(row: dict, column: str, place: str) -> list[str]:
    """The text of a row in a list, or an empty list where it is null."""
    if column not in row:
        raise ValueError(f"{place}: {unknown('column', column, row)} Say which holds the text with `column`.")
    if not isinstance(row[column], str | None):
        raise ValueError(f"{place}: '{column}' holds {row[column]!r}, expected text. Name another with `column`.")
    return [] if row[column] is None else [row[column]]


@READERS.register
def parquet(path: Path, column: str) -> Iterator[str]:
    """One document a row, in the column `column`; nulls are left out."""
    for batch in _with_texts(path, column).iter_batches(columns=[column]):
        yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _with_texts(path: Path, column: str) -> pq.ParquetFile:
    """A Parquet file whose column holds texts, of which nothing is read yet."""
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} can't be read as Parquet, or is cut short: {error} Save or copy it again.") from None
    if column not in file.schema_arrow.names:
        known = unknown("column", column, file.schema_arrow.names)
        raise ValueError(f"{path}: {known} Say which holds the text with `column`.")
    kind = file.schema_arrow.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{path}: the column '{column}' holds {kind}, expected text. Name another with `column`.")
    if file.metadata.num_rows == 0:
        raise ValueError(f"{path} has no rows. It must hold at least one context of text.")
    return file


def documents(path: Path, column: str) -> Iterator[str]:
    """The texts of a corpus file, in order; the ending of its name says how it is read."""
    return READERS[path.suffix.removeprefix(".")](path, column)


def check(path: Path, column: str) -> None:
    """That a corpus file begins as its name says; the rest is read by the run. ValueError says what was found."""
    if path.suffix == ".txt":
        with _utf8(path), open(path, "rb") as file:
            begin = file.read(BYTES)
            codecs.getincrementaldecoder("utf-8")().decode(begin)  # it may end within a letter
        if b"\0" in begin:
            raise ValueError(f"{path} is no text: it holds NUL bytes. Expected UTF-8, not UTF-16 or a binary file.")
    elif path.suffix == ".jsonl":
        for _ in islice(jsonl(path, column), LINES):
            pass
    elif path.suffix == ".parquet":
        _with_texts(path, column).close()
    else:
        _token_ids(path)


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
    """Token ids `seq pos` of an .npy file, which stays on the disk. ValueError for another shape, type or length, or
    ids outside the vocabulary."""
    tokens = _token_ids(path)
    if tokens.shape[1] != context:
        raise ValueError(
            f"{path} holds contexts of {tokens.shape[1]} tokens, but `context` is {context}. "
            f"Set it to {tokens.shape[1]}."
        )
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < d_vocab:
        raise ValueError(
            f"{path} holds ids from {tokens.min()} to {tokens.max()}, but the model's vocabulary has {d_vocab} tokens. "
            "Make them with the model's own tokenizer."
        )
    return tokens


def _token_ids(path: Path) -> np.ndarray:
    """The array of an .npy file as it is on the disk, of whole numbers on two axes."""
    with open(path, "rb") as file:
        if file.read(4) not in (b"\x93NUM", b"PK\x03\x04"):
            raise ValueError(f"{path} is no .npy file. Save the ids with numpy.save.")
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} can't be read as .npy: {error}. Save the ids again with numpy.save.") from None
    if not isinstance(tokens, np.ndarray):
        raise ValueError(f"{path} is an .npz of several arrays, expected one. Save the ids with numpy.save.")
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"{path} holds {tokens.dtype} of shape {tokens.shape}, expected whole numbers of shape `[context, "
            "position]`. Save packed token ids."
        )
    return tokens


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
