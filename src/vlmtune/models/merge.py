"""Merge an adapter into its base checkpoint, tensor by tensor, in the checkpoint's own layout.

The files of the merged model have the headers of the base's: the same names, shapes, number formats and order. Only
the bytes of changed tensors differ. No more than one tensor is in memory at a time, beside the adapter.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.conversion_mapping import get_model_conversion_mapping

from vlmtune.errors import AdapterError, ModelError
from vlmtune.models.adapter_files import Layout, fitted_config, read_settings, read_weights
from vlmtune.models.checkpoint import load_adapter
from vlmtune.models.families import get_family
from vlmtune.models.family import Family
from vlmtune.models.loading import load_config
from vlmtune.models.places import empty_model, find_places
from vlmtune.models.quantization import unquantised_modules

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MERGE_FILE = "vlmtune_merge.json"
COPY_AT_ONCE = 2**24
# Kinds of LoRA whose effect is no sum of matrices.
UNMERGEABLE = {
    "alora_invocation_tokens": "it acts on some tokens only",
    "layer_replication": "it repeats layers that the base has once",
    "trainable_token_indices": "it trains single rows of the token embedding",
    "target_parameters": "it adapts bare parameters",
    "lora_bias": "its layers have biases that the base lacks",
    "use_qalora": "it pools its inputs",
    "use_bdlora": "its matrices are block-diagonal",
    "arrow_config": "it routes between adapters",
    "velora_config": "it is no plain LoRA",
    "monteclora_config": "it is no plain LoRA",
    "kasa_config": "it is no plain LoRA",
}
FORMATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Merged:
    """What was written.

    Attributes:
        changed: names of the tensors, in the checkpoint's layout, that differ from the base's.
        dtype: the number format of most of them.
    """

    changed: list[str] = field(default_factory=list)
    dtype: torch.dtype = torch.float32


def merge_weights(
    base: str | Path, adapter: str | Path, output_dir: Path, *, dequantise: BitsAndBytesConfig | None = None
) -> Merged:
    """Write the base's files with the adapter merged into its weights.

    Args:
        base: folder or Hub name of the 16- or 32-bit base model.
        adapter: folder of a LoRA adapter (plain, rsLoRA or DoRA, with or without modules trained in full).
        output_dir: an empty folder.
        dequantise: round the language model's linear weights as this quantisation does, before merging.

    Raises:
        ModelError: the base is quantised, or its files are damaged.
        AdapterError: the adapter does not fit the base, or is of a kind that cannot be merged; it is named.
    """
    folder, shards, plan = _prepare(base, adapter, dequantise)
    changed, dtypes = list[str](), list[str]()
    for file in shards:
        with file.open("rb") as source, (output_dir / file.name).open("wb") as target:
            for name, kind in _copy_shard(source, target, plan.change):
                changed.append(name)
                dtypes.append(kind)
    _copy_other_files(folder, output_dir)
    most = max(set(dtypes), key=dtypes.count, default="F32")
    return Merged(changed, FORMATS[most])


def require_mergeable(base: str | Path, adapter: str | Path) -> None:
    """Find out, without reading a weight of the base, whether an adapter can be merged into it.

    Raises:
        ModelError: as :func:`merge_weights`.
        AdapterError: as there.
    """
    _prepare(base, adapter, None)


def _prepare(
    base: str | Path, adapter: str | Path, dequantise: BitsAndBytesConfig | None
) -> tuple[Path, list[Path], _Plan]:
    folder = checkpoint_folder(base, revision=read_settings(adapter).get("revision"))
    config = load_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"The base model {base} is quantised itself; an adapter is merged on 16- or 32-bit weights. Name the "
            "unquantised model as base_model."
        )
    plan = _Plan(config, get_family(config), adapter, dequantise)
    shards = weight_files(folder)
    plan.bind([name for file in shards for name in _tensor_names(file)])
    return folder, shards, plan


def checkpoint_folder(name: str | Path, *, revision: str | None = None) -> Path:
    """Return the folder of a model's files; those of a Hub name are downloaded once.

    Raises:
        ModelError: there is no such model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    load_config(name, revision=revision)
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*"]
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ModelError(f"The files of {name} cannot be had ({' '.join(str(error).split())[:200]}).") from error


def weight_files(folder: Path) -> list[Path]:
    """Return a checkpoint's weight files in their order.

    Raises:
        ModelError: there are none, or one that the index names is missing.
    """
    index = folder / INDEX
    names = [SINGLE]
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise ModelError(f"{folder} lacks {', '.join(absent)}; the weights must be whole, in safetensors files.")
    return [folder / name for name in names]


class _Plan:
    """Says for each tensor of the checkpoint what it becomes."""

    def __init__(self, config: Any, family: Family, adapter: str | Path, dequantise: BitsAndBytesConfig | None) -> None:
        self.adapter = adapter
        self.dequantise = dequantise
        self.language = family.parts["language"] + "."
        self.unquantised = tuple(unquantised_modules(family, config))
        kind = read_settings(adapter).get("peft_type")
        if kind != "LORA":
            raise AdapterError(f"The adapter {adapter} is of the kind {kind}; only LoRA adapters are merged here.")
        _require_mergeable(LoraConfig.from_pretrained(str(adapter)), adapter)
        self.model: Any = empty_model(config, family)
        self.mapping = get_model_conversion_mapping(self.model)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        self.tied: dict[str, str] = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        _give_placeholders(self.model)
        self.model.tie_weights()
        settings = fitted_config(adapter, read_weights(adapter), Layout(self.model))
        settings.inference_mode = True
        with warnings.catch_warnings():
            # Tied modules are looked at in `bind`.
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
            self.peft: PeftModel = get_peft_model(self.model, settings)
        load_adapter(self.peft, adapter)
        self.bias = settings.bias
        self.places: dict[str, str] = {}

    def bind(self, names: Iterable[str]) -> None:
        """Match the checkpoint's names with the model's, and refuse what would be lost."""
        self.places = find_places(self.model, self.mapping, self.shapes, names)
        wanted = set(self._adapted())
        groups = {frozenset((one, other)) for one, other in self.tied.items()}
        for one, other in (sorted(group) for group in groups):
            if one in wanted or other in wanted:
                self._require_alike(one, other, wanted)
        stored = set(self.places.values())
        partners = {one: other for pair in self.tied.items() for one, other in (pair, pair[::-1])}
        lost = sorted(name for name in wanted if name not in stored and partners.get(name) not in stored)
        if lost:
            raise AdapterError(
                f"{len(lost)} tensors that the adapter {self.adapter} changes have no place of their own in the "
                f"base's files, such as {lost[0]}; it cannot be merged. Serve the adapter beside its base."
            )

    def change(self, name: str, load: Callable[[], Tensor]) -> Tensor | None:
        """Return what the tensor of the checkpoint becomes, or ``None`` where it stays."""
        place = self.places.get(name)
        if place is None:
            return None
        module, leaf = self._owner(place)
        if isinstance(module, LoraLayer):
            if leaf == "weight":
                return self._merge(module, self._rounded(place, load()), place)
            return getattr(module.get_base_layer(), leaf).detach() if self._trains_bias(module, leaf) else None
        if self._is_saved_in_full(place) or self._trains_bias(module, leaf):
            return getattr(module, leaf).detach()  # type: ignore[no-any-return]
        if self.dequantise is not None and self._is_quantised(place, module):
            return self._rounded(place, load())
        return None

    def _merge(self, layer: LoraLayer, weight: Tensor, place: str) -> Tensor:
        base: Any = layer.get_base_layer()
        empty = base.weight
        base.weight = nn.Parameter(weight.float(), requires_grad=False)
        try:
            layer.merge(safe_merge=True)
            merged: Tensor = base.weight.detach()
        except (ValueError, NotImplementedError) as error:
            raise AdapterError(f"The adapter {self.adapter} cannot be merged into {place}: {error}") from error
        finally:
            base.weight = empty
            layer.merged_adapters.clear()
        return merged

    def _rounded(self, place: str, weight: Tensor) -> Tensor:
        if self.dequantise is None or not self._is_quantised(place, self._owner(place)[0]):
            return weight
        return round_as_quantised(weight, self.dequantise)

    def _is_quantised(self, place: str, module: Any) -> bool:
        base = module.get_base_layer() if isinstance(module, LoraLayer) else module
        outside = not place.startswith(self.language) or place.startswith(self.unquantised)
        return isinstance(base, nn.Linear) and place.endswith(".weight") and not outside

    def _owner(self, place: str) -> tuple[Any, str]:
        """The module that holds the value of a parameter, inside what PEFT has put around it, and its last name."""
        *path, leaf = place.split(".")
        module: Any = self.model
        for part in path:
            module = _inside(module)
            module = module.get_base_layer() if isinstance(module, LoraLayer) else module
            module = getattr(module, part)
        return _inside(module), leaf

    def _is_saved_in_full(self, place: str) -> bool:
        module: Any = self.model
        for part in place.split(".")[:-1]:
            module = getattr(module, part)
            if isinstance(module, ModulesToSaveWrapper):
                return True
        return False

    def _trains_bias(self, module: Any, leaf: str) -> bool:
        return leaf == "bias" and (self.bias == "all" or (self.bias == "lora_only" and isinstance(module, LoraLayer)))

    def _adapted(self) -> Iterator[str]:
        for place in self.shapes:
            module, leaf = self._owner(place)
            adapted = isinstance(module, LoraLayer) and leaf == "weight"
            if adapted or self._is_saved_in_full(place) or self._trains_bias(module, leaf):
                yield place

    def _require_alike(self, one: str, other: str, wanted: set[str]) -> None:
        values = []
        for place in (one, other):
            module, leaf = self._owner(place)
            values.append(getattr(module, leaf) if place in wanted and not isinstance(module, LoraLayer) else None)
        if values[0] is None or values[1] is None or not torch.equal(values[0], values[1]):
            changed = one if one in wanted else other
            raise AdapterError(
                f"The adapter {self.adapter} changes {changed}, which in the base is one tensor with "
                f"{other if changed == one else one}; merged, both would change. Serve the adapter beside its base, or "
                "train without it in modules_to_save."
            )


def round_as_quantised(weight: Tensor, config: BitsAndBytesConfig) -> Tensor:
    """Return a weight as bitsandbytes gives it back after quantising it.

    Args:
        weight: of a linear layer, of any floating dtype.
        config: 4 or 8 bits, and the 4-bit kind.
    """
    import bitsandbytes.functional as bnb

    if config.load_in_8bit:
        values, scales, _ = bnb.int8_vectorwise_quant(weight.half())
        return values.float() * scales.float()[:, None] / 127.0  # type: ignore[no-any-return]
    packed, state = bnb.quantize_4bit(
        weight.to(config.bnb_4bit_compute_dtype).contiguous(),
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
    )
    return bnb.dequantize_4bit(packed, state).reshape(weight.shape)  # type: ignore[no-any-return]


def _inside(module: Any) -> Any:
    if isinstance(module, ModulesToSaveWrapper):
        return module.modules_to_save[module.active_adapters[0]]
    return module


def _require_mergeable(settings: Any, adapter: str | Path) -> None:
    for name, reason in UNMERGEABLE.items():
        if getattr(settings, name, None):
            raise AdapterError(f"The adapter {adapter} was trained with {name}: {reason}, so it cannot be merged.")


def _give_placeholders(model: nn.Module) -> None:
    """Replace meta parameters: PEFT puts adapters on the device of their layer, and meta holds no values.

    A matrix becomes one number, seen at every place; vectors are whole, as a trained bias is loaded into them.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            whole = parameter.dim() < 2
            filled = torch.zeros(parameter.shape) if whole else torch.zeros(()).expand(parameter.shape)
            setattr(module, name, nn.Parameter(filled, requires_grad=False))


def _tensor_names(file: Path) -> list[str]:
    try:
        # Checks the whole header: offsets, sizes, the file's length.
        with safe_open(str(file), framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is no whole safetensors file ({error}). Download or copy it again.") from error


def _copy_shard(
    source: BinaryIO, target: BinaryIO, change: Callable[[str, Callable[[], Tensor]], Tensor | None]
) -> Iterator[tuple[str, str]]:
    """Copy one safetensors file, with changed tensors in their old places; yield (name, format) of those.

    Layout (github.com/huggingface/safetensors): 8 bytes with the header's length, the JSON header, the tensors.
    """
    start = source.read(8)
    raw = source.read(int.from_bytes(start, "little"))
    target.write(start + raw)
    begin = len(start) + len(raw)
    header = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        source.seek(begin + first)
        kind = FORMATS.get(entry["dtype"])
        new = None if kind is None else change(name, lambda e=entry, n=last - first: _read(source, e, n))  # type: ignore[misc]
        if new is None:
            source.seek(begin + first)
            _copy(source, target, last - first)
            continue
        if list(new.shape) != entry["shape"]:
            raise AdapterError(f"{name} would become {list(new.shape)}; the base's is {entry['shape']}.")
        stored = new.to(kind).contiguous()
        if not torch.isfinite(stored).all():
            raise AdapterError(f"{name} would hold values that are infinite or no number in {entry['dtype']}.")
        target.write(stored.view(-1).view(torch.uint8).numpy().data)
        yield name, entry["dtype"]


def _read(source: BinaryIO, entry: dict[str, Any], size: int) -> Tensor:
    buffer = torch.empty(size, dtype=torch.uint8)
    source.readinto(buffer.numpy().data)  # type: ignore[attr-defined]
    return buffer.view(FORMATS[entry["dtype"]]).view(entry["shape"])


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        part = source.read(min(size, COPY_AT_ONCE))
        target.write(part)
        size -= len(part)


def _copy_other_files(folder: Path, output_dir: Path) -> None:
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith(".") and file.suffix in (".json", ".model", ".txt", ".jinja"):
            shutil.copyfile(file, output_dir / file.name)
    for licence in folder.glob("LICENSE*"):
        shutil.copyfile(licence, output_dir / licence.name)
