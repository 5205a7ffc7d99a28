"""What a fingerprint depends on, and what it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from vlmtune.data.fingerprint import fingerprint
from vlmtune.data.sample import ImageRef, Message, Sample

ROWS = [
    Sample(
        f"row {number}",
        (ImageRef(path=f"/a/{number // 2}.jpg"),),
        (Message.make("user", "What is this?", images=1), Message.make("assistant", f"a dog {number}")),
        references=("a dog", "ein Hund: \N{DOG FACE}"),
    )
    for number in range(1500)
]


def of(samples: list[Sample]) -> str:
    return fingerprint(datasets.Dataset.from_list([sample.to_row() for sample in samples]))


def test_layout_in_memory_and_folders_do_not_matter(tmp_path: Path) -> None:
    whole = of(ROWS)
    parts = [datasets.Dataset.from_list([sample.to_row() for sample in part]) for part in (ROWS[:700], ROWS[700:])]
    assert fingerprint(datasets.concatenate_datasets(parts)) == whole
    parts[0].to_parquet(tmp_path / "a.parquet")
    read = datasets.Dataset.from_parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache"))
    assert fingerprint(read) == fingerprint(parts[0]) != whole
    twice = datasets.concatenate_datasets([parts[1], *parts])
    assert fingerprint(twice.select(range(800, 2300))) == whole
    elsewhere = [replace(one, images=(ImageRef(path=f"/b/c/{one.images[0].filename}"),)) for one in ROWS]
    assert of(elsewhere) == whole


@pytest.mark.parametrize(
    "change",
    [
        {"id": "other"},
        {"images": ()},
        {"images": (ImageRef(path="/a/other.jpg"),)},
        {"images": (ImageRef(bytes=b"x"),)},
        {"messages": (ROWS[7].messages[0], Message.make("assistant", "a cat 7"))},
        {"messages": (ROWS[7].messages[0], Message.make("user", "a dog 7"))},
        {"references": ("a dogein Hund: \N{DOG FACE}",)},
        {"references": ("a dog", "ein Hund: \N{DOG FACE}", "")},
    ],
)
def test_every_content_matters(change: dict[str, object]) -> None:
    changed = replace(ROWS[7], **change)  # type: ignore[arg-type]
    assert of([*ROWS[:7], changed, *ROWS[8:]]) != of(ROWS)


def test_order_matters() -> None:
    assert of([ROWS[1], ROWS[0], *ROWS[2:]]) != of(ROWS)
    assert of(ROWS[:2]) != of(ROWS[:1])
