"""``vlmtune push``."""

from __future__ import annotations

from pathlib import Path

from vlmtune.cli.common import asks_help, print_help
from vlmtune.errors import ConfigError


def push(argv: list[str]) -> int:
    """Push a model or adapter to the Hugging Face Hub."""
    from vlmtune.config.serving import PushArguments

    if asks_help(argv):
        print_help(
            "usage: vlmtune push FOLDER OWNER/NAME [--option value ...]\n\n"
            "Pushes a model or adapter to the Hugging Face Hub: weights, configuration, processor and a model card,\n"
            "and nothing else of the folder. The repository is made where it is absent, and is private. The token\n"
            "is that of `hf auth login` or HF_TOKEN.",
            [PushArguments],
        )
        return 0
    from vlmtune.config.recipe import parse_arguments

    if len(argv) < 2 or any(place.startswith("--") for place in argv[:2]):
        raise ConfigError(
            "push needs a folder and a repository, and they stand before all options. Write: vlmtune push FOLDER "
            "OWNER/NAME [--option value ...]."
        )
    (args,) = parse_arguments([PushArguments], argv[2:])
    from vlmtune.serving.push import push as push_folder

    print(f"Pushed {argv[0]} to {push_folder(Path(argv[0]).expanduser(), argv[1], args)}")
    return 0
