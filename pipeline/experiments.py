"""One entry of `experiments` -> a checked Experiment. What a scope has no use for is refused, not ignored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations

from pipeline import fingerprint
from pipeline.labels import ARGUMENTS, COMPONENTS, OF_A_HEAD, OF_AN_SAE, label, parsed
from pipeline.registry import unknown


@dataclass(frozen=True)
class Experiment:
    """`interventions` are labels: those with a strength stand there once for each. What a scope has no use for is
    empty, None or its default. `models`, `components` and `layers` (None: all) are the atlas's, which has no SAEs."""

    id: str
    scope: str
    interventions: tuple[str, ...]
    saes: tuple[str, ...]
    corpora: tuple[str, ...]
    patch_special: bool
    positions: tuple[int, ...]
    horizon: int
    draws: int
    contexts: int | None
    sets: tuple[tuple[str, ...], ...] | None
    encode: str
    curvature: int | None
    examples: int | None
    chosen: tuple[tuple[int, int], ...]
    models: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None


ONE_POSITION = ("single", "draws")
# Keys that only some scopes have a use for.
ONLY = {
    "positions": ONE_POSITION,
    "horizon": ONE_POSITION,
    "contexts": (*ONE_POSITION, "compound"),
    "alphas": ("all", *ONE_POSITION),
    "cosines": ("all", *ONE_POSITION),
    "draws": ("all", *ONE_POSITION),
    "sets": ("compound",),
    "encode": ("compound",),
    "curvature": ("all",),
    "examples": ("all",),
}
# Those of them that the schema fills in; with that value they say nothing.
FILLED = {"draws": 1, "encode": "patched"}
# The default of `horizon`. Gurnee 2024 reads 16 positions after the replaced one.
HORIZON = {"single": 16}
COMPOUND = ("sae", "eps_random", "act_cov_random")
# What the atlas ablates where `components` are left out.
ATLAS = tuple(name for name in COMPONENTS if name != "z")
# Grids of strengths, and the ends of what may be in them, as in the schema.
GRIDS = {"alphas": (-10, 10), "cosines": (-1, 1)}


def experiment(entry: dict, saes: Mapping, corpora: Mapping) -> Experiment:
    """ValueError where a name is not known, or a key does not go with the scope."""
    what, scope = f"Experiment '{entry['id']}'", entry["scope"]
    for key, scopes in ONLY.items():
        if entry.get(key) != FILLED.get(key) and scope not in scopes:
            raise ValueError(f"{what}: `{key}` has no meaning in the scope '{scope}', only in {' and '.join(scopes)}.")
    selected = {
        "saes": _selected(what, "SAE", entry["saes"], saes),
        "corpora": _selected(what, "corpus", entry["corpora"], corpora),
        "interventions": _labels(what, entry),
    }
    used = [corpora[corpus] for corpus in selected["corpora"]]
    if scope in ONE_POSITION:
        _check_positions(what, entry, used)
    for key in ("curvature", "examples"):
        if key in entry and not {"sae", "eps_random"} <= set(selected["interventions"]):
            raise ValueError(f"{what}: `{key}` compares 'sae' with 'eps_random'. Name both among the interventions.")
    _check_chosen(what, entry, used)
    if scope == "compound":
        _check_sets(what, entry.get("sets"), [saes[sae] for sae in selected["saes"]])
    return Experiment(
        entry["id"],
        scope,
        **selected,
        patch_special=entry["patch_special"],
        positions=tuple(entry.get("positions", ())),
        horizon=entry.get("horizon", HORIZON.get(scope, 0)),
        draws=entry["draws"],
        contexts=entry.get("contexts"),
        sets=tuple(map(tuple, entry["sets"])) if "sets" in entry else None,
        encode=entry["encode"],
        curvature=entry.get("curvature"),
        examples=entry.get("examples"),
        chosen=tuple(map(tuple, entry["chosen"])),
    )


def atlas(entry: dict, models: Mapping, corpora: Mapping) -> Experiment:
    """The ablation of every component at every layer, as an experiment without SAEs. ValueError where a name is not
    known, and where a model lacks a layer or a component that is asked for."""
    what = "`atlas`"
    selected = {
        "models": _selected(what, "model", entry["models"], models),
        "corpora": _selected(what, "corpus", entry["corpora"], corpora),
    }
    layers = None if entry["layers"] == "all" else tuple(sorted(entry["layers"]))
    for name in selected["models"]:
        geometry = models[name].geometry
        if layers and layers[-1] >= geometry.n_layers:
            raise ValueError(f"{what}: layer {layers[-1]}, but model '{name}' has layers 0 to {geometry.n_layers - 1}.")
        if geometry.parallel and "resid_mid" in entry.get("components", ()):
            raise ValueError(
                f"{what}: model '{name}' runs attention and MLP side by side and has no 'resid_mid'. Leave it out of "
                "`components`."
            )
    return Experiment(
        id="atlas",
        scope="atlas",
        interventions=tuple(entry["interventions"]),
        saes=(),
        corpora=selected["corpora"],
        patch_special=entry["patch_special"],
        positions=(),
        horizon=0,
        draws=1,
        contexts=entry.get("contexts"),
        sets=None,
        encode=FILLED["encode"],
        curvature=None,
        examples=None,
        chosen=(),
        models=selected["models"],
        components=tuple(entry.get("components", ATLAS)),
        layers=layers,
    )


def _selected(what: str, kind: str, wanted: list[str] | str, known: Mapping) -> tuple[str, ...]:
    """Those that are named, or whose name matches a pattern such as `res-*`."""
    if wanted == "all" and not known:
        raise ValueError(f"{what}: there is no {kind} in the configuration. Name some, or leave the experiment out.")
    names = []
    for name in ["*"] if wanted == "all" else wanted:
        matching = [name] if name in known else [each for each in known if fnmatchcase(each, name)]
        if not matching:
            raise ValueError(f"{what}: " + unknown(kind, name, known))
        names += matching
    return tuple(dict.fromkeys(names))


def _labels(what: str, entry: dict) -> tuple[str, ...]:
    """The interventions by label, checked; one with a strength once for each of the experiment's."""
    known = fingerprint.registered("interventions", "INTERVENTIONS")
    if entry["interventions"] == ["identity"]:
        raise ValueError(f"{what}: 'identity' is the control of other interventions. Name another one beside it.")
    found = [each for given in entry["interventions"] for each in _expanded(what, entry, given, known)]
    for each in found:
        if found.count(each) > 1:
            raise ValueError(
                f"{what}: with its strengths, '{each}' is there {found.count(each)} times among the interventions. "
                f"Name it once, by itself or in '{parsed(each)[0]}' and its grid."
            )
    for grid in GRIDS:
        takers = [name for name in known if grid in _made_from(known[name])]
        if grid in entry and not set(takers) & set(entry["interventions"]):
            raise ValueError(
                f"{what}: `{grid}` are strengths, but no intervention is run at them. Leave them out, or name one "
                f"of {', '.join(takers)}."
            )
    _check_draws(what, entry, [(name, _made_from(known[name])) for name, _ in map(parsed, found)])
    return tuple(found)


def _expanded(what: str, entry: dict, given: str, known: Mapping[str, list[str]]) -> list[str]:
    """The labels of what is named once in the configuration."""
    name, strength = parsed(given)
    if name not in known:
        raise ValueError(f"{what}: " + unknown("intervention", given, known))
    if entry["scope"] == "compound" and name not in ("identity", *COMPOUND):
        raise ValueError(f"{what}: '{name}' is not known for several SAEs at once, only {', '.join(COMPOUND)}.")
    if name in OF_A_HEAD.values():
        raise ValueError(f"{what}: '{name}' is for the atlas alone. Put `z` among the `components` of `atlas`.")
    for argument in known[name]:
        if argument not in ARGUMENTS:
            raise ValueError(f"Intervention '{name}': " + unknown("argument", argument, ARGUMENTS))
    grids = [grid for grid in GRIDS if grid in _made_from(known[name])]
    if len(grids) > 1:
        raise ValueError(f"Intervention '{name}' takes a strength of each of {' and '.join(grids)}. Let it take one.")
    if not grids:
        if strength is not None:
            raise ValueError(f"{what}: '{name}' takes no strength, but '{given}' gives one. Write '{name}'.")
        return [name]
    if strength is None and grids[0] not in entry:
        raise ValueError(f"{what}: '{name}' is run at several strengths. Say which with `{grids[0]}: [...]`.")
    low, high = GRIDS[grids[0]]
    strengths = entry[grids[0]] if strength is None else [strength]
    for value in strengths:
        if not low <= value <= high:
            raise ValueError(f"{what}: '{name}' at a strength of {value:g}; expected one from {low} to {high}.")
    return [label(name, float(value)) for value in strengths]


def _made_from(arguments: list[str]) -> set[str]:
    return {source for argument in arguments for source in ARGUMENTS.get(argument, ())}


def _check_draws(what: str, entry: dict, interventions: list[tuple[str, set[str]]]) -> None:
    """Draws are of something random, and those of the scope `draws` of errors, beside which the SAE stands.
    `interventions`: names, and what each is made from."""
    random = [made_from for _, made_from in interventions if "seed" in made_from]
    if entry["scope"] == "draws":
        if entry["draws"] < 2:
            raise ValueError(f"{what}: the scope 'draws' needs `draws`, at least 2 of every random intervention.")
        if "sae" not in dict(interventions) or not any(made_from & set(OF_AN_SAE) for made_from in random):
            raise ValueError(
                f"{what}: the scope 'draws' compares 'sae' with random errors of its length. Name 'sae' and one of "
                "these, such as 'eps_random', among the interventions."
            )
    elif entry["draws"] > 1 and not random and entry["scope"] != "compound":
        raise ValueError(f"{what}: `draws` are {entry['draws']}, but no intervention is random. Leave `draws` out.")


def _check_positions(what: str, entry: dict, corpora: list) -> None:
    if "positions" not in entry:
        raise ValueError(f"{what}: the scope '{entry['scope']}' needs `positions: [...]`, the positions to replace.")
    shortest = min(corpus.context for corpus in corpora)
    last = max(entry["positions"]) + entry.get("horizon", HORIZON.get(entry["scope"], 0))
    if last >= shortest:
        raise ValueError(
            f"{what}: position {max(entry['positions'])} and its horizon end at position {last}, but contexts have "
            f"{shortest} tokens. Lower `positions` or `horizon`."
        )
    if 0 in entry["positions"] and any(corpus.prepend_bos for corpus in corpora):
        raise ValueError(
            f"{what}: position 0 holds BOS, which is no sample of the other tokens and is left out where one position "
            "is looked at. Take 0 out of `positions`."
        )


def _check_chosen(what: str, entry: dict, corpora: list) -> None:
    if entry["chosen"] and "examples" not in entry:
        raise ValueError(f"{what}: `chosen` tokens are shown among `examples`. Say how many worst and best ones too.")
    for corpus in corpora:
        for sequence, position in entry["chosen"]:
            if position >= corpus.context or (corpus.contexts is not None and sequence >= corpus.contexts):
                sequences = "" if corpus.contexts is None else f"sequences 0 to {corpus.contexts - 1} with "
                raise ValueError(
                    f"{what}: `chosen` names sequence {sequence}, position {position}, but corpus '{corpus.id}' has "
                    f"{sequences}positions 0 to {corpus.context - 1}. Correct `chosen`."
                )


def _check_sets(what: str, sets: list[list[str]] | None, saes: list) -> None:
    """That there are sets of several SAEs, each of one model, and of which no two write at the same hook."""
    known = {sae.id: sae for sae in saes}
    for sae in {sae for members in sets or () for sae in members}:
        if sae not in known:
            raise ValueError(f"{what}, `sets`: " + unknown("SAE", sae, known))
    models = {sae.model: [each.id for each in saes if each.model == sae.model] for sae in saes}
    if max(map(len, sets or models.values())) < 2:
        raise ValueError(f"{what}: the scope 'compound' is about several SAEs at once. Give it a set of at least two.")
    for members in sets or models.values():
        if len({known[sae].model for sae in members}) > 1:
            raise ValueError(f"{what}: the SAEs {', '.join(members)} are a set, but of several models. Take one model.")
        for one, other in combinations(members, 2):
            if known[one].write == known[other].write:
                raise ValueError(
                    f"{what}: '{one}' and '{other}' are in a set, but both write at '{known[one].write.name}'. Take "
                    "one of them, with `saes` or `sets`."
                )
    try:
        for names in models.values():
            sets_of(names, sets)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def sets_of(saes: Sequence[str], sets: Sequence[Sequence[str]] | None = None) -> list[dict]:
    """The sets to run, as `compounds` takes them: `{"name": ..., "saes": [...]}`, of SAEs in the order of their layers.

    Every SAE alone, the first k of them ("first 3"), all ("all"), and every pair ("resid1+resid3"); a set that is two
    of these is there once, under the name that comes first here, but "all" and not "first n". Where `sets` are given:
    those of these SAEs, and each of their members alone, because the sum of these is what a set is held against.
    ValueError where an SAE or a set is there twice, or an SAE has the name of a set.
    """
    if sets is None:
        named = [(each, (each,)) for each in saes]
        named += [(f"first {k}", tuple(saes[:k])) for k in range(2, len(saes))]
        named += [("all", tuple(saes)), *(("+".join(pair), pair) for pair in combinations(saes, 2))]
    else:
        sets = [members for members in sets if set(members) <= set(saes)]
        saes = [each for each in saes if any(each in members for members in sets)]
        named = [(each, (each,)) for each in saes]
        named += [("+".join(members), tuple(members)) for members in sets if len(members) > 1]
    found: dict[tuple[str, ...], str] = {}
    for name, members in named if saes else []:
        found.setdefault(members, name)
    again = len({frozenset(members) for members in found}) < len(found)
    if len(set(saes)) < len(saes) or len(set(found.values())) < len(found) or again:
        raise ValueError(
            f"The SAEs {', '.join(saes)} do not give sets of different names. Name each SAE and each set once, and no "
            "SAE as a set is named ('all', 'first 2', 'a+b')."
        )
    return [{"name": name, "saes": list(members)} for members, name in found.items()]
