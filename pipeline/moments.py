"""Stage `moments`: mean and covariance of the activation at a hook over the whole corpus, special tokens left out.

Needs no torch. Sums are float64, and are taken around the first ordinary token's activation, so that a mean far from
zero costs no digits of the covariance.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from pipeline import store
from pipeline.stage import Call, log, run

AXES = {"mean": "d", "covariance": "d d", "centred_square": "seq"}


@dataclass
class Moments:
    """Sums over rows of activations, `token d`; `add` them up, then ask for mean and covariance."""

    origin: np.ndarray
    count: int = 0
    total: np.ndarray = field(init=False)
    products: np.ndarray = field(init=False)

    def __post_init__(self):
        self.total = np.zeros(len(self.origin))
        self.products = np.zeros((len(self.origin), len(self.origin)))

    def add(self, rows: np.ndarray) -> None:
        shifted = rows.astype(np.float64) - self.origin
        self.count += len(rows)
        self.total += shifted.sum(0)
        self.products += shifted.T @ shifted

    @property
    def mean(self) -> np.ndarray:
        """` d`"""
        return self.origin + self.total / self.count

    @property
    def covariance(self) -> np.ndarray:
        """`d d`, of the corpus as a whole (divided by the number of tokens)."""
        offset = self.total / self.count
        return self.products / self.count - np.outer(offset, offset)


def work(call: Call) -> None:
    with store.arrays(call.input("tokens"), {"special": "seq pos"}) as file:
        special = file["special"][:]
    if special.all():
        raise ValueError(
            f"{call.input('tokens')}: all {special.size} tokens are special, so there is nothing to take a mean of."
        )
    paths = call.inputs["activations"]
    moments = None
    for x, left_out in _batches(paths, special):
        rows = x[~left_out]
        if moments is None and len(rows):
            moments = Moments(rows[0].astype(np.float64))
        if len(rows):
            moments.add(rows)
    squares = [((x - moments.mean) ** 2).sum(-1) * ~left_out for x, left_out in _batches(paths, special)]
    values = {"mean": moments.mean, "covariance": moments.covariance, "centred_square": np.concatenate(squares).sum(1)}
    shapes = {name: (value.shape, "float64") for name, value in values.items()}
    with store.new_arrays(call.output, call.fingerprint, AXES, shapes, **call.key, count=moments.count) as file:
        for name, value in values.items():
            file[name][:] = value
    log.info("%s: %d tokens, variance %.4g", call.key["hook"], moments.count, np.trace(moments.covariance))


def _batches(paths: list, special: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Activations `seq pos d` and the mask of special tokens `seq pos`, in batches over all shards."""
    for path in paths:
        with store.arrays(path, {"activation": "seq pos d"}) as file:
            first, x = int(file.attrs["first"]), file["activation"]
            for start in range(0, len(x), 8 * store.CHUNK):
                batch = x[start : start + 8 * store.CHUNK]
                yield batch, special[first + start : first + start + len(batch)]


def main() -> None:
    run("moments", work)


if __name__ == "__main__":
    main()
