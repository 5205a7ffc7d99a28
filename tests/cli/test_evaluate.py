"""Scoring answers of other programs by command line, and how a command says how far it is."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import error_of, vlmtune

from vlmtune.cli import common
from vlmtune.errors import MissingDependencyError, OutputError
from vlmtune.evaluation.metrics.captions import DocumentFrequencies

ROWS = [
    {"answer": "a red dog runs over the meadow", "references": ["a red dog runs over a meadow"], "type": "long"},
    {"answer": "a cat sleeps upon a chair", "references": ["a cat sleeps on a chair", "a sleeping cat"]},
]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def test_answers_of_another_program(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmtune("evaluate", "--predictions", mine, "--evaluation_dir", tmp_path / "e") == 0
    said = capsys.readouterr().out
    # Two references of a sample: captions.
    assert [line.split()[0] for line in said.splitlines() if "interval" in line] == ["cider", "bleu4", "rouge_l"]
    assert f"Answers and scores are in {tmp_path / 'e'}." in said
    assert f"The report is {tmp_path / 'e' / 'report.html'}." in said
    # Twice is no fault, and another file's answers are not written over it.
    assert vlmtune("evaluate", "--predictions", mine, "--evaluation_dir", tmp_path / "e", "--metrics", "wer") == 0
    mine.write_text(json.dumps(ROWS[0] | {"answer": "other"}))
    said = error_of(capsys, 1, "evaluate", "--predictions", mine, "--evaluation_dir", tmp_path / "e")
    assert "already holds an evaluation with another data" in said
    assert vlmtune("evaluate", "--predictions", mine, "--evaluation_dir", tmp_path / "f", "--metrics", "wer") == 0
    assert vlmtune("compare", tmp_path / "e", tmp_path / "f") == 0
    assert "1 samples that all answered are compared, of 2" in capsys.readouterr().out
    assert (tmp_path / "f" / "compare.html").is_file()


def test_no_model_is_loaded(mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("vlmtune.evaluation.command.load", lambda *a: pytest.fail("a model is loaded"))
    assert vlmtune("evaluate", "--predictions", mine, "--metrics", "rouge_l", "iou") == 0
    said = capsys.readouterr()
    assert "rouge_l" in said.out and "iou cannot score these answers" in said.err
    assert "iou cannot score" in error_of(capsys, 1, "evaluate", "--predictions", mine, "--metrics", "iou")


def test_cider_by_the_frequencies_of_the_training_data(
    mine: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "flickr" / "Images").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "flickr" / "Images" / f"{number}.jpg").write_bytes(Path(image_folder, f"{number}.jpg").read_bytes())
    texts = ["a dog runs", "a red dog", "a cat sleeps", "a cat on a chair", "a bird", "two birds"]
    lines = "".join(f"{number // 2}.jpg,{text}\n" for number, text in enumerate(texts))
    (tmp_path / "flickr" / "captions.txt").write_text("image,caption\n" + lines)
    table = tmp_path / "df" / "df.json.gz"
    data = ("--dataset_path", tmp_path / "flickr")
    assert vlmtune("metrics", "--save_frequencies", table, *data) == 0
    assert f"3 images of {tmp_path / 'flickr'}" in capsys.readouterr().out
    assert DocumentFrequencies.load(table).counts["a",] == 3
    assert vlmtune("evaluate", "--predictions", mine, "--metrics", f"cider:{table}", "cider") == 0
    said = capsys.readouterr().out
    assert f"cider:{table}" in said and said.count("note: CIDEr over 2 images") == 1
    assert "already and will not be overwritten" in error_of(capsys, 1, "metrics", "--save_frequencies", table, *data)
    assert "dataset_path is not set" in error_of(capsys, 2, "metrics", "--save_frequencies", tmp_path / "new.gz")
    assert "is no table" in error_of(capsys, 2, "evaluate", "--predictions", mine, "--metrics", "cider:nowhere.gz")


def test_the_page_is_of_both_where_one_is_compared_with(mine: Path, tmp_path: Path) -> None:
    assert vlmtune("evaluate", "--predictions", mine, "--evaluation_dir", tmp_path / "one") == 0
    mine.write_text("\n".join(json.dumps(row | {"answer": "no idea"}) for row in ROWS))
    flags = ("--predictions", mine, "--evaluation_dir", tmp_path / "two", "--compare_to", tmp_path / "one")
    assert vlmtune("evaluate", *flags) == 0
    page = (tmp_path / "two" / "report.html").read_text()
    assert "0 became better" in re.sub("<[^>]*>", "", page) and "no idea" in page


def test_a_page_that_cannot_be_written_costs_nothing_else(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("vlmtune.report.page.write_report", fails)
    for error in (MissingDependencyError("It needs jinja2."), OutputError("It is full."), ValueError("odd")):
        assert vlmtune("evaluate", "--predictions", mine, "--evaluation_dir", tmp_path / "e") == 0
        assert "no page was written" in (said := capsys.readouterr().err) and str(error) in said


def test_strict_vqa_accuracy(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine.write_text(json.dumps({"answer": "the dog", "references": ["dog"] * 10}))
    assert vlmtune("evaluate", "--predictions", mine, "--metrics", "vqa_accuracy", "vqa_accuracy_strict") == 0
    values = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert values == [["vqa_accuracy", "100.00"], ["vqa_accuracy_strict", "0.00"]]


def test_missing_references_are_found_before_the_model_loads(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vlmtune.evaluation.command.load", lambda *a: pytest.fail("a model is loaded"))
    rows = [{"image": str(image_folder / f"{i}.jpg"), "question": "?", "answer": "a dog"} for i in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ("--model_name_or_path", "m", "--dataset_path", tmp_path / "data.jsonl", "--evaluation_dir", tmp_path / "e")
    said = error_of(capsys, 1, "evaluate", *flags, "--metrics", "pope_f1", "iou")
    assert "pope_f1 cannot score the references" in said and "iou cannot score the references" in said
    rows = [{"messages": [{"role": "user", "content": f"Question {i}?"}]} for i in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "None of the 3 samples has references" in error_of(capsys, 1, "evaluate", *flags)
    assert not (tmp_path / "e").exists()


def test_bad_files(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine.write_text('{"answer": "x"}\n')
    assert "line 1, is not a prediction (it has no references)" in error_of(
        capsys, 1, "evaluate", "--predictions", mine, "--metrics", "exact_match"
    )
    mine.write_text("")
    assert "mine.jsonl is empty" in error_of(capsys, 1, "evaluate", "--predictions", mine)
    mine.write_text('{"answer": "x", "references": []}\n')
    assert "1 of 1 predictions have no references" in error_of(capsys, 1, "evaluate", "--predictions", mine)


def test_samples_is_short_for_eval_samples(
    tiny_gemma3_dir: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"image": str(image_folder / f"{i}.jpg"), "question": "What?", "answer": "red"} for i in range(6)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ("--model_name_or_path", tiny_gemma3_dir, "--dataset_path", tmp_path / "data.jsonl", "--honesty", "off")
    flags += ("--max_new_tokens", "2", "--evaluation_dir", tmp_path / "e", "--samples", "4")
    assert vlmtune("evaluate", *flags) == 0
    assert json.loads((tmp_path / "e" / "scores.json").read_text())["samples"] == 4
    assert "samples" in error_of(capsys, 2, "evaluate", *flags[:-1], "0")


def test_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(common.sys.stderr, "isatty", lambda: False, raising=False)
    show = common.progress("Answering")
    with caplog.at_level(logging.INFO, "vlmtune"):
        # 200 were there before; 100 then take 10 s.
        for done in range(200, 1300, 100):
            show(done, 1200)
            clock.now += 10
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "Answering: 500 of 1,200 (42 %), about 70 s left",
        "Answering: 800 of 1,200 (67 %), about 40 s left",
        "Answering: 1,100 of 1,200 (92 %), about 10 s left",
    ]
