"""What can be seen in the texts alone: lengths, repeats, contradictions, and answers that need no image."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from vlmtune.data.sample import Sample
from vlmtune.inspection.findings import EXAMPLES, Report, histogram, many

SHORT_WORDS = 3
# From this share of short answers on, the data are questions with short answers.
MOSTLY = 0.8
ONE_ANSWER_SHARE = 0.5
REPEATED_SHARE = 0.1
# Answers in the chart of the most common.
CHARTED = 20

_Integers = npt.NDArray[np.int64]
# Rows as a data set gives them.
Rows = Sequence[Mapping[str, Any]]


def _integers() -> array[int]:
    return array("q")


@dataclass
class TextFacts:
    """What was counted over the rows of one side of the data: numbers and hashes, so that millions of rows fit.

    Attributes:
        dataset: the rows, from which the texts of examples are read again.
        words: words of each last answer.
        answers: hash of each last answer, normalised.
        answered: the row of each.
        without_answer: rows whose last turn is no answer.
        without_image: rows of text alone.
        marked: rows with ``<image>`` as words of a text.
        questions: of the rows with answers of a few words, the hash of image names and prompt.
        references: of those, the hash of all answers named as right.
    """

    dataset: Rows
    words: array[int] = field(default_factory=_integers)
    answers: array[int] = field(default_factory=_integers)
    answered: array[int] = field(default_factory=_integers)
    without_answer: array[int] = field(default_factory=_integers)
    without_image: array[int] = field(default_factory=_integers)
    marked: array[int] = field(default_factory=_integers)
    questions: array[int] = field(default_factory=_integers)
    references: array[int] = field(default_factory=_integers)

    @property
    def short(self) -> bool:
        """Whether most answers are of a few words."""
        return bool(self.words) and len(self.questions) >= MOSTLY * len(self.words)

    @property
    def short_rows(self) -> _Integers:
        """Rows with answers of a few words."""
        return np.frombuffer(self.answered, np.int64)[np.frombuffer(self.words, np.int64) <= SHORT_WORDS]

    @cached_property
    def distinct(self) -> tuple[_Integers, _Integers, _Integers]:
        """Hash, first place among the answers and count of each distinct answer, the most common first."""
        values, first, counts = np.unique(np.frombuffer(self.answers, np.int64), return_index=True, return_counts=True)
        order = np.lexsort((first, -counts))
        return values[order], first[order], counts[order]

    def answer(self, place: int) -> str:
        """The answer at a place among the answers, normalised."""
        return self.answer_of(self.answered[place])

    def answer_of(self, row: int) -> str:
        """The last answer of a row that has one, normalised."""
        return normal(Sample.from_row(self.dataset[row]).target or "")

    def names(self, rows: Sequence[int]) -> list[str]:
        """Ids of the first of some rows."""
        return [str(self.dataset[row]["id"]) for row in rows[:EXAMPLES]]


def read_texts(dataset: Rows) -> TextFacts:
    """Count over rows; of their texts hashes alone are kept."""
    facts = TextFacts(dataset)
    for row, values in enumerate(dataset):
        sample = Sample.from_row(values)
        if not sample.images:
            facts.without_image.append(row)
        if any("<image>" in message.text for message in sample.messages):
            facts.marked.append(row)
        if sample.target is None:
            facts.without_answer.append(row)
            continue
        answer = normal(sample.target)
        words = len(answer.split())
        facts.words.append(words)
        facts.answers.append(hash(answer))
        facts.answered.append(row)
        # Long answers may well be said in several ways.
        if words <= SHORT_WORDS:
            facts.questions.append(hash((sample.images, sample.prompt)))
            # Captions of an image differ and are each other's references; answers that are not contradict each other.
            facts.references.append(hash(frozenset(normal(reference) for reference in sample.references)))
    return facts


def normal(text: str) -> str:
    """A text for comparison: lower case, single spaces, without a last full stop."""
    return " ".join(text.lower().split()).rstrip(".")


def report_texts(report: Report, side: str, facts: TextFacts, against: TextFacts | None = None) -> None:
    """Add what the texts of one side tell.

    Args:
        report: receives the findings.
        side: ``training`` or ``evaluation``.
        facts: of that side.
        against: the training side's, when this is the evaluation's.
    """
    report.histograms[f"Words of an answer, {side}"] = histogram(facts.words)
    count = len(facts.without_answer)
    report.add("error" if side == "training" else "note", "no answer", facts.names(facts.without_answer),
               f"{many(count, f'{side} row ends', f'{side} rows end')} without an answer; there is nothing to learn "
               "from.",
               "Give them an answer or leave them out.", count=count)  # fmt: skip
    count = len(facts.without_image)
    report.add("note", "no image", facts.names(facts.without_image),
               f"{many(count, f'{side} row is', f'{side} rows are')} text alone.", count=count)  # fmt: skip
    count = len(facts.marked)
    report.add("warning", "image mark in a text", facts.names(facts.marked),
               f"{many(count, f'{side} row has', f'{side} rows have')} '<image>' as a word of a text, "
               "where no image stands.", "Take the words out.", count=count)  # fmt: skip
    contrary = _contrary(facts)
    report.add("warning", "contradiction", [_said(facts, *rows) for rows in contrary[:EXAMPLES]],
               f"{many(len(contrary), 'time', 'times')} the same question about the same image has different answers "
               f"in the {side} data.", "Keep one answer, or name all of them as references.",
               count=len(contrary))  # fmt: skip
    if facts.short:
        _report_answers(report, side, facts, against)
    else:
        _report_repeats(report, side, facts)


def _report_answers(report: Report, side: str, facts: TextFacts, against: TextFacts | None) -> None:
    values, first, counts = facts.distinct
    total = int(counts.sum())
    common = [(facts.answer(int(place)), int(n)) for place, n in zip(first[:CHARTED], counts[:CHARTED], strict=True)]
    report.answers = report.answers or common
    answer, count = common[0]
    if count > ONE_ANSWER_SHARE * total and total > 1:
        report.add("warning", "one answer for most", [f"{text!r}: {n:,}" for text, n in common[:5]],
                   f"{count / total:.0%} of the {side} answers are {answer!r}: a model that always says so "
                   "scores that much without looking.",
                   "Balance the answers, or report the score beside this share.", count=count)  # fmt: skip
    if against is not None:
        unseen = ~np.isin(values, against.distinct[0])
        rows, kinds = int(counts[unseen].sum()), int(unseen.sum())
        report.add("warning", "unseen answers", [facts.answer(int(place)) for place in first[unseen][:EXAMPLES]],
                   f"{many(rows, 'evaluation row asks', 'evaluation rows ask')} for an answer that training never "
                   f"shows ({many(kinds, 'answer', 'answers')}).",
                   count=rows)  # fmt: skip


def _report_repeats(report: Report, side: str, facts: TextFacts) -> None:
    _, first, counts = facts.distinct
    rows = int((counts - 1).sum())
    repeated = zip(first[:EXAMPLES].tolist(), counts[counts > 1][:EXAMPLES].tolist(), strict=False)
    level = "warning" if rows > REPEATED_SHARE * counts.sum() else "note"
    report.add(level, "repeated text", [f"{n:,} times: {facts.answer(place)[:80]!r}" for place, n in repeated],  # type: ignore[arg-type]
               f"{many(rows, f'{side} text repeats', f'{side} texts repeat')} another row's, word for word.",
               "Where they say nothing of their image, leave them out." if level == "warning" else "",
               count=rows)  # fmt: skip


def _contrary(facts: TextFacts) -> list[tuple[int, int]]:
    """For each question whose short answers differ without being each other's references: two rows that show it."""
    questions, references = (np.frombuffer(one, np.int64) for one in (facts.questions, facts.references))
    rows, order = facts.short_rows, np.argsort(questions, kind="stable")
    _, starts, counts = np.unique(questions[order], return_index=True, return_counts=True)
    found = []
    for start, count in zip(starts[counts > 1], counts[counts > 1], strict=True):
        members = order[start : start + count]
        if len(np.unique(references[members])) == 1:
            continue
        answers = {facts.answer_of(int(row)): int(row) for row in rows[members][::-1]}
        if len(answers) > 1:
            one, other, *_ = sorted(answers.values())
            found.append((one, other))
    return sorted(found)


def _said(facts: TextFacts, one: int, other: int) -> str:
    names, answers = facts.names([one, other]), [facts.answer_of(row) for row in (one, other)]
    return f"{names[0]} and {names[1]}: {answers[0]!r} and {answers[1]!r}"
