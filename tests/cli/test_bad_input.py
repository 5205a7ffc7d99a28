"""Every bad input is refused by name, and nothing is overwritten."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command_line import vlmtune


@pytest.mark.parametrize("command", ["train", "preview", "check", "estimate", "evaluate"])
def test_a_model_of_another_family_than_named(command, recipe, tmp_path, capsys) -> None:
    folder = {"train": "--output_dir", "evaluate": "--evaluation_dir"}.get(command)
    more = (folder, tmp_path / "out") if folder else ()
    assert vlmtune(command, recipe, "--model_type", "llava", *more) == 2
    assert "model_type is llava, but the model is of the family gemma3" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


def _files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(f): (f.read_bytes(), f.stat().st_mtime_ns) for f in sorted(folder.rglob("*")) if f.is_file()}


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
    assert f"{tmp_path} is a folder, and a recipe is a YAML file" in refused(2, "evaluate", tmp_path)
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
