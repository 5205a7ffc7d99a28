"""Predictions are read from a file: an evaluation's, or another program's."""

from __future__ import annotations

import dataclasses
import json

import pytest
from evaluation.scripted import Scripted, make_dataset, run

from vlmtune.errors import EvaluationError
from vlmtune.evaluation.answering import Prediction
from vlmtune.evaluation.predictions_file import read_predictions
from vlmtune.evaluation.runner import score


class TestReading:
    """Predictions from a file."""

    def test_none_there(self, tmp_path) -> None:
        with pytest.raises(EvaluationError, match="no predictions at"):
            read_predictions(tmp_path)
        with pytest.raises(EvaluationError, match="no predictions at"):
            read_predictions(tmp_path / "absent.jsonl")

    @pytest.mark.parametrize(
        "change",
        [{"answer": None}, {"references": [1]}, {"references": ...}, {"images": None}, {"meta": 1}],
        ids=str,
    )
    def test_not_a_prediction(self, change, tmp_path) -> None:
        row = dataclasses.asdict(Prediction("a", "What?", (), "red", ("red",), True, 1, 0.1)) | change
        row = {name: value for name, value in row.items() if value is not ...}
        (tmp_path / "predictions.jsonl").write_text(json.dumps(row))
        with pytest.raises(EvaluationError, match="line 1, is not a prediction"):
            read_predictions(tmp_path)

    def test_of_other_programs(self, tmp_path) -> None:
        rows = [{"answer": "a dog", "references": "dog", "question": "What?", "question_type": "animal"}]
        rows.append({"id": 7, "answer": "", "references": ["cat", "a cat"], "images": ["7.jpg"], "meta": {"a": 1}})
        (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
        first, second = read_predictions(tmp_path / "mine.jsonl")
        assert (first.id, first.prompt, first.references) == ("1", "What?", ("dog",))
        assert first.meta == {"question": "What?", "question_type": "animal"} and first.ended
        assert (second.id, second.images, second.meta) == ("7", ("7.jpg",), {"a": 1})
        assert score([first, second], ["exact_match"]).table["exact_match"]["n"] == 2

    def test_one_id_twice(self, tmp_path) -> None:
        (tmp_path / "mine.jsonl").write_text('{"id": "a", "answer": "", "references": []}\n' * 2)
        with pytest.raises(EvaluationError, match="line 2, has the id 'a' of another line"):
            read_predictions(tmp_path / "mine.jsonl")

    def test_empty(self, tmp_path) -> None:
        (tmp_path / "mine.jsonl").write_text("\n\n")
        with pytest.raises(EvaluationError, match=r"mine\.jsonl is empty"):
            read_predictions(tmp_path / "mine.jsonl")

    def test_an_unfinished_file_is_an_error(self, tmp_path) -> None:
        run(Scripted(), make_dataset(3), tmp_path)
        path = tmp_path / "predictions.jsonl"
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(EvaluationError, match="line 3"):
            read_predictions(tmp_path)

    def test_no_predictions_have_no_score(self) -> None:
        with pytest.raises(EvaluationError, match="no predictions"):
            score([], ["exact_match"])
