"""Hook points: TransformerLens's names, what they hold, how wide they are. Imports no torch, so that planning can use
it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.registry import unknown

RESIDUAL_SITES = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
WRITE_SITES = (*RESIDUAL_SITES, "hook_attn_out", "attn.hook_z", "hook_mlp_out")
READ_SITES = (*WRITE_SITES, "ln2.hook_normalized")


@dataclass(frozen=True)
class Geometry:
    """Sizes of a decoder, in numbers of layers, heads, dimensions, positions and tokens."""

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    n_ctx: int
    d_vocab: int
    d_mlp: int = 0
    # Whether attention and MLP read the same stream, side by side: then there is no stream between them.
    parallel: bool = False


@dataclass(frozen=True)
class Hook:
    """A hook point of one block, such as layer 6, site `hook_resid_pre`."""

    layer: int
    site: str

    @property
    def name(self) -> str:
        return f"blocks.{self.layer}.{self.site}"

    @property
    def short(self) -> str:
        """For file names and axes: `6.resid_pre`, `3.z`, `3.mlp_in`."""
        site = {"attn.hook_z": "z", "ln2.hook_normalized": "mlp_in"}.get(self.site, self.site.removeprefix("hook_"))
        return f"{self.layer}.{site}"

    def width(self, geometry: Geometry) -> int:
        """Length of the activation vector of one token; the heads of `hook_z` are laid side by side."""
        return geometry.n_heads * geometry.d_head if self.site == "attn.hook_z" else geometry.d_model


def parse_hook(name: str, n_layers: int | None = None, sites: tuple[str, ...] = READ_SITES) -> Hook:
    """`blocks.6.hook_resid_pre` -> Hook(6, 'hook_resid_pre').

    Raises ValueError for a name of another form, for a site that is not in `sites`, and for a layer beyond the model's
    where its number of layers is given.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.([\w.]+)", str(name))
    if match is None or match[2] not in sites:
        raise ValueError(unknown("hook", name, [f"blocks.N.{site}" for site in sites]))
    if n_layers is not None and int(match[1]) >= n_layers:
        raise ValueError(f"Hook '{name}' is at layer {match[1]}, but the model has layers 0 to {n_layers - 1}.")
    return Hook(int(match[1]), match[2])


def read_json(path: Path) -> dict:
    """A JSON object from a file. ValueError names the file where it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON: {error}. Copy, download or save it again.") from None
    if not isinstance(value, dict):
        raise ValueError(f"'{path}' holds a JSON {type(value).__name__}, expected an object. Copy or save it again.")
    return value


# The names under which Hugging Face configurations keep the same number.
_GEOMETRY_KEYS = {
    "n_layers": ("num_hidden_layers", "n_layer"),
    "d_model": ("hidden_size", "n_embd"),
    "n_heads": ("num_attention_heads", "n_head"),
    "n_ctx": ("max_position_embeddings", "n_positions"),
    "d_vocab": ("vocab_size",),
    "d_head": ("head_dim",),
    "d_mlp": ("intermediate_size", "n_inner"),
}
# Those that follow from the others where they are left out.
OPTIONAL = ("d_head", "d_mlp")


def read_geometry(folder: Path) -> Geometry:
    """Sizes of the model in a local Hugging Face folder, from its config.json. ValueError where one is missing."""
    return geometry(read_json(folder / "config.json"), str(folder / "config.json"))


def geometry(settings: dict, where: str) -> Geometry:
    """Sizes of a model from what its config.json holds. ValueError where one is missing."""
    sizes = {}
    for size, keys in _GEOMETRY_KEYS.items():
        given = [key for key in keys if settings.get(key) is not None]
        if not given:
            if size in OPTIONAL:
                continue
            raise ValueError(
                f"{where} has none of {' / '.join(keys)}: expected a Hugging Face decoder's configuration."
            )
        sizes[size] = settings[given[0]]
        if type(sizes[size]) is not int or sizes[size] < 1:
            found = f"{given[0]} is {sizes[size]!r}"
            raise ValueError(f"{where}: {found}, expected a whole number above 0. Correct the file.")
    sizes.setdefault("d_head", sizes["d_model"] // sizes["n_heads"])
    sizes.setdefault("d_mlp", 4 * sizes["d_model"])
    return Geometry(**sizes, parallel=_is_parallel(settings))


def _is_parallel(settings: dict) -> bool:
    """Whether a Hugging Face configuration is of a decoder with parallel attention and MLP."""
    kind = settings.get("model_type")
    if kind == "gpt_neox":
        return settings.get("use_parallel_residual", True)
    return kind in ("gptj", "phi") or bool(settings.get("parallel_attn") or settings.get("new_decoder_architecture"))
