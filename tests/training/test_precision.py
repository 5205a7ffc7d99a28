"""Weights of 16 bits are trained in float32, and the finished model has the format in which it was loaded."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vlmtune.batching.collator import BaseVLMDataCollator
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.models.families import FAMILIES
from vlmtune.models.loading import load_model_for_inference, load_model_for_training, load_processor
from vlmtune.models.lora import prepare_full_finetuning, setup_lora
from vlmtune.models.precision import lowered, raise_trained, short_formats

HALF = torch.bfloat16
# Far smaller than the last bit of almost every weight.
TINY_STEPS = {"learning_rate": 1e-6, "lr_scheduler_type": "constant", "weight_decay": 0.0}
MIXED = {"bf16": True, **TINY_STEPS}


@pytest.fixture
def half(tiny_gemma3_dir: Path) -> Any:
    def make(**options: Any) -> Any:
        model = load_model_for_training(tiny_gemma3_dir, torch_dtype="bfloat16")
        return setup_lora(model, **options) if options.get("train_parts") else prepare_full_finetuning(model)

    return make


def _moved(after: dict[str, Tensor], before: dict[str, Tensor]) -> float:
    """The share of numbers that changed."""
    changed = sum(int((tensor.double() != before[name].double()).sum()) for name, tensor in after.items())
    return changed / sum(tensor.numel() for tensor in after.values())


def _trained(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_small_steps_are_not_lost(make_trainer, half) -> None:
    moved = {}
    for mixed in (True, False):
        trainer = make_trainer(model=half(), max_steps=2, **TINY_STEPS, bf16=mixed)
        before = _trained(trainer.model)
        trainer.train()
        # Words that no text has have no gradient.
        seen = {name: tensor for name, tensor in _trained(trainer.model).items() if "embed_tokens" not in name}
        moved[mixed] = _moved(seen, before)
        assert {tensor.dtype for tensor in seen.values()} == {torch.float32 if mixed else HALF}
        moments = [own["exp_avg"] for own in trainer.optimizer.state.values()]
        assert {tensor.dtype for tensor in moments} == {torch.float32 if mixed else HALF}
    assert moved[True] > 0.95
    # What this is about: without float32 most of them do not move.
    assert moved[False] < 0.1


def test_a_checkpoint_keeps_32_bits_and_the_finished_model_the_bits_it_had(make_trainer, half, tmp_path) -> None:
    trainer = make_trainer(model=half(), save_strategy="steps", save_steps=2, **MIXED)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    held = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    final = load_file(tmp_path / "final" / "model.safetensors")
    assert sorted(held) == sorted(final), "tied weights are written once"
    frozen = {name for name, tensor in held.items() if tensor.dtype == HALF}
    assert frozen and all("vision_tower" in name for name in frozen)
    assert all(torch.equal(final[name], tensor.to(HALF)) for name, tensor in held.items())
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    # The run itself goes on in 32.
    assert {tensor.dtype for tensor in _trained(trainer.model).values()} == {torch.float32}


def test_going_on_is_going_through(make_trainer, half, tmp_path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, **MIXED}
    whole = make_trainer(model=half(), **options)
    whole.train()
    rest = make_trainer(model=half(), **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    before, through, on = (_trained(one) for one in (half(), whole.model, rest.model))
    way = sum(float((tensor - before[name].float()).abs().sum()) for name, tensor in through.items())
    # On a CPU bfloat16 rounds by how memory lies, too.
    assert sum(float((tensor - on[name]).abs().sum()) for name, tensor in through.items()) < 0.02 * way


def test_a_part_in_full_beside_adapters(make_trainer, half, tmp_path) -> None:
    trainer = make_trainer(model=half(train_parts=["projector"], lora_r=2), max_steps=2, **MIXED)
    trainer.train()
    assert {tensor.dtype for tensor in _trained(trainer.model).values()} == {torch.float32}
    trainer.save_model(str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    loaded, _ = load_model_for_inference(tmp_path / "adapter", torch_dtype="bfloat16", device="cpu")
    places = [tensor for name, tensor in loaded.named_parameters() if "modules_to_save" in name]
    assert places and {tensor.dtype for tensor in places} == {HALF}


def test_without_mixed_precision_it_is_said(make_trainer, half, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(model=half(), max_steps=1, bf16=False)
    with caplog.at_level(logging.WARNING, "vlmtune.training"):
        trainer.train()
    said = [one.getMessage() for one in caplog.records if "last bit" in one.getMessage()]
    assert len(said) == 1 and "set bf16: true" in said[0]


def test_tied_weights_are_lowered_as_one() -> None:
    tied, own = torch.ones(3), torch.ones(2)
    found = lowered({"head": tied, "embedding": tied, "own": own}, {"embedding": HALF, "gone": HALF})
    assert found["head"] is found["embedding"] and found["head"].dtype == HALF
    assert found["own"] is own


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_with_parts_in_float32(name, family_dir, image_folder) -> None:
    family, folder = FAMILIES[name], family_dir(name)
    ref = ImageRef(path=str(image_folder / "1.jpg"))
    messages = (Message.make("user", "What color is the shape?", images=1), Message.make("assistant", "red"))
    batch = BaseVLMDataCollator(load_processor(folder), family)([Sample("a", (ref,), messages).to_row()])
    batch.pop("sample_ids", None)
    for part in family.lora_targets:
        model = prepare_full_finetuning(load_model_for_training(folder, torch_dtype="bfloat16"), parts=[part]).eval()
        formats = short_formats(model)
        losses = []
        for raised in (False, True):
            if raised:
                raise_trained(model)
            with torch.autocast("cpu", HALF):
                losses.append(model(**batch).loss)
            losses[-1].backward()
        assert formats and {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}, part
        # Frozen weights take no more memory than they did.
        frozen = [p for name, p in model.named_parameters() if not p.requires_grad and p.dim() > 1]
        assert {p.dtype for p in frozen} == {HALF}, part
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()), part
        assert float(losses[1]) == pytest.approx(float(losses[0]), rel=0.02), part
