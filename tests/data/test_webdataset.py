"""WebDataset shards: read in place, in any order, by any number of processes."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vlmtune.data.images import content_of, decode
from vlmtune.data.loading import load_samples
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError

TALK = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]}


def shard(path: Path, members: Sequence[tuple[str, bytes | str | Any]]) -> Path:
    """Write a shard of members: bytes, texts, or objects as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as opened:
        for name, content in members:
            text = content if isinstance(content, bytes | str) else json.dumps(content)
            data = text if isinstance(text, bytes) else text.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    return path


def read(place: Path, **options: Any) -> list[Sample]:
    return [Sample.from_row(row) for row in load_samples(place, verify_images="full", **options).dataset]


@pytest.fixture
def photo(image_folder: Path) -> list[bytes]:
    return [(image_folder / f"{number}.jpg").read_bytes() for number in range(12)]


def test_images_stay_in_the_shard(tmp_path: Path, photo: list[bytes]) -> None:
    place = shard(
        tmp_path / "a.tar", [("x/1.jpg", photo[0]), ("x/1.json", TALK), ("x/2.json", TALK), ("x/2.jpg", photo[1])]
    )
    samples = read(place)
    assert [one.id for one in samples] == ["x/1", "x/2"]
    for one, content in zip(samples, photo[:2], strict=True):
        assert (one.images[0].path or "").startswith(f"{place}#x/") and content_of(one.images[0]) == content
        assert [part.type for part in one.messages[0].parts] == ["image", "text"]
        assert decode(one.images[0]).mode == "RGB"


def test_several_images_of_a_key_are_in_order(tmp_path: Path, photo: list[bytes]) -> None:
    row = {"messages": [{"role": "user", "content": "<image>or<image>?"}, {"role": "assistant", "content": "Both."}]}
    place = shard(tmp_path / "a.tar", [("1.a.jpg", photo[0]), ("1.b.jpg", photo[1]), ("1.json", row)])
    (one,) = read(place)
    assert [content_of(image) for image in one.images] == photo[:2]
    assert [part.type for part in one.messages[0].parts] == ["image", "text", "image", "text"]


def test_captions_beside_what_a_crawler_knows(tmp_path: Path, photo: list[bytes]) -> None:
    known = {"url": "http://example.org/1.jpg", "caption": None, "width": 50}
    place = shard(tmp_path / "a.tar", [("1.jpg", photo[0]), ("1.txt", "A dog.\n"), ("1.json", known)])
    (one,) = read(place, prompt="Say what you see.")
    assert (one.target, one.prompt[0].text, one.meta["width"]) == ("A dog.", "Say what you see.", 50)


def test_texts_of_one_image_and_text_alone(tmp_path: Path, photo: list[bytes]) -> None:
    others = [TALK | {"id": "one"}, {"question": "Who?", "answer": "A cat."}]
    place = shard(tmp_path / "a.tar", [("1.jpg", photo[0]), ("1.json", others), ("2.json", TALK)])
    first, second, third = read(place)
    assert (first.id, second.id, third.id) == ("one", "1#1", "2")
    assert first.images == second.images and not third.images


def test_splits_come_from_the_shards_names(tmp_path: Path, photo: list[bytes]) -> None:
    for split, number in (("train", 0), ("train", 1), ("testA", 2), ("data", 3)):
        shard(tmp_path / f"{split}-{number:06d}.tar", [(f"{number}.jpg", photo[number]), (f"{number}.txt", "A.")])
    assert [one.id for one in read(tmp_path, split="train")] == ["train/0", "train/1"]
    assert [len(read(tmp_path, split=split)) for split in ("train", "testA")] == [2, 1]
    assert len(read(tmp_path)) == 4
    with pytest.raises(DataError, match=r"no split 'tain'.*train"):
        load_samples(tmp_path, split="tain")


@pytest.mark.parametrize(
    ("members", "kind", "reason"),
    [
        ([("1.json", "{broken")], "unreadable row", "its text cannot be read"),
        ([("1.json", b"\xff\xfe")], "unreadable row", "its text cannot be read"),
        ([("1.json", [1])], "unusable row", "no object"),
        ([("1.json", [])], "unusable row", "no row"),
        ([("1.jpg", b"x")], "missing caption", "neither a .json nor a .txt"),
        ([("1.bin", b"x")], "unusable row", "neither an image nor a text, only bin"),
        ([("1.txt", "A.")], "missing image", "a caption and no image"),
    ],
)
def test_bad_keys_are_named(
    members: list[tuple[str, Any]], kind: str, reason: str, tmp_path: Path, photo: list[bytes]
) -> None:
    good = [("0.jpg", photo[0]), ("0.json", TALK)]
    data = load_samples(shard(tmp_path / "a.tar", [*good, *members, ("2.json", TALK)]), max_bad_fraction=0.9)
    assert data.dataset["id"][:] == ["0", "2"]
    (bad,) = data.quarantine.rows
    assert bad.kind == kind and reason in bad.reason and bad.id == "a.tar, 1"


def test_a_shard_cut_short_is_named(tmp_path: Path, photo: list[bytes]) -> None:
    place = shard(tmp_path / "a.tar", [("0.json", TALK), ("0.jpg", photo[0])])
    with place.open("r+b") as file:
        file.truncate(1024 + 700)
    with pytest.raises(DataError, match=r"a\.tar is cut short within 0\.jpg"):
        load_samples(place)


def test_every_sample_is_read_by_one_worker_of_one_rank(tmp_path: Path, photo: list[bytes]) -> None:
    """Two ranks of two workers each read every sample of the shards once, and no image twice."""
    from torch.utils.data import DataLoader

    from vlmtune.batching.sampler import ImageGroupSampler
    from vlmtune.training.image_reuse import with_image_keys

    for number in range(3):
        members = [(f"{number}{k}.jpg", photo[4 * number + k]) for k in range(4)]
        rows = [(f"{number}{k}.json", [TALK, {"question": "Who?", "answer": "I."}]) for k in range(4)]
        shard(tmp_path / f"train-{number:06d}.tar", sorted(members + rows))
    dataset = with_image_keys(load_samples(tmp_path).dataset)
    seen: list[list[tuple[str, str]]] = []
    for rank in (0, 1):
        sampler = ImageGroupSampler(dataset["image_key"][:], [10] * len(dataset), 4, rank=rank, world_size=2, seed=1)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=2, collate_fn=_contents)
        seen.append([item for batch in loader for item in batch])
    assert len(seen[0]) == len(seen[1]) == 12
    assert sorted(seen[0] + seen[1]) == sorted(_contents([dataset[index] for index in range(24)]))
    assert not {image for _, image in seen[0]} & {image for _, image in seen[1]}


def _contents(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["id"], content_of(Sample.from_row(row).images[0])[:4000].hex()) for row in rows]
