"""What question formats share: a question about an image, its answers, and multiple choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from vlmtune.data.formats.base import QUESTION, own_prompt
from vlmtune.data.formats.files import RowError
from vlmtune.data.sample import ImageRef, Message, Sample

# Entry of a sample's meta: the letters of its options.
LETTERS = "letters"
BY_LETTER = "Answer with the option's letter from the given choices directly."


def question_sample(
    id: str,
    images: Sequence[ImageRef],
    question: Any,
    answers: Sequence[Any],
    *,
    target: Any = None,
    prompt: str | None = None,
    meta: dict[str, Any] | None = None,
) -> Sample:
    """Make a sample of a question and its answers.

    Args:
        id: the sample's id.
        images: the images asked about.
        question: what the user asks.
        answers: every answer that counts as right, repeats kept: how often people gave one is part of VQA accuracy.
            None of them makes a sample without an answer.
        target: the answer to learn; by default the most frequent one, the first of several.
        prompt: a person's own, where ``{question}`` stands for the question.
        meta: whatever the format knows besides.

    Raises:
        RowError: an empty question or answer.
    """
    text = _text(question)
    if not text:
        raise RowError("its question is empty", "empty text")
    references = [_text(answer) for answer in answers]
    chosen = _text(target) or (Counter(references).most_common(1)[0][0] if references else "")
    if (references or target is not None) and (not chosen or not all(references)):
        raise RowError(f"the question {text[:60]!r} has an empty answer", "empty text")
    own = own_prompt(prompt, QUESTION)
    asked = text if own is None else own.replace(QUESTION, text)
    messages = [Message.make("user", asked, images=len(images))]
    if chosen:
        messages.append(Message.make("assistant", chosen))
    return Sample(id, tuple(images), tuple(messages), tuple(references) or ((chosen,) if chosen else ()), meta or {})


def choice_question(question: Any, choices: Any, answer: Any, hint: Any = None) -> tuple[str, str, str]:
    """Return the prompt of a multiple-choice question, the right letter, and all its letters.

    Args:
        question: the question.
        choices: the options, as texts.
        answer: the right option: its number from 0, its letter, or its text; the number may be a text (AI2D).
        hint: a context that stands before the question.

    Raises:
        RowError: there are no options, or the answer is none of them.
    """
    if not _text(question):
        raise RowError("its question is empty", "empty text")
    options = [_text(choice) for choice in choices] if isinstance(choices, list | tuple) else []
    if not 1 < len(options) <= len(ascii_uppercase) or not all(options):
        raise RowError(f"its choices are {choices!r}; it needs 2 to 26 texts")
    letters = ascii_uppercase[: len(options)]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        letter = letters[answer]
    elif isinstance(answer, str) and answer in options:
        letter = letters[options.index(answer)]
    elif isinstance(answer, str) and len(answer) == 1 and answer.upper() in letters:
        letter = answer.upper()
    elif isinstance(answer, str) and answer.isdecimal() and int(answer) < len(options):
        letter = letters[int(answer)]
    else:
        raise RowError(f"its answer {answer!r} is none of its {len(options)} choices")
    lines = [_text(question), *(f"{letter}. {text}" for letter, text in zip(letters, options, strict=True)), BY_LETTER]
    return "\n".join([f"Context: {_text(hint)}", *lines] if _text(hint) else lines), letter, letters


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()
