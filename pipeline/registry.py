"""A registry is a dict from a function's own name to the function; a wrong name is answered with the known ones."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches


class Registry(dict):
    """Name -> function. `@REGISTRY.register` above a function adds it under its own name."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def register(self, function: Callable) -> Callable:
        assert function.__name__ not in self, f"{self.kind} {function.__name__} is registered twice"
        self[function.__name__] = function
        return function

    def __missing__(self, name: str):
        raise ValueError(unknown(self.kind, name, self))


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not there: what was found, what is known, and the nearest one."""
    known = sorted(map(str, known))
    close = get_close_matches(str(name), known, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"Unknown {kind} '{name}'.{hint} Known: {', '.join(known) or 'none'}."
