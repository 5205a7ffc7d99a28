"""Images scored that look like training images: saved anew, at another size or quality."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vlmtune.data.sample import ImageRef
from vlmtune.inspection.duplicates import look_alikes
from vlmtune.inspection.images import inspect_images

# Some 15 s of one core.
MOST_IMAGES = 5000
SHOWN = 3


def near_copies(training: Iterable[ImageRef], scored: Iterable[ImageRef]) -> dict[str, Any]:
    """Count the images scored that are nearly training images, but for those that are so to the byte.

    Returns:
        How many are ``near``, and ``such_as``: (name, the training image's name) of a few. Or ``skipped`` with the
        reason, where there are so many images that looking at them takes long.
    """
    known, asked = set(training), set(scored)
    refs = sorted(known | asked, key=lambda ref: ref.name)
    if len(refs) > MOST_IMAGES:
        return {"skipped": f"{len(refs):,} images are more than {MOST_IMAGES:,}; vlmtune check looks at all"}
    facts = inspect_images(refs, len(refs), processes=1)
    key = {ref: one.key for ref, one in zip(refs, facts, strict=True)}
    equal = {key[ref] for ref in known}
    pairs = []
    for group in look_alikes(facts):
        members = [refs[index] for index in group]
        like = next((ref for ref in members if ref in known), None)
        if like is not None:
            pairs += [(ref.name, like.name) for ref in members if ref in asked and key[ref] not in equal]
    return {"near": len(pairs), "such_as": sorted(pairs)[:SHOWN]}
