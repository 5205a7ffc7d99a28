"""Batches that keep the texts of an image together, the same ones on any number of devices.

A step's samples depend on the data, the seed, the epoch and the size of the step alone. How many devices, and how
many batches of each, share a step out decides only where a group is computed, so a run can go on with other devices.

Memory: 8 bytes a sample and 24 a group in arrays; no list of the epoch is made.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, Sampler

from vlmtune.batching.groups import Ints, Keys, grouped, ranges

# Steps whose groups are sorted by length together: enough that the groups of a step are alike, few enough that
# an epoch's order stays random.
MEGABATCH = 50
# Column of a row that only keeps a device in step with the others; its tokens weigh nothing.
FILLER = "filler"


class ImageGroupSampler(Sampler[list[int]]):
    """Yields batches of about ``batch_size`` samples made of whole groups, each sample once an epoch.

    A step (``batch_size * world_size * accumulation`` samples) takes whole groups until it reaches its share of the
    samples seen so far, so steps differ in size by less than a group and their mean is the size asked for or a
    little less. Its groups are dealt to the devices' batches so that each computes about the same: the costliest
    group first, always to the batch with the least work. Work is a row's tokens plus the soft tokens of the images
    that pass through the tower. Groups above ``max_texts`` are split evenly, anew in every epoch; of a group above
    ``batch_size`` the parts lie in several batches of one step.

    Every rank gets the same number of batches. Where a step has fewer samples than batches, the empty ones yield
    ``total + index``, the row ``index`` as a filler: see :class:`WithFillers`.

    Args:
        image_keys: a name of each sample's images; see :func:`vlmtune.batching.groups.grouped`.
        lengths: tokens of each sample.
        batch_size: samples of one device's batch, in the mean.
        image_tokens: soft tokens of each sample, which the texts of an image share; none by default.
        vision_passes: images go through the tower in every step; not with cached features.
        max_texts: most samples of a group in one step; as many as a step holds by default.
        accumulation: batches of a device in one step.
        seed: of the order.
        rank: this process's number.
        world_size: number of processes.
        shuffle: draw a new order each epoch.
    """

    def __init__(
        self,
        image_keys: Keys,
        lengths: Sequence[int] | Ints,
        batch_size: int,
        *,
        image_tokens: Sequence[int] | Ints | None = None,
        vision_passes: bool = True,
        max_texts: int | None = None,
        accumulation: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int32)
        self.image_tokens = np.zeros_like(self.lengths) if image_tokens is None else np.asarray(image_tokens, np.int32)
        self.vision_passes = vision_passes
        # The name that accelerate and the trainer look for.
        self.batch_size = batch_size
        self.batches_per_step = world_size * accumulation
        self.step_size = batch_size * self.batches_per_step
        self.max_texts = min(max_texts or self.step_size, self.step_size)
        self.accumulation = accumulation
        self.seed, self.epoch = seed, 0
        self.rank, self.world_size = rank, world_size
        self.shuffle = shuffle
        self.total = len(self.lengths)
        self.members, self.starts = grouped(image_keys)

    @property
    def steps(self) -> int:
        """Optimizer steps of one epoch."""
        return -(-self.total // self.step_size)

    def __len__(self) -> int:
        """Number of batches of one rank in one epoch."""
        return self.steps * self.accumulation

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the epoch to come."""
        self.epoch = epoch

    def set_batches(self, batch_size: int, accumulation: int) -> None:
        """Share the same steps out over more and smaller batches, or fewer and larger ones."""
        assert batch_size * accumulation == self.batch_size * self.accumulation, "the steps would be others"
        self.batch_size, self.accumulation = batch_size, accumulation
        self.batches_per_step = self.world_size * accumulation

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's batches of row indices."""
        for step in self.step_batches():
            yield from step[self.rank]

    def batches(self) -> list[list[int]]:
        """Return the epoch's batches of all ranks, in the order in which they are computed."""
        return [batch for step in self.step_batches() for turn in zip(*step, strict=True) for batch in turn]

    def step_batches(self) -> Iterator[list[list[list[int]]]]:
        """Yield each step's batches: for each rank, ``accumulation`` lists of row indices."""
        if not self.total:
            return
        rng = np.random.default_rng([self.seed, self.epoch])
        epoch = self._order(rng)
        numbers = rng.permutation(self.steps) if self.shuffle else np.arange(self.steps)
        for number in numbers:
            pieces = epoch.order[epoch.cuts[number] : epoch.cuts[number + 1]]
            yield self._deal([epoch.members[epoch.starts[piece] : epoch.starts[piece + 1]] for piece in pieces])

    def _order(self, rng: np.random.Generator) -> _Epoch:
        """Groups in the epoch's order, the large ones split, neighbours of like length, and where steps begin."""
        members, starts = self.members, self.starts
        sizes = np.diff(starts)
        if self.shuffle and sizes.max() > self.max_texts:
            members = _mixed(members, starts, sizes > self.max_texts, rng)
        starts = _split(starts, sizes, self.max_texts)
        sizes = np.diff(starts)
        count = len(sizes)
        order = rng.permutation(count) if self.shuffle else np.arange(count)
        if self.shuffle:
            tokens = np.add.reduceat(self.lengths[members], starts[:-1], dtype=np.int64)
            window = MEGABATCH * max(1, round(self.step_size * count / self.total))
            order = order[np.lexsort((tokens[order], np.arange(count) // window))]
        ends = np.cumsum(sizes[order])
        middles = ends - sizes[order] / 2
        # Half a group over its share is as far as half a group below it.
        numbers = np.arange(1, self.steps + 1)
        cuts = np.searchsorted(middles, self.total * numbers / self.steps, side="right")
        # Every step gets a group at least.
        cuts = np.maximum.accumulate(cuts - numbers) + numbers
        cuts = np.minimum(np.maximum(cuts, numbers), count - self.steps + numbers)
        return _Epoch(members, starts, order, np.concatenate([[0], cuts]))

    def _deal(self, groups: list[Ints]) -> list[list[list[int]]]:
        """Share a step's groups out over the ranks' batches."""
        parts = [part for group in groups for part in np.array_split(group, -(-len(group) // self.batch_size))]
        while len(parts) < self.batches_per_step:
            largest = max(range(len(parts)), key=lambda index: len(parts[index]))
            if len(parts[largest]) < 2:
                break
            parts[largest : largest + 1] = np.array_split(parts[largest], 2)
        costs = [self._cost(part) for part in parts]
        heap = [(0, number) for number in range(self.batches_per_step)]
        batches: list[list[int]] = [[] for _ in heap]
        work = [0] * len(heap)
        # Stable: groups of one cost keep their order.
        for index in sorted(range(len(parts)), key=lambda index: -costs[index]):
            done, number = heapq.heappop(heap)
            batches[number] += parts[index].tolist()
            work[number] = done + costs[index]
            heapq.heappush(heap, (work[number], number))
        filler = self.total + int(groups[0][0])
        heaviest_first = sorted(range(len(heap)), key=lambda number: -work[number])
        ranks: list[list[list[int]]] = [[] for _ in range(self.world_size)]
        for turn in range(self.accumulation):
            chosen = heaviest_first[turn * self.world_size : (turn + 1) * self.world_size]
            # There and back, so that no rank has the heaviest batch of every turn.
            for rank, number in enumerate(chosen if turn % 2 == 0 else reversed(chosen)):
                ranks[rank].append(batches[number] or [filler])
        return ranks

    def _cost(self, rows: Ints) -> int:
        """Tokens of the group's row, and the soft tokens of its images once more for the pass through the tower."""
        shared = int(self.image_tokens[rows[0]])
        tokens = shared + int((self.lengths[rows] - shared).sum())
        return tokens + shared * self.vision_passes


@dataclass(frozen=True)
class _Epoch:
    """Rows of each group (``members[starts[i]:starts[i + 1]]``), the groups' order, and each step's slice of it."""

    members: Ints
    starts: Ints
    order: Ints
    cuts: Ints


class WithFillers(Dataset[dict[str, Any]]):
    """A data set to which the sampler's ``total + index`` is row ``index``, marked as a filler.

    Collators give a filler's tokens the weight 0, so a device without samples of its own computes something, and
    the step is as if it had not.

    Args:
        rows: the data set.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        total = len(self.rows)
        row: Mapping[str, Any] = self.rows[index % total]
        return {**row, FILLER: True} if index >= total else dict(row)


def _mixed(members: Ints, starts: Ints, chosen: npt.NDArray[np.bool_], rng: np.random.Generator) -> Ints:
    """Members with those of the chosen groups in random order inside their group."""
    sizes = np.diff(starts)[chosen]
    places = ranges(starts[:-1][chosen], sizes)
    numbers = np.repeat(np.arange(len(sizes)), sizes)
    mixed = members.copy()
    mixed[places] = members[places][np.lexsort((rng.random(len(places)), numbers))]
    return mixed


def _split(starts: Ints, sizes: Ints, most: int) -> Ints:
    """Where groups begin when those above ``most`` are split into parts whose sizes differ by one at most."""
    parts = -(-sizes // most)
    if parts.max(initial=1) == 1:
        return starts
    part = ranges(np.zeros_like(parts), parts)
    size, larger = np.repeat(sizes // parts, parts), np.repeat(sizes % parts, parts)
    return np.append(np.repeat(starts[:-1], parts) + part * size + np.minimum(part, larger), starts[-1])
