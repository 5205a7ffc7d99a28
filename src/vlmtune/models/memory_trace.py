"""How much memory one training step takes, counted on the meta device, where tensors have shapes and no values.

The model's own code runs, forward and backward, so whatever a family computes is counted as it is. Only attention is
replaced, since its fused kernels keep other tensors than its definition would.

Shape legend: B samples, L tokens, H hidden features, A heads, D features of a head, N supervised tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from vlmtune.models.family import Family, Size, attention_window
from vlmtune.models.memory_autocast import MetaAutocast
from vlmtune.models.provenance import base_model

# Called with (hidden (N, H), targets (N,), head); gives the summed loss.
Loss = Callable[[Tensor, Tensor, nn.Module], Tensor]


@dataclass(frozen=True)
class Batch:
    """What a device takes at once.

    Attributes:
        samples: rows.
        text_tokens: tokens of a sample beside its image tokens.
        supervised_tokens: of those, how many are learned.
        images: images a sample.
        cached: image features come from the cache, so that the tower does not run.
        size: height and width of every image, where a family's tokens depend on it.
        image_max_pixels: larger images are resized to so many pixels, where the model's processor has no lower limit.
    """

    samples: int = 8
    text_tokens: int = 64
    supervised_tokens: int = 32
    images: int = 1
    cached: bool = False
    size: Size | None = None
    image_max_pixels: int | None = None


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step takes beside weights and optimizer states.

    Attributes:
        peak: the most at once, gradients included.
        accumulating: the same where gradients of an earlier batch of the step are there from the start.
        gradients: what is left after the backward pass.
        vision: kept for the backward pass after the tower and projector.
        language: kept by the language model, beside that.
        loss: the head and loss at their peak, beside what is kept.
        features: of the images, as the language model takes them.
        image_tokens: soft tokens of a sample.
    """

    peak: int
    accumulating: int
    gradients: int
    vision: int
    language: int
    loss: int
    features: int
    image_tokens: int


_ATEN = torch.ops.aten
# Operations whose result has the form of their largest operand.
ELEMENTWISE = {
    *(_ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.mul.Tensor, _ATEN.div.Tensor, _ATEN.mul.Scalar, _ATEN.div.Scalar),
    *(_ATEN.neg.default, _ATEN.rsqrt.default, _ATEN.pow.Tensor_Scalar, _ATEN.exp.default, _ATEN.sigmoid.default),
    *(_ATEN.gelu.default, _ATEN.gelu_backward.default, _ATEN.silu.default, _ATEN.silu_backward.default),
}


class CountingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations make, while they live.

    Attributes:
        live: bytes that live now.
        peak: the most so far.
        gradients: bytes of finished gradients, which are among those that live.
        beside: the most so far without finished gradients.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.gradients = self.beside = 0
        self._embedding: torch.Size | None = None
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def ignore(self, model: nn.Module) -> None:
        """Do not count what is there already."""
        for tensor in (*model.parameters(), *model.buffers()):
            self._seen.add(tensor.untyped_storage())
        self._embedding = base_model(model).get_input_embeddings().weight.shape

    def finished(self, parameter: Tensor) -> None:
        """Take note that a parameter's gradient is whole."""
        assert parameter.grad is not None
        self.gradients += parameter.grad.untyped_storage().nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN._local_scalar_dense.default and args[0].is_meta:
            # A mask that nobody knows masks nothing.
            return True
        args, kwargs = _on_one_device(args, kwargs or {})
        if func is _ATEN._to_copy.default and not args[0].is_meta and not args[0].is_floating_point():
            # Counts and places keep their values.
            kwargs = {**kwargs, "device": None}
        made = None if kwargs else _formed(func, args)
        if func is _ATEN.add.Tensor and made is not None and made.shape == self._embedding:
            # The gradients of an embedding and of the head tied to it: autograd adds them in place, but not under a
            # dispatch mode.
            made = args[0]
        if made is None:
            made = func(*args, **kwargs)
        for tensor in _tensors((made,)):
            storage = tensor.untyped_storage()
            if storage not in self._seen:
                self._seen.add(storage)
                size = storage.nbytes()
                self.live += size
                self.peak = max(self.peak, self.live)
                self.beside = max(self.beside, self.live - self.gradients)
                weakref.finalize(storage, self._freed, size)
        return made

    def _freed(self, size: int) -> None:
        self.live -= size


def _unequal(values: Tensor) -> Tensor | None:
    """Values that nobody knows equal no number: Idefics3 looks for empty tiles by zeros."""
    known = not (values.is_meta and values.is_floating_point())
    return None if known else torch.zeros(values.shape, dtype=torch.bool)


def _on_one_device(args: Sequence[Any], kwargs: Any) -> tuple[Sequence[Any], Any]:
    """Where what has values meets what has none, take the values away; sizes of images have values until then."""
    if len({tensor.is_meta for tensor in _tensors((*args, *kwargs.values()))}) < 2:
        return args, kwargs
    moved: tuple[Sequence[Any], Any] = tree_map_only(Tensor, lambda t: t.to("meta"), (_numbered(args), kwargs))
    return moved


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield an operation's operands; lists of them are the only nesting."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _numbered(args: Sequence[Any]) -> Sequence[Any]:
    """An index of true and false as the numbers of its true places, of which there are as many as it says."""
    if len(args) < 2 or not isinstance(args[1], list):
        return args
    index: list[Any] = []
    for one in args[1]:
        is_mask = isinstance(one, Tensor) and one.dtype == torch.bool and one.device.type != "meta"
        index += one.nonzero().unbind(1) if is_mask else [one]
    return (args[0], index, *args[2:])


def _formed(func: Any, args: Sequence[Any]) -> Tensor | None:
    """Return an operation's result without values, or ``None`` for PyTorch to find its form.

    PyTorch does so in Python for meta tensors, which is most of what an estimate would take.
    """
    if func is _ATEN.eq.Scalar:
        return _unequal(args[0])
    if func in ELEMENTWISE:
        return _elementwise(args)
    if func is _ATEN.addmm.default:
        return torch.empty(args[1].shape[0], args[2].shape[1], dtype=args[1].dtype, device="meta")
    if func is _ATEN.mean.dim and args[1:] == ([-1], True) and args[0].is_contiguous():
        return torch.empty(*args[0].shape[:-1], 1, dtype=args[0].dtype, device="meta")
    return _joined(*args) if func is _ATEN.cat.default else None


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    """The result of ``torch.cat``."""
    first = tensors[0]
    plain = (t.is_meta and t.dtype == first.dtype and t.dim() == first.dim() and t.stride(-1) == 1 for t in tensors)
    if not all(plain):
        return None
    shape = list(first.shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return torch.empty(shape, dtype=first.dtype, device="meta")


def _elementwise(args: Sequence[Any]) -> Tensor | None:
    """The result of an elementwise operation."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    first = max(tensors, key=Tensor.numel)
    if len(tensors) > 2 or not all(t.is_floating_point() and _fits(t.shape, first.shape) for t in tensors):
        return None
    if 0 in first.stride():
        return None
    dtype = torch.result_type(tensors[0], tensors[-1])
    # Dense, with the axes in the order in which they lie in the largest operand.
    strides, size = [0] * first.dim(), 1
    for axis in sorted(range(first.dim()), key=lambda axis: (first.stride(axis), -axis)):
        strides[axis] = size
        size *= first.shape[axis]
    return torch.empty_strided(first.shape, strides, dtype=dtype, device="meta")


def _fits(shape: torch.Size, into: torch.Size) -> bool:
    """Whether a tensor is broadcast to a shape without making it larger."""
    return len(shape) <= len(into) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(into), strict=False))


def trace_step(
    model: nn.Module,
    family: Family,
    batch: Batch,
    loss: Loss,
    autocast: MetaAutocast | None = None,
    image: Mapping[str, Tensor] | None = None,
) -> StepMemory:
    """Run one training step on the meta device and count.

    Args:
        model: on the meta device, its trainable weights marked, checkpointing turned on or off; its gradients are
            used up.
        family: its record.
        batch: what a device takes at once.
        loss: the loss over supervised positions.
        autocast: of the forward pass, in mixed precision.
        image: what the image processor gives for one image, where that depends on the image's size.
    """
    base = base_model(model)
    model.train()
    model.zero_grad(set_to_none=True)
    autocast = autocast or MetaAutocast(None)
    with _fused_attention(autocast), autocast, CountingMode() as mode:
        mode.ignore(model)
        trained: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        hooks = [parameter.register_post_accumulate_grad_hook(mode.finished) for parameter in trained]
        features = _image_features(base, family, batch, image)
        vision = mode.live
        hidden = _hidden_states(base, family, batch, features)
        kept = mode.live
        mode.peak, before = mode.live, mode.peak
        sources = torch.empty(batch.samples * batch.supervised_tokens, dtype=torch.long, device="meta")
        total = loss(hidden.flatten(0, 1)[sources], torch.empty_like(sources), base.get_output_embeddings())
        of_loss, mode.peak = mode.peak - kept, max(mode.peak, before)
        n_features = sum(tensor.numel() * tensor.element_size() for tensor in features)
        image_tokens = features[0].shape[0] // batch.samples if features else 0
        del hidden, features
        autocast.end_forward()
        total.backward()  # type: ignore[no-untyped-call]
        del total
        peak, gradients, beside = mode.peak, mode.gradients, mode.beside
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return StepMemory(
        peak, max(peak, beside + gradients), gradients, vision, kept - vision, of_loss, n_features, image_tokens
    )


def _image_features(base: Any, family: Family, batch: Batch, image: Mapping[str, Tensor] | None) -> list[Tensor]:
    """What the language model takes of all images: (I, H) of their I soft tokens, and as much for deeper layers."""
    count = batch.samples * batch.images
    if not count:
        return []
    if image is None:
        vision = base.config.vision_config
        side = vision.image_size
        shape = (count, getattr(vision, "num_channels", 3), side, side)
        inputs: dict[str, Any] = {"pixel_values": torch.empty(shape, device="meta")}
    else:
        inputs = {name: torch.cat([tensor] * count, family.image_axis) for name, tensor in image.items()}
    dtype = next(base.parameters()).dtype
    if batch.cached:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.set_grad_enabled(not batch.cached):
        found = base.get_image_features(**inputs, return_dict=True)
        deeper = getattr(found, "deepstack_features", None) or []
        features = [_flat(found.pooler_output), *map(_flat, deeper)]
    del found, deeper
    if not batch.cached:
        return features
    shapes = [tensor.shape for tensor in features]
    del features, inputs
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]


def _flat(features: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(features, Tensor):
        return features.flatten(0, -2)
    return torch.cat([one.flatten(0, -2) for one in features])


def _hidden_states(base: Any, family: Family, batch: Batch, features: Sequence[Tensor]) -> Tensor:
    images = features[0].shape[0] // batch.samples if features else 0
    length = images + batch.text_tokens
    ids = torch.empty(batch.samples, length, dtype=torch.long, device="meta")
    embeds_BLH = base.get_input_embeddings()(ids)
    deeper: dict[str, Any] = {}
    if features:
        places = torch.empty(batch.samples, length, 1, dtype=torch.bool, device="meta").expand_as(embeds_BLH)
        embeds_BLH = embeds_BLH.masked_scatter(places, features[0].to(embeds_BLH.dtype))
    if len(features) > 1:
        is_image_BL = (torch.arange(length) < images).expand(batch.samples, length)
        deeper = {"visual_pos_masks": is_image_BL, "deepstack_visual_embeds": list(features[1:])}
    shape = (batch.samples, 1, length, length)
    masks: Any = {
        kind: torch.empty(shape, dtype=torch.bool, device="meta") for kind in ("full_attention", "sliding_attention")
    }
    axes = () if family.positions_of is None else (3,)
    language = base.get_submodule(family.parts["language"])
    found: Tensor = language(
        inputs_embeds=embeds_BLH,
        attention_mask=masks if attention_window(base.config.get_text_config())[1] else masks["full_attention"],
        position_ids=torch.empty(*axes, batch.samples, length, dtype=torch.long, device="meta"),
        use_cache=False,
        **deeper,
    )[0]
    return found


class _Attention(torch.autograd.Function):
    """Keeps for the backward pass what fused kernels keep: inputs, mask, output and a number a row."""

    @staticmethod
    def forward(ctx: Any, query_BALD: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, _ = query_BALD.shape
        out = query_BALD.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        rows = query_BALD.new_empty(batch, heads, length, dtype=torch.float32)
        # Kernels take a mask that is added; a true-or-false one is made into it.
        added = None if mask is None else mask.to(query_BALD.dtype)
        ctx.save_for_backward(query_BALD, key, value, added, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


@contextmanager
def _fused_attention(autocast: MetaAutocast) -> Iterator[None]:
    original = nn.functional.scaled_dot_product_attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Any:
        return _Attention.apply(*autocast.cast((query, key, value)), attn_mask)  # type: ignore[no-untyped-call]

    nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original
