"""First weights of adapters that are taken from the base's own: PiSSA and LoftQ.

PiSSA (arXiv:2404.02948) moves the largest singular values of a weight into its adapter and trains on what is left:
``W = R + s B0 A0``. What it learned is ``s (B A - B0 A0)``, a plain adapter of twice the rank for the base as it was
published, and that is what is saved. LoftQ (arXiv:2310.08659) begins with the closest ``s B A`` to what quantising the
weight lost; such an adapter works on the quantised weights alone.

Shape legend: R rank, I inputs, O outputs of a layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from vlmtune.errors import AdapterError, ConfigError

PREFIX = "base_model.model."
# Where a PiSSA model keeps the adapter it began with, in the names of a saved adapter.
_START = "_vlmtune_start"
_START_NAME = "_vlmtune_lora_init"


def peft_start(kind: str, model: nn.Module, layers: Iterable[str], rank: int) -> bool | str:
    """Return PEFT's ``init_lora_weights`` for a ``lora_init`` of the options.

    Raises:
        ConfigError: the kind is unknown, or the layers cannot give such weights.
    """
    plain: dict[str, bool | str] = {"default": True, "gaussian": "gaussian", "pissa": "pissa", "loftq": True}
    if kind not in plain:
        raise ConfigError(f"lora_init is {kind!r}; it takes {', '.join(plain)}.")
    if kind not in ("pissa", "loftq"):
        return plain[kind]
    for name in layers:
        layer: Any = model.get_submodule(name)
        if rank > min(layer.in_features, layer.out_features):
            raise ConfigError(
                f"lora_init {kind} takes no rank above the size of a layer, and {name} is of "
                f"{layer.out_features} x {layer.in_features}; lower the rank {rank}."
            )
        if kind == "pissa" and not layer.weight.dtype.is_floating_point:
            raise ConfigError("lora_init pissa needs weights that are not quantised; take loftq for 4 bits.")
        if kind == "loftq" and getattr(layer.weight, "quant_type", None) != "nf4":
            raise ConfigError(f"lora_init loftq needs weights in 4 bits (nf4), and {name} is not. Set use_4bit: true.")
    return plain[kind]


def finish_start(adapted: nn.Module, kind: str) -> None:
    """Do what remains once the adapters are in place: keep PiSSA's start, or compute LoftQ's.

    Raises:
        ConfigError: the unquantised weights that LoftQ compares with are not at hand.
    """
    if kind == "pissa":
        state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        start = {name: tensor.detach().cpu().clone() for name, tensor in state.items() if _is_matrix(name)}
        setattr(adapted, _START, start)
    elif kind == "loftq":
        _start_with_loftq(adapted)
    setattr(adapted, _START_NAME, kind)


def start_of(adapted: nn.Module) -> str:
    """Return the ``lora_init`` an adapter began with."""
    return getattr(adapted, _START_NAME, "default")


def save_as_plain(adapted: nn.Module, folder: Path) -> None:
    """Make a PiSSA adapter that was just saved a plain one, ``[A; A0]`` and ``[B, -B0]``; leave any other as it is."""
    start: Mapping[str, Tensor] | None = getattr(adapted, _START, None)
    if start is None:
        return
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, first in start.items():
        tensor = tensors[name]
        both = [tensor, first.to(tensor.dtype)] if ".lora_A." in name else [tensor, -first.to(tensor.dtype)]
        tensors[name] = torch.cat(both, dim=0 if ".lora_A." in name else 1)
    save_file(tensors, file, metadata={"format": "pt"})
    config = folder / "adapter_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    # The scale stays what it was: alpha / rank, or alpha / sqrt(rank).
    alpha = 2**0.5 if settings["use_rslora"] else 2
    settings |= {"init_lora_weights": True, "r": settings["r"] * 2, "lora_alpha": settings["lora_alpha"] * alpha}
    for name, factor in (("rank_pattern", 2), ("alpha_pattern", alpha)):
        settings[name] = {key: value * factor for key, value in settings[name].items()}
    config.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def resume_from_plain(adapted: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapter that trains on, out of one that :func:`save_as_plain` wrote, for a model set up as before.

    The base takes up the difference between the start it was saved with and this one, which is nothing where both
    decompositions gave the same.

    Args:
        adapted: from ``setup_lora``.
        tensors: of the saved adapter, by name; of a plain adapter they are returned as they are.

    Raises:
        AdapterError: it was not saved from a PiSSA run of the same rank.
    """
    start: dict[str, Tensor] | None = getattr(adapted, _START, None)
    if start is None:
        return tensors
    trained, saved_start = dict(tensors), {}
    for name, first in start.items():
        axis = 0 if ".lora_A." in name else 1
        if name not in tensors or tensors[name].shape[axis] != 2 * first.shape[axis]:
            raise AdapterError(
                f"The checkpoint was not written by a run with lora_init pissa and this rank: see {name}."
            )
        trained[name], other = tensors[name].chunk(2, dim=axis)
        saved_start[name] = other if axis == 0 else -other
    for name, module in adapted.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        keys = [f"{name}.lora_{side}.weight" for side in "AB"]
        a, b = (start[key] for key in keys)
        a0, b0 = (saved_start[key] for key in keys)
        if torch.equal(a, a0) and torch.equal(b, b0):
            continue
        weight: Any = module.get_base_layer().weight
        difference = module.scaling["default"] * (b.float() @ a.float() - b0.float() @ a0.float())
        weight.data = (weight.data.float() + difference.to(weight.device)).to(weight.dtype)
    setattr(adapted, _START, saved_start)
    return {name: tensor.contiguous() for name, tensor in trained.items()}


def _is_matrix(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


@torch.no_grad()
def _start_with_loftq(adapted: nn.Module) -> None:
    import bitsandbytes.functional as bnb

    layers = {n.removeprefix(PREFIX): m for n, m in adapted.named_modules() if isinstance(m, LoraLayer)}
    waiting = set(layers)
    for name, whole in _unquantised_weights(adapted.get_base_model(), waiting):  # type: ignore[operator]
        layer = layers[name]
        packed = layer.get_base_layer().weight
        lost_OI = whole.to(packed.device).float() - bnb.dequantize_4bit(packed.data, packed.quant_state).float()
        left_OR, values_R, right_RI = torch.linalg.svd(lost_OI, full_matrices=False)
        rank = layer.r["default"]
        root_R = (values_R[:rank] / layer.scaling["default"]).sqrt()
        layer.lora_A["default"].weight.copy_(root_R[:, None] * right_RI[:rank])
        layer.lora_B["default"].weight.copy_(left_OR[:, :rank] * root_R)
        waiting.discard(name)
    if waiting:
        raise ConfigError(
            f"lora_init loftq finds no unquantised weight of {len(waiting)} layers in the model's files, such as "
            f"{min(waiting)}. Name the unquantised model, or take another lora_init."
        )


def _unquantised_weights(model: Any, layers: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield (layer, weight) of the layers, from the files the model was loaded from, one tensor at a time."""
    folder = Path(str(model.name_or_path))
    if not folder.is_dir():
        revision = getattr(model.config, "_commit_hash", None)
        folder = Path(snapshot_download(str(folder), revision=revision, local_files_only=True))
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder)
        empty = type(model)(config)
    mapping = get_model_conversion_mapping(empty)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if not isinstance(one, WeightRenaming)]
    shapes = empty.state_dict()
    wanted = {f"{layer}.weight": layer for layer in layers}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                place, converted = rename_source_key(key, renamings, converters, empty.base_model_prefix, shapes)
                if converted is None and place in wanted:
                    yield wanted[place], opened.get_tensor(key)
