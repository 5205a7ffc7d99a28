"""``vlmtune train``."""

from __future__ import annotations

import os
import sys

from vlmtune.cli.common import asks_help, print_help, progress, quick_imports, recipe_and_flags
from vlmtune.cli.launch import in_a_group, on_devices, rank, slurm_place
from vlmtune.cli.report import leave_report
from vlmtune.config.devices import DeviceOptions
from vlmtune.data.ahead import Ahead, worthwhile


def train(argv: list[str]) -> int:
    """Fine-tune as a recipe says."""
    from vlmtune.config import EvaluationArguments, ModelWithLoRAArguments, VLMDataArguments

    if asks_help(argv):
        from vlmtune.config.training_options import TrainingOptions

        print_help(
            "usage: vlmtune train [RECIPE.yaml] [--option value ...]\n\n"
            "Fine-tunes a model. A recipe is a YAML file of the options below, one 'option: value' a line; flags\n"
            "override it. The data, the options and every text's length are checked before any weight loads.",
            [ModelWithLoRAArguments, VLMDataArguments, TrainingOptions, EvaluationArguments],
            "All other options of transformers.TrainingArguments work too; those that would do nothing here are\n"
            "refused with the reason.",
            required=["output_dir"],
            without=("eval_samples", "honesty"),
        )
        return 0
    recipe_path, flags = recipe_and_flags(argv)
    ahead = _read_ahead(flags, recipe_path)
    with quick_imports():
        from vlmtune.config import TrainingArguments, parse_recipe

    classes = [ModelWithLoRAArguments, VLMDataArguments, TrainingArguments, EvaluationArguments]
    if (code := on_devices("train", argv, classes)) is not None:
        return code
    with quick_imports():
        from vlmtune.training.run import run_training

    recipe = parse_recipe(flags, recipe_path)
    recipe.training.disable_tqdm = recipe.training.disable_tqdm or not sys.stderr.isatty()
    load = {"load": ahead.load} if ahead else {}
    result = run_training(
        recipe.model, recipe.data, recipe.training, recipe.evaluation, progress=progress("Image features"), **load
    )
    if rank():
        return 0
    print(f"\nDone: {result.steps} steps in {result.seconds:.0f} s. In {result.output_dir}:")
    print(
        "  the adapter or model with its processor; run.json (options, versions, data); log.jsonl (every logged step)"
    )
    if (record := result.output_dir / "left_out.jsonl").is_file():
        count = len(record.read_text(encoding="utf-8").splitlines())
        print(f"  left_out.jsonl names the {count} samples that were not trained on, with the reasons")
    print(f"Try it: vlmtune predict {result.output_dir} IMAGE --prompt 'Describe this image.'")
    leave_report([result.output_dir])
    return 0


def _read_ahead(flags: list[str], recipe_path: str | None) -> Ahead | None:
    """Begin to read the data, unless other processes are to be started that read them."""
    from vlmtune.config import VLMDataArguments
    from vlmtune.config.recipe import peek

    found = peek([VLMDataArguments, DeviceOptions], flags, recipe_path)
    if found is None or not worthwhile(found[0]):
        return None
    alone = found[1] == DeviceOptions() and slurm_place(os.environ) is None
    return Ahead(found[0]) if alone or in_a_group() else None
