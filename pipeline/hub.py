"""Names of the Hugging Face Hub -> commits and files in its cache, and what was found there, remembered in
results/sources. Imports no torch, so that planning can use it."""

import ast
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from pipeline import fingerprint, store
from pipeline.hooks import read_json

SOURCES = Path("results/sources")
# Their weights are read by TransformerLens with `torch.load(weights_only=False)`, which runs what is in them.
UNSAFE_MODELS = ("NeelNanda", "ArthurConmy", "Baidicoot")
# For these TransformerLens sets `trust_remote_code`, whatever it is asked for (its NEED_REMOTE_CODE_MODELS).
TRUSTED_MODELS = (
    *("bigcode/santacoder", "Qwen/Qwen-", "Qwen/Qwen3-", "microsoft/phi-2", "microsoft/phi-4"),
    *("apple/OpenELM", "openai/gpt-oss-", "swiss-ai/Apertus-"),
)
# The files that say how text becomes tokens, and which tokens are special.
TOKENIZER = ("config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt")


def commit_of(repo: str, revision: str | None = None, kind: str = "model") -> str:
    """The commit that a revision (none: the main branch) is at; without a network, the one in the cache."""
    from huggingface_hub import snapshot_download

    with explained(f"'{repo}'" + (f" at '{revision}'" if revision else "")):
        # Downloads no file: nothing has that name.
        return Path(snapshot_download(repo, revision=revision, repo_type=kind, allow_patterns="/")).name


def cached_commit(repo: str) -> str:
    """The commit of the main branch as the cache has it, which is what a library that takes no revision reads."""
    from huggingface_hub import snapshot_download

    with explained(f"'{repo}'"):
        return Path(snapshot_download(repo, allow_patterns="/", local_files_only=True)).name


def folder(repo: str, commit: str, files: tuple[str, ...], kind: str = "model") -> Path:
    """The folder of the cache that holds the files of a commit whose names match; what is missing is downloaded."""
    from huggingface_hub import snapshot_download

    with explained(f"'{repo}' at {commit}"):
        return Path(snapshot_download(repo, revision=commit, repo_type=kind, allow_patterns=list(files)))


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Errors of the hub as a ValueError that says what to do."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ValueError(f"{what}: {_first_line(error)} Ask for access on its page, and set HF_TOKEN.") from None
    except errors.RepositoryNotFoundError as error:
        message = f"{what}: the hub has no such repository, or it is private: {_first_line(error)}"
        raise ValueError(f"{message} Correct the name, or set HF_TOKEN.") from None
    except (errors.EntryNotFoundError, errors.RevisionNotFoundError) as error:
        if not isinstance(error, errors.LocalEntryNotFoundError):
            raise ValueError(f"{what}: {_first_line(error)} Correct the name or the revision.") from None
        raise ValueError(_offline(what, constants.HF_HUB_CACHE)) from None
    except errors.HFValidationError as error:
        raise ValueError(f"{what} is no name of a repository: {_first_line(error)}") from None
    except (errors.OfflineModeIsEnabled, OSError):
        raise ValueError(_offline(what, constants.HF_HUB_CACHE)) from None


def _offline(what: str, place: str) -> str:
    return (
        f"{what} is not in the cache ({place}), and the hub can't be reached. Correct the name, run once where there "
        "is a network, or set HF_HOME to a cache that has it."
    )


def _first_line(error: Exception) -> str:
    """An error's message, in a line of its own words."""
    text = " ".join(line for line in str(error).splitlines() if line.strip() and "Request ID" not in line)
    return text[:300].rstrip(".") + "."


def nearest(kind: str, name: str, known: list[str], advice: str = "") -> str:
    """The message for one of very many names: what was found and which are near it."""
    words = [each for each in known if name.lower() in each.lower()]
    close = list(dict.fromkeys([*get_close_matches(name, known, n=4, cutoff=0.5), *words[:4]]))[:6]
    near = f" Near it: {', '.join(close)}." if close else f" There are {len(known)}, none near it."
    return f"Unknown {kind} '{name}'.{near}{advice}"


def check_path(what: str, name: str) -> str:
    """The name again. ValueError where it could lead out of the repository or the folder that it is a part of."""
    parts = re.split(r"[/\\]", name)
    if not name or "" in parts or {".", ".."} & set(parts) or "\\" in name or not name.isprintable():
        raise ValueError(f"{what}: {name!r} leads out of its place. Use a relative path without '..'.")
    return name


def model_files(what: str, repo: str, revision: str | None) -> dict:
    """The commit of a model's repository, and its config.json; remembered from the first time on."""
    place = remembered("model", repo, revision or "main")
    if found := recall(place):
        return found
    try:
        commit = commit_of(repo, revision)
        config = folder(repo, commit, ("config.json",)) / "config.json"
        if not config.exists():
            raise ValueError(f"'{repo}' at {commit} has no config.json, at least not in the cache.")
        return remember(place, {"repo": repo, "commit": commit, "config": read_json(config)})
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def dataset_commit(what: str, repo: str, revision: str | None) -> str:
    """The commit of a dataset; remembered from the first time on."""
    place = remembered("dataset", repo, revision or "main")
    if found := recall(place):
        return found["commit"]
    try:
        commit = commit_of(repo, revision, "dataset")
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    return remember(place, {"dataset": repo, "revision": revision or "main", "commit": commit})["commit"]


def check_code(what: str, repo: str, config: dict) -> None:
    """That loading a model runs no code of its repository."""
    if "auto_map" in config and repo.startswith(TRUSTED_MODELS):
        raise ValueError(
            f"{what}: '{repo}' comes with code of its own, and TransformerLens would run it. That is never allowed; "
            "use a model that transformers has itself."
        )


def refuse_forced_unpickling() -> None:
    """torch reads only tensors out of a pickle, unless an environment variable tells it to run what is in it."""
    name = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    if os.environ.get(name, "0").lower() not in ("0", "", "false", "n", "no"):
        raise ValueError(f"{name} is set, which lets weights run code. Unset it, and run again.")


def tokenizer(settings: dict) -> Path:
    """The folder of a model's tokenizer, from a job's settings."""
    if "tokenizer_commit" not in settings:
        return Path(settings["tokenizer"])
    return folder(settings["tokenizer"], settings["tokenizer_commit"], TOKENIZER)


@cache
def model_names() -> dict[str, str]:
    """The names that TransformerLens knows, in lower case -> the repository. Read from its source: importing it takes
    15 seconds."""
    found = importlib.util.find_spec("transformer_lens")
    source = Path(found.origin).with_name("supported_models.py").read_text(encoding="utf-8")
    values = {}
    for node in ast.parse(source).body:
        target = getattr(node, "target", None) or getattr(node, "targets", [None])[0]
        if getattr(target, "id", None) in ("OFFICIAL_MODEL_NAMES", "MODEL_ALIASES"):
            values[target.id] = ast.literal_eval(node.value)
    names = {alias: repo for repo, aliases in values["MODEL_ALIASES"].items() for alias in aliases}
    return {name.lower(): repo for name, repo in (names | {n: n for n in values["OFFICIAL_MODEL_NAMES"]}).items()}


@cache
def architectures() -> tuple[str, ...]:
    """The decoders that TransformerLens reads from a folder, by Hugging Face's names; those that it takes by the name
    of the model alone are not among them. Read from its source, as the names are."""
    found = importlib.util.find_spec("transformer_lens")
    source = Path(found.origin).with_name("loading_from_pretrained.py").read_text(encoding="utf-8")
    (reader,) = [node for node in ast.parse(source).body if getattr(node, "name", None) == "convert_hf_model_config"]
    compared = [
        part.value
        for node in ast.walk(reader)
        if isinstance(node, ast.Compare) and getattr(node.left, "id", None) == "architecture"
        for part in ast.walk(node.comparators[0])
        if isinstance(part, ast.Constant)
    ]
    # Others are no decoders, or need code of their repository.
    return tuple(sorted({name for name in compared if "ForCausalLM" in name or name == "GPT2LMHeadModel"}))


def remembered(kind: str, *name: str) -> Path:
    """The file in which what was found under a name is kept."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(name)).strip("-")[:80]
    return SOURCES / f"{kind}-{readable}-{fingerprint.digest(list(name))[:6]}.json"


def recall(path: Path) -> dict | None:
    """What was written there; None where there is nothing, or nothing that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def remember(path: Path, value: dict) -> dict:
    path.parent.mkdir(parents=True, exist_ok=True)
    store.write_text(path, json.dumps(value, indent=1) + "\n")
    return value
