"""``vlmtune check``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmtune.cli.common import asks_help, print_help, progress, recipe_and_flags, take
from vlmtune.errors import ConfigError

# Options of the data that matter where batches are made.
BATCH_OPTIONS = (
    *("max_texts_per_row", "max_tokens_per_row", "image_timeout"),
    *("cache_image_features", "cache_dir", "cache_max_gb"),
)
OWN_OPTIONS = (
    "  --report_dir DIR\n      Folder for check.json and check.html; by default the next free runs/check-N.\n"
    "  --processes N\n      Processes that decode images; by default one a CPU core."
)


def check(argv: list[str]) -> int:
    """Check data before training; 1 when training would be refused."""
    from vlmtune.config import BaseModelArguments, VLMDataArguments

    if asks_help(argv):
        print_help(
            "usage: vlmtune check RECIPE.yaml|DATA [--option value ...]\n\n"
            "Opens every image, reads every row and text, counts tokens where model_name_or_path is set, and says\n"
            "what would ruin a run or teach the wrong thing. Takes a training recipe, or a folder or file of data.\n"
            "Exit code 1 when training would be refused.\n\n" + OWN_OPTIONS,
            [BaseModelArguments, VLMDataArguments],
            optional=("dataset_path", "model_name_or_path"),
            without=BATCH_OPTIONS,
        )
        return 0
    report_dir, argv = take(argv, "--report_dir")
    processes, argv = take(argv, "--processes")
    if processes is not None and not (processes.isdigit() and int(processes)):
        raise ConfigError(f"--processes is {processes!r}; it must be a whole number above 0.")
    data_args, model_args = data_and_model(argv)
    from vlmtune.inspection.doctor import check_data
    from vlmtune.inspection.render import print_report, write_report

    report = check_data(data_args, model_args, processes=int(processes) if processes else None, progress=progress)
    print_report(report)
    written = write_report(report, Path(report_dir) if report_dir else free_folder("check"))
    print(f"Written: {written[0]}, {written[1]}")
    return 1 if report.refused else 0


def data_and_model(argv: list[str], *, model_required: bool = False) -> tuple[Any, Any]:
    """Read the data and, where one is named, the model from a recipe or a path and flags."""
    from vlmtune.config import BaseModelArguments, EvaluationArguments, ModelWithLoRAArguments, VLMDataArguments
    from vlmtune.config.recipe import parse_arguments, read_yaml
    from vlmtune.config.training import TrainingArguments
    from vlmtune.data.formats import mixture

    first, flags = recipe_and_flags(argv)
    # A mixture is YAML too, and data.
    is_data = first is not None and (not first.lower().endswith((".yaml", ".yml")) or mixture.detect(Path(first)))
    recipe = None if is_data else first
    if first is not None and recipe is None:
        flags = ["--dataset_path", first, *flags]
    named = {flag.partition("=")[0].removeprefix("--").replace("-", "_") for flag in flags}
    if recipe is not None:
        named |= {name.replace("-", "_") for name in read_yaml(Path(recipe))}
    ignored = [ModelWithLoRAArguments, TrainingArguments, EvaluationArguments]
    if model_required or "model_name_or_path" in named:
        model, data = parse_arguments([BaseModelArguments, VLMDataArguments], flags, recipe, ignored=ignored)
        return data, model
    return parse_arguments([VLMDataArguments], flags, recipe, ignored=ignored)[0], None


def free_folder(name: str) -> Path:
    """The next free ``runs/NAME-N``."""
    number = 1
    while Path("runs", f"{name}-{number}").exists():
        number += 1
    return Path("runs", f"{name}-{number}")
