"""Releases of SAEs that sae_lens knows by name: which SAEs there are, and what sae_lens says of them. Reads sae_lens's
own list; sae_lens itself, which takes seconds to import, is asked in a process of its own, once for a new SAE."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import version
from pathlib import Path

import yaml

from pipeline import fingerprint, hub

# The converters of sae_lens that unpickle what they download (`torch.load`).
PICKLED = ("connor_rob_hook_z", "deepseek_r1", "dictionary_learning_1", "goodfire", "qwen_scope")
# A cross-layer transcoder as sae_lens loads it: all its decoders in one sum, which reconstructs nothing.
SUMMED = "mntss_clt_layer_transcoder"


def expanded(entry: dict) -> list[dict]:
    """An entry of `saes` that names a release -> one for each SAE, with its `id` and `sae_id`."""
    names = _chosen(entry)
    _check_loadable(entry, names)
    kept = {key: value for key, value in entry.items() if key not in ("id", "sae_id", "sae_ids", "layers")}
    if "sae_id" in entry:
        return [kept | {"id": entry.get("id", _id(entry["release"], names[0])), "sae_id": names[0]}]
    ids = [_id(entry.get("id", entry["release"]), name) for name in names]
    again = {each for each in ids if ids.count(each) > 1}
    return [
        kept | {"id": f"{each}-{fingerprint.digest(name)[:6]}" if each in again else each, "sae_id": name}
        for each, name in zip(ids, names, strict=True)
    ]


def _id(prefix: str, sae_id: str) -> str:
    """A name for files out of those of the release and the SAE."""
    name = re.sub(r"[^A-Za-z0-9_+.-]+", "-", f"{prefix}-{sae_id}")
    return re.sub(r"[.]{2,}|[.](?=-)|(?<=-)[.]", "-", name).strip("-.")


def _chosen(entry: dict) -> list[str]:
    """The ids of the SAEs that an entry takes of its release, in the release's order."""
    release, known = entry["release"], release_of(entry["release"])["saes"]
    what = f"SAEs of '{release}'"
    wanted = entry.get("sae_id", entry.get("sae_ids", "*"))
    patterns = [wanted] if isinstance(wanted, str) else wanted
    if known is None:
        if {"*", "?", "["} & set("".join(patterns)):
            raise ValueError(f"{what}: sae_lens has no list of this repository. Name each of its SAEs with `sae_ids`.")
        return [hub.check_path(what, each) for each in patterns]
    found = []
    for pattern in patterns:
        matching = [pattern] if pattern in known else [each for each in known if fnmatchcase(each, pattern)]
        if not matching or ("sae_id" in entry and pattern not in known):
            raise ValueError(f"{what}: " + hub.nearest("SAE", pattern, list(known)))
        found += matching
    found = list(dict.fromkeys(found))
    return found if "layers" not in entry else _at_layers(what, found, entry["layers"], "sae_ids" in entry)


def layers_of(value: int | str | list[int]) -> list[int]:
    """`6`, `[0, 6]` or `0-11` -> the layers."""
    if isinstance(value, str):
        first, last = map(int, value.split("-"))
        return list(range(first, last + 1))
    return value if isinstance(value, list) else [value]


def layer_of(sae_id: str) -> int | None:
    """The layer that an id of a release names; None where it names none."""
    match = re.search(r"(?:blocks\.|layers?[_.]?|(?<![A-Za-z])[lL])(\d+)", sae_id)
    return int(match[1]) if match else None


def _at_layers(what: str, names: list[str], layers: int | str | list[int], chosen: bool) -> list[str]:
    found = []
    for layer in layers_of(layers):
        here = [name for name in names if layer_of(name) == layer]
        if not here:
            there = sorted({layer for layer in map(layer_of, names) if layer is not None})
            raise ValueError(f"{what}: there is none at layer {layer}, only at {', '.join(map(str, there)) or 'none'}.")
        if len(here) > 1 and not chosen:
            raise ValueError(
                f"{what}: at layer {layer} there are {len(here)}: {', '.join(here[:8])}. Say which with a pattern, "
                f'such as `sae_ids: "{here[0].replace(str(layer), "*", 1)}"`.'
            )
        found += here
    return found


def _check_loadable(entry: dict, names: list[str]) -> None:
    """That the format of a release can be loaded, and is safe to load."""
    release, what = release_of(entry["release"]), f"SAEs of '{entry['release']}'"
    if release["loader"] == SUMMED or any("clt" in (release["saes"] or {}).get(name, "") for name in names):
        raise ValueError(
            f"{what}: these are cross-layer transcoders. sae_lens adds up their decoders, good for features alone, so "
            "there is no reconstruction to measure. Leave them out."
        )
    if release["loader"] in PICKLED and not entry["allow_pickle"]:
        raise ValueError(
            f"{what}: its weights are pickled, which is refused by default. If you trust '{release['repo']}', set "
            "`allow_pickle: true` in this entry; torch then reads them with weights_only."
        )


def release_of(name: str) -> dict:
    """A release: its repository, converter and SAEs (id -> place in the repository); a repository that is no release
    is sae_lens's own format, and its SAEs are not known."""
    place = hub.remembered("release", name, version("sae-lens"))
    return hub.recall(place) or hub.remember(place, _listed(name))


def _listed(name: str) -> dict:
    known = _directory()
    if name in known:
        return known[name]
    if "/" not in name:
        raise ValueError("`saes`: " + hub.nearest("release", name, list(known)))
    return {"repo": hub.check_path("`saes`", name), "loader": None, "saes": None}


@cache
def _directory() -> dict[str, dict]:
    """All releases of the installed sae_lens, from its own list."""
    place = Path(importlib.util.find_spec("sae_lens").origin).with_name("pretrained_saes.yaml")
    with open(place, encoding="utf-8") as file:
        listed = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {
        name: {
            "repo": release["repo_id"],
            "loader": release.get("conversion_func"),
            "saes": {sae["id"]: str(sae["path"]) for sae in release["saes"]},
        }
        for name, release in listed.items()
    }


def described(wanted: Iterable[tuple[str, str]]) -> Mapping[tuple[str, str], tuple[dict, dict]]:
    """(release, SAE) -> where it is loaded from, and its configuration as sae_lens reads it. What was found is
    remembered with its commit, so that a later plan needs neither sae_lens nor a network."""
    found, new = {}, {}
    for release, sae_id in dict.fromkeys(wanted):
        record = hub.recall(_place(release)) or {"saes": {}}
        if sae_id in record["saes"]:
            source = {"release": release, "sae_id": sae_id, "repo": record["repo"], "commit": record["commit"]}
            found[release, sae_id] = source, record["saes"][sae_id]
        else:
            new.setdefault(release, []).append(sae_id)
    if not new:
        return found
    for release, answer in _ask(new).items():
        _add(release, answer)
    return found | described((release, sae_id) for release, names in new.items() for sae_id in names)


def translated(folder: Path) -> dict:
    """The configuration of an SAE in a folder of another format, as sae_lens reads it."""
    place = hub.remembered("folder", str(folder), fingerprint.file_digest(folder / "cfg.json"), version("sae-lens"))
    return hub.recall(place) or hub.remember(place, _ask({str(folder): None})[str(folder)])


def _place(release: str) -> Path:
    return hub.remembered("saes", release, version("sae-lens"))


def _add(release: str, answer: dict) -> None:
    """Remember more SAEs of a release. ValueError where the repository has moved on since the first."""
    place = _place(release)
    before = hub.recall(place) or {"commit": answer["commit"], "saes": {}}
    if before["commit"] != answer["commit"]:
        raise ValueError(
            f"SAEs of '{release}': '{answer['repo']}' is at commit {answer['commit']}, but this study uses "
            f"{before['commit']}. Delete {place} to use the new one."
        )
    hub.remember(place, answer | {"saes": before["saes"] | answer["saes"]})


def _ask(asked: dict[str, list[str] | None]) -> dict[str, dict]:
    """sae_lens's answer, from `python -m pipeline.describe`."""
    package = Path(__file__).parent.parent
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "pipeline.describe", json.dumps(asked), str(out)]
        environment = os.environ | {"PYTHONPATH": path}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        answer = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"error": ran.stderr[-2000:]}
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer
