"""WebDataset shards for the tests that stream them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path


def write_shards(
    folder: Path,
    images: Path,
    sizes: list[int],
    *,
    texts: int = 2,
    bad: tuple[int, ...] = (),
    text_only: tuple[int, ...] = (),
) -> Path:
    """Shards of so many images with ``texts`` captions each.

    Those in ``bad`` hold beside each image one that is none; those in ``text_only`` hold conversations alone.
    """
    folder.mkdir()
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"train-{shard:04}.tar", "w") as tar:
            for _ in range(size):
                if shard in text_only:
                    rows = [{"prompt": f"What {text}?", "completion": f"so {number}"} for text in range(texts)]
                    add(tar, f"{number:04}", {"json": json.dumps(rows).encode()})
                    number += 1
                    continue
                rows = [{"caption": f"picture {number} as {'so ' * text}told"} for text in range(texts)]
                members = {"jpg": (images / f"{number % 12}.jpg").read_bytes(), "json": json.dumps(rows).encode()}
                if shard in bad:
                    add(tar, f"bad{number}", {"jpg": b"no image", "json": b'[{"caption": "a dog"}]'})
                add(tar, f"{number:04}", members)
                number += 1
    return folder


def add(tar: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    for kind, content in members.items():
        info = tarfile.TarInfo(f"{key}.{kind}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
