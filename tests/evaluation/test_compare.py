"""Comparisons are paired, by id."""

from __future__ import annotations

import dataclasses

import pytest

from vlmtune.errors import EvaluationError
from vlmtune.evaluation.answering import Prediction
from vlmtune.evaluation.compare import compare, format_comparison


def predictions(answers: dict[str, str], reference: str = "red") -> list[Prediction]:
    return [Prediction(name, "What?", (), answer, (reference,), True, 1, 0.1) for name, answer in answers.items()]


def alternating(count: int, right: set[int]) -> dict[str, str]:
    return {str(number): "red" if number in right else "blue" for number in range(count)}


def test_values_and_difference() -> None:
    base = predictions(alternating(10, {0, 1, 2}))
    tuned = predictions(alternating(10, {0, 1, 2, 3, 4}))
    entry = compare(base, tuned, ["exact_match"]).table["exact_match"]
    assert (entry["base"], entry["tuned"], entry["n"], entry["percent"]) == (0.3, 0.5, 10, True)
    assert entry["difference"] == pytest.approx(0.2)
    assert entry["low"] <= 0.2 <= entry["high"]


def test_interval_is_of_the_paired_difference() -> None:
    """Every sample gains the same: no doubt is left, although each run's own interval is wide."""
    base = predictions(alternating(40, set(range(0, 40, 2))))
    same = compare(base, predictions(alternating(40, set(range(0, 40, 2)))), ["exact_match"])
    entry = same.table["exact_match"]
    assert (entry["difference"], entry["low"], entry["high"]) == (0, 0, 0)
    # The same two values with the right answers elsewhere: the pairs differ, and doubt is large.
    other = compare(base, predictions(alternating(40, set(range(1, 40, 2)))), ["exact_match"])
    entry = other.table["exact_match"]
    assert entry["difference"] == 0
    assert entry["low"] < -0.2 < 0.2 < entry["high"]


def test_pairs_go_by_id_not_place() -> None:
    base = predictions(alternating(40, set(range(20))))
    found = compare(base, base[::-1], ["exact_match"])
    assert all(one.id == other.id for one, other in found.pairs)
    entry = found.table["exact_match"]
    assert (entry["low"], entry["high"]) == (0, 0)


def test_only_samples_that_both_answered() -> None:
    base = predictions(alternating(10, {0, 1, 9}))
    tuned = predictions({str(number): "red" for number in range(5, 20)})
    found = compare(base, tuned, ["exact_match"])
    assert [one.id for one, _ in found.pairs] == ["5", "6", "7", "8", "9"]
    entry = found.table["exact_match"]
    assert (entry["base"], entry["tuned"], entry["n"]) == (0.2, 1.0, 5)
    assert "of the 5 samples that both answered, of 10 (base) and 15 (tuned)." in format_comparison(found)
    assert "both answered" not in format_comparison(compare(base, base, ["exact_match"]))


def test_nothing_in_common() -> None:
    with pytest.raises(EvaluationError, match="no sample in common"):
        compare(predictions({"a": "red"}), predictions({"b": "red"}), ["exact_match"])
    with pytest.raises(EvaluationError, match="no sample in common"):
        compare([], predictions({"b": "red"}), ["exact_match"])


def test_other_references() -> None:
    base = predictions({"a": "red", "b": "red"})
    tuned = [base[0], dataclasses.replace(base[1], references=("blue",))]
    with pytest.raises(EvaluationError, match="Sample 'b' has other references"):
        compare(base, tuned, ["exact_match"])


def test_several_metrics_in_their_order() -> None:
    base, tuned = predictions({"a": "a dog", "b": "red"}), predictions({"a": "red", "b": "red"})
    assert list(compare(base, tuned, ["token_f1", "exact_match"]).table) == ["token_f1", "exact_match"]


def test_table_for_people() -> None:
    found = compare(predictions({"a": "blue"}), predictions({"a": "red"}), ["exact_match"])
    found.table["cider"] = found.table["exact_match"] | {"percent": False, "base": 0.1234, "difference": -0.05}
    assert format_comparison(found).splitlines() == [
        "metric       base   tuned  difference (95 % interval)",
        "exact_match  0.0    100.0  +100.0 (+100.0 to +100.0)",
        "cider        0.123  1.000  -0.050 (+1.000 to +1.000)",
    ]
