"""The distinct images of the data that are checked, by number; their bytes stay where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import datasets

from vlmtune.data.pages import batches
from vlmtune.data.sample import ImageRef


class Pictures:
    """The distinct images of several data sets, numbered in the order in which they are met.

    Only their places are kept: the bytes of all images of a Parquet file may exceed the memory.

    Attributes:
        rows: of each data set, the numbers of each row's images.
    """

    def __init__(self, data: Sequence[datasets.Dataset]) -> None:
        self._data = list(data)
        self._first: list[tuple[int, int, int]] = []
        self.rows: list[list[tuple[int, ...]]] = []
        numbers: dict[int, int] = {}
        for index, dataset in enumerate(self._data):
            self.rows.append([])
            for row, refs in enumerate(_images(dataset)):
                own = []
                for place, ref in enumerate(refs):
                    number = numbers.setdefault(hash(ref), len(self._first))
                    if number == len(self._first):
                        self._first.append((index, row, place))
                    own.append(number)
                self.rows[-1].append(tuple(own))

    def __len__(self) -> int:
        return len(self._first)

    def __iter__(self) -> Iterator[ImageRef]:
        """Read the images once, in the order of their numbers."""
        following = iter(self._first)
        wanted = next(following, None)
        for index, dataset in enumerate(self._data):
            for row, refs in enumerate(_images(dataset)):
                for place, ref in enumerate(refs):
                    if (index, row, place) == wanted:
                        yield ref
                        wanted = next(following, None)

    def __getitem__(self, number: int) -> ImageRef:
        index, row, place = self._first[number]
        return ImageRef(**self._data[index][row]["images"][place])

    def name(self, number: int) -> str:
        """An image's path, or the first row that holds it as bytes."""
        index, row, _ = self._first[number]
        return self[number].path or f"image of {self._data[index][row]['id']}"


def _images(dataset: datasets.Dataset) -> Iterator[list[ImageRef]]:
    for _, batch in batches(dataset, ["images"]):
        for row in batch["images"].to_pylist():
            yield [ImageRef(**image) for image in row]
