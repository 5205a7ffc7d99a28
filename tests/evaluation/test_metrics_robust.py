"""One bad sample never loses the scores of the others."""

from __future__ import annotations

import json
import math

import pytest

from vlmtune.errors import EvaluationError
from vlmtune.evaluation.answering import Prediction
from vlmtune.evaluation.compare import compare
from vlmtune.evaluation.metrics import Metric, Scores, get_metric
from vlmtune.evaluation.metrics.robust import robust_scores
from vlmtune.evaluation.runner import format_table, score


def predictions(*answers: str) -> list[Prediction]:
    return [Prediction(f"s{i}", "?", (), answer, ("1",), True, 1, 0.1) for i, answer in enumerate(answers)]


def inverse(answers, references):
    """A user's metric that divides by zero on some answers."""
    return [1 / float(answer) for answer in answers]


def unsure(answers, references):
    """A user's metric that gives NaN on some answers."""
    return [math.nan if answer == "0" else float(answer) for answer in answers]


def short(answers, references):
    """A user's metric that loses a sample."""
    return [1.0] * (len(answers) - 1)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module = type(sys)("my_metrics")
    module.inverse, module.unsure, module.short = inverse, unsure, short
    monkeypatch.setitem(sys.modules, "my_metrics", module)


@pytest.mark.parametrize(
    ("name", "reason", "value"),
    [("my_metrics.inverse", "float division by zero", 0.375), ("my_metrics.unsure", "the score is not a number", 3.0)],
)
def test_the_others_keep_their_scores(name: str, reason: str, value: float) -> None:
    found = score(predictions("2", "0", "4"), [name, "exact_match"])
    entry = found.table[name]
    assert (entry["value"], entry["n"]) == (value, 2)
    assert entry["low"] <= value <= entry["high"]
    assert entry["notes"] == [f"left out 1 of 3 samples that it cannot score ('s1': {reason})"]
    assert math.isnan(found.scores[name].per_sample[1])
    assert found.table["exact_match"]["n"] == 3
    json.loads(json.dumps(found.table, allow_nan=False))
    assert reason in format_table(found.table)


def test_a_paired_difference_takes_what_both_could_score() -> None:
    one, other = predictions("2", "0", "4", "1"), predictions("2", "2", "0", "2")
    entry = compare(one, other, ["my_metrics.inverse"]).table["my_metrics.inverse"]
    # s0: 1/2 and 1/2; s3: 1 and 1/2.
    assert entry["difference"] == pytest.approx(-0.25)


def test_no_sample_that_both_could_score() -> None:
    with pytest.raises(EvaluationError, match="no sample that both could score"):
        compare(predictions("0", "1"), predictions("1", "0"), ["my_metrics.inverse"])


def test_all_samples_fail() -> None:
    with pytest.raises(EvaluationError, match="it fails on every sample, such as 's0': float division by zero"):
        score(predictions("0", "0"), ["my_metrics.inverse"])


def test_too_few_values() -> None:
    with pytest.raises(EvaluationError, match="gave 0 values for 1 samples"):
        score(predictions("1", "1"), ["my_metrics.short"])


def test_bad_references_of_one_sample() -> None:
    rows = predictions("[0, 0, 1, 1]", "[0, 0, 1, 1]")
    rows[0] = Prediction("a", "?", (), "[0, 0, 2, 2]", ("[0, 0, 2, 2]",), True, 1, 0.1)
    found = score(rows, ["iou"]).table["iou"]
    assert (found["value"], found["n"]) == (1, 1) and "'s1'" in found["notes"][0]


def test_missing_references_are_named() -> None:
    rows = [*predictions("1"), Prediction("bare", "?", (), "x", (), True, 1, 0.1)]
    with pytest.raises(EvaluationError, match=r"1 of 2 predictions have no references .* 'bare'"):
        score(rows, ["exact_match"])


def test_corpus_metrics_are_taken_of_the_rest_together() -> None:
    """A corpus value of the samples left is not the mean of their own."""
    bleu = get_metric("bleu4")

    def fails(answers, references):
        if "bad" in answers:
            raise RuntimeError("bad answer")
        return bleu.compute(answers, references)

    answers, references = ["a red dog on a mat", "bad", "a blue cat"], [["a red dog on the mat"], ["x"], ["a blue cat"]]
    metric = Metric("mine", "", fails, "", "")
    found = robust_scores(metric, answers, references, ["0", "1", "2"])
    kept = bleu.compute([answers[0], answers[2]], [references[0], references[2]])
    assert found.value == kept.value
    assert isinstance(found, Scores) and found.n == 3


def test_a_function_in_the_current_folder(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "metric_beside_me.py").write_text(
        "def length(answers, references):\n    return list(map(len, answers))\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert score(predictions("abc", "a"), ["metric_beside_me.length"]).table["metric_beside_me.length"]["value"] == 2
    assert sys.path == before
