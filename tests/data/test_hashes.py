"""Content hashes are remembered for files that have not changed, and for no other."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from vlmtune.data import hashes
from vlmtune.data.hashes import Hasher, row_hashes
from vlmtune.data.images import content_hash
from vlmtune.data.loading import load_samples
from vlmtune.data.sample import ImageRef
from vlmtune.errors import ImageError


@pytest.fixture
def images(tmp_path: Path, image_folder: Path) -> list[ImageRef]:
    """Images of long ago: three files and one given as bytes."""
    shutil.copytree(image_folder, tmp_path / "images")
    for file in (tmp_path / "images").iterdir():
        os.utime(file, (1e9, 1e9))
    files = [ImageRef(str(tmp_path / "images" / f"{number}.jpg")) for number in (0, 1, 2)]
    return [*files, ImageRef(bytes=(image_folder / "3.jpg").read_bytes())]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that were read, in order."""
    names: list[str] = []

    def counted(image: ImageRef) -> str:
        names.append(image.filename)
        return content_hash(image)

    monkeypatch.setattr(hashes, "content_hash", counted)
    return names


def hashed(images: list[ImageRef], memory: Path) -> list[str]:
    with Hasher(memory) as hasher:
        return hasher.hashes(images)


def test_unchanged_files_are_not_read_again(images: list[ImageRef], read: list[str], tmp_path: Path) -> None:
    right = [content_hash(image) for image in images]
    assert hashed(images, tmp_path / "m") == right
    assert sorted(read) == ["", "0.jpg", "1.jpg", "2.jpg"]
    read.clear()
    assert hashed(images, tmp_path / "m") == right
    assert read == [""]


def test_a_changed_file_is_read_again(images: list[ImageRef], read: list[str], tmp_path: Path) -> None:
    hashed(images, tmp_path / "m")
    path = Path(images[0].name)
    path.write_bytes(path.read_bytes() + b"x")
    read.clear()
    assert hashed(images[:2], tmp_path / "m") == [content_hash(image) for image in images[:2]]
    assert read == ["0.jpg"]


def test_a_file_that_may_still_change_is_not_remembered(
    images: list[ImageRef], read: list[str], tmp_path: Path
) -> None:
    os.utime(images[0].name, (time.time(), time.time()))
    for _ in range(2):
        hashed(images[:1], tmp_path / "m")
    assert read == ["0.jpg", "0.jpg"]


@pytest.mark.parametrize("memory", ["broken", "folder"])
def test_a_memory_that_cannot_be_used_costs_nothing_but_time(
    images: list[ImageRef], memory: str, tmp_path: Path
) -> None:
    path = tmp_path / memory
    if memory == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"no database" * 1000)
    assert hashed(images, path) == [content_hash(image) for image in images]


def test_rows_get_the_hashes_of_their_images(layouts) -> None:
    dataset = load_samples(layouts.flickr()).dataset
    found = [row for batch in row_hashes(dataset) for row in batch]
    assert found == [[content_hash(ImageRef(**image)) for image in row] for row in dataset["images"]]
    Path(dataset[0]["images"][0]["path"]).unlink()
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        list(row_hashes(dataset))
