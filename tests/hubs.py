"""A cache of the Hugging Face Hub made by hand: what a download leaves behind, in huggingface_hub's own layout."""

import hashlib
import json
from pathlib import Path

import pytest
from conftest import DEMO

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER = "fedcba9876543210fedcba9876543210fedcba98"


def offline(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing but this cache from now on, here and in processes that are started. huggingface_hub reads its environment
    when it is imported, so what it took from it is set too."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return home


def repository(
    home: Path,
    repo: str,
    files: dict[str, bytes | str | Path],
    commit: str = COMMIT,
    kind: str = "models",
    ref: str = "main",
) -> Path:
    """A repository at a commit, and a branch that is there; `files` hold a content, or say which file has it."""
    place = home / "hub" / f"{kind}--{repo.replace('/', '--')}"
    snapshot = place / "snapshots" / commit
    for name, content in files.items():
        content = content.read_bytes() if isinstance(content, Path) else content
        content = content.encode() if isinstance(content, str) else content
        blob = place / "blobs" / hashlib.sha256(content).hexdigest()
        for path in (blob, snapshot / name):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        (snapshot / name).unlink(missing_ok=True)
        (snapshot / name).symlink_to(blob)
    (place / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (place / "refs" / ref).write_text(commit)
    return snapshot


def gpt2(home: Path, **changes: bytes | str | Path | None) -> Path:
    """The demo's model under the name of GPT-2; `changes` replace files, or leave them out."""
    files = {path.name: path for path in (DEMO / "model").iterdir()} | {
        name.replace("__", "."): content for name, content in changes.items()
    }
    return repository(home, "gpt2", {name: content for name, content in files.items() if content is not None})


def published(folder: Path, **changes) -> str:
    """The cfg.json of a demo's SAE as sae_lens wrote it when gpt2-small-res-jb was published: flat, no version."""
    cfg = json.loads((folder / "cfg.json").read_text())
    old = {
        "model_name": "gpt2-small",
        "hook_point": cfg["metadata"]["hook_name"],
        "hook_point_layer": int(cfg["metadata"]["hook_name"].split(".")[1]),
        "hook_point_head_index": None,
        "dataset_path": "Skylion007/openwebtext",
        "is_dataset_tokenized": False,
        "context_size": 128,
        "use_cached_activations": False,
        "d_in": cfg["d_in"],
        "d_sae": cfg["d_sae"],
        "dtype": "torch.float32",
        "device": "mps",
        "l1_coefficient": 8e-05,
        "apply_b_dec_to_input": cfg["apply_b_dec_to_input"],
    }
    return json.dumps(old | changes)
