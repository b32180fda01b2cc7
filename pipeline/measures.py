"""The part `metrics` of a configuration -> what metrics are measured against, checked: calibrations, families of SAEs,
the columns of the summary table. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pipeline.compute import calibration
from pipeline.experiments import Experiment
from pipeline.normalised import BASELINES
from pipeline.paper_table import check_columns
from pipeline.registry import unknown

PUBLISHED = Path(__file__).parent.parent / "calibrations"


@dataclass(frozen=True)
class Measures:
    """`calibrations` are files. `families` (name -> SAEs) are compared as frontiers: through the `points` "pareto" or
    "all", by the performance hit against `baseline`, at the L0 `matched` (none: a few of their shared range), all of
    L0 / d where `relative`. `columns` are those of the summary table."""

    calibrations: tuple[Path, ...]
    bigram_smoothing: float
    families: Mapping[str, tuple[str, ...]]
    baseline: str
    points: str
    relative: bool
    matched: tuple[float, ...]
    columns: tuple[str, ...]


def measures(entry: dict, saes: Mapping, experiments: Mapping[str, Experiment]) -> Measures:
    """ValueError for a file that is no calibration, for families that cannot be compared, and for a column that can
    never be there."""
    files = [calibration_file(name) for name in entry["calibrations"]]
    names = [_name(path) for path in files]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"`calibrations`: {names.count(name)} are called '{name}'. Rename one in its `# name:` line."
            )
    try:
        check_columns(entry["columns"], names)
    except ValueError as error:
        raise ValueError(f"`columns`: {error}") from None
    return Measures(
        calibrations=tuple(files),
        bigram_smoothing=float(entry["bigram_smoothing"]),
        families=_families(entry, saes, experiments),
        **{name: entry[name] for name in ("baseline", "points", "relative")},
        matched=tuple(map(float, entry["matched"])),
        columns=tuple(entry["columns"]),
    )


def calibration_file(name: str) -> Path:
    """The file of a published law by its name, or the one at a path."""
    path = PUBLISHED / f"{name}.csv"
    if path.name == f"{name}.csv" and path.is_file():
        return path
    if Path(name).name == name and (PUBLISHED / name).is_file() and not Path(name).is_file():
        raise ValueError(
            f"`calibrations`: '{name}' is a path, and there is no such file here ({Path.cwd()}). The published law is "
            f"'{Path(name).stem}', without the ending; a CSV of your own is given by its path, such as my/{name}."
        )
    if Path(name).suffix != ".csv":
        raise ValueError(
            f"`calibrations`: {unknown('law', name, (file.stem for file in PUBLISHED.glob('*.csv')))} A CSV of your "
            "own is given by its path, such as my/runs.csv."
        )
    if not Path(name).is_file():
        raise ValueError(f"`calibrations`: '{name}' does not exist (looked from {Path.cwd()}). Correct the path.")
    return Path(name)


def _name(path: Path) -> str:
    """What the calibration of a file is called. ValueError where it is none."""
    try:
        return calibration(path.read_text(encoding="utf-8"), path.stem, 1, 0.95, 0).name
    except UnicodeDecodeError as error:
        raise ValueError(f"`calibrations`: '{path}' is no text: {error}. Expected a CSV file in UTF-8.") from None
    except ValueError as error:
        raise ValueError(
            f"`calibrations`: '{path}' is no calibration. {error} The format is in calibrations/README.md."
        ) from None


def _families(entry: dict, saes: Mapping, experiments: Mapping[str, Experiment]) -> Mapping[str, tuple[str, ...]]:
    families, member = {}, {}
    for given in entry["families"]:
        what = f"Family '{given['id']}'"
        if given["id"] in families:
            raise ValueError(f"{what} is there twice. Every family needs an id of its own; rename one.")
        for sae in given["saes"]:
            if sae not in saes:
                raise ValueError(f"{what}: " + unknown("SAE", sae, saes))
            if sae in member:
                raise ValueError(f"{what}: '{sae}' is in family '{member[sae]}' too. Leave it in one of them.")
            member[sae] = given["id"]
        hooks = {(saes[sae].model, saes[sae].write.name) for sae in given["saes"]}
        if len(hooks) > 1:
            found = " and ".join(f"{model} {hook}" for model, hook in sorted(hooks))
            raise ValueError(
                f"{what}: its SAEs write at {found}. A frontier is of one hook of one model; make several."
            )
        families[given["id"]] = tuple(given["saes"])
    if families:
        _require_baseline(entry["baseline"], member, experiments)
    return MappingProxyType(families)


def _require_baseline(baseline: str, member: Mapping[str, str], experiments: Mapping[str, Experiment]) -> None:
    """That the SAEs of families are run, beside what the performance hit is measured against."""
    needed = {"sae", baseline} if baseline in BASELINES else {"sae"}
    run = [each for each in experiments.values() if each.scope == "all" and needed <= set(each.interventions)]
    for sae, family in member.items():
        if not any(sae in experiment.saes for experiment in run):
            names = " and ".join(f"'{name}'" for name in sorted(needed))
            raise ValueError(
                f"Family '{family}': no experiment that replaces every token runs {names} for '{sae}'. Add "
                f"{'them' if len(needed) > 1 else 'it'} to one"
                + (", or set `baseline: unigram`." if len(needed) > 1 else ".")
            )
