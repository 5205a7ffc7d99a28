"""Which metrics answers are scored with where none are named: those of the data's format, else by the references."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from vlmtune.data.formats.base import CAPTION_METRICS
from vlmtune.data.sample import Sample
from vlmtune.evaluation.metrics import get_metric
from vlmtune.evaluation.metrics.detection import parse_boxes
from vlmtune.evaluation.metrics.grounding import parse_box

LOOKED_AT = 1000
SHORT_WORDS, SHORT_SHARE = 3, 0.9


def default_metrics(own: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the metrics of the data's format; where it can hold anything, those that fit its first 1,000 references.

    Args:
        own: the format's, which may be none.
        rows: of the data set.

    Raises:
        ConfigError: a metric's library is not installed.
    """
    return [get_metric(name).name for name in own] or metrics_of(
        [sample.references for sample in map(Sample.from_row, islice(rows, LOOKED_AT))]
    )


def metrics_of(references: Sequence[Sequence[str]]) -> list[str]:
    """Return the metrics that fit references: of boxes, of short answers, of captions, or of other texts."""
    texts = [text for options in references for text in options]
    if not texts:
        return ["exact_match"]
    if importlib.util.find_spec("pycocotools") and all(_labelled(text) for text in texts):
        return ["map", "map50"]
    if all(parse_box(text) for text in texts):
        return ["iou", "acc@0.5"]
    if sum(len(text.split()) <= SHORT_WORDS for text in texts) >= SHORT_SHARE * len(texts):
        return ["exact_match", "token_f1"]
    return list(CAPTION_METRICS) if len(texts) > len(references) else ["rouge_l", "bleu4", "token_f1"]


def _labelled(text: str) -> bool:
    return parse_boxes(text) is not None
