"""CHAIR: objects that a caption names and the image does not hold (Rohrbach et al. 2018, arXiv:1809.02156).

Which words name which object a user's file says, one object a line: ``dog, puppy, hound``; the first is its name. The
authors' list for COCO has this form. An image holds the objects that its references name, and those in the sample's
``meta`` under ``objects``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlmtune.errors import ConfigError
from vlmtune.evaluation.metrics.base import Array, Metric, Scores
from vlmtune.evaluation.metrics.captions import tokens_of

Words = tuple[str, ...]


def read_objects(path: str | Path) -> dict[Words, str]:
    """Read a file of objects: (words,) -> the object's name.

    Raises:
        ConfigError: the file cannot be read, is empty, or gives a word to two objects.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"CHAIR's file of objects {path} cannot be read: {error}.") from error
    objects: dict[Words, str] = {}
    for number, line in enumerate(lines, 1):
        names = [" ".join(name.lower().split()) for name in line.split(",") if name.strip()]
        for name in names:
            before = objects.setdefault(tuple(name.split()), names[0])
            if before != names[0]:
                raise ConfigError(f"{path}, line {number}: {name!r} names {names[0]!r} here and {before!r} before.")
    if not objects:
        raise ConfigError(f"CHAIR's file of objects {path} is empty. Write one object a line: dog, puppy, hound.")
    return objects


def named_objects(words: Sequence[str], objects: Mapping[Words, str]) -> list[str]:
    """Return the objects that a text names, in order and as often as it does; of "hot dog" and "dog" the longer."""
    from textblob.en.inflect import singularize

    longest = max(map(len, objects))
    found, place = [], 0
    while place < len(words):
        for length in range(min(longest, len(words) - place), 0, -1):
            span = tuple(words[place : place + length])
            singular = (*span[:-1], str(singularize(span[-1])))
            if name := objects.get(span) or objects.get(singular):
                found.append(name)
                place += length
                break
        else:
            place += 1
    return found


def chair(
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    metas: Sequence[Mapping[str, Any]],
    *,
    path: str,
    of_captions: bool,
) -> Scores:
    """Return the share of named objects (CHAIRi), or of captions with one (CHAIRs), that the image does not hold.

    Args:
        answers: captions.
        references: captions of the same image.
        metas: of the samples; ``objects`` adds to what the references name.
        path: the file of objects.
        of_captions: CHAIRs instead of CHAIRi.
    """
    objects = read_objects(path)
    guessed, wanted, notes = tokens_of(answers, references)
    counts = np.zeros((len(answers), 2))
    for row, (words, options, meta) in enumerate(zip(guessed, wanted, metas, strict=True)):
        held = {name for option in options for name in named_objects(option, objects)}
        for given in meta.get("objects") or ():
            held |= set(named_objects(str(given).lower().split(), objects))
        named = named_objects(words, objects)
        wrong = sum(name not in held for name in named)
        counts[row] = (wrong > 0, 1) if of_captions else (wrong, len(named))
    # A caption that names no object has none wrong.
    each = np.divide(counts[:, 0], counts[:, 1], out=np.zeros(len(counts)), where=counts[:, 1] > 0)
    return Scores(each, counts, _of_sums, notes)


def _of_sums(sums: Array) -> Array:
    return np.divide(sums[..., 0], sums[..., 1], out=np.zeros(sums.shape[:-1]), where=sums[..., 1] > 0)


def make_chair(name: str, path: str) -> Metric:
    """Return ``chair_i`` or ``chair_s`` by a file of objects."""
    read_objects(path)
    what = "captions that name an object the image does not hold" if name == "chair_s" else "named objects it lacks"
    return Metric(
        name=f"{name}:{path}",
        summary=f"share of {what}; lower is better",
        compute=partial(chair, path=path, of_captions=name == "chair_s"),
        paper="arXiv:1809.02156",
        code="LisaAnne/Hallucination",
        higher_is_better=False,
        reads="meta",
        needs=(("textblob",), "chair"),
    )
