"""What servers do not apply of an adapter is named before it is trained."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vlmtune.config import ModelWithLoRAArguments
from vlmtune.models.serving import training_limits


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, []),
        ({"lora_scopes": ["language", "vision", "projector"]}, ["LoRA on the vision and the projector"]),
        ({"use_dora": True, "lora_bias": "lora_only"}, ["DoRA", "trained biases"]),
        ({"train_parts": ["projector"]}, ["modules trained in full (projector)"]),
    ],
)
def test_training_limits(options, named) -> None:
    assert training_limits(vars(replace(ModelWithLoRAArguments(model_name_or_path="m"), **options))) == named
