"""Images that look alike: groups by difference hashes, in time that grows little faster than their number.

Shape legend: N images, U distinct hashes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from vlmtune.inspection.images import ImageFacts

# Of 128 bits; saving a photo again at another quality or size changes 0 to 4 of them, another photo some 60.
MOST_BITS = 6
MOST_COLOR_DIFFERENCE = 24
MOST_MEAN_DIFFERENCE = 8
BANDS = 8
# Each band takes bits from all over the picture, so that none has only those of a plain border.
_SPREAD = np.random.default_rng(0).permutation(128)
# Images compared with each other at once within a band.
BLOCK = 1024


def look_alikes(facts: Sequence[ImageFacts]) -> list[list[int]]:
    """Return groups of indices of images that are equal or nearly so, the largest group first.

    Two hashes that differ in at most 6 of 128 bits have one of eight 16-bit bands in common, so only images that
    share a band are compared. Their colours must agree as well, by place and in the mean.
    """
    parents = list(range(len(facts)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = index = parents[parents[index]]
        return index

    by_key: dict[str, int] = {}
    for index, image in enumerate(facts):
        if image.key and not image.kind:
            parents[root(index)] = root(by_key.setdefault(image.key, index))
    chosen = [index for index in by_key.values() if facts[index].hashes is not None]
    if len(chosen) > 1:
        hashes = np.array([facts[index].hashes for index in chosen], dtype=np.uint64)
        colors = np.array([np.frombuffer(facts[index].colors, np.uint8) for index in chosen], dtype=np.int16)
        for one, other in _near(hashes, colors):
            parents[root(chosen[one])] = root(chosen[other])
    groups = defaultdict(list)
    for index, image in enumerate(facts):
        if not image.kind:
            groups[root(index)].append(index)
    return sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)


def _near(hashes: npt.NDArray[np.uint64], colors: npt.NDArray[np.int16]) -> Iterator[tuple[int, int]]:
    """Yield pairs of near hashes (N, 2) with near colours (N, 48)."""
    bits = np.unpackbits(hashes.view(np.uint8), axis=1)
    words = np.ascontiguousarray(np.packbits(bits[:, _SPREAD], axis=1)).view(np.uint16)
    means = colors.mean(axis=1)
    for band in range(BANDS):
        order = np.lexsort((means, words[:, band]))
        values = words[order, band]
        starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
        for start, stop in zip(starts, np.r_[starts[1:], len(order)], strict=True):
            if stop - start > 1:
                yield from _near_in(order[start:stop], hashes, colors, means)


def _near_in(
    members: npt.NDArray[np.intp],
    hashes: npt.NDArray[np.uint64],
    colors: npt.NDArray[np.int16],
    means: npt.NDArray[np.float64],
) -> Iterator[tuple[int, int]]:
    """Compare members, which are in the order of their means, with those alone whose mean is near."""
    ends = np.searchsorted(means[members], means[members] + MOST_MEAN_DIFFERENCE, side="right")
    for first in range(0, len(members), BLOCK):
        some = members[first : first + BLOCK]
        for second in range(first, int(ends[first : first + BLOCK].max()), BLOCK):
            others = members[second : second + BLOCK]
            bits = np.bitwise_count(hashes[some, None] ^ hashes[None, others]).sum(axis=2, dtype=np.int16)
            rows, columns = np.nonzero(bits <= MOST_BITS)
            ahead = second + columns > first + rows
            rows, columns = some[rows[ahead]], others[columns[ahead]]
            near = np.abs(means[rows] - means[columns]) <= MOST_MEAN_DIFFERENCE
            rows, columns = rows[near], columns[near]
            near = np.abs(colors[rows] - colors[columns]).max(axis=1, initial=0) <= MOST_COLOR_DIFFERENCE
            yield from zip(rows[near].tolist(), columns[near].tolist(), strict=True)
