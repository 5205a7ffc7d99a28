"""The command line in this process: help, the whole way from training to a comparison, and every bad input."""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from pathlib import Path

import pytest
from PIL import Image

from vlmtune import cli
from vlmtune.config.options import field_types

COLORS = ("red", "green", "blue", "teal")
COMMANDS = ("train", "evaluate", "predict", "demo", "env")


def vlmtune(*arguments: object) -> int:
    """Run a command; put back what it sets for its whole process."""
    logger, environment = logging.getLogger("vlmtune"), dict(os.environ)
    before = logger.handlers, logger.level, logger.propagate
    try:
        with warnings.catch_warnings():
            return cli.main([str(argument) for argument in arguments])
    finally:
        logger.handlers, logger.level, logger.propagate = before
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]


@pytest.fixture(scope="module")
def flickr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures of one colour each, with five captions a picture."""
    folder = tmp_path_factory.mktemp("flickr")
    (folder / "Images").mkdir()
    lines = ["image,caption"]
    for color in COLORS:
        Image.new("RGB", (40, 30), color).save(folder / "Images" / f"{color}.jpg")
        lines += [f'{color}.jpg,"A {color} image, number {number}"' for number in range(5)]
    (folder / "captions.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_gemma3_dir: Path, flickr: Path) -> Path:
    """A recipe without its output folder."""
    place = tmp_path_factory.mktemp("recipe")
    options = {
        "model_name_or_path": tiny_gemma3_dir,
        "dataset_path": flickr,
        "cache_dir": place / "cache",
        "validation_fraction": 0.4,
        "lora_r": 4,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": "1e-3",
        "max_new_tokens": 4,
    }
    path = place / "recipe.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in options.items()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(recipe: Path) -> Path:
    """The folder of one training run; treat as read-only."""
    folder = recipe.parent / "run"
    assert vlmtune("train", recipe, "--output_dir", folder, "--num_train_epochs=1") == 0
    return folder


def test_a_run_leaves_its_page(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<title>run</title>" in page and "What was trained" in page and "<svg" in page


@pytest.mark.parametrize("command", ["train", "preview", "check", "estimate", "evaluate"])
def test_a_model_of_another_family_than_named(command, recipe, tmp_path, capsys) -> None:
    folder = {"train": "--output_dir", "evaluate": "--evaluation_dir"}.get(command)
    more = (folder, tmp_path / "out") if folder else ()
    assert vlmtune(command, recipe, "--model_type", "llava", *more) == 2
    assert "model_type is llava, but the model is of the family gemma3" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """Run a command that must fail with this code; return what it says: one paragraph, no traceback."""

    def check(code: int, *arguments: object) -> str:
        capsys.readouterr()
        assert vlmtune(*arguments) == code
        said = capsys.readouterr()
        error = said.err[said.err.index("error: ") :]
        assert said.out == "" and "Traceback" not in said.err
        assert "\n\n" not in error and len(error) < 1800
        return error

    return check


def _files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(f): (f.read_bytes(), f.stat().st_mtime_ns) for f in sorted(folder.rglob("*")) if f.is_file()}


# -- help and the small commands --------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_a_command(command: str, flag: str, capsys):
    assert vlmtune(command, flag) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"usage: vlmtune {command}") and not said.err
    assert all(len(line) <= 120 for line in said.out.splitlines())


@pytest.mark.parametrize(("arguments", "code"), [((), 2), (("--help",), 0), (("-h",), 0), (("help",), 0)])
def test_overview_names_every_command(arguments, code, capsys):
    assert vlmtune(*arguments) == code
    said = capsys.readouterr().out
    assert all(f"\n  {command} " in said for command in COMMANDS)


def test_version(capsys):
    assert vlmtune("--version") == 0
    assert capsys.readouterr().out.startswith("vlmtune 0.")


def test_train_help_shows_every_option_once_and_what_must_be_set(capsys):
    from vlmtune.config import ModelWithLoRAArguments, VLMDataArguments
    from vlmtune.config.training_options import TrainingOptions

    vlmtune("train", "--help")
    said = capsys.readouterr().out
    for cls in (ModelWithLoRAArguments, VLMDataArguments, TrainingOptions):
        for name in field_types(cls):
            assert said.count(f"\n  --{name} ") == 1, name
    assert said.count("[required]") == 3


def test_help_leaves_out_what_does_not_concern_a_command(capsys):
    vlmtune("evaluate", "--help")
    evaluate = capsys.readouterr().out
    assert "--adapter " in evaluate and "--metrics " in evaluate
    assert "--share_images" not in evaluate and "--learning_rate" not in evaluate
    vlmtune("predict", "--help")
    predict = capsys.readouterr().out
    assert "--torch_dtype " in predict and "--model_name_or_path" not in predict


@pytest.mark.parametrize(
    ("arguments", "asked", "offered"),
    [
        (("trian",), "trian", "train"),
        (("train", "--lerning_rate", "1e-4"), "--lerning_rate", "--learning_rate"),
        (("evaluate", "--metric", "exact_match"), "--metric", "--metrics"),
        (("predict", "model", "a.jpg", "--max_new_token", "3"), "--max_new_token", "--max_new_tokens"),
        (("demo", "--output-dri", "x"), "--output-dri", "--output_dir"),
        (("env", "--jsn"), "--jsn", "--json"),
    ],
)
def test_an_unknown_command_or_option_gets_the_nearest_name(arguments, asked, offered, refused):
    said = refused(2, *arguments)
    assert asked in said and f"Did you mean '{offered}'?" in said


def test_a_recipe_after_the_options_is_said_to_be_misplaced(recipe: Path, refused):
    assert "stands before the options" in refused(2, "train", "--lora_r", "8", recipe)


def test_numbers_of_the_demo_are_checked(refused):
    assert "--questions is 'many'" in refused(2, "demo", "--questions", "many")
    assert "--output_dir needs a value" in refused(2, "demo", "--output_dir")


def test_env(capsys):
    assert vlmtune("env") == 0
    said = capsys.readouterr().out
    assert "\n  torch: " in said and "\n  cores: " in said
    assert vlmtune("env", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["transformers"] and found["hardware"]["cores"]


# -- from training to a comparison ------------------------------------------------------------------------


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


# -- bad input --------------------------------------------------------------------------------------------


@pytest.fixture
def train(recipe: Path, tmp_path: Path, refused):
    """Train with these flags, which must be refused."""

    def check(code: int, *flags: object) -> str:
        return refused(code, "train", recipe, "--output_dir", tmp_path / "out", *flags)

    return check


def test_no_such_model(train, tmp_path: Path):
    said = train(1, "--model_name_or_path", tmp_path / "nowhere")
    assert f"no model at {tmp_path / 'nowhere'}" in said and "Correct model_name_or_path" in said
    said = train(1, "--model_name_or_path", "google/gemma-none")
    assert "google/gemma-none" in said and "Check the name" in said


def test_a_text_only_model(train, tmp_path: Path):
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "llama")
    said = train(1, "--model_name_or_path", tmp_path / "llama")
    assert "llama" in said and "text only" in said and "Choose a vision-language model" in said


def test_captions_without_images(train, tmp_path: Path):
    (tmp_path / "captions.txt").write_text("image,caption\n1.jpg,A dog\n")
    said = train(1, "--dataset_path", tmp_path)
    assert "holds captions but no images" in said and "Set image_dir" in said


def test_images_without_captions(train, flickr: Path):
    said = train(1, "--dataset_path", flickr / "Images")
    assert str(flickr / "Images") in said and "captions.txt" in said


def test_a_captions_file_without_a_matching_image(train, flickr: Path, tmp_path: Path):
    folder = Path(shutil.copytree(flickr, tmp_path / "flickr"))
    (folder / "Images" / "teal.jpg").unlink()
    said = train(1, "--dataset_path", folder)
    assert "5 of 20 rows" in said and "teal.jpg" in said and "raise max_bad_fraction" in said


def test_no_data_at_all(train, tmp_path: Path):
    said = train(1, "--dataset_path", tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in said


def test_a_typo_in_a_recipe(recipe: Path, tmp_path: Path, refused):
    path = tmp_path / "typo.yaml"
    path.write_text(recipe.read_text() + f"output_dir: {tmp_path / 'out'}\nlora_rnk: 8\nwarmup_step: 1\n")
    said = refused(2, "train", path)
    assert f"{path}: lora_rnk is not an option." in said and "Did you mean 'warmup_steps'?" in said
    assert not (tmp_path / "out").exists()


def test_a_broken_recipe(tmp_path: Path, refused):
    path = tmp_path / "broken.yaml"
    path.write_text("model_name_or_path: m\nlora_scopes: [language\nlora_r: 4\n")
    assert f"The recipe {path} cannot be read" in refused(2, "train", path)
    assert "There is no recipe" in refused(2, "train", tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    "flags",
    [
        ("--torch_dtype", "fp16"),
        ("--torch_dtype", "float16"),
        ("--fp16",),
    ],
)
def test_fp16_with_gemma3(train, flags):
    said = train(2, *flags)
    assert "gemma3 cannot be used in float16" in said and "Use bfloat16" in said


def test_quantization_without_bitsandbytes(train, monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    said = train(1, "--use_4bit")
    assert "use_4bit needs the package bitsandbytes" in said and "pip install" in said


def test_an_adapter_of_another_model(run: Path, tiny_model, processor, flickr: Path, tmp_path: Path, refused):
    tiny_model.get_input_embeddings().weight.data.mul_(1.5)
    tiny_model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    said = refused(1, "predict", tmp_path / "other", flickr / "Images" / "red.jpg", "--adapter", run)
    assert f"The adapter {run} was trained on" in said and "Load it on the model it was trained on" in said


def test_an_output_directory_that_holds_another_run(recipe: Path, run: Path, refused):
    before = _files(run)
    said = refused(1, "train", recipe, "--output_dir", run)
    assert f"{run} already holds a finished run" in said and "Choose another output_dir" in said
    assert _files(run) == before


def test_resuming_where_there_is_no_checkpoint(train):
    assert "no finished checkpoint" in train(1, "--resume")


def test_a_typo_in_a_metric_is_found_before_anything_is_read(tmp_path: Path, refused):
    said = refused(
        2, "evaluate", "--model_name_or_path", "m", "--dataset_path", tmp_path / "nowhere",
        "--evaluation_dir", tmp_path / "e", "--metrics", "exact_mtach",
    )  # fmt: skip
    assert "no metric 'exact_mtach'" in said and "Did you mean 'exact_match'?" in said


def test_evaluation_into_a_used_folder(recipe: Path, run: Path, refused):
    before = _files(run)
    said = refused(1, "evaluate", recipe, "--evaluation_dir", run, "--metrics", "exact_match")
    assert str(run) in said and "Choose another evaluation_dir" in said
    assert _files(run) == before


def test_evaluation_of_a_model_that_is_no_run_needs_a_folder(recipe: Path, refused):
    assert "Set evaluation_dir" in refused(2, "evaluate", recipe, "--metrics", "exact_match")


def test_comparison_with_nothing(recipe: Path, tmp_path: Path, refused):
    said = refused(1, "evaluate", recipe, "--evaluation_dir", tmp_path / "e", "--compare_to", tmp_path / "nowhere")
    assert f"no predictions at {tmp_path / 'nowhere'}" in said and not (tmp_path / "e").exists()


def test_predict_names_every_image_that_cannot_be_used(run: Path, tmp_path: Path, flickr: Path, refused):
    (tmp_path / "broken.jpg").write_bytes((flickr / "Images" / "red.jpg").read_bytes()[:200])
    (tmp_path / "text.jpg").write_text("no image")
    said = refused(1, "predict", run, *(tmp_path / name for name in ("broken.jpg", "text.jpg", "gone.jpg")))
    assert all(name in said for name in ("broken.jpg", "text.jpg", "gone.jpg"))


@pytest.mark.parametrize("arguments", [(), ("model",), ("--prompt", "What?", "model", "a.jpg")])
def test_predict_without_model_or_image(arguments, refused):
    assert "vlmtune predict MODEL IMAGE" in refused(2, "predict", *arguments)


@pytest.mark.parametrize("arguments", [("--debug", "train"), ("train", "--debug")])
def test_debug_shows_the_traceback(arguments, capsys):
    assert vlmtune(*arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said and "error: 3 options cannot be used" in said


def test_an_interrupt_ends_quietly(monkeypatch: pytest.MonkeyPatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "env", interrupted)
    assert vlmtune("env") == 130
    assert "stopped" in capsys.readouterr().err
