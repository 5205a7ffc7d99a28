"""What a memory estimate must know of images whose soft tokens depend on their size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmtune.errors import ModelError
from vlmtune.models.family import Family, Size

# Forms in which an image is looked for that has the most tokens, as height over width, at more pixels than any
# processor keeps.
FORMS = (1, 2, 1 / 2, 3, 1 / 3, 4 / 3, 3 / 4, 16 / 9, 9 / 16, 5, 1 / 5)
PIXELS = 4096 * 4096


def largest_size(processor: Any, family: Family) -> Size:
    """Return a height and width for which an image has the most soft tokens, of forms up to 5 to 1.

    Args:
        processor: of the model.
        family: its record; tokens are counted by its layout, without an image.
    """
    sizes = [(round((PIXELS * form) ** 0.5), round((PIXELS / form) ** 0.5)) for form in FORMS]
    return max(sizes, key=lambda size: soft_tokens(processor, family, size))


def soft_tokens(processor: Any, family: Family, size: Size) -> int:
    """Return the soft tokens of one image by its height and width."""
    text: str = processor.replace_image_token(family.layout(processor, [size]), 0)
    return text.count(processor.image_token)


def image_inputs(processor: Any, family: Family, size: Size) -> dict[str, Tensor]:
    """Return what the model takes of one image: pixels and masks without values, on the meta device; sizes with them.

    Args:
        processor: of the model.
        family: its record.
        size: height and width.

    Raises:
        ModelError: the family takes no image of this size.
    """
    height, width = size
    try:
        grid = family.layout(processor, [size]).get("image_grid_thw")
        # A row of pixels for each patch of a grid is the same for a small image, which is quicker.
        found = _processed(processor, family, size if grid is None else (64, 64))
    except ValueError as error:
        raise ModelError(f"{family.name} takes no image of {width} x {height} pixels: {error}.") from error
    inputs = {name: torch.as_tensor(found[name]) for name in family.image_inputs if name in found}
    if grid is not None:
        patches = torch.empty(int(grid.prod()), *inputs["pixel_values"].shape[1:], device="meta")
        inputs |= {"image_grid_thw": torch.as_tensor(grid), "pixel_values": patches}
    return {
        name: tensor.to("meta") if tensor.is_floating_point() or tensor.dim() > 3 else tensor
        for name, tensor in inputs.items()
    }


def _processed(processor: Any, family: Family, size: Size) -> Mapping[str, Any]:
    options = {**family.image_options(processor), "return_tensors": "pt"}
    found: Mapping[str, Any] = processor.image_processor([[Image.new("RGB", (size[1], size[0]))]], **options)
    return found
