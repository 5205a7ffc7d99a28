"""Generated answers scored during training, what the best checkpoint is chosen by, and what trackers are given."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from training.run_files import log
from transformers.integrations import WandbCallback

from vlmtune.config import EvaluationArguments, TrainingArguments
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.errors import ConfigError, EvaluationError
from vlmtune.training.answer_pictures import show_answers
from vlmtune.training.answer_scores import Answered, AnswerScorer, choose_best_by
from vlmtune.training.run import run_training

ANSWERS = EvaluationArguments(metrics=["exact_match", "cer"], max_new_tokens=40, eval_batch_size=2)


@pytest.fixture(scope="session")
def scored_run(run_arguments, eval_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run of three steps, each evaluated with two answers; treat as read-only."""
    folder = tmp_path_factory.mktemp("scored") / "run"
    arguments = run_arguments(
        folder,
        max_steps=3,
        learning_rate=0.01,
        eval_dataset_path=str(eval_folder),
        eval_strategy="steps",
        eval_steps=1,
        eval_answers=2,
        metric_for_best_model="cer",
        load_best_model_at_end=True,
        save_steps=1,
        report_to=["tensorboard"],
    )
    run_training(*arguments, ANSWERS)
    return SimpleNamespace(folder=folder, arguments=arguments)


@pytest.fixture(scope="session")
def questions(image_folder: Path) -> list[dict[str, Any]]:
    """Six questions about three images, each with a reference."""
    made = []
    for number in range(6):
        messages = (Message.make("user", f"Question {number}?", images=1), Message.make("assistant", "red"))
        image = ImageRef(str(image_folder / f"{number // 2}.jpg"))
        made.append(Sample(f"q{number}", (image,), messages, references=("red",)).to_row())
    return made


def test_scores_are_logged_at_each_evaluation(scored_run) -> None:
    entries = [entry for entry in log(scored_run.folder) if "eval_loss" in entry]
    # Three on the way, and one of the model that is saved.
    assert [entry["step"] for entry in entries] == [1, 2, 3, 3]
    for entry in entries:
        assert {"eval_exact_match", "eval_cer", "eval_answer_seconds"} <= entry.keys()
        assert entry["eval_answers"] == 2


def test_the_best_checkpoint_goes_by_the_metric(scored_run) -> None:
    """A character error rate is better when it is lower; transformers would take the highest."""
    state = json.loads((scored_run.folder / "checkpoint-3" / "trainer_state.json").read_text())
    rates = {entry["step"]: entry["eval_cer"] for entry in log(scored_run.folder) if "eval_cer" in entry}
    assert len(set(rates.values())) > 1
    assert state["best_metric"] == min(rates.values())
    assert rates[int(state["best_model_checkpoint"].rpartition("-")[2])] == min(rates.values())


def test_answering_changes_no_loss(scored_run, run_arguments, eval_folder: Path, tmp_path: Path) -> None:
    options = {"max_steps": 3, "eval_dataset_path": str(eval_folder), "eval_strategy": "steps", "eval_steps": 1}
    options["learning_rate"] = 0.01
    run_training(*run_arguments(tmp_path / "run", save_steps=1, **options))

    def losses(folder: Path) -> list[float]:
        return [entry[name] for entry in log(folder) for name in ("loss", "eval_loss") if name in entry]

    # There one more follows, of the best checkpoint.
    assert len(losses(tmp_path / "run")) == 6
    assert losses(tmp_path / "run") == losses(scored_run.folder)[:-1]


def test_tensorboard_gets_scores_pictures_and_texts(scored_run) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(next(scored_run.folder.rglob("events.out.tfevents.*")).parent))
    events.Reload()
    tags = events.Tags()
    assert "eval/cer" in tags["scalars"]
    assert tags["images"] == ["answers/0", "answers/1"]
    assert {"answers/0/text_summary", "answers/1/text_summary"} <= set(tags["tensors"])


def test_wandb_gets_scores_pictures_and_texts(
    run_arguments, eval_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real library, offline: what it would send to its server lies in the run's folder."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = {"max_steps": 2, "eval_dataset_path": str(eval_folder), "eval_strategy": "steps", "eval_steps": 1}
    options |= {"eval_answers": 2, "report_to": ["wandb"]}
    try:
        run_training(*run_arguments(tmp_path / "run", **options), ANSWERS)
    finally:
        # Ends the process that writes, too.
        wandb.teardown()
    folder = next((tmp_path / "wandb").glob("offline-run-*"))
    sent = next(folder.glob("*.wandb")).read_bytes()
    for name in (b"train/loss", b"eval/loss", b"eval/exact_match", b"eval/cer", b"eval/pictures", b"eval/answers"):
        assert name in sent, name
    evaluations = sum("eval_cer" in entry for entry in log(tmp_path / "run"))
    pictures = list((folder / "files" / "media" / "images").rglob("*.png"))
    assert len(pictures) == 2 * evaluations
    assert all(len(Image.open(picture).convert("RGB").getcolors(1 << 16)) > 1 for picture in pictures)
    tables = [json.loads(table.read_text()) for table in folder.rglob("*.table.json")]
    assert len(tables) == evaluations
    assert all(table["columns"] == ["id", "prompt", "answer", "references"] for table in tables)
    assert all(len(table["data"]) == 2 for table in tables)


def test_pictures_for_wandb(image_folder: Path) -> None:
    given: list[dict[str, Any]] = []
    stand_in = SimpleNamespace(
        Image=lambda picture, caption: (picture.size, caption),
        Table=lambda columns, data: (columns, data),
        log=given.append,
    )
    callback = WandbCallback.__new__(WandbCallback)
    callback._wandb = stand_in
    image = ImageRef(str(image_folder / "0.jpg"))
    message = Message.make("user", "What is it?", images=1)
    sample = Sample("one", (image,), (message,), references=("a dog", "dog"))
    text_only = Sample("two", (), (Message.make("user", "Why?"),), references=("so",))
    show_answers([callback, object()], [Answered(sample, "cat"), Answered(text_only, "no")] * 3, step=7)
    columns, rows = given[0]["eval/answers"]
    assert given[0]["train/global_step"] == 7
    assert columns == ["id", "prompt", "answer", "references"]
    assert rows == [["one", "What is it?", "cat", "a dog | dog"], ["two", "Why?", "no", "so"]] * 2
    assert [caption for _, caption in given[0]["eval/pictures"]] == [
        "id: one\nprompt: What is it?\nanswer: cat\nreferences: a dog | dog"
    ] * 2


def test_the_same_samples_each_time(fresh_model, processor, questions) -> None:
    model = fresh_model()
    ids = []
    for _ in range(2):
        scorer = AnswerScorer(questions, processor, ["exact_match"], ANSWERS, count=3, seed=1)
        scores, answered = scorer(model)
        ids.append([one.sample.id for one in answered])
        assert scores["answers"] == 3
    assert ids[0] == ids[1]
    others = AnswerScorer(questions, processor, ["exact_match"], ANSWERS, count=3, seed=2)
    assert [sample.id for sample in others.samples] != ids[0]


def test_no_more_time_than_allowed(fresh_model, processor, questions, caplog: pytest.LogCaptureFixture) -> None:
    scorer = AnswerScorer(questions, processor, ["exact_match"], ANSWERS, count=6, max_seconds=1e-9)
    with caplog.at_level(logging.WARNING, "vlmtune.training"):
        scores, answered = scorer(fresh_model())
    assert scores["answers"] == len(answered) == ANSWERS.eval_batch_size
    assert "answered 2 of 6 evaluation samples" in caplog.text


def test_early_stopping(run_arguments, eval_folder: Path, tmp_path: Path) -> None:
    """A model that learns nothing has the same scores at each evaluation."""
    options = {"max_steps": 5, "eval_dataset_path": str(eval_folder), "eval_strategy": "steps", "eval_steps": 1}
    options |= {"eval_answers": 2, "metric_for_best_model": "exact_match", "early_stopping_patience": 1}
    options |= {"load_best_model_at_end": True, "save_steps": 1, "learning_rate": 1e-12}
    result = run_training(*run_arguments(tmp_path / "run", **options), ANSWERS)
    assert result.steps == 2


def test_no_references(processor, questions) -> None:
    rows = [row | {"references": []} for row in questions]
    with pytest.raises(EvaluationError, match="no evaluation sample has references"):
        AnswerScorer(rows, processor, ["exact_match"], ANSWERS, count=2)


def test_a_metric_that_cannot_score_is_found_before_training(processor, questions) -> None:
    with pytest.raises(EvaluationError, match="iou cannot score the references"):
        AnswerScorer(questions, processor, ["exact_match", "iou"], ANSWERS, count=2)


def test_what_a_metric_notes_is_said_once(fresh_model, processor, questions, caplog: pytest.LogCaptureFixture) -> None:
    scorer = AnswerScorer(questions, processor, ["cider"], ANSWERS, count=2)
    model = fresh_model()
    with caplog.at_level(logging.INFO, "vlmtune.training"):
        for _ in range(2):
            scorer(model)
    notes = [text for record in caplog.records if "CIDEr over" in (text := record.getMessage())]
    assert len(notes) == 1 and notes[0].startswith("cider of the samples answered during training: CIDEr over 2 images")


def test_no_evaluation_data(run_arguments, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no evaluation data"):
        run_training(*run_arguments(tmp_path / "run", eval_strategy="steps", eval_steps=1, eval_answers=2))


@pytest.mark.parametrize("name", ["eval_answers", "early_stopping_patience"])
def test_without_evaluations(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{name} is set, but eval_strategy is no"):
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: 2})


def test_a_metric_that_is_not_scored(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, metric_for_best_model="cidr")
    with pytest.raises(ConfigError, match=r"scored are cider\..*eval_answers.*'cider'"):
        choose_best_by(args, ["cider"])
    with pytest.raises(ConfigError, match="no answers are scored"):
        choose_best_by(args, [])


@pytest.mark.parametrize(("name", "higher"), [("cer", False), ("eval_cider", True)])
def test_direction(name: str, higher: bool, tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, metric_for_best_model=name)
    choose_best_by(args, ["cer", "cider"])
    assert args.greater_is_better is higher
