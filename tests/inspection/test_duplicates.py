"""Difference hashes against the package imagehash, whose values are written here so that it need not be installed."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from vlmtune.data.sample import ImageRef
from vlmtune.inspection.duplicates import MOST_BITS
from vlmtune.inspection.images import difference_hashes, inspect_image

# dhash and dhash_vertical of imagehash 4.3.2, of `picture(seed)`.
GOLDEN = {
    0: ("e5496a1b99969469", "088ffbcc9772e4b9"),
    1: ("6da9ca9624c8b292", "5c22429427e810c7"),
    2: ("5673792999da5b85", "bd2c94c74723f0f4"),
}


def picture(seed: int) -> Image.Image:
    """Grey noise, smooth enough to have edges at the size that is compared."""
    coarse = np.random.default_rng(seed).integers(0, 256, (11, 13), dtype=np.uint8)
    return Image.fromarray(coarse).resize((130, 110), Image.Resampling.BILINEAR)


def with_sky(seed: int) -> Image.Image:
    """A plain sky with a camera's noise above a picture."""
    rng = np.random.default_rng(seed)
    pixels = np.full((220, 260), 180.0)
    pixels[110:] = np.asarray(picture(seed).resize((260, 110)))
    return Image.fromarray((pixels + rng.normal(0, 3, pixels.shape)).clip(0, 255).astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize("seed", GOLDEN)
def test_the_bits_are_imagehashs(seed: int) -> None:
    across, down = difference_hashes(picture(seed), least_edge=0, resample=Image.Resampling.LANCZOS)
    assert (f"{across:016x}", f"{down:016x}") == GOLDEN[seed]


def test_noise_in_a_plain_sky_does_not_count() -> None:
    """Where any difference counts, as in imagehash, the same picture saved again is another one."""

    def saved(image: Image.Image, quality: int) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return buffer.getvalue()

    def bits(pair: tuple[tuple[int, int], tuple[int, int]]) -> int:
        return sum((one ^ other).bit_count() for one, other in zip(*pair, strict=True))

    ours, every = [], []
    for seed in range(8):
        image = with_sky(seed)
        files = [saved(image, 95), saved(image.resize((180, 150)), 40)]
        hashes = [inspect_image(ImageRef(bytes=content)).hashes for content in files]
        assert hashes[0] is not None and hashes[1] is not None
        ours.append(bits((hashes[0], hashes[1])))
        greys = [Image.open(io.BytesIO(content)).convert("L") for content in files]
        first, second = (difference_hashes(grey, least_edge=0, resample=Image.Resampling.LANCZOS) for grey in greys)
        every.append(bits((first, second)))
    assert max(ours) <= MOST_BITS < max(every)
