"""config.yaml -> a checked Study. Everything that can be wrong in it is found here, before any job starts or model
loads."""

from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import yaml
from jsonschema import Draft202012Validator, validators

from pipeline import inputs
from pipeline.experiments import atlas, experiment
from pipeline.measures import Measures, measures
from pipeline.registry import unknown

SCHEMA = Path(__file__).parent.parent / "workflow" / "schemas" / "config.schema.yaml"
# Sequences of a micro-batch, the least that a shard can hold; `batches` has the same number, and needs torch.
BATCH = 8


@dataclass(frozen=True)
class Series:
    """SAEs at places on an axis: `points` are (place, SAE) in order."""

    id: str
    axis: str
    points: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Study:
    """A whole checked configuration; the dictionaries are keyed by id, in the order of the file."""

    seed: int
    shards: int
    batch: int
    keep: tuple[str, ...]
    precision: MappingProxyType
    bootstrap: MappingProxyType
    models: MappingProxyType
    corpora: MappingProxyType
    saes: MappingProxyType
    experiments: MappingProxyType
    series: MappingProxyType
    metrics: Measures


def load(config: dict) -> Study:
    """Check a configuration and resolve it. ValueError says what was found, what was expected and what to do."""
    config = validate(config)
    models = _by_id("models", [inputs.model(entry) for entry in config["models"]])
    saes = _by_id("saes", inputs.saes_of(config["saes"], models))
    models = _by_id("models", [inputs.processed(each, saes.values()) for each in models.values()])
    corpora = _by_id("corpora", [inputs.corpus(entry, models, saes.values()) for entry in config["corpora"]])
    experiments = [experiment(entry, saes, corpora) for entry in config["experiments"]]
    if "atlas" in config:
        experiments.append(atlas(config["atlas"], models, corpora))
    if not experiments:
        raise ValueError("There is nothing to do. Give `experiments`, or `atlas: {}` for ablations without any SAE.")
    experiments = _by_id("experiments", experiments)
    _check_shards(config["shards"], corpora, experiments)
    precision, bootstrap = MappingProxyType(config["precision"]), MappingProxyType(config["bootstrap"])
    sizes = config["seed"], config["shards"], config["batch"], tuple(config["keep"])
    series = _by_id("series", [_series(entry, saes) for entry in config["series"]])
    found = measures(config["metrics"], saes, experiments)
    return Study(*sizes, precision, bootstrap, models, corpora, saes, experiments, series, found)


def _check_shards(shards: int, corpora: MappingProxyType, experiments: MappingProxyType) -> None:
    """That every shard has a micro-batch, and the first one all contexts that `curvature` asks for."""
    for corpus in corpora.values():
        if corpus.contexts is None:
            continue
        batches = -(-corpus.contexts // BATCH)
        if shards > batches:
            made = f"{corpus.contexts} contexts make {batches} batches of {BATCH}"
            raise ValueError(f"Corpus '{corpus.id}': {made}, too few for {shards} shards. Lower `shards`.")
        first = min(batches // shards * BATCH, corpus.contexts)
        for each in experiments.values():
            asked = min(each.curvature or 0, corpus.contexts)
            if corpus.id in each.corpora and asked > first:
                raise ValueError(
                    f"Experiment '{each.id}': `curvature` asks for {asked} contexts, but the first of {shards} "
                    f"shards of corpus '{corpus.id}' holds {first}. Lower `curvature` or `shards`."
                )


def check_plain(path: Path) -> None:
    """That a configuration file is data. Snakemake reads tags such as `!!python/name`, and evaluates templates where a
    file says `__use_yte__`."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no plain YAML: {error}. Leave tags such as !!python out.") from None
    if isinstance(found, dict) and "__use_yte__" in found:
        raise ValueError(f"{path} is a template (`__use_yte__`), which is code. Write the values themselves.")


def validate(config: dict) -> dict:
    """A copy of the configuration with the schema's defaults filled in. ValueError lists everything that breaks the
    schema."""
    config = deepcopy(config)
    validator = _filling_defaults(Draft202012Validator)(_schema())
    errors = sorted(validator.iter_errors(config), key=lambda error: list(map(str, error.absolute_path)))
    if errors:
        raise ValueError("The configuration is wrong:\n" + "\n".join(f"  {_explain(error)}" for error in errors))
    return config


@cache
def _schema() -> dict:
    return yaml.load(SCHEMA.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _filling_defaults(validator):
    check_properties = validator.VALIDATORS["properties"]

    def properties(checker, schema, instance, whole):
        if isinstance(instance, dict):
            for name, part in schema.items():
                if "default" in part:
                    instance.setdefault(name, deepcopy(part["default"]))
        yield from check_properties(checker, schema, instance, whole)

    # JSON Schema takes 2.0 for an integer; a seed of 2.0 would be another seed than 2.
    types = validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    return validators.extend(validator, {"properties": properties}, type_checker=types)


def _explain(error) -> str:
    """One line for one breach of the schema: where, what was found, what was expected."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
    place, found = "".join(parts).lstrip(".") or "top level", error.instance
    if error.validator == "additionalProperties":
        known = error.schema["properties"]
        return f"{place}: " + " ".join(unknown("key", key, known) for key in found if key not in known)
    if error.validator == "required":
        missing = [key for key in error.validator_value if key not in found]
        return f"{place}: the key {', '.join(map(repr, missing))} is missing."
    if error.validator == "oneOf" and all("required" in part for part in error.validator_value):
        keys = " or ".join(f"'{key}'" for part in error.validator_value for key in part["required"])
        given = [key for part in error.validator_value for key in part["required"] if key in found]
        return f"{place}: the key {keys} is missing." if not given else f"{place}: give {keys}, not both."
    if error.validator == "dependentRequired":
        return f"{place}: {error.message.replace(' is a dependency of ', ' must be given beside ')}."
    if error.validator == "pattern" and "name of" in error.schema.get("description", ""):
        return f"{place}: {found!r} is no {error.schema['description']}"
    if error.validator == "pattern":
        allowed = "letters, digits, and single '.', '_', '+' or '-' between them"
        return f"{place}: {found!r} can't be a name, because it becomes part of file names. Use {allowed}."
    if error.validator == "type":
        hint = " Put it in quotes." if error.validator_value == "string" else ""
        return f"{place}: found {found!r} ({type(found).__name__}), expected {error.validator_value}.{hint}"
    return f"{place}: {error.message}. {error.schema.get('description', '')}".rstrip()


def _by_id(kind: str, entries: list) -> MappingProxyType:
    seen = {}
    for entry in entries:
        if entry.id in seen:
            raise ValueError(
                f"{kind}: the id '{entry.id}' is used twice. Every entry needs an id of its own; rename one."
            )
        seen[entry.id] = entry
    return MappingProxyType(seen)


def _series(entry: dict, saes: MappingProxyType) -> Series:
    for point in entry["points"]:
        if point["sae"] not in saes:
            raise ValueError(f"Series '{entry['id']}': " + unknown("SAE", point["sae"], saes))
    points = sorted((float(point["at"]), point["sae"]) for point in entry["points"])
    return Series(entry["id"], entry["axis"], tuple(points))
