"""``vlmtune serve``."""

from __future__ import annotations

from vlmtune.cli.common import asks_help, model_and_places, print_help


def serve(argv: list[str]) -> int:
    """Serve a model or adapter behind an address."""
    from vlmtune.config import AdapterArguments, BaseModelArguments, GenerationArguments, QuantizationArguments
    from vlmtune.config.serving import ServeArguments

    classes = [AdapterArguments, QuantizationArguments, GenerationArguments, ServeArguments]
    if asks_help(argv):
        print_help(
            "usage: vlmtune serve MODEL [--option value ...]\n\n"
            "Serves a model, or an adapter on its base, to programs that speak OpenAI's chat API, with images:\n"
            "http://127.0.0.1:8000/v1. Only this machine can reach it unless host says otherwise.",
            [BaseModelArguments, *classes],
            without=["model_name_or_path"],
        )
        return 0
    from vlmtune.config.recipe import parse_arguments
    from vlmtune.serving import server

    name, _, flags = model_and_places("serve", argv, "", "MODEL [--option value ...]")
    arguments = parse_arguments([BaseModelArguments, *classes], ["--model_name_or_path", name, *flags])
    found = server.serve(*arguments)
    if found is None:
        return 0
    print(found.text())
    return 0 if found.equal == len(found.rows) else 1
