"""Checksums of whole files, Parquet and safetensors, in their own metadata."""

import mmap
from pathlib import Path

import xxhash

# What stands before a file's checksum, and the place that is left for it.
SEAL = b"xxh3_64:"
UNSEALED = SEAL.decode() + 16 * "0"


def seal(path: Path) -> None:
    """Put the checksum of a Parquet or safetensors file into the place that its metadata has for it (`UNSEALED`)."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        place, checksum = _checksum(content)
        content[place] = checksum


def verified(path: Path) -> Path:
    """The path of a Parquet or safetensors file that is as it was written, byte for byte. ValueError says to delete
    it."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            place, checksum = _checksum(content)
            found = content[place]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read ({error}). Delete it and run again.") from error
    if found != checksum:
        raise ValueError(f"{path} is damaged: its checksum is not that of its content. Delete it and run again.")
    return path


def _checksum(content: mmap.mmap) -> tuple[slice, bytes]:
    """Where a file's checksum stands, and what it has to be: XXH3 of everything before and after it."""
    # Parquet's metadata are at its end, those of safetensors at its head.
    start = (content.rfind if content[:4] == b"PAR1" else content.find)(SEAL)
    if start < 0:
        raise ValueError("it has no checksum")
    place = slice(start + len(SEAL), start + len(SEAL) + 16)
    with memoryview(content) as whole:
        of_content = xxhash.xxh3_64(whole[: place.start])
        of_content.update(whole[place.stop :])
    return place, of_content.hexdigest().encode()
