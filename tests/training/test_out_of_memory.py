"""Memory that runs out halves the device's batch and repeats the step exactly, or ends the run with what to change."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from training.steps import (
    At,
    losses,
    sampler,
    weights,
)

from vlmtune.batching.collator import SharedImageCollator
from vlmtune.errors import TrainingError


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("ours", [True, False])
def test_memory_that_runs_out(
    where: str, at: int, ours: bool, same_trainer, processor, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Raised inside the real forward or half-way through the real backward, where some gradients are there already."""

    def run(oom: bool, folder: str) -> Any:
        seen: list[str] = []

        class Seen(SharedImageCollator):
            def __call__(self, rows: Any) -> Any:
                batch = super().__call__(rows)
                seen.extend(batch["sample_ids"])
                return batch

        given = {"train_sampler": sampler(4)} if ours else {}
        trainer = same_trainer(
            max_steps=5,
            dropout=0.0,
            per_device_train_batch_size=4,
            data_collator=Seen(processor, "gemma3"),
            output_dir=str(tmp_path / folder),
            **given,
        )
        if oom:
            plant(trainer)
        trainer.train()
        return trainer

    def plant(trainer: Any) -> None:
        def fail(*args: Any) -> None:
            if (
                trainer.state.global_step == at
                and trainer.args.per_device_train_batch_size == 4
                and trainer.model.training
            ):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        if where == "forward":
            trainer.model.get_base_model().lm_head.register_forward_pre_hook(fail)
        else:
            trained = [p for p in trainer.model.parameters() if p.requires_grad]
            trained[len(trained) // 2].register_hook(fail)

    whole, shrunk = run(False, "whole"), run(True, "shrunk")
    assert (shrunk.args.per_device_train_batch_size, shrunk.args.gradient_accumulation_steps) == (2, 2)
    assert "a device takes 2 samples at once, 2 times a step, instead of 4, 1 times" in caplog.text
    assert shrunk.state.global_step == 5
    for step, loss in losses(whole).items():
        assert losses(shrunk)[step] == pytest.approx(loss, rel=1e-5)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(shrunk)[name], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"on_oom": "stop"}, "on_oom is stop"), ({"per_device_train_batch_size": 1}, "batch is 1 already")],
)
def test_memory_that_runs_out_for_good(options: dict[str, Any], reason: str, make_trainer) -> None:
    trainer = make_trainer(**options)

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.model.get_base_model().lm_head.register_forward_pre_hook(fail)
    with pytest.raises(TrainingError, match=rf"Memory ran out in step 1 .*{reason}"):
        trainer.train()


def test_memory_that_runs_out_while_weights_change_is_not_tried_again(make_trainer) -> None:
    """Half of the weights may have been changed."""

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer = make_trainer(callbacks=[At("on_optimizer_step", 1, fail)])
    with pytest.raises(TrainingError, match="outside forward and backward"):
        trainer.train()
    gc.collect()


def test_a_resumed_run_keeps_the_smaller_batch(make_trainer, tmp_path: Path) -> None:
    first = make_trainer(
        train_sampler=sampler(2, accumulation=2),
        gradient_accumulation_steps=2,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
    )
    first.train()
    resumed = make_trainer(train_sampler=sampler(4), per_device_train_batch_size=4, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert (resumed.args.per_device_train_batch_size, resumed.args.gradient_accumulation_steps) == (2, 2)
    assert resumed.state.global_step == 4
