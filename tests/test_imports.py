"""Imports point one way, and heavy ones stay where they are needed."""

import ast
import subprocess
import sys

import pytest
from fakes import ROOT

# A module imports from the rows above its own, never from its own row or from one below.
LAYERS = (
    ("types", "registry", "fingerprint", "linear", "rows", "workers"),
    ("hooks", "logits"),
    ("config", "store", "corpora", "interventions", "statistics", "models", "saes"),
    ("plan", "stage", "lean", "batches", "metrics"),
    ("hooked",),
    ("decoder",),
    ("engine",),
    ("tokens", "weights", "clean", "activations", "moments", "reconstructions", "effects", "checks"),
    ("summary", "figures", "report"),
    ("ablations",),  # The same measurement as effects, without an SAE.
)
LAYER = {module: number for number, row in enumerate(LAYERS) for module in row}
HOME = {"transformer_lens": {"models", "hooked"}, "sae_lens": {"saes"}, "numba": {"rows"}}
LIGHT = ("config", "plan", "store", "stage", "fingerprint", "summary", "statistics", "figures", "report", "moments")


def imported(path):
    """Dotted names of all that a file imports, inside functions too: `from a import b` counts as `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


PACKAGE = ROOT / "pipeline"
SOURCES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
IMPORTED = {module: set(imported(path)) for module, path in SOURCES.items()}


def test_every_module_has_its_layer():
    assert set(SOURCES) - {"__init__"} == set(LAYER)


@pytest.mark.parametrize("module", LAYER)
def test_a_module_imports_only_from_the_layers_above_it(module):
    ours = {name.split(".")[1] for name in IMPORTED[module] if name.startswith("pipeline.")}
    assert {name for name in ours if LAYER[name] >= LAYER[module]} == set()


def test_imports_are_written_in_the_way_that_the_code_digest_follows():
    assert [(module, name) for module, names in IMPORTED.items() for name in names if name.startswith(".")] == []


@pytest.mark.parametrize("library", HOME)
def test_a_library_that_may_be_replaced_stays_in_its_modules(library):
    users = {module for module, names in IMPORTED.items() if library in {name.split(".")[0] for name in names}}
    assert users == HOME[library]


def test_what_runs_without_a_model_imports_no_torch():
    code = "import sys, importlib\nfor name in sys.argv[1:]:\n    importlib.import_module('pipeline.' + name)\n"
    code += "    assert 'torch' not in sys.modules, name\nprint('none')"
    ran = subprocess.run([sys.executable, "-c", code, *LIGHT], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "none\n", ran.stderr
