"""``device_batch_size: auto``: the largest batch that fits, by estimate and by a step, with the same optimizer step."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vlmtune.batching.sampler import ImageGroupSampler
from vlmtune.batching.scan import Scan
from vlmtune.errors import ConfigError, ModelError
from vlmtune.training import device_batch
from vlmtune.training.device_batch import DeviceBatch, batch_of, peak
from vlmtune.training.run import run_training


@pytest.fixture
def steps_take(monkeypatch):
    """Let a step of so many rows take so many bytes, and keep what was tried."""

    def plant(bytes_a_row: int) -> list[int]:
        tried: list[int] = []

        def step(self, rows) -> float:
            tried.append(len(rows))
            return float(len(rows) * bytes_a_row)

        monkeypatch.setattr(DeviceBatch, "_step", step)
        return tried

    return plant


def _run(run_arguments, folder, **options):
    arguments = run_arguments(folder, per_device_train_batch_size=4, gradient_accumulation_steps=2, **options)
    return arguments, run_training(*arguments)


def test_all_that_fits_and_the_same_steps(run_arguments, tmp_path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("vlmtune"), "propagate", True)
    _, plain = _run(run_arguments, tmp_path / "plain", max_texts_per_row=2, lora_dropout=0.0)
    with caplog.at_level(logging.INFO, "vlmtune.training"):
        arguments, chosen = _run(
            run_arguments, tmp_path / "auto", max_texts_per_row=2, lora_dropout=0.0, device_batch_size="auto"
        )
    assert arguments[2].per_device_train_batch_size == 8 and arguments[2].gradient_accumulation_steps == 1
    assert "8 samples at once, 1 batches a step; with the heaviest rows it took" in caplog.text
    assert chosen.metrics["train_loss"] == pytest.approx(plain.metrics["train_loss"], rel=1e-5)


def test_the_estimate_chooses(run_arguments, tmp_path, steps_take) -> None:
    tried = steps_take(0)
    arguments, _ = _run(run_arguments, tmp_path / "run", device_batch_size="auto", device_memory_gb=0.005)
    batch, accumulation = arguments[2].per_device_train_batch_size, arguments[2].gradient_accumulation_steps
    assert batch * accumulation == 8 and 1 < batch < 8
    # Larger ones are not tried, as they are estimated not to fit.
    assert max(tried) < 8


def test_a_step_that_takes_more_lowers_it(run_arguments, tmp_path, steps_take) -> None:
    steps_take(300 * 10**6)
    arguments, _ = _run(run_arguments, tmp_path / "run", device_batch_size="auto", device_memory_gb=1)
    assert arguments[2].per_device_train_batch_size == 2 and arguments[2].gradient_accumulation_steps == 4


def test_memory_that_runs_out_lowers_it(run_arguments, tmp_path, monkeypatch) -> None:
    def step(self, rows) -> float:
        if len(rows) > 1:
            raise torch.OutOfMemoryError("planted")
        return 0.0

    monkeypatch.setattr(DeviceBatch, "_step", step)
    arguments, _ = _run(run_arguments, tmp_path / "run", device_batch_size="auto")
    assert arguments[2].per_device_train_batch_size == 1 and arguments[2].gradient_accumulation_steps == 8


def test_not_even_one(run_arguments, tmp_path, steps_take) -> None:
    steps_take(2 * 10**9)
    with pytest.raises(ConfigError, match="Not even one sample"):
        _run(run_arguments, tmp_path / "run", device_batch_size="auto", device_memory_gb=1)
    assert not list((tmp_path / "run").iterdir())


def test_without_an_estimate_real_steps_decide(run_arguments, tmp_path, steps_take, monkeypatch) -> None:
    def refuse(*_, **__):
        raise ModelError("Its images differ in size.")

    monkeypatch.setattr(device_batch, "run_estimator", refuse)
    tried = steps_take(300 * 10**6)
    arguments, _ = _run(run_arguments, tmp_path / "run", device_batch_size="auto", device_memory_gb=1)
    assert arguments[2].per_device_train_batch_size == 2
    # From one sample on: what is sure to be too much is not tried.
    assert max(tried) == 2


def test_heaviest_rows() -> None:
    lengths = np.array([20, 50, 21, 90, 70, 22])
    image_tokens = np.array([10, 10, 10, 0, 10, 20])
    keys = ["a", "a", "b", "", "c", "d e"]
    sampler = ImageGroupSampler(keys, lengths, 2, image_tokens=image_tokens)
    trainer = SimpleNamespace(train_sampler=sampler, train_dataset=range(6))
    chosen = DeviceBatch(trainer, lambda: sampler, Scan(np.arange(6), lengths, lengths, [], image_tokens), None)
    assert chosen._heaviest(1) == [[3], [5]]
    assert chosen._heaviest(2)[0] == [3, 4]
    assert chosen._heaviest(3)[0] == [3, 4, 0, 1]


def test_batch_of(make_trainer, rows) -> None:
    trainer = make_trainer()
    collator = trainer.data_collator
    found = batch_of(collator(rows[:5]), trainer.model.config.image_token_id)
    assert (found.samples, found.images, found.cached) == (1, 1, False)
    assert found.text_tokens == collator(rows[:5])["input_ids"].shape[1] - 4


def test_peak_of_the_process() -> None:
    with peak(torch.device("cpu")) as found:
        taken = torch.ones(2**25)
        # As long as a step takes; a tensor that is gone within milliseconds may not be seen on a busy machine.
        time.sleep(0.2)
        del taken
    assert 0.8 * 2**27 < found[0] < 1.5 * 2**27


def test_peak_counts_memory_that_was_freed_before() -> None:
    def take() -> list[torch.Tensor]:
        return [torch.ones(2**14) for _ in range(2048)]

    # The last one keeps the C library from giving the freed ones back by itself.
    keeps = take()[-1:]
    with peak(torch.device("cpu")) as found:
        taken = take()
        time.sleep(0.2)
        del taken
    assert found[0] > 0.8 * 2**27 and len(keeps) == 1
