"""Adapters of any tool and any transformers version, read in the names of the loaded model, or refused by name.

PEFT, TRL, LLaMA-Factory, ms-swift, Unsloth and Axolotl all write PEFT's files, and differ in how their
``adapter_config.json`` says which layers are adapted: ends of names, whole names, or a regular expression. Module names
moved between versions of transformers (LLaVA's ``language_model.model.layers`` is ``model.language_model.layers`` since
4.52), and a configuration in the old names then matches no layer, fewer layers, or leaves out a rank or scale without a
word. So the tensors decide which layers are adapted, and the configuration is read in the names it was written in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from vlmtune.errors import AdapterError
from vlmtune.models.provenance import base_model

ORIGIN_FILE = "vlmtune_origin.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# First weights that change no weight of the base. The others need the base as that tool changed it.
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
_INSIDE_ADAPTER = re.compile(r"\.(modules_to_save|lora_[A-Za-z_]+)\.")


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Return an adapter's configuration.

    Raises:
        AdapterError: it cannot be read.
    """
    file = Path(folder) / "adapter_config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read ({error}). Copy the adapter's folder again.") from error


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Return an adapter's tensors by the names they were saved with.

    Raises:
        AdapterError: there is no whole safetensors file.
    """
    file = Path(folder) / WEIGHTS_FILE
    if not file.exists():
        pickled = sorted(path.name for path in Path(folder).glob("adapter_model.*"))
        what = f"only {', '.join(pickled)}, which may run code when it is opened" if pickled else "none"
        raise AdapterError(f"The adapter {folder} has no {WEIGHTS_FILE} ({what}). Save it again in safetensors.")
    try:
        weights: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{file} cannot be read ({error}). Copy the adapter's folder again.") from error
    return weights


class Layout:
    """Names of a loaded model's parameters, and what those of other versions of transformers became.

    Args:
        model: the base model, or a PEFT model around it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = base_model(model)
        self.shapes: dict[str, Tensor] = {}
        for name, tensor in self.model.state_dict().items():
            if not _INSIDE_ADAPTER.search(name):
                self.shapes[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
        mapping = get_model_conversion_mapping(self.model)
        self.renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        self.modules = {name.rpartition(".")[0] for name in self.shapes}

    def parameter(self, name: str) -> str:
        """The name of a parameter here; as it is, where it is known under no other."""
        if name in self.shapes:
            return name
        renamed, _ = rename_source_key(name, self.renamings, [], self.model.base_model_prefix, self.shapes)
        return renamed if renamed in self.shapes else name

    def module(self, name: str) -> str:
        """The name of a layer with weights here; as it is, where it is known under no other."""
        return name if name in self.modules else self.parameter(f"{name}.weight").removesuffix(".weight")

    def key(self, name: str) -> str:
        """The name of a saved adapter's tensor here."""
        path = name.removeprefix(PREFIX)
        module, lora, rest = path.partition(".lora_")
        if lora:
            return PREFIX + self.module(module) + lora + rest
        inside, base, leaf = path.rpartition(".base_layer.")
        if base:
            return PREFIX + self.module(inside) + base + leaf
        return PREFIX + self.parameter(path)


def in_layout(weights: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return an adapter's tensors under the names of the loaded model."""
    return {layout.key(name): tensor for name, tensor in weights.items()}


def fitted_config(folder: str | Path, weights: Mapping[str, Tensor], layout: Layout) -> LoraConfig:
    """Return an adapter's configuration for the loaded model, with exact names, ranks and scales of its layers.

    Args:
        folder: the adapter's.
        weights: from :func:`read_weights`.
        layout: of the model.

    Raises:
        AdapterError: it is of another kind than LoRA, began with weights of a changed base, says something that no
            tensor of it answers to, or holds tensors of the base itself that differ.
    """
    settings = read_settings(folder)
    if settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type")
        raise AdapterError(f"The adapter {folder} is of the kind {kind}; vlmtune takes LoRA adapters.")
    config = LoraConfig.from_pretrained(str(folder))
    if config.init_lora_weights not in PLAIN_STARTS:
        raise AdapterError(
            f"The adapter {folder} began with init_lora_weights={config.init_lora_weights!r}, which changed the "
            "weights of its base. Save it by PEFT's path_initial_model_for_weight_conversion, as a plain LoRA for the "
            "published base."
        )
    # All its first weights are replaced.
    config.init_lora_weights = False
    old_names = {layout.module(old): old for old in _adapted(weights)}
    _require_described(folder, config, weights, old_names, layout)
    config.target_modules = sorted(old_names)
    config.exclude_modules, config.layers_to_transform, config.layers_pattern = None, None, None
    for name, default in (("rank_pattern", config.r), ("alpha_pattern", config.lora_alpha)):
        exact = _exact(folder, name, getattr(config, name) or {}, old_names)
        setattr(config, name, {key: value for key, value in exact.items() if value != default})
    config.modules_to_save = _saved_modules(folder, config, weights, layout)
    return config


def _adapted(weights: Iterable[str]) -> set[str]:
    """Layers with adapters, in the names of the file."""
    return {name.removeprefix(PREFIX).partition(".lora_")[0] for name in weights if ".lora_" in name}


def _require_described(
    folder: str | Path, config: LoraConfig, weights: Iterable[str], old_names: Mapping[str, str], layout: Layout
) -> None:
    """Refuse a file that lacks layers which the configuration names, or has others than it and the model have."""
    if config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    kinds = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
    places = {_beginnings(new, old) for new, old in old_names.items()}
    named = set()
    for name, module in layout.model.named_modules():
        # A regular expression means the names of its time: `model.*` was Qwen's language model alone.
        then = {old + name.removeprefix(new) for new, old in places if name.startswith(new)}
        if isinstance(module, kinds) and any(check_target_module_exists(config, one) for one in then):
            named.add(name)
    absent = [f"{name}.lora_{side}.weight" for name in sorted(named - set(old_names)) for side in "AB"]
    strange = {
        old
        for new, old in old_names.items()
        if new not in layout.modules or not any(check_target_module_exists(config, name) for name in (old, new))
    }
    left_over = sorted(name for name in weights if name.removeprefix(PREFIX).partition(".lora_")[0] in strange)
    if absent or left_over:
        raise misfit(folder, layout.model, absent, left_over)


def _beginnings(new: str, old: str) -> tuple[str, str]:
    """The beginnings in which two names of one layer differ; empty where they are the same."""
    ours, theirs = new.split("."), old.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return "".join(f"{part}." for part in ours), "".join(f"{part}." for part in theirs)


def misfit(folder: str | Path, model: nn.Module, missing: Sequence[str], left_over: Sequence[str]) -> AdapterError:
    """Return the error that says how an adapter's tensors and a model differ."""
    base = base_model(model)
    name = getattr(base, "name_or_path", "") or type(base).__name__
    return AdapterError(
        f"The adapter {folder} does not fit the model {name}: {len(missing)} tensors are missing and "
        f"{len(left_over)} are left over, such as {[*missing, *left_over][0]}. It was saved with "
        f"{_saved_versions(folder)}; use the model and the library versions it was trained with."
    )


def _saved_versions(folder: str | Path) -> str:
    file = Path(folder) / ORIGIN_FILE
    if file.exists():
        saved = json.loads(file.read_text(encoding="utf-8"))["versions"]
        return ", ".join(f"{name} {saved[name]}" for name in ("transformers", "peft") if name in saved)
    version = read_settings(folder).get("peft_version")
    return f"peft {version}" if version else "unknown versions"


def _exact(folder: str | Path, option: str, pattern: Mapping[str, Any], old_names: Mapping[str, str]) -> dict[str, Any]:
    """Layer -> value, for the layers that a pattern speaks of, in the names that it was written in."""
    values = {new: get_pattern_key(pattern, old) for new, old in old_names.items()}
    if unused := [key for key in pattern if key not in values.values()]:
        raise AdapterError(
            f"The adapter {folder} has {option} for {unused[0]}, which is none of its layers; without it the adapter "
            f"would act otherwise than it was trained. Correct {option} in its adapter_config.json."
        )
    return {f"^{re.escape(new)}": pattern[key] for new, key in values.items() if key in pattern}


def _saved_modules(
    folder: str | Path, config: LoraConfig, weights: Mapping[str, Tensor], layout: Layout
) -> list[str] | None:
    """Modules trained in full, in the names of the loaded model."""
    found: dict[str, None] = {}
    asked = config.modules_to_save or []
    for name, tensor in weights.items():
        path = name.removeprefix(PREFIX)
        if ".lora_" in name or (config.bias != "none" and path.endswith(".bias")):
            continue
        parts = path.split(".")
        places = (".".join(parts[:end]) for end in range(1, len(parts)))
        # PEFT compares the ends of names.
        old = next((place for place in places if any(place.endswith(one) for one in asked)), None)
        here = layout.parameter(path)
        if old is None:
            # PEFT saves a head that is tied to a trained embedding beside it, and does not name it.
            tied = config.ensure_weight_tying and any(
                other.endswith("embed_tokens.weight") and torch.equal(weights[other], tensor) for other in weights
            )
            if not tied:
                _require_same_as_base(folder, name, tensor, layout.shapes.get(here))
            continue
        rest = path.removeprefix(old)
        if here in layout.shapes and here.endswith(rest):
            found[here.removesuffix(rest)] = None
    return list(found) or None


def _require_same_as_base(folder: str | Path, name: str, tensor: Tensor, base: Tensor | None) -> None:
    """Once tokens were added, PEFT and TRL save embedding and head with an adapter; equal ones are nothing new."""
    if base is None or (tensor.shape == base.shape and bool((base.detach().cpu().to(tensor.dtype) == tensor).all())):
        return
    what = f"{list(tensor.shape)}, and the model's is {list(base.shape)}" if tensor.shape != base.shape else "others"
    raise AdapterError(
        f"The adapter {folder} holds {name.removeprefix(PREFIX)}, which it does not name in modules_to_save, with "
        f"values other than the base model's ({what}): it was trained on a changed base, such as one with added "
        "tokens. Name that model as its base."
    )
