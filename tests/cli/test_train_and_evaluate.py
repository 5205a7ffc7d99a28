"""The whole way in this process, from a recipe to a comparison of the trained model with its base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from command_line import vlmtune


def test_a_run_leaves_its_page(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<title>run</title>" in page and "What was trained" in page and "<svg" in page


def test_train_leaves_everything_that_is_needed_later(run: Path):
    held = {path.name for path in run.iterdir()}
    expected = {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "processor_config.json"}
    assert expected | {"run.json", "log.jsonl", "checkpoint-2"} <= held
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished" and record["arguments"]["training"]["learning_rate"] == 1e-3
    assert record["data"]["train"]["samples"] + record["data"]["evaluation"]["samples"] == 20


def test_train_says_what_it_did_and_resumes(recipe: Path, run: Path, tmp_path: Path, capsys):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    longer = ("train", recipe, "--output_dir", folder, "--max_steps", "3", "--resume")
    assert vlmtune(*longer) == 1
    assert "  - max_steps was 2 and is 3\n" in capsys.readouterr().err
    assert vlmtune(*longer, "--force_resume") == 0
    said = capsys.readouterr()
    assert "Done: 3 steps" in said.out and f"vlmtune predict {folder} IMAGE" in said.out
    assert "trainable parameters" in said.err and (folder / "checkpoint-3").is_dir()


def test_predict_answers_a_line_an_image(run: Path, flickr: Path, capsys):
    images = [flickr / "Images" / f"{color}.jpg" for color in ("red", "blue")]
    assert vlmtune("predict", run, *images, "--max_new_tokens", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(image) for image in images]
    assert vlmtune("predict", run, images[0], "--max_new_tokens", "3", "--prompt", "Describe this image.") == 0
    assert capsys.readouterr().out.split() == lines[0].split("\t")[1].split()


def test_evaluate_scores_what_was_held_out_and_compares(recipe: Path, run: Path, tmp_path: Path, capsys):
    metrics = ("--metrics", "exact_match", "token_f1")
    assert vlmtune("evaluate", recipe, "--evaluation_dir", tmp_path / "base", *metrics) == 0
    assert vlmtune(
        "evaluate", recipe, "--adapter", run, "--evaluation_dir", tmp_path / "tuned", *metrics,
        "--compare_to", tmp_path / "base",
    ) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "95 % interval" in said and "base" in said and "difference" in said
    scores = json.loads((tmp_path / "tuned" / "scores.json").read_text())
    held_out = json.loads((run / "run.json").read_text())["data"]["evaluation"]["samples"] // 5
    assert scores["samples"] == held_out < 4
    assert set(scores["metrics"]) == {"exact_match", "token_f1"}
    assert vlmtune("evaluate", f"--predictions={tmp_path / 'tuned'}", *metrics, "--compare_to", tmp_path / "base") == 0
    again = capsys.readouterr().out
    assert again.splitlines()[:2] == [line for line in said.splitlines() if "n=" in line][-2:]


def test_evaluate_takes_a_whole_training_recipe_and_goes_on_where_it_was(recipe: Path, run: Path, tmp_path: Path):
    arguments = ("evaluate", recipe, "--adapter", run, "--evaluation_dir", tmp_path / "e", "--metrics", "exact_match")
    assert vlmtune(*arguments) == 0
    file = tmp_path / "e" / "predictions.jsonl"
    before = file.read_text()
    file.write_text(before.splitlines(keepends=True)[0])
    assert vlmtune(*arguments) == 0
    assert len(file.read_text().splitlines()) == len(before.splitlines())


def test_evaluating_data_without_splits_warns(recipe: Path, run: Path, tmp_path: Path, capsys):
    arguments = ("evaluate", recipe, "--adapter", run, "--validation_fraction", "0", "--metrics", "exact_match")
    assert vlmtune(*arguments, "--evaluation_dir", tmp_path / "all") == 0
    assert "say nothing about new images" in capsys.readouterr().err
    assert json.loads((tmp_path / "all" / "scores.json").read_text())["samples"] == 4


def test_paths_of_the_home_directory_are_expanded(recipe: Path, run: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(run, tmp_path / "run")
    assert vlmtune("evaluate", recipe, "--adapter", "~/run", "--metrics", "exact_match") == 0
    assert (tmp_path / "run" / "evaluation" / "scores.json").exists()
