"""Save models and adapters whole, and load them strictly: a tensor too few or too many is an error."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn

from vlmtune.errors import AdapterError, ResumeError
from vlmtune.models.adapter_files import (
    ORIGIN_FILE,
    Layout,
    fitted_config,
    in_layout,
    misfit,
    read_settings,
    read_weights,
)
from vlmtune.models.lora_init import resume_from_plain, save_as_plain, start_of
from vlmtune.models.precision import lowered
from vlmtune.models.provenance import base_fingerprint, base_model, quantization_record, versions


def save_model_and_processor(
    model: nn.Module,
    processor: Any,
    output_dir: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    fingerprint: str | None = None,
    formats: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Write a full model, or the adapter of an adapted one, always with processor and chat template.

    Args:
        model: a model, adapted by PEFT or not.
        processor: its processor, saved beside it.
        output_dir: folder; made when absent.
        state_dict: the tensors, where sharded training has gathered them already.
        fingerprint: of the base weights, where they are sharded and cannot be read here.
        formats: number formats that tensors of a full model are rounded to, by name.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        # By default PEFT asks the Hub whether the embedding has grown; adapters here never adapt it.
        model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
        save_as_plain(model, folder)
    else:
        text_config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
        cached = text_config.use_cache
        if formats:
            state_dict = lowered(model.state_dict(keep_vars=True) if state_dict is None else state_dict, formats)
        # Training turns the cache off; whoever loads the model generates with it.
        text_config.use_cache = True
        try:
            model.save_pretrained(folder, state_dict=state_dict)  # type: ignore[operator]
            if formats:
                # It has written the format of the weights as they are.
                model.config.dtype = next(iter(formats.values()))
                model.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
        finally:
            text_config.use_cache = cached
    processor.save_pretrained(folder)
    base = base_model(model)
    origin = {
        "base_model": str(base.name_or_path),
        "base_fingerprint": fingerprint or base_fingerprint(model),
        "quantization": quantization_record(base),
        "lora_init": start_of(model),
        "versions": versions(),
    }
    (folder / ORIGIN_FILE).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def is_adapter_dir(folder: str | Path) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(folder) / "adapter_config.json").is_file()


def adapter_base(folder: str | Path) -> str:
    """Return the name or folder of the model that an adapter was trained on.

    Raises:
        AdapterError: the adapter does not say, or the folder it names is gone.
    """
    name = read_settings(folder).get("base_model_name_or_path")
    if not name:
        raise AdapterError(f"{folder} does not say which model it was trained on. Name the model, and it as adapter.")
    if str(name).startswith("/") and not Path(name).exists():
        raise AdapterError(
            f"The adapter {folder} was trained on {name}, which is no longer there. Name the model's new place, and "
            "the adapter as adapter."
        )
    return str(name)


def saved_quantization(folder: str | Path) -> dict[str, Any] | None:
    """Return the options of the quantisation an adapter was trained on, or ``None`` where its record names none."""
    found = _origin(folder).get("quantization")
    return None if found is None else dict(found)


def saved_start(folder: str | Path) -> str:
    """Return the ``lora_init`` of an adapter."""
    return str(_origin(folder).get("lora_init", "default"))


def _origin(folder: str | Path) -> dict[str, Any]:
    """The record beside an adapter of vlmtune; empty for another tool's."""
    file = Path(folder) / ORIGIN_FILE
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def attach_adapter(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> PeftModel:
    """Put a saved adapter on its base model, whichever tool and version of transformers it is from.

    Args:
        model: the base model.
        folder: the adapter's.
        trainable: leave its weights trainable.

    Raises:
        AdapterError: the adapter belongs to another model, or lacks or has tensors that do not fit.
    """
    read_settings(folder)
    _require_same_base(model, folder)
    weights, layout = read_weights(folder), Layout(model)
    config = fitted_config(folder, weights, layout)
    config.inference_mode = not trainable
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise AdapterError(f"The adapter {folder} does not fit the model {_name(model)}: {error}") from error
    _load(adapted, folder, in_layout(weights, layout))
    return adapted


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Load an adapter's weights into a model that has its layers, strictly.

    Raises:
        AdapterError: a tensor is missing, left over, or of another shape.
    """
    _load(model, folder, in_layout(read_weights(folder), Layout(model)))


def _load(model: nn.Module, folder: str | Path, weights: dict[str, Tensor]) -> None:
    try:
        result = set_peft_model_state_dict(model, resume_from_plain(model, weights))
    except (RuntimeError, KeyError, ValueError) as error:
        raise AdapterError(
            f"The adapter {folder} does not fit the model {_name(model)}: {' '.join(str(error).split())[:300]}"
        ) from error
    missing = sorted(_saved_names(model) & set(result.missing_keys))
    unexpected = sorted(result.unexpected_keys)
    if missing or unexpected:
        raise misfit(folder, model, missing, unexpected)


def load_full_weights(
    model: nn.Module, folder: str | Path, *, into: Callable[[nn.Module, Mapping[str, Tensor]], None] | None = None
) -> None:
    """Load a full model's weights into ``model``, strictly and with transformers' own key mapping.

    A saved model has the layout of the original checkpoint, which differs from the module names in memory; a
    plain ``load_state_dict`` would pass over most tensors.

    Args:
        model: of the same layout.
        folder: a saved model's.
        into: puts whole tensors into a model whose own are shared out; by default they are copied.

    Raises:
        ResumeError: a tensor is missing, left over, or of another shape.
    """
    # Trained weights may have more bits than frozen ones.
    floating = (parameter for parameter in model.parameters() if parameter.is_floating_point())
    dtype = max(floating, key=lambda parameter: parameter.itemsize).dtype
    try:
        loaded, info = type(model).from_pretrained(  # type: ignore[attr-defined]
            str(folder), config=model.config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ResumeError(f"The weights in {folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise ResumeError(
            f"{folder} does not hold this model: {len(info['missing_keys'])} tensors are missing and "
            f"{len(info['unexpected_keys'])} are left over, such as {wrong[0]}."
        )
    if into is not None:
        into(model, loaded.state_dict())
    else:
        model.load_state_dict(loaded.state_dict(), strict=True)


def _require_same_base(model: nn.Module, folder: str | Path) -> None:
    origin = _origin(folder)
    if origin and origin["base_fingerprint"] != base_fingerprint(model):
        raise AdapterError(
            f"The adapter {folder} was trained on {origin['base_model']}, whose weights are others than those of "
            f"{_name(model)}. Load it on the model it was trained on."
        )
    if origin.get("lora_init") == "loftq" and quantization_record(base_model(model)) is None:
        raise AdapterError(
            f"The adapter {folder} began with lora_init loftq: it makes up for what 4 bits lost of the weights, and "
            f"would add that to whole ones. Load {_name(model)} in 4 bits (use_4bit: true)."
        )


def _saved_names(model: nn.Module) -> set[str]:
    """Names of the tensors that PEFT saves: adapters, modules trained in full, and biases where they are trained."""
    kept: dict[str, tuple[str, ...]] = {"none": (), "lora_only": (".base_layer.bias",), "all": (".bias",)}
    bias = kept[next(iter(model.peft_config.values())).bias]  # type: ignore[operator]
    return {
        name
        for name, _ in model.named_parameters()
        if ".lora_" in name or ".modules_to_save." in name or (name.endswith(bias) and ".original_module." not in name)
    }


def _name(model: nn.Module) -> str:
    base = base_model(model)
    return str(getattr(base, "name_or_path", "") or type(base).__name__)
