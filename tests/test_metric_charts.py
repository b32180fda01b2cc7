"""The pictures of ablations, metrics, compute and frontiers show the numbers of their tables, and draw whatever a table
holds: one SAE or many, negative losses, nothing known, nothing at all."""

from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from tables import HOOK, around, frame
from test_study_charts import bars, drawn_dots, saved, words

from pipeline import charts, frontier, frontier_charts, metric_charts, normalised
from pipeline.charts import colour
from pipeline.metric_charts import COMPONENTS
from pipeline.normalised import UNITS

ABOUT = {"model": "tiny", "corpus": "story", "experiment": "main"}


def ablated(losses, component="mlp_out", names=("zero",), head=None, first=0, spread=0.5, **changes):
    """A row per layer and intervention; the KL is half of the size of the loss."""
    rows = []
    for name in names:
        for layer, loss in enumerate(losses, first):
            place = {"model": "tiny", "corpus": "story", "layer": layer, "component": component, "head": head}
            numbers = around(loss, spread, "delta_ce_mean") | around(abs(loss) / 2, spread / 2, "kl_mean")
            rows.append(place | {"intervention": name} | numbers | changes)
    return pl.DataFrame(rows, schema_overrides={"layer": pl.Int64, "head": pl.Int64})


def of_heads(values, **changes):
    """`values`: layer -> the losses of its heads."""
    heads = [(layer, *each) for layer, losses in values.items() for each in enumerate(losses)]
    return pl.concat([ablated([loss], "z", head=head, first=layer, **changes) for layer, head, loss in heads])


def measured(values, hook=HOOK, intervention="sae", reason=None, suffix="", **changes):
    """`values`: metric or metric[baseline] -> the values of SAEs a, b, c and so on."""
    rows = []
    for name, numbers in values.items():
        metric, _, baseline = name.removesuffix("]").partition("[")
        for sae, value in zip("abcdefghijklmnopqr", numbers, strict=False):
            ends = dict.fromkeys(("value", "value_low", "value_high")) if value is None else around(value, 0.1, "value")
            place = {"hook": hook, "layer": 1, "sae": sae + suffix, "intervention": intervention, "metric": metric}
            why = {"baseline": baseline or None, "unit": UNITS[metric], "reason": reason if value is None else None}
            rows.append(ABOUT | place | ends | why | changes)
    return frame(rows).with_columns(pl.col("^value.*$").cast(pl.Float64))


def verdicts(*tables):
    """The picture of the verdicts on each table, which stand below each other with what they are about."""
    found = []
    for table in tables:
        about = [pl.lit(table[name].first(), pl.String).alias(name) for name in ABOUT]
        ranks, agreements, _ = normalised.verdicts(table.drop(*ABOUT))
        found.append([ranks.with_columns(about), agreements.with_columns(about)])
    return metric_charts.verdicts(*(pl.concat(parts) for parts in zip(*found, strict=True)))


def compute(values, **changes):
    return measured({f"effective_compute[{name}]": shares for name, shares in values.items()}, **changes)


def points(family="topk", l0=(10.0, 40.0, 20.0), lost=(0.4, 0.1, 0.5), **changes):
    """The third SAE is beaten in nats lost, and not in KL."""
    rows = []
    for i, (sparsity, nats) in enumerate(zip(l0, lost, strict=True)):
        row = ABOUT | {"hook": HOOK, "layer": 1, "family": family, "sae": f"{family}-{i}", "baseline": "zero"}
        row |= around(sparsity, 1, "l0") | around(nats, 0.05, "nats_lost") | around(4 / sparsity, 0.05, "kl")
        row |= {"x": 1 / sparsity, "pareto": i != 2, "pareto_kl": True, "relative": False}
        rows.append(row | around(nats / 2, 0.02, "hit") | changes)
    return frame(rows)


def fits(family="topk", converged=("linear", "power", "hill_1", "hill"), **changes):
    parameters = {"linear": {"c": 0.01, "m": 2.0}, "power": {"a": 3.0, "k": 1.0}, "hill_1": {"x_half": 0.4}}
    parameters |= {"hill": {"x_half": 0.4, "k": 1.5}}
    rows = [{"family": family, "curve": name, "converged": name in converged} | parameters[name] for name in parameters]
    labels = [pl.lit(value).alias(name) for name, value in (ABOUT | {"baseline": "zero"} | changes).items()]
    return pl.DataFrame(rows, schema=frontier.FITS).with_columns(labels)


METRICS = {"kl": (1.0, 2.0, 3.0), "nats_lost": (1.0, 3.0, 2.0)}
# Each chart, a table for it, and which columns are its numbers.
CHARTS = {
    "atlas": (metric_charts.atlas, lambda **more: ablated([4.0, -0.5], **more), "^(kl|delta_ce)_mean.*$"),
    "heads": (metric_charts.heads, lambda **more: of_heads({0: [1.0, -0.5]}, **more), "^(kl|delta_ce)_mean.*$"),
    "verdicts": (verdicts, lambda **more: measured(METRICS, **more), "^value.*$"),
    "compute": (metric_charts.effective_compute, lambda **more: compute({"kaplan": [0.5]}, **more), "^value.*$"),
    "frontier": (lambda data: frontier_charts.frontier(data, fits()), points, "^(nats_lost|kl|hit)(_low|_high)?$|^x$"),
}
NAMES = pytest.mark.parametrize("name", CHARTS)


def written(artists):
    return [text.get_text() for text in artists]


def ticks(axis):
    return written(axis.get_ticklabels())


def titles(panels):
    return [axes.get_title() for axes in panels]


def curves(axes):
    return [line for line in axes.lines if len(line.get_xdata()) > 9]


@NAMES
def test_a_table_without_rows_is_a_message(name):
    draw, table, _ = CHARTS[name]
    figure = draw(table().clear())
    assert (figure.axes, len(words(figure))) == ([], 1)


@NAMES
@pytest.mark.parametrize("kind", [pl.Float64, pl.Null])
def test_numbers_of_which_none_is_known_are_no_fault(name, kind):
    draw, table, numbers = CHARTS[name]
    saved(draw(table().with_columns(pl.lit(None, kind).alias(each) for each in table().select(numbers).columns)))


@NAMES
def test_two_corpora_are_not_thrown_together(name):
    draw, table, _ = CHARTS[name]
    tables = table(), table(corpus="letters")
    figure = draw(*tables) if name == "verdicts" else draw(pl.concat(tables))
    said = " ".join(written(figure.findobj(lambda artist: hasattr(artist, "get_text"))))
    assert {"story", "letters"} <= set(said.split())
    figure.draw_without_rendering()


def test_components_and_families_have_colours_of_their_own():
    shades = [shade for shade, _ in frontier_charts.FAMILIES] + list(COMPONENTS.values())
    others = {*charts.COLOURS.values(), *charts.OTHER_COLOURS, *charts.SHADES}
    assert len(others.union(shades)) == len(others) + len(shades)


def test_an_atlas_has_a_line_for_each_component_and_a_column_for_each_ablation():
    data = pl.concat([ablated([5.0, 3.0], name, ("resample", "zero", "mean")) for name in ("mlp_out", "resid_pre")])
    figure = metric_charts.atlas(data)
    assert titles(figure.axes) == ["zero", "mean", "resample", "", "", ""]
    for axes, values in ((figure.axes[1], [5, 3]), (figure.axes[4], [2.5, 1.5])):
        found = {shade: places for shade, places in drawn_dots(axes).items() if places}
        assert found == {COMPONENTS[name]: list(enumerate(values)) for name in ("mlp_out", "resid_pre")}
        assert sum(line.get_linestyle() == "-" and len(line.get_xdata()) == 2 for line in axes.lines) == 3  # and 0
    mlp = next(box for box in figure.axes[1].containers if box.lines[0].get_color() == COMPONENTS["mlp_out"])
    assert bars(mlp) == [[4.5, 5.5], [2.5, 3.5]]
    assert (figure.axes[0].get_ylabel(), figure.axes[3].get_ylabel()) == ("loss increase, nats", "mean KL, nats")
    assert written(figure.legends[0].get_texts()) == ["resid_pre", "mlp_out"]
    assert ticks(figure.axes[0].xaxis) == ["0", "1"]


def test_an_atlas_shows_losses_from_hundredths_to_tens_and_negative_ones():
    parts = ablated([14.0, 0.01], "resid_pre", spread=0), ablated([-0.3, 0.0, 0.02], spread=0)
    loss, kl = metric_charts.atlas(pl.concat(parts)).axes
    at = loss.transData.transform([(0, value) for value in (-0.3, 0, 0.01, 0.02, 0.1, 1, 10, 14)])[:, 1]
    low, high = loss.transAxes.transform([(0, 0), (0, 1)])[:, 1]
    assert (np.diff([low, *at, high]) > 1).all()  # inside, and apart
    assert at[5] - at[4] == pytest.approx(at[6] - at[5])  # a logarithm
    assert kl.get_ylim()[0] == 0
    assert loss.yaxis.get_major_formatter()(0.3) == "0.3"
    assert ticks(metric_charts.atlas(ablated([1.0] * 26)).axes[0].xaxis) == [str(layer) for layer in range(0, 26, 2)]


def test_an_atlas_says_what_was_not_measured_and_leaves_heads_out():
    parts = [ablated([1.0], names=("zero", "mean")), ablated([1.0], model="other")]
    parts += [ablated([9.0], first=5, head=0), ablated([9.0], "z", first=6)]
    figure = metric_charts.atlas(pl.concat(parts))
    assert [written(axes.texts) for axes in figure.axes] == [[]] * 5 + [["not measured"], [], ["not measured"]]
    assert titles(figure.axes) == ["tiny · zero", "tiny · mean", "", "", "other · zero", "other · mean", "", ""]
    assert drawn_dots(figure.axes[0])[COMPONENTS["mlp_out"]] == [(0, 1)]
    assert ticks(figure.axes[0].xaxis) == ["0"]


def test_heads_are_a_map_of_layers_and_heads_with_numbers():
    axes, bar = metric_charts.heads(of_heads({3: [0.5, -0.25], 1: [0.004, -0.001, 0.1]})).axes
    (mesh,) = axes.collections
    np.testing.assert_allclose(mesh.get_array().filled(9), [[0.004, -0.001, 0.1], [0.5, -0.25, 9]])
    assert (mesh.norm.vmin, mesh.norm.vmax) == (-0.5, 0.5)
    assert written(axes.texts) == ["0.00", "0.00", "0.10", "0.50", "-0.25"]
    assert [text.get_position() for text in axes.texts][2:4] == [(2, 0.5), (0, 1.5)]
    assert (ticks(axes.yaxis), ticks(axes.xaxis)) == (["1", "3"], ["0", "1", "2"])
    assert axes.get_ylim() == (2, 0)  # the first layer above
    assert bar.get_ylabel() == "loss increase, nats"


def test_many_heads_have_no_numbers_and_models_have_scales_of_their_own():
    many = of_heads({layer: np.linspace(-0.01, 0.02, 32).tolist() for layer in range(3)})
    figure = metric_charts.heads(pl.concat([many, of_heads({0: [4.0]}, model="b")]))
    saved(figure)
    many, few = figure.axes[:2]
    assert (written(many.texts), written(few.texts)) == ([], ["4.0"])
    assert (many.collections[0].norm.vmax, few.collections[0].norm.vmax) == (0.02, 4)
    assert titles(figure.axes[:2]) == ["tiny · zero", "b · zero"]
    assert len(ticks(many.xaxis)) == 16


def test_verdicts_are_ranks_and_agreements_in_the_order_of_kl():
    # kl orders a, c, b, d; kl_ratio the same but for the last two; nats_lost is the opposite, and d is not known.
    values = {"nats_lost": (4.0, 2.0, 3.0, None), "kl_ratio[eps_random]": (1.0, 4.0, 2.0, 3.0)}
    values["kl"] = (1.0, 3.0, 2.0, 4.0)
    values |= {"kl_score[zero]": (0.9, 0.7, 0.8, 0.6), "kl_score[mean]": (0.8, 0.6, 0.7, 0.5)}
    left, right = verdicts(measured(values)).axes
    assert ticks(left.xaxis) == ["a", "c", "b", "d"]
    assert ticks(left.yaxis) == ["1  kl, kl_score[zero, mean]", "2  kl_ratio[eps_random]", "3  nats_lost"]
    ranks = left.collections[0].get_array().filled(0)
    np.testing.assert_allclose(ranks, [[1, 2, 3, 4], [1, 2, 4, 3], [3, 2, 1, 0]])
    assert written(left.texts) == list("12341243321")
    np.testing.assert_allclose(right.collections[0].get_array(), [[1, 2 / 3, -1], [2 / 3, 1, -1], [-1, -1, 1]])
    assert written(right.texts)[:4] == ["1.00", "0.67", "-1.00", "0.67"]
    assert ticks(right.xaxis) == ticks(right.yaxis) == ["1", "2", "3"]
    assert (left.get_ylim(), left.get_xlim()) == (right.get_ylim(), (-0.5, 3.5))


def test_a_metric_that_orders_nothing_comes_last_and_without_kl_the_first_leads():
    left, right = verdicts(measured({"loss_added": (1.0, 1.0, 1.0)} | METRICS)).axes
    assert ticks(left.yaxis) == ["1  kl", "2  nats_lost", "3  loss_added"]
    assert written(left.texts)[-3:] == ["2", "2", "2"]
    assert written(right.texts) == ["1.00", "0.33", "0.33", "1.00", "1.00"]
    left, _ = verdicts(measured({"bits_lost": (3.0, 2.0, 1.0), "loss_added": (1.0, 3.0, 2.0)})).axes
    assert (ticks(left.yaxis), ticks(left.xaxis)) == (["1  bits_lost", "2  loss_added"], ["c", "b", "a"])


def test_the_places_with_the_most_saes_are_drawn_and_those_of_two_are_not():
    def place(hook, number, **changes):
        return measured({"kl": np.arange(1.0, number + 1)}, hook=hook, suffix=hook, **changes)

    one = pl.concat([place("p", 2), place("q", 3), place("r", 4)])
    figure = verdicts(one, pl.concat([place(hook, 3, model="other") for hook in "stuv"]))
    shown = [part._suptitle.get_text() for part in figure.subfigs]
    assert shown == ["other · all hooks", "tiny · all hooks", "tiny · r", "tiny · q"]
    assert figure._supxlabel.get_text().endswith("not drawn: 4")
    assert words(verdicts(place("p", 2))) == ["At no place are there 3 SAEs to be ranked."]


def test_verdicts_of_many_metrics_and_saes_fit_a_page():
    shuffled = np.random.default_rng(0).permutation
    names = [f"effective_compute[a-calibration-with-a-long-name-{i}]" for i in range(19)]
    figure = verdicts(measured({name: shuffled(18.0 * np.arange(18)) for name in [*names, "kl"]}))
    figure.draw_without_rendering()
    assert figure.get_figwidth() < charts.WIDEST + 0.01
    left, right = figure.axes
    widest = max(text.get_window_extent().width for axes in figure.axes for text in axes.texts)
    assert widest < left.get_window_extent().width / 18
    assert min(text.get_fontsize() for text in right.texts) > 5.5
    boxes = [label.get_window_extent() for label in left.get_yticklabels()]
    assert all(above.y0 >= below.y1 for above, below in pairwise(boxes))
    assert min(box.x0 for box in boxes) >= 0
    assert max(label.get_window_extent().x1 for label in right.get_yticklabels()) <= right.get_window_extent().x0


def test_compute_is_a_panel_per_calibration_with_its_refusals():
    own = compute({"kaplan": [0.5, 0.25], "mine": [0.75, None], "far": [None, None]}, reason="too low")
    random = compute({"kaplan": [0.9, 0.8], "mine": [0.9, None], "far": [None, None]}, intervention="eps_random")
    zero, others = compute({"kaplan": [0.01]}, intervention="zero"), measured({"kl": (9.0,)})
    figure = metric_charts.effective_compute(pl.concat([own, random, zero, others], how="vertical_relaxed"))
    kaplan, mine = figure.axes
    assert titles(figure.axes) == ["kaplan", "mine · 2 of 4 not calibrated"]
    found = {shade: [y for _, y in places] for shade, places in drawn_dots(kaplan).items()}
    assert found == {colour("sae"): [0.5, 0.25], colour("eps_random"): [0.9, 0.8]}
    ((at, share),) = drawn_dots(mine)[colour("sae")]
    assert (round(at), share) == (0, 0.75)
    assert bars(kaplan.containers[0])[0] == pytest.approx([0.4, 0.6])
    assert ticks(mine.xaxis) == ["L1 · a", "L1 · b"]
    assert kaplan.get_ylim() == mine.get_ylim()
    assert kaplan.get_ylim()[0] == 0
    assert kaplan.yaxis.get_major_formatter()(0.5) == "50%"
    assert figure._supxlabel.get_text() == "far gives no value: too low"


def test_saes_stand_in_the_order_of_layers_and_all_refusals_are_a_message():
    late, early = compute({"mine": [0.5]}, layer=7), compute({"mine": [0.6]}, layer=2)
    axes = metric_charts.effective_compute(pl.concat([late, early])).axes[0]
    assert ticks(axes.xaxis) == ["L2 · a", "L7 · a"]
    refused = [compute({"mine": [None, None]}, reason="low"), compute({"mine": [None]}, reason="high")]
    figure = metric_charts.effective_compute(pl.concat(refused, how="vertical_relaxed"))
    assert words(figure) == ["mine gives no value: low (and other reasons)"]


def test_compute_of_eighteen_saes_fits_a_page():
    data = compute(dict.fromkeys(("kaplan", "mine", "chinchilla"), np.linspace(0.1, 1.2, 18)))
    named = data.with_columns(sae=pl.format("gpt2-small-res-jb-blocks.{}.hook_resid_pre-24576", "sae"))
    figure = metric_charts.effective_compute(named)
    saved(figure)
    assert figure.get_figwidth() < charts.WIDEST + 0.01
    assert figure.axes[0].get_position().y0 > figure.axes[1].get_position().y1


def test_pareto_optimal_points_are_filled_and_joined():
    lost, kl, hit = frontier_charts.frontier(points(), fits()).axes
    expected = {lost: ([(10, 0.4), (40, 0.1)], [(20, 0.5)]), kl: ([(10, 0.4), (20, 0.2), (40, 0.1)], [])}
    for axes, (full, hollow) in expected.items():
        marks = {box.lines[0].get_markerfacecolor(): box.lines[0].get_xydata() for box in axes.containers}
        np.testing.assert_allclose(marks.pop("white"), np.reshape(hollow, (-1, 2)))
        np.testing.assert_allclose(*marks.values(), full)
        (line,) = (line for line in axes.lines if line.get_linestyle() == "-")
        np.testing.assert_allclose(line.get_xydata(), full)
        assert (axes.get_xscale(), axes.get_yscale(), axes.get_xlabel()) == ("log", "log", "L0, latents per token")
    wide, tall = (part.get_segments()[0] for part in lost.containers[0].lines[2])
    np.testing.assert_allclose([wide[:, 0], tall[:, 1]], [[9, 11], [0.35, 0.45]])
    assert [axes.get_ylabel() for axes in (lost, kl)] == ["loss increase, nats", "mean KL, nats"]
    assert (hit.get_xlabel(), hit.get_ylabel()) == ("1 / L0", "performance hit against zero")
    assert frontier_charts.frontier(points(relative=True), fits()).axes[2].get_xlabel() == "d / L0"


def test_curves_are_those_that_converged_over_the_range_of_their_family():
    own = pl.concat([fits(converged=("linear", "hill")), fits("gated", ("power",))])
    both = pl.concat([points(), points("gated", (5.0, 8.0, 6.0))])
    figure = frontier_charts.frontier(both, pl.concat([own, fits(corpus="letters"), fits("absent")]))
    lines = curves(figure.axes[2])
    assert [line.get_linestyle() for line in lines] == ["-", "-.", "--"]
    topk, gated = (box.lines[0].get_color() for box in figure.axes[2].containers[::2])
    assert [line.get_color() for line in lines] == [topk, topk, gated]
    rows = own.filter(pl.col("converged")).iter_rows(named=True)
    for line, row, ends in zip(lines, rows, ((1 / 40, 1 / 10),) * 2 + ((1 / 8, 1 / 5),), strict=True):
        x, y = line.get_data()
        assert (x[0], x[-1]) == pytest.approx(ends)
        np.testing.assert_allclose(y, frontier.curve(row, x))
    assert written(figure.legends[0].get_texts())[:5] == ["topk", "gated", "linear", "power", "Hill, k free"]


def test_what_has_no_logarithm_is_counted_and_negative_hits_are_drawn():
    data = points(lost=(0.4, -0.1, 0.0)).with_columns(kl=pl.Series([0.1, np.nan, None]))
    lost, kl, hit = frontier_charts.frontier(data, fits().clear()).axes
    assert titles((lost, kl, hit)) == ["2 of 3 left out: not above 0"] * 2 + [""]
    np.testing.assert_allclose(sorted(y for found in drawn_dots(hit).values() for _, y in found), [-0.05, 0, 0.2])
    assert [len(found) for axes in (lost, kl) for found in drawn_dots(axes).values()] == [1, 1]
    dead = frontier_charts.frontier(points(x=np.nan), fits()).axes[2]
    assert (dead.get_title(), curves(dead)) == ("3 of 3 left out: not known", [])


def test_one_sae_has_a_frontier_without_curves():
    figure = frontier_charts.frontier(points(l0=(10.0,), lost=(0.4,)), fits())
    saved(figure)
    assert written(figure.legends[0].get_texts()) == ["topk", "Pareto-optimal", "not Pareto-optimal"]


def test_three_models_have_a_row_each_and_a_family_one_colour():
    data = pl.concat([*(points(model=name) for name in "pqr"), points("gated", model="r")])
    figure = frontier_charts.frontier(data, fits(model="q"))
    assert titles(figure.axes) == ["p"] * 3 + ["q"] * 3 + ["r"] * 3
    dots = [drawn_dots(axes) for axes in figure.axes[::3]]
    first, second, third = ({shade for shade, places in each.items() if places} for each in dots)
    assert first == second < third
    assert [len(curves(axes)) for axes in figure.axes[2::3]] == [0, 4, 0]
