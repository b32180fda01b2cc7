"""Texts come out of their files in order, and tokens go into full rows."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hubs import COMMIT, offline, repository
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import corpora
from pipeline.inputs import CORPUS_KINDS

BOS = 0


def packed(documents, context, prepend_bos):
    return corpora.pack(iter(documents), context, BOS, prepend_bos)


def joined(documents):
    stream = []
    for number, document in enumerate(documents):
        stream += [BOS] * (number > 0) + document
    return stream


many = given(st.lists(st.lists(st.integers(1, 99), max_size=12), max_size=6), st.integers(2, 9))


@settings(deadline=None, derandomize=True)
@many
def test_with_prepended_bos_every_row_starts_with_one_and_the_rest_is_the_stream(documents, context):
    rows, stream = packed(documents, context, True), joined(documents)
    assert (rows[:, 0] == BOS).all()
    assert (rows.shape[1], rows.dtype) == (context, np.int32)
    rest = rows[:, 1:].flatten().tolist()
    assert rest == stream[: len(rest)]
    assert len(stream) - len(rest) < context - 1


@settings(deadline=None, derandomize=True)
@many
def test_without_it_the_rows_are_the_stream(documents, context):
    rows, stream = packed(documents, context, False), joined(documents)
    assert (rows.shape[1], rows.dtype) == (context, np.int32)
    assert rows.flatten().tolist() == stream[: rows.size]
    assert len(stream) - rows.size < context


def test_two_documents_packed_by_hand():
    assert packed([[1, 2, 3], [4, 5, 6]], 3, True).tolist() == [[0, 1, 2], [0, 3, 0], [0, 4, 5]]
    assert packed([[1, 2, 3], [4, 5, 6]], 3, False).tolist() == [[1, 2, 3], [0, 4, 5]]


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("Es war\n\neinmal ein König.\n", encoding="utf-8")
    assert list(corpora.documents(tmp_path / "a.txt", "text")) == ["Es war\n\neinmal ein König.\n"]


def test_a_jsonl_file_has_a_document_a_line_and_blank_lines_are_none(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"story": "one", "n": 1}\n\n{"n": 2, "story": "two\\nlines"}\n')
    assert list(corpora.documents(tmp_path / "a.jsonl", "story")) == ["one", "two\nlines"]


@pytest.mark.parametrize("line", ['{"text": "tw', '["text"]', '"text"', '{"text": 2}'])
def test_a_jsonl_line_that_holds_no_text_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        list(corpora.documents(tmp_path / "a.jsonl", "text"))


def test_a_parquet_file_has_a_document_a_row_and_nulls_are_none(tmp_path):
    table = pa.table({"n": [1, 2, 3, 4], "text": ["one", None, "", "four"]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    assert list(corpora.documents(tmp_path / "a.parquet", "text")) == ["one", "", "four"]


def test_a_text_is_looked_at_up_to_a_letter_that_is_cut(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("zwölf", encoding="utf-8")
    monkeypatch.setattr(corpora, "BYTES", 3)  # within the ö
    corpora.check(tmp_path / "a.txt", "text")


def test_only_the_first_lines_are_looked_at_before_a_run(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * corpora.LINES + "two\n")
    corpora.check(tmp_path / "a.jsonl", "text")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1001: not JSON"):
        list(corpora.documents(tmp_path / "a.jsonl", "text"))


def test_the_kinds_of_file_that_a_configuration_may_name_are_those_that_can_be_read():
    assert sorted(CORPUS_KINDS) == sorted([".npy", *(f".{kind}" for kind in corpora.READERS)])


def test_ready_tokens_are_read_as_they_are(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[0, 49], [3, 4]], np.uint16))
    tokens = corpora.ready_tokens(tmp_path / "a.npy", 2, 50)
    assert (tokens.tolist(), tokens.dtype) == ([[0, 49], [3, 4]], np.uint16)


# Datasets of the hub, through `datasets` on a cache made by hand.

TEXTS = [f"text {number} " * 3 for number in range(9)]
SOURCE = {"dataset": "someone/texts", "commit": COMMIT, "split": "train"}


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Two Parquet files of a split, another split, and a second configuration, described as on the hub."""
    monkeypatch.chdir(tmp_path)
    home = offline(tmp_path / "home", monkeypatch)
    files = {"README.md": README}
    for name, texts in {"train-0": TEXTS[:5], "train-1": TEXTS[5:], "test-0": ["a test"], "other": ["another"]}.items():
        pq.write_table(pa.table({"text": texts, "n": list(range(len(texts)))}), tmp_path / f"{name}.parquet")
        files[f"data/{name}.parquet"] = tmp_path / f"{name}.parquet"
    repository(home, "someone/texts", files, kind="datasets")
    return home


README = """---
configs:
- config_name: default
  default: true
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
- config_name: second
  data_files: [{split: train, path: data/other.parquet}]
---
"""


@pytest.mark.parametrize(
    ("changes", "texts"),
    [({}, TEXTS), ({"split": "test"}, ["a test"]), ({"subset": "second"}, ["another"])],
    ids=["train", "test", "second"],
)
def test_a_dataset_is_read_in_order(dataset, changes, texts):
    assert list(corpora.streamed(SOURCE | changes, "text")) == texts


def test_a_column_that_a_dataset_does_not_have_is_named(dataset):
    with pytest.raises(
        ValueError, match=r"'someone/texts' at 0123\w+, row 0: Unknown column 'texts'\. Did you mean 'text'"
    ):
        list(corpora.streamed(SOURCE, "texts"))


def test_a_column_of_numbers_of_a_dataset_is_refused(dataset):
    with pytest.raises(ValueError, match=r"row 0: 'n' holds 0, expected text"):
        list(corpora.streamed(SOURCE, "n"))


@pytest.mark.parametrize("changes", [{"split": "dev"}, {"subset": "third"}], ids=str)
def test_a_part_that_a_dataset_does_not_have_is_named(dataset, changes):
    with pytest.raises(ValueError, match=r"dev|third"):
        list(corpora.streamed(SOURCE | changes, "text"))


def test_code_of_a_dataset_is_never_run(dataset, tmp_path):
    """A loading script, as datasets had them once."""
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    repository(dataset, "someone/scripted", {"scripted.py": code}, kind="datasets")
    with pytest.raises(ValueError, match="someone/scripted"):
        list(corpora.streamed(SOURCE | {"dataset": "someone/scripted"}, "text"))
    assert not (tmp_path / "ran").exists()


def test_a_dataset_that_is_not_in_the_cache_says_so(dataset):
    with pytest.raises(ValueError, match=r"'someone/gone' at 0123\w+ is not in the cache"):
        list(corpora.streamed(SOURCE | {"dataset": "someone/gone"}, "text"))


@settings(deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(1, 99), max_size=12), max_size=6), st.integers(1, 5), st.integers(2, 9))
def test_enough_of_a_stream_packs_to_the_same_rows(documents, rows, context):
    whole = packed(documents, context, True)[:rows]
    taken = list(corpora.enough(iter(documents), rows * (context - 1)))
    assert packed(taken, context, True)[:rows].tolist() == whole.tolist()
    assert len(joined(taken[:-1])) < rows * (context - 1)
