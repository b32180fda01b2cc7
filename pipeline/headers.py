"""What a file of weights says of itself: the tensors of its header, and whether its numbers are numbers. Planning reads
it, so that no job starts on a file that it can't load; needs no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

# What files that are no safetensors begin with, and what to do about them.
OTHERS = {
    b"PK\x03\x04": "pickled (torch.save). Pickles can run code: save the tensors with safetensors.torch.save_file",
    b"\x80": "pickled. Pickles can run code: save the tensors with safetensors.torch.save_file",
    b"version https://git-lfs": "a pointer of Git LFS, without the content. Fetch it with `git lfs pull`",
    b"<": "a web page. Download the file itself",
    b"\x89HDF": "HDF5. Save the tensors with safetensors.torch.save_file",
}
# A safetensors header is no longer than this.
LONGEST = 100_000_000
# numpy's types of the floats of safetensors; bfloat16, which it has not, is the upper half of a float32.
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# Numbers looked at in one go.
CHUNK = 2**20


@dataclass(frozen=True)
class Stored:
    """A tensor in a file of safetensors: its type, its shape, and the bytes where it begins and ends."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def tensors(path: Path) -> Mapping[str, Stored]:
    """Name -> tensor, from the header of a file of safetensors. ValueError where it is something else or is not
    whole."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(32)
        length = int.from_bytes(first[:8], "little")
        if first[8:9] != b"{" or length > LONGEST:
            kind = next((kind for begin, kind in OTHERS.items() if first.startswith(begin)), None)
            raise ValueError(f"'{path}' is {kind or _unknown(first)}.")
        file.seek(8)
        header = file.read(length)
    if len(header) < length:
        raise _cut_short(path, size, f"{8 + length} of header alone")
    try:
        found = {
            name: Stored(entry["dtype"], tuple(entry["shape"]), *(8 + length + end for end in entry["data_offsets"]))
            for name, entry in json.loads(header).items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"'{path}' has a header that is not of safetensors. Save it again.") from None
    whole = max((tensor.end for tensor in found.values()), default=8 + length)
    if size < whole:
        raise _cut_short(path, size, str(whole))
    return found


def _unknown(first: bytes) -> str:
    found = f"begins with {first[:8]!r}" if first else "is empty"
    return f"no safetensors file: it {found}. Save the tensors with safetensors.torch.save_file"


def _cut_short(path: Path, size: int, expected: str) -> ValueError:
    return ValueError(f"'{path}' is cut short: {size} bytes, expected {expected}. Copy or download it again.")


def check_finite(path: Path, found: Mapping[str, Stored]) -> None:
    """That no float of a file is NaN or infinite. Reads what planning hashes anyway, in a seventh of that time."""
    for name, tensor in found.items():
        if tensor.dtype not in FLOATS or prod(tensor.shape) == 0:
            continue
        values = np.memmap(path, FLOATS[tensor.dtype], "r", tensor.start, (prod(tensor.shape),))
        bad = sum(_not_finite(values[i : i + CHUNK], tensor.dtype) for i in range(0, len(values), CHUNK))
        if bad:
            raise ValueError(
                f"'{path}': {bad} of the {len(values)} values of '{name}' are not finite. Train or save it again."
            )


def _not_finite(values: np.ndarray, dtype: str) -> int:
    if dtype == "BF16":
        return int((values & 0x7F80 == 0x7F80).sum())  # NaN and infinity have all bits of the exponent
    finite = np.isfinite(values)
    return 0 if finite.all() else int((~finite).sum())
