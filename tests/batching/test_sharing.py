"""Layouts and masks of shared rows, written out by hand."""

from __future__ import annotations

import pytest
import torch

from vlmtune.batching.encode import EncodedSample
from vlmtune.batching.masks import additive, tree_masks
from vlmtune.batching.sharing import (
    Row,
    collate_rows,
    common_prefix,
    describe_saving,
    group_samples,
    image_prefix,
    pack_rows,
    row_length,
    split_evenly,
)

# Token ids: 1 BOS, 7 an image's soft token, the others are words.
BOS, IMAGE, PAD = 1, 7, 0
BOTH = ("full_attention", "sliding_attention")


def sample(name: str, ids: list[int], learn: list[int], key: str = "k") -> EncodedSample:
    """A sample that learns the tokens at the places ``learn``."""
    return EncodedSample(
        id=name,
        input_ids=ids,
        supervised=[place in learn for place in range(len(ids))],
        token_type_ids=[int(token == IMAGE) for token in ids],
        n_images=len(key.split()),
        image_key=tuple(key.split()),
    )


def names(groups) -> list[list[str]]:
    return [[member.id for member in group] for group in groups]


FIRST = sample("first", [BOS, IMAGE, IMAGE, 20, 30, 31], [4, 5])
SECOND = sample("second", [BOS, IMAGE, IMAGE, 21, 40], [4])
THIRD = sample("third", [BOS, IMAGE, IMAGE, 20, 30, 32], [4, 5])


class TestRow:
    """One group laid in a row."""

    def test_two_branches(self) -> None:
        row = Row()
        row.append_group([FIRST, SECOND])
        assert row.input_ids == [BOS, IMAGE, IMAGE, 20, 30, 31, 21, 40]
        assert row.positions == [0, 1, 2, 3, 4, 5, 3, 4]
        assert row.branches == [0, 0, 0, 1, 1, 1, 2, 2]
        assert row.groups == [0] * 8
        assert row.blocks == [-1, 0, 0, -1, -1, -1, -1, -1]
        assert row.token_types == [0, 1, 1, 0, 0, 0, 0, 0]
        # 30 after 20, 31 after 30, 40 after 21.
        assert row.targets == {(3, 30): 1, (4, 31): 1, (6, 40): 1}

    def test_answers_that_begin_alike(self) -> None:
        """Both learn 30 at one place: it counts twice. What follows parts there: two targets of one source."""
        row = Row()
        row.append_group([FIRST, THIRD])
        assert row.input_ids == [BOS, IMAGE, IMAGE, 20, 30, 31, 32]
        assert row.positions == [0, 1, 2, 3, 4, 5, 5]
        assert row.branches == [0, 0, 0, 0, 0, 1, 2]
        assert row.targets == {(3, 30): 2, (4, 31): 1, (4, 32): 1}

    def test_one_text_is_the_beginning_of_another(self) -> None:
        row = Row()
        row.append_group([sample("short", [BOS, IMAGE, 20], [2]), sample("long", [BOS, IMAGE, 20, 30], [2, 3])])
        assert row.input_ids == [BOS, IMAGE, 20, 30]
        assert row.branches == [0, 0, 0, 2]
        assert row.targets == {(1, 20): 2, (2, 30): 1}

    def test_equal_texts(self) -> None:
        row = Row()
        row.append_group([FIRST, FIRST, FIRST])
        assert row.input_ids == FIRST.input_ids
        assert row.targets == {(3, 30): 3, (4, 31): 3}

    def test_one_sample_is_its_own_row(self) -> None:
        row = Row()
        row.append_group([SECOND])
        assert (row.input_ids, row.positions) == (SECOND.input_ids, [0, 1, 2, 3, 4])
        assert row.branches == [0] * 5
        assert row.targets == {(3, 40): 1}

    def test_second_group_beside_the_first(self) -> None:
        row = Row()
        row.append_group([SECOND])
        row.append_group([sample("x", [BOS, IMAGE, 50, IMAGE, 60], [4], "k l")])
        assert row.positions == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
        assert row.groups == [0] * 5 + [1] * 5
        # Images are numbered through the row: neither meets the other.
        assert row.blocks == [-1, 0, 0, -1, -1, -1, 1, -1, 2, -1]
        assert row.targets == {(3, 40): 1, (8, 60): 1}

    def test_the_first_token_is_no_target(self) -> None:
        row = Row()
        row.append_group([sample("x", [BOS, 20], [0, 1], "")])
        assert row.targets == {(0, 20): 1}


class TestGroups:
    """Which samples lie in one row."""

    def test_by_image_in_order_of_first_sight(self) -> None:
        other = sample("other", [BOS, IMAGE, IMAGE, 20], [3], "l")
        assert names(group_samples([FIRST, other, SECOND])) == [["first", "second"], ["other"]]

    def test_without_images_alone(self) -> None:
        texts = [sample(name, [BOS, 20, 30], [2], "") for name in "ab"]
        assert names(group_samples(texts)) == [["a"], ["b"]]

    def test_images_in_another_order_or_place(self) -> None:
        one = sample("one", [BOS, IMAGE, IMAGE, 20], [3], "k l")
        two = sample("two", [BOS, IMAGE, IMAGE, 20], [3], "l k")
        late = sample("late", [BOS, 50, IMAGE, IMAGE, 20], [4], "k l")
        apart = sample("apart", [BOS, IMAGE, 50, IMAGE, 20], [4], "k l")
        assert names(group_samples([one, two, late, apart])) == [["one"], ["two"], ["late"], ["apart"]]

    def test_most_texts(self) -> None:
        many = [sample(str(n), [BOS, IMAGE, 20 + n], [2]) for n in range(7)]
        assert names(group_samples(many, max_texts=3)) == [["0", "1", "2"], ["3", "4"], ["5", "6"]]

    def test_most_tokens(self) -> None:
        many = [sample(str(n), [BOS, IMAGE, IMAGE, 20 + n, 30], [4]) for n in range(4)]
        # Four take 3 + 4 * 2 = 11 tokens, two take 7.
        assert row_length(many) == 11
        assert names(group_samples(many, max_tokens=11)) == [["0", "1", "2", "3"]]
        assert names(group_samples(many, max_tokens=10)) == [["0", "1"], ["2", "3"]]
        # Never below one sample, however long.
        assert names(group_samples(many, max_tokens=1)) == [["0"], ["1"], ["2"], ["3"]]

    def test_prefixes(self) -> None:
        assert common_prefix([FIRST]) == 6
        assert common_prefix([FIRST, SECOND]) == 3
        assert common_prefix([FIRST, THIRD]) == 5
        assert image_prefix(FIRST) == (BOS, IMAGE, IMAGE)
        assert image_prefix(sample("x", [BOS, 20], [1], "")) == ()

    @pytest.mark.parametrize(
        ("count", "parts", "sizes"), [(7, 3, [3, 2, 2]), (6, 3, [2, 2, 2]), (2, 2, [1, 1]), (5, 1, [5])]
    )
    def test_split_evenly(self, count, parts, sizes) -> None:
        found = split_evenly(range(count), parts)
        assert [len(part) for part in found] == sizes
        assert [item for part in found for item in part] == list(range(count))


class TestPacking:
    """Short groups lie beside each other below the longest's length."""

    def group(self, name: str, length: int):
        return [sample(name, [BOS, *range(20, 19 + length)], [1], "")]

    def test_first_fit_longest_first(self) -> None:
        rows = pack_rows([self.group("a", 3), self.group("b", 10), self.group("c", 6), self.group("d", 5)])
        assert [[members[0].id for members in row.members] for row in rows] == [["b"], ["c", "a"], ["d"]]
        assert [len(row) for row in rows] == [10, 9, 5]

    def test_no_row_grows_beyond_the_longest(self) -> None:
        rows = pack_rows([self.group(str(n), 4) for n in range(3)])
        assert [len(row) for row in rows] == [4, 4, 4]


class TestCollated:
    """Rows to tensors."""

    def test_by_hand(self) -> None:
        rows = pack_rows([[FIRST, SECOND], [sample("text", [BOS, 50, 60], [1, 2], "")]])
        batch = collate_rows(rows, pad_token_id=PAD)
        assert batch["input_ids"].tolist() == [[BOS, IMAGE, IMAGE, 20, 30, 31, 21, 40], [BOS, 50, 60, 0, 0, 0, 0, 0]]
        assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 3, 4], [0, 1, 2, 0, 0, 0, 0, 0]]
        assert batch["token_type_ids"].tolist() == [[0, 1, 1, 0, 0, 0, 0, 0], [0] * 8]
        groups, branches, blocks = batch["layout"].tolist()
        assert groups == [[0] * 8, [0, 0, 0, -1, -1, -1, -1, -1]]
        assert branches == [[0, 0, 0, 1, 1, 1, 2, 2], [0] * 8]
        assert blocks == [[-1, 0, 0, -1, -1, -1, -1, -1], [-1] * 8]
        assert batch["target_sources"].tolist() == [3, 4, 6, 8, 9]
        assert batch["target_ids"].tolist() == [30, 31, 40, 50, 60]
        assert batch["target_weights"].tolist() == [1, 1, 1, 1, 1]
        assert batch["target_weights"].dtype == torch.float32

    def test_multiple_of(self) -> None:
        rows = pack_rows([[FIRST], [SECOND]])
        batch = collate_rows(rows, pad_token_id=PAD, multiple_of=4)
        assert batch["input_ids"].shape == (2, 8)
        assert batch["target_sources"].tolist() == [3, 4, 11]


def seen(mask: torch.Tensor) -> list[str]:
    """One line a query, ``x`` where it sees a key."""
    return ["".join("x" if value else "." for value in row) for row in mask[0, 0].tolist()]


class TestMasks:
    """Which token sees which."""

    def masks(self, groups, *, multiple_of=None, **options):
        batch = collate_rows(groups, pad_token_id=PAD, multiple_of=multiple_of)
        return tree_masks(batch["layout"], batch["position_ids"], **{"block_layers": BOTH} | options)

    def row(self, *groups) -> list[Row]:
        row = Row()
        for group in groups:
            row.append_group(group)
        return [row]

    def test_branches(self) -> None:
        masks = self.masks(self.row([FIRST, SECOND]))
        assert masks.keys() == {"full_attention"}
        assert masks["full_attention"].shape == (1, 1, 8, 8)
        assert seen(masks["full_attention"]) == [
            "x.......",
            "xxx.....",  # soft tokens see each other
            "xxx.....",
            "xxxx....",
            "xxxxx...",
            "xxxxxx..",
            "xxx...x.",  # the second branch sees the prefix and itself
            "xxx...xx",
        ]

    def test_causal_images(self) -> None:
        masks = self.masks(self.row([FIRST, SECOND]), block_layers=())
        assert seen(masks["full_attention"])[1] == "xx......"

    def test_images_see_each_other_in_some_layers(self) -> None:
        masks = self.masks(self.row([FIRST, SECOND]), block_layers=("sliding_attention",), sliding_window=3)
        assert seen(masks["full_attention"])[1] == "xx......"
        assert seen(masks["sliding_attention"])[1] == "xxx....."

    def test_window_counts_positions(self) -> None:
        masks = self.masks(self.row([FIRST, SECOND]), sliding_window=3)
        assert seen(masks["full_attention"]) == seen(self.masks(self.row([FIRST, SECOND]))["full_attention"])
        assert seen(masks["sliding_attention"]) == [
            "x.......",
            "xxx.....",
            "xxx.....",
            ".xxx....",
            "..xxx...",
            "...xxx..",
            ".xx...x.",  # at position 3, as the first branch's beginning
            "..x...xx",
        ]

    def test_groups_in_one_row_and_padding(self) -> None:
        other = sample("other", [BOS, IMAGE, 50], [2], "l")
        masks = self.masks(self.row([sample("a", [BOS, IMAGE, IMAGE], [2])], [other]), multiple_of=8)
        assert seen(masks["full_attention"]) == [
            "x.......",
            "xxx.....",
            "xxx.....",
            "...x....",
            "...xx...",
            "...xxx..",
            "......x.",  # padding sees itself alone
            ".......x",
        ]

    def test_two_images_of_one_sample(self) -> None:
        two = sample("two", [BOS, IMAGE, IMAGE, 50, IMAGE, IMAGE], [], "k l")
        assert seen(self.masks(self.row([two]))["full_attention"]) == [
            "x.....",
            "xxx...",
            "xxx...",
            "xxxx..",
            "xxxxxx",
            "xxxxxx",
        ]

    def test_additive(self) -> None:
        mask = torch.tensor([[True, False]])
        found = additive(mask, torch.bfloat16)
        assert found.dtype == torch.bfloat16
        assert found.tolist() == [[0, torch.finfo(torch.bfloat16).min]]


class TestSaving:
    """The run's first lines say what sharing saves."""

    def test_numbers(self) -> None:
        # 4 texts of 10 tokens about one image of 6: 40 become 40 - 3 * 6 = 22.
        text = describe_saving(["k"] * 4, [10] * 4, [6] * 4)
        assert text == (
            "1 images, 4 texts, 4 of them share an image: 1.8 times fewer tokens, 4.0 times fewer vision passes"
        )

    def test_texts_alone(self) -> None:
        assert describe_saving(["", ""], [5, 5], [0, 0]) == "no images"
        assert describe_saving(["k", ""], [10, 5], [6, 0]).endswith("; 1 samples without an image")
        assert "1 texts, 0 of them share" in describe_saving(["k", ""], [10, 5], [6, 0])
