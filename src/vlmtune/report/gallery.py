"""The samples of the gallery: picture, boxes, question, references and every evaluation's answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune.data.boxes import BOXES
from vlmtune.report.analysis import Analysis, choose_samples
from vlmtune.report.boxes import UNITS, Box, boxes_of, on_picture, units_of
from vlmtune.report.pictures import Picture, thumbnails

MOST_REFERENCES = 5
LONGEST_DESCRIPTION = 160
LONG_TEXT, LONG_LABEL = 40, 16
# Cards at first, and how many more each time: pages with hundreds at once are slow to read and to print.
CARDS_AT_ONCE = 30


@dataclass(frozen=True)
class Gallery:
    """What the gallery shows.

    Attributes:
        cards: one a sample.
        boxes: what the boxes count in, in words; empty where there are none.
        wordy: texts, or names of evaluations, are too long to stand beside the picture.
    """

    cards: list[dict[str, Any]]
    boxes: str
    wordy: bool


def gallery(analysis: Analysis) -> Gallery:
    """Return the gallery of an analysis; without pictures where images cannot be read."""
    chosen = choose_samples(analysis)
    last = analysis.answers[-1]
    first_images = {index: last[index].images[0] for index in chosen if last[index].images}
    pictures = thumbnails(list(first_images.values()))
    seen = {index: pictures[name] for index, name in first_images.items() if name in pictures}
    wanted = {index: boxes_of(last[index].references[0]) for index in seen}
    told = all(BOXES in last[index].meta for index, boxes in wanted.items() if boxes)
    units = "pixels" if told else units_of((boxes, seen[index].original) for index, boxes in wanted.items())
    cards = []
    for index, groups in chosen.items():
        card = _card(analysis, index) | {"groups": groups, "picture": seen.get(index), "boxes": []}
        if wanted.get(index):
            card["boxes"] = _boxes(analysis, index, wanted[index], seen[index], units)
        cards.append(card)
    return Gallery(cards, UNITS[units] if any(wanted.values()) else "", _wordy(analysis, cards))


def _wordy(analysis: Analysis, cards: list[dict[str, Any]]) -> bool:
    texts = [text for card in cards for text in (*card["references"], *(one["text"] for one in card["answers"]))]
    long = sum(len(text) > LONG_TEXT for text in texts) > len(texts) / 10
    return long or any(len(label) > LONG_LABEL for label in analysis.labels)


def _card(analysis: Analysis, index: int) -> dict[str, Any]:
    sample, scores = analysis.answers[-1][index], analysis.scores[analysis.primary]
    binary = all(set(one.per_sample[one.scored].tolist()) <= {0.0, 1.0} for one in scores)
    said = []
    for label, answers, one in zip(analysis.labels, analysis.answers, scores, strict=True):
        value = float(one.per_sample[index])
        mark = "" if math.isnan(value) else ("right" if value else "wrong") if binary else f"{value:.2f}"
        said.append({"label": label, "text": answers[index].answer, "mark": mark, "ended": answers[index].ended})
    references = list(dict.fromkeys(sample.references))
    name = Path(sample.images[0]).name if sample.images else ""
    about = f"Image {name}. {sample.prompt} Reference: {references[0]}"
    return {
        "id": sample.id,
        "image": name,
        "alt": about if len(about) <= LONGEST_DESCRIPTION else about[: LONGEST_DESCRIPTION - 1] + "…",
        "more_images": max(0, len(sample.images) - 1),
        "prompt": sample.prompt,
        "references": references[:MOST_REFERENCES],
        "more": max(0, len(references) - MOST_REFERENCES),
        "answers": said,
    }


def _boxes(
    analysis: Analysis, index: int, wanted: tuple[Box, ...], picture: Picture, units: str
) -> list[dict[str, Any]]:
    """Return the reference's boxes and each evaluation's, placed on the picture; the reference's come last, on top."""
    named = [(str(place % 6), boxes_of(answers[index].answer)) for place, answers in enumerate(analysis.answers)]
    found = []
    for key, boxes in (*named, ("reference", wanted)):
        for box in boxes:
            place = on_picture(box, units, picture.original, picture.size)
            if place is not None:
                found.append({"key": key, "place": place, "label": box.label})
    return found
