"""``vlmtune metrics``, ``report``, ``compare``, the checks of ``evaluate``, and the demo's page, by command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import error_of, vlmtune
from PIL import Image

from vlmtune.evaluation.answering import Prediction
from vlmtune.evaluation.metrics import METRICS
from vlmtune.evaluation.runner import score

COLORS = ("red", "green", "blue", "teal")


def evaluated(folder: Path, answers: list[str], references: list[str], **arguments: object) -> Path:
    """A run's folder with an evaluation in it."""
    place = folder / "evaluation"
    place.mkdir(parents=True)
    rows = [
        Prediction(f"s{i}", f"Color {i}?", (), answer, (reference,), True, 1, 0.1)
        for i, (answer, reference) in enumerate(zip(answers, references, strict=True))
    ]
    (place / "predictions.jsonl").write_text("".join(json.dumps(vars(row)) + "\n" for row in rows))
    table = score(rows, ["exact_match"]).table
    (place / "scores.json").write_text(json.dumps({"metrics": table, "ended_by_terminator": 1.0}))
    (place / "settings.json").write_text(json.dumps({"model": str(folder), "data": "d"}))
    record = {"arguments": {"training": {"seed": 0, "output_dir": str(folder)} | arguments}, "status": "finished"}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def two_runs(tmp_path: Path) -> tuple[Path, Path]:
    references = [COLORS[i % 4] for i in range(20)]
    one = evaluated(tmp_path / "one", ["red"] * 20, references, learning_rate=1e-4)
    other = evaluated(tmp_path / "two", ["no", *references[1:]], references, learning_rate=2e-4)
    return one, other


@pytest.mark.parametrize("command", ["metrics", "report", "compare"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmtune(command, "--help") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: vlmtune {command}") and all(len(line) <= 120 for line in said.splitlines())
    assert vlmtune("--help") == 0
    assert f"\n  {command} " in capsys.readouterr().out


def test_metrics_lists_all_with_their_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmtune("metrics") == 0
    said = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{said}" for name in METRICS)
    assert "arXiv:1411.5726; tylin/coco-caption Cider" in said
    assert all(len(line) <= 120 for line in said.splitlines())
    assert "metrics has no option '--jsn'" in error_of(capsys, 2, "metrics", "--jsn")


def test_report(two_runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmtune("report", two_runs[0]) == 0
    assert str(two_runs[0] / "report.html") in capsys.readouterr().out
    assert "<title>one</title>" in (two_runs[0] / "report.html").read_text()
    assert vlmtune("report", *two_runs, f"--output={tmp_path / 'pages' / 'both.html'}") == 0
    assert "exact_match rises from" in (tmp_path / "pages" / "both.html").read_text()


def test_compare(two_runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmtune("compare", *two_runs) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0].split() == ["option", "one", "two"]
    assert ["learning_rate", "0.0001", "0.0002"] in [line.split() for line in lines]
    assert not any(name in said for name in ("seed", "output_dir"))
    assert "25.0 %" in said and "95.0 %" in said and "+70.0 (" in said
    assert "of 20 samples 15 became better, 1 became worse" in said and "... and 6 more" in said
    page = (two_runs[1] / "compare.html").read_text()
    assert "In what the recipes differ" in page and "0.0002" in page


def test_compare_a_run_with_itself(two_runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmtune("compare", two_runs[0], two_runs[0] / "evaluation") == 0
    said = capsys.readouterr().out
    assert "The recipes differ in nothing that is recorded." in said and "0 became better, 0 became worse." in said


def test_bad_input(two_runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "report needs a run's" in error_of(capsys, 2, "report")
    assert "Did you mean '--output'" in error_of(capsys, 2, "report", two_runs[0], "--outptu", "x")
    assert "at least two runs" in error_of(capsys, 2, "compare", two_runs[0])
    (tmp_path / "bare").mkdir()
    assert "holds neither a run" in error_of(capsys, 1, "report", tmp_path / "bare")
    (tmp_path / "bare" / "run.json").write_text("{}")
    assert f"{tmp_path / 'bare'} holds no evaluation" in error_of(capsys, 1, "compare", two_runs[0], tmp_path / "bare")
    other = evaluated(tmp_path / "other", ["a"], ["b"])
    assert "other references" in error_of(capsys, 1, "compare", two_runs[0], other)
    file = other / "evaluation" / "predictions.jsonl"
    file.write_text(file.read_text().replace('"s0"', '"elsewhere"'))
    assert "no sample in common" in error_of(capsys, 1, "compare", two_runs[0], other)


@pytest.fixture
def easy_vqa(tmp_path: Path) -> Path:
    """Eight pictures of one color each with a question about each, as easy-VQA lies on disk."""
    for split, numbers in (("train", range(8)), ("test", range(8, 16))):
        (tmp_path / "data" / split / "images").mkdir(parents=True)
        rows = []
        for number in numbers:
            color = COLORS[number % 4]
            Image.new("RGB", (32, 32), color).save(tmp_path / "data" / split / "images" / f"{number}.png")
            rows += [["what color is the shape?", color, number], [f"is there a {color} shape?", "yes", number]]
        (tmp_path / "data" / split / "questions.json").write_text(json.dumps(rows))
    return tmp_path / "data"


def test_evaluate_checks_its_honesty(
    tiny_gemma3_dir: Path, easy_vqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--model_name_or_path", tiny_gemma3_dir, "--dataset_path", easy_vqa, "--max_new_tokens", "2")
    assert vlmtune("evaluate", *common, "--evaluation_dir", tmp_path / "on") == 0
    said = capsys.readouterr().out
    assert "shuffled images, 16 samples" in said and "blank images, 16 samples" in said
    assert "answers ended by themselves" in said and "base model" not in said
    found = json.loads((tmp_path / "on" / "scores.json").read_text())["honesty"]
    assert set(found) == {"shuffled", "blank", "ended_by_terminator", "training_images"}
    # Pictures of one plain color are the same in both splits.
    assert found["training_images"]["shared"] == found["training_images"]["images"] == 8
    assert found["training_images"]["near_copies"]["near"] == 0
    assert "8 of the 8 images scored are training images too" in said
    assert f"The report is {tmp_path / 'on' / 'report.html'}." in said
    assert "8 of the 8 images scored are training images too" in (tmp_path / "on" / "report.html").read_text()
    assert (tmp_path / "on" / "shuffled" / "predictions.jsonl").exists()
    rows = [json.loads(line) for line in (tmp_path / "on" / "predictions.jsonl").read_text().splitlines()]
    assert {row["meta"]["answer_type"] for row in rows} == {"yes/no", "color"}

    assert vlmtune("evaluate", *common, "--evaluation_dir", tmp_path / "off", "--honesty", "off") == 0
    assert "shuffled" not in capsys.readouterr().out and not (tmp_path / "off" / "shuffled").exists()
    assert "honesty" in error_of(capsys, 2, "evaluate", *common, "--honesty", "maybe")


def test_the_demo_ends_with_its_report(
    tiny_gemma3_dir: Path,
    easy_vqa: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from vlmtune.config import parse_recipe
    from vlmtune.data.loading import load_samples
    from vlmtune.demo import run

    few = ("--max_steps", "2", "--per_device_train_batch_size", "4", "--dataset_path", str(easy_vqa))
    monkeypatch.setattr(run, "model_folder", lambda: tiny_gemma3_dir)
    monkeypatch.setattr(run, "load_samples", lambda name, **options: load_samples(easy_vqa, **options))
    monkeypatch.setattr(run, "parse_recipe", lambda flags, path: parse_recipe([*flags, *few], path))
    assert vlmtune("demo", "--output_dir", tmp_path / "demo", "--questions", "12") == 0
    said = capsys.readouterr().out
    page = tmp_path / "demo" / "report.html"
    assert said.rstrip().endswith(str(page)) and "shuffled images" in said and "blank images" in said
    html = page.read_text()
    assert "What was trained" in html and "By answer type" in html and html.count("<svg") > 3
