"""Metrics where none are named."""

from __future__ import annotations

import pytest

from vlmtune.data.formats import FORMATS
from vlmtune.data.sample import Message, Sample
from vlmtune.evaluation.defaults import LOOKED_AT, default_metrics, metrics_of
from vlmtune.evaluation.metrics import get_metric

LONG = "a brown dog runs over a meadow"


def rows(*references: str, count: int = 1) -> list[dict]:
    messages = (Message.make("user", "?"), Message.make("assistant", references[0]))
    return [Sample(str(i), (), messages, references=references).to_row() for i in range(count)]


@pytest.mark.parametrize("name", ["flickr", "coco_captions", "image_text_pairs"])
def test_captions(name: str) -> None:
    assert default_metrics(FORMATS[name].metrics, []) == ["cider", "bleu4", "rouge_l"]


def test_a_formats_own() -> None:
    assert default_metrics(FORMATS["docvqa"].metrics, rows(LONG)) == ["anls", "exact_match"]
    for one in FORMATS.values():
        assert all(get_metric(name) for name in one.metrics)


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        ([["red"], ["a dog"]], ["exact_match", "token_f1"]),
        ([["red"]] * 8 + [[LONG]] * 2, ["rouge_l", "bleu4", "token_f1"]),
        ([["red"]] * 9 + [[LONG]], ["exact_match", "token_f1"]),
        ([[LONG, LONG + " at night"]], ["cider", "bleu4", "rouge_l"]),
        ([["[1, 2, 3, 4]"], ["at [5, 6, 7, 8]"]], ["iou", "acc@0.5"]),
        ([['[{"bbox": [1, 2, 3, 4], "label": "dog"}]'], ["[]"]], ["map", "map50"]),
        ([], ["exact_match"]),
    ],
)
def test_by_the_references(references: list[list[str]], expected: list[str]) -> None:
    assert metrics_of(references) == expected


def test_of_any_format_by_its_first_rows() -> None:
    own = FORMATS["messages"].metrics
    assert default_metrics(own, rows("yes")) == ["exact_match", "token_f1"]
    assert default_metrics(own, [*rows("yes", count=LOOKED_AT), *rows(LONG, count=900)])[0] == "exact_match"
    assert default_metrics(own, rows(LONG)) == ["rouge_l", "bleu4", "token_f1"]
