"""Rows and trainers that the comparisons of whole steps and runs share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmtune.batching.collator import SharedImageCollator
from vlmtune.batching.sampler import ImageGroupSampler
from vlmtune.config import TrainingArguments
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.training.trainer import MemoryEfficientTrainer, create_trainer

WORDS = "red green blue circle square triangle dog cat man woman left right above below two three".split()


def make_rows(folder: Path, images: int, texts: int, seed: int = 0, longest: int = 20) -> list[dict[str, Any]]:
    """Rows of texts about images, the answers' lengths very unequal, some with the same question and first word.

    Tokens that such answers begin with lie once in a shared row and count once for each of them.
    """
    rng, rows = random.Random(seed), []
    for image in range(images):
        for text in range(texts):
            answer = rng.choice(["a dog ", ""]) + " ".join(rng.choices(WORDS, k=rng.choice([1, 2, longest])))
            question = "What is it?" if image % 2 else " ".join(rng.choices(WORDS, k=3))
            messages = (Message.make("user", question, images=1), Message.make("assistant", answer))
            sample = Sample(f"{image}#{text}", (ImageRef(str(folder / f"{image}.jpg")),), messages)
            rows.append(sample.to_row() | {"image_key": f"k{image}"})
    return rows


def make_trainer(
    model, processor, rows, output_dir, *, collator=None, sampler=None, callbacks=(), eval_rows=None, **options
) -> MemoryEfficientTrainer:
    settings = {
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "warmup_steps": 0,
        "dataloader_num_workers": 0,
    }
    return create_trainer(
        model=model,
        args=TrainingArguments(output_dir=str(output_dir), **(settings | options)),
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=collator or SharedImageCollator(processor, "gemma3"),
        processor=processor,
        callbacks=list(callbacks),
        train_sampler=sampler,
    )


def losses(trainer) -> list[float]:
    """The loss of each step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def plain_loss(model, batch) -> tuple[Any, int]:
    """Sum of the dense cross entropy of transformers' own logits, and the number of targets."""
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "sample_ids")}
    logits = model(**inputs).logits
    total = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total, int((labels[:, 1:] != -100).sum())


def group_sampler(rows, batch_size: int = 2) -> ImageGroupSampler:
    return ImageGroupSampler([row["image_key"] for row in rows], [20 + i for i in range(len(rows))], batch_size, seed=3)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
