"""One image, many texts, computed once: lay samples of one image in one row as ``P S_1 S_2 ... S_k``.

P is the samples' longest common token prefix, S_i the rest of each. Positions restart at |P| for every S_i, and
masks (see ``vlmtune.batching.masks``) keep the branches apart, so each sample computes exactly what it would
compute alone. A branch's first token is predicted from the token before it *in its sample*, which may be P's last;
targets are therefore (source, target) pairs. Related: Molmo's message trees (arXiv:2409.17146) and Prefix Grouper
(arXiv:2506.05433).

Shape legend: B rows, L tokens of the longest row, N targets.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import Any

import numpy as np
import torch

from vlmtune.batching.encode import EncodedSample
from vlmtune.batching.groups import Ints, Keys, grouped

PADDING = -1
NO_BLOCK = -1


@dataclass
class Row:
    """One row under construction: the tokens of one group of samples, or of several side by side.

    Attributes:
        input_ids: token ids.
        positions: position of each token in its sample.
        groups: number of the group each token belongs to.
        branches: 0 for a prefix token, i for a token of the group's i-th branch.
        blocks: number of the image whose soft token it is, or ``NO_BLOCK``.
        token_types: 1 on soft tokens.
        targets: (source index, target id) -> how many samples learn it.
        members: the samples of each group.
        axes: positions of each token on each axis, where there are several.
    """

    input_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    token_types: list[int] = field(default_factory=list)
    targets: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))
    members: list[list[EncodedSample]] = field(default_factory=list)
    axes: list[list[int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.input_ids)

    def append_group(self, samples: Sequence[EncodedSample]) -> None:
        """Lay a group of samples at the row's end."""
        prefix = common_prefix(samples)
        group = len(self.members)
        self.members.append(list(samples))
        start = len(self)
        self._append(samples[0], range(prefix), group, branch=0)
        for branch, sample in enumerate(samples, 1):
            first = len(self)
            self._append(sample, range(prefix, len(sample.input_ids)), group, branch)
            for position in range(1, len(sample.input_ids)):
                if sample.supervised[position]:
                    before = position - 1
                    source = start + before if before < prefix else first + before - prefix
                    self.targets[source, sample.input_ids[position]] += 1

    def _append(self, sample: EncodedSample, positions: range, group: int, branch: int) -> None:
        span = slice(positions.start, positions.stop)
        types = sample.token_type_ids[span]
        last_block = max(self.blocks, default=NO_BLOCK)
        previous = 0
        for flag in types:
            last_block += bool(flag and not previous)
            self.blocks.append(last_block if flag else NO_BLOCK)
            previous = flag
        self.input_ids += sample.input_ids[span]
        self.positions += positions
        self.axes = self.axes or [[] for _ in sample.axes]
        for axis, values in zip(self.axes, sample.axes, strict=True):
            axis += values[span]
        self.token_types += types
        self.groups += [group] * len(positions)
        self.branches += [branch] * len(positions)


def common_prefix(samples: Sequence[EncodedSample]) -> int:
    """Length of the longest token prefix that all samples share."""
    if len(samples) == 1:
        return len(samples[0].input_ids)
    columns = zip(*(sample.input_ids for sample in samples), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def image_prefix(sample: EncodedSample) -> tuple[int, ...]:
    """Token ids through the last soft token; empty for text alone."""
    last = max((index for index, flag in enumerate(sample.token_type_ids) if flag), default=-1)
    return tuple(sample.input_ids[: last + 1])


def group_samples(
    samples: Sequence[EncodedSample], *, max_texts: int | None = None, max_tokens: int | None = None
) -> list[list[EncodedSample]]:
    """Split a batch into groups that can lie in one row: equal images at equal places, in equal order.

    Args:
        samples: with ``image_key``; a sample without images, or whose images stand after other tokens than the
            others', forms a group of its own.
        max_texts: most samples a group; larger ones are split evenly.
        max_tokens: most tokens a group takes as a row; larger ones are split evenly, never below one sample.
    """
    found: dict[Any, list[EncodedSample]] = {}
    for index, sample in enumerate(samples):
        key = (sample.image_key, image_prefix(sample)) if sample.image_key else index
        found.setdefault(key, []).append(sample)
    return [part for group in found.values() for part in _within(group, max_texts, max_tokens)]


def _within(group: list[EncodedSample], max_texts: int | None, max_tokens: int | None) -> Iterable[list[EncodedSample]]:
    parts = 1 if not max_texts else -(-len(group) // max_texts)
    while max_tokens and parts < len(group):
        if all(row_length(part) <= max_tokens for part in split_evenly(group, parts)):
            break
        parts += 1
    return split_evenly(group, parts)


def split_evenly(items: Sequence[Any], parts: int) -> list[list[Any]]:
    """Split into ``parts`` runs whose lengths differ by one at most."""
    size, larger = divmod(len(items), parts)
    cuts = [index * size + min(index, larger) for index in range(parts + 1)]
    return [list(items[start:stop]) for start, stop in pairwise(cuts)]


def row_length(samples: Sequence[EncodedSample]) -> int:
    """Tokens that a group takes as one row."""
    prefix = common_prefix(samples)
    return prefix + sum(len(sample.input_ids) - prefix for sample in samples)


def pack_rows(groups: Sequence[Sequence[EncodedSample]]) -> list[Row]:
    """Lay groups in rows, several in one where they fit below the longest group's length.

    No row grows beyond the longest group, so packing only lessens padding (first fit, longest first).
    """
    sized = sorted(((row_length(group), index) for index, group in enumerate(groups)), key=lambda item: -item[0])
    limit = sized[0][0]
    rows: list[Row] = []
    for length, index in sized:
        row = next((row for row in rows if len(row) + length <= limit), None)
        if row is None:
            rows.append(row := Row())
        row.append_group(groups[index])
    return rows


def collate_rows(rows: Sequence[Row], *, pad_token_id: int, multiple_of: int | None = None) -> dict[str, Any]:
    """Pad rows on the right and join their targets.

    Returns:
        ``input_ids``, ``position_ids``, ``token_type_ids`` (B, L); ``layout`` (3, B, L): group (``PADDING`` on
        padding), branch and image block of each token; ``target_sources``, ``target_ids``, ``target_weights``
        (N,): indices into the flattened B * L positions, what to predict there, and for how many samples;
        ``axes`` (axes, B, L), where positions have several.
    """
    length = max(len(row) for row in rows)
    if multiple_of:
        length = -(-length // multiple_of) * multiple_of

    def padded(values: Sequence[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([list(value) + [fill] * (length - len(value)) for value in values])

    targets = [
        (number * length + source, target, weight)
        for number, row in enumerate(rows)
        for (source, target), weight in row.targets.items()
    ]
    sources, ids, weights = torch.tensor(targets).reshape(-1, 3).unbind(1)
    axes = [padded(list(axis), 0) for axis in zip(*(row.axes for row in rows), strict=True)]
    return ({"axes": torch.stack(axes)} if axes else {}) | {
        "input_ids": padded([row.input_ids for row in rows], pad_token_id),
        "position_ids": padded([row.positions for row in rows], 0),
        "token_type_ids": padded([row.token_types for row in rows], 0),
        "layout": torch.stack(
            [
                padded([row.groups for row in rows], PADDING),
                padded([row.branches for row in rows], 0),
                padded([row.blocks for row in rows], NO_BLOCK),
            ]
        ),
        "target_sources": sources,
        "target_ids": ids,
        "target_weights": weights.float(),
    }


def describe_saving(image_keys: Keys, lengths: Sequence[int] | Ints, image_tokens: Sequence[int] | Ints) -> str:
    """Say how many texts share an image, and what computing it once saves; for the run's first lines.

    Args:
        image_keys: a name of each row's images; empty for text alone.
        lengths: tokens of each row.
        image_tokens: soft tokens of each row.
    """
    lengths, image_tokens = np.asarray(lengths, np.int64), np.asarray(image_tokens, np.int64)
    members, starts = grouped(image_keys, with_empty=False)
    if not len(members):
        return "no images"
    sizes, images, texts = np.diff(starts), len(starts) - 1, len(members)
    separate = int(lengths.sum())
    # At least the image's own tokens are shared; the common prefix is a little longer.
    saved = int((np.minimum.reduceat(image_tokens[members], starts[:-1]) * (sizes - 1)).sum())
    text = (
        f"{images:,} images, {texts:,} texts, {int(sizes[sizes > 1].sum()):,} of them share an image: "
        f"{separate / max(separate - saved, 1):.1f} times fewer tokens, "
        f"{texts / images:.1f} times fewer vision passes"
    )
    alone = len(lengths) - texts
    return text + (f"; {alone:,} samples without an image" if alone else "")
