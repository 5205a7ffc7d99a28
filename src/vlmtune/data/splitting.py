"""Divide samples in two by the contents of their images, so that no image is on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def held_out(images: Sequence[Sequence[str]], fraction: float, seed: int) -> list[bool]:
    """Return which samples are held out: about a share of the images, each with all its texts.

    Samples that share an image, also by way of others, stay together. The choice depends on what the images hold and
    on the seed alone: it is the same on every machine and in every order, whatever the files are called, and it stays
    when other images are added.

    Args:
        images: of each sample, a name of each image by its content; for a sample without any, of its text.
        fraction: share to hold out.
        seed: another one holds out others.
    """
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        while parents[name] != name:
            parents[name] = name = parents[parents[name]]
        return name

    for names in images:
        for name in names:
            parents.setdefault(name, name)
            one, other = root(names[0]), root(name)
            # The least name stands for all of them, whatever the order in which they were met.
            parents[max(one, other)] = min(one, other)
    return [_share(f"{seed}:{root(names[0])}") < fraction for names in images]


def _share(text: str) -> float:
    """A number from 0 to 1, evenly spread."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
