"""What a chat template writes around the texts of a conversation, found out once for all of its shape.

A shape is the roles of the turns, and the texts and images that each is made of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import jinja2
from jinja2 import nodes

from vlmtune.batching.encode import Encoder
from vlmtune.data.sample import Message, Part, Sample

# What templates do to white space around a text.
CHANGES: tuple[Callable[[str], str], ...] = (str, str.strip, str.rstrip, str.lstrip)


@dataclass(frozen=True)
class ImagePlace:
    """What the place of an image becomes.

    Attributes:
        around: the text before its tokens, the last of these, and the text after them.
        tokens: how many they are.
        soft: how many of them are soft tokens.
    """

    around: tuple[str, str, str]
    tokens: int
    soft: int


@dataclass(frozen=True)
class Piece:
    """What stands from one control token up to the next: texts of a row between fixed ones.

    Attributes:
        fixed: texts, one more than there are numbers.
        numbers: of the row's texts.
        answer: number of the text that is learned, and how many characters before it are learned too.
    """

    fixed: tuple[str, ...]
    numbers: tuple[int, ...]
    answer: tuple[int, int] | None

    def fill(self, texts: Sequence[str]) -> tuple[str, int]:
        """Return the piece with a row's texts, and where in it the answer begins; -1 without one."""
        text, start = self.fixed[0], -1
        for number, after in zip(self.numbers, self.fixed[1:], strict=True):
            if self.answer is not None and number == self.answer[0]:
                start = len(text) - self.answer[1]
            text += texts[number] + after
        return text, start


@dataclass(frozen=True)
class Shape:
    """Conversations that differ in nothing but their texts and images.

    Attributes:
        pieces: those that hold texts.
        changes: what becomes of each text.
        images: what stands around each image's tokens.
        tokens: those of all other pieces, without the images'.
    """

    pieces: tuple[Piece, ...]
    changes: tuple[Callable[[str], str], ...]
    images: tuple[tuple[str, str, str], ...]
    tokens: int = 0


def find_shape(encoder: Encoder, cut: re.Pattern[str], sample: Sample, images: Sequence[ImagePlace]) -> Shape | None:
    """Return the shape of a sample, without ``tokens``; ``None`` where its texts cannot be told from the template.

    Args:
        encoder: renders conversations.
        cut: finds the control tokens at which the tokenizer cuts a text.
        sample: with images that become ``images``.
        images: its image places.

    Raises:
        EncodingError: the template does not take such a conversation.
    """
    marks = [f"Qz{number}zQ" for number in range(number_of_texts(sample))]
    marked = with_texts(sample, marks)
    rendered = encoder.render(marked, marked.messages)
    any_mark = "|".join(marks)
    fixed = re.split(any_mark, rendered)
    token = encoder.processor.image_token
    if re.findall(any_mark, rendered) != marks or rendered.count(token) != len(images):
        return None
    changes = _changes(encoder, sample, marks, fixed)
    answers = _answers(encoder, marked, marks, rendered)
    if changes is None or answers is None:
        return None
    places = iter(images)
    fixed = [re.sub(re.escape(token), lambda _: "".join(next(places).around), text) for text in fixed]
    return Shape(tuple(_pieces(cut, fixed, answers)), changes, tuple(image.around for image in images))


def number_of_texts(sample: Sample) -> int:
    """How many parts of a sample are texts."""
    return sum(part.type == "text" for message in sample.messages for part in message.parts)


def with_texts(sample: Sample, texts: Sequence[str]) -> Sample:
    """Return the sample with other texts."""
    left = iter(texts)
    messages = tuple(
        Message(m.role, tuple(Part("text", next(left)) if part.type == "text" else part for part in m.parts))
        for m in sample.messages
    )
    return replace(sample, messages=messages, meta={})


def probes(encoder: Encoder) -> list[str]:
    """Texts that a template could take otherwise than others: its own words first and last, and odd white space."""
    template = encoder.processor.chat_template
    words: list[str] = []
    for text in template.values() if isinstance(template, dict) else [template or ""]:
        found = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text).find_all(nodes.Const)
        words += [const.value for const in found if isinstance(const.value, str)]
    words = [word for word in dict.fromkeys(words) if not any(token in word for token in encoder.control_tokens)]
    own = [f"{word}x{words[(place + 1) % len(words)]}" for place, word in enumerate(words)]
    return ["A dog.", " two\n\nlines \n", "\t- x, \N{DOG FACE} é\N{NO-BREAK SPACE}", "word " * 300, "?", *own]


def _changes(
    encoder: Encoder, sample: Sample, marks: Sequence[str], fixed: Sequence[str]
) -> tuple[Callable[[str], str], ...] | None:
    padded = [f" \t{mark}\t " for mark in marks]
    spaced = with_texts(sample, padded)
    rest = encoder.render(spaced, spaced.messages).removeprefix(fixed[0])
    changes: list[Callable[[str], str]] = []
    for text, after in zip(padded, fixed[1:], strict=True):
        change = next((change for change in CHANGES if rest.startswith(change(text) + after)), None)
        if change is None:
            return None
        changes.append(change)
        rest = rest[len(change(text) + after) :]
    return None if rest else tuple(changes)


def _answers(encoder: Encoder, sample: Sample, marks: Sequence[str], rendered: str) -> dict[int, int] | None:
    """Number of each answer's first text -> how many characters before it are learned."""
    answers: dict[int, int] = {}
    number = 0
    for turn, message in enumerate(sample.messages):
        if message.role == "assistant":
            if not message.text:
                return None
            prompt = encoder.render(sample, sample.messages[:turn], generate=True)
            answers[number] = rendered.index(marks[number]) - len(prompt)
            if not rendered.startswith(prompt) or answers[number] < 0:
                return None
        number += sum(part.type == "text" for part in message.parts)
    return answers


def _pieces(cut: re.Pattern[str], fixed: Sequence[str], answers: Mapping[int, int]) -> Iterator[Piece]:
    """Cut a conversation into pieces, and yield those that hold texts."""
    around: list[str] = [""]
    numbers: list[int] = []
    for number, text in enumerate(fixed):
        starts = [match.start() for match in cut.finditer(text)]
        around[-1] += text[: starts[0]] if starts else text
        for start, stop in pairwise([*starts, len(text)]):
            yield from _piece(around, numbers, answers)
            around, numbers = [text[start:stop]], []
        if number < len(fixed) - 1:
            numbers.append(number)
            around.append("")
    yield from _piece(around, numbers, answers)


def _piece(around: Sequence[str], numbers: Sequence[int], answers: Mapping[int, int]) -> Iterator[Any]:
    if numbers:
        answer = next(((number, answers[number]) for number in numbers if number in answers), None)
        yield Piece(tuple(around), tuple(numbers), answer)
