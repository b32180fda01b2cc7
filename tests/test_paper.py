"""The stage `paper`: four files of one table, and the one that says that they are there goes last."""

import re
from dataclasses import replace

import polars as pl
import pytest
from fakes import ROOT
from tables import call
from test_paper_table import described, metric, some

from pipeline import paper, paper_table, store

METRICS = some(
    metric("late", "nats_lost", 0.3, 0.02),
    metric("late", "loss_recovered[zero]", 0.9, 0.004),
    metric("early", "nats_lost", -0.0123, 0.0345),
    metric("early", "nats_lost", 7.0, intervention="zero"),
)
SAES = described("early", "late")
COLUMNS = ["l0", "nats_lost", "loss_recovered[zero]", "kl", "d_sae"]
# As the rule names them.
NAMES = ["saes.parquet", "saes.csv", "saes.md", "saes.tex"]


def asked(folder, metrics=METRICS, saes=SAES, columns=COLUMNS, confidence=0.9):
    """A call of the stage. The table of SAEs stands beside that of effects, which is the summary's file in the plan."""
    (folder / "summary").mkdir(exist_ok=True)
    metrics.write_parquet(folder / "metrics.parquet")
    store.write_table(folder / "summary" / "saes.parquet", [saes.to_arrow()], "f00d", {})
    inputs = {"summary": [folder / "summary" / "effects.parquet"], "metrics": [folder / "metrics.parquet"]}
    return call([folder / "paper" / name for name in NAMES], inputs, {}, columns=columns, confidence=confidence)


def made(folder, **changes):
    """The four files, the first one read."""
    one = asked(folder, **changes)
    paper.work(one)
    return pl.read_parquet(one.outputs[0]), *(path.read_text() for path in one.outputs[1:])


def test_the_files_are_those_of_the_table(tmp_path):
    table, csv, markdown, latex = made(tmp_path)
    expected = paper_table.paper_table(METRICS, SAES, COLUMNS)
    assert table.equals(expected)
    assert table.schema == expected.schema
    assert csv == paper_table.as_csv(expected)
    assert markdown == paper_table.as_markdown(expected, 0.9, 1500)
    assert latex == paper_table.as_latex(expected, 0.9, 1500)
    assert sorted(path.name for path in (tmp_path / "paper").iterdir()) == sorted(NAMES)
    assert store.is_current(tmp_path / "paper/saes.parquet", "f00d")


def test_a_small_table_by_hand(tmp_path):
    table, csv, markdown, latex = made(tmp_path, columns=["nats_lost"])
    assert table.select("sae", "nats_lost").rows() == [("late", 0.3), ("early", -0.0123)]
    assert csv.splitlines()[0].endswith(",architecture,nats_lost,nats_lost_low,nats_lost_high")
    assert "Values with 90 % intervals in brackets, over 1,500 tokens." in markdown
    assert "| late | 0.300 [0.280, 0.320] |\n| early | -0.012 [-0.047, 0.022] |" in markdown
    assert r"late & 0.300 [0.280, 0.320] \\" in latex


def test_saes_over_different_numbers_of_tokens_have_none_in_the_caption(tmp_path):
    saes = pl.concat([described("early"), described("late", n_tokens=99)])
    assert "intervals in brackets.\n" in made(tmp_path, saes=saes)[2]


def test_a_study_of_no_sae_has_a_table_of_headings(tmp_path):
    table, csv, markdown, _ = made(tmp_path, metrics=METRICS.clear(), saes=SAES.clear())
    assert table.shape == (0, 7 + 3 * len(COLUMNS))
    assert len(csv.splitlines()) == 1
    assert "| L0 | nats lost |" in markdown


@pytest.mark.parametrize("left", [0, 1, 2, 3])
def test_the_file_that_says_that_all_are_there_is_written_last(tmp_path, monkeypatch, left):
    """Killed after `left` files of text, the stage has no Parquet file; and it has one only when it has all."""
    one, written = asked(tmp_path), []
    write_text, write_table = store.write_text, store.write_table

    def text(path, page):
        if len(written) == left:
            raise KeyboardInterrupt
        write_text(path, page)
        written.append(path)

    def table(path, *arguments, **attributes):
        assert [each.exists() for each in one.outputs] == [False, True, True, True]
        write_table(path, *arguments, **attributes)
        written.append(path)

    monkeypatch.setattr(store, "write_text", text)
    monkeypatch.setattr(store, "write_table", table)
    if left < 3:
        with pytest.raises(KeyboardInterrupt):
            paper.work(one)
        assert not one.output.exists()
    else:
        paper.work(one)
        assert written == [*one.outputs[1:], one.output]


def test_a_file_too_few_is_refused_before_the_parquet_file_is_there(tmp_path):
    one = asked(tmp_path)
    with pytest.raises(ValueError, match="zip"):
        paper.work(replace(one, outputs=one.outputs[:3]))
    assert not one.output.exists()


def test_the_rule_names_the_files_in_the_order_in_which_they_are_written():
    output = (ROOT / "workflow/rules/paper.smk").read_text().split("output:")[1].split("log:")[0]
    assert 'PATTERNS["paper"],' in output
    assert re.findall(r'"results/paper/(.*)"', output) == NAMES[1:]
