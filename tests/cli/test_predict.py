"""``vlmtune predict`` on folders and files of questions: nothing twice, nothing missing, also after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import vlmtune
from PIL import Image

from vlmtune.config import GenerationArguments
from vlmtune.evaluation.generation import AnswerGenerator
from vlmtune.evaluation.prediction import Predictor, Questions, read_questions
from vlmtune.models.loading import load_model_for_inference

OPTIONS = ("--max_new_tokens", 3, "--torch_dtype", "float32", "--eval_batch_size", 4)


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def questions(image_folder, tmp_path) -> Path:
    """Three questions about each of four images, of several lengths, one image through its path from the file."""
    file = tmp_path / "questions.jsonl"
    lines = []
    for number in range(4):
        for question in ("What is it?", "What color is the shape?", "Is there a red triangle in the image?"):
            row = {"id": f"{number} {question[:8]} {len(question)}", "image": str(image_folder / f"{number}.jpg")}
            lines.append(json.dumps(row | {"question": question}))
    lines.append(json.dumps({"image": str(image_folder / "5.jpg")}))
    asked = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "not shown"}]
    lines.append(json.dumps({"images": [str(image_folder / "6.jpg")], "messages": asked}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_folder(image_folder, tiny_gemma3_dir, tmp_path) -> None:
    output = tmp_path / "answers.jsonl"
    assert vlmtune("predict", tiny_gemma3_dir, image_folder, "--output", output, *OPTIONS) == 0
    found = rows(output)
    assert [row["id"] for row in found] == sorted(f"{number}.jpg" for number in range(12))
    model, processor = load_model_for_inference(tiny_gemma3_dir, torch_dtype="float32")
    generator = AnswerGenerator(model, processor, GenerationArguments(max_new_tokens=3, eval_batch_size=1))
    for row, sample in zip(found, read_questions([str(image_folder)]).samples, strict=True):
        assert row["answer"] == generator([sample])[0].text and row["prompt"] == "Describe this image."


def test_questions_share_their_image(questions, tiny_gemma3_dir) -> None:
    model, processor = load_model_for_inference(tiny_gemma3_dir, torch_dtype="float32")
    seen = []
    tower = model.model.vision_tower
    tower.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True)
    generator = AnswerGenerator(model, processor, GenerationArguments(max_new_tokens=2, eval_batch_size=4))
    found = list(Predictor(generator).answers(read_questions([str(questions)]).samples))
    assert len(found) == 14 and sum(seen) == 6
    # The image with the longest question comes first, the one with the shortest last.
    assert [sample.id for sample, _ in found[-2:]] == ["13", "14"]


def test_file_and_standard_output_agree(questions, tiny_gemma3_dir, tmp_path, capsys) -> None:
    output = tmp_path / "new folder" / "answers.jsonl"
    assert vlmtune("predict", tiny_gemma3_dir, questions, "--output", output, *OPTIONS) == 0
    capsys.readouterr()
    assert vlmtune("predict", tiny_gemma3_dir, questions, *OPTIONS) == 0
    printed = [tuple(line.split("\t")) for line in capsys.readouterr().out.splitlines()]
    found = rows(output)
    assert printed == [(row["id"], " ".join(row["answer"].split())) for row in found]
    assert [row["id"] for row in found[-2:]] == ["13", "14"] and found[-1]["prompt"] == "What is it?"


def test_bad_images_and_rows_are_named_and_tried_again(image_folder, tiny_gemma3_dir, tmp_path, capsys) -> None:
    folder, output = tmp_path / "images", tmp_path / "answers.jsonl"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes((image_folder / f"{number}.jpg").read_bytes())
    good = (folder / "3.jpg").read_bytes()
    (folder / "3.jpg").write_bytes(good[: len(good) // 2])
    assert vlmtune("predict", tiny_gemma3_dir, folder, "--output", output, *OPTIONS) == 1
    said = capsys.readouterr().err
    assert "1 of 5 questions have no answer" in said and "3.jpg" in said
    assert ["error" in row for row in rows(output)] == [False, False, False, True, False]
    before = rows(output)
    (folder / "3.jpg").write_bytes(good)
    assert vlmtune("predict", tiny_gemma3_dir, folder, "--output", output, *OPTIONS) == 0
    assert "answer" in rows(output)[3] and [row for row in rows(output) if row["id"] != "3.jpg"] == [
        row for row in before if row["id"] != "3.jpg"
    ]
    file = tmp_path / "bad.jsonl"
    file.write_text('{"image": "images/1.jpg"}\nnot JSON\n{"answer": "x"}\n{"image": "https://a.b/c.jpg"}\n')
    assert vlmtune("predict", tiny_gemma3_dir, file, *OPTIONS) == 1
    said = capsys.readouterr().err
    assert "line 2" in said and "line 3" in said and "network" in said


def test_other_options_or_questions_are_refused(image_folder, questions, tiny_gemma3_dir, tmp_path, capsys) -> None:
    output = tmp_path / "answers.jsonl"
    run = ("predict", tiny_gemma3_dir, questions, "--output", output)
    assert vlmtune(*run, *OPTIONS) == 0
    before = output.read_bytes()
    for arguments, words in (
        ((*run, "--max_new_tokens", 4, "--torch_dtype", "float32"), "other max_new_tokens"),
        ((*run, "--max_new_tokens", 3, "--torch_dtype", "bfloat16"), "other weights"),
        (("predict", tiny_gemma3_dir, image_folder, "--output", output, *OPTIONS), "not asked"),
        ((*run, *OPTIONS, "--prompt", "What is it?"), "another question"),
    ):
        assert vlmtune(*arguments) == 1
        assert words in capsys.readouterr().err and output.read_bytes() == before
    other = tmp_path / "mine.jsonl"
    other.write_text("mine\n")
    assert vlmtune(*run[:3], "--output", other, *OPTIONS) == 1
    assert other.read_text() == "mine\n" and "will not be overwritten" in capsys.readouterr().err
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"id": "a", "question": "x"}\n{"id": "a", "question": "y"}\n')
    assert vlmtune("predict", tiny_gemma3_dir, twice, *OPTIONS) == 1
    assert "have the id 'a'" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert vlmtune("predict", tiny_gemma3_dir, tmp_path / "empty", *OPTIONS) == 1


def test_stopped_within_a_line(image_folder, tiny_gemma3_dir, tmp_path) -> None:
    """A kill leaves whole lines and perhaps half of one: only what is missing is asked."""
    output = tmp_path / "answers.jsonl"
    run = ("predict", tiny_gemma3_dir, image_folder, "--output", output, *OPTIONS)
    assert vlmtune(*run) == 0
    whole = output.read_bytes()
    kept = b"".join(whole.splitlines(keepends=True)[:5])
    output.write_bytes(kept + whole.splitlines()[5][:20])
    model, processor = load_model_for_inference(tiny_gemma3_dir, torch_dtype="float32")
    generator = AnswerGenerator(model, processor, GenerationArguments(max_new_tokens=3, eval_batch_size=4))
    predictor, asked = Predictor(generator), []
    answers = predictor.answers
    predictor.answers = lambda samples: (asked.extend(sample.id for sample in samples), answers(samples))[1]
    questions: Questions = read_questions([str(image_folder)])
    assert predictor.to_file(questions, output) == (5, {})
    assert len(asked) == 7 and output.read_bytes() == whole


@pytest.mark.slow
def test_ten_thousand_killed_and_resumed(tiny_gemma3_dir, tmp_path) -> None:
    folder, output = tmp_path / "images", tmp_path / "answers.jsonl"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(10_000):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number:05}.png")
    command = [sys.executable, "-m", "vlmtune.cli", "predict", str(tiny_gemma3_dir), str(folder)]
    command += ["--output", str(output), "--max_new_tokens", "2", "--torch_dtype", "float32"]
    held = []
    for wanted in (1_000, 4_000):
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
        while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < wanted):
            time.sleep(0.05)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        lines = output.read_bytes().split(b"\n")[:-1]
        held.append({json.loads(line)["id"]: line for line in lines})
        assert wanted <= len(held[-1]) == len(lines) < 10_000
    assert subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}).returncode == 0
    lines = output.read_bytes().split(b"\n")[:-1]
    assert [json.loads(line)["id"] for line in lines] == [f"{number:05}.png" for number in range(10_000)]
    last = dict(zip((json.loads(line)["id"] for line in lines), lines, strict=True))
    # What was answered before a kill was not asked again, and stands as it was.
    assert all(last[name] == line for found in held for name, line in found.items())
    assert held[0].items() <= held[1].items()
