"""The metrics give the values published for others' files, and those of the official code."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from vlmtune.evaluation.metrics import get_metric
from vlmtune.evaluation.metrics.captions import bleu
from vlmtune.evaluation.metrics.detection import match, mean_average_precision, mean_recall
from vlmtune.evaluation.metrics.ptb import tokenize


def read(path: Path):
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return json.loads(text)


@pytest.fixture(scope="module")
def captions(reference_files: Path) -> tuple[list[str], list[list[str]]]:
    samples = read(reference_files / "captions" / "magic_mscoco.json.gz")
    return [sample["pred"] for sample in samples], [sample["refs"] for sample in samples]


@pytest.fixture(scope="module")
def expected(reference_files: Path):
    return read(reference_files / "captions" / "magic_mscoco.expected.json")


def test_tokens_are_those_of_stanfords_tokenizer(reference_files: Path) -> None:
    pairs = read(reference_files / "captions" / "ptb_java_mscoco_1000.json.gz")
    wrong = [(text, tokens, " ".join(tokenize(text))) for text, tokens in pairs if " ".join(tokenize(text)) != tokens]
    assert len(pairs) == 6001
    assert wrong == []


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("bleu1", "Bleu_1"),
        ("bleu2", "Bleu_2"),
        ("bleu3", "Bleu_3"),
        ("bleu4", "Bleu_4"),
        ("rouge_l", "ROUGE_L"),
        ("cider", "CIDEr"),
        ("meteor", "METEOR"),
    ],
)
def test_captions_score_as_in_coco_caption(name: str, published: str, captions, expected) -> None:
    scores = get_metric(name).compute(*captions)
    assert scores.n == 4982
    assert scores.notes == ()
    assert scores.value == pytest.approx(expected["java_here"][published], abs=1e-6)
    assert scores.value == pytest.approx(expected["published"][published], abs=5e-4)


def test_bleu_counts_the_published_ngrams(captions, expected) -> None:
    published = expected["published"]
    answers, references, *counts = bleu(*captions).columns().sum(0).tolist()
    assert [answers, references] == [published["testlen"], published["reflen"]]
    assert counts == published["guess"] + published["correct"]


def test_vqa_accuracy_is_that_of_the_official_code(reference_files: Path) -> None:
    cases = read(reference_files / "vqa" / "vqa_official_cases.json")["cases"]
    answers, references = [case["prediction"] for case in cases], [case["answers"] for case in cases]
    names = ("vqa_accuracy_strict", "vqa_accuracy")
    strict, default = (get_metric(name).compute(answers, references) for name in names)
    assert strict.per_sample * 100 == pytest.approx([case["official_acc"] for case in cases], abs=0.005)
    assert default.per_sample * 100 == pytest.approx([case["always_normalised_acc"] for case in cases], abs=0.005)
    assert round(strict.value * 100, 2) == 61.20
    assert round(default.value * 100, 2) == 65.83


def test_anls_is_that_of_its_python_package(reference_files: Path) -> None:
    gold = {row["questionId"]: row["answers"] for row in read(reference_files / "anls" / "gold_label.json")["data"]}
    rows = read(reference_files / "anls" / "submission.json")
    scores = get_metric("anls").compute([row["answer"] for row in rows], [gold[row["questionId"]] for row in rows])
    assert round(scores.value, 4) == 0.3778


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_detection_gives_the_published_values(reference_files: Path, kind: Literal["bbox", "segm"]) -> None:
    """All 24 of cocoapi's val2014_fake_eval_res.txt, in its order."""
    pytest.importorskip("pycocotools", reason="needs the extra detection")
    folder = reference_files / "detection"
    report = (folder / "val2014_fake_eval_res.txt").read_text().split("type=")
    published = next(part for part in report if part.startswith(kind))
    expected = [float(line.split("=")[-1]) for line in published.splitlines() if line.startswith(" Average")]
    truth = read(folder / "instances_val2014_100.json")
    found = read(folder / f"instances_val2014_fake{kind}100_results.json")
    one = np.ones(len(truth["images"]))
    areas = [(0, 32**2), (32**2, 96**2), (96**2, 1e10)]
    everything = match(truth, found, kind=kind)
    by_area = [match(truth, found, kind=kind, area=area) for area in areas]
    values = [
        mean_average_precision(everything, one),
        *(mean_average_precision(match(truth, found, kind=kind, thresholds=[at]), one) for at in (0.5, 0.75)),
        *(mean_average_precision(matches, one) for matches in by_area),
        *(mean_recall(match(truth, found, kind=kind, most=most), one) for most in (1, 10)),
        mean_recall(everything, one),
        *(mean_recall(matches, one) for matches in by_area),
    ]
    assert len(expected) == 12
    assert [round(float(value), 3) for value in values] == expected
