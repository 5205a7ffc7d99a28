"""A small data set, a recipe, and one training run for the tests of commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import vlmtune
from PIL import Image

COLORS = ("red", "green", "blue", "teal")


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def run(recipe: Path) -> Path:
    """The folder of one training run; treat as read-only."""
    folder = recipe.parent / "run"
    assert vlmtune("train", recipe, "--output_dir", folder, "--num_train_epochs=1") == 0
    return folder


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """Run a command that must fail with this code; return what it says: one paragraph, no traceback."""

    def check(code: int, *arguments: object) -> str:
        capsys.readouterr()
        assert vlmtune(*arguments) == code
        said = capsys.readouterr()
        error = said.err[said.err.index("error: ") :]
        assert said.out == "" and "Traceback" not in said.err
        assert "\n\n" not in error and len(error) < 2200
        return error

    return check
