"""Which options make a run that goes on another run."""

from __future__ import annotations

import json

import pytest

from vlmtune.config import TrainingArguments
from vlmtune.training.resume import recipe_differences
from vlmtune.training.run_info import plain


def differences(**options: object) -> list[str]:
    """Between a run on two devices with a batch of 4 each, and what goes on with it."""
    began = {"devices": 2, "strategy": "ddp", "per_device_train_batch_size": 4}
    then, now = (TrainingArguments(output_dir="run", use_cpu=True, **one) for one in (began, began | options))
    record = {"arguments": {"training": plain(then)}, "samples_per_step": 8}
    before = json.loads(json.dumps(record, default=str))
    return recipe_differences(before, {"training": now}, 8)


@pytest.mark.parametrize(
    "options",
    [
        {"devices": None, "per_device_train_batch_size": 8},
        {"devices": 4, "nodes": 2, "rendezvous": "node1:29500", "per_device_train_batch_size": 1},
        {"devices": None, "effective_batch_size": 8, "strategy": "fsdp"},
        {"save_steps": 7, "logging_steps": 3, "on_oom": "stop"},
    ],
)
def test_where_and_how_it_computes_makes_no_other_run(options) -> None:
    assert differences(**options) == []


def test_what_decides_the_weights_does() -> None:
    assert differences(learning_rate=0.5) == ["learning_rate was 0.0002 and is 0.5"]
    before = {"arguments": {}, "samples_per_step": 8}
    assert recipe_differences(before, {}, 16) == ["a step took 8 samples and takes 16"]
