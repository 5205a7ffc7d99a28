"""``vlmtune chat``."""

from __future__ import annotations

import contextlib
import sys

from vlmtune.cli.common import asks_help, model_and_places, print_help


def chat(argv: list[str]) -> int:
    """Talk with a model in the terminal."""
    from vlmtune.config import AdapterArguments, BaseModelArguments, GenerationArguments, QuantizationArguments
    from vlmtune.config.serving import PixelArguments

    classes = [AdapterArguments, QuantizationArguments, GenerationArguments, PixelArguments]
    if asks_help(argv):
        print_help(
            "usage: vlmtune chat MODEL [--option value ...]\n\n"
            "A conversation in the terminal. Images go along by their paths: photo.jpg What is this?",
            [BaseModelArguments, *classes],
            without=["model_name_or_path"],
        )
        return 0
    from vlmtune.config.recipe import parse_arguments
    from vlmtune.evaluation.command import load
    from vlmtune.serving.chat import HELP, Chat, talk

    name, _, flags = model_and_places("chat", argv, "", "MODEL [--option value ...]")
    model_args, adapter_args, quantization_args, options, pixels = parse_arguments(
        [BaseModelArguments, *classes], ["--model_name_or_path", name, *flags]
    )
    model, processor = load(model_args, adapter_args, quantization_args)
    with contextlib.suppress(ImportError):
        # Gives the arrow keys and earlier lines, where Python has it.
        import readline  # noqa: F401
    by_hand = sys.stdin.isatty()
    if by_hand:
        print(HELP)
    talk(
        Chat(model, processor, options, max_pixels=pixels.max_pixels),
        input if by_hand else lambda _: input(),
        lambda text: print(text, flush=True),
    )
    return 0
