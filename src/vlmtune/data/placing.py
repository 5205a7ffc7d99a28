"""Where the images that rows name really lie: inside the data's folders, or in an archive.

A row's name must not lead out of the data: ``..`` and symbolic links are followed, and where they end outside of the
data's folder and of ``image_dir`` the row is set aside. A path that a row gives in full is the person's own choice.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from vlmtune.data import archives
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.remote import is_remote
from vlmtune.data.sample import ImageRef, Sample
from vlmtune.errors import ImageError


def absolute(path: str | Path) -> Path:
    """Return a path a person gave from the root on and without "..", which then can only come from a row."""
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100


class Placer:
    """Finds the place of each image of a data set.

    Args:
        place: the data's folder or file; absolute.
        image_dir: the images' folder or archive, where it was named; absolute.
    """

    def __init__(self, place: Path, image_dir: Path | None = None) -> None:
        folder = place if place.is_dir() else place.parent
        roots = [folder] if image_dir is None else [folder, image_dir]
        self._roots = [(str(root), os.path.realpath(root)) for root in roots]
        self._real_folder = lru_cache(maxsize=4096)(os.path.realpath)
        # Texts of an image mostly follow each other.
        self._placed = lru_cache(maxsize=4096)(self._place)

    def samples(self, samples: Iterable[Sample], quarantine: Quarantine) -> Iterator[Sample]:
        """Yield the samples with their images in place; those whose images lead out of the data are set aside."""
        for sample in samples:
            try:
                images = tuple(image if image.path is None else self._placed(image.path) for image in sample.images)
            except ImageError as error:
                quarantine.add(
                    sample.id, "outside the data" if "outside" in str(error) else "missing image", str(error)
                )
            else:
                yield sample if images == sample.images else replace(sample, images=images)

    def _place(self, path: str) -> ImageRef:
        if is_remote(ImageRef(path)) or archives.parse(path) is not None:
            return ImageRef(path)
        archive = self._archive_of(path)
        if archive is not None:
            name = path[len(str(archive)) + 1 :]
            try:
                return ImageRef(str(archives.open_archive(archive)[name]))
            except KeyError:
                raise ImageError(f"{archive} holds no file {name!r}. Correct the name.") from None
        if "\\" in path and not os.path.exists(path):  # noqa: PTH110 - Path's raises where a name is too long
            # Written on Windows.
            path = path.replace("\\", "/")
        self._require_inside(path)
        return ImageRef(path)

    @staticmethod
    def _archive_of(path: str) -> Path | None:
        """The archive among a path's folders: ``photos.zip`` of ``photos.zip/dog.jpg``."""
        if not any(f"{suffix}{os.sep}" in path.lower() for suffix in archives.SUFFIXES):
            return None
        return next((folder for folder in Path(path).parents if archives.is_archive(folder)), None)

    def _require_inside(self, path: str) -> None:
        if "\0" in path:
            raise ImageError(f"{path!r} cannot be a file's name. Correct the name.")
        in_data = any(path.startswith(root + os.sep) for root, _ in self._roots)
        if not in_data and f"{os.sep}..{os.sep}" not in path:
            return
        folder, _, name = path.rpartition(os.sep)
        real = f"{self._real_folder(folder)}{os.sep}{name}"
        if name in ("", ".", "..") or os.path.islink(real):  # noqa: PTH114 - Path's raises where a name is too long
            real = os.path.realpath(path)
        if not any(real.startswith(root + os.sep) for _, root in self._roots):
            raise ImageError(
                f"{path} lies outside the data's folder, at {real}: a name with '..' or a symbolic link leads out of "
                "it. Copy the file into the folder, or set image_dir to the folder that holds it."
            )
