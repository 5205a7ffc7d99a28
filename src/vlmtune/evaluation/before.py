"""What can be told of an evaluation before any answer is generated: missing references, metrics that cannot score."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from vlmtune.data.sample import Sample
from vlmtune.errors import EvaluationError
from vlmtune.evaluation.metrics import get_metric
from vlmtune.evaluation.metrics.robust import robust_scores

logger = logging.getLogger("vlmtune.evaluation")
TRIED = 50
# What a metric reads besides answers and references that is there before any answer.
_KNOWN = ("", "meta")


def require_scorable(samples: Sequence[Sample], metrics: Sequence[str]) -> None:
    """Refuse data that nothing can be scored on; warn of samples without references and of metrics that fail.

    Raises:
        EvaluationError: no sample has references, or no metric can score them.
    """
    scored = [sample for sample in samples if sample.references]
    if not scored:
        such = f", such as {samples[0].id!r}" if samples else ""
        raise EvaluationError(
            f"None of the {len(samples):,} samples has references to score against{such}. Name data that hold the "
            "right answers; vlmtune predict answers questions without them."
        )
    if bare := [sample.id for sample in samples if not sample.references]:
        logger.warning(
            "%s of %s samples have no references and are not scored, such as %r",
            *(f"{len(bare):,}", f"{len(samples):,}", bare[0]),
        )
    failed = unscorable(scored, metrics)
    if failed and len(failed) == len(metrics):
        raise EvaluationError("\n".join(failed.values()))
    for said in failed.values():
        logger.warning("%s", said)


def unscorable(samples: Sequence[Sample], metrics: Iterable[str]) -> dict[str, str]:
    """Let each metric score the references as if they were answers.

    Args:
        samples: with references.
        metrics: names of metrics; one that fails on the first 50 samples is tried on all.

    Returns:
        Metric -> why it can score none.
    """
    return {name: problem for name in metrics if (problem := _problem(name, samples))}


def _problem(name: str, samples: Sequence[Sample]) -> str | None:
    """Return why a metric can score none of the samples, or ``None``."""
    metric = get_metric(name)
    if metric.reads not in _KNOWN:
        return None
    for tried in (samples[:TRIED], samples):
        references = [sample.references for sample in tried]
        read = [getattr(sample, metric.reads) for sample in tried] if metric.reads else None
        try:
            robust_scores(metric, [one[0] for one in references], references, [sample.id for sample in tried], read)
        except ValueError as error:
            problem = f"{name} cannot score the references of these data: {error}."
        else:
            return None
    return problem
