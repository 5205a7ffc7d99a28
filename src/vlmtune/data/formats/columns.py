"""What the columns of a row say: which kind of row it is, and what the data may call them otherwise."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

from vlmtune.data.formats.files import RowError
from vlmtune.errors import DataError, nearest

IMAGE_COLUMNS = (
    *("images", "image", "image_path", "file_name", "file_names", "img_path", "image_file", "image_name", "filename"),
    *("img", "image_url"),
)
QUESTION_COLUMNS = ("question", "query")
ANSWER_COLUMNS = ("answer", "answers", "label")
CHOICE_COLUMNS = ("choices", "options")
PHRASE_COLUMNS = ("sent", "expression", "phrase")
CAPTION_COLUMNS = ("caption", "captions", "text", "sentences")
# What a user and what the assistant says: TRL, PaliGemma, ms-swift, Alpaca.
PAIRS = (
    ("prompt", "completion"), ("prefix", "suffix"), ("query", "response"), ("prompt", "response"),
    ("instruction", "output"), ("instruction", "response"),
)  # fmt: skip
# Lists of turns, the first that there is counts.
TURN_COLUMNS = ("messages", "conversations", "conversation")
# All that a row may have.
COLUMNS = tuple(
    dict.fromkeys(
        (
            *(*TURN_COLUMNS, "system", "history", "input", "texts", *(name for pair in PAIRS for name in pair)),
            *(*QUESTION_COLUMNS, *ANSWER_COLUMNS, *CHOICE_COLUMNS, "hint", "multiple_choice_answer"),
            *("objects", "bbox", "width", "height", "ground_truth", "id", "references", "meta"),
            *(*IMAGE_COLUMNS, *PHRASE_COLUMNS, *CAPTION_COLUMNS),
        )
    )
)
# image_1, image_2, ... (MMMU) and caption_0, caption_1, ... (captions of an image in columns of their own).
_NUMBERED = re.compile(r"(?P<name>image|caption)_?(?P<number>\d{1,2})")


def shape_of(columns: Collection[str]) -> str | None:
    """Return which kind of row has these columns: the column that says so, or ``None``."""
    return _shape_of(tuple(columns))


# Rows of one file mostly have the same columns.
@lru_cache(maxsize=1024)
def _shape_of(names: tuple[str, ...]) -> str | None:
    columns = {f"{match['name']}s" if (match := _NUMBERED.fullmatch(name)) else name for name in names}
    has_image = any(name in columns for name in IMAGE_COLUMNS)
    if (turns := next((name for name in TURN_COLUMNS if name in columns), None)) is not None:
        return turns
    if pair_of(columns):
        return "completion"
    if "texts" in columns and has_image:
        return "texts"
    if any(name in columns for name in QUESTION_COLUMNS) and any(name in columns for name in ANSWER_COLUMNS):
        return "question"
    if has_image and "objects" in columns:
        return "objects"
    if has_image and "bbox" in columns and any(name in columns for name in PHRASE_COLUMNS):
        return "bbox"
    if has_image and "ground_truth" in columns:
        return "ground_truth"
    # A row with a number of a question and a text asks something; its text is no caption.
    if has_image and "question_id" not in columns:
        return next((name for name in CAPTION_COLUMNS if name in columns), None)
    return None


def pair_of(columns: Collection[str]) -> tuple[str, str] | None:
    """Return the first pair of ``PAIRS`` that a row has."""
    return next((pair for pair in PAIRS if pair[0] in columns and pair[1] in columns), None)


def gathered(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row with its numbered columns as one: ``images`` of ``image_1``, ``image_2``, and so for captions."""
    numbered = _numbered(tuple(row))
    if not numbered:
        return row
    known = {"images": IMAGE_COLUMNS, "captions": CAPTION_COLUMNS}
    found: dict[str, list[Any]] = {}
    for name, column in numbered:
        if row[column] not in (None, "") and all(row.get(one) is None for one in known[name]):
            found.setdefault(name, []).append(row[column])
    return {**row, **found}


@lru_cache(maxsize=1024)
def _numbered(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """The list that each numbered column belongs to, and its name, in the order of their numbers."""
    matches = [match for name in names if (match := _NUMBERED.fullmatch(name))]
    return tuple((f"{match['name']}s", match[0]) for match in sorted(matches, key=lambda match: int(match["number"])))


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return a row with vlmtune's names for the columns that a person named.

    Raises:
        RowError: the row lacks one of them.
    """
    if lacking := next((theirs for theirs in columns.values() if theirs not in row), None):
        raise RowError(f"it has no column {lacking!r}.{nearest(lacking, row)}")
    others = {name: value for name, value in row.items() if name not in columns.values()}
    return others | {ours: row[theirs] for ours, theirs in columns.items()}


def renaming(columns: Sequence[str]) -> dict[str, str]:
    """Read ``OURS=THEIRS`` pairs to name -> the data's column.

    Raises:
        DataError: one is no pair, or names nothing that rows may have.
    """
    found = {}
    for pair in columns:
        ours, equals, theirs = str(pair).partition("=")
        if not equals or not theirs:
            raise DataError(f"columns has {pair!r}; write NAME=COLUMN, such as image=photo")
        if ours not in COLUMNS:
            raise DataError(f"columns: {ours!r} is not a column that vlmtune reads.{nearest(ours, COLUMNS)}")
        found[ours] = theirs
    return found
