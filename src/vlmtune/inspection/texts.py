"""What can be seen in the texts alone: lengths, repeats, contradictions, and answers that need no image."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from vlmtune.data.sample import Sample
from vlmtune.inspection.findings import Report, histogram, many

SHORT_WORDS = 3
# From this share of short answers on, the data are questions with short answers.
MOSTLY = 0.8
ONE_ANSWER_SHARE = 0.5
REPEATED_SHARE = 0.1


@dataclass
class TextFacts:
    """What was counted over the rows of one side of the data.

    Attributes:
        rows: number of rows.
        words: words of each last answer.
        answers: normalised last answer -> rows.
        without_answer: ids of rows whose last turn is no answer.
        without_image: ids of rows of text alone.
        marked: ids of rows with ``<image>`` as words of a text.
        by_question: (image names, prompt) -> (id, answer, references) of each row.
    """

    rows: int = 0
    words: list[int] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    without_answer: list[str] = field(default_factory=list)
    without_image: list[str] = field(default_factory=list)
    marked: list[str] = field(default_factory=list)
    by_question: dict[int, list[tuple[str, str, int]]] = field(default_factory=lambda: defaultdict(list))

    @property
    def short(self) -> bool:
        """Whether most answers are of a few words."""
        few = sum(count <= SHORT_WORDS for count in self.words)
        return bool(self.words) and few >= MOSTLY * len(self.words)


def read_texts(samples: Iterable[Sample]) -> TextFacts:
    """Count over samples; only what the counts need is kept."""
    facts = TextFacts()
    for sample in samples:
        facts.rows += 1
        if not sample.images:
            facts.without_image.append(sample.id)
        if any("<image>" in message.text for message in sample.messages):
            facts.marked.append(sample.id)
        if sample.target is None:
            facts.without_answer.append(sample.id)
            continue
        answer = normal(sample.target)
        facts.words.append(len(answer.split()))
        facts.answers[answer] += 1
        # Captions of an image differ and are each other's references; answers that are not contradict each other.
        known = frozenset(normal(reference) for reference in sample.references)
        question = hash((sample.images, sample.prompt))
        facts.by_question[question].append((sample.id, answer, hash(known)))
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
    report.add("error" if side == "training" else "note", "no answer", facts.without_answer,
               f"{many(len(facts.without_answer), f'{side} row ends', f'{side} rows end')} without an answer; there is "
               "nothing to learn from.",
               "Give them an answer or leave them out.")  # fmt: skip
    report.add("note", "no image", facts.without_image,
               f"{many(len(facts.without_image), f'{side} row is', f'{side} rows are')} text alone.")  # fmt: skip
    report.add("warning", "image mark in a text", facts.marked,
               f"{many(len(facts.marked), f'{side} row has', f'{side} rows have')} '<image>' as a word of a text, "
               "where no image stands.", "Take the words out.")  # fmt: skip
    contrary = [
        f"{found[0][0]} and {found[1][0]}: {found[0][1]!r} and {found[1][1]!r}"
        for asked in facts.by_question.values()
        if len(found := _contrary(asked)) > 1
    ]
    report.add("warning", "contradiction", contrary,
               f"{many(len(contrary), 'time', 'times')} the same question about the same image has different answers "
               f"in the {side} data.", "Keep one answer, or name all of them as references.")  # fmt: skip
    total = sum(facts.answers.values())
    if facts.short:
        common = facts.answers.most_common(20)
        report.answers = report.answers or common
        answer, count = common[0]
        if count > ONE_ANSWER_SHARE * total and total > 1:
            report.add("warning", "one answer for most", [f"{text!r}: {n:,}" for text, n in common[:5]],
                       f"{count / total:.0%} of the {side} answers are {answer!r}: a model that always says so "
                       "scores that much without looking.",
                       "Balance the answers, or report the score beside this share.", count=count)  # fmt: skip
        if against is not None:
            unseen = [text for text in facts.answers if text not in against.answers]
            rows = sum(facts.answers[text] for text in unseen)
            report.add("warning", "unseen answers", unseen,
                       f"{many(rows, 'evaluation row asks', 'evaluation rows ask')} for an answer that training never "
                       f"shows ({many(len(unseen), 'answer', 'answers')}).",
                       count=rows)  # fmt: skip
    else:
        repeated = [(text, n) for text, n in facts.answers.most_common() if n > 1]
        rows = sum(n - 1 for _, n in repeated)
        level = "warning" if rows > REPEATED_SHARE * total else "note"
        report.add(level, "repeated text", [f"{n:,} times: {text[:80]!r}" for text, n in repeated],  # type: ignore[arg-type]
                   f"{many(rows, f'{side} text repeats', f'{side} texts repeat')} another row's, word for word.",
                   "Where they say nothing of their image, leave them out." if level == "warning" else "",
                   count=rows)  # fmt: skip


def _contrary(asked: list[tuple[str, str, int]]) -> list[tuple[str, str]]:
    """Rows (id, answer) of one question whose short answers differ; long ones may well be said in several ways."""
    if len({known for _, _, known in asked}) == 1:
        return []
    by_answer: dict[str, str] = {}
    for name, answer, _ in asked:
        if len(answer.split()) <= SHORT_WORDS:
            by_answer.setdefault(answer, name)
    return [(name, answer) for answer, name in by_answer.items()]
