"""The headline says in words what the ratios say, and the page is escaped, self-contained and traceable."""

import base64
import json
import re

import polars as pl
import pytest
import study_tables
from tables import HOOK, around, call, frame, row
from test_wording import CONTROL, ratios, rungs

from pipeline import metric_tables, paper_table, report, report_tables, store, wording
from pipeline.figures import FIGURES

SVG = b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'><a href='http://example.org'/></svg>"
CONTROLS = [row(**CONTROL), row(tokens="all", **CONTROL)]
NUMBERS = {"l0_mean": 16.0, "explained_variance": 0.9, "cos_mean": 0.95, "norm_ratio": 0.97}
BAD = "<script>alert('boo')</script>"


def saes_row(**changes):
    shares = {"dead_features": 0.25, "dense_features": 0.125}
    labels = {"sae": "early", "architecture": "topk", "hook": HOOK, "layer": 1}
    intervals = [around(value, 0.01, name) for name, value in NUMBERS.items()]
    return {name: value for part in (labels, shares, *intervals, changes) for name, value in part.items()}


CHECK = {"hook": HOOK, "sae": "early", "intervention": "sae", "n_tokens": 512, "kl_mean": 0.5, "kl_mean_float64": 0.5}
CHECK |= {"kl_worst": 1e-7, "kl_worst_relative": 1e-5, "ce_worst": 2e-6, "top1_agreement": 1.0}


def page(folder, rows, table=None, checks=(CHECK,), analyses=None, names=("kl_by_layer",), paper=None, **settings):
    """The HTML page and the line of text. `analyses`: tables of results by name; `names`: those of the figures."""
    summary, figures = folder / "effects.parquet", [folder / f"{name}.parquet" for name in names]
    store.write_table(summary, [frame(rows).to_arrow()], "0123", {}, packages={"torch": "1.2.3"})
    of_saes = frame([saes_row()] if table is None else table).to_arrow()
    store.write_table(folder / "saes.parquet", [of_saes], "f00d", {})
    for figure in figures:
        figure.with_suffix(".svg").write_bytes(SVG)
    outputs = [folder / "report.html", folder / "headline.txt"]
    inputs = {"summary": [summary], "figures": figures, "checks": [], "analyses": []}
    for name, made in (analyses or {}).items():
        inputs["analyses"].append(folder / f"{name}.parquet")
        made.write_parquet(inputs["analyses"][-1])
    if paper is not None:
        (folder / "paper").mkdir()
        inputs["paper"] = [folder / "paper" / "saes.parquet"]
        store.write_table(*inputs["paper"], [paper.to_arrow()], "0123", {}, packages={"torch": "9.9.9"})
    if checks:
        inputs["checks"] = [folder / "checks.parquet"]
        frame(list(checks)).write_parquet(*inputs["checks"])
    report.work(call(outputs, inputs, **settings))
    return outputs[0].read_text(encoding="utf-8"), outputs[1].read_text(encoding="utf-8")


def below(html, anchor):
    """The page from an anchor on."""
    return html.split(f'id="{anchor}"')[1]


def cells(html, anchor):
    """The body of the first table below an anchor as text, `row column`."""
    body = below(html, anchor).split("<tbody>")[1].split("</tbody>")[0]
    return [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in body.split("</tr>")[:-1]]


def titles(html, anchor):
    return re.findall(r"<th>(.*?)</th>", below(html, anchor).split("<tbody>")[0])


@pytest.mark.parametrize(
    ("ratio", "spread", "side"), [(2, 0.1, "worse"), (1, 0.1, "like"), (0.5, 0.1, "gentler"), (1, 0.5, "undecided")]
)
def test_few_ladders_are_sentences_and_many_are_a_table_too(tmp_path, ratio, spread, side):
    few, _ = page(tmp_path, ratios(a=2), analyses={"rungs": rungs(*[ratio] * 4, spread=spread)}, names=["ladder"])
    assert 'class="verdicts"' not in few
    assert few.count(f"The SAE&#39;s error is {side}") == 4
    many, line = page(tmp_path, ratios(a=2), analyses={"rungs": rungs(*[ratio] * 5, spread=spread)}, names=["ladder"])
    assert titles(many, "kind-of-error")[1:] == list(wording.ladder.RUNGS[:-1])
    found = cells(many, "kind-of-error")
    assert found == [[f"{ratio} [{ratio - spread:g}, {ratio + spread:g}]"] * 6] * 5
    assert many.count(f'<td class="{side}">') == 30
    assert many.count(f"The SAE&#39;s error is {side}") == 5
    assert "Against errors of the same length" in line


def test_a_rung_that_an_sae_lacks_is_a_dash_in_the_table(tmp_path):
    short = [study_tables.rungs(f"t{i}", names=("eps_random", "act_cov_random", "sae")) for i in range(4)]
    html, _ = page(tmp_path, ratios(a=2), analyses={"rungs": pl.concat([rungs(2), *short])}, names=["ladder"])
    assert cells(html, "kind-of-error")[1] == ["1.5 [1.4, 1.6]", "–", "1.5 [1.4, 1.6]", "–", "–", "–"]


def test_the_page_and_the_line_say_the_headline(tmp_path):
    rows = [*CONTROLS, *ratios(a=2, b=3)]
    html, line = page(tmp_path, rows)
    assert line == report.headline(frame(rows)) + "\n"
    assert f'<p class="headline">{line.strip()}</p>'.replace("'", "&#39;") in html


def test_intervals_are_said_to_have_the_confidence_that_was_set(tmp_path):
    html, line = page(tmp_path, [row(), *CONTROLS], bootstrap={"samples": 123, "confidence": 0.9})
    assert "90 % intervals from 123 bootstrap resamples" in html
    assert "95 %" not in html
    assert "95 %" not in line


@pytest.mark.parametrize("place", ["sae", "architecture", "corpus column"])
def test_what_a_study_names_comes_out_escaped(tmp_path, place):
    name = {place: BAD}.get("sae", "early")
    saes = [saes_row(sae=name, architecture={place: BAD}.get("architecture", "topk"))]
    corpora = [{"id": "story", "column": {place: BAD}.get("corpus column", "text")}]
    html, _ = page(tmp_path, [row(sae=name), *CONTROLS], saes, corpora=corpora, saes=[{"id": name}])
    assert "<script" not in html
    assert "alert(" in html
    assert "&lt;script&gt;" in html


def test_the_page_needs_no_other_file_and_no_network(tmp_path):
    html, _ = page(tmp_path, [row(), *CONTROLS])
    assert re.findall(r"<(?:script|link|iframe|object|embed|base)\b|@import|url\(", html, re.IGNORECASE) == []
    sources = re.findall(r"""(?:src|href|srcset|action|data)\s*=\s*["']?([^"'\s>]*)""", html, re.IGNORECASE)
    assert [source.split(",")[0] for source in sources if source[0] != "#"] == ["data:image/svg+xml;base64"]


def test_figures_are_embedded_with_their_captions(tmp_path):
    html, _ = page(tmp_path, [row(), *CONTROLS])
    (embedded,) = re.findall(r"base64,([^\"]*)", html)
    assert base64.b64decode(embedded) == SVG
    caption = (report.FOLDER / "kl_by_layer.rst").read_text(encoding="utf-8").split("\n")[2]
    assert f"<figcaption><strong>KL by layer.</strong> {caption}" in html.replace("&#39;", "'")


def test_every_figure_stands_under_one_heading():
    named = [name for _, names, _ in report.SECTIONS.values() for name in names]
    assert sorted(named) == sorted(FIGURES)


def test_every_table_of_an_analysis_stands_under_one_heading():
    named = [name for _, _, names in report.SECTIONS.values() for name in names]
    assert sorted(named) == sorted([*report_tables.ANALYSES, "paper"])


def test_contents_lead_to_the_headings_that_the_page_has(tmp_path):
    names = ["atlas_heads", "kl_by_layer", "training_series", "frontier", "ladder", "effective_compute"]
    html, _ = page(tmp_path, [row(), *CONTROLS], names=names)
    anchors = re.findall(r'href="#([^"]*)"', html)
    measured = ["metrics", "frontiers", "ablation-atlas"]
    assert anchors == ["every-token", "kind-of-error", *measured, "training", "saes", "effects", "provenance"]
    assert re.findall(r'<h2 id="([^"]*)"', html) == anchors
    ordered = ["kl_by_layer", "ladder", "effective_compute", "frontier", "atlas_heads", "training_series"]
    assert re.findall(r'<figure id="([^"]*)"', html) == ordered


def test_a_figure_of_ones_own_has_a_place(tmp_path, monkeypatch):
    captions = tmp_path / "captions"
    captions.mkdir()
    for name in ("report.html.jinja", "examples.html.jinja"):
        (captions / name).write_text((report.FOLDER / name).read_text(encoding="utf-8"), encoding="utf-8")
    (captions / "mine.rst").write_text("**Mine & yours**\n\nA <b> picture.\n")
    monkeypatch.setattr(report, "FOLDER", captions)
    html, _ = page(tmp_path, [row(), *CONTROLS], names=["mine"])
    assert "Further figures" in html
    assert "<strong>Mine &amp; yours.</strong> A &lt;b&gt; picture." in html


ANALYSED = {
    "rungs": study_tables.rungs(),
    "dark_matter": study_tables.parts_of_errors(),
    "curvature": study_tables.curvatures(),
    "compounding": study_tables.sets(),
    "metric_flips": study_tables.verdicts().flips,
    "calibrated": study_tables.calibrated(),
    "frontier_fits": metric_tables.frontier_fits(study_tables.families()),
    "frontier_factors": metric_tables.frontier_factors(study_tables.families()),
    "atlas": study_tables.ablated(),
}
COLUMNS = ["l0", "kl", "loss_recovered[zero]"]


def paper_of(*names, **changes):
    """The summary table of some SAEs."""
    table = pl.concat(study_tables.metrics(name, i, **changes) for i, name in enumerate(names, 1))
    about = {"architecture": "topk", "n_tokens": 1500, "l0_mean": 16.0, "l0_mean_low": 15.5, "l0_mean_high": 16.5}
    return paper_table.paper_table(table, study_tables.saes(*names, **about), COLUMNS)


def test_tables_of_analyses_have_titles_with_units_and_whole_counts(tmp_path):
    html, _ = page(tmp_path, [row(), *CONTROLS], analyses=ANALYSED | {"doses": study_tables.doses()})
    assert 'id="doses"' not in html  # in a figure, and too long
    for name in ANALYSED:
        shown = [title for title in titles(html, name) if "eps_random" not in title and title != "x_half"]
        assert not any("_" in title for title in shown)
    assert titles(html, "compounding")[:5] == ["set", "SAEs", "intervention", "tokens", "mean KL, nats"]
    assert cells(html, "compounding")[0] == ["a", "1", "sae", "1500", "0.5 [0.4, 0.6]", "1 [0.9, 1.1]"]
    assert cells(html, "dark_matter")[0][:5] == ["early", "1.resid_pre", "mean and shrinkage", "1500", "0.1"]
    assert cells(html, "atlas")[2] == ["0.z", "z", "0", "0", "zero", "1500", *["1 [0.9, 1.1]"] * 2, "0.1 [0.09, 0.11]"]
    flips = [line[1:5] for line in cells(html, "metric_flips")]
    assert ["nats_lost", "coder", "kl", "early"] in flips
    assert cells(html, "calibrated")[0][0] == "Kaplan 2020"
    assert titles(html, "frontier_fits")[:5] == ["family", "curve", "points", "number", "intervals from"]
    assert titles(html, "frontier_factors")[:4] == ["family", "against", "curve or loss", "quantity"]
    # A column of nothing but nulls is left out; a null among numbers is a dash.
    assert "of it by curvature" in titles(html, "curvature")
    assert cells(html, "curvature")[1][5:] == ["–", "–", "–"]


def test_only_the_ladder_the_papers_table_and_effects_are_open(tmp_path):
    settings = {"paper": paper_of("early"), "metrics": {"columns": COLUMNS}}
    html, _ = page(tmp_path, [row(), *CONTROLS], analyses=ANALYSED, **settings)
    opened = re.findall(r"<details([^>]*) open>\s*<summary>(.*?)</summary>", html)
    paper = ' id="paper"', "Table: Summary"
    assert opened == [("", "In words"), (' id="rungs"', "Table: The ladder"), paper, ("", "Table: 1 rows")]


def test_the_table_of_a_paper_has_the_columns_that_were_asked_for_and_says_where_it_is(tmp_path):
    html, _ = page(tmp_path, [row(), *CONTROLS], paper=paper_of("early", "late"), metrics={"columns": COLUMNS})
    assert titles(html, "paper") == ["SAE", "hook", "L0", "KL (nats)", "loss recovered (zero)"]
    numbers = ["16 [15.5, 16.5]", "0.5 [0.49, 0.51]", "0.9 [0.89, 0.91]"]
    assert cells(html, "paper") == [[name, "1.resid_pre", *numbers] for name in ("early", "late")]
    note = " ".join(below(html, "paper").split("</p>")[0].split())
    assert "From <code>results/paper/saes.parquet</code>, as CSV, Markdown and LaTeX beside it. Brackets are" in note


def test_a_long_table_of_flips_shows_the_worst_and_says_how_many_there_are(tmp_path):
    flips = pl.concat([study_tables.verdicts().flips] * 40)
    html, _ = page(tmp_path, [row(), *CONTROLS], analyses={"metric_flips": flips})
    assert len(cells(html, "metric_flips")) == 30
    assert f"order the other way round, the worst 30 of {len(flips)}</summary>" in html


def test_metrics_that_never_disagree_have_a_table_without_rows(tmp_path):
    html, _ = page(tmp_path, [row(), *CONTROLS], analyses={"metric_flips": study_tables.verdicts().flips.clear()})
    assert cells(html, "metric_flips") == []


def test_what_a_study_names_comes_out_escaped_in_tables_of_analyses(tmp_path):
    changed = {name: table.with_columns(sae=pl.lit(BAD)) for name, table in ANALYSED.items() if "sae" in table.columns}
    changed["compounding"] = changed["compounding"].with_columns(set=pl.lit(BAD))
    changed["rungs"] = pl.concat([study_tables.rungs(f"{BAD}{i}") for i in range(5)])
    named = {"metric_flips": "prefers_a", "calibrated": "source", "frontier_fits": "family"}
    named |= {"frontier_factors": "first"}
    for name, column in named.items():
        changed[name] = ANALYSED[name].with_columns(pl.lit(BAD).alias(column))
    settings = {"paper": paper_of(BAD), "metrics": {"columns": COLUMNS}}
    html, line = page(tmp_path, [row(sae=BAD), *CONTROLS], [saes_row(sae=BAD)], analyses=changed, **settings)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 20
    assert BAD in line  # a line of text has nothing to escape


def test_a_study_of_sets_alone_has_a_page(tmp_path):
    """No experiment replaces every token by one SAE: no rows of the summary, and nothing to check."""
    html, line = page(tmp_path, [row(tokens="all")], checks=(), analyses={"compounding": study_tables.sets()})
    assert "no KL ratio to report" in line
    assert "Not in this study" in html


def test_the_noise_floor_is_that_of_the_controls_alone(tmp_path):
    kinds = [
        {"kl_mean": 1.5e-7, "kl_p999": 2.5e-6, "top1_agreement": 1.0},
        {"kl_mean": 3.5e-7, "kl_p999": 0.5e-6, "top1_agreement": 0.875, "sae": None},
    ]
    controls = [row(tokens="all", **(CONTROL | kind)) for kind in kinds]
    # Ordinary tokens of the controls and all tokens of everything else are no part of it.
    others = [row(**CONTROL), row(tokens="all", kl_mean=5.0, kl_p999=9.0, top1_agreement=0.1), row()]
    html, _ = page(tmp_path, controls + others)
    (floor,) = re.findall(r"Noise floor\..*?</p>", html, re.DOTALL)
    numbers = re.findall(r"\d[\d.e-]*(?= (?:controls|nats|%))", floor)
    assert list(map(float, numbers)) == [2, 3.5e-7, 2.5e-6, 87.5]
    assert sorted(re.findall(r"\d[\d.]*(?:e-?\d+)?", floor.replace("99.9th", ""))) == sorted(numbers)


def test_a_study_without_a_control_claims_no_noise_floor(tmp_path):
    html, _ = page(tmp_path, ratios(a=2))
    floor = re.findall(r"Noise floor\..*?</p>", html, re.DOTALL)
    assert not re.search(r"None|nan|\d nats", "".join(floor))


def test_the_largest_errors_against_float64_are_in_the_page(tmp_path):
    checks = [
        CHECK | {"kl_mean": 0.5005},
        CHECK | {"kl_mean": 0.999 * 0.5, "kl_worst": 3e-6, "ce_worst": 4e-6, "top1_agreement": 0.875},
        # The control has no KL, and so no error relative to it.
        CHECK | {"kl_mean": 1e-9, "kl_mean_float64": 0.0, "kl_worst_relative": None, "n_tokens": 256},
    ]
    html, _ = page(tmp_path, [row(), *CONTROLS], checks=checks)
    (note,) = re.findall(r"Checked against float64\..*?</p>", html, re.DOTALL)
    for said in (
        "3 in all",
        "512 tokens",
        "mean KL: 1.0e-03",
        "1.0e-05 of it",
        "3.0e-06 nats",
        "4.0e-06 nats",
        "87.5 %",
    ):
        assert said in " ".join(note.split()), said


def test_the_fingerprint_is_in_the_page_for_readers_and_for_the_pipeline(tmp_path):
    html, _ = page(tmp_path, [row(), *CONTROLS])
    assert html.startswith("<!doctype html>\n<!-- fingerprint f00d -->")
    assert "Fingerprint f00d" in html
    assert store.read_fingerprint(tmp_path / "report.html") == "f00d"


def test_the_configuration_is_in_the_page_as_it_was_set(tmp_path):
    html, _ = page(tmp_path, [row(), *CONTROLS], seed=7, models=[{"id": "gpt2", "path": "a&b"}])
    shown = re.findall(r"<pre>(.*?)</pre>", html, re.DOTALL)[0].replace("&#34;", '"').replace("&amp;", "&")
    assert json.loads(shown) == {
        "seed": 7,
        "models": [{"id": "gpt2", "path": "a&b"}],
        "bootstrap": {"samples": 400, "confidence": 0.95},
    }


def test_the_table_holds_ordinary_tokens_of_every_intervention_but_the_control(tmp_path):
    rows = [
        *CONTROLS,
        row(tokens="all"),
        row(kl_p999=1234.5),
        row(sae=None, intervention="zero", kl_ratio=None, kl_ratio_low=None, kl_ratio_high=None),
    ]
    found = cells(page(tmp_path, rows)[0], "effects")
    interval = "0.5 [0.4, 0.6]"
    numbers = [interval, "0.5", "0.5"]
    assert found == [
        ["early", "1.resid_pre", "sae", *numbers, "1234", interval, interval, interval],
        ["–", "1.resid_pre", "zero", *numbers, "0.5", "–", interval, interval],
    ]


def test_saes_stand_in_their_table_in_the_order_of_layers(tmp_path):
    saes = [saes_row(sae="late", layer=10), saes_row(sae="early", layer=2)]
    found = cells(page(tmp_path, [row(), *CONTROLS], saes)[0], "saes")
    assert [line[0] for line in found] == ["early", "late"]
    assert found[0][3:5] == ["16 [16, 16]", "0.9 [0.89, 0.91]"]
    assert found[0][-2:] == ["0.25", "0.125"]


def test_a_study_of_ablations_alone_has_a_page(tmp_path):
    zero = row(sae=None, intervention="zero", kl_ratio=None, kl_ratio_low=None, kl_ratio_high=None)
    html, line = page(tmp_path, [zero, row(sae=None, tokens="all", **CONTROL)], table=[])
    assert "no KL ratio to report" in line
    assert cells(html, "effects")[0][:3] == ["–", "1.resid_pre", "zero"]
    assert cells(html, "saes") == []


def test_the_page_names_the_versions_that_the_results_were_made_with(tmp_path):
    """Not those that are installed when the page is written."""
    html, _ = page(tmp_path, [row(), *CONTROLS], paper=paper_of("early"), metrics={"columns": COLUMNS})
    assert "Results were made with torch 1.2.3." in html


def test_checks_of_ablations_alone_stand_beside_those_of_saes():
    numbers = {"kl_mean": 1.0, "kl_mean_float64": 1.0, "kl_worst": 1e-6, "kl_worst_relative": 1e-6, "ce_worst": 1e-6}
    row = {"hook": "blocks.1.hook_resid_pre", "intervention": "zero", "n_tokens": 512, "top1_agreement": 1.0} | numbers
    found = report.checked([pl.DataFrame([{"sae": None} | row]), pl.DataFrame([{"sae": "early"} | row])])
    assert (found["places"], found["tokens"]) == (2, 512)
