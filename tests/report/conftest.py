"""A run and its evaluations on disk, without any model: pictures, answers, records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vlmtune.evaluation.answering import Prediction
from vlmtune.evaluation.runner import score
from vlmtune.report.data import read_records
from vlmtune.report.page import render

EVIL = '<script>window.evil = 1</script><img src=x onerror="window.evil = 2"> $\\alpha$'
COLORS = ("red", "green", "blue", "teal")


def write_evaluation(folder: Path, predictions: list[Prediction], **record: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({**vars(prediction)}) for prediction in predictions]
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    record = {key: str(value) if isinstance(value, Path) else value for key, value in record.items()}
    scores = {"metrics": score(predictions, ["exact_match"]).table, "ended_by_terminator": 1.0}
    scores |= {"source": "some data, split test"} | record
    (folder / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    settings = {"model": str(record.get("model", "m")), "data": "d", "generation": {"temperature": 0.0}}
    (folder / "settings.json").write_text(json.dumps(settings))


def write_run(folder: Path, **options: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "status": "finished",
        "versions": {"vlmtune": "0.1.0", "torch": "2.13.0"},
        "hardware": {"processor": "a processor", "cores": 2},
        "arguments": {"model": {"use_lora": True, "lora_r": 8}, "training": {"learning_rate": 1e-3} | options},
        "data": {"train": {"samples": 1234}},
        "model": {"parameters": {"all": {"total": 3658560, "trainable": 442368}}},
        "metrics": {"train_loss": 0.5, "training_seconds": 12.0},
    }
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    given = {"learning_rate": 1e-3, "grad_norm": 1.0, "peak_memory_gib": 1.5}
    log = [given | {"loss": 2.0 / step, "step": step} for step in range(1, 5)]
    scores = {"eval_loss": 0.7, "eval_cider": 0.9, "eval_exact_match": 0.5, "eval_answers": 200}
    log.append(scores | {"eval_runtime": 3.0, "eval_answer_seconds": 2.0, "step": 4})
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)) + '\n{"loss": 1.', encoding="utf-8")


def make_predictions(images: Path, right: set[int], count: int = 40, **changes: object) -> list[Prediction]:
    made = []
    for number in range(count):
        color = COLORS[number % 4]
        made.append(
            Prediction(
                id=f"sample-{number}",
                prompt=f"What color is shape {number}?",
                images=(str(images / f"{number % 12}.jpg"),),
                answer=color if number in right else "red" if color != "red" else "blue",
                references=(color,),
                ended=True,
                tokens=2,
                seconds=0.1,
                meta={"answer_type": "warm" if color == "red" else "cold"},
            )
        )
    return [Prediction(**vars(one) | changes) for one in made]


def make_pictures(folder: Path) -> Path:
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (40 + 30 * number, 60), COLORS[number % 4]).save(folder / f"{number}.jpg")
    return folder


def make_demo(folder: Path, pictures: Path) -> Path:
    """A folder as ``vlmtune demo`` leaves it: adapter, base and tuned, with the checks' results."""
    write_run(folder / "adapter")
    base, tuned = make_predictions(pictures, set(range(10))), make_predictions(pictures, set(range(5, 35)))
    check = {"value": 0.2, "model": 0.75, "difference": 0.55, "low": 0.4, "high": 0.7, "n": 40, "percent": True}
    honesty = {
        "base": {"skipped": "it is scored already"},
        "shuffled": {"samples": 40, "metrics": {"exact_match": check}},
        "blank": {"samples": 40, "metrics": {"exact_match": check | {"low": -0.1}}},
        "ended_by_terminator": 0.975,
    }
    write_evaluation(folder / "base", base)
    write_evaluation(folder / "tuned", tuned, model=folder / "adapter", honesty=honesty)
    write_evaluation(folder / "tuned" / "shuffled", base)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "pictures")


@pytest.fixture
def demo(tmp_path: Path, pictures: Path) -> Path:
    return make_demo(tmp_path / "demo", pictures)


@pytest.fixture(scope="session")
def demo_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of such a folder."""
    folder = tmp_path_factory.mktemp("report")
    demo = make_demo(folder / "demo", make_pictures(folder / "pictures"))
    return render(read_records([demo]), title="A page")
