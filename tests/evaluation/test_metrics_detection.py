"""mAP on cases worked out by hand, and its bootstrap against computing it anew."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("pycocotools", reason="needs the extra detection")

from vlmtune.errors import ConfigError
from vlmtune.evaluation.metrics import Scores, get_metric
from vlmtune.evaluation.metrics.bootstrap import interval, paired_difference
from vlmtune.evaluation.metrics.detection import detection_map, parse_boxes
from vlmtune.evaluation.metrics.robust import robust_scores


def boxes(*entries: tuple[list[float], str, float]) -> str:
    return json.dumps([{"bbox": box, "label": label, "score": score} for box, label, score in entries])


A, B, FAR = [0, 0, 10, 10], [20, 20, 40, 40], [80, 80, 90, 90]


def random_set(images: int) -> tuple[list[str], list[list[str]]]:
    rng = np.random.default_rng(0)
    answers, references = [], []
    for _ in range(images):
        truth, said = [], []
        for _ in range(rng.integers(1, 4)):
            x, y = rng.integers(0, 100, 2).tolist()
            label = str(rng.choice(["dog", "cat"]))
            truth.append(([x, y, x + 20, y + 20], label, 1.0))
            shift = int(rng.integers(0, 8))
            said.append(([x + shift, y, x + 20 + shift, y + 20], label, float(rng.random())))
        answers.append(boxes(*said))
        references.append([boxes(*truth)])
    return answers, references


def test_all_found_and_nothing_else() -> None:
    reference = boxes((A, "dog", 1), (B, "cat", 1))
    assert detection_map([reference], [[reference]]).value == pytest.approx(1)


def test_by_hand() -> None:
    # Ranked: right, wrong, right of two objects. Precision 1 at the recalls to .5 (51), 2/3 at the other 50.
    answers = [boxes((A, "dog", 0.9), (FAR, "dog", 0.8)), boxes((B, "dog", 0.7))]
    scores = detection_map(answers, [[boxes((A, "dog", 1))], [boxes((B, "dog", 1))]])
    assert scores.value == pytest.approx((51 + 50 * 2 / 3) / 101)
    # Alone the first image has all it needs before its wrong box.
    assert scores.per_sample.tolist() == pytest.approx([1, 1])


def test_thresholds() -> None:
    # IoU 80 / 120 = .667: right at .5, .55, .6 and .65 of the ten.
    answers, references = [boxes(([0, 2, 10, 12], "dog", 1))], [[boxes((A, "dog", 1))]]
    values = {name: get_metric(name).compute(answers, references).value for name in ("map", "map50", "map75")}
    assert values == pytest.approx({"map": 0.4, "map50": 1, "map75": 0})


def test_labels_count_but_not_their_case() -> None:
    references = [[boxes((A, "dog", 1))]]
    assert detection_map([boxes((A, "Dog ", 1))], references).value == pytest.approx(1)
    assert detection_map([boxes((A, "cat", 1))], references).value == 0


def test_images_without_objects() -> None:
    scores = detection_map(["[]", boxes((A, "dog", 1))], [["[]"], ["[]"]])
    assert scores.per_sample.tolist() == [1, 0] and scores.value == 0.5
    # A box where there is no object costs precision elsewhere.
    answers = [boxes((A, "dog", 0.5)), boxes((A, "dog", 0.9))]
    assert detection_map(answers, [[boxes((A, "dog", 1))], ["[]"]]).value == pytest.approx(0.5)


def test_what_is_read_as_boxes() -> None:
    assert parse_boxes('Here: ```json\n[{"bbox_2d": [1, 2, 4, 6], "label": "A Dog"}]\n```') == [
        {"bbox": [1, 2, 3, 4], "label": "a dog", "score": 1, "iscrowd": 0}
    ]
    assert parse_boxes("[]") == []
    for text in ("no boxes", "[1, 2]", '[{"bbox": [1, 2, 3]}]', '[{"bbox": [1, 2, 3, NaN]}]', '[{"bbox": [1, 2'):
        assert parse_boxes(text) is None
    scores = detection_map(["a dog", boxes((A, "", 1))], [[boxes((A, "", 1))]] * 2)
    assert scores.notes == ("1 of 2 answers hold no list of boxes and count as none",)
    assert scores.value == pytest.approx(51 / 101)


def test_a_bad_reference_is_left_out_by_name() -> None:
    answers, references = random_set(12)
    found = robust_scores(
        get_metric("map"), answers, [*references[:5], ["a dog"], *references[6:]], list("abcdefghijkl")
    )
    kept = [index for index in range(12) if index != 5]
    alone = detection_map([answers[i] for i in kept], [references[i] for i in kept])
    assert found.value == pytest.approx(alone.value) and np.isnan(found.per_sample[5])
    assert "'f'" in found.notes[0] and interval(found) == pytest.approx(interval(alone))


def test_a_resample_is_what_its_images_score() -> None:
    answers, references = random_set(30)
    scores = detection_map(answers, references)
    drawn = np.random.default_rng(1).integers(0, 30, (23, 30))
    counts = np.stack([np.bincount(rows, minlength=30) for rows in drawn]).astype(float)
    again = [detection_map([answers[i] for i in rows], [references[i] for i in rows]).value for rows in drawn]
    assert scores.of_counts(counts).tolist() == pytest.approx(again)
    assert scores.take(drawn[0]).value == pytest.approx(again[0])
    low, high = interval(scores)
    assert 0 < low < scores.value < high < 1


def test_two_runs_on_the_same_images() -> None:
    answers, references = random_set(40)
    tuned = detection_map([row[0] for row in references], references)
    difference, (low, high) = paired_difference(detection_map(answers, references), tuned)
    assert 0 < low < difference < high
    assert paired_difference(tuned, tuned) == (0, (0, 0))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"map needs pycocotools: pip install 'vlmtune\[detection\]'"):
        get_metric("map")


def test_scores_by_counts_are_those_by_sums() -> None:
    scores = Scores(np.random.default_rng(0).random(9))
    by_counts = Scores(scores.per_sample, corpus=lambda counts: counts @ scores.per_sample / counts.sum(-1))
    assert interval(by_counts) == pytest.approx(interval(scores))
