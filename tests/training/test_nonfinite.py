"""A loss or gradient that is not finite stops the run, names its samples and keeps the weights; or is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training.steps import (
    At,
    Before,
    Recorded,
    plant_in_gradient,
    plant_in_weights,
    sampler,
    weights,
)

from vlmtune.batching.collator import BaseVLMDataCollator, SharedImageCollator
from vlmtune.errors import NonFiniteError
from vlmtune.training.steady import SKIPPED_IN_A_ROW
from vlmtune.training.trainer import MemoryEfficientTrainer


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


class Poison(SharedImageCollator):
    """Gives the batches with these numbers weights that make the loss infinite."""

    batches: tuple[int, ...] = ()
    made = 0

    def __call__(self, rows: Any) -> Any:
        batch = super().__call__(rows)
        self.made += 1
        if self.made in self.batches:
            batch["target_weights"] = torch.full_like(batch["target_weights"], torch.inf, dtype=torch.float32)
        return batch


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_step_is_left_out(max_grad_norm: float, make_trainer, processor, caplog: pytest.LogCaptureFixture) -> None:
    collator = Poison(processor, "gemma3")
    trainer = make_trainer(
        train_sampler=sampler(),
        data_collator=collator,
        on_nonfinite="skip",
        logging_steps=2,
        logging_first_step=False,
        max_grad_norm=max_grad_norm,
    )
    kept: dict[int, Any] = {}
    step = MemoryEfficientTrainer.training_step

    def poisoned(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        kept[self.state.global_step] = weights(self)
        if self.state.global_step == 1:
            parameter = next(p for p in model.parameters() if p.requires_grad)
            hook = parameter.register_hook(lambda gradient: gradient * torch.nan)
            try:
                return step(self, model, inputs, *args, **kwargs)
            finally:
                hook.remove()
        return step(self, model, inputs, *args, **kwargs)

    trainer.training_step = poisoned.__get__(trainer)
    trainer.train()
    assert trainer.state.global_step == 4
    for name, value in kept[1].items():
        assert torch.equal(value, kept[2][name]), "the step reached the weights"
    assert any(not torch.equal(value, kept[3][name]) for name, value in kept[2].items())
    assert trainer.run_state.skipped == 1
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("skipped_steps") for entry in logs] == [1, None]
    assert all(0 < entry["loss"] < 20 for entry in logs)
    assert trainer.state.log_history[-1]["skipped_steps"] == 1
    assert "step 2 is left out (1 so far)" in caplog.text and "with the samples" in caplog.text


def test_a_model_that_is_broken_stops_all_the_same(make_trainer) -> None:
    def break_weights() -> None:
        with torch.no_grad():
            next(p for p in trainer.model.parameters() if p.requires_grad).view(-1)[0] = torch.nan

    trainer = make_trainer(max_steps=40, on_nonfinite="skip", callbacks=[At("on_step_begin", 1, break_weights)])
    with pytest.raises(NonFiniteError, match="in a row"):
        trainer.train()
    assert trainer.state.global_step == 1 + SKIPPED_IN_A_ROW
