"""Decode images safely: every form a photo comes in becomes upright RGB, and what cannot is named.

Shape legend: images are PIL images in mode RGB, upright, at full resolution.
"""

from __future__ import annotations

import hashlib
import io
import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar, cast

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from vlmtune.data import archives
from vlmtune.data.sample import ImageRef
from vlmtune.data.watched import on_each
from vlmtune.errors import ImageError

# Twice Pillow's warning threshold, where Pillow itself refuses: 179 megapixels, 0.5 GiB as RGB.
DEFAULT_MAX_PIXELS = 178_956_970
# Seconds; a large photo on a slow network disk takes some.
TIMEOUT = 60.0
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

Check = Literal["off", "header", "full"]
T = TypeVar("T")

# What Pillow raises on damaged files, by format and place of the damage.
_DAMAGE = (OSError, ValueError, SyntaxError, TypeError, IndexError, KeyError, EOFError, struct.error, zlib.error)
_LIMIT_LOCK = threading.Lock()
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTER_TURNS = (5, 6, 7, 8)


def decode(image: ImageRef, *, max_pixels: int | None = None, timeout: float = TIMEOUT) -> Image.Image:
    """Return the image upright, in RGB, at full resolution.

    EXIF orientation is applied; transparency is laid on white; 16-bit and floating-point grey is scaled to 8 bits;
    of an animation the first frame is taken.

    Args:
        image: a file or bytes.
        max_pixels: an image of more pixels is refused before it is decoded.
        timeout: seconds that reading and decoding may take.

    Raises:
        ImageError: missing, empty, not an image, cut short, too large, or too slow; the message begins with its name.
    """
    return _within(timeout, image, partial(_decode, image, max_pixels))


def _decode(image: ImageRef, max_pixels: int | None) -> Image.Image:
    with _open(image, max_pixels) as opened:
        try:
            opened.load()
            return _to_rgb(_upright(opened))
        except (*_DAMAGE, Image.DecompressionBombError) as error:
            raise ImageError(f"{image.name} cannot be decoded: {_reason(error)}. Replace the file.") from error


def _within(seconds: float, image: ImageRef, action: Callable[[], T]) -> T:
    """Do something with an image in a thread of its own, which is left behind when it takes too long.

    Nothing else ends a decoder that hangs: it is C code, or a read from a disk that does not answer.
    """
    outcome: list[tuple[T | None, BaseException | None]] = []

    def act() -> None:
        try:
            outcome.append((action(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=act, name=f"decoding {image.name}", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise ImageError(_too_slow(image, seconds))
    found, error = outcome[0]
    if error is not None:
        raise error
    return cast(T, found)


def _too_slow(image: ImageRef, seconds: float) -> str:
    return (
        f"{image.name} could not be read and decoded within {seconds:g} s: its file or its disk hangs. Replace it, "
        "or raise image_timeout if the disk is that slow."
    )


def check(
    image: ImageRef, how: Check = "header", *, max_pixels: int | None = None, timeout: float = TIMEOUT
) -> str | None:
    """Return what is wrong with an image, in words, or ``None``.

    Args:
        image: a file or bytes.
        how: ``off`` looks whether the file exists, ``header`` reads its format and size, ``full`` decodes it.
        max_pixels: as in :func:`decode`.
        timeout: as in :func:`decode`.
    """
    return check_all([image], how, max_pixels=max_pixels, timeout=timeout)[0]


def check_all(
    images: Sequence[ImageRef], how: Check = "header", *, max_pixels: int | None = None, timeout: float = TIMEOUT
) -> list[str | None]:
    """Return what :func:`check` says of each image; a few at once."""
    find = partial(_problem, how=how, max_pixels=max_pixels)
    if how == "off":
        return [find(image) for image in images]
    return on_each(images, find, timeout, partial(_too_slow, seconds=timeout))


def _problem(image: ImageRef, how: Check, max_pixels: int | None) -> str | None:
    try:
        if how == "full":
            _decode(image, max_pixels)
        elif how == "header":
            _open(image, max_pixels).close()
        elif image.path is not None and image.bytes is None:
            _require_place(image.path)
    except ImageError as error:
        return str(error)
    return None


def upright_size(image: ImageRef, *, max_pixels: int | None = None) -> tuple[int, int]:
    """Return (height, width) of the image as :func:`decode` gives it, from its header alone.

    Raises:
        ImageError: as :func:`decode`, but for damage after the header.
    """
    with _open(image, max_pixels) as opened:
        width, height = opened.size
        turned = opened.getexif().get(ExifTags.Base.Orientation, 1) in _QUARTER_TURNS
    return (width, height) if turned else (height, width)


def content_hash(image: ImageRef) -> str:
    """Return the SHA-256 of the image's bytes, in hexadecimal: equal images are one image whatever their names.

    Raises:
        ImageError: the file cannot be read.
    """
    return hashlib.sha256(content_of(image)).hexdigest()


def content_of(image: ImageRef) -> bytes:
    """Return the image's bytes as they are stored.

    Raises:
        ImageError: the file, or the archive, cannot be read.
    """
    if image.bytes is not None:
        return image.bytes
    member = archives.parse(image.path or "")
    if member is not None:
        return archives.read(member)
    try:
        return Path(image.path or "").read_bytes()
    except (OSError, ValueError) as error:
        raise ImageError(f"{image.name} cannot be read: {_reason(error)}.") from error


def length_of(image: ImageRef) -> int:
    """Return the number of the image's bytes as they are stored, or -1 where there is no file."""
    if image.bytes is not None:
        return len(image.bytes)
    member = archives.parse(image.path or "")
    if member is not None:
        return len(archives.read(member)) if member.packed else member.size
    path = Path(image.path or "")
    return path.stat().st_size if path.is_file() else -1


def _require_place(path: str) -> None:
    member = archives.parse(path)
    if member is None:
        _require_file(Path(path))
        return
    _require_file(Path(member.archive))
    if member.size == 0:
        raise ImageError(f"{path} is empty (0 bytes). Replace it in the archive.")


def _require_file(path: Path) -> None:
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise ImageError(f"{path} {what}. Correct the name, or set image_dir to the images' folder.")
        size = path.stat().st_size
    except (OSError, ValueError) as error:  # a name too long or with a null, or a folder that may not be entered
        raise ImageError(f"{path} cannot be opened: {_reason(error)}. Correct the name or its permissions.") from error
    if size == 0:
        raise ImageError(f"{path} is empty (0 bytes). Download or copy it again.")


def _open(image: ImageRef, max_pixels: int | None) -> Image.Image:
    limit = max_pixels or DEFAULT_MAX_PIXELS
    try:
        if image.bytes is not None or archives.parse(image.path or ""):
            content = content_of(image)
            if not content:
                raise ImageError(f"{image.name} is empty (0 bytes).")
            opened = _open_any_size(io.BytesIO(content))
        else:
            path = Path(image.path or "")
            _require_file(path)
            opened = _open_any_size(path)
    except UnidentifiedImageError as error:
        raise ImageError(f"{image.name} is not an image that can be read. Replace the file.") from error
    except _DAMAGE as error:
        raise ImageError(f"{image.name} cannot be opened: {_reason(error)}. Replace the file.") from error
    width, height = opened.size
    if width * height > limit:
        opened.close()
        raise ImageError(
            f"{image.name} has {width} x {height} pixels, more than max_pixels {limit:,}: it may be a decompression "
            "bomb. Make the image smaller, or raise max_pixels if it is genuine."
        )
    return opened


def _open_any_size(file: Path | io.BytesIO) -> Image.Image:
    """Read an image's header, however large the image; the caller compares its size with ``max_pixels``."""
    try:
        return Image.open(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        # Pillow's limit is the whole process's, so it is lifted for one header at a time.
        with _LIMIT_LOCK:
            before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return Image.open(file)
            finally:
                Image.MAX_IMAGE_PIXELS = before


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, and that alone: ``ImageOps.exif_transpose`` fails where other tags are odd."""
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I", "F"):
        return _scaled_grey(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _scaled_grey(image: Image.Image) -> Image.Image:
    """Bring grey of more than 8 bits to 8; Pillow's own conversion clips everything above 255 to white."""
    values = np.asarray(image).astype(np.float64)
    top = values.max(initial=0)
    if image.mode == "F":
        scale = 255.0 if top <= 1 else 1.0
    else:
        scale = 255.0 / 65535.0 if top > 255 or image.mode.startswith("I;16") else 1.0
    return Image.fromarray(np.clip(values * scale, 0, 255).round().astype(np.uint8)).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
