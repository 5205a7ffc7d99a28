"""A step computes the dense loss over all its supervised tokens, whatever it is made of (PITFALLS 24)."""

from __future__ import annotations

import copy
import random
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from invariants.trainers import WORDS, losses, make_rows, make_trainer, plain_loss
from torch import nn
from transformers import AutoModelForImageTextToText, TrainerCallback, set_seed

from vlmtune.batching.collator import BaseVLMDataCollator, SharedImageCollator
from vlmtune.batching.sampler import ImageGroupSampler
from vlmtune.models.lora import setup_lora


@pytest.fixture(scope="session")
def float64_base(lively_dir: Path) -> nn.Module:
    """A model in float64 throughout, to be copied."""
    model = AutoModelForImageTextToText.from_pretrained(lively_dir, dtype=torch.float64)
    # The norms compute in float32 whatever the weights are, which limits agreement to 2e-7.
    for module in model.modules():
        if type(module).__name__ == "Gemma3RMSNorm":
            module.forward = types.MethodType(lambda self, x: self._norm(x) * (1.0 + self.weight), module)
    return model


class _Doubles:
    """Gives a float64 model its pixels in float64."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        return batch | {name: batch[name].double() for name in ("pixel_values",) if name in batch}


class SeparateDoubles(_Doubles, BaseVLMDataCollator):
    pass


class SharedDoubles(_Doubles, SharedImageCollator):
    pass


class FixedBatches(ImageGroupSampler):
    """Yields the batches it is given, in every epoch."""

    def __init__(self, batches: list[list[int]], total: int) -> None:
        super().__init__([""] * total, [1] * total, max(1, total // len(batches)))
        self.given = batches

    def __len__(self) -> int:
        return len(self.given)

    def step_batches(self):
        return ([[batch]] for batch in self.given)


class Gradients(TrainerCallback):
    """Keeps the gradients that each optimizer step is given."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def one_step(model, processor, rows, batches, collator_class, output_dir, **options):
    """Loss and gradients of one optimizer step over ``batches``."""
    seen = Gradients()
    trainer = make_trainer(
        model,
        processor,
        rows,
        output_dir,
        collator=collator_class(processor, "gemma3"),
        sampler=FixedBatches(batches, len(rows)),
        callbacks=[seen],
        max_steps=1,
        max_grad_norm=0,
        gradient_accumulation_steps=len(batches),
        **options,
    )
    trainer.train()
    return losses(trainer)[0], seen.steps[0]


def assert_equal(first, second, tolerance: float = 1e-10) -> None:
    # The trainer logs the loss from float32.
    assert first[0] == pytest.approx(second[0], rel=1e-6)
    assert first[1].keys() == second[1].keys()
    floor = 1e-6 * max(gradient.norm() for gradient in first[1].values())
    for name, gradient in first[1].items():
        difference = (gradient - second[1][name]).norm() / gradient.norm().clamp_min(floor)
        assert difference < tolerance, f"gradient of {name} differs by {difference:.1e}"


@pytest.fixture(scope="session")
def unequal_rows(image_folder: Path) -> list[dict[str, Any]]:
    """Four texts about two images, with answers of 1, 40, 2 and 17 words; the first two begin alike."""
    rows = make_rows(image_folder, 2, 2)
    for row, words in zip(rows, (1, 40, 2, 17), strict=True):
        row["messages"][0]["content"][1]["text"] = "What is it?"
        row["messages"][1]["content"][0]["text"] = " ".join(random.Random(words).choices(WORDS, k=words))
    rows[1]["messages"][1]["content"][0]["text"] = f"{rows[0]['messages'][1]['content'][0]['text']} and a cat" * 10
    return rows


@pytest.mark.parametrize("collator", [SeparateDoubles, SharedDoubles])
def test_four_batches_of_one_equal_one_of_four(collator, float64_base, processor, unequal_rows, tmp_path) -> None:
    one = one_step(copy.deepcopy(float64_base), processor, unequal_rows, [[0, 1, 2, 3]], collator, tmp_path / "1")
    four = one_step(
        copy.deepcopy(float64_base), processor, unequal_rows, [[0], [1], [2], [3]], collator, tmp_path / "4"
    )
    uneven = one_step(copy.deepcopy(float64_base), processor, unequal_rows, [[0, 2, 3], [1]], collator, tmp_path / "2")
    assert_equal(one, four)
    assert_equal(one, uneven)


def test_a_mean_of_means_would_be_noticed(float64_base, processor, unequal_rows) -> None:
    """The comparison above proves something only where averaging the batches' means gives another loss."""
    collate, model = SeparateDoubles(processor, "gemma3"), float64_base
    dense = [plain_loss(model, collate([row])) for row in unequal_rows]
    mean_of_means = sum(total / count for total, count in dense) / 4
    by_token = sum(total for total, _ in dense) / sum(count for _, count in dense)
    assert abs(mean_of_means - by_token) > 1e-3 * by_token


@pytest.mark.parametrize("collator", [SeparateDoubles, SharedDoubles])
@pytest.mark.parametrize("chunk", [0, 3])
def test_step_equals_dense_loss(collator, chunk, float64_base, processor, unequal_rows, tmp_path) -> None:
    dense = copy.deepcopy(float64_base)
    total, count = plain_loss(dense, SeparateDoubles(processor, "gemma3")(unequal_rows))
    (total / count).backward()
    expected = {name: p.grad for name, p in dense.named_parameters() if p.grad is not None}
    own = one_step(
        copy.deepcopy(float64_base),
        processor,
        unequal_rows,
        [[0, 1], [2, 3]],
        collator,
        tmp_path,
        loss_chunk_tokens=chunk,
    )
    assert_equal((float(total.detach() / count), expected), own)


def test_step_of_adapters_equals_dense_loss(float64_base, processor, unequal_rows, tmp_path) -> None:
    def adapted():
        set_seed(1)
        model = setup_lora(copy.deepcopy(float64_base), lora_scopes=["language", "vision"], lora_dropout=0.0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        # PEFT makes adapters in float32.
        return model.double()

    dense = adapted()
    total, count = plain_loss(dense, SeparateDoubles(processor, "gemma3")(unequal_rows))
    (total / count).backward()
    expected = {name: p.grad for name, p in dense.named_parameters() if p.requires_grad}
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    own = one_step(adapted(), processor, unequal_rows, [[0, 1], [2, 3]], SharedDoubles, tmp_path)
    assert_equal((float(total.detach() / count), expected), own)


def test_shared_rows_hold_targets_of_several_samples(processor, unequal_rows) -> None:
    """The comparisons of shared and separate rows prove something about weights only where some are above one."""
    batch = SharedImageCollator(processor, "gemma3")(unequal_rows)
    assert batch["target_weights"].max() == 2
    assert batch["target_weights"].sum() > len(batch["target_ids"])
