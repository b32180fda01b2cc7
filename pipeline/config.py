"""config.yaml -> a checked Study. Everything that can be wrong in it is found here, before any job starts or model
loads."""

from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import yaml
from jsonschema import Draft202012Validator, validators

from pipeline.experiments import atlas, experiment
from pipeline.hooks import READ_SITES, WRITE_SITES, Geometry, Hook, parse_hook, read_geometry, read_json
from pipeline.measures import Measures, measures
from pipeline.registry import unknown

SCHEMA = Path(__file__).parent.parent / "workflow" / "schemas" / "config.schema.yaml"
# Sequences of a micro-batch, the least that a shard can hold; `batches` has the same number, and needs torch.
BATCH = 8
CORPUS_KINDS = (".txt", ".jsonl", ".parquet", ".npy")
# sae_lens applies these inside the forward pass. The others need a dataset statistic that the file does not hold,
# and sae_lens silently leaves them out.
HONOURED_NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")


@dataclass(frozen=True)
class Model:
    id: str
    path: Path
    processing: MappingProxyType
    geometry: Geometry


@dataclass(frozen=True)
class Corpus:
    id: str
    path: Path
    column: str
    context: int
    contexts: int | None
    prepend_bos: bool


@dataclass(frozen=True)
class Sae:
    """An SAE or transcoder: it reads the activation at `read` and predicts the one at `write` (the same for an SAE)."""

    id: str
    path: Path
    model: str
    architecture: str
    read: Hook
    write: Hook
    d_in: int
    d_sae: int


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
    models = _by_id("models", [_model(entry) for entry in config["models"]])
    corpora = _by_id("corpora", [_corpus(entry, models) for entry in config["corpora"]])
    saes = _by_id("saes", [_sae(entry, models) for entry in config["saes"]])
    experiments = [experiment(entry, saes, corpora) for entry in config["experiments"]]
    if "atlas" in config:
        experiments.append(atlas(config["atlas"], models, corpora))
    if not experiments:
        raise ValueError("There is nothing to do. Give `experiments`, or `atlas: {}` for ablations without any SAE.")
    experiments = _by_id("experiments", experiments)
    _check_shards(config["shards"], corpora, experiments)
    precision, bootstrap = MappingProxyType(config["precision"]), MappingProxyType(config["bootstrap"])
    sizes = config["seed"], config["shards"], config["batch"]
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
    return yaml.safe_load(SCHEMA.read_text())


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


def _existing(path: str, what: str) -> Path:
    if not Path(path).exists():
        raise ValueError(
            f"{what}: '{path}' does not exist (looked from {Path.cwd()}). Correct `path`, or "
            "run in the folder it starts from."
        )
    return Path(path)


def _model(entry: dict) -> Model:
    what = f"Model '{entry['id']}'"
    folder = _existing(entry["path"], what)
    if not folder.is_dir():
        raise ValueError(f"{what}: '{folder}' is a file, expected the Hugging Face folder it is in.")
    for pattern in ("config.json", "*.safetensors", "tokenizer.json"):
        if not any(folder.glob(pattern)):
            raise ValueError(
                f"{what}: '{folder}' holds no {pattern}. Expected a Hugging Face folder with safetensors weights."
            )
    return Model(entry["id"], folder, MappingProxyType(entry["processing"]), read_geometry(folder))


def _corpus(entry: dict, models: MappingProxyType) -> Corpus:
    what = f"Corpus '{entry['id']}'"
    path = _existing(entry["path"], what)
    if path.is_dir():
        raise ValueError(f"{what}: '{path}' is a folder, expected a file: {', '.join(CORPUS_KINDS)}.")
    if path.suffix not in CORPUS_KINDS:
        raise ValueError(f"{what}: '{path}' ends in '{path.suffix}'. Known kinds of file: {', '.join(CORPUS_KINDS)}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{what}: '{path}' is empty. It must hold at least one context of text.")
    for model in models.values():
        if entry["context"] > model.geometry.n_ctx:
            raise ValueError(
                f"{what}: contexts of {entry['context']} tokens, but model '{model.id}' has "
                f"positions for {model.geometry.n_ctx}. Lower `context`."
            )
    return Corpus(entry["id"], path, entry["column"], entry["context"], entry.get("contexts"), entry["prepend_bos"])


def _sae(entry: dict, models: MappingProxyType) -> Sae:
    what = f"SAE '{entry['id']}'"
    folder = _existing(entry["path"], what)
    for name in ("cfg.json", "sae_weights.safetensors"):
        if not (folder / name).exists():
            raise ValueError(f"{what}: '{folder}' holds no {name}. Expected a folder that sae_lens has saved.")
    if "model" not in entry and len(models) > 1:
        raise ValueError(f"{what}: there are {len(models)} models, so say which one with `model`: {', '.join(models)}.")
    model_id = entry.get("model", next(iter(models)))
    if model_id not in models:
        raise ValueError(f"{what}: " + unknown("model", model_id, models))
    return _described(entry["id"], folder, models[model_id])


def _described(name: str, folder: Path, model: Model) -> Sae:
    """The SAE that a cfg.json of sae_lens describes, checked against the model it is used on."""
    what = f"SAE '{name}' ({folder / 'cfg.json'})"
    settings = read_json(folder / "cfg.json")
    missing = [key for key in ("architecture", "d_in", "d_sae") if key not in settings]
    if missing:
        raise ValueError(
            f"{what} has no {', '.join(map(repr, missing))}. Expected what sae_lens writes; save the SAE again."
        )
    metadata = settings.get("metadata") or {}
    if not metadata.get("hook_name"):
        raise ValueError(f"{what} has no metadata.hook_name. Load the SAE with sae_lens 6 and save it again.")
    transcoder = "transcoder" in settings["architecture"]
    hooks = {
        "read": metadata.get("hook_name"),
        "write": metadata.get("hook_name_out") if transcoder else metadata.get("hook_name"),
    }
    for role, sites in (("read", READ_SITES), ("write", WRITE_SITES)):
        try:
            hooks[role] = parse_hook(hooks[role], model.geometry.n_layers, sites)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
        width, key = hooks[role].width(model.geometry), "d_out" if transcoder and role == "write" else "d_in"
        if settings.get(key) != width:
            raise ValueError(
                f"{what}: {key} is {settings.get(key)}, but '{hooks[role].name}' of model "
                f"'{model.id}' is {width} wide. Was it trained on another model?"
            )
    mode = settings.get("normalize_activations", "none")
    # sae_lens scales a transcoder's input, but does not undo it: the output lives elsewhere.
    if mode not in (("none",) if transcoder else HONOURED_NORMALISATIONS):
        raise ValueError(
            f"{what}: normalize_activations '{mode}' can't be honoured. Fold it into the "
            "weights with sae_lens and save again."
        )
    _check_processing(what, metadata.get("model_from_pretrained_kwargs") or {}, model)
    return Sae(
        name,
        folder,
        model.id,
        settings["architecture"],
        hooks["read"],
        hooks["write"],
        settings["d_in"],
        settings["d_sae"],
    )


def _check_processing(what: str, trained_with: dict, model: Model) -> None:
    for key, value in trained_with.items():
        if key in model.processing and model.processing[key] != value:
            raise ValueError(
                f"{what}: trained with {key} = {value}, but model '{model.id}' is loaded with "
                f"{key} = {model.processing[key]}. "
                f"Set models: processing: {{{key}: {str(value).lower()}}}."
            )


def _series(entry: dict, saes: MappingProxyType) -> Series:
    for point in entry["points"]:
        if point["sae"] not in saes:
            raise ValueError(f"Series '{entry['id']}': " + unknown("SAE", point["sae"], saes))
    points = sorted((float(point["at"]), point["sae"]) for point in entry["points"])
    return Series(entry["id"], entry["axis"], tuple(points))
