"""The trainer evaluates by tokens, and reports what it did."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from training.steps import (
    Before,
    Recorded,
    plant_in_weights,
)

from vlmtune.batching.collator import BaseVLMDataCollator, SharedImageCollator, create_data_collator
from vlmtune.batching.sampler import ImageGroupSampler
from vlmtune.config import TrainingArguments
from vlmtune.errors import NonFiniteError, TrainingError
from vlmtune.training import throughput as throughput_module
from vlmtune.training import trainer as trainer_module
from vlmtune.training.trainer import create_trainer


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
