"""A resumed run is the uninterrupted one, and the best checkpoint is the one that is loaded (PITFALLS 3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from invariants.trainers import group_sampler, losses, make_rows, make_trainer, plain_loss, weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, set_seed

from vlmtune.batching.collator import BaseVLMDataCollator
from vlmtune.errors import AdapterError, ResumeError
from vlmtune.models.loading import load_model_for_training
from vlmtune.models.lora import prepare_full_finetuning, setup_lora
from vlmtune.training.trainer import MemoryEfficientTrainer


class At(TrainerCallback):
    """Does something at the end or the beginning of one step."""

    def __init__(self, step: int, action, *, begin: bool = False) -> None:
        self.step, self.action, self.begin = step, action, begin

    def on_step_begin(self, args, state, control, **kwargs):
        if self.begin and state.global_step + 1 == self.step:
            self.action(control=control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if not self.begin and state.global_step == self.step:
            self.action(control=control, **kwargs)


def stop(control, **_: Any) -> None:
    control.should_training_stop = True


def fresh_model(folder: Path, kind: str, seed: int) -> nn.Module:
    """The model of a run, with dropout; ``seed`` draws what the checkpoint must replace."""
    set_seed(seed)
    model = load_model_for_training(folder, torch_dtype="float32")
    if kind == "lora":
        return setup_lora(model, lora_r=4, lora_dropout=0.2)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    model = prepare_full_finetuning(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn_like(parameter)
    return model


def assert_same_weights(first, second, what: str = "") -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


# (kind, gradient accumulation, step of the checkpoint): an epoch has 7 batches, so that the ten steps after the
# checkpoint cross an epoch's end; step 7 is an epoch's end itself.
RESUMED = [("lora", 1, 10), ("full", 1, 10), ("lora", 1, 7)]


@pytest.mark.parametrize(("kind", "accumulate", "at"), RESUMED)
def test_resumed_equals_uninterrupted(kind, accumulate, at, lively_dir, processor, image_folder, tmp_path) -> None:
    rows = make_rows(image_folder, 7, 2, longest=10)
    assert len(group_sampler(rows)) == 7
    options = {"max_steps": 20, "gradient_accumulation_steps": accumulate, "save_strategy": "steps", "save_steps": at}

    def trainer(output_dir: Path, seed: int, **more: Any) -> MemoryEfficientTrainer:
        model = fresh_model(lively_dir, kind, seed)
        sampler = group_sampler(rows)
        return make_trainer(model, processor, rows, output_dir, sampler=sampler, **(options | more))

    whole = trainer(tmp_path / "whole", 0, save_strategy="no")
    whole.train()
    first = trainer(tmp_path / "parts", 0, callbacks=[At(at, stop)])
    first.train()
    assert first.state.global_step == at
    assert losses(first) == losses(whole)[:at]

    second = trainer(tmp_path / "parts", 99, save_strategy="no")
    torch.rand(17)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{at}"))
    assert second.state.global_step == 20
    assert losses(second) == pytest.approx(losses(whole), rel=1e-6)
    assert_same_weights(weights(whole.model), weights(second.model))
    assert_same_optimizer(whole.optimizer.state_dict(), second.optimizer.state_dict())
    assert whole.lr_scheduler.state_dict() == second.lr_scheduler.state_dict()


def assert_same_optimizer(first, second) -> None:
    assert first["state"].keys() == second["state"].keys()
    assert len(first["state"]) > 0
    for index, state in first["state"].items():
        for name, tensor in state.items():
            torch.testing.assert_close(second["state"][index][name], tensor, rtol=0, atol=0)
    assert first["param_groups"] == second["param_groups"]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_dropout_is_on_in_these_runs(kind, lively_dir, processor, image_folder) -> None:
    """Resuming proves nothing about the random state where nothing is random."""
    model = fresh_model(lively_dir, kind, 0).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    batch = BaseVLMDataCollator(processor, "gemma3")(make_rows(image_folder, 1, 2))
    with torch.no_grad():
        assert plain_loss(model, batch)[0] != plain_loss(model, batch)[0]


def test_resumed_in_the_base_order(lively_dir, processor, image_folder, tmp_path) -> None:
    """The base class's own order resumes as well, with separate rows and accumulated batches."""
    rows = make_rows(image_folder, 5, 2, longest=10)

    # 5 batches of 2 an epoch, the last update of an epoch with one batch: step 4 stands within the second epoch.
    options = {"max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}

    def trainer(name: str, seed: int, **more: Any) -> MemoryEfficientTrainer:
        collator = BaseVLMDataCollator(processor, "gemma3")
        model = fresh_model(lively_dir, "lora", seed)
        return make_trainer(model, processor, rows, tmp_path / name, collator=collator, **(options | more))

    whole = trainer("whole", 0)
    whole.train()
    first = trainer("parts", 0, save_strategy="steps", save_steps=4, callbacks=[At(4, stop)])
    first.train()
    second = trainer("parts", 5)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert losses(second) == pytest.approx(losses(whole), rel=1e-6)


def spoil(model, **_: Any) -> None:
    """Make the trained weights worse, so that an earlier checkpoint is the best."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))


def best_trainer(kind, lively_dir, processor, image_folder, output_dir, *callbacks) -> MemoryEfficientTrainer:
    rows = make_rows(image_folder, 2, 2, longest=5)
    return make_trainer(
        fresh_model(lively_dir, kind, 0),
        processor,
        rows,
        output_dir,
        eval_rows=rows,
        callbacks=callbacks,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_best_model_is_loaded_at_the_end(kind, lively_dir, processor, image_folder, tmp_path) -> None:
    at_two: dict[str, torch.Tensor] = {}
    keep = At(2, lambda model, **_: at_two.update(weights(model)))
    worse = At(4, spoil)
    trainer = best_trainer(kind, lively_dir, processor, image_folder, tmp_path, keep, worse)
    trainer.train()
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluations[1] > evaluations[0]
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    assert_same_weights(at_two, weights(trainer.model))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluations[0], rel=1e-6)


@pytest.mark.parametrize(("kind", "error"), [("lora", AdapterError), ("full", ResumeError)])
def test_best_model_without_a_tensor_is_an_error(kind, error, lively_dir, processor, image_folder, tmp_path) -> None:
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"

    def damage(model, **_: Any) -> None:
        spoil(model)
        file = tmp_path / "checkpoint-2" / name
        tensors = load_file(file)
        tensors.pop(next(key for key in tensors if "layers.0.mlp" in key and "vision" not in key))
        save_file(tensors, file, metadata={"format": "pt"})

    trainer = best_trainer(kind, lively_dir, processor, image_folder, tmp_path, At(4, damage))
    with pytest.raises(error, match="missing"):
        trainer.train()
