"""The jobs behind the tables of rows: summary, analyses, figures and report, and the checks that the report shows."""

import json
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import fingerprint
from pipeline.experiments import Experiment
from pipeline.inputs import Corpus, Sae
from pipeline.jobs import Job
from pipeline.labels import DOSES, LADDER, PAIR, SPECIAL_PURPOSE, TURNS, parsed
from pipeline.measures import Measures
from pipeline.normalised import BASELINES, FEWEST

if TYPE_CHECKING:
    from pipeline.plan import Plan


def _has(experiment: Experiment, *names: str) -> bool:
    """Whether one of these is among the interventions of an experiment that replaces every token."""
    return experiment.scope == "all" and bool({parsed(label)[0] for label in experiment.interventions} & set(names))


# The template of the page and the captions of its figures.
PAGE = Path(__file__).parent.parent / "workflow" / "report"
# Which experiments an analysis is about.
ABOUT = {
    "single_positions": lambda experiment: experiment.scope == "single",
    "draws": lambda experiment: experiment.scope == "draws",
    "draws_found": lambda experiment: experiment.scope == "draws",
    "compounding": lambda experiment: experiment.scope == "compound",
    "rungs": lambda experiment: _has(experiment, "sae") and _has(experiment, *LADDER),
    "doses": lambda experiment: _has(experiment, *DOSES),
    "exponents": lambda experiment: _has(experiment, *DOSES),
    "cosines": lambda experiment: _has(experiment, *TURNS),
    "dark_matter": lambda experiment: _has(experiment, "sae") and _has(experiment, "linear_error_restored"),
    "curvature": lambda experiment: experiment.curvature is not None,
    "correlations": lambda experiment: experiment.examples is not None,
    "atlas": lambda experiment: experiment.scope == "atlas",
}
# These are about the experiments of the general figures: each SAE once, beside ablations.
METRICS = ("metrics", "calibrated", "metric_ranks", "metric_agreements", "metric_flips")
FRONTIERS = ("frontier_points", "frontier_fits", "frontier_factors")


# Which experiments a figure shows, where the names of its arguments do not say it: it is drawn where there are any.
SHOWN = {
    "atlas_by_layer": lambda plan: [e for e in about(plan, "atlas") if set(e.components) != {"z"}],
    "atlas_heads": lambda plan: [e for e in about(plan, "atlas") if "z" in e.components],
    "metric_verdicts": lambda plan: [e for e in about(plan, "metrics") if len(e.saes) >= FEWEST],
    "effective_compute": lambda plan: plan.study.metrics.calibrations,
    "plane": lambda plan: [e for e in _general(plan) if _has(e, "sae") and _has(e, "eps_random")],
    "training_series": lambda plan: [e for e in _general(plan) if _has(e, *PAIR) and set(e.saes) & _in_series(plan)],
    "single_token": lambda plan: [e for e in about(plan, "single_positions") if plan.has_effects(e)],
    "single_token_horizon": lambda plan: [e for e in about(plan, "single_positions") if plan.has_effects(e)],
    "dose_response": lambda plan: [e for e in about(plan, "doses") if any(dose > 0 for dose in _doses(e))],
    "cosine_grid": lambda plan: [e for e in about(plan, "cosines") if set(e.saes) & _reconstructed(plan)],
}


def about(plan: "Plan", analysis: str) -> list[Experiment]:
    if analysis in ABOUT:
        return [experiment for experiment in _experiments(plan) if ABOUT[analysis](experiment)]
    if analysis in FRONTIERS:
        return _with_families(plan)
    if analysis not in METRICS:
        raise KeyError(f"The analysis '{analysis}' is about no experiment: say in `ABOUT` which.")
    measured = [experiment for experiment in _general(plan) if _has(experiment, "sae")]
    return measured if analysis != "calibrated" or plan.study.metrics.calibrations else []


def _with_families(plan: "Plan") -> list[Experiment]:
    """The experiments that run SAEs of families beside the baseline: the general ones where these have all of them."""
    measures, members = plan.study.metrics, _members(plan)
    needed = [("sae",), *([(measures.baseline,)] if measures.baseline in BASELINES else [])]
    run = [e for e in _experiments(plan) if all(_has(e, *names) for names in needed) and members & set(e.saes)]
    general = [experiment for experiment in run if experiment in _general(plan)]
    return general if members <= {sae for experiment in general for sae in experiment.saes} else run


def _members(plan: "Plan") -> set[str]:
    """The SAEs of all families."""
    return {sae for saes in plan.study.metrics.families.values() for sae in saes}


def summary(plan: "Plan") -> Job:
    """Of the experiments that replace every token, and of all SAEs that are run alone."""
    scores = _scores(plan)
    saes = dict.fromkeys((job.key["sae"], job.key["corpus"]) for job in scores)
    inputs = [("tokens", plan.tokens(*pair)) for pair in _pairs(plan, [e for e in _experiments(plan) if e.saes])]
    inputs += [(job.stage, job) for job in _tables(plan, [e for e in _experiments(plan) if e.scope == "all"])]
    inputs += [("scores", job) for job in scores]
    for sae, corpus in ((plan.study.saes[sae], corpus) for sae, corpus in saes):
        inputs += [("moments", plan.moments(sae.model, corpus, sae.write))]
    return plan.make("summary", {}, _bootstrap(plan), list(dict.fromkeys(inputs)))


def analysis(plan: "Plan", name: str) -> Job:
    """One table of results: the stages it asks for by name, of the experiments that it is about."""
    experiments, wanted = about(plan, name), set(plan.analyses[name])
    if "families" in wanted:
        inputs = _of_families(plan, experiments)
    else:
        inputs = [(job.stage, job) for job in plan.rows(experiments) if job.stage in wanted]
    if wanted - plan.analyses.keys() - {"calibrations"}:
        inputs += [("tokens", plan.tokens(*pair)) for pair in _pairs(plan, experiments)]
    if "errors" in wanted:
        inputs += [("errors", plan.errors(sae, corpus)) for sae, corpus in _sae_corpora(plan, experiments)]
    inputs += [(other, analysis(plan, other)) for other in plan.analyses if other in wanted]
    settings = _bootstrap(plan) | _measures(plan, wanted)
    return plan.make("analyses", {"analysis": name}, settings, list(dict.fromkeys(inputs)), [name])


def _of_families(plan: "Plan", experiments: list[Experiment]) -> list[tuple[str, Job]]:
    """The tables of the SAEs of families, and of the ablations at their hooks."""
    members = _members(plan)
    hooks = {plan.study.saes[sae].write.name for sae in members}
    rows = [job for job in plan.rows(experiments) if job.stage in ("effects", "ablations")]
    wanted = [job for job in rows if job.key.get("sae") in members or job.key.get("hook") in hooks]
    # By name: an SAE of no family must not change the order either.
    return [(job.stage, job) for job in sorted(wanted, key=lambda job: job.path)]


def _measures(plan: "Plan", wanted: set[str]) -> dict:
    """What an analysis is told of the configuration's `metrics`."""
    measures, found = plan.study.metrics, {}
    if "texts" in wanted or ("families" in wanted and measures.baseline == "bigram"):
        found["bigram_smoothing"] = measures.bigram_smoothing
    if "calibrations" in wanted:
        found["calibrations"] = [[path.stem, path.read_text(encoding="utf-8")] for path in measures.calibrations]
    if "families" in wanted:
        members = [plan.study.saes[sae] for saes in measures.families.values() for sae in saes]
        widths = {sae.id: sae.write.width(plan.study.models[sae.model].geometry) for sae in members}
        asked = {name: getattr(measures, name) for name in ("baseline", "points", "relative", "matched")}
        found["families"] = asked | {"families": dict(measures.families), "widths": widths}
    return json.loads(json.dumps(found))


def paper(plan: "Plan") -> Job:
    """The summary table of a paper."""
    settings = {"columns": list(plan.study.metrics.columns), "confidence": plan.study.bootstrap["confidence"]}
    return plan.make("paper", {}, settings, [("summary", summary(plan)), ("metrics", analysis(plan, "metrics"))])


def figure(plan: "Plan", name: str) -> Job:
    """A figure, from the tables that its arguments name."""
    inputs = [("summary", summary(plan))]
    for argument in plan.figures[name]:
        if argument == "effects":
            inputs += [(job.stage, job) for job in _tables(plan, _paired(plan)) if job.stage == "effects"]
        elif argument in ("extremes", "top_tokens"):
            inputs += [(job.stage, job) for job in plan.rows(_experiments(plan)) if job.stage == argument]
        elif argument in plan.analyses:
            inputs += [(argument, analysis(plan, argument))]
    settings = {}
    if "series" in plan.figures[name]:
        settings["series"] = [vars(series) for series in plan.study.series.values()]
    return plan.make("figures", {"figure": name}, json.loads(json.dumps(settings)), inputs, [name])


def figures(plan: "Plan") -> list[str]:
    """Those that have something to show in this study."""
    has = {
        "summary": bool(_tables(plan, [e for e in _experiments(plan) if e.scope == "all"])),
        "effects": bool([job for job in _tables(plan, _paired(plan)) if job.stage == "effects"]),
        "extremes": any(experiment.examples for experiment in _experiments(plan)),
        "top_tokens": any(experiment.examples for experiment in _experiments(plan)),
        "saes": bool(_scores(plan)),
        "series": bool(plan.study.series),
    }
    has |= {name: bool(about(plan, name)) for name in plan.analyses}
    drawn = [name for name, arguments in plan.figures.items() if all(has[argument] for argument in arguments)]
    return [name for name in drawn if name not in SHOWN or SHOWN[name](plan)]


def report(plan: "Plan") -> Job:
    inputs = [("summary", summary(plan)), *(("figures", figure(plan, name)) for name in figures(plan))]
    inputs += [("analyses", analysis(plan, name)) for name in plan.analyses if about(plan, name)]
    inputs += [(job.stage, job) for job in plan.rows(_experiments(plan)) if job.stage in ("extremes", "top_tokens")]
    inputs += [("paper", paper(plan))] if about(plan, "metrics") else []
    inputs += [("checks", job) for job in _checks(plan)]
    study = plan.study
    settings = {
        "page": fingerprint.file_digest(PAGE),
        "seed": study.seed,
        "shards": study.shards,
        "precision": dict(study.precision),
        "bootstrap": dict(study.bootstrap),
        "models": [{"id": m.id, **m.source, "processing": dict(m.processing)} for m in study.models.values()],
        "corpora": [_flat(c) for c in study.corpora.values()],
        "saes": [_of_sae(s) for s in study.saes.values()],
        "experiments": [vars(e) for e in study.experiments.values()],
        "series": [vars(s) for s in study.series.values()],
        "metrics": _shown(study.metrics),
    }
    return plan.make("report", {}, json.loads(json.dumps(settings)), list(dict.fromkeys(inputs)))


def _flat(entry: Corpus) -> dict:
    """A corpus, for the reader."""
    return {"id": entry.id, **entry.source} | {k: v for k, v in vars(entry).items() if k not in ("id", "source")}


def _of_sae(sae: Sae) -> dict:
    """An SAE, and how it was trained as far as it says so, for the reader."""
    trained = {key: value for key, value in sae.trained.items() if value is not None}
    hooks = {"read": sae.read.name, "write": sae.write.name}
    return {"id": sae.id, **sae.source, "model": sae.model, **hooks, "trained": trained}


def _shown(measures: Measures) -> dict:
    """The configuration's `metrics`, for the reader."""
    plain = {"calibrations": [path.name for path in measures.calibrations], "families": dict(measures.families)}
    return vars(measures) | plain


def _bootstrap(plan: "Plan") -> dict:
    return {"seed": plan.study.seed, "bootstrap": dict(plan.study.bootstrap)}


def _experiments(plan: "Plan") -> list[Experiment]:
    return list(plan.study.experiments.values())


def _paired(plan: "Plan") -> list[Experiment]:
    """Experiments of which the per-token figures show SAE beside random direction."""
    return [experiment for experiment in _general(plan) if _has(experiment, *PAIR)]


def _general(plan: "Plan") -> list[Experiment]:
    """The experiments of the general figures, as `selection.general` takes them from the summary: those without a
    special purpose, or all that replace every token, where only these have a special purpose and one of PAIR."""
    every = [experiment for experiment in _experiments(plan) if experiment.scope == "all"]
    rest = [experiment for experiment in every if not _has(experiment, *SPECIAL_PURPOSE)]
    paired, among_rest = ([e for e in experiments if _has(e, *PAIR)] for experiments in (every, rest))
    return every if not rest or (paired and not among_rest) else rest


def _doses(experiment: Experiment) -> list[float]:
    labels = (parsed(label) for label in experiment.interventions)
    return [strength for name, strength in labels if name in DOSES and strength is not None]


def _reconstructed(plan: "Plan") -> set[str]:
    return {job.key["sae"] for job in _scores(plan)}


def _in_series(plan: "Plan") -> set[str]:
    return {sae for series in plan.study.series.values() for _, sae in series.points}


def _tables(plan: "Plan", experiments: list[Experiment]) -> list[Job]:
    return [job for job in plan.rows(experiments) if job.stage in ("effects", "ablations")]


def _scores(plan: "Plan") -> list[Job]:
    return [job for job in plan.rows(_experiments(plan)) if job.stage == "scores"]


def _checks(plan: "Plan") -> list[Job]:
    """The check of every experiment on every model and corpus that it uses; sets of SAEs have none."""
    places = {
        (experiment.id, model, corpus): None
        for experiment in _experiments(plan)
        if experiment.scope != "compound"
        for model, corpus in plan.places(experiment)
    }
    return [plan.checks(plan.study.experiments[name], model, corpus) for name, model, corpus in places]


def _sae_corpora(plan: "Plan", experiments: list[Experiment]) -> list[tuple[Sae, str]]:
    pairs = dict.fromkeys((sae, corpus) for e in experiments for sae, corpus in product(e.saes, e.corpora))
    return [(plan.study.saes[sae], corpus) for sae, corpus in pairs]


def _pairs(plan: "Plan", experiments: list[Experiment]) -> list[tuple[str, str]]:
    """(model, corpus) of some experiments."""
    return list(dict.fromkeys(place for experiment in experiments for place in plan.places(experiment)))
