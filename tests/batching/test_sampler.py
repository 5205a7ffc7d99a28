"""Batches of whole groups: each sample once an epoch, the same number of batches on every rank."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.batching.sampler import FILLER, ImageGroupSampler, WithFillers


def keys_of(*sizes: int, alone: int = 0) -> list[str]:
    """Keys of groups of these sizes, interleaved, and of samples without images."""
    rng = np.random.default_rng(0)
    keys = [f"image{number}" for number, size in enumerate(sizes) for _ in range(size)] + [""] * alone
    return [keys[index] for index in rng.permutation(len(keys))]


def make(keys: list[str], batch_size: int, **options) -> ImageGroupSampler:
    return ImageGroupSampler(keys, [10] * len(keys), batch_size, **options)


def per_rank(keys: list[str], batch_size: int, world: int, epoch: int = 0, **options) -> list[list[list[int]]]:
    found = []
    for rank in range(world):
        sampler = make(keys, batch_size, rank=rank, world_size=world, **options)
        sampler.set_epoch(epoch)
        found.append(list(sampler))
        assert len(found[-1]) == len(sampler)
    return found


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), max_size=40),
    alone=st.integers(0, 20),
    batch_size=st.integers(1, 8),
    world=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
    max_texts=st.sampled_from([None, 1, 3, 100]),
)
def test_every_mixture(sizes, alone, batch_size, world, accumulation, seed, epoch, shuffle, max_texts) -> None:
    keys = keys_of(*sizes, alone=alone)
    options = {"seed": seed, "shuffle": shuffle, "max_texts": max_texts}
    ranks = per_rank(keys, batch_size, world, epoch, accumulation=accumulation, **options)
    total, at_once = len(keys), world * accumulation
    steps = -(-total // (batch_size * at_once))
    # The same number of batches on every rank, each with something to do.
    assert [len(rank) for rank in ranks] == [steps * accumulation] * world
    per_step = [
        [batch for rank in ranks for batch in rank[number * accumulation : (number + 1) * accumulation]]
        for number in range(steps)
    ]
    most = min(max_texts or batch_size * at_once, batch_size * at_once)
    groups = Counter(key for key in keys if key)
    seen: Counter[int] = Counter()
    for batches in per_step:
        rows = [index for batch in batches for index in batch if index < total]
        seen.update(rows)
        assert rows and all(batches)
        # A filler stands alone, only where samples are too few, and is a row of its step.
        for batch in batches:
            if max(batch) >= total:
                assert len(batch) == 1 and batch[0] - total in rows and len(rows) < at_once
        if len(batches) == at_once and len({keys[i] for i in rows} - {""}) + sum(not keys[i] for i in rows) >= at_once:
            for key in {keys[index] for index in rows if keys[index]}:
                inside = [sum(keys[index] == key for index in batch if index < total) for batch in batches]
                if sum(inside) <= min(batch_size, most):
                    assert sorted(inside)[-1] == sum(inside), f"{key} was split inside a step"
    assert seen == Counter(range(total))
    for key, size in groups.items():
        if size <= most:
            assert sum(any(keys[i % total] == key for batch in step for i in batch) for step in per_step) == 1
    # Off the mean by a group at most.
    assert all(sum(i < total for b in step for i in b) <= batch_size * at_once + most for step in per_step)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), max_size=40),
    alone=st.integers(0, 20),
    split=st.sampled_from([((12, 1, 1), (3, 2, 2), (1, 3, 4), (4, 3, 1)), ((8, 1, 1), (2, 4, 1), (1, 8, 1))]),
    max_texts=st.sampled_from([None, 3]),
)
def test_a_step_is_the_same_on_any_number_of_devices(sizes, alone, split, max_texts) -> None:
    keys = keys_of(*sizes, alone=alone)
    lengths = np.random.default_rng(1).integers(5, 90, len(keys))

    def steps(batch_size: int, world: int, accumulation: int) -> list[list[int]]:
        sampler = ImageGroupSampler(
            keys, lengths, batch_size, world_size=world, accumulation=accumulation, max_texts=max_texts, seed=3
        )
        found = [[i for rank in step for batch in rank for i in batch] for step in sampler.step_batches()]
        return [sorted(i for i in step if i < len(keys)) for step in found]

    first, *others = (steps(*one) for one in split)
    assert all(other == first for other in others)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_sizes_stay_near_the_mean(world) -> None:
    keys = keys_of(*[1, 2, 3, 4, 5] * 40)
    ranks = per_rank(keys, 20, world)
    sizes = [sum(map(len, step)) for step in zip(*ranks, strict=True)]
    assert sum(sizes) == 600
    assert np.mean(sizes) == pytest.approx(20 * world, rel=0.11)
    assert max(sizes) - min(sizes) <= 5
    # Of groups of one length, each device takes as many samples.
    batches = [len(batch) for rank in ranks for batch in rank]
    assert min(batches) >= 15
    assert max(batches) <= 25


@pytest.mark.parametrize("world", [2, 4, 8])
def test_devices_have_equal_work(world) -> None:
    """Texts of very unequal length, some about images: tokens and vision passes together differ little in a step."""
    rng = np.random.default_rng(0)
    keys = keys_of(*rng.integers(1, 8, 400), alone=800)
    image_tokens = np.array([64 if key else 0 for key in keys])
    lengths = image_tokens + rng.lognormal(3.5, 0.8, len(keys)).astype(int) + 1

    def work(rows: list[int]) -> int:
        firsts = {keys[index] or index: index for index in rows}.values()
        return int((lengths - image_tokens)[rows].sum()) + 2 * int(image_tokens[list(firsts)].sum())

    def excess(steps: list[tuple[list[int], ...]]) -> float:
        return float(np.mean([max(map(work, step)) / np.mean([work(rows) for rows in step]) for step in steps])) - 1

    options = {"image_tokens": image_tokens, "world_size": world}
    ranks = [list(ImageGroupSampler(keys, lengths, 16, rank=rank, **options)) for rank in range(world)]
    steps = list(zip(*ranks, strict=True))

    def in_turn(step: tuple[list[int], ...]) -> tuple[list[int], ...]:
        groups: dict[str | int, list[int]] = {}
        for index in sorted(index for rows in step for index in rows):
            groups.setdefault(keys[index] or index, []).append(index)
        return tuple(list(chain.from_iterable(list(groups.values())[rank::world])) for rank in range(world))

    assert excess(steps) < 0.12
    assert excess(steps) < excess([in_turn(step) for step in steps]) * 0.75


def test_cached_features_weigh_no_vision_pass() -> None:
    keys, lengths, soft = ["a", "b", "", ""], [20, 20, 25, 25], [16, 16, 0, 0]

    def batches(vision_passes: bool) -> list[list[int]]:
        return ImageGroupSampler(
            keys, lengths, 2, image_tokens=soft, vision_passes=vision_passes, world_size=2, shuffle=False
        ).batches()

    # With the pass an image costs more than a longer text, and is dealt first.
    assert batches(True) == [[0, 2], [1, 3]]
    assert batches(False) == [[2, 0], [3, 1]]


def test_five_captions_an_image() -> None:
    keys = keys_of(*[5] * 100)
    batches = make(keys, 20).batches()
    assert [len(batch) for batch in batches] == [20] * 25
    assert all(len({keys[index] for index in batch}) == 4 for batch in batches)


def test_one_image_with_a_thousand_questions() -> None:
    sampler = make(["image"] * 1000, 16)
    first = sampler.batches()
    assert sorted(chain.from_iterable(first)) == list(range(1000))
    assert max(len(batch) for batch in first) <= 16
    # Split anew in every epoch: other questions meet.
    sampler.set_epoch(1)
    second = sampler.batches()
    assert {frozenset(batch) for batch in first}.isdisjoint(frozenset(batch) for batch in second)


def test_max_texts_splits_evenly() -> None:
    assert [len(batch) for batch in make(["a"] * 10, 4, max_texts=4, shuffle=False).batches()] == [4, 3, 3]


class TestOrder:
    """Seed and epoch decide the order, and nothing else."""

    keys = keys_of(*[3] * 30, alone=10)

    def test_repeatable(self) -> None:
        assert make(self.keys, 8, seed=3).batches() == make(self.keys, 8, seed=3).batches()
        np.random.seed(1)
        first = list(make(self.keys, 8))
        np.random.seed(2)
        assert list(make(self.keys, 8)) == first

    def test_other_epoch_and_seed(self) -> None:
        sampler = make(self.keys, 8)
        first = sampler.batches()
        assert sampler.batches() == first
        sampler.set_epoch(1)
        assert sampler.batches() != first
        assert {tuple(sorted(batch)) for batch in sampler.batches()} != {tuple(sorted(batch)) for batch in first}
        sampler.set_epoch(0)
        assert sampler.batches() == first
        assert make(self.keys, 8, seed=1).batches() != first

    def test_without_shuffling(self) -> None:
        sampler = make(["b", "b", "a", "", "a", "c"], 3, shuffle=False)
        assert sampler.batches() == [[0, 1, 2, 4], [3, 5]]
        sampler.set_epoch(5)
        assert sampler.batches() == [[0, 1, 2, 4], [3, 5]]

    def test_all_batches_in_turn(self) -> None:
        whole = make(self.keys, 8, world_size=2).batches()
        one, two = per_rank(self.keys, 8, 2)
        assert whole == [batch for both in zip(one, two, strict=True) for batch in both]

    def test_arrow_keys(self) -> None:
        found = ImageGroupSampler(pa.chunked_array([self.keys[:7], self.keys[7:]]), [10] * len(self.keys), 8)
        assert found.batches() == make(self.keys, 8).batches()

    def test_batches_hold_rows_of_like_length(self) -> None:
        rng = np.random.default_rng(0)
        lengths = rng.integers(10, 500, 400)
        keys = [""] * 400
        batches = ImageGroupSampler(keys, lengths, 8).batches()
        spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
        plain = np.mean([np.ptp(part) for part in rng.permutation(lengths).reshape(-1, 8)])
        assert spread < plain / 10
        # The batches themselves come in random order, not from short to long.
        means = [lengths[batch].mean() for batch in batches]
        assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.4


class TestFewSamples:
    """Edges: less data than ranks or batches."""

    def test_none(self) -> None:
        sampler = make([], 4, world_size=2)
        assert len(sampler) == 0
        assert list(sampler) == []

    @pytest.mark.parametrize("world", [2, 3, 4])
    def test_fewer_samples_than_ranks(self, world) -> None:
        ranks = per_rank([""], 4, world)
        assert ranks == [[[0]], *[[[1]]] * (world - 1)]

    def test_one_group_for_two_ranks(self) -> None:
        ranks = per_rank(["a"] * 4, 4, 2)
        assert sorted(chain.from_iterable(chain.from_iterable(ranks))) == [0, 1, 2, 3]
        assert [len(rank[0]) for rank in ranks] == [2, 2]

    def test_empty_keys_are_no_group(self) -> None:
        batches = make([""] * 12, 4).batches()
        assert [len(batch) for batch in batches] == [4, 4, 4]


def test_accelerate_finds_the_batch_size() -> None:
    assert make(["a"] * 8, 4).batch_size == 4


def test_fillers_are_marked_rows() -> None:
    rows = WithFillers([{"id": "a"}, {"id": "b"}])
    assert len(rows) == 2
    assert [rows[index] for index in (1, 2)] == [{"id": "b"}, {"id": "a", FILLER: True}]
