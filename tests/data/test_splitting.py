"""Which samples are held out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vlmtune.data.splitting import held_out

GROUPS = st.lists(st.lists(st.sampled_from("abcdefghijklmnop"), min_size=1, max_size=3), min_size=1, max_size=12)


@given(GROUPS, st.integers(0, 50), st.randoms())
def test_no_image_is_on_both_sides_in_any_order(groups, seed: int, random) -> None:
    chosen = held_out(groups, 0.5, seed)
    sides = [
        {name for names, side in zip(groups, chosen, strict=True) if side is which for name in names}
        for which in (True, False)
    ]
    assert not sides[0] & sides[1]
    order = list(range(len(groups)))
    random.shuffle(order)
    assert held_out([groups[place] for place in order], 0.5, seed) == [chosen[place] for place in order]


def test_the_share_is_kept_and_grows() -> None:
    images = [[f"{number:04d}"] for number in range(4000)]
    for seed in (0, 1):
        few, many = held_out(images, 0.1, seed), held_out(images, 0.3, seed)
        assert 320 < sum(few) < 480
        assert all(more for less, more in zip(few, many, strict=True) if less)
    assert held_out(images, 0.1, 0) != held_out(images, 0.1, 1)


def test_a_split_is_the_same_everywhere() -> None:
    """As it was when this was written; a change would move images between training and evaluation."""
    assert held_out([["a"], ["b"], ["c", "a"], ["d"], ["e"]], 0.5, 7) == [False, False, False, False, True]
