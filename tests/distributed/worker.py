"""One rank of a process group that does many runs in turn; rank 0 keeps what the tests compare.

``torchrun worker.py jobs.json``: a list of jobs, each the options of :func:`vlmtune.training.run.run_training` by name,
and ``job``, the folder for what it leaves: ``gradients.safetensors`` (of every step), ``ranks.json`` (of every rank).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from vlmtune.config import ModelWithLoRAArguments, TrainingArguments, VLMDataArguments
from vlmtune.training import ranks as ranks_module
from vlmtune.training import run as run_module
from vlmtune.training.trainer import MemoryEfficientTrainer, create_trainer

DEFAULTS: dict[str, Any] = {
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 1,
    "warmup_steps": 0,
    "dataloader_num_workers": 0,
    "torch_dtype": "float32",
    "lora_dropout": 0.0,
    "lora_r": 4,
    "learning_rate": 1e-3,
    "save_strategy": "no",
}


class Keep(TrainerCallback):
    """Keeps the gradients that each optimizer step is given."""

    def __init__(self) -> None:
        self.steps: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                grad = parameter.grad
                grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
                self.steps[f"{state.global_step}.{name}"] = grad.clone()


def run(job: dict[str, Any]) -> None:
    """Do one job on this rank."""
    folder = Path(job.pop("job"))
    given: dict[type, dict[str, Any]] = {ModelWithLoRAArguments: {}, VLMDataArguments: {}, TrainingArguments: {}}
    for name, value in {**DEFAULTS, "output_dir": str(folder / "run"), **job}.items():
        given[next(cls for cls in given if name in cls.__dataclass_fields__)][name] = value
    keep, trainers, batches, computed = Keep(), [], [], []

    class Watched(MemoryEfficientTrainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            batches.append({"ids": inputs.get("sample_ids"), "images": len(inputs.get("pixel_values", []))})
            return super().training_step(model, inputs, *args, **kwargs)

    def make(**options: Any) -> Any:
        trainer = create_trainer(**options | {"callbacks": [*(options["callbacks"] or []), keep]})
        trainer.__class__ = Watched
        trainers.append(trainer)
        return trainer

    fill = ranks_module.fill_feature_cache
    run_module.create_trainer = make
    ranks_module.fill_feature_cache = lambda *args, **options: computed.append(fill(*args, **options)) or computed[-1]
    try:
        result = run_module.run_training(*(cls(**values) for cls, values in given.items()))
    finally:
        run_module.create_trainer = create_trainer
        ranks_module.fill_feature_cache = fill
    sharded = [name for name, parameter in trainers[-1].model.named_parameters() if hasattr(parameter, "placements")]
    best = trainers[-1].state.best_model_checkpoint
    own = {"steps": result.steps, "batches": batches, "computed": computed, "metrics": result.metrics}
    own |= {"sharded": sharded, "best": best}
    everything: list[Any] = [own]
    if torch.distributed.is_initialized():
        everything = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everything, own)
    if int(os.environ.get("RANK", "0")) == 0:
        save_file({name: tensor.contiguous() for name, tensor in keep.steps.items()}, folder / "gradients.safetensors")
        (folder / "ranks.json").write_text(json.dumps(everything))


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
