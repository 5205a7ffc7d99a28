"""Perplexity of the references as answers (Jelinek et al. 1977, doi:10.1121/1.2016299)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmtune.evaluation.metrics.base import Array, Metric, Scores


def perplexity(
    answers: Sequence[str], references: Sequence[Sequence[str]], losses: Sequence[tuple[float, int]]
) -> Scores:
    """Return exp of the mean loss a token, all tokens of all samples alike.

    Args:
        answers: not looked at.
        references: not looked at.
        losses: of each sample's references: the summed loss in nats, and the tokens, those that end them included.

    Raises:
        ValueError: a sample has no loss: its references were not scored when it was answered.
    """
    missing = sum(not tokens for _, tokens in losses)
    if missing:
        raise ValueError(
            f"{missing} samples have no loss of their references; name perplexity when the answers are generated"
        )
    sums = np.asarray(losses, dtype=np.float64).reshape(-1, 2)
    return Scores(_of_sums(sums), sums, _of_sums)


def _of_sums(sums: Array) -> Array:
    return np.asarray(np.exp(sums[..., 0] / sums[..., 1]))


PERPLEXITY = Metric(
    name="perplexity",
    summary="how many tokens the model wavers between, at each token of the references; 1 and up, lower is better",
    compute=perplexity,
    paper="doi:10.1121/1.2016299",
    code="exp of the training loss",
    percent=False,
    higher_is_better=False,
    reads="reference_loss",
)
