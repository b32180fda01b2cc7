"""Locks that end with the process that holds them, however it ends: of an item, so that no two processes make it at
once; of a run, so that the next one knows whether what it finds was left by a killed one."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

log = logging.getLogger("faithful")
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def alone(paths: Iterable[Path]) -> Iterator[bool]:
    """Within the block no other process of ours makes these files, such as a job that outlived a killed run: it is
    waited for. Gives whether it was."""
    waited = False
    with ExitStack() as stack:
        for path in sorted(set(paths)):  # in one order, so that no two wait for each other
            waited |= stack.enter_context(_locked(path.parent / f".making-{path.name}.lock"))
        yield waited


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """A file that is locked within the block and gone after it; gives whether another process had it first. The lock
    ends with its process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    waited = False
    while True:
        with open(path, "a", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("waiting for another process, of an earlier run, that makes the same file: %s", path)
                fcntl.flock(file, fcntl.LOCK_EX)
                waited = True
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                log.warning("%s: this file system has no locks. Let no job of an earlier run go on.", path)
            if _stands(file, path):
                try:
                    yield waited
                finally:
                    path.unlink(missing_ok=True)
                return


def _stands(file: TextIO, path: Path) -> bool:
    """Whether an open file is still the one of this name: its last owner may have removed it in the meantime."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def unlocked(folder: Path) -> TextIO:
    """Remove what killed runs have left in Snakemake's folder, if no run is alive there: locks, and the marks of
    incomplete outputs, because ours are complete where they exist, and Snakemake would delete them. The open file says
    that this run is alive, until its process ends."""
    folder.mkdir(exist_ok=True)
    alive = open(folder / "alive", "a", encoding="utf-8")  # noqa: SIM115
    try:
        with suppress(BlockingIOError):
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in ("locks", "incomplete"):
                for path in [path for path in (folder / left).rglob("*") if path.is_file()]:
                    path.unlink()
        fcntl.flock(alive, fcntl.LOCK_SH)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return alive
