"""What the scripts of all families but Gemma-3 share: read options, check the model's family, train."""

from __future__ import annotations

import logging
import sys
from typing import NoReturn

from transformers import HfArgumentParser

from vlmtune import (
    ModelWithLoRAArguments,
    TrainingArguments,
    VLMDataArguments,
    VlmtuneError,
    get_family,
    parse_recipe,
)
from vlmtune.errors import ConfigError
from vlmtune.models.loading import load_config
from vlmtune.training.run import run_training

ARGUMENTS = (ModelWithLoRAArguments, VLMDataArguments, TrainingArguments)


def main(*families: str) -> NoReturn:
    """Train a model of one of the families as a YAML recipe and flags say, and exit."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("vlmtune").setLevel(logging.INFO)
    try:
        train(sys.argv[1:], families)
    except VlmtuneError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    raise SystemExit(0)


def train(flags: list[str], families: tuple[str, ...]) -> None:
    """Read the options, refuse a model of another family, and train."""
    if "--help" in flags or "-h" in flags:
        HfArgumentParser(ARGUMENTS).print_help()
        return
    recipe_path = flags.pop(0) if flags and not flags[0].startswith("--") else None
    recipe = parse_recipe(flags, recipe_path)
    name = recipe.model.model_name_or_path
    found = get_family(
        load_config(name, revision=recipe.model.model_revision, trust_remote_code=recipe.model.trust_remote_code)
    )
    if found.name not in families:
        raise ConfigError(
            f"{name} is a {found.name} model; this script trains {' and '.join(families)}. Use the script of its "
            "family, or `vlmtune train`, which takes all."
        )
    run_training(*recipe)
