"""Generated rows in every format's layout, good and bad: each is trained on or named, or the file ends in an error."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmtune.data.formats import FORMATS
from vlmtune.data.loading import load_samples
from vlmtune.data.quarantine import Quarantine
from vlmtune.errors import DataError, VlmtuneError

EXAMPLES, MANY_EXAMPLES = 15, 200
MILLION = 1_000_000
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["A dog.", " ", "", "<image>", "猫 и 🐈", 'a "quoted", one', "two\nlines", "\x00", "\ud800", "x" * 3000]
    ),
)
NAMES = st.one_of(
    st.sampled_from(["0.jpg", "猫.jpg", "cut.jpg", "page.jpg", "empty.jpg", "bomb.png", "gone.jpg", "out.jpg"]),
    st.sampled_from(["../outside.jpg", "/etc/passwd", "", "a" * 400, "0.jpg/x", "http://example.org/a.jpg"]),
    TEXTS,
)
WRONG = st.one_of(st.none(), st.booleans(), st.floats(), TEXTS, st.lists(TEXTS, max_size=2), st.just({}))
NUMBERS = st.one_of(st.integers(0, 3), st.sampled_from([-1, 10**20, "1", 1.5, None, [], True]))


def mostly(right: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(right, right, right, WRONG)


def row(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Rows with these fields, of which some hold another type or lack, and values that are no row."""
    whole = st.fixed_dictionaries({name: mostly(value) for name, value in fields.items()})
    parts = st.fixed_dictionaries({}, optional={name: mostly(value) for name, value in fields.items()})
    return st.one_of(whole, whole, whole, parts, WRONG)


def json_file(place: Path, name: str, content: Any) -> None:
    (place / name).write_text(json.dumps(content), encoding="utf-8")


BOX = st.one_of(st.just([1, 2, 20, 20]), st.lists(st.one_of(st.floats(), st.integers(), st.none()), max_size=5))
CHOICES = st.one_of(st.just(["a", "b"]), st.lists(TEXTS, max_size=3))
SENTENCES = st.lists(row(sent=TEXTS, sent_id=NUMBERS), max_size=2)
OBJECTS = st.lists(row(id=NUMBERS, image_id=NUMBERS, bbox=BOX, category_id=NUMBERS, iscrowd=NUMBERS), max_size=4)
KINDS = st.lists(row(id=NUMBERS, name=TEXTS), max_size=2)
SHARD_ROWS = st.one_of(row(question=TEXTS, answer=TEXTS), row(caption=TEXTS), WRONG)
# Format -> a row of its files.
ROWS: dict[str, st.SearchStrategy[Any]] = {
    "coco_captions": row(id=NUMBERS, image_id=NUMBERS, caption=TEXTS),
    "coco_instances": row(id=NUMBERS, file_name=NAMES, width=NUMBERS, height=NUMBERS),
    "textvqa": row(question_id=NUMBERS, image_id=NUMBERS, question=TEXTS, answers=st.lists(TEXTS, max_size=3)),
    "class_folders": st.tuples(st.sampled_from(["cat", "hot_dog"]), st.sampled_from(["0.jpg", "cut.jpg", "a.txt"])),
    "docvqa": row(questionId=NUMBERS, question=TEXTS, image=NAMES, answers=st.lists(TEXTS, max_size=2)),
    "chartqa": row(imgname=NAMES, query=TEXTS, label=TEXTS),
    "vqav2": row(question_id=NUMBERS, image_id=NUMBERS, question=TEXTS),
    "scienceqa": row(question=TEXTS, choices=CHOICES, answer=NUMBERS, hint=TEXTS, image=NAMES, split=TEXTS),
    "easy_vqa": st.one_of(st.tuples(TEXTS, TEXTS, NUMBERS), st.lists(WRONG, max_size=4), WRONG),
    "llava": row(id=TEXTS, image=NAMES, conversations=st.lists(row(**{"from": TEXTS, "value": TEXTS}), max_size=3)),
    "refcoco": row(ref_id=NUMBERS, ann_id=NUMBERS, image_id=NUMBERS, split=TEXTS, sentences=SENTENCES),
    "mdetr": row(id=NUMBERS, file_name=NAMES, caption=TEXTS),
    "flickr": st.tuples(NAMES, TEXTS),
    "karpathy": row(filename=NAMES, split=TEXTS, sentences=st.lists(row(raw=TEXTS), max_size=3)),
    "imagefolder": row(file_name=NAMES, text=st.one_of(TEXTS, st.lists(TEXTS, max_size=3))),
    "metadata_csv": st.tuples(NAMES, TEXTS),
    "csv": st.tuples(NAMES, TEXTS, TEXTS),
    "tables": st.fixed_dictionaries({"image": st.one_of(st.none(), NAMES), "text": st.one_of(st.none(), TEXTS)}),
    "captions": row(image=NAMES, captions=st.lists(TEXTS, max_size=3)),
    "webdataset": st.one_of(SHARD_ROWS, st.lists(SHARD_ROWS, max_size=3), st.binary(max_size=9)),
    "image_text_pairs": st.tuples(
        st.sampled_from(["0", "cut", "page", "bomb", "猫", "t1", "t2"]), st.binary(max_size=9)
    ),
}
FORMAT_OF = {
    "mdetr": "refcoco",
    "karpathy": "flickr",
    "metadata_csv": "imagefolder",
    "csv": "tables",
    "captions": "messages",
}


def write(place: Path, format: str, rows: list[Any], draw: Callable[[st.SearchStrategy[Any]], Any]) -> int:
    """Write rows into a folder of images; returns how many are to be accounted for, as the format counts rows."""
    if format == "coco_captions":
        json_file(place, "captions_val.json", {"images": [{"id": 0, "file_name": "0.jpg"}, 1], "annotations": rows})
        # The second image, which is no row, is named beside the captions.
        return len(rows) + 1
    if format in ("coco_instances", "mdetr"):
        boxes = draw(OBJECTS)
        known = {one["id"] for one in rows if isinstance(one, dict) and isinstance(one.get("id"), int | str)}
        of_image = [one.get("image_id") if isinstance(one, dict) else None for one in boxes]
        json_file(
            place,
            "instances_val.json" if format == "coco_instances" else "finetune_refcoco_val.json",
            {"images": rows, "annotations": boxes, "categories": draw(KINDS), "tokens_positive": []},
        )
        # An image is a row; objects of no image are named beside them.
        return len(rows) + sum(not isinstance(one, int | str) or one not in known for one in of_image)
    if format == "class_folders":
        photos = {file.name: file.read_bytes() for file in place.iterdir()}
        for file in place.iterdir():
            file.unlink()
        places = {f"train/{name}/{file}" for name, file in rows} | {"train/cat/bomb.png", "train/dog/猫.jpg"}
        for one in places:
            (place / one).parent.mkdir(parents=True, exist_ok=True)
            (place / one).write_bytes(photos.get(Path(one).name, b"notes"))
        return len(places)
    if format == "refcoco":
        images = [{"id": 0, "file_name": "0.jpg", "width": 64, "height": 48}, *draw(st.lists(WRONG, max_size=1))]
        json_file(place, "instances.json", {"images": images, "annotations": [{"id": 0, "bbox": [1, 2, 20, 20]}, []]})
        (place / "refs(unc).p").write_bytes(pickle.dumps(rows, protocol=2))
        return sum(max(len(listed(one, "sentences")), 1) for one in rows)
    if format == "karpathy":
        json_file(place, "dataset.json", {"images": rows, "sentids": []})
        read = [one for one in rows if isinstance(one, dict) and isinstance(one.get("filename"), str)]
        return len(rows) + sum(max(len(listed(one, "sentences")) - 1, 0) for one in read)
    if format == "image_text_pairs":
        texts = dict(rows)
        for stem, content in texts.items():
            (place / f"{stem}.txt").write_bytes(content)
        stems = {file.stem for file in place.iterdir() if file.suffix in (".jpg", ".png")}
        return len(stems | texts.keys())
    if format in ("flickr", "metadata_csv", "csv"):
        name, header = {
            "flickr": ("captions.csv", "image,caption"),
            "metadata_csv": ("metadata.csv", "file_name,text"),
            "csv": ("train.csv", "image,question,answer"),
        }[format]
        buffer = io.StringIO(header + "\n")
        buffer.seek(0, io.SEEK_END)
        csv.writer(buffer, lineterminator="\r\n").writerows(rows)
        (place / name).write_bytes(buffer.getvalue().encode("utf-8", "surrogatepass"))
        return len(rows)
    if format == "imagefolder":
        (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        # Each caption is set aside by itself.
        return sum(max(len(listed(one, "text")), 1) if named(one, "file_name") else 1 for one in rows)
    if format == "captions":
        (place / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        # One empty caption spoils its row.
        return sum(
            len(texts)
            if len(texts) > 1 and named(one, "image") and all(str(text or "").strip() for text in texts)
            else 1
            for one in rows
            for texts in [listed(one, "captions")]
        )
    if format == "tables":
        plain = [{name: None if "\ud800" in (value or "") else value for name, value in one.items()} for one in rows]
        pq.write_table(pa.Table.from_pylist(plain), place / "train.parquet")
    elif format == "webdataset":
        with tarfile.open(place / "train-000000.tar", "w") as shard:
            for number, one in enumerate(rows):
                content = one if isinstance(one, bytes) else json.dumps(one).encode()
                member = tarfile.TarInfo(f"{number}.json")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
        # A list in a .json is as many rows as it has.
        return sum(max(len(one), 1) if isinstance(one, list) else 1 for one in rows)
    elif format == "easy_vqa":
        json_file(place, "questions.json", rows)
    else:
        name, content = {
            "docvqa": ("val_v1.0.json", {"data": rows}),
            "textvqa": ("TextVQA_0.5.1_val.json", {"data": rows}),
            "chartqa": ("val_human.json", rows),
            "vqav2": ("v2_OpenEnded_mscoco_val2014_questions.json", {"questions": rows}),
            "scienceqa": ("problems.json", dict(enumerate(rows))),
            "llava": ("chat.json", rows),
        }[format]
        json_file(place, name, content)
    return len(rows)


def listed(one: Any, key: str) -> list[Any]:
    found = one.get(key) if isinstance(one, dict) else None
    return found if isinstance(found, list) else []


def named(one: Any, key: str) -> bool:
    """Whether a row names images in a way that can be read; that there are none of these names shows later."""
    found = one.get(key) if isinstance(one, dict) else None
    names = found if isinstance(found, list) and key == "image" else [found]
    return bool(names) and all(isinstance(name, str) and name and "[" not in name for name in names)


@pytest.fixture
def place(tmp_path: Path, image_folder: Path) -> Callable[[], Path]:
    """A new folder of images, good and bad, beside one outside of it."""
    whole = (image_folder / "0.jpg").read_bytes()
    size = (60_000).to_bytes(4, "big")
    contents = {"0.jpg": whole, "猫.jpg": whole, "cut.jpg": whole[: len(whole) // 2], "page.jpg": b"<html>"}
    contents |= {"empty.jpg": b"", "bomb.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + size * 2 + b"\x08\x02\0\0\0"}
    (tmp_path / "outside.jpg").write_bytes(whole)
    number = 0

    def make() -> Path:
        nonlocal number
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        (folder / "out.jpg").symlink_to(tmp_path / "outside.jpg")
        return folder

    return make


def test_every_format_has_generated_rows() -> None:
    assert {FORMAT_OF.get(name, name) for name in ROWS} | {"mixture"} == set(FORMATS)


@pytest.mark.parametrize("format", ROWS)
def test_rows_of_every_format_are_trained_on_or_named(
    place: Callable[[], Path], format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    account(place, format, monkeypatch, EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("format", ROWS)
def test_many_rows_of_every_format_are_trained_on_or_named(
    place: Callable[[], Path], format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    account(place, format, monkeypatch, MANY_EXAMPLES)


def account(place: Callable[[], Path], format: str, monkeypatch: pytest.MonkeyPatch, examples: int) -> None:
    """Count rows in, and those trained on or set aside, over generated files."""
    ended = []

    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
    )
    @given(rows=st.lists(ROWS[format], min_size=1, max_size=6), draw=st.data())
    def check(rows: list[Any], draw: Any) -> None:
        folder = place()
        # Repeated rows are named as such.
        expected = write(folder, format, rows * 2 if len(rows) == 3 else rows, draw.draw)
        known: list[Quarantine] = []
        monkeypatch.setattr(Quarantine, "require_below", lambda quarantine, *_: known.append(quarantine))
        try:
            data = load_samples(folder, format=FORMAT_OF.get(format, format), max_bad_fraction=1, verify_images="full")
        except VlmtuneError as error:
            ended.append("error")
            assert str(error)
            if "all were set aside" in str(error):
                assert len(known[-1]) == expected
            return
        ended.append("data")
        bad = data.quarantine.rows
        assert len(data.dataset) and all(row.id and row.kind and row.reason for row in bad)
        assert len(data.dataset) + len(bad) == expected
        assert len(set(data.dataset["id"][:])) == len(data.dataset)
        for one in data.dataset:
            for image in one["images"]:
                assert folder.resolve() in (found := Path(image["path"]).resolve()).parents or found.parent == Path(
                    "/etc"
                )

    check()
    assert len(ended) >= examples // 2


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("format", ["messages", "llava", "docvqa", "vqav2"])
def test_compressed_files_cut_short_are_named(layouts: Any, format: str, ending: str) -> None:
    place = getattr(layouts, format)()
    for file in sorted(place.glob("*.json*")):
        content = file.read_bytes()
        packed = gzip.compress(content) if ending == ".gz" else pa.compress(content, codec="zstd", asbytes=True)
        file.unlink()
        Path(f"{file}{ending}").write_bytes(packed)
    whole = load_samples(place)
    assert not whole.quarantine.rows and len(whole.dataset)
    file = sorted(place.glob(f"*{ending}"))[-1]
    packed = file.read_bytes()
    for size in (0, 5, len(packed) // 2, len(packed) - 3):
        file.write_bytes(packed[:size])
        with pytest.raises(VlmtuneError, match=r"cannot be read|is not JSON|holds no samples|has no split|no format"):
            load_samples(place / file.name, format=format, max_bad_fraction=1)


@pytest.mark.parametrize("layout", ["stream", "file"])
def test_arrow_cut_short_or_damaged_is_named(tmp_path: Path, layout: str) -> None:
    """Mapped into memory, such a file would end the process by a signal."""
    table = pa.table({"question": [f"What is {n}?" for n in range(2000)], "answer": ["A dog."] * 2000})
    file = tmp_path / "train.arrow"
    make = pa.ipc.new_stream if layout == "stream" else pa.ipc.new_file
    with make(str(file), table.schema) as writer:
        writer.write_table(table, max_chunksize=500)
    content = file.read_bytes()
    assert len(load_samples(tmp_path).dataset) == 2000
    for size in range(100, len(content) - 100, len(content) // 12):
        file.write_bytes(content[:size])
        with pytest.raises(DataError):
            load_samples(tmp_path, format="tables")
    for start in range(600, len(content), len(content) // 12):
        file.write_bytes(content[:start] + b"\xff" * 64 + content[start + 64 :])
        try:
            load_samples(tmp_path, format="tables", max_bad_fraction=1)
        except DataError as error:
            assert "train.arrow" in str(error) or str(tmp_path) in str(error)


@pytest.mark.slow
def test_a_million_rows_are_all_accounted_for(tmp_path: Path) -> None:
    total, broken = MILLION, 0
    with (tmp_path / "train.jsonl").open("w", encoding="utf-8") as file:
        for number in range(total):
            talk = [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": "猫"}]
            line = json.dumps({"messages": talk})
            bad = number % 200 == 7
            broken += bad
            file.write((line[:-2] if bad else line) + "\n")
    data = load_samples(tmp_path / "train.jsonl")
    assert (len(data.dataset), len(data.quarantine)) == (total - broken, broken)
    assert data.quarantine.rows[1].id == "train.jsonl, line 208"
    assert data.dataset[-1]["id"] == str(total)
    with pytest.raises(DataError, match=f"{broken:,} of {total:,} rows of .* cannot be used"):
        load_samples(tmp_path / "train.jsonl", max_bad_fraction=0.001)
