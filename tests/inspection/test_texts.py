"""What is kept of the texts of many rows."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.inspection.findings import Report
from vlmtune.inspection.texts import read_texts, report_texts


class Rows:
    """Rows that are made as they are read, two about each image."""

    def __init__(self, count: int, answer: str) -> None:
        self.count, self.answer = count, answer

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> dict[str, Any]:
        messages = (
            Message.make("user", f"What is at place {row}?", images=1),
            Message.make("assistant", self.answer.format(row)),
        )
        return Sample(f"row {row}", (ImageRef(f"{row // 2}.jpg"),), messages).to_row()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(self.count))


@pytest.mark.parametrize("answer", ["a caption of more than a few words, the {}th", "word {}"])
def test_of_a_row_a_few_numbers_are_kept(answer) -> None:
    kept = []
    for count in (500, 5500):
        tracemalloc.start()
        facts = read_texts(Rows(count, answer))
        kept.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(facts.answers) == count
    # Seven numbers of eight bytes at most, in arrays that have some room.
    assert (kept[1] - kept[0]) / 5000 < 80


def test_examples_are_read_again() -> None:
    report = Report("data", "messages")
    report_texts(report, "training", read_texts(Rows(40, "the very same long answer")))
    (finding,) = report.findings
    assert finding.kind == "repeated text" and finding.count == 39
    assert finding.examples == ("40 times: 'the very same long answer'",)
