"""The :class:`Family` record: every fact that depends on which vision-language model it is.

A family is a frozen record in ``models/families/NAME.py``, listed in the plain dict
``vlmtune.models.families.FAMILIES``. Code elsewhere asks the record and never tests a model's name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from vlmtune.models.boxes import THOUSANDTHS, BoxCodec, ViewOf, whole
from vlmtune.models.boxes import Size as Size

Part = Literal["language", "projector", "vision", "head"]
Scope = Literal["language", "projector", "vision"]

# The linear layers of a Llama-like language model, as transformers calls them in most families.
ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# (processor) -> options that the processor gives to its image processor.
ImageOptions = Callable[[Any], Mapping[str, Any]]
# (configuration) -> modules that the loss does not depend on.
Unused = Callable[[Any], Sequence[str]]
# (configuration) -> number by which the model multiplies its logits.
LogitScale = Callable[[Any], float]
# (configuration) -> kinds of attention layers in which the tokens of one image see each other.
BlockLayers = Callable[[Any], Collection[str]]
# (processor, sizes of the images) -> what the processor counts an image's soft tokens from.
Layout = Callable[[Any, Sequence[Size]], Mapping[str, Any]]
# (processor, messages, open the assistant's turn) -> text; raises ValueError for what the family cannot be told.
Render = Callable[[Any, Sequence[Mapping[str, Any]], bool], str]
# (processor, image flag of each token, what `Layout` gives or the image processor) -> positions on each axis.
Positions = Callable[[Any, Sequence[int], Mapping[str, Any]], list[list[int]]]

# (processor, pixels) -> None; makes the processor resize larger images; raises ValueError where it cannot.
LimitPixels = Callable[[Any, int], None]


def nothing_unused(config: Any) -> Sequence[str]:
    """For families where every weight reaches the loss."""
    return ()


def unscaled(config: Any) -> float:
    """For families whose logits are what the head gives."""
    return 1.0


def every_layer(config: Any) -> Collection[str]:
    """For families whose attention is alike in every layer."""
    return ("full_attention", "sliding_attention")


def attention_window(text_config: Any) -> tuple[int | None, bool]:
    """The window of a language model's attention, in positions, and whether some of its layers only have it.

    It is the checkpoint's and not the family's: LLaVA-NeXT's Mistral may have one, and its Vicuna has none.
    """
    kinds = getattr(text_config, "layer_types", None) or ()
    in_some = "sliding_attention" in kinds
    window: int | None = getattr(text_config, "sliding_window", None) if in_some or not kinds else None
    return window, in_some


def class_image_options(processor: Any) -> Mapping[str, Any]:
    """What the processor's class says, such as that the grid of an image's tiles be returned."""
    return dict(getattr(type(processor), "images_kwargs", None) or {})


def fixed_layout(processor: Any, sizes: Sequence[Size]) -> Mapping[str, Any]:
    """For families where every image has as many soft tokens: no crops stands for an image not decoded."""
    return {"num_crops": [0] * len(sizes)}


def fixed_size(processor: Any, pixels: int) -> None:
    """For families without a choice of size.

    Raises:
        ValueError: always.
    """
    raise ValueError("it sees every image at one size; leave it out")


def require_pixels(pixels: int, least: int) -> None:
    """Refuse a limit below the smallest image that a processor makes.

    Raises:
        ValueError: with that image's pixels.
    """
    if pixels < least:
        raise ValueError(f"its smallest image has {least:,} pixels; set no less, or leave it out")


def fewer_tiles(processor: Any, pixels: int) -> None:
    """For families that cut an image into at most ``max_patches`` tiles: as many as the pixels hold.

    Raises:
        ValueError: fewer pixels than one tile.
    """
    images = processor.image_processor
    tile = images.size["height"] * images.size["width"]
    require_pixels(pixels, tile)
    for name in ("min_patches", "max_patches", "dense_max_patches"):
        if hasattr(images, name):
            setattr(images, name, min(getattr(images, name), pixels // tile))


@dataclass(frozen=True)
class Family:
    """Facts of one family of vision-language models.

    Attributes:
        name: the family's name in recipes, such as ``gemma3``.
        aliases: other names ``model_type=`` accepts, such as ``gemma``.
        model_types: values of ``config.model_type`` that belong to it.
        model_class: the transformers class that holds all its parts.
        parts: part name -> module path in the loaded base model, anchored at its root.
        lora_targets: scope -> names of the linear layers that LoRA adapts inside that part; none where the part
            has no linear layers: it is then trained in full and saved with the adapter.
        attention: which tokens of a prompt see each other: ``causal``, or ``image_block`` (causal, and in
            ``block_layers`` every image's tokens see each other), or ``prefix`` (the whole prompt sees itself).
        turn_end: the token with which the chat template closes an assistant turn; supervised.
        terminators: tokens on which generation stops, ``turn_end`` among them.
        bos: a rendered conversation holds exactly one BOS token.
        image_token_attribute: the config attribute with the id of one image (soft) token.
        needs_token_type_ids: the model must be told what each token is, in ``token_types_name``: 1 on image
            tokens, or, where ``attention`` is ``prefix``, 1 on what is answered.
        refused_dtypes: dtype -> why it must not be used.
        sharing: texts of one image can share its prefix exactly; else ``sharing_reason`` says why not.
        feature_cache: features of a frozen tower can be given through ``mm_encoder_outputs``; else
            ``cache_reason`` says why not.
        min_transformers: lowest version known to be right.
        processor_class: the transformers class of its processor.
        token_types_name: the model's input that ``needs_token_type_ids`` speaks of.
        image_inputs: the image processor's tensors that the model takes.
        image_axis: the axis along which the images of several samples are joined; other axes are padded with zeros.
        image_options: what the processor asks of its image processor when it is called.
        projector_parameters: parameters outside all parts that are trained with the projector.
        sized: an image's number of soft tokens depends on its size.
        layout: what the processor counts soft tokens from, made from sizes alone, so that no image is decoded for it.
        positions_of: the positions of one sample's tokens on each axis (time, height, width); none where they are
            0..n-1.
        closes_turn: the published chat template writes ``turn_end``; where it does not, the encoder does.
        render: for families without a chat template, the text of a conversation.
        attn_implementation: attention code by default; none where transformers' own choice is the only one that all
            its language models have.
        unused: modules that exist and are not used, such as an audio tower; they are neither adapted, trained nor
            quantised.
        boxes: how it writes boxes.
        view: the part of an image that it sees, and how large; boxes are counted in it.
        limit_pixels: makes a processor resize images of more pixels (``image_max_pixels``), never enlarge them.
        layers: part name -> place, inside the part, of the list of its layers, which sharded training takes as units.
        features_listed: the model takes prepared image features as a list, one tensor an image.
        block_layers: where ``attention`` is ``image_block``, the kinds of layers in which it is so.
        template_options: what the chat template is told, such as that the model answers without thinking aloud first.
        logit_scale: number by which the model multiplies what its head gives.
        generic: it is no known family's, but read off a checkpoint (``vlmtune.models.generic``).
        estimate_reason: why its memory cannot be estimated by its configuration, where it cannot.
        opening: what the chat template writes to open an answer and leaves out of an answer that is finished.
        paper, licence, source: provenance; ``source`` names the transformers file the facts are from.
    """

    name: str
    aliases: tuple[str, ...]
    model_types: tuple[str, ...]
    model_class: str
    parts: Mapping[Part, str]
    lora_targets: Mapping[Scope, tuple[str, ...]]
    attention: Literal["causal", "image_block", "prefix"]
    turn_end: str
    terminators: tuple[str, ...]
    bos: bool
    image_token_attribute: str
    needs_token_type_ids: bool
    min_transformers: str
    paper: str
    licence: str
    source: str
    refused_dtypes: Mapping[str, str] = field(default_factory=dict)
    sharing: bool = False
    sharing_reason: str = ""
    feature_cache: bool = False
    cache_reason: str = ""
    processor_class: str = ""
    token_types_name: str = "token_type_ids"
    image_inputs: tuple[str, ...] = ("pixel_values",)
    image_axis: int = 0
    image_options: ImageOptions = class_image_options
    projector_parameters: tuple[str, ...] = ()
    sized: bool = False
    layout: Layout = fixed_layout
    positions_of: Positions | None = None
    closes_turn: bool = True
    render: Render | None = None
    attn_implementation: str | None = "sdpa"
    unused: Unused = nothing_unused
    layers: Mapping[Part, str] = field(
        default_factory=lambda: MappingProxyType({"language": "layers", "vision": "encoder.layers"})
    )
    features_listed: bool = False
    block_layers: BlockLayers = every_layer
    template_options: Mapping[str, Any] = field(default_factory=dict)
    opening: str = ""
    logit_scale: LogitScale = unscaled
    generic: bool = False
    estimate_reason: str = ""
    boxes: BoxCodec = THOUSANDTHS
    view: ViewOf = whole
    limit_pixels: LimitPixels = fixed_size
