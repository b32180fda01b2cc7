"""Folders that look like a model, an SAE and a corpus as far as planning reads them, and studies of them."""

import json
import re
from copy import deepcopy
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from pipeline.inputs import TENSORS

ROOT = Path(__file__).parent.parent
HOOK = "blocks.1.hook_resid_pre"
# Heads narrower than d_model / n_head, so that `hook_z` (8 wide) can't be taken for the residual stream (16 wide).
SIZES = {"n_layer": 3, "n_embd": 16, "n_head": 2, "head_dim": 4, "n_positions": 32, "vocab_size": 50}
SIZES |= {"n_ctx": 32, "architectures": ["GPT2LMHeadModel"]}
TEXT = "There was a king with twelve daughters. " * 60


def model(folder: Path, **sizes) -> str:
    """A Hugging Face folder of the SIZES, changed by `sizes`; of its weights there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SIZES | sizes))
    safetensors(folder / "model.safetensors", {"wte.weight": (50, 16)})
    (folder / "tokenizer.json").write_text("{}")
    return str(folder)


def sae(folder: Path, hook: str = HOOK, hook_out: str | None = None, kwargs: dict | None = None, **settings) -> str:
    """A folder as sae_lens saves it; a transcoder where `hook_out` is given."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"hook_name": hook, "hook_name_out": hook_out, "model_from_pretrained_kwargs": kwargs or {}}
    kind = {"architecture": "transcoder", "d_out": 16} if hook_out else {"architecture": "topk"}
    cfg = {"d_in": 16, "d_sae": 64, "normalize_activations": "none", "metadata": metadata} | kind | settings
    (folder / "cfg.json").write_text(json.dumps(cfg))
    sizes = cfg | ({} if hook_out else {"d_out": cfg["d_in"]})
    shapes = {name: tuple(sizes[axis] for axis in axes) for name, axes in TENSORS[cfg["architecture"]]}
    safetensors(folder / "sae_weights.safetensors", shapes, folder.name)
    return str(folder)


def safetensors(path: Path, shapes: dict[str, tuple[int, ...]], note: str = "", value: float = 0) -> None:
    """A file of float32 tensors that all hold one value; another note makes another content."""
    tensors = {name: np.full(shape, value, np.float32) for name, shape in shapes.items()}
    save_file(tensors, path, metadata={"note": note})


def study(folder: Path) -> dict:
    """A correct configuration: a model, a corpus, SAEs at two layers, an experiment with every kind of intervention."""
    corpus = folder / "story.txt"
    corpus.write_text(TEXT)
    return {
        "models": [{"id": "tiny", "path": model(folder / "tiny")}],
        "corpora": [{"id": "story", "path": str(corpus), "context": 16}],
        "saes": [
            {"id": "early", "path": sae(folder / "early")},
            {"id": "late", "path": sae(folder / "late", hook="blocks.2.hook_resid_pre")},
        ],
        "experiments": [{"id": "main", "interventions": ["identity", "sae", "eps_random", "zero", "mean"]}],
    }


PAIR = ["sae", "eps_random"]


def every_kind(folder: Path) -> dict:
    """A correct configuration with an experiment of every kind, a transcoder, and a series."""
    given = study(folder) | {"experiments": experiments(), "bootstrap": {"samples": 100}}
    given["corpora"][0]["contexts"] = 40
    hooks = {"hook": "blocks.2.ln2.hook_normalized", "hook_out": "blocks.2.hook_mlp_out"}
    given["saes"].append({"id": "coder", "path": sae(folder / "coder", **hooks)})
    points = [{"at": 10, "sae": "early"}, {"at": 20, "sae": "late"}]
    given["series"] = [{"id": "training", "axis": "training steps", "points": points}]
    return given


def everything(folder: Path) -> dict:
    """A correct configuration: all of `every_kind`, an atlas of streams and heads, a calibration of its own beside a
    published one, and two families of SAEs."""
    families = [{"id": "one", "saes": ["early"]}, {"id": "two", "saes": ["late"]}]
    metrics = {"calibrations": ["kaplan", calibration(folder / "own.csv")], "families": families}
    return every_kind(folder) | {"atlas": deepcopy(ATLAS), "metrics": metrics}


ATLAS = {"components": ["resid_pre", "z"], "layers": [0, 2], "contexts": 16}


def calibration(path: Path, floor: float = 1) -> str:
    """A law of one's own."""
    head = ["# kind: law", "# source: s", "# corpus: c", "# lowest_flop: none", "# highest_flop: none"]
    path.write_text("\n".join([*head, "parameter,value", "scale_flop,1e20", "exponent,0.1", f"floor,{floor}\n"]))
    return str(path)


def alone(given: dict, *entries: dict, **changes) -> dict:
    """A copy of a configuration with these experiments alone: no atlas, no series and no families, that need others."""
    metrics = {name: value for name, value in given.get("metrics", {}).items() if name != "families"}
    rest = {name: value for name, value in given.items() if name != "atlas"}
    return deepcopy(rest | {"experiments": list(entries), "series": [], "metrics": metrics} | changes)


def of_kind(given: dict, kind: str) -> dict:
    """`everything` with one kind of experiment alone; the `atlas` is one, and so is `main` with its `families`."""
    named = {entry["id"]: entry for entry in given["experiments"]}
    if kind == "atlas":
        return alone(given, atlas=given["atlas"])
    return alone(given, named["main"], metrics=given["metrics"]) if kind == "families" else alone(given, named[kind])


def experiments() -> list[dict]:
    """One of every kind."""
    dose = ["error_scaled", "eps_random_scaled", "theta_random_at", "theta_error_at"]
    return [
        {"id": "main", "interventions": ["identity", *PAIR, "zero", "mean"], "examples": 2, "curvature": 8},
        {"id": "ladder", "saes": ["early"], "interventions": [*PAIR, "act_cov_random", "shuffled_error"], "draws": 2},
        {"id": "dark", "saes": ["early"], "interventions": ["sae", "linear_error_restored"]},
        {"id": "dose", "saes": ["early"], "interventions": dose, "alphas": [0.5, 1], "cosines": [0.9]},
        {"id": "single", "scope": "single", "interventions": [*PAIR, "zero"], "positions": [4], "horizon": 8},
        {"id": "draws", "scope": "draws", "saes": ["early"], "interventions": PAIR, "positions": [4], "draws": 8},
        {"id": "together", "scope": "compound", "saes": ["early", "late"], "interventions": PAIR, "contexts": 16},
    ]


def in_order(parts: str) -> str:
    """A pattern for a message that has these parts, which are between dots, one after the other."""
    return "(?s)" + ".*".join(map(re.escape, parts.split(" … ")))
