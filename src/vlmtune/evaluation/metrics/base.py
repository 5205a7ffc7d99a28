"""What a metric is: a pure function of answers and references, with a value per sample and a corpus value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
# Sums of the statistics' columns, (..., K), to the corpus value, (...).
Aggregate = Callable[[Array], Array]
# How often each sample counts, (..., n), to the corpus value, (...).
Corpus = Callable[[Array], Array]


@dataclass(frozen=True)
class Scores:
    """A metric's result on n samples.

    The corpus value is ``aggregate`` of the summed statistics, so that a bootstrap needs sums only. For a metric
    that is the mean of its samples, leave both out. A corpus value that no sums give, such as average precision,
    which ranks the boxes of all samples, is ``corpus`` of how often each sample counts.

    Attributes:
        per_sample: (n,) value of each sample, on the metric's own scale.
        statistics: (n, K) numbers whose sums over samples give the corpus value.
        aggregate: sums of the K columns -> corpus value, for any leading axes.
        corpus: times that each of the n samples counts -> corpus value, for any leading axes; NaN where it has none.
        notes: what a reader must know of these values, such as a sample too small for the metric.
    """

    per_sample: Array
    statistics: Array | None = None
    aggregate: Aggregate | None = None
    notes: tuple[str, ...] = field(default=())
    corpus: Corpus | None = None

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.per_sample)

    @property
    def value(self) -> float:
        """The corpus value."""
        return float(self.of_counts(np.ones(self.n)))

    @property
    def scored(self) -> npt.NDArray[np.bool_]:
        """(n,) whether each sample has a value; NaN marks one that the metric failed on."""
        return np.asarray(np.isfinite(self.per_sample))

    def take(self, chosen: npt.ArrayLike) -> Scores:
        """Return the scores of some samples, chosen by indices or by an (n,) mask."""
        rows = np.asarray(chosen)
        return Scores(
            self.per_sample[rows],
            None if self.statistics is None else self.statistics[rows],
            self.aggregate,
            self.notes,
            None if self.corpus is None else partial(_of_taken, self.corpus, np.arange(self.n)[rows], self.n),
        )

    def of_counts(self, counts: Array) -> Array:
        """Return the corpus value where each sample counts so many times, (..., n), for any leading axes."""
        return self.of_sums(counts @ self.columns()) if self.corpus is None else self.corpus(counts)

    def columns(self) -> Array:
        """Return the statistics, (n, K); for a mean: the value and a one."""
        if self.statistics is not None:
            return self.statistics
        return np.stack([self.per_sample, np.ones(self.n)], axis=1)

    def of_sums(self, sums: Array) -> Array:
        """Return the corpus value of summed columns, for any leading axes."""
        if self.aggregate is not None:
            return self.aggregate(sums)
        return np.divide(sums[..., 0], sums[..., 1])


def _of_taken(corpus: Corpus, taken: npt.NDArray[np.int_], n: int, counts: Array) -> Array:
    """Return the corpus value of some of n samples, by the numbers of those taken."""
    # A sample may have been taken twice.
    rows = counts.reshape(-1, len(taken))
    whole = np.asarray([np.bincount(taken, row, minlength=n) for row in rows], dtype=np.float64)
    return corpus(whole.reshape(*counts.shape[:-1], n))


@dataclass(frozen=True)
class Metric:
    """A named metric.

    Attributes:
        name: its name in recipes.
        summary: one line for people, with the scale.
        compute: (answers, references of each, and what it ``reads``) -> :class:`Scores`. Raises ``ValueError`` for
            references it cannot score against.
        paper: where it is defined.
        code: the implementation whose numbers it gives.
        percent: the scale is 0 to 1 and is shown as a percentage.
        higher_is_better: for choosing the best checkpoint.
        reads: attribute of the predictions that ``compute`` takes as a third argument, one entry a sample.
        needs: libraries that it needs, and the extra of vlmtune that installs them.
    """

    name: str
    summary: str
    compute: Callable[..., Scores]
    paper: str
    code: str
    percent: bool = True
    higher_is_better: bool = True
    reads: str = ""
    needs: tuple[tuple[str, ...], str] | None = None
