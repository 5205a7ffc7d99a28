"""Shared fixtures: tiny random Gemma-3 checkpoints, made once a session, and small image sets."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
from chromium import Page, find_chromium


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-proofs", type=Path, help="write what is proved of each family to this file")


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("--write-proofs"):
        from proofs import Proofs

        config.pluginmanager.register(Proofs(file))


FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"

CORPUS = [
    "Describe this image. What color is the shape? Is there a red triangle in the image? What shape is present?",
    "user model yes no a an the image shows of and on left right above below one two three four many",
    "red green blue black gray teal brown yellow circle rectangle triangle square dog cat man woman child",
] * 20


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what is remembered between runs out of the user's cache folder."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def reference_files() -> Path:
    """The folder of published reference values; it lies beside the checkout where there is one."""
    if not FIXTURES.is_dir():
        pytest.skip(f"reference files are not at {FIXTURES}")
    return FIXTURES


@pytest.fixture(scope="session")
def tiny_gemma3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma-3 with processor on disk: 32-pixel images, 4 soft tokens, 4 text layers, window 16."""
    from vlmtune.demo.build import Sizes, build_model, build_processor, save

    sizes = Sizes(
        image_size=32,
        patch_size=8,
        tokens_per_image=4,
        vision_hidden=32,
        vision_layers=2,
        vision_heads=2,
        text_hidden=64,
        text_layers=4,
        text_heads=2,
        text_kv_heads=1,
        head_dim=32,
        text_mlp=128,
        sliding_window=16,
        layer_types=("sliding_attention", "full_attention", "sliding_attention", "full_attention"),
        vocab_size=512,
    )
    folder = tmp_path_factory.mktemp("tiny_gemma3")
    processor = build_processor(CORPUS, sizes)
    save(build_model(processor, sizes), processor, folder)
    return folder


@pytest.fixture(scope="session")
def processor(tiny_gemma3_dir: Path):
    """The tiny Gemma-3's processor; treat as read-only."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny_gemma3_dir)


@pytest.fixture
def tiny_model(tiny_gemma3_dir: Path):
    """A fresh float32 copy of the tiny Gemma-3, free to be changed."""
    import torch
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(tiny_gemma3_dir, dtype=torch.float32)


@pytest.fixture(scope="session")
def family_dir(tiny_gemma3_dir: Path, tmp_path_factory: pytest.TempPathFactory):
    """Return the folder of a family's tiny checkpoint, made on first use."""
    from families.builders import build

    made = {"gemma3": tiny_gemma3_dir}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"tiny_{name}")
            build(name, made[name], CORPUS)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve small, visibly different JPEG images, ``0.jpg`` to ``11.jpg``, of several sizes and shapes."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(12):
        height, width = int(rng.integers(24, 90)), int(rng.integers(24, 90))
        blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST).save(folder / f"{index}.jpg")
    return folder


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each image file was decoded for a batch."""
    from vlmtune.batching import encode

    found: Counter[str] = Counter()
    original = encode.decode

    def counted(image, **options):
        found[Path(image.path).name] += 1
        return original(image, **options)

    monkeypatch.setattr(encode, "decode", counted)
    return found


@pytest.fixture(scope="session")
def browser() -> Iterator[Page]:
    """A headless Chromium."""
    binary = find_chromium()
    if binary is None:
        pytest.skip("no Chromium here: none on the PATH, none of playwright's, CHROMIUM names none")
    page = Page(binary)
    yield page
    page.close()
