"""Load configuration, processor and model, from a folder or the Hub, with errors that say what to do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.core_model_loading import WeightRenaming

from vlmtune.errors import AdapterError, ConfigError, ModelError
from vlmtune.models.checkpoint import adapter_base, attach_adapter, is_adapter_dir
from vlmtune.models.families import FAMILIES, get_family
from vlmtune.models.family import Family
from vlmtune.models.processors import load_auto_processor
from vlmtune.models.quantization import get_torch_dtype, require_language_only, unquantised_modules

logger = logging.getLogger("vlmtune.models")


def load_config(name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Return a model's configuration.

    Raises:
        ModelError: there is no such model, or its configuration cannot be read.
    """
    name = _expand(name)
    _require_model_folder(name)
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _not_found(name, error) from error


def load_processor(
    name: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    image_max_pixels: int | None = None,
) -> Any:
    """Return a model's processor: tokenizer, image processor and chat template.

    Args:
        name: a folder, or a name on the Hub.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run code from the model's repository.
        image_max_pixels: the processor resizes images of more pixels, and is saved so.

    Raises:
        ModelError: there is none, it is only a tokenizer, or it has no chat template.
        ConfigError: the family has no such limit, or none so small.
    """
    name = _expand(name)
    try:
        processor = load_auto_processor(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"The processor of {name} cannot be loaded ({_line(error)}). A vision-language model needs its tokenizer, "
            "processor_config.json or preprocessor_config.json, and chat template beside the weights: copy them from "
            "the original model."
        ) from error
    if not hasattr(processor, "image_processor"):
        raise ModelError(
            f"{name} has a tokenizer but no image processor, so it cannot take images. Choose a vision-language model, "
            "or copy preprocessor_config.json and processor_config.json from the original model."
        )
    rendered = {family.processor_class for family in FAMILIES.values() if family.render}
    if processor.chat_template is None and type(processor).__name__ not in rendered:
        raise ModelError(
            f"{name} has no chat template, so conversations cannot be rendered. Copy chat_template.jinja from the "
            "instruction-tuned model of the same family."
        )
    if image_max_pixels is not None:
        limit_pixels(processor, image_max_pixels)
    return processor


def limit_pixels(processor: Any, image_max_pixels: int) -> None:
    """Make a processor resize images of more pixels, in its family's manner; one with a lower limit keeps that.

    Raises:
        ConfigError: the family has no such limit, or none so small.
    """
    # Families that share a processor limit it alike, and an adapter's folder has no configuration to tell them apart.
    kind = type(processor).__name__
    family = next((family for family in FAMILIES.values() if family.processor_class == kind), None)
    if family is None:
        raise ConfigError(f"image_max_pixels cannot be used: how {kind} resizes images is not known. Leave it out.")
    try:
        family.limit_pixels(processor, image_max_pixels)
    except ValueError as error:
        raise ConfigError(
            f"image_max_pixels {image_max_pixels:,} cannot be used with {family.name}: {error}."
        ) from error


def load_model_for_training(
    model_name_or_path: str | Path,
    *,
    quantization_config: BitsAndBytesConfig | None = None,
    torch_dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: Any = None,
) -> nn.Module:
    """Load a vision-language model, of the class its configuration names, ready to be adapted or tuned.

    Args:
        model_name_or_path: a folder, or a name on the Hub.
        quantization_config: from :func:`~vlmtune.models.quantization.get_quantization_config`; the vision tower,
            projector and head are kept out of it.
        torch_dtype: number format of the weights.
        attn_implementation: attention code; ``sdpa`` by default.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run code from the model's repository.
        device_map: placement of the weights; the trainer places them by default.

    Raises:
        ModelError: no such model, one of text only, one that lacks weights, or weights that are not safetensors.
        ConfigError: a number format that the family cannot be trained in.
    """
    model_name_or_path = _expand(model_name_or_path)
    config = load_config(model_name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    family = get_family(config)
    dtype = get_torch_dtype(torch_dtype)
    require_dtype(family, dtype)
    if quantization_config is not None:
        quantization_config.llm_int8_skip_modules = unquantised_modules(family, config)
        if device_map is None and torch.cuda.is_available():
            device_map = {"": torch.cuda.current_device()}
    model = _load(
        model_name_or_path,
        family,
        config=config,
        quantization_config=quantization_config,
        dtype=dtype,
        attn_implementation=attn_implementation or family.attn_implementation,
        revision=revision,
        trust_remote_code=trust_remote_code,
        device_map=device_map,
    )
    if quantization_config is not None:
        require_language_only(model, family)
    # The cache of keys and values serves generation only; in training it costs memory.
    model.config.get_text_config().use_cache = False  # type: ignore[union-attr, operator]
    return model


def load_model_for_inference(
    model_name_or_path: str | Path,
    *,
    adapter: str | Path | None = None,
    torch_dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    image_max_pixels: int | None = None,
) -> tuple[nn.Module, Any]:
    """Load a model, with an adapter if there is one, ready to generate.

    Args:
        model_name_or_path: a model, or an adapter folder, whose base model is then loaded first.
        adapter: an adapter folder to put on the model.
        torch_dtype: number format of the weights.
        attn_implementation: attention code.
        quantization_config: as in :func:`load_model_for_training`.
        revision: as there.
        trust_remote_code: as there.
        device: where the model goes; a GPU if there is one.
        image_max_pixels: as in :func:`load_processor`; an adapter's own processor has the limit it was trained with.

    Returns:
        Model in evaluation mode and processor.

    Raises:
        ModelError: as :func:`load_model_for_training`.
        AdapterError: the adapter is of another model, or not whole.
        ConfigError: as :func:`load_processor`, before weights are loaded.
    """
    model_name_or_path, adapter = _expand(model_name_or_path), _expand(adapter) if adapter is not None else None
    if is_adapter_dir(model_name_or_path):
        if adapter is not None:
            raise AdapterError(f"{model_name_or_path} is an adapter itself; name its base model, or leave out adapter.")
        adapter = model_name_or_path
        model_name_or_path = adapter_base(adapter)
    elif adapter is not None and not is_adapter_dir(adapter):
        raise AdapterError(f"{adapter} is no adapter folder: it has no adapter_config.json. Name a run's output_dir.")
    origin: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    get_family(load_config(model_name_or_path, **origin))
    has_own = adapter is not None and (Path(adapter) / "processor_config.json").exists()
    processor = load_processor(
        adapter if has_own and adapter is not None else model_name_or_path,
        revision=None if has_own else revision,
        trust_remote_code=trust_remote_code,
        image_max_pixels=image_max_pixels,
    )
    model = load_model_for_training(
        model_name_or_path,
        quantization_config=quantization_config,
        torch_dtype=torch_dtype,
        attn_implementation=attn_implementation,
        **origin,
    )
    if adapter is not None:
        model = attach_adapter(model, adapter)
    model.config.get_text_config().use_cache = True  # type: ignore[union-attr, operator]
    if quantization_config is None:
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval(), processor


def require_dtype(family: Family, dtype: torch.dtype) -> None:
    """Refuse a number format that the family's activations do not fit into.

    Raises:
        ConfigError: with the reason.
    """
    name = str(dtype).removeprefix("torch.")
    if name in family.refused_dtypes:
        raise ConfigError(
            f"{family.name} cannot be used in {name}: {family.refused_dtypes[name]}. Use bfloat16, or float32 on "
            "hardware without it."
        )


def _load(name: str | Path, family: Family, **options: Any) -> nn.Module:
    model_class = getattr(transformers, family.model_class)
    try:
        model, info = model_class.from_pretrained(name, use_safetensors=True, output_loading_info=True, **options)
    except (ImportError, OSError, ValueError, RuntimeError, SafetensorError) as error:
        attention = options.get("attn_implementation")
        if attention and attention != family.attn_implementation and "attention" in str(error).lower():
            raise ConfigError(
                f"attn_implementation {attention} cannot be used with {name}: {_line(error)}. Leave the option out, or "
                "install what it needs."
            ) from error
        raise ModelError(
            f"The weights of {name} cannot be loaded: {_line(error)}. They must be whole, in safetensors files, and "
            f"of the class {family.model_class}."
        ) from error
    absent = sorted(info["missing_keys"])
    if absent:
        raise ModelError(
            f"{name} lacks {len(absent)} of the tensors of {family.model_class}, such as {absent[0]}; they would be "
            "random. Download or copy the model again."
        )
    # With ZeRO-3, transformers notes renamings that the files did not need, and would undo them when saving.
    if noted := getattr(model, "_weight_conversions", None):
        model._weight_conversions = [one for one in noted if one.was_used() or not isinstance(one, WeightRenaming)]
    loaded: nn.Module = model
    return loaded


def _expand(name: str | Path) -> str | Path:
    """The name with ``~`` replaced by the home directory; transformers does not do so."""
    return str(Path(name).expanduser()) if str(name).startswith("~") else name


def _require_model_folder(name: str | Path) -> None:
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").exists():
        hint = " It is an adapter; name its base model." if is_adapter_dir(folder) else ""
        raise ModelError(f"The folder {folder} holds no model: it has no config.json.{hint}")
    looks_local = str(name).startswith((".", "/")) or str(name).count("/") > 1
    if looks_local and not folder.exists():
        raise ModelError(
            f"There is no model at {name}. Correct model_name_or_path: a folder with config.json and safetensors "
            "weights, or a name on the Hugging Face Hub, such as google/gemma-3-4b-pt."
        )


def _not_found(name: str | Path, error: Exception) -> ModelError:
    if (Path(name) / "config.json").exists():
        return ModelError(f"The configuration of {name} cannot be read: {_line(error)}.")
    return ModelError(
        f"There is no model {name!s}: it is no folder here, and the Hugging Face Hub did not give it ({_line(error)}). "
        "Check the name; for a gated model such as Gemma, accept its licence on the Hub and log in by `hf auth login`; "
        "offline, name a folder."
    )


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= 240 else text[:240] + " ..."
