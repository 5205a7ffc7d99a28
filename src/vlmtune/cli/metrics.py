"""``vlmtune metrics``."""

from __future__ import annotations

import textwrap

from vlmtune.cli.common import asks_help, recipe_and_flags, refuse, take


def metrics(argv: list[str]) -> int:
    """List the metrics, or write a table of document frequencies."""
    if asks_help(argv):
        print(
            "usage: vlmtune metrics\n"
            "       vlmtune metrics --save_frequencies FILE [RECIPE.yaml] [--dataset_path DATA ...]\n\n"
            "Lists the metrics for --metrics: what each says, the paper that defines it, and the code whose numbers\n"
            "it gives. A function of your own is named by its dotted path, such as my_metrics.length: it takes the\n"
            "answers and the references of each, and returns a number per sample.\n\n"
            "CIDEr weighs an n-gram by how rare it is in the references scored; few images give few. With\n"
            "--save_frequencies FILE, the training data of a recipe, or those of vlmtune train's data options, are\n"
            "counted instead and written to FILE (such as frequencies.json.gz), for the metric cider:FILE."
        )
        return 0
    output, argv = take(argv, "--save_frequencies")
    if output is not None:
        print(_save_frequencies(argv, output))
        return 0
    if argv:
        refuse("metrics", argv[0], ("--help", "--save_frequencies"))
    from vlmtune.evaluation.metrics import METRICS, WITH_ARGUMENT

    width = max(len(name) for name in METRICS) + 2
    for name, metric in METRICS.items():
        same = "" if name == metric.name else f"the same as {metric.name}: "
        needs = f"; needs pip install 'vlmtune[{metric.needs[1]}]'" if metric.needs else ""
        print(textwrap.fill(name.ljust(width) + same + metric.summary + needs, 118, subsequent_indent=" " * width))
        print(
            textwrap.fill(
                f"{metric.paper}; {metric.code}", 118, initial_indent=" " * width, subsequent_indent=" " * width
            )
        )
    for name, entry in WITH_ARGUMENT.items():
        named = f"{name}:{entry.argument}".ljust(width)
        print(textwrap.fill(named + entry.summary, 118, subsequent_indent=" " * width))
        print(" " * width + entry.paper)
    print("\nYour own function by its dotted path, such as my_metrics.length, is a metric too.")
    return 0


def _save_frequencies(argv: list[str], output: str) -> str:
    from vlmtune.config import EvaluationArguments, ModelWithLoRAArguments, TrainingArguments, VLMDataArguments
    from vlmtune.config.recipe import parse_arguments
    from vlmtune.evaluation.command import save_frequencies

    recipe, flags = recipe_and_flags(argv)
    ignored = [ModelWithLoRAArguments, TrainingArguments, EvaluationArguments]
    return save_frequencies(parse_arguments([VLMDataArguments], flags, recipe, ignored=ignored)[0], output)
