"""One rank of a short run that notes the bytes of its collectives: ``torchrun communication.py job.json``.

Leaves ``communication.json``: the bytes of each kind of collective in each batch, and the parameters.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vlmtune.config import ModelWithLoRAArguments, TrainingArguments, VLMDataArguments
from vlmtune.training import run as run_module
from vlmtune.training.trainer import MemoryEfficientTrainer, create_trainer

SCALING = Path(__file__).parents[2] / "scripts" / "write_scaling.py"


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors(one)


class Noting(TorchDispatchMode):
    """Notes the largest tensor of each collective: the whole of what is gathered, reduced or scattered."""

    def __init__(self, noted: Counter[str]) -> None:
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = str(func).partition(".")
        if namespace == "c10d":
            self.noted[name.partition(".")[0]] += max(tensor.nbytes for tensor in tensors(args))
        return func(*args, **(kwargs or {}))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    batches: list[Counter[str]] = []
    trainers: list[Any] = []

    class Watched(MemoryEfficientTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            batches.append(Counter())
            with Noting(batches[-1]):
                return super().training_step(*args, **kwargs)

    def make(**options: Any) -> Any:
        trainers.append(create_trainer(**options))
        trainers[-1].__class__ = Watched
        script = runpy.run_path(str(SCALING))
        layers = script["units"](options["model"], frozen_tower=True)
        sizes["all"], sizes["layers"] = script["numel"](options["model"]), sum(map(script["numel"], layers))
        return trainers[-1]

    sizes: dict[str, int] = {}
    run_module.create_trainer = make
    given = {name: cls(**job[name]) for name, cls in KINDS.items()}
    run_module.run_training(*given.values())
    sizes["trained"] = sum(one.numel() for one in trainers[-1].model.parameters() if one.requires_grad)
    if torch.distributed.get_rank() == 0:
        (Path(sys.argv[1]).parent / "communication.json").write_text(json.dumps({"batches": batches, "sizes": sizes}))
    torch.distributed.destroy_process_group()


KINDS = {"model": ModelWithLoRAArguments, "data": VLMDataArguments, "training": TrainingArguments}

if __name__ == "__main__":
    main()
