"""The parts `models`, `saes` and `corpora` of a configuration -> what they name, checked against each other. What the
configuration leaves open comes from the metadata of the SAEs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from pipeline import hub, releases
from pipeline.hooks import READ_SITES, WRITE_SITES, Geometry, Hook, geometry, parse_hook, read_geometry, read_json
from pipeline.registry import unknown

CORPUS_KINDS = (".txt", ".jsonl", ".parquet", ".npy")
# TransformerLens's weight processing; left out by sae_lens unless an SAE's metadata asks for it.
PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed")
# What sequences are where neither the configuration nor an SAE says it.
SEQUENCES = {"context_size": 128, "prepend_bos": True}
# sae_lens applies these inside the forward pass. The others need a dataset statistic that the file does not hold,
# and sae_lens silently leaves them out; a temporal SAE has its own factor.
HONOURED_NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")


@dataclass(frozen=True)
class Model:
    """`source` is where it is loaded from: {"path"}, or {"name", "repo", "commit", "allow_pickle"}."""

    id: str
    source: Mapping
    processing: Mapping
    geometry: Geometry


@dataclass(frozen=True)
class Corpus:
    """`source` is where it is read from: {"path"}, or {"dataset", "commit", "split", "subset"}."""

    id: str
    source: Mapping
    column: str
    context: int
    contexts: int | None
    prepend_bos: bool


@dataclass(frozen=True)
class Sae:
    """An SAE or transcoder: it reads the activation at `read` and predicts the one at `write` (the same for an SAE).
    `source` is {"path"}, or {"release", "sae_id", "repo", "commit"}; `trained` is how, as far as its metadata say."""

    id: str
    source: Mapping
    model: str
    architecture: str
    read: Hook
    write: Hook
    d_in: int
    d_sae: int
    trained: Mapping


# Models.


def model(entry: dict) -> Model:
    """A model's entry; its `processing` is what the entry says, `processed` adds the rest."""
    source, sizes = (_model_folder if "path" in entry else _model_name)(entry, f"Model '{entry['id']}'")
    return Model(entry["id"], MappingProxyType(source), MappingProxyType(entry["processing"]), sizes)


def _model_folder(entry: dict, what: str) -> tuple[dict, Geometry]:
    folder = _existing(entry["path"], what)
    if not folder.is_dir():
        raise ValueError(f"{what}: '{folder}' is a file, expected the Hugging Face folder it is in.")
    for pattern in ("config.json", "*.safetensors", "tokenizer.json"):
        if not any(folder.glob(pattern)):
            pickled = pattern == "*.safetensors" and any(folder.glob("*.bin"))
            if pickled and entry["allow_pickle"]:
                continue
            hint = " Its *.bin is pickled: convert it, or set `allow_pickle: true` if you trust it." if pickled else ""
            message = f"{what}: '{folder}' holds no {pattern}. Expected a Hugging Face folder with safetensors weights."
            raise ValueError(message + hint)
    source = {"path": str(folder)} | ({"allow_pickle": True} if entry["allow_pickle"] else {})
    return source, read_geometry(folder)


def _model_name(entry: dict, what: str) -> tuple[dict, Geometry]:
    name = hub.check_path(what, entry["name"])
    repo = hub.model_names().get(name.lower(), name)
    if repo.startswith(hub.UNSAFE_MODELS):
        raise ValueError(f"{what}: TransformerLens reads '{repo}' by unpickling anything. Use another model.")
    if repo == name and "/" not in name and name.lower() not in hub.model_names():
        raise ValueError(f"{what}: " + hub.nearest("model", name, list(hub.model_names())))
    found = hub.model_files(what, repo, entry.get("revision"))
    hub.check_code(what, repo, found["config"])
    sizes = geometry(found["config"], f"{what}: config.json of '{repo}'")
    return {"name": name, "repo": repo, "commit": found["commit"], "allow_pickle": entry["allow_pickle"]}, sizes


def processed(model: Model, saes: Iterable[Sae]) -> Model:
    """The model with all its weight processing: as the configuration says, else as its SAEs were trained with."""
    saes = [sae for sae in saes if sae.model == model.id]
    found = {}
    for key in PROCESSING:
        advice = f"Say which in models: processing: {{{key}: ...}}."
        trained = None if key in model.processing else agreed(f"Model '{model.id}'", key, saes, advice)
        found[key] = model.processing.get(key, bool(trained))
    return replace(model, processing=MappingProxyType(found))


def agreed(what: str, key: str, saes: Iterable[Sae], advice: str) -> object:
    """What the metadata of the SAEs say; None where they say nothing. ValueError where they disagree."""
    said: dict = {}
    for sae in saes:
        if sae.trained.get(key) is not None:
            said.setdefault(sae.trained[key], []).append(sae.id)
    if len(said) > 1:
        found = ", ".join(f"{key} = {value} ('{ids[0]}' and {len(ids) - 1} others)" for value, ids in said.items())
        raise ValueError(f"{what}: SAEs were trained with {found.replace(' and 0 others', '')}. {advice}")
    return next(iter(said), None)


# Corpora.


def corpus(entry: dict, models: Mapping[str, Model], saes: Iterable[Sae]) -> Corpus:
    """A corpus's entry; contexts and BOS are as the configuration says, else as the SAEs were trained with."""
    what = f"Corpus '{entry['id']}'"
    source = _dataset(entry, what) if "dataset" in entry else _file(entry, what)
    said = {}
    for key, name in (("context", "context_size"), ("prepend_bos", "prepend_bos")):
        trained = None if key in entry else agreed(what, name, saes, f"Say which with `{key}`.")
        said[key] = entry.get(key, SEQUENCES[name] if trained is None else trained)
    for each in models.values():
        if said["context"] > each.geometry.n_ctx:
            raise ValueError(
                f"{what}: contexts of {said['context']} tokens, but model '{each.id}' has "
                f"positions for {each.geometry.n_ctx}. Lower `context`."
            )
    return Corpus(entry["id"], MappingProxyType(source), entry["column"], contexts=entry.get("contexts"), **said)


def _dataset(entry: dict, what: str) -> dict:
    commit = hub.dataset_commit(what, entry["dataset"], entry.get("revision"))
    source = {"dataset": entry["dataset"], "commit": commit, "split": entry["split"]}
    return source | ({"subset": entry["subset"]} if "subset" in entry else {})


def _file(entry: dict, what: str) -> dict:
    path = _existing(entry["path"], what)
    if path.is_dir():
        raise ValueError(f"{what}: '{path}' is a folder, expected a file: {', '.join(CORPUS_KINDS)}.")
    if path.suffix not in CORPUS_KINDS:
        raise ValueError(f"{what}: '{path}' ends in '{path.suffix}'. Known kinds of file: {', '.join(CORPUS_KINDS)}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{what}: '{path}' is empty. It must hold at least one context of text.")
    return {"path": str(path)}


def _existing(path: str, what: str) -> Path:
    if not Path(path).exists():
        raise ValueError(
            f"{what}: '{path}' does not exist (looked from {Path.cwd()}). Correct `path`, or "
            "run in the folder it starts from."
        )
    return Path(path)


# SAEs.


def saes_of(entries: list[dict], models: Mapping[str, Model]) -> list[Sae]:
    """The SAEs of all entries; one of a release may stand for many."""
    entries = [each for entry in entries for each in (releases.expanded(entry) if "release" in entry else [entry])]
    found = releases.described([(entry["release"], entry["sae_id"]) for entry in entries if "release" in entry])
    return [_sae(entry, models, found) for entry in entries]


def _sae(entry: dict, models: Mapping[str, Model], found: Mapping) -> Sae:
    what = f"SAE '{entry['id']}'"
    if "model" not in entry and len(models) > 1:
        raise ValueError(f"{what}: there are {len(models)} models, so say which one with `model`: {', '.join(models)}.")
    chosen = models.get(entry.get("model", next(iter(models))))
    if "release" in entry:
        source, cfg = found[entry["release"], entry["sae_id"]]
        where = f"{what} ('{entry['sae_id']}' of '{entry['release']}')"
    else:
        source, cfg = _sae_folder(entry, what)
        where = f"{what} ({Path(entry['path']) / 'cfg.json'})"
    if chosen is None:
        raise ValueError(f"{what}: " + unknown("model", entry["model"], models))
    if entry["allow_pickle"]:
        source = source | {"allow_pickle": True}
    return _described(entry, where, source, cfg, chosen)


def _sae_folder(entry: dict, what: str) -> tuple[dict, dict]:
    folder = _existing(entry["path"], what)
    weights = "sae.safetensors" if (folder / "sae.safetensors").exists() else "sae_weights.safetensors"
    for name in ("cfg.json", weights):
        if not (folder / name).exists():
            raise ValueError(f"{what}: '{folder}' holds no {name}. Expected a folder that sae_lens has saved.")
    cfg = read_json(folder / "cfg.json")
    # sae_lens 6 keeps metadata apart; what it was before, and sparsify's format, it can translate.
    old = "metadata" not in cfg and (weights == "sae.safetensors" or {"hook_name", "hook_point"} & set(cfg))
    return {"path": str(folder)}, releases.translated(folder) if old else cfg


def _described(entry: dict, what: str, source: Mapping, cfg: dict, model: Model) -> Sae:
    """The SAE that a configuration of sae_lens describes, checked against the model it is used on."""
    missing = [key for key in ("architecture", "d_in", "d_sae") if key not in cfg]
    if missing:
        raise ValueError(
            f"{what} has no {', '.join(map(repr, missing))}. Expected what sae_lens writes; save the SAE again."
        )
    metadata, transcoder = cfg.get("metadata") or {}, "transcoder" in cfg["architecture"]
    names = {"read": entry.get("hook", metadata.get("hook_name"))}
    if not names["read"]:
        raise ValueError(
            f"{what} has no metadata.hook_name. Say where it reads with `hook`, or save it with sae_lens 6."
        )
    names["write"] = entry.get("hook_out", metadata.get("hook_name_out") if transcoder else names["read"])
    hooks = {role: _hook(what, role, name, cfg, model) for role, name in names.items()}
    _check_normalisation(what, cfg)
    trained = {key: (metadata.get("model_from_pretrained_kwargs") or {}).get(key) for key in PROCESSING}
    trained |= {key: metadata.get(key) for key in SEQUENCES}
    return Sae(
        id=entry["id"],
        source=MappingProxyType(dict(source)),
        model=model.id,
        **{key: cfg[key] for key in ("architecture", "d_in", "d_sae")},
        **hooks,
        trained=MappingProxyType(trained),
    )


def _hook(what: str, role: str, name: str | None, cfg: dict, model: Model) -> Hook:
    """A hook of the model, as wide as the SAE."""
    try:
        hook = parse_hook(name, model.geometry.n_layers, {"read": READ_SITES, "write": WRITE_SITES}[role])
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    width = hook.width(model.geometry)
    key = "d_out" if role == "write" and "transcoder" in cfg["architecture"] else "d_in"
    if cfg.get(key) != width:
        raise ValueError(
            f"{what}: {key} is {cfg.get(key)}, but '{hook.name}' of model '{model.id}' is {width} wide. Was it "
            "trained on another model?"
        )
    return hook


def _check_normalisation(what: str, cfg: dict) -> None:
    mode = cfg.get("normalize_activations") or "none"
    honoured = HONOURED_NORMALISATIONS
    if "transcoder" in cfg["architecture"]:
        honoured = ("none",)  # sae_lens scales a transcoder's input, but does not undo it: the output lives elsewhere
    elif cfg["architecture"] == "temporal":
        honoured = (*honoured, "constant_scalar_rescale")
    if mode not in honoured:
        raise ValueError(
            f"{what}: normalize_activations '{mode}' can't be honoured. Fold it into the weights with sae_lens and "
            "save again."
        )
