"""Imports point one way, and heavy ones stay where they are needed."""

import ast
import subprocess
import sys
from functools import cache

import pytest
from fakes import ROOT

# A module imports from the rows above its own, never from its own row or from one below.
LAYERS = (
    ("types", "registry", "fingerprint", "labels", "linear", "rows", "workers", "texts", "charts", "locks", "seals"),
    ("hooks", "headers", "logits", "experiments", "jobs", "selection"),
    ("store", "interventions", "statistics", "batches"),
    ("hub",),
    ("models", "saes", "releases", "corpora"),
    ("inputs", "describe"),
    ("stage", "lean", "metrics", "examples", "grouping"),
    # Rows of tokens -> results, and results -> pictures.
    (
        "progress",
        "single",
        "draws",
        "ladder",
        "dose",
        "dark_matter",
        "compounding",
        "curvature",
        "atlas",
        "normalised",
        "fits",
    ),
    ("compute", "frontier", "effect_charts", "error_charts", "study_charts", "token_figures", "wording"),
    ("hooked", "tables", "families", "paper_table"),
    ("measures", "metric_tables", "report_tables", "metric_charts", "frontier_csv"),
    ("config", "frontier_charts"),
    ("outcomes",),
    ("plan",),
    ("estimate",),
    ("decoder",),
    ("engine",),
    ("sets",),
    ("tokens", "weights", "clean", "activations", "moments", "curvatures", "extremes", "top_tokens"),
    ("reconstructions", "scores", "errors", "correlates"),
    ("sources",),
    ("effects", "compounds", "checks", "summary", "analyses", "paper", "figures", "report"),
    ("ablations",),  # The same measurement as effects, without an SAE.
)
LAYER = {module: number for number, row in enumerate(LAYERS) for module in row}
HOME = {"transformer_lens": {"models", "hooked"}, "sae_lens": {"saes"}, "numba": {"rows"}}
# What runs a model or an SAE, and what that is made of. All others, new ones too, do without torch.
HEAVY = {
    *("types", "linear", "workers", "logits", "models", "saes", "batches", "interventions", "lean", "metrics"),
    *("hooked", "decoder", "engine", "sets", "sources"),
    *("weights", "clean", "activations", "reconstructions", "effects", "ablations", "compounds", "checks"),
    *("curvatures", "top_tokens", "describe"),
}
LIGHT = sorted(LAYER.keys() - HEAVY)


def imported(path):
    """Dotted names of all that a file imports, inside functions too: `from a import b` counts as `a.b`. What is
    imported for the sake of types alone does not count."""
    tree = ast.parse(path.read_text())
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    unused = {part for node in typing for statement in node.body for part in ast.walk(statement)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in unused:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node not in unused:
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


PACKAGE = ROOT / "pipeline"
SOURCES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
IMPORTED = {module: set(imported(path)) for module, path in SOURCES.items()}
OURS = {
    module: {name.split(".")[1] for name in names if name.startswith("pipeline.")} for module, names in IMPORTED.items()
}


def test_every_module_has_its_layer():
    assert set(SOURCES) - {"__init__"} == set(LAYER)
    assert sum(map(len, LAYERS)) == len(LAYER)


@pytest.mark.parametrize("module", LAYER)
def test_a_module_imports_only_from_the_layers_above_it(module):
    assert {name for name in OURS[module] if LAYER[name] >= LAYER[module]} == set()


def test_imports_are_written_in_the_way_that_the_code_digest_follows():
    assert [(module, name) for module, names in IMPORTED.items() for name in names if name.startswith(".")] == []


@pytest.mark.parametrize("library", HOME)
def test_a_library_that_may_be_replaced_stays_in_its_modules(library):
    users = {module for module, names in IMPORTED.items() if library in {name.split(".")[0] for name in names}}
    assert users == HOME[library]


def test_what_needs_torch_is_what_is_said_to_need_it():
    @cache
    def needs(module):
        outside = {name.split(".")[0] for name in IMPORTED[module]}
        return bool(outside & {"torch", "transformer_lens", "sae_lens"}) or any(map(needs, OURS[module]))

    assert {module for module in LAYER if needs(module)} == HEAVY


def test_what_runs_without_a_model_imports_no_torch():
    """As it is run: what other packages import counts too."""
    code = "import sys, importlib\nfor name in sys.argv[1:]:\n    importlib.import_module('pipeline.' + name)\n"
    code += "    assert 'torch' not in sys.modules, name\nprint('none')"
    ran = subprocess.run([sys.executable, "-c", code, *LIGHT], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "none\n", ran.stderr
