"""What other servers make of an adapter: they apply LoRA to the language model, and pass over or refuse the rest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vlmtune.errors import AdapterError
from vlmtune.models.adapter_files import read_settings
from vlmtune.models.family import Family

# vLLM puts LoRA on the tower and projector only by an experimental option; llama.cpp's converter takes adapters of
# the language model (docs.vllm.ai/en/stable/features/lora, llama.cpp's convert_lora_to_gguf.py).
SERVERS = "vLLM (by default) and llama.cpp"


def training_limits(settings: Mapping[str, Any]) -> list[str]:
    """Return what an adapter trained with these options holds that :data:`SERVERS` do not apply.

    Args:
        settings: ``lora_scopes``, ``train_parts``, ``use_dora``, ``lora_bias`` and ``modules_to_save``, as in a recipe.
    """
    in_full = [*(settings.get("train_parts") or ()), *(settings.get("modules_to_save") or ())]
    outside = [scope for scope in settings.get("lora_scopes") or () if scope != "language"]
    found = [f"LoRA on the {' and the '.join(outside)}"] if outside else []
    return found + _kinds(settings.get("use_dora"), settings.get("lora_bias"), in_full)


def adapter_limits(folder: str | Path, family: Family) -> list[str]:
    """Return what a saved adapter holds that :data:`SERVERS` do not apply.

    Raises:
        AdapterError: the adapter cannot be read.
    """
    settings = read_settings(folder)
    place = family.parts["language"] + "."
    try:
        with safe_open(str(Path(folder) / "adapter_model.safetensors"), framework="pt") as opened:
            names = [name.removeprefix("base_model.model.") for name in opened.keys() if ".lora_" in name]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"The weights of the adapter {folder} cannot be read ({error}). Copy it again.") from error
    parts = {str(part): path + "." for part, path in family.parts.items() if part in ("vision", "projector")}
    outside = [part for part, path in parts.items() if any(name.startswith(path) for name in names)]
    if not outside and any(not name.startswith(place) for name in names):
        outside = ["head"]
    found = [f"LoRA on the {' and the '.join(outside)}"] if outside else []
    return found + _kinds(settings.get("use_dora"), settings.get("bias"), settings.get("modules_to_save"))


def adapter_rank(folder: str | Path) -> int:
    """Return the largest rank of an adapter."""
    settings = read_settings(folder)
    return max(int(rank) for rank in (settings["r"], *(settings.get("rank_pattern") or {}).values()))


def _kinds(dora: Any, bias: Any, saved: Any) -> list[str]:
    found = ["DoRA"] if dora else []
    if bias not in (None, "none"):
        found.append("trained biases")
    if saved:
        found.append(f"modules trained in full ({', '.join(saved)})")
    return found
