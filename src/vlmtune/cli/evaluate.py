"""``vlmtune evaluate``."""

from __future__ import annotations

from pathlib import Path

from vlmtune.cli.common import asks_help, print_help, progress, recipe_and_flags
from vlmtune.cli.launch import on_devices
from vlmtune.cli.report import leave_report
from vlmtune.config.devices import DeviceOptions

# Options of the data that evaluation passes over.
TRAINING_DATA_OPTIONS = (
    *("max_train_samples", "max_length", "on_too_long", "share_images", "max_texts_per_row", "max_tokens_per_row"),
    *("cache_image_features", "cache_dir", "cache_max_gb"),
)


def evaluate(argv: list[str]) -> int:
    """Generate and score answers."""
    from vlmtune.config import (
        AdapterArguments,
        BaseModelArguments,
        EvaluationArguments,
        EvaluationOutputArguments,
        QuantizationArguments,
        VLMDataArguments,
    )

    classes = [
        BaseModelArguments,
        AdapterArguments,
        QuantizationArguments,
        VLMDataArguments,
        EvaluationArguments,
        EvaluationOutputArguments,
    ]
    if asks_help(argv):
        print_help(
            "usage: vlmtune evaluate [RECIPE.yaml] [--option value ...]\n"
            "       vlmtune evaluate --predictions FILE [--metrics NAME ...] [--evaluation_dir DIR]\n"
            "\n"
            "Generates answers for the evaluation data and scores them, each metric with its 95 % interval. The data\n"
            "are those that validation_fraction holds out, or eval_split, or the split test, validation, val or dev,\n"
            "or everything. Options of a training recipe that do not concern evaluation are passed over.\n\n"
            "With --predictions, answers that exist already are scored, and no model is loaded. --samples N is short\n"
            "for --eval_samples N.",
            [*classes, DeviceOptions],
            without=TRAINING_DATA_OPTIONS,
        )
        return 0
    from vlmtune.config import ModelWithLoRAArguments, TrainingArguments
    from vlmtune.config.recipe import parse_arguments
    from vlmtune.evaluation.command import evaluation_folder, run_evaluation, score_file
    from vlmtune.evaluation.ranks import is_first
    from vlmtune.inspection.near_copies import near_copies

    recipe_path, flags = recipe_and_flags(argv)
    flags = ["--eval_" + flag[2:] if flag.partition("=")[0] == "--samples" else flag for flag in flags]
    ignored = [ModelWithLoRAArguments, VLMDataArguments, TrainingArguments]
    if any(flag.partition("=")[0] == "--predictions" for flag in flags):
        scoring = parse_arguments(
            [EvaluationArguments, EvaluationOutputArguments], flags, recipe_path, ignored=[*classes, *ignored]
        )
        print(score_file(*scoring))
        output = scoring[1]
        if output.evaluation_dir:
            leave_report(_places(output.compare_to, output.evaluation_dir))
        return 0
    if (code := on_devices("evaluate", argv, [*classes, *ignored])) is not None:
        return code
    made = parse_arguments(classes, flags, recipe_path, ignored=ignored)
    told = run_evaluation(*made, progress=progress("Answering"), near_copies=near_copies)
    if is_first():
        print(told)
        leave_report(_places(made[-1].compare_to, evaluation_folder(made[0], made[1], made[-1])))
    return 0


def _places(compare_to: str | None, folder: str | Path) -> list[Path]:
    """What the page is of: the evaluation, behind the one it is compared with, where that has a folder of its own."""
    from vlmtune.evaluation.predictions_file import PREDICTIONS
    from vlmtune.report.data import folder_of

    before = [folder_of(compare_to)] if compare_to else []
    return [*(place for place in before if (place / PREDICTIONS).is_file()), folder_of(folder)]
