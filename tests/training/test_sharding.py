"""What a strategy cannot do is refused before any weight loads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vlmtune.errors import ConfigError
from vlmtune.training.sharding import check_strategy


def check(strategy: str, world_size: int = 2, eval_answers: int = 0, **model) -> None:
    args = SimpleNamespace(strategy=strategy, world_size=world_size, eval_answers=eval_answers)
    check_strategy(args, SimpleNamespace(**{"use_lora": True, "use_4bit": False, "use_8bit": False} | model))


@pytest.mark.parametrize(
    ("strategy", "options", "reason"),
    [
        ("fsdp", {"eval_answers": 4}, "eval_answers"),
        ("zero3", {"eval_answers": 4}, "eval_answers"),
        ("fsdp", {"use_8bit": True}, "8-bit"),
        ("zero3", {"use_8bit": True}, "8-bit"),
        ("zero3", {"use_4bit": True}, "4-bit"),
    ],
)
def test_refused_with_the_reason(strategy, options, reason) -> None:
    with pytest.raises(ConfigError, match=f"strategy {strategy} cannot be used here: .*{reason}.*use ddp"):
        check(strategy, **options)
    # One device shares nothing out, and ddp can do all of it.
    check(strategy, world_size=1, **options)
    check("ddp", **options)


@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
def test_adapters_are_trained_by_any(strategy) -> None:
    check(strategy)


def test_what_fsdp_can_do_besides() -> None:
    check("fsdp", use_4bit=True)
    for strategy in ("fsdp", "zero2", "zero3"):
        check(strategy, use_lora=False)
    check("zero2", eval_answers=4)
