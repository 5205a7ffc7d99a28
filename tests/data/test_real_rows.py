"""Rows and folders as public data sets and other trainers have them: each is learned as meant, or named."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlmtune.data.boxes import BOXES, read_boxes
from vlmtune.data.formats import FORMATS
from vlmtune.data.loading import load_samples
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError, FormatError

Turns = list[tuple[str, str]]


@pytest.fixture
def photo(image_folder: Path) -> Callable[[int], bytes]:
    """The bytes of one of a few different photos."""
    return lambda number=0: (image_folder / f"{number}.jpg").read_bytes()


@pytest.fixture
def folder(tmp_path: Path, photo: Callable[[int], bytes]) -> Path:
    """A folder with two images."""
    for number in (0, 1):
        (tmp_path / f"{number}.jpg").write_bytes(photo(number))
    return tmp_path


def shown(sample: Sample) -> Turns:
    """Turns as role and text, with <> for an image."""
    texts = ["".join("<>" if part.type == "image" else part.text or "" for part in m.parts) for m in sample.messages]
    return [(message.role, text) for message, text in zip(sample.messages, texts, strict=True)]


def read(place: Path, **options: Any) -> list[Sample]:
    data = load_samples(place, verify_images="full", **options)
    assert not data.quarantine.rows
    return [Sample.from_row(row) for row in data.dataset]


def lines(folder: Path, *rows: Any, name: str = "train.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / name


def said(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


ASKED: Turns = [("user", "<>What?"), ("assistant", "A dog.")]
IN_PARTS = [{"type": "text", "text": "What?"}]
# Whose rows, a row about 0.jpg, and what is learned of it.
ROWS: list[tuple[str, dict[str, Any], Turns]] = [
    ("LLaMA-Factory, ShareGPT", {"messages": said("<image>What?", "A dog."), "images": ["0.jpg"]}, ASKED),
    ("LLaMA-Factory, Alpaca",
     {"instruction": "<image>What", "input": "is this?", "output": "A dog.", "images": ["0.jpg"], "system": "Brief.",
      "history": [["Hi", "Hello"]]},
     [("system", "Brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "<>What\nis this?"),
      ("assistant", "A dog.")]),
    ("ms-swift, query", {"query": "<image>What?", "response": "A dog.", "images": ["0.jpg"]}, ASKED),
    ("ms-swift, conversation",
     {"system": "Brief.", "conversation": [{"human": "What?", "assistant": "A dog."}], "images": ["0.jpg"]},
     [("system", "Brief."), *ASKED]),
    ("PaliGemma, Roboflow's export", {"image": "0.jpg", "prefix": "What?", "suffix": "A dog."}, ASKED),
    ("Qwen-VL",
     {"conversations": [{"from": "user", "value": "Picture 1: <img>0.jpg</img>\nWhat?"},
                        {"from": "assistant", "value": "A dog."}]},
     [("user", "Picture 1: <>What?"), ("assistant", "A dog.")]),
    ("the HF H4 mix, parts with None",
     {"messages": [{"role": "user", "content": [{"index": None, "text": "What?", "type": "text"},
                                                {"index": 0, "text": None, "type": "image"}]},
                   {"role": "assistant", "content": [{"index": None, "text": "A dog.", "type": "text"}]}],
      "images": ["0.jpg"]},
     [("user", "What?<>"), ("assistant", "A dog.")]),
    ("an upper-case role", {"messages": [{"role": "USER", "content": "What?"}, {"role": "Assistant", "content": "A"}],
                            "image": "0.jpg"}, [("user", "<>What?"), ("assistant", "A")]),
    ("ChartQA of the Hub", {"image": "0.jpg", "query": "What?", "label": ["A dog."], "human_or_machine": 0}, ASKED),
    ("DocVQA, a question in languages",
     {"image": "0.jpg", "query": {"de": "Was?", "en": "What?"}, "answers": ["A dog."], "words": ["a"],
      "answer": {"match_score": 1.0, "text": "A dog.", "start": 1}}, ASKED),
    ("answers as SQuAD has them", {"image": "0.jpg", "question": "What?", "answers": {"text": ["A dog."]}}, ASKED),
    ("AI2D, a number as text",
     {"image": "0.jpg", "question": "What?", "options": ["a cat", "a dog"], "answer": "1"},
     [("user", "<>What?\nA. a cat\nB. a dog\nAnswer with the option's letter from the given choices directly."),
      ("assistant", "B")]),
    ("MMMU, options as text and numbered images",
     {"image_1": "0.jpg", "image_2": None, "question": "What?", "options": "['a cat', 'a dog']", "answer": "B"},
     [("user", "<>What?\nA. a cat\nB. a dog\nAnswer with the option's letter from the given choices directly."),
      ("assistant", "B")]),
    ("CORD", {"image": "0.jpg", "ground_truth": json.dumps({"gt_parse": {"total": "3 €"}, "meta": {}})},
     [("user", "<>Give the contents of this document as JSON."), ("assistant", '{"total": "3 €"}')]),
    ("PixMo, a file's address", {"image_url": "0.jpg", "caption": "A dog."},
     [("user", "<>Describe this image."), ("assistant", "A dog.")]),
    ("messages as text", {"messages": json.dumps(said("<image>What?", "A dog.")), "images": ["0.jpg"]}, ASKED),
    ("no image by an empty text", {"image": "", "conversations": [{"from": "human", "value": "What?"},
                                                                 {"from": "gpt", "value": "A dog."}]},
     [("user", "What?"), ("assistant", "A dog.")]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "turns"), [one[1:] for one in ROWS], ids=[one[0] for one in ROWS])
def test_rows_of_others_are_learned_as_meant(folder: Path, row: dict[str, Any], turns: Turns) -> None:
    (sample,) = read(lines(folder, row))
    assert shown(sample) == turns
    pictures = 1 if any("<>" in text for _, text in turns) else 0
    assert [image.path for image in sample.images] == [str(folder / "0.jpg")] * pictures
    assert sample.references == (sample.target,)


@pytest.mark.parametrize("part", ["base64", "source", "address"])
def test_images_inside_of_parts(folder: Path, photo: Callable[[int], bytes], part: str) -> None:
    """Axolotl's, Anthropic's and OpenAI's."""
    text = base64.b64encode(photo(0)).decode()
    image = {
        "base64": {"type": "image", "base64": text},
        "source": {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": text}},
        "address": {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{text}", "detail": "low"}},
    }[part]
    turns = [{"role": "user", "content": [image, *IN_PARTS]}, {"role": "assistant", "content": "A dog.", "weight": 1}]
    (sample,) = read(lines(folder, {"messages": turns}))
    assert shown(sample) == ASKED and sample.images[0].bytes == photo(0)


CAPTIONS = ["A dog.", "A pet.", "An animal."]


@pytest.mark.parametrize(
    "row",
    [
        {"caption": CAPTIONS},
        {"captions": CAPTIONS, "id": "x"},
        {"sentences": CAPTIONS, "filename": "elsewhere.jpg"},
        {"sentences": [{"raw": text, "tokens": text.split()} for text in CAPTIONS]},
        {f"caption_{number}": text for number, text in enumerate(CAPTIONS)},
    ],
    ids=str,
)
def test_each_caption_of_an_image_is_learned(folder: Path, row: dict[str, Any]) -> None:
    samples = read(lines(folder, {"image": "0.jpg"} | row))
    assert [sample.target for sample in samples] == CAPTIONS
    assert {sample.references for sample in samples} == {tuple(CAPTIONS)}
    assert len({sample.id for sample in samples}) == 3
    with pytest.raises(DataError, match="one of its captions is empty"):
        load_samples(lines(folder, {"image": "0.jpg", "caption": ["A dog.", " "]}))


TALK = said("<image>What?", "A dog.")
# What would be learned as something else than it is.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>What?"}]}, "is about video 'a.mp4'"),
    ({"videos": ["a.mp4"], "messages": said("<video>What?", "A dog.")}, "is about videos"),
    ({"audios": ["a.wav"], "images": ["0.jpg"], "messages": said("<image><audio>What?", "A")}, "is about audios"),
    ({"images": ["0.jpg"], "messages": TALK, "tools": '[{"name": "f"}]'}, "it has 'tools'"),
    ({"images": ["0.jpg"], "messages": [TALK[0], TALK[1] | {"weight": 0}]}, "its message 2 has weight 0"),
    ({"images": ["0.jpg"], "messages": [TALK[0], TALK[1] | {"train": False}]}, "its message 2 has train False"),
    ({"images": ["0.jpg"], "messages": [TALK[0], TALK[1] | {"loss": False}]}, "its message 2 has loss False"),
    ({"image": "0.jpg", "question": "What?", "answer": None}, "it has no answer"),
    ({"image": "0.jpg", "caption": None}, "its caption is empty"),
    ({"image": "0.jpg", "query": "x", "response": "y", "history": ["x"]}, "not a list of pairs"),
]


@pytest.mark.parametrize(("row", "reason"), REFUSED, ids=[str(reason) for _, reason in REFUSED])
def test_what_would_be_learned_wrongly_is_named(folder: Path, row: dict[str, Any], reason: str) -> None:
    good = {"image": "1.jpg", "caption": "A cat."}
    data = load_samples(lines(folder, good, row), format="messages", max_bad_fraction=0.5)
    (bad,) = data.quarantine.rows
    assert bad.id == "train.jsonl, line 2" and reason in bad.reason
    with pytest.raises(DataError, match=r"No row of .* can be used.*\n  train\.jsonl, line 1: "):
        load_samples(lines(folder, row), format="messages", max_bad_fraction=1)


def swift(question: str, answer: str, refs: list[str], *corners: list[float], **more: Any) -> dict[str, Any]:
    objects = {"ref": refs, "bbox": list(corners)} | {name: more.pop(name) for name in ("bbox_type",) if name in more}
    return {"messages": said(question, answer), "images": ["0.jpg"], "objects": objects} | more


@pytest.mark.parametrize(
    ("row", "question", "labels", "task"),
    [
        (swift("<image>Find the <ref-object>.", "<bbox><bbox>", ["sheep"], [1, 2, 9, 9], [20, 2, 30, 9]),
         "Find the sheep.", ["sheep", "sheep"], "detection"),
        (swift("<image>Find the <ref-object>.", "<bbox>", ["sheep"], [1, 2, 9, 9]),
         "Find the sheep.", ["sheep"], "grounding"),
        (swift("<image>Find all.", "<ref-object><bbox>, <ref-object><bbox>", ["dog", "cat"], [1, 2, 9, 9],
               [20, 2, 30, 9]), "Find all.", ["dog", "cat"], "detection"),
        (swift("Find the <ref-object>.", "<bbox>", ["sheep"], [0.25, 0.25, 0.5, 0.5], bbox_type="norm1", width=64,
               height=48), "Find the sheep.", ["sheep"], "grounding"),
    ],
)  # fmt: skip
def test_boxes_of_swift(folder: Path, row: dict[str, Any], question: str, labels: list[str], task: str) -> None:
    """Its placeholders are never learned as words."""
    (sample,) = read(lines(folder, row))
    boxes = read_boxes(sample.target or "")
    assert sample.prompt[0].text == question and boxes is not None
    assert [box.label for box in boxes] == labels and sample.meta[BOXES]["task"] == task
    assert boxes[0].corners == ((16, 12, 32, 24) if "bbox_type" in row["objects"] else (1, 2, 9, 9))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (swift("<image>Describe.", "A <ref-object><bbox> runs.", ["dog"], [1, 2, 9, 9]), "stand among other words"),
        (swift("<image>What is in <bbox>?", "A dog.", [], [1, 2, 9, 9]), "stand among other words"),
        (swift("<image>Find the <ref-object>.", "<bbox>", ["dog"]), "it has 1 <bbox> and 1 <ref-object> for 0 and 1"),
        (swift("<image>Find the <ref-object>.", "<bbox>", ["dog"], [615, 226]), "is not four numbers"),
        (swift("<image>Find all.", "<bbox><bbox>", [], [1, 2, 9, 9], [2, 2, 9, 9]), "no <ref-object> says"),
        (swift("<image>Find the <ref-object>.", "<bbox>", ["dog"], [0.1, 0.2, 0.3, 0.4], bbox_type="norm1"),
         "'width' and 'height'"),
    ],
)  # fmt: skip
def test_boxes_of_swift_that_no_family_can_be_told(folder: Path, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError) as raised:
        load_samples(lines(folder, row))
    assert reason in str(raised.value)


def table(folder: Path, name: str, *rows: dict[str, Any]) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / name)


# A CSV file as spreadsheets of several countries write it.
CSVS = {
    "commas": b"image,question,answer\n0.jpg,What?,A dog.\n1.jpg,\"What, now?\",A cat.\n",
    "semicolons, Windows' line ends": b"image;question;answer\r\n0.jpg;What?;A dog.\r\n1.jpg;What, now?;A cat.\r\n",
    "tabs": b"image\tquestion\tanswer\n0.jpg\tWhat?\tA dog.\n1.jpg\tWhat, now?\tA cat.\n",
    "UTF-16": "image\tquestion\tanswer\n0.jpg\tWhat?\tA dog.\n1.jpg\tWhat, now?\tA cat.\n".encode("utf-16"),
    "a mark, and more columns":
    "\ufeffimage,page,question,answer\n0.jpg,1,What?,A dog.\n1.jpg,2,\"What, now?\",A cat.\n".encode(),
}  # fmt: skip


@pytest.mark.parametrize("content", CSVS.values(), ids=CSVS)
@pytest.mark.parametrize("name", ["train.csv", "data.tsv"])
def test_csv_of_any_known_columns(folder: Path, content: bytes, name: str) -> None:
    (folder / name).write_bytes(content)
    assert [one.name for one in FORMATS.values() if one.detect(folder)] == ["tables"]
    assert FORMATS["tables"].splits(folder) == (("train",) if name == "train.csv" else ())
    assert [sample.target for sample in read(folder)] == ["A dog.", "A cat."]
    assert shown(read(folder / name)[1])[0] == ("user", "<>What, now?")


@pytest.mark.parametrize(
    ("line", "reason"),
    [("0.jpg,What?", "it has 2 of the 3 columns"), ("0.jpg,caf\udce9,x", "not UTF-8"), ("0.jpg,,x", "no question"),
     ("gone.jpg,Which?,x", "does not exist"), (",Which?,", "no answer")],
)  # fmt: skip
def test_bad_lines_of_csv_are_named(folder: Path, line: str, reason: str) -> None:
    text = f"image,question,answer\n0.jpg,What?,A dog.\n{line}\n1.jpg,Who?,A cat.\n"
    (folder / "data.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    data = load_samples(folder, max_bad_fraction=0.5)
    assert data.dataset[0]["id"] == "0" and len(data.dataset) == 2
    (bad,) = data.quarantine.rows
    assert reason in bad.reason and ("gone" in line or bad.id == "data.csv, line 3")


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "ndjson", "tar"])
def test_a_folder_for_each_split(folder: Path, photo: Callable[[int], bytes], kind: str) -> None:
    """As the Hub converts data sets to Parquet, and as shards are often kept."""
    for number, split in enumerate(("train", "test")):
        (folder / split).mkdir()
        row = {"question": f"What of {split}?", "answer": "A dog."}
        if kind == "parquet":
            table(folder, f"{split}/0000.parquet", row)
        elif kind == "tar":
            content = json.dumps(row).encode()
            with tarfile.open(folder / split / "00000.tar", "w") as opened:
                member = tarfile.TarInfo("a.json")
                member.size = len(content)
                opened.addfile(member, io.BytesIO(content))
        else:
            (folder / split / "0.jpg").write_bytes(photo(number))
            lines(folder / split, row | {"image": "0.jpg"}, name=f"rows.{kind}")
    format = {"parquet": "tables", "tar": "webdataset"}.get(kind, "messages")
    assert [one.name for one in FORMATS.values() if one.detect(folder)] == [format]
    assert set(FORMATS[format].splits(folder)) == {"train", "test"}
    (sample,) = read(folder, split="test")
    assert sample.prompt[0].text == "What of test?" and sample.id.startswith("test/")


@pytest.mark.parametrize("layout", ["rows", "coco"])
def test_names_written_on_windows(folder: Path, photo: Callable[[int], bytes], layout: str) -> None:
    (folder / "images").mkdir()
    (folder / "images" / "a.jpg").write_bytes(photo(2))
    if layout == "rows":
        lines(folder, {"image": "images\\a.jpg", "caption": "A dog."}, {"image": "..\\..\\a.jpg", "caption": "Out."})
    else:
        image = {"id": 1, "file_name": "images\\a.jpg"}
        annotations = [{"id": 1, "image_id": 1, "caption": "A dog."}]
        (folder / "captions_train.json").write_text(json.dumps({"images": [image], "annotations": annotations}))
    data = load_samples(folder, max_bad_fraction=0.5, verify_images="full")
    assert data.dataset[0]["images"][0]["path"] == str(folder / "images" / "a.jpg")
    assert [row.kind for row in data.quarantine.rows] == (["outside the data"] if layout == "rows" else [])


def test_flickr30k_with_commas(folder: Path) -> None:
    (folder / "captions.txt").write_text("image_name,comment_number,comment\n0.jpg,0, A dog , running .\n0.jpg,1\n")
    data = load_samples(folder, max_bad_fraction=0.5)
    assert (data.format, Sample.from_row(data.dataset[0]).target) == ("flickr", "A dog , running .")
    assert [row.id for row in data.quarantine.rows] == ["captions.txt, line 3"]


def test_folders_of_pairs_are_one_data_set(folder: Path, photo: Callable[[int], bytes]) -> None:
    """As img2dataset writes files, and kohya's scripts want them."""
    for name, ending in (("00000", "txt"), ("10_dog", "caption")):
        (folder / name).mkdir()
        (folder / name / "a.jpg").write_bytes(photo(2))
        (folder / name / f"a.{ending}").write_text(f"Caption in {name}.")
        (folder / name / "a.json").write_text(json.dumps({"url": "x", "caption": "y"}))
        (folder / f"{name}_stats.json").write_text("{}")
    (folder / "10_dog" / "b.caption").write_text("Alone.")
    (folder / "0.jpg").unlink()
    (folder / "1.jpg").unlink()
    data = load_samples(folder, max_bad_fraction=0.5)
    assert data.format == "image_text_pairs"
    assert data.dataset["id"][:] == ["00000/a.jpg#0", "10_dog/a.jpg#0"]
    assert [row.id for row in data.quarantine.rows] == ["10_dog/b.caption"]


def test_what_a_mac_puts_beside_files_is_no_data(folder: Path, photo: Callable[[int], bytes]) -> None:
    for name in (".DS_Store", "._0.jpg", "._0.txt", "._train.jsonl", "._train-0.tar", "._1.csv"):
        (folder / name).write_bytes(b"\0\5\26\7\xff")
    (folder / "0.txt").write_text("A dog.")
    (folder / "1.txt").write_text("A cat.")
    assert len(read(folder)) == 2
    shard = folder / "shards" / "train-0.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as opened:
        for name, content in (("./._a.jpg", b"\0"), ("./a.jpg", photo(0)), ("./._a.txt", b"\0"), ("./a.txt", b"A")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    assert [sample.target for sample in read(shard.parent)] == ["A"]


@pytest.mark.parametrize("place", ["", "train"])
def test_metadata_as_parquet(folder: Path, photo: Callable[[int], bytes], place: str) -> None:
    table(folder / place, "metadata.parquet", {"file_name": "a.jpg", "text": "A dog."})
    (folder / place / "a.jpg").write_bytes(photo(2))
    assert [one.name for one in FORMATS.values() if one.detect(folder)] == ["imagefolder"]
    assert [sample.target for sample in read(folder)] == ["A dog."]


def test_metadata_of_several_images(folder: Path) -> None:
    row = {"file_names": ["0.jpg", "1.jpg"], "question": "Which?", "answer": "The first."}
    lines(folder, row, name="metadata.jsonl")
    (sample,) = read(folder)
    assert shown(sample)[0] == ("user", "<><>Which?")


def test_columns_of_ones_own_names(folder: Path) -> None:
    """The error says what the columns are and what to write; that then works."""
    (folder / "captions.csv").write_text("image_id,comment\n0.jpg,A dog.\n")
    with pytest.raises(FormatError, match=r"captions.csv has the columns image_id, comment.*dataset_format: tables"):
        load_samples(folder)
    options: dict[str, Any] = {"columns": ["image=image_id", "caption=comment"]}
    assert read(folder, format="tables", **options)[0].target == "A dog."
    (folder / "captions.csv").unlink()
    for name, format in (("metadata.jsonl", "imagefolder"), ("train.jsonl", "messages")):
        lines(folder, {"file_name": "0.jpg", "comment": "A dog."}, name=name)
        with pytest.raises(FormatError, match=rf"{name} has the columns comment, file_name.*dataset_format: {format}"):
            load_samples(folder)
        columns = ["caption=comment"] if format == "imagefolder" else ["image=file_name", "caption=comment"]
        assert read(folder, format=format, columns=columns)[0].target == "A dog."
        (folder / name).unlink()


def test_of_a_folder_without_a_format_it_is_said_what_is_seen(folder: Path) -> None:
    def hint(place: Path = folder) -> str:
        with pytest.raises(FormatError, match="is in no format that vlmtune knows") as raised:
            load_samples(place)
        return str(raised.value).partition("\n")[2].partition("\n")[0]

    assert hint().startswith("It holds images but no texts")
    (folder / "data.yaml").write_text("nc: 1")
    assert hint().startswith("Boxes of YOLO")
    (folder / "all.json").write_text(json.dumps({"07": {"question": "What?", "imageId": "1"}}))
    assert hint().startswith("all.json is one object (07, question, imageId); rows are a list")
    (folder / "photos.zip").write_bytes(b"PK")
    assert hint(folder / "photos.zip").startswith("Unpack it")
    for name in ("ai2d", "vqav2"):
        table(folder, f"{name}/train-00000-of-00001-2ce340398c113b79.parquet", {"question": "What?", "answer": name})
    assert hint().startswith("Folders in it hold data: ai2d (tables), vqav2 (tables). Name one of them")
    (folder / "empty").mkdir()
    assert hint(folder / "empty") == "The folder is empty."


def test_files_of_rows_named_after_splits(folder: Path) -> None:
    """A training run must not learn what lies beside it for tests."""
    for name, text in (("llava_train_a.json", "a"), ("llava_train_b.json", "b"), ("llava_val.json", "c")):
        (folder / name).write_text(json.dumps([{"messages": said("What?", text)}]))
    assert FORMATS["messages"].splits(folder) == ("train", "val")
    samples = read(folder, split="train")
    assert [sample.target for sample in samples] == ["a", "b"] and len({sample.id for sample in samples}) == 2
