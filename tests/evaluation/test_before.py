from __future__ import annotations

import logging

import pytest

from vlmtune.data.sample import Message, Sample
from vlmtune.errors import EvaluationError
from vlmtune.evaluation import before
from vlmtune.evaluation.before import require_scorable, unscorable


def samples(*references: tuple[str, ...]) -> list[Sample]:
    message = (Message.make("user", "What is it?"),)
    return [Sample(f"s{number}", (), message, options) for number, options in enumerate(references)]


def test_no_references() -> None:
    with pytest.raises(EvaluationError, match=r"None of the 2 samples has references .* such as 's0'\. .*predict"):
        require_scorable(samples((), ()), ["exact_match"])


def test_some_without_references_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vlmtune.evaluation"):
        require_scorable(samples(("a",), (), ("b",), ()), ["exact_match"])
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 samples have no references and are not scored, such as 's1'"
    ]


def test_a_metric_that_can_score_none(caplog: pytest.LogCaptureFixture) -> None:
    texts = samples(("a red dog",), ("a cat",))
    with pytest.raises(EvaluationError, match=r"pope_f1 cannot score the references of these data: .*'s0'"):
        require_scorable(texts, ["pope_f1"])
    assert not caplog.records
    require_scorable(texts, ["pope_f1", "cider"])
    assert ["pope_f1 cannot score" in record.getMessage() for record in caplog.records] == [True]


def test_a_metric_that_can_score_only_later_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before, "TRIED", 3)
    assert unscorable(samples(*[("a dog",)] * 3, ("yes",)), ["pope_f1"]) == {}
    assert list(unscorable(samples(*[("a dog",)] * 4), ["pope_f1"])) == ["pope_f1"]


def test_what_only_a_model_gives_is_not_tried() -> None:
    assert unscorable(samples(("a",)), ["perplexity"]) == {}
