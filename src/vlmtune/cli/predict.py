"""``vlmtune predict``."""

from __future__ import annotations

from vlmtune.cli.common import asks_help, model_and_places, print_help, progress
from vlmtune.cli.launch import on_devices
from vlmtune.config.devices import DeviceOptions


def predict(argv: list[str]) -> int:
    """Answer questions about images."""
    from vlmtune.config import AdapterArguments, BaseModelArguments, GenerationArguments, QuantizationArguments
    from vlmtune.config.serving import PredictArguments

    classes = [AdapterArguments, QuantizationArguments, GenerationArguments, PredictArguments]
    if asks_help(argv):
        print_help(
            "usage: vlmtune predict MODEL IMAGE|FOLDER|QUESTIONS.jsonl ... [--prompt TEXT] [--output FILE]\n"
            "                       [--option value ...]\n\n"
            "Answers a question about each image, of each folder of images, or each line of a file of questions (an\n"
            "object with image and question). MODEL is a model (a folder, or a name on the Hugging Face Hub) or the\n"
            "folder of an adapter that vlmtune trained. Of several answers, each is one line: the image's name, a\n"
            "tab, the answer; or an object a line in the file named by --output.",
            [BaseModelArguments, *classes, DeviceOptions],
            without=["model_name_or_path"],
        )
        return 0
    from vlmtune.config.recipe import parse_arguments
    from vlmtune.evaluation import command
    from vlmtune.evaluation.ranks import is_first

    model_name, places, flags = model_and_places(
        "predict", argv, "at least one image, folder or file of questions", "MODEL IMAGE [IMAGE ...] [--prompt TEXT]"
    )
    classes.insert(0, BaseModelArguments)
    given = ["--model_name_or_path", model_name, *flags]
    arguments = parse_arguments([*classes, DeviceOptions], given)[: len(classes)]
    if (code := on_devices("predict", flags, classes, [model_name, *places])) is not None:
        return code
    answers = list(command.predict(*arguments, places=places, progress=progress("Answers")))
    for name, answer in answers if is_first() else ():
        print(answer if len(answers) == 1 else f"{name}\t{' '.join(answer.split())}")
    return 0
