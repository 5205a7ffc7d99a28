"""Bootstrap intervals of a corpus value, and of the difference of two runs on the same samples (Efron 1979)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vlmtune.evaluation.metrics.base import Array, Scores

RESAMPLES = 1000
# Resamples drawn at once: the counts of 100 resamples of 5,000 samples take 4 MB.
AT_ONCE = 100


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def _resampled_counts(n: int, resamples: int, seed: int) -> Iterator[Array]:
    """Yield how often each of n samples was drawn in each resample, (<= AT_ONCE, n), till there are ``resamples``."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, AT_ONCE):
        rows = min(AT_ONCE, resamples - start)
        drawn = rng.integers(0, n, (rows, n)) + np.arange(rows)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _percentiles(values: Array) -> Interval:
    # A resample without a value, such as one of images without any object, says nothing.
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return Interval(float(low), float(high))


def interval(scores: Scores, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return the 2.5 % and 97.5 % percentiles of the corpus value over resampled samples.

    Args:
        scores: a metric's result on at least one sample.
        resamples: how many to draw.
        seed: of the drawing; the same scores and seed give the same interval.
    """
    kept = scores if scores.scored.all() else scores.take(scores.scored)
    return _percentiles(np.concatenate([kept.of_counts(c) for c in _resampled_counts(kept.n, resamples, seed)]))


def paired_difference(
    first: Scores, second: Scores, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, Interval]:
    """Return ``second - first`` on the samples that both could score, with its interval.

    Raises:
        ValueError: the two hold different numbers of samples, or none that both could score.
    """
    if first.n != second.n:
        raise ValueError(f"the runs scored {first.n} and {second.n} samples; a paired difference needs the same ones")
    both = first.scored & second.scored
    if not both.any():
        raise ValueError("the runs have no sample that both could score")
    if not both.all():
        first, second = first.take(both), second.take(both)
    values = [second.of_counts(c) - first.of_counts(c) for c in _resampled_counts(first.n, resamples, seed)]
    return second.value - first.value, _percentiles(np.concatenate(values))
