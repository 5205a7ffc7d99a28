"""Which parameter of a model each tensor of its checkpoint is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from vlmtune.models.families import get_family
from vlmtune.models.family import Family


def empty_model(config: Any, family: Family) -> Any:
    """Return a model without values, on the meta device."""
    with torch.device("meta"):
        return getattr(transformers, family.model_class)(config)


def find_places(model: Any, mapping: Sequence[Any], known: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Return the parameter of each tensor that is taken as it is; those that are joined or split are left out.

    Args:
        model: with any values or none.
        mapping: transformers' conversion of its checkpoint.
        known: the model's parameters by name.
        names: the checkpoint's tensors.
    """
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if not isinstance(one, WeightRenaming)]
    found = ((name, rename_source_key(name, renamings, converters, model.base_model_prefix, known)) for name in names)
    return {name: place for name, (place, converted) in found if converted is None}


def module_names(config: Any, names: Iterable[str]) -> dict[str, str]:
    """Return :func:`find_places` of the model that a configuration describes."""
    model = empty_model(config, get_family(config))
    return find_places(model, get_model_conversion_mapping(model), model.state_dict(), names)
