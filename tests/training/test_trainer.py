"""The trainer stops on what is not finite, saves and loads whole checkpoints, and reports what it did."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoProcessor, TrainerCallback

from vlmtune.batching.collator import BaseVLMDataCollator, SharedImageCollator, create_data_collator
from vlmtune.batching.sampler import ImageGroupSampler
from vlmtune.config import TrainingArguments
from vlmtune.errors import NonFiniteError, ResumeError, TrainingError
from vlmtune.training import throughput as throughput_module
from vlmtune.training import trainer as trainer_module
from vlmtune.training.checkpoints import latest_checkpoint, seal
from vlmtune.training.trainer import create_trainer


class Before(TrainerCallback):
    """Does something before one step, and keeps the weights as they then are."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action = step, action
        self.weights: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.action(model)
            self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    def assert_unchanged(self, model) -> None:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, self.weights[name], rtol=0, atol=0, equal_nan=True)


def some_parameter(model) -> nn.Parameter:
    return next(p for p in model.parameters() if p.requires_grad)


def plant_in_weights(model) -> None:
    with torch.no_grad():
        some_parameter(model).view(-1)[0] = torch.nan


def plant_in_gradient(model) -> None:
    some_parameter(model).register_hook(lambda gradient: gradient * torch.nan)


class Recorded(SharedImageCollator):
    """Keeps the ids of every batch it made."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ids: list[list[str]] = []

    def __call__(self, rows):
        batch = super().__call__(rows)
        self.ids.append(batch["sample_ids"])
        return batch


# -- what is not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "action", "what", "max_grad_norm"),
    [
        ("lora", plant_in_weights, "loss", 1.0),
        ("full", plant_in_weights, "loss", 0.0),
        ("lora", plant_in_gradient, "gradient norm", 0.0),
        ("full", plant_in_gradient, "gradient norm", 1.0),
    ],
)
def test_a_planted_nan_stops_the_run(kind, action, what, max_grad_norm, make_trainer, processor, tmp_path) -> None:
    planted, collator = Before(3, action), Recorded(processor, "gemma3")
    trainer = make_trainer(
        kind,
        callbacks=[planted],
        data_collator=collator,
        max_grad_norm=max_grad_norm,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
    )
    with pytest.raises(NonFiniteError, match=rf"The {what} became nan in step 3, with the samples") as caught:
        trainer.train()
    assert len(collator.ids[2]) == 2
    assert all(repr(name) in str(caught.value) for name in collator.ids[2])
    assert f"{tmp_path / 'run' / 'checkpoint-2'}." in str(caught.value)
    planted.assert_unchanged(trainer.model)
    assert [folder.name for folder in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]

    again = make_trainer(kind)
    again.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")
    assert again.state.global_step == 4
    assert all(bool(p.isfinite().all()) for p in again.model.parameters())


def test_a_nan_before_any_checkpoint(make_trainer) -> None:
    with pytest.raises(NonFiniteError, match=r"step 1, .*No checkpoint had been written yet"):
        make_trainer(callbacks=[Before(1, plant_in_weights)]).train()


def test_an_infinite_loss_stops_too(make_trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    forward = trainer.model.forward
    monkeypatch.setattr(trainer.model, "forward", lambda **inputs: {"loss": forward(**inputs)["loss"] * torch.inf})
    with pytest.raises(NonFiniteError, match="The loss became inf"):
        trainer.train()


def test_the_one_bad_sample_is_named(make_trainer, processor) -> None:
    class OneBad(BaseVLMDataCollator):
        def __call__(self, rows):
            batch = super().__call__(rows)
            if "1#2" in batch["sample_ids"]:
                batch["pixel_values"] = batch["pixel_values"] * torch.nan
            return batch

    trainer = make_trainer(
        data_collator=OneBad(processor, "gemma3"), per_device_train_batch_size=1, gradient_accumulation_steps=5
    )
    with pytest.raises(NonFiniteError, match=r"with the samples '1#2'\."):
        trainer.train()


def test_many_samples_are_counted(make_trainer) -> None:
    trainer = make_trainer(callbacks=[Before(1, plant_in_gradient)], per_device_train_batch_size=10)
    with pytest.raises(NonFiniteError, match="and 2 more"):
        trainer.train()


def test_a_nan_in_evaluation_stops(make_trainer, rows) -> None:
    trainer = make_trainer(eval_dataset=rows)
    plant_in_weights(trainer.model)
    with pytest.raises(NonFiniteError, match="loss became nan"):
        trainer.evaluate()


# -- checkpoints ------------------------------------------------------------------------------------------

OWN_FILES = {"trainer_state.json", "training_args.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_every_checkpoint_is_whole(kind, make_trainer, processor, rows, tmp_path: Path) -> None:
    trainer = make_trainer(kind, max_steps=2, save_strategy="steps", save_steps=1, hub_token="hf_planted_secret")
    trainer.train()
    expected = create_data_collator(processor, "gemma3")(rows)
    for step in (1, 2):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        names = {path.name for path in folder.iterdir()}
        assert names >= OWN_FILES | {"chat_template.jinja", "tokenizer.json", "processor_config.json"}
        assert ("adapter_model.safetensors" in names) == (kind == "lora")
        assert ("model.safetensors" in names) == (kind == "full")
        # What is pickled is the base class's and holds tensors and numbers; arguments are JSON.
        assert {path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")} == {
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
        }
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(folder / name, weights_only=True)
        arguments = (folder / "training_args.json").read_text()
        assert json.loads(arguments)["max_steps"] == 2
        assert "hf_planted_secret" not in arguments
        own = create_data_collator(AutoProcessor.from_pretrained(folder), "gemma3")(rows)
        assert expected.keys() == own.keys()
        assert all(torch.equal(expected[name], own[name]) for name in expected)


def test_save_model_writes_the_processor(make_trainer, tmp_path: Path) -> None:
    make_trainer().save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "chat_template.jinja").exists()
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "saved" / "training_args.bin").exists()


@pytest.fixture(scope="module")
def checkpoints(tiny_gemma3_dir, processor, rows, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of one step of an adapter and one of full weights; treat as read-only."""
    from vlmtune.models.loading import load_model_for_training
    from vlmtune.models.lora import prepare_full_finetuning, setup_lora

    found = {}
    for kind in ("lora", "full"):
        model = load_model_for_training(tiny_gemma3_dir, torch_dtype="float32")
        folder = tmp_path_factory.mktemp(kind)
        create_trainer(
            model=setup_lora(model, lora_r=4) if kind == "lora" else prepare_full_finetuning(model),
            args=TrainingArguments(
                output_dir=str(folder), use_cpu=True, disable_tqdm=True, max_steps=1, save_steps=1, logging_steps=1
            ),
            train_dataset=rows,
            data_collator=SharedImageCollator(processor, "gemma3"),
        ).train()
        found[kind] = folder / "checkpoint-1"
    return found


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_resuming_from_the_other_kind_is_refused(kind, make_trainer, checkpoints) -> None:
    other, holds, trains = (
        ("full", "full weights", "an adapter") if kind == "lora" else ("lora", "an adapter", "full weights")
    )
    with pytest.raises(ResumeError, match=f"holds {holds}, but this run trains {trains}"):
        make_trainer(kind).train(resume_from_checkpoint=str(checkpoints[other]))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_resuming_from_no_checkpoint_is_refused(kind, make_trainer, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nothing", tmp_path / "empty"):
        trainer = make_trainer(kind)
        with pytest.raises(ResumeError, match=str(folder)):
            trainer.train(resume_from_checkpoint=str(folder))
        assert trainer.state.global_step == 0


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("absent", ["trainer_state.json", "optimizer.pt", "scheduler.pt"])
def test_resuming_from_half_a_checkpoint_is_refused(kind, absent, make_trainer, checkpoints, tmp_path: Path) -> None:
    """The base class would go on with a new optimizer and say nothing."""
    shutil.copytree(checkpoints[kind], tmp_path / "copy")
    (tmp_path / "copy" / absent).unlink()
    with pytest.raises(ResumeError, match=absent):
        make_trainer(kind).train(resume_from_checkpoint=str(tmp_path / "copy"))


def test_resume_true_takes_the_last_finished_checkpoint(make_trainer, checkpoints, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ResumeError, match="no finished checkpoint"):
        make_trainer().train(resume_from_checkpoint=True)
    shutil.copytree(checkpoints["lora"], run / "checkpoint-1")
    (run / "checkpoint-3").mkdir()
    trainer = make_trainer(max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]


def test_latest_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best"):
        (tmp_path / name).mkdir()
        seal(tmp_path / name)
    (tmp_path / "checkpoint-11").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_no_best_checkpoint(make_trainer) -> None:
    with pytest.raises(TrainingError, match="no best checkpoint"):
        make_trainer()._load_best_model()


# -- evaluation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collator", [SharedImageCollator, BaseVLMDataCollator])
@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_evaluation_is_the_mean_over_tokens(collator, batch_size, make_trainer, fresh_model, processor, rows) -> None:
    model = fresh_model()
    total, count = 0.0, 0
    means = []
    with torch.no_grad():
        for row in rows:
            batch = create_data_collator(processor, "gemma3")([row])
            labels = batch.pop("labels")[:, 1:]
            logits = model.eval()(**batch).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            supervised = int((labels != -100).sum())
            total, count = total + loss, count + supervised
            means.append(loss / supervised)
    by_hand = total / count
    assert abs(by_hand - sum(means) / len(means)) > 1e-4 * by_hand
    trainer = make_trainer(
        model=model,
        eval_dataset=rows,
        data_collator=collator(processor, "gemma3"),
        per_device_eval_batch_size=batch_size,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(by_hand, rel=1e-5)
    assert trainer.evaluate(metric_key_prefix="test")["test_loss"] == pytest.approx(by_hand, rel=1e-5)


def test_no_logits_leave_the_step(make_trainer, processor, rows, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(eval_dataset=rows)
    batch = SharedImageCollator(processor, "gemma3")(rows)
    loss, logits, labels = trainer.prediction_step(trainer.model, batch, prediction_loss_only=False)
    assert loss.shape == () and not loss.requires_grad
    assert logits is None and labels is None
    largest = []
    forward = trainer.model.get_output_embeddings().forward
    monkeypatch.setattr(
        trainer.model.get_output_embeddings(), "forward", lambda hidden: largest.append(hidden.shape) or forward(hidden)
    )
    output = trainer.predict(rows)
    assert output.predictions is None and output.label_ids is None
    # The head's own forward, which would make logits of every position, is never called.
    assert largest == []


# -- what is logged ---------------------------------------------------------------------------------------


class Clock:
    """A clock that only work moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_speed_counts_samples_and_waiting(make_trainer, processor, rows, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    for module in (trainer_module, throughput_module):
        monkeypatch.setattr(module, "time", clock)

    class Slow(SharedImageCollator):
        def __call__(self, rows):
            clock.now += 1
            return super().__call__(rows)

    keys = [row["image_key"] for row in rows]
    trainer = make_trainer(
        data_collator=Slow(processor, "gemma3"),
        train_sampler=ImageGroupSampler(keys, [20] * 10, 5),
        per_device_train_batch_size=5,
        max_steps=4,
    )
    step = trainer.training_step

    def slow_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        clock.now += 3
        return step(*args, **kwargs)

    monkeypatch.setattr(trainer, "training_step", slow_step)
    clock.now += 1000
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    # Both batches of an epoch are loaded before its first step: accelerate looks one batch ahead.
    assert [entry["data_wait_share"] for entry in logs] == [0.4, 0.0, 0.4, 0.0]
    assert [entry["samples_per_second"] for entry in logs] == pytest.approx([5 / 5, 5 / 3] * 2, abs=1e-3)
    assert [entry["images_per_second"] for entry in logs] == pytest.approx([1 / 5, 1 / 3] * 2, abs=1e-3)
    supervised = sum(
        int((labels[:, 1:] != -100).sum())
        for labels in [create_data_collator(processor, "gemma3")([row])["labels"] for row in rows]
    )
    seconds = [5, 3, 5, 3]
    logged = sum(e["supervised_tokens_per_second"] * s for e, s in zip(logs, seconds, strict=True))
    assert logged == pytest.approx(2 * supervised, abs=1)
    assert trainer.work.supervised_tokens == 2 * supervised
    assert (trainer.work.samples, trainer.work.images) == (20, 4)

    # Time between two runs of one trainer is no time of the second.
    clock.now += 1000
    trainer.train()
    assert next(e for e in trainer.state.log_history if "loss" in e)["samples_per_second"] == 1.0


def test_every_epoch_has_an_order_of_its_own(make_trainer, processor, rows) -> None:
    collator = Recorded(processor, "gemma3")
    keys = [f"{row['image_key']}{index // 2}" for index, row in enumerate(rows)]
    sampler = ImageGroupSampler(keys, [20] * 10, 2)
    make_trainer(data_collator=collator, train_sampler=sampler, max_steps=15).train()
    assert len(sampler) == 5
    epochs = [[name for batch in collator.ids[start : start + 5] for name in batch] for start in (0, 5, 10)]
    assert all(sorted(epoch) == sorted(row["id"] for row in rows) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2] and epochs[0] != epochs[2]


def test_separate_rows_count_the_same(make_trainer, processor, rows) -> None:
    trainer = make_trainer(data_collator=BaseVLMDataCollator(processor, "gemma3"), max_steps=5)
    trainer.train()
    assert (trainer.work.samples, trainer.work.images) == (10, 10)


# -- making a trainer -------------------------------------------------------------------------------------


def test_nothing_trainable(tiny_model, processor, tmp_path: Path) -> None:
    tiny_model.requires_grad_(False)
    with pytest.raises(TrainingError, match="Nothing in the model is trainable"):
        create_trainer(
            model=tiny_model,
            args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True),
            data_collator=SharedImageCollator(processor, "gemma3"),
        )


def test_no_processor(tiny_model, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="needs the processor"):
        create_trainer(
            model=tiny_model,
            args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True),
            data_collator=lambda rows: rows,
        )


def test_processor_comes_from_the_collator(tiny_model, processor, tmp_path: Path) -> None:
    collator = create_data_collator(processor, "gemma3")
    trainer = create_trainer(
        model=tiny_model, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True), data_collator=collator
    )
    assert trainer.processing_class is processor
    assert collator.return_sample_ids
    assert not trainer.args.remove_unused_columns
    assert not trainer.args.logging_nan_inf_filter


def test_any_collator_with_labels_works(make_trainer, processor, rows) -> None:
    """Another's collator names no samples."""
    inner = create_data_collator(processor, "gemma3")
    trainer = make_trainer(data_collator=lambda batch: inner(batch), max_steps=5)
    trainer.train()
    assert trainer.work.samples == 10
    broken = make_trainer(data_collator=lambda batch: inner(batch), callbacks=[Before(1, plant_in_weights)])
    with pytest.raises(NonFiniteError, match=r"in step 1\. The weights"):
        broken.train()


def test_only_what_should_be_trained_changes(make_trainer) -> None:
    trainer = make_trainer()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_float16_leaves_overflow_to_the_scaler(make_trainer) -> None:
    trainer = make_trainer()
    trainer.accelerator.scaler = SimpleNamespace()
    assert trainer._finite_norm(torch.tensor(torch.inf)) == torch.inf


def test_several_workers_give_the_same_batches(make_trainer) -> None:
    started = time.perf_counter()
    losses = []
    for workers in (0, 1):
        torch.manual_seed(0)
        trainer = make_trainer(max_steps=2, dataloader_num_workers=workers)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert time.perf_counter() - started < 60
