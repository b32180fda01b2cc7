"""Intervals by bootstrap over sequences: tokens of one sequence are not independent, sequences are.

Sums are added first and divided once. Every estimate is a ratio of two sums over tokens; its resamples are the same
ratio under random multiplicities of the sequences, and two estimates of one study use the same multiplicities, so
that their ratio is paired.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """`weights` `resample sequence`: how often each sequence is drawn; `confidence` is the interval's mass."""

    weights: np.ndarray
    confidence: float

    @classmethod
    def over(cls, sequences: int, samples: int, confidence: float, seed: int) -> "Bootstrap":
        generator = np.random.default_rng([seed, sequences])
        weights = generator.multinomial(sequences, np.full(sequences, 1 / sequences), size=samples)
        return cls(weights.astype(np.float64), confidence)

    def mean(self, total: np.ndarray, count: np.ndarray) -> Interval:
        """Of sums over tokens by their number; both ` sequence`. Percentile interval; NaN where nothing was counted."""
        return self.ratio((total, count), None)

    def ratio(self, top: tuple[np.ndarray, np.ndarray], bottom: tuple[np.ndarray, np.ndarray] | None) -> Interval:
        """(mean of top) / (mean of bottom), each a pair of (total, count) ` sequence`; without a bottom, the mean of
        top."""
        value, resampled = self._mean(*top)
        if bottom is not None:
            below, below_resampled = self._mean(*bottom)
            value, resampled = _divide(value, below), _divide(resampled, below_resampled)
        if not np.isfinite(resampled).all():
            return Interval(float(value), np.nan, np.nan)
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(resampled, [tail, 1 - tail])
        return Interval(float(value), float(low), float(high))

    def _mean(self, total: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mean, and its value in each resample."""
        total, count = total.astype(np.float64), count.astype(np.float64)
        return _divide(total.sum(), count.sum()), _divide(self.weights @ total, self.weights @ count)


def _divide(top: np.ndarray | float, bottom: np.ndarray | float) -> np.ndarray:
    """top / bottom, and NaN where bottom is not positive: no baseline, no ratio."""
    bottom = np.asarray(bottom)
    return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1), np.nan)
