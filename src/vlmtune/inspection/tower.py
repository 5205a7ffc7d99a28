"""What a vision tower gets, as pictures again: whole images and tiles, or patches put together by their places.

Shape legend: N images or tiles, C channels (3), H x W pixels; G x F patches of P x P pixels, T frames.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlmtune.batching.encode import EncodedSample, Encoder

MOST_PICTURES = 8
Pixels = npt.NDArray[np.float32]


def pictures_of(item: EncodedSample, encoder: Encoder) -> list[Image.Image]:
    """Return what the vision tower gets as pictures; none where its tensors cannot be read as such."""
    values = item.image_inputs.get("pixel_values")
    if values is None:
        return []
    settings = encoder.processor.image_processor
    array = np.asarray(values, dtype=np.float32)
    grids, places = (item.image_inputs.get(name) for name in ("image_grid_thw", "image_position_ids"))
    if grids is not None:
        pictures = _of_grids(array, np.asarray(grids), settings)
    elif places is not None:
        pictures = [_of_places(*one, int(settings.patch_size)) for one in zip(array, np.asarray(places), strict=True)]
    elif array.ndim >= 4 and array.shape[-3] == 3:
        pictures = list(array.reshape(-1, *array.shape[-3:]).transpose(0, 2, 3, 1))
    else:
        return []
    return [_picture(pixels, settings) for pixels in pictures[:MOST_PICTURES]]


def _of_grids(patches: Pixels, grids: npt.NDArray[np.int64], settings: Any) -> list[Pixels]:
    """Patches (sum of G*F, C*T*P*P) in groups that are merged, as Qwen-VL has them, to pictures (G*P, F*P, C)."""
    size, frames, merged = (int(getattr(settings, f"{name}_size")) for name in ("patch", "temporal_patch", "merge"))
    found, start = [], 0
    for depth, rows, columns in grids.tolist():
        count = depth * rows * columns
        shape = (rows // merged, columns // merged, merged, merged, 3, frames, size, size)
        # Of an image all frames are equal.
        blocks = patches[start : start + rows * columns].reshape(shape)[..., 0, :, :]
        found.append(blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * size, columns * size, 3))
        start += count
    return found


def _of_places(patches: Pixels, places: npt.NDArray[np.int64], size: int) -> Pixels:
    """Patches (N, P*P*C) at places (N, 2) of column and row, -1 where there is none, to a picture (G*P, F*P, C)."""
    there = (places >= 0).all(axis=1)
    columns, rows = places[there].T
    picture = np.zeros((rows.max() + 1, size, columns.max() + 1, size, 3), dtype=np.float32)
    picture[rows, :, columns] = patches[there].reshape(-1, size, size, 3)
    return picture.reshape(picture.shape[0] * size, -1, 3)


def _picture(pixels: Pixels, settings: Any) -> Image.Image:
    """Undo the normalisation of pixels (H, W, C)."""
    if getattr(settings, "do_normalize", True):
        mean, std = (
            np.asarray(getattr(settings, name, None) or [0.5] * 3, dtype=np.float32)
            for name in ("image_mean", "image_std")
        )
        pixels = pixels * std + mean
    return Image.fromarray(np.clip(pixels * 255, 0, 255).round().astype(np.uint8))
