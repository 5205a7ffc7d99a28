"""Every family of models, one file each. A new one is a file with its record and a line here."""

from __future__ import annotations

import importlib.util
from typing import Any

from vlmtune.errors import ConfigError, UnsupportedModelError, nearest
from vlmtune.models.families.gemma3 import GEMMA3
from vlmtune.models.families.gemma4 import GEMMA4
from vlmtune.models.families.granite_docling import GRANITE_DOCLING
from vlmtune.models.families.idefics3 import IDEFICS3, SMOLVLM
from vlmtune.models.families.internvl import INTERNVL
from vlmtune.models.families.llava import LLAVA
from vlmtune.models.families.llava_next import LLAVA_NEXT
from vlmtune.models.families.llava_onevision import LLAVA_ONEVISION
from vlmtune.models.families.mistral3 import MISTRAL3
from vlmtune.models.families.paligemma import PALIGEMMA
from vlmtune.models.families.qwen2_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from vlmtune.models.families.qwen3_5 import QWEN3_5
from vlmtune.models.family import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        GEMMA3,
        GEMMA4,
        PALIGEMMA,
        LLAVA,
        LLAVA_NEXT,
        LLAVA_ONEVISION,
        QWEN2_VL,
        QWEN2_5_VL,
        QWEN3_VL,
        QWEN3_5,
        IDEFICS3,
        SMOLVLM,
        INTERNVL,
        MISTRAL3,
        GRANITE_DOCLING,
    )
}

# model_type -> why a family that transformers has is not taken, and the packages with which it is tried as an unknown
# one.
REFUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "lfm2_vl": (
        "transformers makes its image processor with torchvision only, which is not installed",
        ("torchvision",),
    ),
    "gemma3n": (
        "its vision tower needs the packages timm and torchvision, which are not installed",
        ("timm", "torchvision"),
    ),
    "mllama": ("it reads images by cross-attention, with a mask made of each text and its images together", ()),
    "florence2": ("it is an encoder and a decoder, whose labels are other than those of a conversation", ()),
}


def get_family(which: Any, expected: str = "auto") -> Family:
    """Return the record of a family.

    Args:
        which: a family's name or alias, a loaded model (adapted by PEFT or not), its configuration, or a record.
        expected: name or alias of the family that it must be of (the option ``model_type``); ``auto`` takes any.

    Raises:
        ConfigError: it is of another family than the expected one.
        UnsupportedModelError: no family of that name, or none for that configuration. The configuration of a
            checkpoint of an unknown family gets a generic record, where that is possible.
    """
    family = _find(which)
    if expected.lower() not in ("auto", family.name, *family.aliases):
        # A name that no family has is told apart from one of another family.
        wanted = _by_name(expected).name
        raise ConfigError(
            f"model_type is {expected}, but the model is of the family {family.name}. Leave model_type out, or name a "
            f"{wanted} model."
        )
    return family


def _find(which: Any) -> Family:
    if isinstance(which, Family):
        return which
    if isinstance(which, str):
        return _by_name(which)
    config = getattr(which, "config", which)
    fields = ("model_type", "vision_config", "_name_or_path")
    found = config if isinstance(config, dict) else {name: getattr(config, name, None) for name in fields}
    model_type = found.get("model_type")
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    name = found.get("_name_or_path") or "the model"
    reason, packages = REFUSED.get(str(model_type), ("", ()))
    if reason and not (packages and all(map(importlib.util.find_spec, packages))):
        raise UnsupportedModelError(
            f"{name} is a {model_type} model, which vlmtune does not take: {reason}. "
            f"Choose a model of a known family ({', '.join(FAMILIES)})."
        )
    if model_type is not None and found.get("vision_config") is None:
        raise UnsupportedModelError(
            f"{name} is a {model_type} model, which takes text only: it has no vision tower to show images to. "
            f"Choose a vision-language model of a known family ({', '.join(FAMILIES)})."
        )
    if model_type is None or isinstance(config, dict):
        raise UnsupportedModelError(
            f"{name} is a {model_type} model, a family that vlmtune does not know yet. Known: {', '.join(FAMILIES)}."
        )
    # Reading a checkpoint takes torch; names and known configurations do not.
    from vlmtune.models.generic import generic_family

    return generic_family(config)


def _by_name(name: str) -> Family:
    wanted = name.lower()
    for family in FAMILIES.values():
        if wanted in (family.name, *family.aliases):
            return family
    known = [*FAMILIES, *(alias for family in FAMILIES.values() for alias in family.aliases)]
    raise UnsupportedModelError(f"No model family is called {name!r}; use {', '.join(known)}.{nearest(wanted, known)}")
