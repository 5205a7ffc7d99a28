"""An evaluation keeps every answer, scores them, and names what it cannot score."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from evaluation.scripted import Scripted, lines, make_dataset, run

from vlmtune.config import GenerationArguments
from vlmtune.data.formats.questions import LETTERS, choice_question
from vlmtune.data.loading import load_samples
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.errors import ConfigError, EvaluationError, OutputError
from vlmtune.evaluation.answering import Prediction
from vlmtune.evaluation.compare import compare
from vlmtune.evaluation.generation import Answer, AnswerGenerator
from vlmtune.evaluation.likelihood import TextScorer
from vlmtune.evaluation.predictions_file import read_predictions
from vlmtune.evaluation.runner import evaluate, format_table, score
from vlmtune.files import UNFINISHED


class TestFiles:
    """What lies in the folder afterwards."""

    def test_predictions_are_complete(self, tmp_path) -> None:
        found = run(Scripted(), make_dataset(), tmp_path / "a" / "b")
        rows = lines(tmp_path / "a" / "b")
        assert [row["id"] for row in rows] == [str(number) for number in range(20)]
        assert rows[1] == {
            "id": "1",
            "prompt": "Question 1?",
            "images": [],
            "answer": "blue",
            "references": ["blue"],
            "ended": True,
            "tokens": 3,
            "seconds": 0.25,
        }
        assert read_predictions(tmp_path / "a" / "b") == found.predictions
        assert read_predictions(tmp_path / "a" / "b" / "predictions.jsonl") == found.predictions
        assert not list(tmp_path.rglob(f"*{UNFINISHED}"))

    def test_scores(self, tmp_path) -> None:
        found = run(Scripted(), make_dataset(), tmp_path)
        scores = json.loads((tmp_path / "scores.json").read_text())
        assert scores["metrics"] == found.table
        assert scores["metrics"]["exact_match"]["value"] == 0.5
        assert scores["metrics"]["exact_match"]["low"] < 0.5 < scores["metrics"]["exact_match"]["high"]
        assert (scores["model"], scores["samples"], scores["metrics"]["exact_match"]["n"]) == ("tiny", 20, 20)
        assert scores["ended_by_terminator"] == 1
        assert scores["answer_seconds"] == 5

    def test_progress_counts_answers(self, tmp_path) -> None:
        shown: list[tuple[int, int]] = []
        run(Scripted(), make_dataset(20), tmp_path, progress=lambda *numbers: shown.append(numbers))
        assert shown == [(8, 20), (16, 20), (20, 20)]

    def test_five_captions_are_one_sample(self, tmp_path, image_folder) -> None:
        for image in image_folder.glob("[0-3].jpg"):
            (tmp_path / "data" / "Images").mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / "Images" / image.name).write_bytes(image.read_bytes())
        captions = "".join(f"{image}.jpg,caption {image} {text}\n" for text in range(5) for image in range(4))
        (tmp_path / "data" / "captions.txt").write_text("image,caption\n" + captions)
        data = load_samples(tmp_path / "data")
        assert len(data.dataset) == 20
        generator = Scripted()
        generator.__class__ = type("Captions", (Scripted,), {"__call__": _first_caption})
        found = run(generator, data.dataset, tmp_path / "out")
        assert len(found.predictions) == 4
        for prediction in found.predictions:
            image = Path(prediction.images[0]).stem
            assert sorted(prediction.references) == [f"caption {image} {text}" for text in range(5)]
        assert found.table["exact_match"]["value"] == 1

    def test_samples_without_references_are_left_out(self, tmp_path) -> None:
        rows = [row | ({"references": []} if int(row["id"]) % 2 else {}) for row in make_dataset(6)]
        import datasets

        found = run(Scripted(), datasets.Dataset.from_list(rows), tmp_path)
        assert [prediction.id for prediction in found.predictions] == ["0", "2", "4"]

    def test_nothing_to_score(self, tmp_path) -> None:
        with pytest.raises(EvaluationError, match="no samples with references"):
            run(Scripted(), make_dataset(3, references=[]), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_an_unknown_metric_costs_no_answer(self, tmp_path) -> None:
        generator = Scripted()
        with pytest.raises(ConfigError, match="Did you mean 'exact_match'"):
            evaluate(generator, make_dataset(3), ["exact_matsch"], tmp_path, name="tiny")
        assert not generator.asked


def _first_caption(self, samples):
    return [Answer(sample.references[0], True, 3, 0.25) for sample in samples]


def test_a_metric_that_cannot_score() -> None:
    prediction = Prediction("a", "Where?", (), "red", ("not a box",), True, 1, 0.1)
    with pytest.raises(EvaluationError, match="iou cannot score these answers"):
        score([prediction], ["iou"])


def test_a_metric_that_cannot_score_leaves_the_others(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = make_dataset(4)
    found = evaluate(Scripted(), dataset, ["iou", "exact_match"], tmp_path, name="tiny")
    assert list(found.table) == ["exact_match"] and list(found.failed) == ["iou"]
    record = json.loads((tmp_path / "scores.json").read_text())
    assert list(record["metrics"]) == ["exact_match"] and "each must be a" in record["failed"]["iou"]
    assert "iou cannot score these answers" in caplog.text
    with pytest.raises(EvaluationError, match="iou cannot score"):
        compare(found.predictions, found.predictions, ["exact_match", "iou"])


class TestBadSamples:
    """A sample that cannot be asked stops no other."""

    @pytest.fixture
    def dataset(self, image_folder: Path, tmp_path: Path):
        import datasets

        samples = []
        for number in range(6):
            path = tmp_path / f"{number}.jpg"
            path.write_bytes((image_folder / f"{number}.jpg").read_bytes()[: 200 if number in (1, 4) else None])
            message = (Message.make("user", f"What is {number}?", images=1), Message.make("assistant", "red"))
            samples.append(Sample(str(number), (ImageRef(str(path)),), message, ("red",)))
        return datasets.Dataset.from_list([sample.to_row() for sample in samples])

    def test_the_others_are_scored(self, tiny, dataset, tmp_path, caplog: pytest.LogCaptureFixture) -> None:
        shown: list[tuple[int, int]] = []
        found = run(tiny, dataset, tmp_path / "e", progress=lambda *numbers: shown.append(numbers))
        assert [one.id for one in found.predictions] == ["0", "2", "3", "5"]
        assert shown[-1] == (6, 6)
        record = json.loads((tmp_path / "e" / "scores.json").read_text())
        assert record["samples"] == record["metrics"]["exact_match"]["n"] == 4
        assert list(record["unanswered"]) == ["1", "4"] and "1.jpg" in record["unanswered"]["1"]
        assert "2 of 6 samples cannot be asked and are not scored" in caplog.text and "4.jpg" in caplog.text
        alone = run(tiny, dataset.select([0, 2, 3, 5]), tmp_path / "good")
        untimed = [[dataclasses.replace(one, seconds=0) for one in e.predictions] for e in (found, alone)]
        assert untimed[0] == untimed[1]

    def test_a_mended_one_is_asked(self, tiny, dataset, image_folder: Path, tmp_path) -> None:
        run(tiny, dataset, tmp_path / "e")
        (tmp_path / "1.jpg").write_bytes((image_folder / "1.jpg").read_bytes())
        found = run(tiny, dataset, tmp_path / "e")
        assert [one.id for one in found.predictions] == ["0", "1", "2", "3", "5"]

    def test_none_is_left(self, tiny, dataset, tmp_path) -> None:
        with pytest.raises(EvaluationError, match="None of the samples can be asked"):
            run(tiny, dataset.select([1, 4]), tmp_path / "e")

    def test_what_is_no_fault_of_a_sample_goes_on_being_an_error(self, tiny, dataset, tmp_path, monkeypatch) -> None:
        def fails(self, samples):
            raise EvaluationError("the model is ill")

        monkeypatch.setattr(AnswerGenerator, "__call__", fails)
        with pytest.raises(EvaluationError, match="the model is ill"):
            run(tiny, dataset.select([0, 2]), tmp_path / "e")


def test_table() -> None:
    table = {
        "exact_match": {"value": 0.5, "low": 0.25, "high": 0.756, "n": 1234, "percent": True},
        "cider": {"value": 0.512, "low": 0.4, "high": 0.6, "n": 1234, "percent": False},
    }
    assert format_table(table).splitlines() == [
        "exact_match   50.00 %  (95 % interval 25.00 to 75.60, n=1,234)",
        "cider          0.51  (95 % interval 0.40 to 0.60, n=1,234)",
    ]


@pytest.fixture
def tiny(tiny_gemma3_dir: Path):
    from vlmtune.models.loading import load_model_for_inference

    model, processor = load_model_for_inference(str(tiny_gemma3_dir), torch_dtype="float32")
    return AnswerGenerator(model, processor, GenerationArguments(max_new_tokens=4, eval_batch_size=2))


def choices(count: int = 5):
    import datasets

    rows = []
    for number in range(count):
        question, letter, letters = choice_question(f"Which is {number}?", ["red", "blue", "a dog"], number % 3)
        messages = (Message.make("user", question), Message.make("assistant", letter))
        rows.append(Sample(str(number), (), messages, (letter,), {LETTERS: letters}).to_row())
    return datasets.Dataset.from_list(rows)


class TestChoosing:
    """Lettered options: the likeliest letter, or the text."""

    def test_the_likeliest_letter_is_the_answer(self, tiny, tmp_path) -> None:
        found = evaluate(tiny, choices(), ["multiple_choice"], tmp_path / "e", name="tiny")
        expected = TextScorer(tiny).choose([Sample.from_row(row) for row in choices()], ["ABC"] * 5)
        for prediction, options in zip(found.predictions, expected, strict=True):
            assert prediction.options == pytest.approx(options, abs=1e-4)
            assert prediction.answer == max(options, key=options.__getitem__)
            assert prediction.tokens == 0
        right = [p.answer == p.references[0] for p in found.predictions]
        assert found.table["multiple_choice"]["value"] == sum(right) / 5
        assert read_predictions(tmp_path / "e") == found.predictions
        assert json.loads((tmp_path / "e" / "scores.json").read_text())["ended_by_terminator"] == 1

    def test_by_text(self, tiny, tmp_path) -> None:
        found = evaluate(tiny, choices(), ["multiple_choice"], tmp_path, name="tiny", choose_by="text")
        assert all(p.tokens and not p.options for p in found.predictions)
        with pytest.raises(OutputError, match="another generation"):
            evaluate(tiny, choices(), ["multiple_choice"], tmp_path, name="tiny")


def test_perplexity_is_of_the_references(tiny, tmp_path) -> None:
    dataset = make_dataset(7)
    found = evaluate(tiny, dataset, ["perplexity", "exact_match"], tmp_path, name="tiny")
    samples = [Sample.from_row(row) for row in dataset]
    losses = TextScorer(tiny)(samples, [sample.references[0] for sample in samples])
    mean = sum(loss.loss for loss in losses) / sum(loss.tokens for loss in losses)
    assert found.table["perplexity"]["value"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert found.table["perplexity"]["low"] < math.exp(mean) < found.table["perplexity"]["high"]
    again = score(read_predictions(tmp_path), ["perplexity"])
    assert again.table["perplexity"] == found.table["perplexity"]


def test_perplexity_of_answers_without_it(tmp_path) -> None:
    run(Scripted(), make_dataset(), tmp_path)
    with pytest.raises(EvaluationError, match="name perplexity when the answers are generated"):
        score(read_predictions(tmp_path), ["perplexity"])
