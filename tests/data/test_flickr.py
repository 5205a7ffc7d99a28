"""Flickr layouts: every captions file, its splits, and its bad rows and images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmtune.data.formats import flickr
from vlmtune.data.loading import FlickrDatasetLoader, LoadedData, load_samples
from vlmtune.data.recognition import choose_format
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError, QuarantineError

Make = Callable[..., Path]


def samples(data: LoadedData) -> list[Sample]:
    return [Sample.from_row(row) for row in data.dataset]


def captions(data: LoadedData) -> dict[str, list[str | None]]:
    found: dict[str, list[str | None]] = {}
    for sample in samples(data):
        found.setdefault(sample.meta["image"], []).append(sample.target)
    return found


def reasons(data: LoadedData) -> list[tuple[str, str]]:
    return [(row.id, row.kind) for row in data.quarantine.rows]


KAGGLE = (
    'image,caption\n0.jpg,A dog runs .\n0.jpg,"A dog, a cat and a ""bird"" ."\n0.jpg,Two dogs, unquoted\n'
    '0.jpg,"Stop" says the sign\n0.jpg,A 5" pipe\n1.jpg,Ein Mädchen läuft 雪\n'
)
KAGGLE_CAPTIONS = {
    "0.jpg": ["A dog runs .", 'A dog, a cat and a "bird" .', "Two dogs, unquoted", '"Stop" says the sign', 'A 5" pipe'],
    "1.jpg": ["Ein Mädchen läuft 雪"],
}
HASHES = "".join(f"{i // 5}.jpg#{i % 5}\tCaption {i} , with #2 tags .\n" for i in range(15))
BARS = (
    "image_name| comment_number| comment\n0.jpg| 0| Two men | one hat .\n0.jpg| 1| A man .\n"
    "1.jpg| 4   A dog runs across the grass .\n"
)
KARPATHY = {
    "images": [
        {"filename": f"{i}.jpg", "split": split, "sentences": [{"raw": f"Caption {i}."}, {"tokens": ["a", "dog"]}]}
        for i, split in enumerate(["train", "restval", "val", "test"])
    ]
}


@pytest.mark.parametrize("name", ["captions.txt", "captions.csv", "results.csv"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_kaggle_csv(flickr_folder: Make, name: str, mark: str, end: str) -> None:
    data = load_samples(flickr_folder(name, mark + KAGGLE.replace("\n", end)))
    assert data.format == "flickr"
    assert captions(data) == KAGGLE_CAPTIONS
    assert not data.quarantine.rows


def test_five_captions_stay_five_samples_of_one_image(flickr_folder: Make) -> None:
    folder = flickr_folder("captions.txt", KAGGLE)
    five = samples(load_samples(folder, prompt="What is shown?"))[:5]
    assert [sample.id for sample in five] == [f"0.jpg#{number}" for number in range(5)]
    assert {sample.images[0].path for sample in five} == {str(folder / "Images" / "0.jpg")}
    assert {sample.references for sample in five} == {tuple(KAGGLE_CAPTIONS["0.jpg"])}
    assert {message.text for sample in five for message in sample.prompt} == {"What is shown?"}
    assert all(sample.problem() is None for sample in five)


def test_a_quoted_caption_may_run_over_lines(flickr_folder: Make) -> None:
    data = load_samples(flickr_folder("captions.txt", 'image,caption\n0.jpg,"A dog\nand a cat"\n1.jpg,A bird\n'))
    assert captions(data) == {"0.jpg": ["A dog\nand a cat"], "1.jpg": ["A bird"]}


def test_an_open_quote_spoils_its_own_row_alone(flickr_folder: Make) -> None:
    text = 'image,caption\n0.jpg,"A dog\n1.jpg,A bird\n2.jpg,"A cat, two"\n3.jpg,"The end\n'
    data = load_samples(flickr_folder("captions.txt", text), max_bad_fraction=0.5)
    assert captions(data) == {"1.jpg": ["A bird"], "2.jpg": ["A cat, two"]}
    assert reasons(data) == [
        ("captions.txt, line 2", "unreadable row"),
        ("captions.txt, line 5", "unreadable row"),
    ]
    assert "a quote that is never closed" in data.quarantine.rows[0].reason


@pytest.mark.parametrize("images", ["Flicker8k_Dataset", "Images"])
def test_flickr8k_tokens(flickr_folder: Make, images: str) -> None:
    folder = flickr_folder("Flickr8k.token.txt", HASHES, images=images)
    (folder / "Flickr8k.lemma.token.txt").write_text("0.jpg#0\tcaption be\n")
    data = load_samples(folder)
    assert captions(data) == {f"{i}.jpg": [f"Caption {5 * i + n} , with #2 tags ." for n in range(5)] for i in range(3)}


def test_flickr8ks_glued_number_is_taken_off(flickr_folder: Make) -> None:
    data = load_samples(flickr_folder("Flickr8k.token.txt", "0.jpg.1#0\tA dog .\n"))
    assert captions(data) == {"0.jpg": ["A dog ."]}


@pytest.mark.parametrize(("split", "images"), [("train", ["0.jpg"]), ("dev", ["1.jpg"]), ("test", ["2.jpg"])])
def test_flickr8k_splits(flickr_folder: Make, split: str, images: list[str]) -> None:
    folder = flickr_folder("Flickr8k.token.txt", HASHES, train="0.jpg\n", dev="1.jpg\n", test="2.jpg\r\n\n")
    assert flickr.splits(folder) == ("dev", "test", "train")
    data = load_samples(folder, split=split)
    assert list(captions(data)) == images
    assert len(data.dataset) == 5


def test_training_takes_the_train_split_alone(flickr_folder: Make) -> None:
    folder = flickr_folder("Flickr8k.token.txt", HASHES, train="0.jpg\n1.jpg\n", test="2.jpg\n")
    assert len(FlickrDatasetLoader.load(str(folder))) == 10
    assert len(load_samples(folder).dataset) == 15


def test_flickr30k_bars_with_the_broken_row(flickr_folder: Make) -> None:
    data = load_samples(flickr_folder("results.csv", BARS, images="flickr30k_images"))
    assert captions(data) == {
        "0.jpg": ["Two men | one hat .", "A man ."],
        "1.jpg": ["A dog runs across the grass ."],
    }
    assert not data.quarantine.rows


def test_the_archives_doubled_image_folder_is_found(flickr_folder: Make) -> None:
    folder = flickr_folder("results.csv", BARS, images="flickr30k_images/flickr30k_images")
    assert len(load_samples(folder).dataset) == 3


@pytest.mark.parametrize(
    ("split", "images"),
    [("train", ["0.jpg", "1.jpg"]), ("val", ["2.jpg"]), ("test", ["3.jpg"]), (None, [f"{i}.jpg" for i in range(4)])],
)
def test_karpathy_splits(flickr_folder: Make, split: str | None, images: list[str]) -> None:
    folder = flickr_folder("dataset_flickr8k.json", json.dumps(KARPATHY))
    assert flickr.splits(folder) == ("test", "train", "val")
    found = captions(load_samples(folder, split=split))
    assert list(found) == images
    assert found[images[0]] == [f"Caption {images[0][0]}.", "a dog"]


def test_karpathy_file_paths_and_missing_splits(flickr_folder: Make) -> None:
    image = {"filename": "0.jpg", "filepath": "part", "sentences": [{"raw": "A dog."}]}
    folder = flickr_folder("dataset.json", json.dumps({"images": [image]}), images="Images/part")
    assert flickr.splits(folder) == ()
    assert list(captions(load_samples(folder))) == ["part/0.jpg"]


@pytest.mark.parametrize(
    "image",
    ["text", {"filename": "5.jpg"}, {"sentences": []}, {"filename": "5.jpg", "sentences": ["A dog."]}],
    ids=str,
)
def test_bad_karpathy_rows_are_set_aside(flickr_folder: Make, image: Any) -> None:
    folder = flickr_folder("dataset.json", json.dumps({"images": [*KARPATHY["images"], image]}))
    data = load_samples(folder, max_bad_fraction=0.5)
    assert len(data.dataset) == 8
    assert reasons(data) == [("dataset.json, images[4]", "unreadable row")]


def test_a_broken_karpathy_file_is_named(flickr_folder: Make) -> None:
    folder = flickr_folder("dataset.json", '{"images": [{"sentences": [')
    with pytest.raises(DataError, match=r"dataset\.json cannot be read as Karpathy's splits"):
        load_samples(folder)


@pytest.mark.parametrize(
    ("name", "head", "line", "kind"),
    [
        ("captions.txt", "image,caption\n", b"0.jpg,", "empty caption"),
        ("captions.txt", "image,caption\n", b'0.jpg," "', "empty caption"),
        ("captions.txt", "image,caption\n", b"0.jpg", "unreadable row"),
        ("captions.txt", "image,caption\n", b"0.jpg,caf\xe9", "unreadable row"),
        ("a.token.txt", "", b"0.jpg#7\t", "empty caption"),
        ("a.token.txt", "", b"0.jpg#7 a dog", "unreadable row"),
        ("a.token.txt", "", b"0.jpg#7\tcaf\xe9", "unreadable row"),
        ("results.csv", "image_name| comment_number| comment\n", b"0.jpg| 7|  ", "empty caption"),
        ("results.csv", "image_name| comment_number| comment\n", b"0.jpg a dog", "unreadable row"),
    ],
)
def test_bad_rows_are_set_aside_by_line(flickr_folder: Make, name: str, head: str, line: bytes, kind: str) -> None:
    good = {"captions.txt": "{0}.jpg,Good {0}\n", "a.token.txt": "{0}.jpg#0\tGood {0}\n"}
    rows = "".join(good.get(name, "{0}.jpg| 0| Good {0}\n").format(i) for i in range(4))
    folder = flickr_folder(name, (head + rows).encode() + line + b"\n" + rows.replace("Good", "More").encode())
    data = load_samples(folder, max_bad_fraction=0.2)
    assert captions(data) == {f"{i}.jpg": [f"Good {i}", f"More {i}"] for i in range(4)}
    assert reasons(data) == [(f"{name}, line {5 + bool(head)}", kind)]


def test_bad_images_are_set_aside_with_all_their_captions(
    flickr_folder: Make, caplog: pytest.LogCaptureFixture
) -> None:
    folder = flickr_folder(
        "captions.txt", "image,caption\n" + "".join(f"{i}.jpg,Caption {n}\n" for i in range(5) for n in range(2))
    )
    whole = (folder / "Images" / "1.jpg").read_bytes()
    (folder / "Images" / "0.jpg").unlink()
    (folder / "Images" / "1.jpg").write_bytes(whole[: len(whole) - 200])
    (folder / "Images" / "2.jpg").write_bytes(b"")
    (folder / "Images" / "3.jpg").write_text("<html>Not found</html>")
    data = load_samples(folder, max_bad_fraction=0.8, verify_images="full")
    assert list(captions(data)) == ["4.jpg"]
    assert [row.id for row in data.quarantine.rows] == [f"{i}.jpg#{n}" for i in range(4) for n in range(2)]
    kinds = {row.id[0]: (row.kind, row.reason) for row in data.quarantine.rows}
    assert {name: kind for name, (kind, _) in kinds.items()} == {
        "0": "missing image",
        "1": "unreadable image",
        "2": "unreadable image",
        "3": "unreadable image",
    }
    for name, words in {"0": "does not exist", "1": "cannot be decoded", "2": "0 bytes", "3": "not an image"}.items():
        assert str(folder / "Images" / f"{name}.jpg") in kinds[name][1]
        assert words in kinds[name][1]
    assert "8 of 10 rows were set aside (6 unreadable image, 2 missing image)" in caplog.text


def test_duplicates_are_set_aside_and_name_the_first(flickr_folder: Make) -> None:
    folder = flickr_folder("captions.txt", "image,caption\n0.jpg,A dog\n1.jpg,A dog\n0.jpg,A cat\n0.jpg,A dog\n")
    data = load_samples(folder, max_bad_fraction=0.25)
    assert captions(data) == {"0.jpg": ["A dog", "A cat"], "1.jpg": ["A dog"]}
    assert reasons(data) == [("0.jpg#2", "duplicate")]
    assert "0.jpg#0" in data.quarantine.rows[0].reason


def test_too_many_bad_rows_stop_with_their_names(flickr_folder: Make) -> None:
    text = "image,caption\n" + "".join(f"{i}.jpg,Caption\n" for i in range(12)) + "gone.jpg,A ghost\n"
    folder = flickr_folder("captions.txt", text)
    with pytest.raises(QuarantineError) as caught:
        load_samples(folder)
    message = str(caught.value)
    assert "1 of 13 rows" in message
    assert "1 missing image" in message
    assert "gone.jpg#0" in message
    assert "raise max_bad_fraction" in message
    assert len(load_samples(folder, max_bad_fraction=1 / 13).dataset) == 12


def test_images_elsewhere_are_named_by_image_dir(flickr_folder: Make, image_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "captions.txt").write_text("image,caption\n0.jpg,A dog\n")
    with pytest.raises(DataError, match=r"holds captions but no images.*Set image_dir"):
        load_samples(folder)
    with pytest.raises(DataError, match=r"image_dir .* is neither a folder nor"):
        load_samples(folder, image_dir=tmp_path / "nowhere")
    assert len(load_samples(folder / "captions.txt", image_dir=image_folder).dataset) == 1


def test_images_may_lie_beside_the_captions(flickr_folder: Make) -> None:
    folder = flickr_folder("captions.txt", "image,caption\n0.jpg,A dog\n", images=".")
    assert samples(load_samples(folder))[0].images[0].path == str(folder / "0.jpg")


def test_two_captions_files_need_a_choice(flickr_folder: Make) -> None:
    folder = flickr_folder("captions.txt", KAGGLE)
    (folder / "results.csv").write_text(BARS)
    with pytest.raises(DataError, match=r"captions\.txt, results\.csv.*Name the file itself"):
        choose_format(folder)
    assert len(load_samples(folder / "results.csv").dataset) == 3


@pytest.mark.parametrize(
    ("others", "says"),
    [({"train": "0.jpg\n", "dev": "1.jpg\n"}, "it has dev, train.*Did you mean 'train'"), ({}, "leave the split out")],
    ids=["lists", "no splits"],
)
def test_an_unknown_split_is_answered_with_those_there_are(
    flickr_folder: Make, others: dict[str, str], says: str
) -> None:
    folder = flickr_folder("Flickr8k.token.txt", HASHES, **others)
    with pytest.raises(DataError, match=f"no split 'trian'.*{says}"):
        load_samples(folder, split="trian")


def test_an_unknown_karpathy_split_is_answered_with_those_there_are(flickr_folder: Make) -> None:
    folder = flickr_folder("dataset.json", json.dumps(KARPATHY))
    with pytest.raises(DataError, match="no split 'dev'; it has test, train, val"):
        load_samples(folder, split="dev")


def test_a_folder_without_captions_is_named(image_folder: Path) -> None:
    with pytest.raises(DataError, match="holds no captions file"):
        load_samples(image_folder, format="flickr")
