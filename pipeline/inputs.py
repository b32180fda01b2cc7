"""The parts `models`, `saes` and `corpora` of a configuration -> what they name, checked against each other. What the
configuration leaves open comes from the metadata of the SAEs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from pipeline import corpora, headers, hub, releases
from pipeline.hooks import READ_SITES, WRITE_SITES, Geometry, Hook, geometry, parse_hook, read_json
from pipeline.registry import unknown

CORPUS_KINDS = (".txt", ".jsonl", ".parquet", ".npy")
# TransformerLens's weight processing; left out by sae_lens unless an SAE's metadata asks for it.
PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed")
# What sequences are where neither the configuration nor an SAE says it.
SEQUENCES = {"context_size": 128, "prepend_bos": True}
# sae_lens applies these inside the forward pass. The others need a dataset statistic that the file does not hold,
# and sae_lens silently leaves them out; a temporal SAE has its own factor.
HONOURED_NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")

# The tensors of the architectures of sae_lens, and which sizes their axes have; a transcoder writes `d_out`.
_DECODER = (("W_dec", ("d_sae", "d_out")), ("b_dec", ("d_out",)))
_ENCODER = (("W_enc", ("d_in", "d_sae")), ("b_enc", ("d_sae",)))
_THRESHOLD, _SKIP = (("threshold", ("d_sae",)),), (("W_skip", ("d_out", "d_in")),)
_GATES = tuple((name, ("d_sae",)) for name in ("b_gate", "b_mag", "r_mag"))
TENSORS = dict.fromkeys(("standard", "topk", "abstopk", "transcoder"), (*_ENCODER, *_DECODER))
TENSORS |= dict.fromkeys(("jumprelu", "jumprelu_transcoder"), (*_ENCODER, *_THRESHOLD, *_DECODER))
TENSORS |= {"skip_transcoder": (*_ENCODER, *_SKIP, *_DECODER), "gated": (_ENCODER[0], *_GATES, *_DECODER)}
TENSORS |= {"jumprelu_skip_transcoder": (*TENSORS["jumprelu"], *_SKIP)}
TENSORS |= dict.fromkeys(("matching_pursuit", "temporal"), _DECODER)
# Those of sparsify, by either name; biases may be missing.
SPARSIFY = (("W_enc", "encoder.weight"), ("W_dec", "decoder.weight"))
KINDS = {str: "text", int: "a whole number above 0", bool: "true or false", dict: "an object"}


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
    settings, where = _json(folder / "config.json", what), f"{what}: '{folder / 'config.json'}'"
    check_architecture(where, settings)
    _check_model_files(folder, what)
    return source, geometry(settings, where)


def check_architecture(where: str, settings: dict) -> None:
    """That TransformerLens can read a folder with this config.json, as far as it says."""
    found, known = settings.get("architectures"), hub.architectures()
    if not (isinstance(found, list) and found and found[0] in known):
        raise ValueError(
            f"{where}: its architecture is {found!r}, which TransformerLens can't read from a folder. "
            f"Expected one of {', '.join(known)}. A model that it knows can be given by `name`."
        )
    if found[0] == "GPT2LMHeadModel" and "n_ctx" not in settings:  # transformers 5 leaves it out
        length = settings.get("n_positions", 1024)
        raise ValueError(f'{where} lacks the key n_ctx, which TransformerLens needs. Add "n_ctx": {length}.')


def _check_model_files(folder: Path, what: str) -> None:
    """That weights and tokenizer are there and whole."""
    index = folder / "model.safetensors.index.json"
    parts = _json(index, what).get("weight_map", {}).values() if index.exists() else ()
    for name in sorted(set(parts)):
        if not (folder / name).exists():
            raise ValueError(f"{what}: '{folder}' holds no {name}, which {index.name} names. Copy or download it too.")
    for path in folder.glob("*.safetensors"):
        _tensors(path, what)
    with open(folder / "tokenizer.json", "rb") as file:
        begin, size = file.read(1), file.seek(0, 2)
        file.seek(max(0, size - 8))
        if begin != b"{" or not file.read().rstrip().endswith(b"}"):
            raise ValueError(f"{what}: '{file.name}' is no JSON, or cut short. Copy or download it again.")


def _json(path: Path, what: str) -> dict:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _tensors(path: Path, what: str) -> Mapping[str, headers.Stored]:
    try:
        return headers.tensors(path)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _model_name(entry: dict, what: str) -> tuple[dict, Geometry]:
    name = hub.check_path(what, entry["name"])
    repo = hub.model_names().get(name.lower(), name)
    if repo.startswith(hub.UNSAFE_MODELS):
        raise ValueError(f"{what}: TransformerLens reads '{repo}' by unpickling anything. Use another model.")
    if repo == name and "/" not in name and name.lower() not in hub.model_names():
        raise ValueError(f"{what}: " + hub.nearest("model", name, list(hub.model_names())))
    found = hub.model_files(what, repo, entry.get("revision"))
    hub.check_code(what, repo, found["config"])
    where = f"{what}: config.json of '{repo}'"
    if name.lower() not in hub.model_names():
        check_architecture(where, found["config"])
    sizes = geometry(found["config"], where)
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
    if "path" in source:
        _check_length(what, Path(source["path"]), contexts=entry.get("contexts"), **said)
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
    try:
        corpora.check(path, entry["column"])
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    return {"path": str(path)}


def _check_length(what: str, path: Path, context: int, contexts: int | None, prepend_bos: bool) -> None:
    """That a file can be long enough: no token is shorter than a byte."""
    size, wanted = path.stat().st_size, contexts or 1
    needed = wanted * (context - prepend_bos)
    if path.suffix in (".txt", ".jsonl") and size + 2 < needed:
        raise ValueError(
            f"{what}: '{path}' has {size} bytes, too few for {wanted} contexts of {context} tokens, which are at least "
            f"{needed} bytes. Use a longer text, or lower `context` or `contexts`."
        )


def check_ready_tokens(corpus: Corpus, model: Model) -> None:
    """That the token ids of an .npy file fit the contexts and the model's vocabulary."""
    path = Path(corpus.source.get("path", ""))
    if path.suffix != ".npy":
        return
    try:
        found = corpora.ready_tokens(path, corpus.context, model.geometry.d_vocab)
    except ValueError as error:
        raise ValueError(f"Corpus '{corpus.id}', model '{model.id}': {error}") from None
    if len(found) < (corpus.contexts or 1):
        raise ValueError(
            f"Corpus '{corpus.id}': '{path}' holds {len(found)} contexts, but {corpus.contexts or 'at least 1'} are "
            "wanted. Lower `contexts`, or use a longer file."
        )


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
    if "model" not in entry:
        _check_trained_on(where, cfg, chosen)
    if entry["allow_pickle"]:
        source = source | {"allow_pickle": True}
    return _described(entry, where, source, cfg, chosen)


def _check_trained_on(where: str, cfg: dict, model: Model) -> None:
    """That an SAE which does not say `model` was not trained on another model that TransformerLens knows."""
    name, repo = (cfg.get("metadata") or {}).get("model_name"), model.source.get("repo")
    trained = hub.model_names().get(name.lower()) if isinstance(name, str) and repo else None
    if trained and trained.lower() != repo.lower():
        raise ValueError(
            f"{where}: its metadata say that it was trained on '{name}', but model '{model.id}' is '{repo}'. Add the "
            f"other model, or say `model: {model.id}` in this entry if you mean it."
        )


def _sae_folder(entry: dict, what: str) -> tuple[dict, dict]:
    folder = _existing(entry["path"], what)
    if not folder.is_dir():
        raise ValueError(f"{what}: '{folder}' is a file, expected the folder that sae_lens has saved.")
    weights = "sae.safetensors" if (folder / "sae.safetensors").exists() else "sae_weights.safetensors"
    for name in ("cfg.json", weights):
        if not (folder / name).exists():
            pickled = sorted(path.name for kind in ("*.pt", "*.pth", "*.bin", "*.pkl") for path in folder.glob(kind))
            hint = f" Its {pickled[0]} is pickled: save the SAE with sae_lens." if pickled and name == weights else ""
            raise ValueError(f"{what}: '{folder}' holds no {name}. Expected a folder that sae_lens has saved.{hint}")
    cfg = _json(folder / "cfg.json", what)
    # sae_lens 6 keeps metadata apart; what it was before, and sparsify's format, it can translate.
    old = "metadata" not in cfg and (weights == "sae.safetensors" or {"hook_name", "hook_point"} & set(cfg))
    cfg = releases.translated(folder) if old else cfg
    _check_cfg(f"{what} ({folder / 'cfg.json'})", cfg)
    _check_weights(folder / weights, cfg, what)
    return {"path": str(folder)}, cfg


def _check_cfg(where: str, cfg: dict) -> None:
    """That a cfg.json holds what sae_lens writes, of the right kinds."""
    metadata = cfg.get("metadata") or {}
    kinds = {"architecture": str, "d_in": int, "d_sae": int}
    kinds |= {"d_out": int} if "transcoder" in str(cfg.get("architecture")) else {}
    if missing := [key for key in kinds if key not in cfg]:
        raise ValueError(
            f"{where} has no {', '.join(map(repr, missing))}. Expected what sae_lens writes; save the SAE again."
        )
    said = {name: (cfg[name], kind) for name, kind in kinds.items()} | {"metadata": (metadata, dict)}
    if isinstance(metadata, dict):
        kwargs = metadata.get("model_from_pretrained_kwargs") or {}
        said["metadata.model_from_pretrained_kwargs"] = kwargs, dict
        optional = {name: (metadata.get(name), type(value)) for name, value in SEQUENCES.items()}
        optional |= {name: (kwargs.get(name), bool) for name in PROCESSING if isinstance(kwargs, dict)}
        said |= {f"metadata.{name}": (value, kind) for name, (value, kind) in optional.items() if value is not None}
    for name, (value, kind) in said.items():
        if type(value) is not kind or (kind is int and value < 1):
            raise ValueError(f"{where}: {name} is {value!r}, expected {KINDS[kind]}. Correct it, or save it again.")
    if cfg["architecture"] not in TENSORS:
        raise ValueError(
            f"{where}: {unknown('architecture', cfg['architecture'], TENSORS)} Others, such as batchtopk, are those of "
            "training: save the SAE with `save_inference_model`."
        )


def _check_weights(path: Path, cfg: dict, what: str) -> None:
    """That the weights are there, as large as cfg.json says, and numbers."""
    found, architecture = _tensors(path, what), cfg["architecture"]
    if path.name == "sae.safetensors":
        missing = [" or ".join(names) for names in SPARSIFY if not set(names) & set(found)]
        expected = {}
    else:
        sizes = cfg if "transcoder" in architecture else cfg | {"d_out": cfg["d_in"]}
        expected = {name: tuple(sizes[axis] for axis in axes) for name, axes in TENSORS[architecture]}
        missing = sorted(set(expected) - set(found))
    if missing:
        raise ValueError(
            f"{what}: '{path}' has no {', '.join(missing)}, which an SAE of architecture '{architecture}' consists of; "
            f"found {', '.join(sorted(found)) or 'nothing'}. Save the SAE again."
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{what}: {name} in '{path}' has the shape {list(found[name].shape)}, but by cfg.json it is "
                f"{list(shape)}. Are the two files of one SAE? Save it again."
            )
    try:
        headers.check_finite(path, found)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _described(entry: dict, what: str, source: Mapping, cfg: dict, model: Model) -> Sae:
    """The SAE that a configuration of sae_lens describes, checked against the model it is used on."""
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
        raise ValueError(f"{what}: {error} Correct `hook`, or use the model that it was trained on.") from None
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
