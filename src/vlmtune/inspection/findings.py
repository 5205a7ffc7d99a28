"""What a check reports: findings in words, numbers for machines, and whether training would be refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any, Literal

import numpy as np

from vlmtune.data.sample import ImageRef

Level = Literal["error", "warning", "note"]
Histogram = list[tuple[str, int]]
EXAMPLES = 20


@dataclass(frozen=True)
class Finding:
    """One thing that a person should know.

    Attributes:
        level: ``error`` spoils rows or the run, ``warning`` may spoil what is learned, ``note`` is good to know.
        kind: two or three words, the same for findings alike.
        count: rows or images concerned.
        text: what was found.
        advice: what to do; empty where nothing need be done.
        examples: names of the first of them, with the reason.
        images: images to show with their names, the worst first.
    """

    level: Level
    kind: str
    count: int
    text: str
    advice: str = ""
    examples: tuple[str, ...] = ()
    images: tuple[tuple[str, ImageRef], ...] = ()


@dataclass
class Report:
    """Everything a check found.

    Attributes:
        source: the data's name.
        format: its format.
        findings: in the order they were found.
        refused: why training would be refused, or would stop; empty when it would not.
        numbers: counts for machines, by section.
        histograms: title -> (label, count) bars.
        answers: the most frequent short answers, where answers are short.
    """

    source: str
    format: str
    findings: list[Finding] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    answers: Histogram = field(default_factory=list)

    def add(
        self,
        level: Level,
        kind: str,
        names: Sequence[str],
        text: str,
        advice: str = "",
        images: Iterable[tuple[str, ImageRef]] = (),
        *,
        count: int | None = None,
    ) -> None:
        """Add a finding about rows or images, unless there are none."""
        count = len(names) if count is None else count
        if count:
            shown = tuple(islice(images, EXAMPLES))
            self.findings.append(Finding(level, kind, count, text, advice, tuple(names[:EXAMPLES]), shown))

    def sorted_findings(self) -> list[Finding]:
        """Findings, errors first."""
        order = {"error": 0, "warning": 1, "note": 2}
        return sorted(self.findings, key=lambda finding: order[finding.level])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "source": self.source,
            "format": self.format,
            "training_would_be_refused": bool(self.refused),
            "refused_because": self.refused,
            "findings": [
                {
                    "level": finding.level,
                    "kind": finding.kind,
                    "count": finding.count,
                    "text": finding.text,
                    "advice": finding.advice,
                    "examples": list(finding.examples),
                }
                for finding in self.sorted_findings()
            ],
            "numbers": self.numbers,
            "histograms": {name: [list(bar) for bar in bars] for name, bars in self.histograms.items()},
            "answers": [list(bar) for bar in self.answers],
        }


def many(count: int, one: str, more: str) -> str:
    """Say how many: ``many(2, "image is", "images are")`` is "2 images are"."""
    return f"{count:,} {one if count == 1 else more}"


def histogram(values: Sequence[int], *, bars: int = 12) -> Histogram:
    """Count whole numbers in ranges of equal width, and the lowest and highest 1 % in a range of their own.

    Args:
        values: what is counted.
        bars: most ranges of equal width.
    """
    if not len(values):
        return []
    array = np.asarray(values, dtype=np.int64)
    low, high = (int(np.quantile(array, share, method="nearest")) for share in (0.01, 0.99))
    width = max(1, -(-(high - low + 1) // bars))
    starts = list(range(low, high + 1, width))
    edges = [*starts, min(starts[-1] + width, high + 1)]
    ranges = [(int(array.min()), low - 1), *((a, b - 1) for a, b in pairwise(edges)), (edges[-1], int(array.max()))]
    return [
        (str(start) if start == stop else f"{start:,} to {stop:,}", int(((array >= start) & (array <= stop)).sum()))
        for start, stop in ranges
        if start <= stop
    ]
