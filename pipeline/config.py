"""config.yaml -> a checked Study. Everything that can be wrong in it is found here, before any job starts or model
loads."""

import math
import sys
import textwrap
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from types import MappingProxyType

import yaml
from jsonschema import Draft202012Validator, validators

from pipeline import inputs
from pipeline.experiments import Experiment, atlas, experiment
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
    for model, corpus in _used(experiments.values(), saes):
        inputs.check_ready_tokens(corpora[corpus], models[model])
    _check_shards(config["shards"], corpora, experiments)
    precision, bootstrap = MappingProxyType(config["precision"]), MappingProxyType(config["bootstrap"])
    sizes = config["seed"], config["shards"], config["batch"], tuple(config["keep"])
    series = _by_id("series", [_series(entry, saes) for entry in config["series"]])
    found = measures(config["metrics"], saes, experiments)
    return Study(*sizes, precision, bootstrap, models, corpora, saes, experiments, series, found)


def _used(experiments: Iterable[Experiment], saes: Mapping[str, inputs.Sae]) -> dict[tuple[str, str], None]:
    """(model, corpus) of all experiments, each once."""
    return dict.fromkeys(
        (model, corpus)
        for each in experiments
        for corpus in each.corpora
        for model in (*each.models, *(saes[sae].model for sae in each.saes))
    )


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


class _Loader(yaml.SafeLoader):
    """Plain YAML, in which no key is there twice: YAML would take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if again := {key for key in keys if keys.count(key) > 1}:
            problem = f"the key '{min(again)}' is there twice, of which one would be ignored"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


def check_plain(path: Path) -> None:
    """That a configuration file is data. Snakemake reads tags such as `!!python/name`, and evaluates templates where a
    file says `__use_yte__`."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist (looked from {Path.cwd()}). Correct the name.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}. Save it as UTF-8.") from None
    except yaml.constructor.ConstructorError as error:
        tag = " Leave tags such as !!python out." if "tag" in str(error.problem) else " Delete one of them."
        raise ValueError(f"{path} is no plain YAML: {error.problem}, {_place(error)}.{tag}") from None
    except yaml.YAMLError as error:
        found = f"{getattr(error, 'problem', error)}, {_place(error)}"
        raise ValueError(f"{path} is no YAML: {found}. Look at the indents and brackets there and above.") from None
    if not isinstance(found, dict | None):
        raise ValueError(f"{path} holds {_shown(found)}, expected keys with values, such as `models: [...]`.")
    if isinstance(found, dict) and "__use_yte__" in found:
        raise ValueError(f"{path} is a template (`__use_yte__`), which is code. Write the values themselves.")


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}, column {mark.column + 1}" if mark else "at an unknown place"


def validate(config: dict) -> dict:
    """A copy of the configuration with the schema's defaults filled in. ValueError lists everything that breaks the
    schema."""
    config = deepcopy(config)
    validator = _filling_defaults(Draft202012Validator)(_schema())
    # Of what is no mapping, "expected keys with values" says enough.
    errors = (
        each for each in validator.iter_errors(config) if each.validator != "oneOf" or type(each.instance) is dict
    )
    errors = sorted(errors, key=lambda error: list(map(str, error.absolute_path)))
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
    about = f" {error.schema['description'].strip()}" if "description" in error.schema else ""
    if error.validator == "type":
        kind = error.validator_value
        return f"{place}: found {_shown(found)}, expected {KINDS[kind]}.{_advice(found, kind)}{about}"
    if error.validator == "enum":
        return f"{place}: {unknown('value', found, error.validator_value)}{about}"
    if error.validator == "uniqueItems":
        again = next(each for i, each in enumerate(found) if each in found[:i])
        return f"{place}: {_shown(again)} is there twice. Name it once.{about}"
    if error.validator in EXPECTED:
        expected = EXPECTED[error.validator].format(error.validator_value)
        return f"{place}: found {_shown(found)}, expected {expected}.{about}"
    return f"{place}: found {_shown(found)}. Expected:{about}"


# The kinds of values by their names in JSON Schema, and what its keywords ask for.
KINDS = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false"}
KINDS |= {"array": "a list", "object": "keys with values"}
EXPECTED = {"minimum": "{} or more", "maximum": "{} or less", "exclusiveMinimum": "more than {}"}
EXPECTED |= {
    "exclusiveMaximum": "less than {}",
    "minItems": "a list of {} or more",
    "maxItems": "a list of {} or fewer",
}
EXPECTED |= {"minLength": "{} letters or more"}


def _shown(value: object) -> str:
    """A value as a configuration has it."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, date):
        return f"{value} (a date)"
    return "an empty list" if value == [] else textwrap.shorten(repr(value), 200)


def _advice(found: object, kind: str) -> str:
    """What to write instead of a value of the wrong kind, where that is clear."""
    if kind == "string" and found is not None and not isinstance(found, list | dict):
        return " Put it in quotes."
    if kind == "array" and found is not None and not isinstance(found, dict):
        return f" Write [{found}]."
    if kind == "object" and found is None:
        return " Write {} where every default will do."
    if kind == "array" and isinstance(found, dict):
        return " Begin every entry with a dash."
    try:
        number = kind in ("integer", "number") and isinstance(found, str) and math.isfinite(float(found))
    except ValueError:
        return ""
    return " It is text to YAML: write it without quotes, and 1e-4 as 1.0e-4." if number else ""


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


def main() -> None:
    """`python -m pipeline.config FILE...`: that configuration files are data, before Snakemake reads them."""
    try:
        for name in sys.argv[1:]:
            check_plain(Path(name))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
