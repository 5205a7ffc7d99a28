"""Memory of families whose soft tokens depend on an image's size: estimated as PyTorch's CPU allocator hands it out."""

from __future__ import annotations

import gc
import io
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from models.test_memory import KINDS, WITHIN, peak_bytes
from PIL import Image

from vlmtune.batching.collator import SharedImageCollator
from vlmtune.cli.estimate import estimate
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.errors import ConfigError, ModelError
from vlmtune.models import memory_report
from vlmtune.models.families import get_family
from vlmtune.models.loading import load_model_for_training, load_processor
from vlmtune.models.memory import MemoryEstimator, Settings
from vlmtune.models.memory_images import largest_size, soft_tokens
from vlmtune.models.memory_report import changes, format_changes
from vlmtune.models.memory_trace import Batch
from vlmtune.training.loss import chunked_cross_entropy, count_targets, install_supervised_loss
from vlmtune.training.shared_rows import shared_row_inputs

SIZES = {"qwen2_vl": (40, 60), "mistral3": (64, 48)}
FAMILIES = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_next", "llava_onevision", "idefics3", "smolvlm"),
    *("mistral3", "granite_docling", "qwen3_5"),
)
IN_MAKE_TEST = ("qwen3_vl", "llava_next", "idefics3", "mistral3")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _sample(number: int, size: tuple[int, int]) -> Sample:
    noise = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    messages = (Message.make("user", "What color is the shape?", images=1), Message.make("assistant", "a red circle"))
    return Sample(str(number), (ImageRef(bytes=file.getvalue()),), messages)


@pytest.mark.parametrize(("kind", "checkpointing"), [("lora everywhere", False), ("everything in full", True)])
@pytest.mark.parametrize(
    "name", [name if name in IN_MAKE_TEST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_against_the_allocator(name, kind, checkpointing, family_dir) -> None:
    folder, size = family_dir(name), SIZES.get(name, (48, 72))
    model = KINDS[kind](load_model_for_training(folder, torch_dtype="float32"))
    processor, family = load_processor(folder), get_family(model)
    collator = SharedImageCollator(processor, family, conversation_formatter=lambda row: row["sample"])
    batch = collator([{"sample": _sample(number, size)} for number in range(4)])
    batch.pop("sample_ids")
    samples, length = batch["input_ids"].shape
    image_tokens = soft_tokens(processor, family, size)
    form = Batch(samples, length - image_tokens, count_targets(batch) // samples, size=size)
    estimator = MemoryEstimator(folder, chunked_cross_entropy, KINDS[kind], "float32", None, "cpu")
    found = estimator.estimate(Settings(form, checkpointing=checkpointing))
    assert found.image_tokens == image_tokens

    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    install_supervised_loss(model)
    model.train()
    made = shared_row_inputs(family, model, batch)

    def step() -> None:
        model(**(batch | made)).loss.backward()
        model.zero_grad(set_to_none=True)

    step()
    gc.collect()
    beside = peak_bytes(step)
    # Pixels and masks lay there before.
    given = {id(t): t for t in (*batch.values(), *_flat(made)) if isinstance(t, torch.Tensor)}
    beside += sum(t.numel() * t.element_size() for t in given.values())
    estimated = found.total - found.kinds["weights"] - found.kinds["optimizer states"]
    print(f"{name}, {kind}, {checkpointing=}: {estimated / 2**20:.2f} of {beside / 2**20:.2f} MiB")
    assert abs(estimated / beside - 1) < WITHIN


def _flat(made):
    for value in made.values():
        yield from value.values() if isinstance(value, dict) else [value]


def test_largest_size(family_dir) -> None:
    """No size has more tokens than the one that is taken for the worst."""
    for name in ("qwen2_vl", "idefics3"):
        processor, family = load_processor(family_dir(name)), get_family(name)
        most = soft_tokens(processor, family, largest_size(processor, family))
        sizes = [(20, 30), (64, 64), (500, 120), (900, 2500), (3000, 700), (3000, 900)]
        some = [soft_tokens(processor, family, size) for size in sizes]
        assert max(some) == most > min(some)


def test_command(family_dir, tmp_path, capsys) -> None:
    folder = str(family_dir("qwen3_vl"))
    assert estimate(["--model_name_or_path", folder]) == 0
    text = capsys.readouterr().out
    assert "18 tokens a sample, of which its processor makes the most tokens" in text and "141 GB  fits" in text
    assert estimate(["--model_name_or_path", folder, "--image_size", "24x16"]) == 0
    text = capsys.readouterr().out
    assert "images of 24 x 16 pixels, 6 tokens a sample\n" in text and "samples of 70 tokens" in text
    with pytest.raises(ConfigError, match="such as 1024x768, and is '24 16'"):
        estimate(["--model_name_or_path", folder, "--image_size", "24 16"])
    with pytest.raises(ModelError, match="qwen3_vl takes no image of 1 x 4000 pixels"):
        estimate(["--model_name_or_path", folder, "--image_size", "1x4000"])


def test_a_family_that_is_not_estimated(family_dir) -> None:
    with pytest.raises(ModelError, match="memory of gemma4 cannot be estimated: its language layers differ"):
        estimate(["--model_name_or_path", str(family_dir("gemma4_large"))])


@pytest.mark.parametrize(("name", "size"), [("qwen3_vl", None), ("idefics3", None), ("idefics3", (400, 100))])
def test_fewer_pixels_where_nothing_else_is_enough(name, size, family_dir, monkeypatch) -> None:
    """What the estimate names fits when it is applied, and no larger limit of those that are tried does."""
    monkeypatch.setattr(memory_report, "GB", 10**6)
    folder = family_dir(name)

    def settings(estimator, **options):
        form = size or largest_size(estimator.processor, estimator.family)
        return Settings(Batch(2, size=form), largest_images=size is None, **options)

    def estimator(pixels=None):
        kind = KINDS["everything in full"]
        return MemoryEstimator(folder, chunked_cross_entropy, kind, "float32", None, "cpu", image_max_pixels=pixels)

    def least(pixels):
        limited = estimator(pixels)
        few = settings(limited, accumulation=2, checkpointing=True)
        return limited.estimate(replace(few, batch=replace(few.batch, samples=1))).total / 10**6

    plain = estimator()
    allowed = least(2**10)
    found = changes(plain, settings(plain), (allowed + 1e-4) / 0.95)
    *_, last, pixels = found[0].options.replace(": ", ", ").split(", ")
    assert last == "image_max_pixels"
    limit = int(pixels)
    assert least(limit) == pytest.approx(found[0].total / 10**6) and least(limit) <= allowed + 1e-4 < least(2 * limit)
    assert "image_max_pixels" not in str(changes(plain, settings(plain), (least(None) + 1e-4) / 0.95))
    assert re.search(r"checkpointing and image_max_pixels: (1024|2048)\.", format_changes(plain, settings(plain), 1e-3))


def test_the_command_with_fewer_pixels(family_dir, capsys) -> None:
    folder = str(family_dir("qwen3_vl"))
    assert estimate(["--model_name_or_path", folder, "--image_max_pixels", "600"]) == 0
    assert re.search(r"\b9 tokens a sample, of which", capsys.readouterr().out)
    with pytest.raises(ConfigError, match="image_max_pixels 600 cannot be used with gemma3: it sees every image"):
        estimate(["--model_name_or_path", str(family_dir("gemma3")), "--image_max_pixels", "600"])


@pytest.mark.parametrize("limits", [0, 1, 2, 14])
def test_the_first_limit_that_fits_takes_few_looks(limits) -> None:
    for first in range(limits + 1):
        asked = set()

        def fits(limit: int, first: int = first, asked: set[int] = asked) -> bool:
            asked.add(limit)
            return limit >= first

        assert memory_report._first(range(limits), fits) == first
        assert len(asked) <= min(limits, 3 + 2 * first)
