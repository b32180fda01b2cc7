"""The headline says in words what the ratios say, and the page is escaped, self-contained and traceable."""

import base64
import json
import re

import pytest
from tables import HOOK, around, call, frame, row

from pipeline import report, store

SVG = b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'><a href='http://example.org'/></svg>"
CONTROL = {"intervention": "identity", "kl_ratio": None, "kl_ratio_low": None, "kl_ratio_high": None}
CONTROLS = [row(**CONTROL), row(tokens="all", **CONTROL)]
NUMBERS = {"l0_mean": 16.0, "explained_variance": 0.9, "cos_mean": 0.95, "norm_ratio": 0.97}
BAD = "<script>alert('boo')</script>"


def saes_row(**changes):
    shares = {"dead_features": 0.25, "dense_features": 0.125}
    labels = {"sae": "early", "architecture": "topk", "hook": HOOK, "layer": 1}
    intervals = [around(value, 0.01, name) for name, value in NUMBERS.items()]
    return {name: value for part in (labels, shares, *intervals, changes) for name, value in part.items()}


def ratios(**values):
    """Rows of `sae`: SAE -> its KL ratio, in an interval of 0.1 to each side."""
    return [row(sae=sae, **around(value)) for sae, value in values.items()]


CHECK = {"hook": HOOK, "sae": "early", "intervention": "sae", "n_tokens": 512, "kl_mean": 0.5, "kl_mean_float64": 0.5}
CHECK |= {"kl_worst": 1e-7, "kl_worst_relative": 1e-5, "ce_worst": 2e-6, "top1_agreement": 1.0}


def page(folder, rows, table=None, checks=(CHECK,), **settings):
    """The HTML page and the line of text."""
    summary, figure = folder / "effects.parquet", folder / "kl_by_layer.parquet"
    store.write_table(summary, [frame(rows).to_arrow()], "0123", {}, packages={"torch": "1.2.3"})
    frame([saes_row()] if table is None else table).write_parquet(folder / "saes.parquet")
    figure.with_suffix(".svg").write_bytes(SVG)
    frame(list(checks)).write_parquet(folder / "checks.parquet")
    outputs = [folder / "report.html", folder / "headline.txt"]
    inputs = {"summary": [summary], "figures": [figure], "checks": [folder / "checks.parquet"]}
    report.work(call(outputs, inputs, **settings))
    return outputs[0].read_text(encoding="utf-8"), outputs[1].read_text(encoding="utf-8")


def cells(html, table):
    """The body of the first or second table as text, `row column`."""
    body = html.split("<tbody>")[table + 1].split("</tbody>")[0]
    return [re.findall(r"<td>(.*?)</td>", line) for line in body.split("</tr>")[:-1]]


def test_saes_above_noise_change_more():
    said = report.headline(frame(ratios(a=2, b=3, c=1.05)))
    assert "more than a random vector at the same distance for 2 of 3 SAEs" in said
    assert said.endswith("The KL ratio goes from 1.05 [0.95, 1.15] (c) to 3 [2.9, 3.1] (b), with a median of 2.")


def test_saes_below_noise_change_less():
    assert "less than a random vector at the same distance for 2 of 3 SAEs" in report.headline(
        frame(ratios(a=0.2, b=0.5, c=1))
    )


def test_saes_whose_intervals_hold_one_change_about_as_much():
    said = report.headline(frame(ratios(a=0.95, b=1.05)))
    assert "about as much as a random vector at the same distance for 2 of 2 SAEs" in said


def test_saes_on_both_sides_are_not_said_to_be_about_as_much():
    """Two that are clearly above and two clearly below are no result of 0 of 4."""
    said = report.headline(frame(ratios(a=0.2, b=0.3, c=3, d=4)))
    assert "more than a random vector at the same distance for 2 of 4 SAEs, less for 2 (" in said
    assert "about as much" not in said


def test_one_sae_is_named_once_and_in_the_singular():
    said = report.headline(frame(ratios(only=2)))
    assert "more than a random vector at the same distance for 1 of 1 SAE (" in said
    assert said.endswith("The KL ratio is 2 [1.9, 2.1] (only).")
    assert "median" not in said


@pytest.mark.parametrize("rows", [[row(**CONTROL)], [row(kl_ratio=None)], [row(sae=None, intervention="zero")]])
def test_without_a_ratio_the_headline_says_so(rows):
    assert "there is no KL ratio to report" in report.headline(frame(rows))


def test_the_headline_is_of_the_sae_over_ordinary_tokens():
    others = [row(sae="all", tokens="all", **around(50)), row(sae="noise", intervention="theta_random", **around(70))]
    assert report.headline(frame(ratios(a=2, b=3) + others)) == report.headline(frame(ratios(a=2, b=3)))


def test_a_ratio_without_an_interval_is_on_no_side():
    wide = row(sae="wide", kl_ratio=9.0, kl_ratio_low=None, kl_ratio_high=None)
    said = report.headline(frame([*ratios(a=2), wide]))
    assert "more than a random vector at the same distance for 1 of 2 SAEs, without an interval for 1 (" in said
    assert "to 9 [–, –] (wide)" in said


def test_an_sae_on_two_corpora_is_one_sae():
    twice = [row(sae=sae, corpus=corpus, **around(2)) for sae in "ab" for corpus in ("story", "letters")]
    assert "of 4 SAEs" not in report.headline(frame(twice))


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
    assert [source.split(",")[0] for source in sources] == ["data:image/svg+xml;base64"]


def test_figures_are_embedded_with_their_captions(tmp_path):
    html, _ = page(tmp_path, [row(), *CONTROLS])
    (embedded,) = re.findall(r"base64,([^\"]*)", html)
    assert base64.b64decode(embedded) == SVG
    caption = (report.FOLDER / "kl_by_layer.rst").read_text(encoding="utf-8").split("\n")[0]
    assert caption in html.replace("&#39;", "'")


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
    found = cells(page(tmp_path, rows)[0], 0)
    interval = "0.5 [0.4, 0.6]"
    numbers = [interval, "0.5", "0.5"]
    assert found == [
        ["early", "1.resid_pre", "sae", *numbers, "1234", interval, interval, interval],
        ["–", "1.resid_pre", "zero", *numbers, "0.5", "–", interval, interval],
    ]


def test_saes_stand_in_their_table_in_the_order_of_layers(tmp_path):
    saes = [saes_row(sae="late", layer=10), saes_row(sae="early", layer=2)]
    found = cells(page(tmp_path, [row(), *CONTROLS], saes)[0], 1)
    assert [line[0] for line in found] == ["early", "late"]
    assert found[0][3:5] == ["16 [16, 16]", "0.9 [0.89, 0.91]"]
    assert found[0][-2:] == ["0.25", "0.125"]


def test_a_study_of_ablations_alone_has_a_page(tmp_path):
    zero = row(sae=None, intervention="zero", kl_ratio=None, kl_ratio_low=None, kl_ratio_high=None)
    html, line = page(tmp_path, [zero, row(sae=None, tokens="all", **CONTROL)], table=[])
    assert "no KL ratio to report" in line
    assert cells(html, 0)[0][:3] == ["–", "1.resid_pre", "zero"]
    assert cells(html, 1) == []


def test_the_page_names_the_versions_that_the_results_were_made_with(tmp_path):
    """Not those that are installed when the page is written."""
    html, _ = page(tmp_path, [row(), *CONTROLS])
    assert "Results were made with torch 1.2.3." in html
