"""Adapters are saved whole by a plain trainer, and progress is readable."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoProcessor, Trainer

from vlmtune.batching.collator import create_data_collator
from vlmtune.config import TrainingArguments
from vlmtune.models.loading import load_model_for_inference
from vlmtune.training.callbacks import LoggingCallback, SavePeftModelCallback, TowerAside


def test_plain_trainer_saves_adapter_and_processor(fresh_model, processor, rows, tmp_path: Path) -> None:
    model = fresh_model()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, max_steps=1, save_steps=1, learning_rate=0.1
        ),
        train_dataset=rows,
        data_collator=create_data_collator(processor, "gemma3"),
        callbacks=[SavePeftModelCallback(processor)],
    )
    trainer.train()
    folder = tmp_path / "checkpoint-1"
    assert AutoProcessor.from_pretrained(folder).chat_template == processor.chat_template
    inputs = {name: v for name, v in create_data_collator(processor, "gemma3")(rows[:2]).items() if name != "labels"}
    reloaded, _ = load_model_for_inference(folder, torch_dtype="float32", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**inputs).logits, model.eval()(**inputs).logits, rtol=0, atol=0)


def test_only_the_first_process_saves(processor, tmp_path: Path) -> None:
    state = SimpleNamespace(is_world_process_zero=False, global_step=1)
    SavePeftModelCallback(processor).on_save(SimpleNamespace(output_dir=str(tmp_path)), state, None, model=None)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def log_lines(caplog: pytest.LogCaptureFixture):
    """Messages of the training logger, by the figures given to ``on_log``."""

    def lines(logs, *, first: bool = True) -> list[str]:
        state = SimpleNamespace(is_world_process_zero=first, global_step=3, max_steps=10)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="vlmtune.training"):
            LoggingCallback().on_log(None, state, None, logs=logs)
        return [record.getMessage() for record in caplog.records]

    return lines


def test_training_line(log_lines) -> None:
    figures = {"loss": 1.23456, "learning_rate": 2e-4, "grad_norm": 0.5}
    assert log_lines(figures) == ["step 3/10: loss 1.2346, lr 2.00e-04, grad 0.500"]
    speed = {"samples_per_second": 12.34, "data_wait_share": 0.256, "peak_memory_gib": 1.514}
    assert log_lines(figures | speed) == [
        "step 3/10: loss 1.2346, lr 2.00e-04, grad 0.500, 12.3 samples/s, data wait 26%, peak memory 1.51 GiB"
    ]


def test_evaluation_line(log_lines) -> None:
    assert log_lines({"eval_loss": 0.5, "eval_runtime": 1.0}) == ["step 3/10: evaluation loss 0.5000"]


def test_no_line(log_lines) -> None:
    assert log_lines({"train_runtime": 1.0}) == []
    assert log_lines({}) == []
    assert log_lines(None) == []
    assert log_lines({"loss": 1.0}, first=False) == []


@pytest.mark.parametrize("disable", [True, False])
def test_progress_bars(disable: bool, make_trainer, rows, capfd: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(
        eval_dataset=rows[:2], max_steps=2, eval_strategy="steps", eval_steps=1, disable_tqdm=disable
    )
    trainer.train()
    trainer.evaluate()
    captured = capfd.readouterr()
    # With its bracket: log lines, which another test may have sent to the terminal, say "step 2/2" as well.
    assert ("2/2 [" in captured.err) is not disable
    assert "{'loss'" not in captured.out + captured.err


def test_the_tower_leaves_the_accelerator_and_comes_back() -> None:
    """The meta device stands for an accelerator."""
    tower = torch.nn.Linear(2, 2)
    aside = TowerAside([tower])
    on_cpu, elsewhere = (SimpleNamespace(device=torch.device(name)) for name in ("cpu", "meta"))
    aside.on_train_begin(on_cpu, None, None)
    moved: list[str] = []
    tower.to = lambda device: moved.append(str(device))
    aside.on_train_begin(elsewhere, None, None)
    assert moved == ["cpu"]
    aside.on_train_end(elsewhere, None, None)
    assert moved == ["cpu", "meta"]
