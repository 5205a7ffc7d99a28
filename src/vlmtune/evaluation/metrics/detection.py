"""Detection mAP as COCO defines it (Lin et al. 2014, arXiv:1405.0312; matches by pycocotools' ``COCOeval``).

Answers and references are texts such as ``[{"bbox": [x1, y1, x2, y2], "label": "dog", "score": 0.9}]``; the score may
be left out (1), and so may the label (one class). ``bbox_2d``, as Qwen-VL writes it, is read too. Both must use the
same coordinates. Average precision ranks the boxes of all images, so it is no mean over images: it is computed anew
from the matches of each resample.

Shape legend: I images, D boxes said for a category, T IoU thresholds, R resamples.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vlmtune.evaluation.metrics.base import Array, Metric, Scores

RECALLS = np.linspace(0.0, 1.0, 101)
MOST_BOXES = 100
# Resamples computed at once: what they need stays in a core's cache.
AT_ONCE = 20
Box = dict[str, Any]
Coco = Mapping[str, Any]


@dataclass(frozen=True)
class Matches:
    """What became of the boxes said for one category, the surest first.

    Attributes:
        image: (D,) index of each box's image.
        right: (T, D) it matches an object.
        wrong: (T, D) it matches none; a box that is neither is left out, as on a crowd.
        objects: (I,) objects of each image.
    """

    image: npt.NDArray[np.int_]
    right: npt.NDArray[np.bool_]
    wrong: npt.NDArray[np.bool_]
    objects: Array

    def take(self, images: npt.NDArray[np.int_]) -> Matches:
        """Return the matches in some images, numbered anew in that order; ``images`` are different ones."""
        number = np.full(len(self.objects), -1)
        number[images] = np.arange(len(images))
        kept = number[self.image] >= 0
        return Matches(
            number[self.image[kept]], self.right[:, kept], self.wrong[:, kept], np.asarray(self.objects[images])
        )

    def average_precision(self, counts: Array) -> Array:
        """Return the mean over thresholds of the precision at 101 recalls, (R,); NaN without objects.

        Args:
            counts: (R, I) times that each image counts.
        """
        objects = counts @ self.objects
        each = counts[:, self.image]
        counted = self.right | self.wrong
        seen = np.cumsum(each, -1) if counted.all() else None
        total = np.zeros(len(counts))
        for right, those in zip(self.right, counted, strict=True):
            # Recall and precision change for the better at right boxes only.
            at = np.flatnonzero(right)
            hits = np.cumsum(each[:, at], -1)
            precision = hits / ((np.cumsum(each * those, -1) if seen is None else seen)[:, at] + np.spacing(1))
            for row in np.flatnonzero(objects) if len(at) else ():
                first = np.searchsorted(hits[row] / objects[row], RECALLS)
                # The best from each recall on: the best up to the next recall, and of those the best from the end.
                upto = np.maximum.reduceat(precision[row], first[first < len(at)])
                total[row] += np.maximum.accumulate(upto[::-1])[::-1].copy().sum()
        values = total / (len(RECALLS) * len(self.right))
        return np.where(objects > 0, values, np.nan)

    def recall(self, counts: Array) -> Array:
        """Return the share of objects found, mean over thresholds, (R,); NaN without objects."""
        found = (counts[:, None, self.image] * self.right).sum(-1).mean(-1)
        objects = counts @ self.objects
        return np.asarray(np.divide(found, objects, out=np.full_like(found, np.nan), where=objects > 0))


def match(
    truth: Coco,
    found: Sequence[Mapping[str, Any]],
    *,
    kind: Literal["bbox", "segm"] = "bbox",
    thresholds: Sequence[float] | None = None,
    area: tuple[float, float] = (0, 1e10),
    most: int = MOST_BOXES,
) -> list[Matches]:
    """Match detections with objects, category by category.

    Args:
        truth: ``images``, ``annotations`` and ``categories`` in COCO's format.
        found: detections in COCO's result format.
        kind: compare boxes or masks.
        thresholds: of the IoU; by default .5 to .95 in steps of .05.
        area: smallest and largest object that counts, in square pixels.
        most: boxes of a category and image that count, the surest.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # They print their progress.
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        # They write into what they are given.
        coco.dataset = {**truth, "annotations": [dict(row) for row in truth["annotations"]]}
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes([dict(row) for row in found]) if found else COCO(), kind)
        run.params.imgIds = [image["id"] for image in truth["images"]]
        run.params.areaRng, run.params.areaRngLbl, run.params.maxDets = [list(area)], ["of interest"], [most]
        if thresholds is not None:
            run.params.iouThrs = np.asarray(thresholds)
        run.evaluate()
    number = {name: index for index, name in enumerate(run.params.imgIds)}
    groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in run.evalImgs:
        if entry is not None:
            groups[entry["category_id"]].append(entry)
    return [_ranked(groups[name], number, len(run.params.iouThrs)) for name in sorted(groups)]


def _ranked(entries: Sequence[Mapping[str, Any]], number: Mapping[int, int], thresholds: int) -> Matches:
    objects = np.zeros(len(number))
    images: list[int] = []
    for entry in entries:
        index = number[entry["image_id"]]
        objects[index] = len(entry["gtIgnore"]) - np.count_nonzero(entry["gtIgnore"])
        images += [index] * len(entry["dtScores"])
    score = np.concatenate([entry["dtScores"] for entry in entries])
    # Stable, as there: of equal scores the earlier image comes first.
    order = np.argsort(-score, kind="stable")
    shape = (thresholds, len(order))
    hit = np.concatenate([entry["dtMatches"] for entry in entries], axis=1).reshape(shape)[:, order] > 0
    left_out = np.concatenate([entry["dtIgnore"] for entry in entries], axis=1).reshape(shape)[:, order] > 0
    return Matches(np.asarray(images, dtype=np.int_)[order], hit & ~left_out, ~hit & ~left_out, objects)


def mean_average_precision(matches: Sequence[Matches], counts: Array) -> Array:
    """Return the mean of the categories' average precision, (..., I) -> (...); NaN where no image has an object."""
    return _mean_over(matches, "average_precision", counts)


def mean_recall(matches: Sequence[Matches], counts: Array) -> Array:
    """Return the mean of the categories' recall, (..., I) -> (...); NaN where no image has an object."""
    return _mean_over(matches, "recall", counts)


def _mean_over(matches: Sequence[Matches], what: str, counts: Array) -> Array:
    rows = np.asarray(counts, dtype=np.float64).reshape(-1, counts.shape[-1])
    total, having = np.zeros(len(rows)), np.zeros(len(rows))
    for category in matches:
        parts = [getattr(category, what)(rows[start : start + AT_ONCE]) for start in range(0, len(rows), AT_ONCE)]
        value = np.concatenate(parts)
        total += np.nan_to_num(value)
        having += np.isfinite(value)
    mean = np.divide(total, having, out=np.full(len(rows), np.nan), where=having > 0)
    return np.asarray(mean.reshape(counts.shape[:-1]))


def parse_boxes(text: str) -> list[Box] | None:
    """Return the boxes of the first JSON list of boxes in a text, or None where there is none or one is no box.

    Each has ``bbox`` as (x, y, width, height), ``label`` in lower case, ``score`` and ``iscrowd``.
    """
    decoder = json.JSONDecoder()
    for start in (index for index, letter in enumerate(text) if letter == "["):
        try:
            found, _ = decoder.raw_decode(text, start)
        except ValueError:
            continue
        boxes = [_box(entry) for entry in found]
        if None not in boxes:
            return [box for box in boxes if box is not None]
    return None


def _box(entry: Any) -> Box | None:
    try:
        x1, y1, x2, y2 = (float(number) for number in entry.get("bbox", entry.get("bbox_2d")))
        score = float(entry.get("score", 1))
    except (AttributeError, TypeError, ValueError):
        return None
    if not all(map(math.isfinite, (x1, y1, x2, y2, score))):
        return None
    return {
        "bbox": [x1, y1, max(x2 - x1, 0.0), max(y2 - y1, 0.0)],
        "label": str(entry.get("label", "")).strip().lower(),
        "score": score,
        "iscrowd": int(bool(entry.get("iscrowd", 0))),
    }


def detection_map(
    answers: Sequence[str], references: Sequence[Sequence[str]], *, thresholds: Sequence[float] | None = None
) -> Scores:
    """Score boxes by COCO's mean average precision, at most 100 boxes of a label and image; 0 to 1.

    The value of a sample is what it would score alone; without objects it is 1 for an answer without boxes, else 0.

    Args:
        answers: a JSON list of boxes each; one that holds none counts as no box.
        references: the objects of each, a JSON list or several.
        thresholds: of the IoU; by default .5 to .95 in steps of .05.
    """
    wanted, said, unread = [], [], 0
    for index, (answer, options) in enumerate(zip(answers, references, strict=True)):
        lists = [parse_boxes(reference) for reference in options]
        if not lists or None in lists:
            raise ValueError(
                f"sample {index} has the references {list(options)}; each must be a JSON list such as "
                '[{"bbox": [x1, y1, x2, y2], "label": "dog"}]'
            )
        wanted.append([box for boxes in lists for box in boxes or ()])
        boxes = parse_boxes(answer)
        unread += boxes is None
        said.append(boxes or [])
    labels = {box["label"]: 0 for boxes in (*wanted, *said) for box in boxes}
    category = {label: index for index, label in enumerate(sorted(labels), 1)}
    truth = {
        "images": [{"id": index} for index in range(len(wanted))],
        "categories": [{"id": index} for index in category.values()],
        "annotations": _coco(wanted, category),
    }
    matches = match(truth, _coco(said, category), thresholds=thresholds)
    per_sample = _alone(matches, [bool(boxes) for boxes in said])
    notes = (f"{unread} of {len(answers)} answers hold no list of boxes and count as none",) if unread else ()
    return Scores(per_sample, notes=notes, corpus=partial(_corpus, matches, per_sample))


def _coco(images: Sequence[Sequence[Box]], category: Mapping[str, int]) -> list[dict[str, Any]]:
    rows = [(index, box) for index, boxes in enumerate(images) for box in boxes]
    # pycocotools takes the id 0 for no match.
    return [
        box
        | {"id": name, "image_id": index, "category_id": category[box["label"]]}
        | {"area": box["bbox"][2] * box["bbox"][3]}
        for name, (index, box) in enumerate(rows, 1)
    ]


def _alone(matches: Sequence[Matches], said: Sequence[bool]) -> Array:
    """Return the mean average precision of each image, (I,)."""
    total, having = np.zeros(len(said)), np.zeros(len(said))
    for category in matches:
        for index in np.flatnonzero(category.objects):
            total[index] += category.take(np.asarray([index])).average_precision(np.ones((1, 1)))[0]
            having[index] += 1
    without = np.where(said, 0.0, 1.0)
    return np.where(having > 0, total / np.maximum(having, 1), without)


def _corpus(matches: Sequence[Matches], per_sample: Array, counts: Array) -> Array:
    if not any(category.objects.any() for category in matches):
        # Nothing to find in any image: what share kept quiet.
        return np.asarray(counts @ per_sample / counts.sum(-1))
    return mean_average_precision(matches, counts)


def _metric(name: str, summary: str, thresholds: Sequence[float] | None) -> Metric:
    return Metric(
        name=name,
        summary=summary,
        compute=partial(detection_map, thresholds=thresholds),
        paper="arXiv:1405.0312",
        code="pycocotools COCOeval",
        needs=(("pycocotools",), "detection"),
    )


DETECTION = (
    _metric("map", "COCO's mean average precision of labelled boxes, IoU .5 to .95", None),
    _metric("map50", "the same at an IoU of .5", (0.5,)),
    _metric("map75", "the same at an IoU of .75", (0.75,)),
)
