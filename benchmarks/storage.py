"""Files: HDF5 and Parquet as the pipeline writes and reads them, against the same bytes in plain files.

Both are flushed to the disk when written, and read from the page cache; on the disk that holds the results.
"""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import ROOT, Options, Table, Times, interleaved, ratios
from pipeline import seals, store
from pipeline.batches import BATCH

AXES = {"activation": "seq pos d"}
NAMES = ("identity", "sae", "sae_norm_corrected", "sae_norm", "eps_random", "theta_random", "theta_random_sae_norm")


def run(options: Options) -> list[Table]:
    sequences, width, rows = (64, 64, 2**14) if options.small else (1024, 768, 2**18)
    target = ROOT / "results" / "benchmarks"
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as name:
        folder = Path(name)
        found = [*_arrays(folder, (sequences, 128, width), options), *_tables(folder, rows, options)]
    caption = (
        f"Files: float32 activations of {sequences} x 128 x {width}, and effects of {len(NAMES)} interventions on "
        f"{rows} tokens as a table, each against a plain file of the same bytes; megabytes are those in memory."
    )
    return [Table(caption, found)]


def _arrays(folder: Path, shape: tuple[int, int, int], options: Options) -> list[dict[str, object]]:
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    ours, plain = folder / "ours.h5", folder / "plain.bin"
    forms = {
        "write": partial(_write_arrays, ours, values),
        "plain write": partial(_write_plain, plain, values),
        "read": partial(_read_arrays, ours, np.empty((BATCH, *shape[1:]), np.float32)),
        "plain read": partial(_read_plain, plain, BATCH * values[0].size),
    }
    times, _ = interleaved(forms, options.turns(5))
    return _rows("HDF5", times, values.nbytes, ours.stat().st_size / plain.stat().st_size)


def _write_arrays(path: Path, values: np.ndarray) -> None:
    with store.new_arrays(path, "f00d", AXES, {"activation": values.shape}) as file:
        for first in range(0, len(values), BATCH):
            file["activation"][first : first + BATCH] = values[first : first + BATCH]


def _read_arrays(path: Path, into: np.ndarray) -> None:
    with store.arrays(path, AXES) as file:
        for first in range(0, len(file["activation"]), BATCH):
            file["activation"].read_direct(into, np.s_[first : first + BATCH])


def _write_plain(path: Path, values: np.ndarray) -> None:
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        for first in range(0, len(values), BATCH):
            values[first : first + BATCH].tofile(file)
        file.flush()
        os.fsync(file.fileno())


def _read_plain(path: Path, count: int) -> None:
    with open(path, "rb") as file:
        while len(np.fromfile(file, np.float32, count)):
            pass


def _tables(folder: Path, rows: int, options: Options) -> list[dict[str, object]]:
    ours, plain = folder / "ours.parquet", folder / "plain.bin"
    groups = [_group(name, rows, seed) for seed, name in enumerate(NAMES)]
    buffers = [
        np.frombuffer(buffer, np.uint8)
        for group in groups
        for column in group.columns
        for buffer in column.chunk(0).buffers()
        if buffer is not None
    ]
    size = sum(len(buffer) for buffer in buffers)
    forms: dict[str, Callable] = {
        "write": lambda: store.write_table(ours, iter(groups), "f00d", {"kl": "nats"}),
        "plain write": lambda: _write_buffers(plain, buffers),
        "read": lambda: pq.read_table(seals.verified(ours)),
        "plain read": lambda: np.fromfile(plain, np.uint8),
    }
    times, _ = interleaved(forms, options.turns(5))
    return _rows("Parquet", times, size, ours.stat().st_size / plain.stat().st_size)


def _group(name: str, rows: int, seed: int) -> pa.Table:
    """The columns of the stage `effects`, for one intervention."""
    random = np.random.default_rng(seed)
    shared, length = np.random.default_rng(99), 128
    token = shared.zipf(1.3, rows).clip(0, 50256).astype(np.int32)

    def positive(generator: np.random.Generator) -> np.ndarray:
        return generator.lognormal(size=rows).astype(np.float32)

    def repeated(value: str) -> pa.DictionaryArray:
        return pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), [value])

    columns = {
        "intervention": repeated(name),
        "scope": repeated("all"),
        "draw": np.zeros(rows, np.int32),
        "sequence": np.arange(rows, dtype=np.int32) // length,
        "position": np.arange(rows, dtype=np.int32) % length,
        "token": token,
        "next_token": np.roll(token, -1),
        "special": token == 0,
        **{column: positive(shared) for column in ("ce_clean", "entropy_clean")},
        "l0": shared.integers(0, 64, rows).astype(np.float32),
        **{column: positive(shared) for column in ("l1", "norm", "sae_norm", "eps", "cos")},
        **{column: positive(random) for column in ("kl", "ce")},
        "top1_agrees": random.random(rows) < 0.9,
    }
    return pa.table(columns)


def _write_buffers(path: Path, buffers: list[np.ndarray]) -> None:
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        for buffer in buffers:
            buffer.tofile(file)
        file.flush()
        os.fsync(file.fileno())


def _rows(kind: str, times: Times, size: int, larger: float) -> list[dict[str, object]]:
    return [
        {
            "what": f"{kind} {action}",
            **ratios("ours / plain", times[action], times[f"plain {action}"]),
            "ours, MB/s": size / 1e6 / median(each.wall for each in times[action]),
            "plain, MB/s": size / 1e6 / median(each.wall for each in times[f"plain {action}"]),
            "file / plain file": larger,
        }
        for action in ("write", "read")
    ]
