"""How much memory a training run takes on each device, from the model's configuration alone.

Models of few layers are run on the meta device (:mod:`vlmtune.models.memory_trace`); since layers are alike, parameters
and kept bytes grow by the same amount with each, and the whole model's follow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from vlmtune.errors import ModelError
from vlmtune.models.families import get_family
from vlmtune.models.family import Size
from vlmtune.models.loading import limit_pixels, load_config, load_processor
from vlmtune.models.lora import prepare_full_finetuning, setup_lora
from vlmtune.models.memory_autocast import MetaAutocast
from vlmtune.models.memory_images import image_inputs
from vlmtune.models.memory_trace import Batch, Loss, StepMemory, trace_step
from vlmtune.models.precision import raise_trained
from vlmtune.models.quantization import get_torch_dtype
from vlmtune.models.sizing import count_parameters

# Bytes a trained number that optimizers keep, by what their names hold; others keep two numbers, as Adam does.
STATES = {"8bit": 2, "sgd": 0, "adafactor": 0, "lion": 4}
# Layers of the small models that are run, of text and of vision.
FEW, MORE = 2, 4


@dataclass(frozen=True)
class Settings:
    """What decides a run's memory.

    Attributes:
        batch: what a device takes at once.
        accumulation: batches of an optimizer step.
        checkpointing: activations are computed again in the backward pass.
        bits: of the frozen language weights: 4, 8, or 16 for unquantised.
        devices: of the run.
        strategy: ``ddp``, ``fsdp``, ``zero1``, ``zero2`` or ``zero3``.
        optim: name of the optimizer, as in ``transformers.TrainingArguments``.
        largest_images: the images' size is not known; ``batch.size`` has the most tokens of all.
    """

    batch: Batch = field(default_factory=Batch)
    accumulation: int = 1
    checkpointing: bool = False
    bits: int = 16
    devices: int = 1
    strategy: str = "ddp"
    optim: str = "adamw_torch"
    largest_images: bool = False


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device.

    Attributes:
        parts: part -> ``total``, ``trainable``, ``adapter`` parameters and ``bytes``, whole, before any division.
        kinds: kind of memory -> bytes at its most. Not all are at their most at once.
        total: bytes at the peak.
        image_tokens: soft tokens of a sample.
    """

    parts: dict[str, dict[str, int]]
    kinds: dict[str, int]
    total: int
    image_tokens: int


@dataclass(frozen=True)
class _Shared:
    """What one of several devices holds, and what it needs to talk with the others."""

    weights: int
    gradients: int
    optimizer: int
    communication: int


@dataclass
class _Small:
    """A model with few layers, ready to be traced."""

    model: Any
    parts: dict[str, dict[str, int]]
    linear: int
    rows: int
    block: int


@dataclass
class MemoryEstimator:
    """Estimates one model under any settings.

    Args:
        name: a model's folder or Hub name, of which only the configuration is read.
        loss: the loss over supervised positions, as training computes it.
        adapt: makes a model's weights trainable, as training does; LoRA on the language model by default.
        dtype: number format of the weights.
        autocast: number format of matrix products in mixed precision, or ``None``.
        device: ``cuda`` or ``cpu``, for what each computes in mixed precision.
        options: of :func:`~vlmtune.models.loading.load_config`.
        image_max_pixels: the most pixels of an image, as the run's processor resizes it.

    Raises:
        ModelError: no such model, or one of a family whose memory cannot be estimated.
        ConfigError: a family that has no such limit.
    """

    name: str | Path
    loss: Loss
    adapt: Callable[[nn.Module], nn.Module] = setup_lora
    dtype: str | torch.dtype = "auto"
    autocast: torch.dtype | None = None
    device: str = "cuda"
    options: Mapping[str, Any] = field(default_factory=dict)
    image_max_pixels: int | None = None

    def __post_init__(self) -> None:
        """Build the small models."""
        self.config = load_config(self.name, **self.options)
        self.family = get_family(self.config)
        if self.family.estimate_reason:
            raise ModelError(f"The memory of {self.family.name} cannot be estimated: {self.family.estimate_reason}.")
        if self.image_max_pixels is not None:
            self.limited(self.image_max_pixels)
        self.number_format = get_torch_dtype(self.dtype)
        self.layers = (_text(self.config).num_hidden_layers, _depth(self.config.vision_config))
        few, self.many = _run(_text(self.config), self.config.vision_config, self.layers)
        sizes = [self.many, (few[0], self.many[1]), (self.many[0], few[1])]
        self.small = [self._build(*size) for size in sizes]
        self.steps = tuple(max(many - one, 1) for many, one in zip(self.many, few, strict=True))
        self._traces: dict[Any, StepMemory] = {}
        self._images: dict[tuple[Size, int | None], dict[str, Tensor]] = {}

    def estimate(self, settings: Settings, *, largest: int = 0) -> Estimate:
        """Estimate the memory on each device under some settings.

        Args:
            settings: what decides it.
            largest: a larger batch that is traced too; what lies between it and one sample is then interpolated.
        """
        whole = {part: {key: self._grow([s.parts.get(part, {}).get(key, 0) for s in self.small]) for key in entry}
                 for part, entry in self.small[0].parts.items()}  # fmt: skip
        step = self._step(settings, largest)
        everything = whole["all"]
        weights = everything["bytes"] - self._saved_by_quantising(settings.bits)
        gradients = step.gradients
        optimizer = state_bytes(settings.optim, everything["trainable"], gradients)
        peak = step.accumulating if settings.accumulation > 1 else step.peak
        working = peak - step.vision - step.language
        if settings.bits < 16:
            # One layer's weights are unpacked at a time.
            working += self.small[0].block * self.number_format.itemsize
        shared = self._divide(settings, weights, gradients, optimizer)
        loss = min(step.loss, working)
        working = loss + max(working - loss - (gradients - shared.gradients), 0)
        kinds = {
            "weights": shared.weights,
            "gradients": shared.gradients,
            "optimizer states": shared.optimizer,
            "activations, vision": max(step.vision - step.features, 0),
            "activations, language": step.language,
            "image features": step.features,
            "logits and loss": loss,
            "working memory": max(working - max(loss, shared.gradients), 0),
            "communication": shared.communication,
        }
        total = shared.weights + shared.optimizer + step.vision + step.language + working + shared.communication
        return Estimate(whole, kinds, total, step.image_tokens)

    @cached_property
    def processor(self) -> Any:
        """The model's processor, which is loaded where images differ in size."""
        return load_processor(self.name, **self.options, image_max_pixels=self.image_max_pixels)

    def limited(self, pixels: int | None) -> Any:
        """The model's processor with a limit on an image's pixels.

        Raises:
            ConfigError: the family has no such limit, or none so small.
        """
        if pixels is None:
            return self.processor
        limited = copy.copy(self.processor)
        limited.image_processor = copy.copy(limited.image_processor)
        limit_pixels(limited, pixels)
        return limited

    @property
    def quantisable(self) -> bool:
        """Whether the weights that 4 bits are for are frozen."""
        return any(entry["adapter"] for entry in self.small[0].parts.values())

    def _step(self, settings: Settings, largest: int = 0) -> StepMemory:
        """Trace the batch, or take it from traces of one sample and of ``largest``.

        The peak is the largest of several sums that grow evenly with the batch, so a line between two traces lies
        above it.
        """
        samples = settings.batch.samples
        if samples in (1, largest) or not largest:
            return self._traced(settings)
        ends = [self._traced(replace(settings, batch=replace(settings.batch, samples=n))) for n in (1, largest)]
        share = (samples - 1) / (largest - 1)
        between = {
            f.name: round(getattr(ends[0], f.name) * (1 - share) + getattr(ends[1], f.name) * share)
            for f in fields(StepMemory)
        }
        return StepMemory(**between)

    def _traced(self, settings: Settings) -> StepMemory:
        key = (settings.batch, settings.checkpointing)
        if key not in self._traces:
            # The layers of a frozen tower leave nothing behind.
            frozen = not self.small[0].parts["vision"]["trainable"]
            found = [self._trace(small, *key) for small in self.small[: 2 if frozen else 3]]
            found += [found[0]] * (3 - len(found))
            grown = {f.name: self._grow([getattr(one, f.name) for one in found]) for f in fields(StepMemory)}
            self._traces[key] = StepMemory(**grown)
        return self._traces[key]

    def _trace(self, small: _Small, batch: Batch, checkpointing: bool) -> StepMemory:
        autocast = MetaAutocast(self.autocast, self.device)
        if checkpointing:
            # Inside of a backward pass no function mode is active by itself.
            again = {"context_fn": lambda: (nullcontext(), autocast)}
            small.model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False} | again)
        else:
            small.model.gradient_checkpointing_disable()
        image = self._image(batch.size, batch.image_max_pixels) if batch.size and batch.images else None
        return trace_step(small.model, self.family, batch, self.loss, autocast, image)

    def _image(self, size: Size, pixels: int | None) -> dict[str, Tensor]:
        if (size, pixels) not in self._images:
            self._images[size, pixels] = image_inputs(self.limited(pixels), self.family, size)
        return self._images[size, pixels]

    def _grow(self, values: list[int]) -> int:
        """From the small models' numbers to the whole model's: each further layer adds the same."""
        many, fewer_text, fewer_vision = values
        text = (many - fewer_text) / self.steps[0] * (self.layers[0] - self.many[0])
        vision = (many - fewer_vision) / self.steps[1] * (self.layers[1] - self.many[1])
        grown: int = round(many + text + vision)
        return grown

    def _build(self, text_layers: int, vision_layers: int) -> _Small:
        config = copy.deepcopy(self.config)
        text = _text(config)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:text_layers]
        text.num_hidden_layers = text_layers
        _shorten(config.vision_config, vision_layers)
        config._attn_implementation = self.family.attn_implementation
        # Parts that transformers makes by their own configuration follow what that says.
        for part in (config, text, config.vision_config):
            part.dtype = self.number_format
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.number_format)
        try:
            with torch.device("meta"):
                model: Any = getattr(transformers, self.family.model_class)(config)
        finally:
            torch.set_default_dtype(before)
        model.tie_weights()
        inside = self.family.parts["language"] + "."
        linear = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(inside)]
        adapted = self.adapt(model)
        if self.autocast is not None:
            raise_trained(adapted)
        return _Small(
            adapted,
            count_parameters(adapted),
            sum(weight.numel() for weight in linear),
            sum(weight.shape[0] for weight in linear),
            max((weight.numel() for weight in linear), default=0),
        )

    def _saved_by_quantising(self, bits: int) -> int:
        if bits == 16:
            return 0
        linear = self._grow([small.linear for small in self.small])
        rows = self._grow([small.rows for small in self.small])
        # 4 bits with doubly quantised scales: a byte for 64 weights, and a float32 for 256 of those.
        packed = linear // 2 + linear // 64 + 4 * linear // (64 * 256) if bits == 4 else linear + 4 * rows
        return linear * self.number_format.itemsize - packed

    def _divide(self, settings: Settings, weights: int, gradients: int, optimizer: int) -> _Shared:
        devices, strategy = settings.devices, settings.strategy
        if strategy.startswith("zero"):
            # DeepSpeed keeps float32 copies of the trained weights beside Adam's two numbers, and itself the format in
            # which it computes.
            trainable = self._grow([small.parts["all"]["trainable"] for small in self.small])
            optimizer = trainable * 12
            computed = trainable * (self.autocast or self.number_format).itemsize
            weights, gradients = weights - gradients + computed, computed
        if devices == 1:
            return _Shared(weights, gradients, optimizer, 0)
        if strategy == "ddp":
            # Buckets that are sent, beside the gradients themselves.
            return _Shared(weights, gradients, optimizer, gradients)
        own_gradients = gradients if strategy == "zero1" else gradients // devices
        if strategy in ("zero1", "zero2"):
            return _Shared(weights, own_gradients, optimizer // devices, 0)
        one, two = self.small[0].parts["all"]["total"], self.small[1].parts["all"]["total"]
        # The layer that computes, and the next, are gathered, in the format in which they compute.
        layer = (one - two) // self.steps[0] * self.number_format.itemsize
        return _Shared(weights // devices, own_gradients, optimizer // devices, 2 * layer)


def state_bytes(optim: str, trained: int, gradients: int) -> int:
    """Return the bytes that an optimizer keeps.

    Args:
        optim: its name.
        trained: numbers that are trained.
        gradients: bytes of their gradients.
    """
    known = next((numbers for name, numbers in STATES.items() if name in optim), None)
    return gradients * 2 if known is None else trained * known


def adapter_from(model_args: Any) -> Callable[[nn.Module], nn.Module]:
    """Return what makes a model's weights trainable as ``ModelWithLoRAArguments`` say."""
    if model_args.use_lora:
        # First weights have no values here, and take no memory that others do not.
        return lambda model: setup_lora(model, **(vars(model_args) | {"lora_init": "default"}))
    return lambda model: prepare_full_finetuning(model, parts=model_args.train_parts)


def _run(text_config: Any, vision_config: Any, layers: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many layers of text and vision the small models have, of all."""
    kinds = getattr(text_config, "layer_types", None) or ()
    # Linear attention keeps other tensors; it is repeated as often as up to where the other kind comes.
    period = kinds.index("full_attention") + 1 if "linear_attention" in kinds and "full_attention" in kinds else 0
    # Layers whose results go deeper into the language model are in all of them.
    deeper = len(_deeper(vision_config))
    few = (max(FEW, period), max(FEW, deeper))
    many = (max(MORE, 2 * period), max(MORE, deeper + FEW))
    return (
        (min(few[0], layers[0]), min(few[1], layers[1])),
        (min(many[0], layers[0]), min(many[1], layers[1])),
    )


def _text(config: Any) -> Any:
    return config.get_text_config()


def _depth(vision_config: Any) -> int:
    depth: int = getattr(vision_config, "depth", None) or vision_config.num_hidden_layers
    return depth


def _deeper(vision_config: Any) -> Sequence[int]:
    """The layers whose results are added deeper in the language model."""
    return getattr(vision_config, "deepstack_visual_indexes", None) or ()


def _shorten(vision_config: Any, layers: int) -> None:
    setattr(vision_config, "depth" if hasattr(vision_config, "depth") else "num_hidden_layers", layers)
    if deeper := _deeper(vision_config):
        vision_config.deepstack_visual_indexes = list(range(min(len(deeper), layers)))
    if hasattr(vision_config, "fullatt_block_indexes"):
        # Attention in windows keeps what that over the whole image does, and takes many calls.
        vision_config.fullatt_block_indexes = list(range(layers))
