"""Every family trains as it should through the trainer: batches accumulated, runs resumed, weights exported."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from families.builders import VARIANTS
from parity.conversations import forward
from safetensors import safe_open
from transformers import TrainerCallback, set_seed

from vlmtune.batching.collator import BaseVLMDataCollator
from vlmtune.config import TrainingArguments
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.models.checkpoint import save_model_and_processor
from vlmtune.models.families import FAMILIES
from vlmtune.models.loading import load_model_for_training, load_processor
from vlmtune.models.lora import prepare_full_finetuning, setup_lora
from vlmtune.models.merge import merge_weights
from vlmtune.training.trainer import create_trainer

SCOPES = ("language", "projector", "vision")
WORDS = "red green blue circle square triangle dog cat man woman left right above below two three".split()
# Words of each answer: an average of batches' averages is far from that over all tokens.
LENGTHS = (1, 24, 2, 13)
CHECKPOINTS = [*FAMILIES, *VARIANTS]
IN_MAKE_TEST = ("gemma3", "paligemma", "qwen2_5_vl", "qwen3_5")
MOST_ARE_SLOW = pytest.mark.parametrize(
    "folder",
    [name if name in IN_MAKE_TEST else pytest.param(name, marks=pytest.mark.slow) for name in CHECKPOINTS],
    indirect=True,
)


@pytest.fixture(params=CHECKPOINTS, scope="module")
def folder(request, family_dir) -> Path:
    return family_dir(request.param)


@pytest.fixture(scope="module")
def processor(folder):
    return load_processor(folder)


@pytest.fixture(scope="module")
def rows(image_folder) -> list[dict[str, Any]]:
    """Four samples with answers of unequal lengths."""
    made = []
    for number, length in enumerate(LENGTHS):
        answer = " ".join(random.Random(number).choices(WORDS, k=length))
        messages = (Message.make("user", "What is it?", images=1), Message.make("assistant", answer))
        made.append(Sample(str(number), (ImageRef(str(image_folder / f"{number}.jpg")),), messages).to_row())
    return made


def trainable(folder: Path, kind: str, seed: int = 0):
    """The model of a run; ``seed`` draws what a checkpoint must replace."""
    set_seed(seed)
    model = load_model_for_training(folder, torch_dtype="float32")
    if kind == "lora":
        model = setup_lora(model, lora_r=2, lora_scopes=["language", "vision"], lora_dropout=0.2)
    else:
        model = prepare_full_finetuning(model, SCOPES)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn_like(parameter)
    return model


def trainer_of(model, processor, rows, output_dir: Path, callbacks=(), **options: Any):
    fixed = {
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "save_strategy": "no",
        "dataloader_num_workers": 0,
    }
    return create_trainer(
        model=model,
        args=TrainingArguments(output_dir=str(output_dir), **(fixed | options)),
        train_dataset=rows,
        data_collator=BaseVLMDataCollator(processor, model),
        processor=processor,
        callbacks=list(callbacks),
    )


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Gradients(TrainerCallback):
    """Keeps the gradients that the optimizer is given."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def one_step(model, processor, rows, output_dir: Path, batch_size: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimizer step over all rows."""
    seen = Gradients()
    options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": len(rows) // batch_size}
    trainer = trainer_of(model, processor, rows, output_dir, [seen], max_steps=1, max_grad_norm=0, **options)
    trainer.train()
    return losses(trainer)[0], seen.found


@MOST_ARE_SLOW
def test_four_batches_of_one_equal_one_of_four(folder, processor, rows, tmp_path) -> None:
    """By the supervised tokens of the whole step, however it is cut (PITFALLS 24)."""
    whole, expected = one_step(trainable(folder, "full"), processor, rows, tmp_path / "1", batch_size=4)
    split, found = one_step(trainable(folder, "full"), processor, rows, tmp_path / "4", batch_size=1)
    assert split == pytest.approx(whole, rel=1e-5)
    assert expected.keys() == found.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (gradient - found[name]).norm() < 1e-4 * gradient.norm().clamp_min(1e-2 * largest), name
    # Were the batches' own averages averaged, it would show.
    collator, model = BaseVLMDataCollator(processor, trainable(folder, "full")), trainable(folder, "full")
    with torch.no_grad():
        alone = [float(model(**collator([row])).loss) for row in rows]
    assert abs(sum(alone) / len(alone) - whole) > 1e-4 * whole


@MOST_ARE_SLOW
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_resumed_equals_uninterrupted(kind, folder, processor, rows, tmp_path) -> None:
    """The weights, moments and random states of step 2 give steps 3 and 4 as they were (PITFALLS 3)."""
    options = {"per_device_train_batch_size": 2, "max_steps": 4}
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(trainable(folder, kind), processor, rows, tmp_path, **options, **saving)
    whole.train()
    again = trainer_of(trainable(folder, kind, seed=99), processor, rows, tmp_path, **options)
    fresh = weights(again.model)
    torch.rand(17)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4 and losses(again) == losses(whole)
    expected, found = weights(whole.model), weights(again.model)
    assert expected.keys() == found.keys() and expected
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert not all(torch.equal(tensor, fresh[name]) for name, tensor in expected.items())


def headers(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Number format and shape of every tensor in a folder's weight files."""
    found = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                part = opened.get_slice(name)
                found[name] = (part.get_dtype(), part.get_shape())
    return found


def configuration(folder: Path) -> dict[str, Any]:
    """Without what transformers notes of the weights as they were when saved."""
    noted = ("transformers_version", "dtype")
    return json.loads(
        (folder / "config.json").read_text(encoding="utf-8"),
        object_pairs_hook=lambda pairs: {key: value for key, value in pairs if key not in noted},
    )


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_is_exported_has_the_bases_layout(kind, folder, processor, rows, tmp_path) -> None:
    """The same tensors by name, shape and format, and the same configuration (PITFALLS 20)."""
    model = trainable(folder, kind).eval()
    save_model_and_processor(model, processor, tmp_path / kind)
    exported = tmp_path / kind
    if kind == "lora":
        exported = tmp_path / "merged"
        exported.mkdir()
        merge_weights(folder, tmp_path / kind, exported)
    assert headers(exported) == headers(folder)
    assert configuration(exported) == configuration(folder)
    again = load_model_for_training(exported, torch_dtype="float32").eval()
    batch = BaseVLMDataCollator(processor, again)(rows)
    torch.testing.assert_close(forward(again, batch), forward(model, batch), rtol=1e-3, atol=1e-4)
    base = load_model_for_training(folder, torch_dtype="float32").eval()
    assert not torch.allclose(forward(again, batch), forward(base, batch), atol=1e-3)
