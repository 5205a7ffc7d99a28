"""Rows that share their images, as flat arrays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from vlmtune.batching import groups
from vlmtune.batching.groups import grouped

KEYS = ["b", "", "a", "b", "", "a", "c"]
CHUNKS = pa.chunked_array([KEYS[:1], [], KEYS[1:4], KEYS[4:]])


def as_lists(found: tuple[groups.Ints, groups.Ints]) -> list[list[int]]:
    members, starts = found
    return [part.tolist() for part in np.split(members, starts[1:-1])] if len(members) else []


@pytest.mark.parametrize(
    "keys",
    [KEYS, pa.array(KEYS), pa.chunked_array([KEYS[:1], [], KEYS[1:4], KEYS[4:]])],
    ids=["list", "array", "chunks"],
)
@pytest.mark.parametrize("at_once", [2, 1_000])
def test_groups_in_the_order_of_first_sight(keys, at_once, monkeypatch) -> None:
    monkeypatch.setattr(groups, "KEYS_AT_ONCE", at_once)
    assert as_lists(grouped(keys)) == [[0, 3], [1], [2, 5], [4], [6]]
    assert as_lists(grouped(keys, with_empty=False)) == [[0, 3], [2, 5], [6]]


@pytest.mark.parametrize("keys", [[], ["", ""], pa.chunked_array([], pa.string())])
def test_nothing_to_group(keys) -> None:
    members, starts = grouped(keys, with_empty=False)
    assert (len(members), starts.tolist()) == (0, [0])
    assert as_lists(grouped(keys)) == [[index] for index in range(len(keys))]


def test_many_keys_are_told_apart() -> None:
    """As a dictionary of them tells them apart."""
    rng = np.random.default_rng(0)
    keys = [f"{number:x}" if number % 7 else "" for number in rng.integers(0, 40_000, 100_000)]
    expected: dict[object, list[int]] = {}
    for index, key in enumerate(keys):
        expected.setdefault(key or index, []).append(index)
    assert as_lists(grouped(keys)) == list(expected.values())
