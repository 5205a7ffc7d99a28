"""Quantisation of the frozen language weights by bitsandbytes, checked against what was really quantised."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from vlmtune.config import QuantizationArguments
from vlmtune.errors import ConfigError, MissingDependencyError, ModelError, nearest
from vlmtune.models.family import Family

DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
}
QUANT_TYPES = ("nf4", "fp4")
# Parts that stay in 16 or 32 bits: they are small, and their errors reach every token.
UNQUANTISED = ("vision", "projector", "head")


def get_torch_dtype(name: str | torch.dtype | None = "auto") -> torch.dtype:
    """Return the number format of a name; ``auto`` is bfloat16 where the hardware computes in it, else float32.

    Raises:
        ConfigError: the name is unknown.
    """
    if isinstance(name, torch.dtype):
        return name
    if name in ("auto", None):
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    short = str(name).removeprefix("torch.")
    if short not in DTYPES:
        raise ConfigError(f"torch_dtype {name!r} is unknown; use auto, {', '.join(DTYPES)}.{nearest(short, DTYPES)}")
    return DTYPES[short]


def get_quantization_config(
    use_4bit: bool = False,
    use_8bit: bool = False,
    *,
    bnb_4bit_quant_type: str = "nf4",
    bnb_4bit_compute_dtype: str | torch.dtype = "auto",
    bnb_4bit_use_double_quant: bool = True,
    bnb_4bit_quant_storage: str | torch.dtype | None = None,
) -> BitsAndBytesConfig | None:
    """Return the bitsandbytes configuration, or ``None`` when no quantisation is asked for.

    Which modules stay unquantised is filled in by :func:`~vlmtune.models.loading.load_model_for_training`,
    from the loaded family.

    Args:
        use_4bit: quantise to 4 bits.
        use_8bit: quantise to 8 bits.
        bnb_4bit_quant_type: ``nf4`` or ``fp4``.
        bnb_4bit_compute_dtype: number format that weights are unpacked to.
        bnb_4bit_use_double_quant: quantise the scales too.
        bnb_4bit_quant_storage: number format in which packed weights are kept. FSDP shares out floating-point ones
            alone; by default they are bytes.

    Raises:
        ConfigError: both at once, or an unknown type.
        MissingDependencyError: bitsandbytes is not installed.
    """
    if use_4bit and use_8bit:
        raise ConfigError("use_4bit and use_8bit are both on; choose one of them.")
    if not (use_4bit or use_8bit):
        return None
    if bnb_4bit_quant_type not in QUANT_TYPES:
        raise ConfigError(
            f"bnb_4bit_quant_type {bnb_4bit_quant_type!r} is unknown; use {' or '.join(QUANT_TYPES)}."
            f"{nearest(bnb_4bit_quant_type, QUANT_TYPES)}"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        option = "use_4bit" if use_4bit else "use_8bit"
        raise MissingDependencyError(
            f"{option} needs the package bitsandbytes, which is not installed. Install it by: "
            "pip install 'vlmtune[quantization]' (or: pip install bitsandbytes), or turn the option off."
        )
    if use_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=bnb_4bit_quant_type,
        bnb_4bit_compute_dtype=get_torch_dtype(bnb_4bit_compute_dtype),
        bnb_4bit_use_double_quant=bnb_4bit_use_double_quant,
        bnb_4bit_quant_storage=None if bnb_4bit_quant_storage is None else get_torch_dtype(bnb_4bit_quant_storage),
    )


def quantization_of(
    arguments: QuantizationArguments, torch_dtype: str | torch.dtype, *, sharded: bool = False
) -> BitsAndBytesConfig | None:
    """Return the configuration that options ask for; ``auto`` computes in the number format of the weights.

    Args:
        arguments: the options.
        torch_dtype: number format of the weights.
        sharded: the weights are to be shared out by FSDP.
    """
    compute_dtype = arguments.bnb_4bit_compute_dtype
    return get_quantization_config(
        arguments.use_4bit,
        arguments.use_8bit,
        bnb_4bit_quant_type=arguments.bnb_4bit_quant_type,
        bnb_4bit_compute_dtype=torch_dtype if compute_dtype == "auto" else compute_dtype,
        bnb_4bit_use_double_quant=arguments.bnb_4bit_use_double_quant,
        bnb_4bit_quant_storage=torch_dtype if sharded else None,
    )


def unquantised_modules(family: Family, config: Any) -> list[str]:
    """Full names of the modules that stay unquantised; transformers anchors its patterns to full names.

    Args:
        family: the model's record.
        config: the model's configuration; what it has beside the parts, such as an audio tower, stays as it is too.
    """
    names = [family.parts[part] for part in UNQUANTISED if part in family.parts]  # type: ignore[index]
    return [*names, *(name for name in family.unused(config) if not name.startswith(tuple(names)))]


def quantised_modules(model: nn.Module) -> list[str]:
    """Names of the modules whose weights bitsandbytes holds."""
    return [name for name, module in model.named_modules() if _is_quantised(module)]


def require_language_only(model: nn.Module, family: Family) -> None:
    """Check that the language model, and nothing else, was quantised.

    Raises:
        ModelError: a module outside it was, or nothing at all.
    """
    names, inside = quantised_modules(model), family.parts["language"] + "."
    outside = [name for name in names if not name.startswith(inside)]
    if outside:
        raise ModelError(
            f"{len(outside)} modules outside the language model were quantised, such as {outside[0]}; training them "
            "would damage what the model sees. Turn quantisation off, and report this with your versions."
        )
    if not names:
        raise ModelError("Quantisation was asked for, but no module was quantised. Turn it off or report this.")


def _is_quantised(module: nn.Module) -> bool:
    parameter: Any = getattr(module, "weight", None)
    return type(parameter).__name__ in ("Params4bit", "Int8Params") and type(module).__module__.startswith(
        "bitsandbytes"
    )
