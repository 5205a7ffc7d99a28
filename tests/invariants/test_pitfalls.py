"""Memory stays flat and images matter (PITFALLS 8, 16, 17)."""

from __future__ import annotations

import gc
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from vlmtune.batching.collator import create_data_collator
from vlmtune.config import GenerationArguments, TrainingArguments
from vlmtune.data.loading import load_samples
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.evaluation.generation import AnswerGenerator
from vlmtune.evaluation.runner import evaluate
from vlmtune.models.lora import setup_lora
from vlmtune.training.trainer import create_trainer

MEBIBYTE = 2**20


def rss() -> float:
    return psutil.Process().memory_info().rss / MEBIBYTE


@pytest.fixture(scope="module")
def large_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty captioned images of 600 x 500 pixels: 0.9 MB each once decoded."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "Images").mkdir()
    rng = np.random.default_rng(0)
    lines = ["image,caption"]
    for number in range(40):
        blocks = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(blocks).resize((600, 500), Image.Resampling.NEAREST)
        picture.save(folder / "Images" / f"{number}.jpg")
        lines.append(f"{number}.jpg,a red circle number {number}")
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_a_shuffled_image_changes_the_loss(tiny_model, processor, large_images) -> None:
    rows = list(load_samples(large_images).dataset.select(range(4)))
    collator = create_data_collator(processor, model_type="gemma")
    batch = collator(rows)
    shuffled = batch | {"pixel_values": batch["pixel_values"].roll(1, 0)}
    with torch.no_grad():
        losses = [tiny_model(**inputs).loss.item() for inputs in (batch, batch, shuffled)]
    assert losses[0] == losses[1]
    assert abs(losses[0] - losses[2]) > 1e-5


def test_rows_hold_names_not_pixels(large_images) -> None:
    dataset = load_samples(large_images).dataset
    assert dataset.data.nbytes < 400 * len(dataset)


def test_memory_is_flat_over_ten_times_the_batches(processor, large_images) -> None:
    dataset = load_samples(large_images).dataset
    collator = create_data_collator(processor, model_type="gemma")

    def epochs(count: int) -> None:
        for _ in range(count):
            for start in range(0, 40, 8):
                collator([dataset[i] for i in range(start, start + 8)])

    epochs(1)
    before = rss()
    epochs(10)
    # Pixels that stayed would take 10 epochs of 40 images of 0.9 MB.
    assert rss() - before < 40


def test_memory_is_flat_over_evaluation(tiny_model, processor, large_images, tmp_path, monkeypatch) -> None:
    kept: list[object] = []
    data = load_samples(large_images).dataset
    args = TrainingArguments(output_dir=str(tmp_path), per_device_eval_batch_size=4, disable_tqdm=True)
    trainer = create_trainer(
        model=setup_lora(tiny_model, lora_r=2),
        args=args,
        eval_dataset=data,
        data_collator=create_data_collator(processor, model_type="gemma"),
    )
    step = trainer.prediction_step

    def watched(*arguments, **options):
        kept.append(step(*arguments, **options))
        return kept[-1]

    monkeypatch.setattr(trainer, "prediction_step", watched)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    assert len(kept) == 10
    # Only losses leave a step; logits that were gathered would grow with the data.
    assert all(logits is None and labels is None and loss.numel() == 1 for loss, logits, labels in kept)


def test_memory_is_flat_over_generated_answers(tiny_model, processor, large_images, tmp_path) -> None:
    options = GenerationArguments(max_new_tokens=2, eval_batch_size=4)
    generator = AnswerGenerator(tiny_model, processor, options)
    images = [ImageRef(str(large_images / "Images" / f"{number}.jpg")) for number in range(40)]

    def answered(questions: int) -> None:
        samples = [
            Sample(f"{i}-{q}", (image,), (Message.make("user", f"no {q}?", images=1),), ("red",))
            for q in range(questions)
            for i, image in enumerate(images)
        ]
        dataset = datasets.Dataset.from_list([sample.to_row() for sample in samples])
        evaluate(generator, dataset, ["exact_match"], tmp_path / str(questions), name="tiny")

    def tensors() -> int:
        gc.collect()
        return sum(one.nbytes for one in gc.get_objects() if isinstance(one, torch.Tensor))

    answered(1)
    before, alive = rss(), tensors()
    answered(6)
    # Images of 200 more samples would take 170 MiB; inputs, logits or caches of the tiny model show by their tensors.
    assert rss() - before < 40
    assert tensors() - alive < 2**16
