"""What a result depends on, as short digests: of settings, of files' content, and of the code that a job runs.

The code digest ignores comments, docstrings and layout, and of a module's registered functions (interventions,
figures, ...) it takes only those that the job names: a new intervention leaves the digests of other jobs alone.
Nothing here imports the code it looks at, so that planning needs no torch.
"""

import ast
import hashlib
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent
# Infrastructure moves bytes and decides nothing about numbers; a change of its file format raises FORMAT instead.
INFRASTRUCTURE = frozenset(
    {
        *("config", "experiments", "fingerprint", "headers", "hub", "inputs", "jobs", "labels", "locks", "outcomes"),
        *("plan", "registry", "releases", "seals", "stage", "store"),
    }
)
FORMAT = 2


def digest(value: object) -> str:
    """16 hex digits of the canonical JSON of a value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Digest of a file's content, or of a folder's visible files by name and content; times and owners do not count."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        return digest([[file.name, file_digest(file)] for file in files])
    status = os.stat(path)
    return _content_digest(str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino)


@cache
def _content_digest(path: str, size: int, mtime: int, inode: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def code_digest(module: str, names: frozenset[str] = frozenset(), package: Path = PACKAGE) -> str:
    """Digest of `pipeline.<module>`, of all in-package modules it imports, and of the registered functions in
    `names`."""
    reached = sorted(_reached(module, package) - INFRASTRUCTURE)
    return digest([FORMAT, [[name, _module_digest(_file(name, package), names)] for name in reached]])


def registered(module: str, registry: str, package: Path = PACKAGE) -> dict[str, list[str]]:
    """Name -> argument names of every function that `module` puts into `registry`, in the order of the file."""
    return {
        part.name: list(part.arguments) for part in _source(_file(module, package)).parts if part.registry == registry
    }


def imports(path: Path, package: Path = PACKAGE) -> list[str]:
    """The modules of this package that a file imports, at top level or inside a function."""
    return [name for name in _source(path).imports if _file(name, package).exists()]


@dataclass(frozen=True)
class Part:
    """A statement at the top of a file: its digest, and if it is a registered function, its registry, name and
    arguments."""

    digest: str
    registry: str | None
    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """What is to be known of a file of Python: what may be modules of ours among its imports, and its statements."""

    imports: tuple[str, ...]
    parts: tuple[Part, ...]


def _source(path: Path) -> Source:
    status = os.stat(path)
    return _parsed(path, status.st_size, status.st_mtime_ns)


@cache
def _parsed(path: Path, size: int, mtime: int) -> Source:
    tree, found = ast.parse(path.read_bytes(), filename=str(path)), []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = node.body[ast.get_docstring(node, clean=False) is not None :]
        elif isinstance(node, ast.Import):
            found += [each.name.removeprefix("pipeline.") for each in node.names if each.name.startswith("pipeline.")]
        elif isinstance(node, ast.ImportFrom) and node.module == "pipeline":
            found += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline."):
            found.append(node.module.removeprefix("pipeline."))
    return Source(tuple(found), tuple(_part(node) for node in tree.body))


def _part(node: ast.stmt) -> Part:
    registry = _registry_of(node)
    name, arguments = (node.name, [each.arg for each in node.args.args]) if registry else ("", [])
    return Part(hashlib.sha256(ast.dump(node).encode()).hexdigest(), registry, name, tuple(arguments))


def _file(module: str, package: Path) -> Path:
    path = package.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _reached(module: str, package: Path) -> set[str]:
    """In-package modules that `module` imports, directly or not, and itself."""
    reached, pending = set(), [module]
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            pending += imports(_file(name, package), package)
    return reached


def _module_digest(path: Path, names: frozenset[str]) -> str:
    """Of all statements of a file but the registered functions that are not in `names`."""
    return digest([part.digest for part in _source(path).parts if part.registry is None or part.name in names])


def _registry_of(node: ast.stmt) -> str | None:
    """The name of the registry whose `.register` decorates a function, or None."""
    for decorator in getattr(node, "decorator_list", []):
        if (
            isinstance(decorator, ast.Attribute)
            and decorator.attr == "register"
            and isinstance(decorator.value, ast.Name)
        ):
            return decorator.value.id
    return None
