"""Two sets of answers to the same samples: which is better, by how much, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmtune.errors import EvaluationError
from vlmtune.evaluation.answering import Prediction
from vlmtune.evaluation.metrics import Scores
from vlmtune.evaluation.metrics.bootstrap import paired_difference
from vlmtune.evaluation.runner import score


@dataclass(frozen=True)
class Comparison:
    """Base against tuned on the same samples.

    Attributes:
        table: metric -> ``base``, ``tuned``, ``difference``, ``low``, ``high`` (95 % interval of the
            difference), ``n``, ``percent``.
        pairs: (base, tuned) answers of each sample.
        scores: metric -> (base, tuned) scores of the pairs.
        answered: how many samples each of the two answered.
    """

    table: dict[str, dict[str, Any]]
    pairs: list[tuple[Prediction, Prediction]]
    scores: dict[str, tuple[Scores, Scores]] = field(default_factory=dict)
    answered: tuple[int, int] = (0, 0)


def compare(base: Sequence[Prediction], tuned: Sequence[Prediction], metrics: Sequence[str]) -> Comparison:
    """Compare two runs on the samples that both answered.

    Raises:
        EvaluationError: they have no sample in common, or other references for one.
    """
    by_id = {prediction.id: prediction for prediction in base}
    pairs = [(by_id[prediction.id], prediction) for prediction in tuned if prediction.id in by_id]
    if not pairs:
        raise EvaluationError("The two sets of predictions have no sample in common; compare runs on the same data.")
    changed = next((one.id for one, other in pairs if one.references != other.references), None)
    if changed:
        raise EvaluationError(
            f"Sample {changed!r} has other references in the two sets; they are not of the same data."
        )
    first = score([one for one, _ in pairs], metrics)
    second = score([other for _, other in pairs], metrics)
    table = {}
    for name in metrics:
        if said := first.failed.get(name) or second.failed.get(name):
            raise EvaluationError(said)
        try:
            difference, (low, high) = paired_difference(first.scores[name], second.scores[name])
        except ValueError as error:
            raise EvaluationError(f"{name} cannot compare the two: {error}.") from error
        table[name] = {
            "base": first.scores[name].value,
            "tuned": second.scores[name].value,
            "difference": difference,
            "low": low,
            "high": high,
            "n": len(pairs),
            "percent": first.table[name]["percent"],
        }
    both = {name: (first.scores[name], second.scores[name]) for name in metrics}
    return Comparison(table, pairs, both, (len(base), len(tuned)))


def format_comparison(comparison: Comparison) -> str:
    """Return the comparison as an aligned table for people."""
    rows = [("metric", "base", "tuned", "difference (95 % interval)")]
    for name, entry in comparison.table.items():
        factor, digits = (100, 1) if entry["percent"] else (1, 3)
        base, tuned, difference, low, high = (
            entry[key] * factor for key in ("base", "tuned", "difference", "low", "high")
        )
        signed = [f"{value:+.{digits}f}" for value in (difference, low, high)]
        rows.append((name, f"{base:.{digits}f}", f"{tuned:.{digits}f}", "{} ({} to {})".format(*signed)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(comparison.pairs) < max(comparison.answered):
        base, tuned = comparison.answered
        lines.append(
            f"These are of the {len(comparison.pairs):,} samples that both answered, of {base:,} (base) and {tuned:,} "
            "(tuned)."
        )
    return "\n".join(lines)
