"""A metric over all samples, even if it fails on some: those are left out by name, the others keep their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmtune.evaluation.metrics.base import Metric, Scores


def robust_scores(
    metric: Metric,
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    ids: Sequence[str],
    read: Sequence[Any] | None = None,
) -> Scores:
    """Score all samples; leave out those on which the metric raises or gives no finite number.

    Args:
        metric: to compute.
        answers: generated answers.
        references: of each.
        ids: names of the samples.
        read: what the metric reads besides, one entry a sample.

    Returns:
        Scores of all n samples, so that two runs stay paired. A sample left out has the value NaN, adds nothing to
        the corpus value, and is named in ``notes``.

    Raises:
        ValueError: the metric can score no sample, or fails on all those together that it scores one by one.
    """
    given = [answers, references, *([] if read is None else [read])]
    try:
        found = _checked(metric, *given)
    except Exception:  # a user's function may raise anything
        found = None
    reasons: dict[int, str] = {}
    if found is None:
        for index, sample in enumerate(zip(*given, strict=True)):
            try:
                if not _finite(_checked(metric, *([entry] for entry in sample)))[0]:
                    reasons[index] = "the score is not a number"
            except Exception as error:
                reasons[index] = " ".join(str(error).split()) or type(error).__name__
    elif not (finite := _finite(found)).all():
        reasons = {int(index): "the score is not a number" for index in np.flatnonzero(~finite)}
    if found is not None and not reasons:
        return found
    kept = [index for index in range(len(answers)) if index not in reasons]
    if not kept:
        first = next(iter(reasons))
        raise ValueError(f"it fails on every sample, such as {ids[first]!r}: {reasons[first]}")
    if found is None:
        try:
            found = _checked(metric, *([column[i] for i in kept] for column in given))
        except Exception as error:
            raise ValueError(f"it fails on all samples together: {error}") from error
    else:
        found = found.take(kept)
    columns = np.zeros((len(answers), found.columns().shape[1]))
    columns[kept] = found.columns()
    values = np.full(len(answers), np.nan)
    values[kept] = found.per_sample
    named = "; ".join(f"{ids[index]!r}: {reason[:160]}" for index, reason in list(reasons.items())[:3])
    note = f"left out {len(reasons)} of {len(answers)} samples that it cannot score ({named})"
    scored = found
    corpus = None if scored.corpus is None else lambda counts: scored.of_counts(counts[..., kept])
    return Scores(values, columns, found.of_sums, (*found.notes, note), corpus)


def _checked(metric: Metric, *columns: Sequence[Any]) -> Scores:
    found = metric.compute(*columns)
    if found.n != len(columns[0]):
        raise ValueError(f"it gave {found.n} values for {len(columns[0])} samples")
    return found


def _finite(scores: Scores) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    finite: np.ndarray[tuple[int], np.dtype[np.bool_]] = np.isfinite(scores.per_sample) & np.isfinite(
        scores.columns()
    ).all(axis=1)
    return finite
