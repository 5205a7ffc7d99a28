"""Configuration: argument dataclasses, and :func:`parse_recipe` that reads a YAML file and flags into them.

Each field's help says what it does. ``TrainingArguments`` imports transformers, which takes seconds, so it
is imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmtune.config.data import VLMDataArguments
from vlmtune.config.evaluation import EvaluationArguments, GenerationArguments
from vlmtune.config.model import BaseModelArguments, LoRAArguments, ModelWithLoRAArguments, QuantizationArguments

if TYPE_CHECKING:
    from vlmtune.config.training import TrainingArguments

__all__ = [
    "BaseModelArguments",
    "EvaluationArguments",
    "GenerationArguments",
    "LoRAArguments",
    "ModelWithLoRAArguments",
    "QuantizationArguments",
    "TrainingArguments",
    "VLMDataArguments",
]


def __getattr__(name: str) -> Any:
    if name == "TrainingArguments":
        from vlmtune.config.training import TrainingArguments

        return TrainingArguments
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
