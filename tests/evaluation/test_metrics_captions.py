from __future__ import annotations

import gzip
import math
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

from vlmtune.errors import ConfigError
from vlmtune.evaluation.metrics import METRICS, get_metric
from vlmtune.evaluation.metrics.captions import (
    DocumentFrequencies,
    bleu,
    cider,
    longest_common_subsequence,
    rouge_l,
    strip_markdown,
)

CAPTIONS = [
    "a red circle above a blue square",
    "two dogs run on the beach",
    "a man rides a bike down the street",
    "a plate of food on a wooden table",
]


def subsequence_by_table(first: list[str], second: list[str]) -> int:
    table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1, j + 1] = table[i, j] + 1 if one == other else max(table[i, j + 1], table[i + 1, j])
    return int(table[-1, -1])


def test_longest_common_subsequence_is_the_tables() -> None:
    rng = random.Random(0)
    for _ in range(300):
        first, second = (rng.choices("abcd", k=rng.randrange(0, 12)) for _ in range(2))
        assert longest_common_subsequence(first, second) == subsequence_by_table(first, second)


def test_the_reference_itself_scores_full_marks() -> None:
    references = [[text] for text in CAPTIONS]
    assert bleu(CAPTIONS, references).value == pytest.approx(1)
    assert rouge_l(CAPTIONS, references).value == pytest.approx(1)
    assert cider(CAPTIONS, references).value == pytest.approx(10)


def test_bleu_by_hand() -> None:
    # Unigrams 3 of 4, bigrams 1 of 3; the reference is one word longer.
    scores = bleu(["a cat on sofa"], [["a cat sits on it"]], order=2)
    assert scores.value == pytest.approx(math.sqrt(3 / 4 * 1 / 3) * math.exp(1 - 5 / 4), rel=1e-6)
    assert scores.per_sample[0] == pytest.approx(scores.value)


def test_bleu_clips_and_takes_the_closest_reference_length() -> None:
    # Of two lengths as close, the shorter: 3 words against 2 and 4.
    scores = bleu(["the the the"], [["the cat", "the cat the cat"]], order=1)
    assert scores.value == pytest.approx(2 / 3)
    assert scores.columns()[0, :2].tolist() == [3, 2]


def test_bleu_is_of_the_whole_set_not_a_mean() -> None:
    answers, references = ["a b c d", "x"], [["a b c d"], ["y z"]]
    scores = bleu(answers, references, order=1)
    assert scores.value == pytest.approx(4 / 5 * math.exp(1 - 6 / 5), rel=1e-6)
    assert scores.value != pytest.approx(scores.per_sample.mean(), rel=1e-2)


def test_bleu_alone_is_bleu_4() -> None:
    assert get_metric("bleu") is METRICS["bleu4"]
    answers, references = [CAPTIONS[0] + " and more"], [[CAPTIONS[0]]]
    assert get_metric("bleu").compute(answers, references).value == bleu(answers, references).value


def test_rouge_l_takes_precision_and_recall_from_different_references() -> None:
    # "a b c" with "a b": recall 1, precision 2/3; with "a b c d e f": precision 1, recall 1/2.
    assert rouge_l(["a b c"], [["a b", "a b c d e f"]]).value == pytest.approx(1)
    value = rouge_l(["a b c x"], [["a b c"]]).value
    assert value == pytest.approx((1 + 1.2**2) * 0.75 / (1 + 1.2**2 * 0.75))


def test_cider_by_hand() -> None:
    # Every word stands in one of two images: idf log 2. Only unigrams match: "a" of "a b" and "a c".
    frequencies = DocumentFrequencies({("a",): 1, ("b",): 1, ("c",): 1, ("a", "c"): 1}, 2)
    value = cider(["a b"], [["a c"]], frequencies=frequencies).value
    assert value == pytest.approx(10 * (1 / 2) / 4)


def test_cider_punishes_another_length() -> None:
    frequencies = DocumentFrequencies.of([[text] for text in CAPTIONS])
    same = cider(["dogs"], [["dogs"]], frequencies=frequencies).value
    longer = cider(["dogs"], [["dogs dogs dogs"]], frequencies=frequencies).value
    assert same == pytest.approx(10 / 4)
    # The length is the number of bigrams: 0 against 2. Both have the direction of "dogs"; the count is clipped to 1.
    assert longer == pytest.approx(10 / 4 * (1 * 3 / (1 * 3)) * math.exp(-(2**2) / (2 * 6**2)))


def test_cider_of_one_image_is_zero_and_few_are_warned_of() -> None:
    scores = cider([CAPTIONS[0]], [[CAPTIONS[0]]])
    assert scores.value == 0
    assert any("1 images" in note and "500" in note for note in scores.notes)


def test_cider_by_a_stored_table_needs_no_warning(tmp_path: Path) -> None:
    table = DocumentFrequencies.of([[text, text] for text in CAPTIONS])
    assert (table.images, table.counts["a",]) == (4, 3)
    table.save(tmp_path / "df.json.gz")
    assert DocumentFrequencies.load(tmp_path / "df.json.gz") == table
    scores = cider([CAPTIONS[0]], [[CAPTIONS[0]]], frequencies=table)
    assert scores.value == pytest.approx(10)
    assert scores.notes == ()


def test_cider_by_the_name_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "df.json.gz"
    DocumentFrequencies.of([[text] for text in CAPTIONS]).save(path)
    metric = get_metric(f"cider:{path}")
    assert metric.name == f"cider:{path}" and not metric.percent
    scores = metric.compute([CAPTIONS[0]], [[CAPTIONS[0]]])
    assert scores.value == pytest.approx(10) and scores.notes == ()
    # Another table of that name is read anew.
    DocumentFrequencies.of([[CAPTIONS[0]]] * 2).save(path)
    os.utime(path, ns=(0, 0))
    assert get_metric(f"cider:{path}").compute([CAPTIONS[0]], [[CAPTIONS[0]]]).value == 0


@pytest.mark.parametrize(
    "content",
    [None, b"", b"counts", gzip.compress(b"{}", mtime=0), gzip.compress(b'{"images": 0, "counts": {}}', mtime=0)],
)
def test_a_bad_table(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "df.json.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"df.json.gz is no table of document frequencies .*--save_frequencies"):
        get_metric(f"cider:{path}")


@pytest.mark.parametrize("name", ["bleu1", "bleu4", "rouge_l", "cider"])
def test_an_empty_answer_scores_next_to_nothing(name: str) -> None:
    scores = get_metric(name).compute(["", CAPTIONS[1], "."], [[text] for text in CAPTIONS[:3]])
    assert np.isfinite(scores.per_sample).all()
    assert scores.per_sample[[0, 2]] == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize("name", ["bleu4", "rouge_l", "cider"])
def test_a_sample_without_references_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="sample 1 has no reference"):
        get_metric(name).compute(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="2 answers and 1"):
        get_metric(name).compute(["a", "b"], [["a"]])


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("**A red** circle", "A red circle"),
        ("A *red* `circle`", "A red circle"),
        ("# Caption\n- a dog\n2. a cat", "Caption\na dog\na cat"),
        ("> [a dog](http://a.b/c) ![x](y.png)", "a dog x"),
        ("***both*** and _this_", "both and this"),
        ("2 * 3 * 4 and a_b_c and 5-3", "2 * 3 * 4 and a_b_c and 5-3"),
        ("```\ncode\n```", "\ncode\n"),
    ],
)
def test_markdown_loses_its_marks(written: str, plain: str) -> None:
    assert strip_markdown(written) == plain


def test_markdown_is_dropped_from_answers_and_said() -> None:
    scores = rouge_l(["**A red** circle", "a dog"], [["a red circle"], ["a dog"]])
    assert scores.value == pytest.approx(1)
    assert scores.notes == ("Markdown was dropped from 1 of 2 answers",)


def test_five_thousand_captions_take_seconds() -> None:
    rng = random.Random(0)
    words = [f"word{index}" for index in range(2000)]
    texts = [" ".join(rng.choices(words, k=11)) for _ in range(30_000)]
    references = [texts[start : start + 5] for start in range(5_000, 30_000, 5)]
    begin = time.perf_counter()
    for name in ("bleu4", "rouge_l", "cider"):
        assert get_metric(name).compute(texts[:5_000], references).n == 5_000
    assert time.perf_counter() - begin < 20
