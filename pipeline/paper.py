"""Stage `paper`: the summary table that a paper prints, a row per SAE, as Parquet, CSV, Markdown and LaTeX.

Derived from the metrics and from the table of SAEs: no model, no torch.
"""

from pathlib import Path

import polars as pl

from pipeline import paper_table, seals, store
from pipeline.stage import Call, log, run


def work(call: Call) -> None:
    metrics, saes = (pl.read_parquet(path) for path in (call.input("metrics"), _saes(call)))
    table = paper_table.paper_table(metrics, saes, call.settings["columns"])
    tokens, confidence = paper_table.tokens_of(table, saes), call.settings["confidence"]
    pages = [
        paper_table.as_csv(table),
        paper_table.as_markdown(table, confidence, tokens),
        paper_table.as_latex(table, confidence, tokens),
    ]
    # The file whose fingerprint is looked at goes last: when it is there, the others are.
    for path, page in zip(call.outputs[1:], pages, strict=True):
        store.write_text(path, page)
    store.write_table(call.output, [table.to_arrow()], call.fingerprint, paper_table.units(call.settings["columns"]))
    log.info("%d SAEs, %d columns", table.height, len(call.settings["columns"]))


def _saes(call: Call) -> Path:
    return seals.verified(call.input("summary").with_name("saes.parquet"))


def main() -> None:
    run("paper", work)


if __name__ == "__main__":
    main()
