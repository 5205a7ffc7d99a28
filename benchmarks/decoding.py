"""Images decoded a second: vlmtune's decoder, plain Pillow, its reduced-scale draft, and other JPEG decoders if there.

A decoder may replace Pillow's only where its pixels are the same; CPU time of one thread, medians over rounds that
alternate the decoders.
"""

from __future__ import annotations

import argparse
import importlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _common import header, make_folder, markdown, write
from PIL import Image

from vlmtune.data.images import decode
from vlmtune.data.sample import ImageRef


def pillow(content: bytes) -> Any:
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def draft(content: bytes) -> Any:
    with Image.open(io.BytesIO(content)) as image:
        image.draft("RGB", (64, 64))
        image.load()
        return image


def decoders() -> dict[str, Callable[[bytes], Any]]:
    found: dict[str, Callable[[bytes], Any]] = {
        "vlmtune": lambda content: decode(ImageRef(bytes=content)),
        "Pillow": pillow,
        "Pillow, draft at an eighth": draft,
    }
    try:
        simplejpeg = importlib.import_module("simplejpeg")
        found["simplejpeg"] = lambda content: Image.fromarray(simplejpeg.decode_jpeg(content, colorspace="RGB"))
    except ImportError:
        pass
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder) / "data", options.images, 1)
        contents = [file.read_bytes() for file in sorted((Path(folder) / "data" / "Images").iterdir())]
    known = decoders()
    right = [np.asarray(pillow(content)) for content in contents]
    times: dict[str, list[float]] = {name: [] for name in known}
    for _ in range(options.rounds):
        for name, function in known.items():
            started = time.process_time()
            for content in contents:
                function(content)
            times[name].append((time.process_time() - started) / len(contents))
    rows = {}
    for name, function in known.items():
        same = all(np.array_equal(np.asarray(function(c)), pixels) for c, pixels in zip(contents, right, strict=True))
        ms = statistics.median(times[name]) * 1000
        rows[name] = {"ms_per_image": round(ms, 3), "images_per_second": round(1000 / ms), "same_pixels": same}
    columns = ["decoder", "CPU ms an image", "images/s a core", "pixels"]
    table = [
        [
            name,
            f"{row['ms_per_image']:.2f}",
            f"{row['images_per_second']:,}",
            "the same" if row["same_pixels"] else "others",
        ]
        for name, row in rows.items()
    ]
    write("decoding", {"about": header(options), "decoders": rows}, markdown(columns, table))


if __name__ == "__main__":
    main()
