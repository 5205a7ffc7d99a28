"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: a tower of any resolution, a merger of 2 x 2 patches, positions on three axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from vlmtune.models.boxes import BoxCodec, View, json_codec, read_pairs, whole, write_pairs
from vlmtune.models.family import ATTENTION_AND_MLP, Family, Size, require_pixels

# Of Qwen3-VL's and Qwen2.5-VL's cookbooks on grounding.
ASKS = {
    "detection": 'Locate every instance that belongs to the following categories: "{labels}". Report bbox coordinates '
    "in JSON format.",
    "everything": "Locate every object in the image. Report bbox coordinates and labels in JSON format.",
    "grounding": "Locate {phrase}, output its bbox coordinates using JSON format.",
}


def resized(processor: Any, size: Size) -> Size:
    """Height and width of an image as the model sees it."""
    # Records are read where nothing else needs transformers, such as by `vlmtune families`.
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    images = processor.image_processor
    factor = images.patch_size * images.merge_size
    least, most = images.size["shortest_edge"], images.size["longest_edge"]
    height, width = smart_resize(*size, factor=factor, min_pixels=least, max_pixels=most)
    return height, width


def layout(processor: Any, sizes: Sequence[Size]) -> Mapping[str, Any]:
    """The grid (time, height, width) of patches into which an image is cut, by its size."""
    patch = processor.image_processor.patch_size
    seen = [resized(processor, size) for size in sizes]
    return {"image_grid_thw": np.array([(1, height // patch, width // patch) for height, width in seen])}


def view(processor: Any, size: Size) -> View:
    """The whole image, in pixels of what the model sees of it."""
    height, width = resized(processor, size)
    return dataclasses.replace(whole(processor, size), seen=(width, height))


def limit_pixels(processor: Any, pixels: int) -> None:
    """Its ``size`` counts pixels: ``longest_edge`` is the most of them and ``shortest_edge`` the least.

    Raises:
        ValueError: fewer pixels than one token's.
    """
    images = processor.image_processor
    require_pixels(pixels, (images.patch_size * images.merge_size) ** 2)
    images.size = {name: min(images.size[name], pixels) for name in ("shortest_edge", "longest_edge")}


def positions_of(processor: Any, image_flags: Sequence[int], inputs: Mapping[str, Any]) -> list[list[int]]:
    """Positions in time, height and width, as the model's ``get_rope_index`` has them.

    Text goes on by one on all three. An image's tokens count its rows and columns from where it starts, and what
    follows goes on behind the larger of the two (arXiv:2409.12191, section 2.1).
    """
    merge = processor.image_processor.merge_size
    grids = iter(inputs.get("image_grid_thw", ()))
    axes: list[list[int]] = [[], [], []]
    start = 0
    for is_image, run in groupby(image_flags):
        length = sum(1 for _ in run)
        if not is_image:
            for axis in axes:
                axis += range(start, start + length)
            start += length
            continue
        _, height, width = (int(number) for number in next(grids))
        rows, columns = height // merge, width // merge
        axes[0] += [start] * length
        axes[1] += [start + row for row in range(rows) for _ in range(columns)]
        axes[2] += [start + column for _ in range(rows) for column in range(columns)]
        start += max(rows, columns)
    return axes


QWEN2_VL = Family(
    name="qwen2_vl",
    aliases=("qwen2-vl",),
    model_types=("qwen2_vl",),
    model_class="Qwen2VLForConditionalGeneration",
    processor_class="Qwen2VLProcessor",
    parts={
        "language": "model.language_model",
        "projector": "model.visual.merger",
        "vision": "model.visual",
        "head": "lm_head",
    },
    lora_targets={
        "language": ATTENTION_AND_MLP,
        "projector": ("0", "2"),
        "vision": ("qkv", "proj", "fc1", "fc2"),
    },
    layers={"language": "layers", "vision": "blocks"},
    attention="causal",
    turn_end="<|im_end|>",
    terminators=("<|im_end|>", "<|endoftext|>"),
    bos=False,
    image_token_attribute="image_token_id",
    needs_token_type_ids=True,
    token_types_name="mm_token_type_ids",
    image_inputs=("pixel_values", "image_grid_thw"),
    sized=True,
    layout=layout,
    limit_pixels=limit_pixels,
    positions_of=positions_of,
    sharing=True,
    feature_cache=True,
    features_listed=True,
    boxes=BoxCodec(
        write_pairs,
        read_pairs,
        "arXiv:2409.12191, section 2.2.1 and table of special tokens",
        # Within [0, 1000).
        largest=999,
        asks={
            "detection": "Detect all objects of these kinds in the image: {labels}.",
            "everything": "Detect all objects in the image.",
            "grounding": "Detect the bounding box of <|object_ref_start|>{phrase}<|object_ref_end|>.",
        },
    ),
    min_transformers="5.23",
    paper="https://arxiv.org/abs/2409.12191",
    licence="Apache-2.0 (2B, 7B); Qwen License (72B)",
    source="transformers/models/qwen2_vl/modeling_qwen2_vl.py, image_processing_pil_qwen2_vl.py",
)

QWEN2_5_VL = dataclasses.replace(
    QWEN2_VL,
    name="qwen2_5_vl",
    aliases=("qwen2.5-vl", "qwen2_5-vl", "qwen"),
    model_types=("qwen2_5_vl",),
    model_class="Qwen2_5_VLForConditionalGeneration",
    processor_class="Qwen2_5_VLProcessor",
    lora_targets={
        "language": ATTENTION_AND_MLP,
        "projector": ("0", "2"),
        "vision": ("qkv", "proj", "gate_proj", "up_proj", "down_proj"),
    },
    boxes=json_codec(
        "bbox_2d",
        "arXiv:2502.13923, section 2.2.1; github.com/QwenLM/Qwen3-VL, Qwen2.5-VL's cookbook on spatial understanding",
        fenced=True,
        scale=None,
        asks=ASKS,
    ),
    view=view,
    paper="https://arxiv.org/abs/2502.13923",
    licence="Apache-2.0 (7B, 32B); Qwen Research License (3B); Qwen License (72B)",
    source="transformers/models/qwen2_5_vl/modeling_qwen2_5_vl.py, processing_qwen2_5_vl.py",
)

QWEN3_VL = dataclasses.replace(
    QWEN2_VL,
    name="qwen3_vl",
    aliases=("qwen3-vl",),
    model_types=("qwen3_vl",),
    model_class="Qwen3VLForConditionalGeneration",
    processor_class="Qwen3VLProcessor",
    lora_targets={
        "language": ATTENTION_AND_MLP,
        "projector": ("linear_fc1", "linear_fc2"),
        # The mergers of the layers that are added deeper in the language model lie in the tower.
        "vision": ("qkv", "proj", "linear_fc1", "linear_fc2"),
    },
    boxes=json_codec("bbox_2d", "github.com/QwenLM/Qwen3-VL, cookbooks/2d_grounding.ipynb", fenced=True, asks=ASKS),
    paper="https://arxiv.org/abs/2511.21631",
    licence="Apache-2.0",
    source="transformers/models/qwen3_vl/modeling_qwen3_vl.py, processing_qwen3_vl.py",
)
