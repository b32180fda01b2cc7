"""Every figure has a caption, draws whatever a study holds, plots the numbers it was given, and comes out the same."""

import re
from inspect import signature

import numpy as np
import polars as pl
import pytest
import study_tables
from fakes import ROOT
from tables import HOOK, around, call, frame, row, table
from test_examples import files as token_files

from pipeline import figures, metric_tables, store
from pipeline.charts import COLOURS, PAIR
from pipeline.effect_charts import GONE, KL_BINS, KL_CLIP, LOSS_BINS, LOSS_CLIP, POSITION_BIN
from pipeline.figures import FIGURES
from pipeline.interventions import INTERVENTIONS
from pipeline.labels import DOSES, OF_A_HEAD, RESTORED, TURNS

Z = "blocks.2.attn.hook_z"
NAMES = ["sae", "sae_norm", "eps_random", "theta_random", "identity"]
# Figures of the effects alone; the others are of analyses, and `test_study_charts` looks into them.
GENERAL = [name for name, draw in FIGURES.items() if set(signature(draw).parameters) <= {"summary", "effects"}]
SERIES = [{"id": "training", "axis": "training step", "points": [[100, "early"], [1000, "late"]]}]
BY_LAYER = {"kl_by_layer": "kl_mean", "loss_by_layer": "delta_ce_mean"}


def rows(sae="early", names=NAMES, **changes):
    """Rows of the summary: the i-th intervention has a mean KL and a loss increase of about i + 1."""
    found = []
    for i, name in enumerate(names, 1):
        numbers = around(i, 0.2, "kl_mean") | around(i / 10, 0.02, "delta_ce_mean") | changes
        found += [row(sae=sae, intervention=name, **numbers)]
        found += [row(sae=sae, intervention=name, tokens="all") | around(99, 1, "kl_mean") | changes]
    return found


STUDY = [
    *rows(),
    *rows("late"),
    *rows("heads", hook=Z, layer=2),
    *rows(None, ["zero", "mean", "identity"], kl_ratio=None, kl_ratio_low=None, kl_ratio_high=None),
]
# Three sequences of eight tokens, the first of each special.
SPECIAL = np.zeros((3, 8), bool)
SPECIAL[:, 0] = True
CE_CLEAN = np.ones((3, 8), np.float32)
CE_CLEAN[:, -1] = np.nan


def effects(folder, kl=0.25, loss=0.5, **place):
    """A table of effects with the KL and the loss increase of the SAE that are given; noise has a tenth of them."""
    kl, loss = np.broadcast_to(kl, (3, 8)), np.broadcast_to(loss, (3, 8))
    parts = {"sae": 1, "eps_random": 0.1, "sae_norm": 7}
    values = {name: (kl * part, CE_CLEAN + loss * part, kl < 1) for name, part in parts.items()}
    return table(folder / f"{place.get('sae', 'early')}.parquet", SPECIAL, CE_CLEAN, values, **place)


def asked(folder, figure, study, tables):
    folder.mkdir(exist_ok=True)
    frame(study).write_parquet(folder / "summary.parquet")
    if tables is None:
        tables = [effects(folder), effects(folder, sae="heads", hook=Z)]
    outputs = [folder / f"{figure}.{kind}" for kind in ("parquet", "svg", "png")]
    inputs = {"summary": [folder / "summary.parquet"], "effects": tables}
    if figure not in GENERAL:
        inputs |= of_analyses(folder)
    return call(outputs, inputs, {"figure": figure}, series=SERIES)


def of_analyses(folder):
    """The tables of all analyses, of two SAEs or more, as files."""
    store.write_table(folder / "saes.parquet", [study_tables.saes("early", "late").to_arrow()], "f00d", {})
    extremes, top_tokens = token_files(folder)
    found = {"extremes": extremes, "top_tokens": top_tokens}
    tables = {name: pl.concat([made(), made("late", 2)]) for name, made in study_tables.TABLES.items()}
    tables |= {name: made() for name, made in study_tables.TOGETHER.items()}
    for name, data in tables.items():
        found[name] = [folder / f"{name}.parquet"]
        data.write_parquet(*found[name])
    return found


def drawn(folder, figure, study=STUDY, tables=None):
    """The data, the SVG and the PNG that the stage writes for a figure."""
    asking = asked(folder, figure, study, tables)
    figures.work(asking)
    table, *pictures = asking.outputs
    return pl.read_parquet(table), *(path.read_bytes() for path in pictures)


def plotted(folder, figure, study=STUDY, tables=None):
    """The data of a figure that is not saved."""
    asking = asked(folder, figure, study, tables)
    arguments = signature(FIGURES[figure]).parameters
    return FIGURES[figure](**{name: figures._source(name, asking) for name in arguments})[1]


def test_every_figure_has_a_caption_and_every_caption_a_figure():
    captions = {path.stem: path.read_text() for path in (ROOT / "workflow" / "report").glob("*.rst")}
    assert set(captions) == set(FIGURES)
    for text in captions.values():
        assert re.fullmatch(r"\*\*[A-Z][^*\n]+\*\*\n\n[A-Z].+\.\n", text, re.DOTALL), text


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_is_drawn_and_the_same_data_gives_the_same_bytes(tmp_path, figure):
    data, svg, png = drawn(tmp_path / "one", figure)
    assert len(data) > 0
    assert svg.startswith(b"<?xml")
    assert png.startswith(b"\x89PNG")
    again = drawn(tmp_path / "two", figure)
    assert again[0].equals(data)
    assert again[1] == svg


@pytest.mark.parametrize("figure", GENERAL)
def test_a_single_sae_is_drawn(tmp_path, figure):
    data, _, _ = drawn(tmp_path, figure, rows(), [effects(tmp_path)])
    assert data["place"].unique().to_list() == ["L1 · early"]


@pytest.mark.parametrize("figure", BY_LAYER)
def test_a_study_of_ablations_alone_is_drawn_by_hook(tmp_path, figure):
    data, _, _ = drawn(tmp_path, figure, rows(None, ["identity", "zero", "mean"]), [])
    assert sorted(data.select("sae", "intervention").rows()) == [(HOOK, "mean"), (HOOK, "zero")]


@pytest.mark.parametrize("figure", BY_LAYER)
def test_numbers_without_an_interval_are_drawn(tmp_path, figure):
    bare = dict.fromkeys([f"{BY_LAYER[figure]}_low", f"{BY_LAYER[figure]}_high"])
    data, _, _ = drawn(tmp_path, figure, [*rows(), *rows("late", **bare)], [])
    assert data["sae"].n_unique() == 2


@pytest.mark.parametrize("figure", BY_LAYER)
def test_a_study_without_any_interval_is_drawn(tmp_path, figure):
    """As over one sequence, from which nothing can be resampled."""
    bare = dict.fromkeys([f"{BY_LAYER[figure]}_low", f"{BY_LAYER[figure]}_high"])
    data, _, _ = drawn(tmp_path, figure, rows(**bare), [])
    assert data[BY_LAYER[figure]].null_count() == 0


@pytest.mark.parametrize("figure", BY_LAYER)
def test_a_study_of_zeros_is_drawn(tmp_path, figure):
    drawn(tmp_path, figure, rows(**around(0, 0, BY_LAYER[figure])), [])


def test_the_loss_axis_fits_the_saes_and_arrows_stand_for_what_is_above():
    high = around(5, 0.1, "delta_ce_mean")
    gone = [row(sae=None, intervention=name, **high) for name in GONE]
    picture, _ = FIGURES["loss_by_layer"](frame([*rows(), *gone]))
    (axes,) = picture.axes
    assert 0.42 < axes.get_ylim()[1] < 0.6
    arrows = [line for line in axes.lines if line.get_marker() == "^" and len(line.get_xdata())]
    assert {line.get_color() for line in arrows} == {COLOURS[name] for name in GONE}


def test_dots_of_the_picture_are_the_numbers_of_the_table_with_their_intervals():
    picture, data = FIGURES["kl_by_layer"](frame(STUDY))
    found = [(axes.get_title(), container) for axes in picture.axes for container in axes.containers]
    values = sorted(value for _, box in found for value in box.lines[0].get_ydata())
    np.testing.assert_allclose(values, sorted(data["kl_mean"]))
    ends = sorted(end for _, box in found for line in box.lines[2][0].get_segments() for end in line[:, 1])
    np.testing.assert_allclose(ends, sorted([*data["kl_mean_low"], *data["kl_mean_high"]]))
    assert {site for site, _ in found} == {"attn.hook_z", "hook_resid_pre"}


@pytest.mark.parametrize("figure", BY_LAYER)
def test_an_end_of_an_interval_that_is_rounded_past_the_number_is_drawn(tmp_path, figure):
    """As where every sequence has the same mean: the resamples differ from it in the last bit."""
    column = BY_LAYER[figure]
    rounded = {column: 0.3, f"{column}_low": np.nextafter(0.3, 1), f"{column}_high": np.nextafter(0.3, 1)}
    drawn(tmp_path, figure, [*rows(), *rows("late", **rounded)], [])


@pytest.mark.parametrize("figure", GENERAL)
def test_a_study_of_neither_the_sae_nor_noise_is_drawn(tmp_path, figure):
    values = {"sae_norm": (np.ones((3, 8)), CE_CLEAN, np.ones((3, 8)))}
    drawn(tmp_path, figure, rows(names=["sae_norm"]), [table(tmp_path / "0.parquet", SPECIAL, CE_CLEAN, values)])


@pytest.mark.parametrize("figure", BY_LAYER)
def test_dots_are_ordinary_tokens_of_every_intervention_but_the_control(tmp_path, figure):
    column = BY_LAYER[figure]
    data = plotted(tmp_path, figure)
    found = {(sae, name): value for sae, name, value in data.select("sae", "intervention", column).rows()}
    scale = 1 if column == "kl_mean" else 0.1
    expected = {(sae, name): scale * i for sae in ("early", "late", "heads") for i, name in enumerate(NAMES[:-1], 1)}
    # The hook's ablations stand beside each of its SAEs.
    expected |= {(sae, name): scale * i for sae in ("early", "late") for i, name in enumerate(("zero", "mean"), 1)}
    assert found == pytest.approx(expected)
    assert {f"{column}_low", f"{column}_high"} <= set(data.columns)


def test_what_two_corpora_say_of_one_sae_stands_in_two_places(tmp_path):
    data = plotted(tmp_path, "kl_by_layer", [*rows(), *rows(corpus="letters")], [])
    assert sorted(data["place"].unique()) == ["L1 · early · letters", "L1 · early · story"]


def test_every_intervention_but_the_control_has_a_colour_of_its_own():
    # Drawn by what they are, or by what is ablated, and not by intervention.
    elsewhere = {"identity", *DOSES, *TURNS, *RESTORED, *OF_A_HEAD.values()}
    assert set(COLOURS) == set(INTERVENTIONS) - elsewhere
    assert len(set(COLOURS.values())) == len(COLOURS)


@pytest.mark.parametrize("figure", ["kl_histograms", "loss_histograms"])
def test_shares_add_up_to_one_for_each_sae_and_intervention(tmp_path, figure):
    spread = np.linspace(-3, 3, 24).reshape(3, 8)
    tables = [effects(tmp_path, np.abs(spread), spread), effects(tmp_path, sae="heads", hook=Z)]
    data = plotted(tmp_path, figure, tables=tables)
    sums = data.group_by("place", "intervention").agg(pl.col("share", "tokens").sum())
    places = "L1 · early", "L2 · heads"
    assert sorted(sums.select("place", "intervention").rows()) == [(place, n) for place in places for n in PAIR[::-1]]
    assert sums["share"].to_numpy() == pytest.approx(1)
    # The special tokens are left out; of the loss, those without a next token too.
    assert sums["tokens"].unique().to_list() == [21 if figure == "kl_histograms" else 18]


def bins(data, intervention="sae"):
    return {round(left, 9): tokens for left, tokens in data.filter(intervention=intervention)["left", "tokens"].rows()}


def test_a_kl_is_counted_in_its_bin_and_beyond_the_clip_in_the_last(tmp_path):
    kl = np.full((3, 8), 0.01)
    kl[0, 1:6] = 0.05, 0.99, 1, 1.5, 80
    kl[1, 0] = 0.5  # special
    width = KL_CLIP / KL_BINS
    data = plotted(tmp_path, "kl_histograms", tables=[effects(tmp_path, kl)])
    assert bins(data) == {0: 16, 0.04: 1, round(KL_CLIP - width, 9): 4}
    assert data["width"].unique().to_list() == [width]


def test_a_loss_is_counted_in_its_bin_and_beyond_the_clip_in_the_outer_ones(tmp_path):
    loss = np.full((3, 8), 0.01)
    loss[0, 1:6] = -9, -2, -0.01, 2, 9
    width = 2 * LOSS_CLIP / LOSS_BINS
    data = plotted(tmp_path, "loss_histograms", tables=[effects(tmp_path, loss=loss)])
    assert bins(data) == {-LOSS_CLIP: 2, -width: 1, 0: 13, round(LOSS_CLIP - width, 9): 2}


def test_every_table_of_effects_has_a_panel_with_its_own_shares_and_tail(tmp_path):
    """One SAE on two corpora: their tokens are not thrown together, and neither tail stands for the other."""
    study, tables = [], []
    for corpus, kl in (("story", 0.25), ("letters", 0.75)):
        study += rows(corpus=corpus, kl_p999=kl)
        (tmp_path / corpus).mkdir()
        tables += [effects(tmp_path / corpus, kl, corpus=corpus)]
    tokens = figures._read_effects(call([], {"effects": tables}))
    picture, data = FIGURES["kl_histograms"](frame(study), tokens)
    found = {axes.get_title(): [text.get_text() for text in axes.texts] for axes in picture.axes}
    assert found == {"L1 · early · story": ["p99.9: 0.25"] * 2, "L1 · early · letters": ["p99.9: 0.75"] * 2}
    assert data.filter(intervention="sae").select("left", "tokens", "share").rows() == [(0.24, 21, 1), (0.74, 21, 1)]


def test_the_mean_by_position_is_a_mean_of_sequences_with_their_standard_error(tmp_path):
    kl = np.arange(24.0).reshape(3, 8) ** 2
    data = plotted(tmp_path, "kl_by_position", tables=[effects(tmp_path, kl)])
    found = data.filter(intervention="sae")
    assert found["position"].to_list() == [0, POSITION_BIN]
    means = np.stack([kl[:, 1:POSITION_BIN].mean(1), kl[:, POSITION_BIN:].mean(1)])  # the first token is special
    np.testing.assert_allclose(found["kl_mean"], means.mean(1), rtol=1e-6)
    np.testing.assert_allclose(found["standard_error"], means.std(1, ddof=1) / 3**0.5, rtol=1e-6)


def test_panels_stand_in_the_order_of_layers_and_then_of_the_configuration(tmp_path):
    places = {"b": 10, "c": 2, "a": 2}
    tables = [effects(tmp_path, sae=sae, hook=f"blocks.{layer}.hook_resid_pre") for sae, layer in places.items()]
    picture, _ = FIGURES["kl_by_position"](figures._read_effects(call([], {"effects": tables})))
    assert [axes.get_title() for axes in picture.axes] == ["L2 · c", "L2 · a", "L10 · b"]


def test_the_plane_takes_the_experiment_that_has_a_ratio():
    none = dict.fromkeys(("kl_ratio", "kl_ratio_low", "kl_ratio_high"))
    summary = frame([row(experiment="alone", **none), row(experiment="paired", kl_mean=0.3) | around(2)])
    saes = frame([{"model": "tiny", "corpus": "story", "sae": "early", "eps_mean": 1.0, "norm_mean": 4.0}])
    data = FIGURES["plane"](summary, saes)[1]
    assert data.select("experiment", "relative_error", "kl_ratio").rows() == [("paired", 0.25, 2.0)]


@pytest.mark.parametrize(("figure", "component"), [("atlas_heads", "z"), ("atlas_by_layer", "resid_pre")])
def test_heads_and_streams_of_the_atlas_are_in_figures_of_their_own(tmp_path, figure, component):
    data = plotted(tmp_path, figure)
    assert data.equals(study_tables.ablated().filter(component=component))


def test_effective_compute_is_of_the_sae_and_of_noise_alone(tmp_path):
    data = plotted(tmp_path, "effective_compute")
    assert set(data["metric"]) == {"effective_compute"}
    assert data.select("sae", "intervention").rows() == [(sae, name) for sae in ("early", "late") for name in PAIR]


def test_verdicts_are_drawn_of_every_metric_and_sae(tmp_path):
    data = plotted(tmp_path, "metric_verdicts")
    ranks = {metric: dict(part.select("sae", "rank").rows()) for (metric,), part in data.group_by("metric")}
    assert ranks["kl"] == {"early": 1, "late": 2, "coder": 3}
    assert ranks["nats_lost"] == ranks["loss_recovered[zero]"] == {"early": 3, "late": 2, "coder": 1}


def test_the_curves_of_a_frontier_are_drawn_once_whatever_their_intervals_are_from():
    found = study_tables.families()
    points, fits = (getattr(metric_tables, f"frontier_{name}")(found) for name in ("points", "fits"))
    assert fits["intervals"].n_unique() == 2
    picture, data = FIGURES["frontier"](points, fits)
    assert data.equals(points)
    curves = [line for line in picture.axes[2].lines if len(line.get_xdata()) > 9]
    assert len(curves) == len(fits) / 2 == 2 * 4
