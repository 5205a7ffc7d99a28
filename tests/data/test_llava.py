"""LLaVA and ShareGPT conversations, and rows of JSON in other containers and with other columns."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from vlmtune.data.loading import load_samples
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError

TALK = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]


def read(place: Path, **options: Any) -> list[Sample]:
    return [Sample.from_row(row) for row in load_samples(place, **options).dataset]


def test_llava(layouts: Any) -> None:
    place = layouts.llava()
    pictured, bare = read(place)
    assert [message.role for message in pictured.messages] == ["user", "assistant"] * 2
    assert [part.type for part in pictured.messages[0].parts] == ["image", "text"]
    assert pictured.messages[0].text == "What is this?"
    assert pictured.images[0].path == str(place / "coco" / "6.jpg")
    assert (bare.id, bare.images, bare.target) == ("b", (), "Yes.")


def test_sharegpt_lines_with_a_system_prompt(layouts: Any) -> None:
    place = layouts.llava()
    (place / "llava_instruct.json").unlink()
    row = {"system": "Be brief.", "images": ["coco/6.jpg"], "conversations": TALK}
    (place / "chat.jsonl").write_text(json.dumps(row) + "\n")
    (sample,) = read(place)
    assert [message.role for message in sample.messages] == ["system", "user", "assistant"]
    assert [message.n_images for message in sample.messages] == [0, 1, 0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "coco/6.jpg", "conversations": [{"from": "human", "value": "<image><image>"}]}, "more image places"),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "role 'observation' is unknown"),
        ({"conversations": [{"from": "human"}]}, "lacks 'role' or 'content'"),
        ({"conversations": "text"}, "no 'conversations' list"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": " "}]}, "empty assistant text"),
        ({"image": "coco/6.jpg"}, "its columns (image) are not such that vlmtune knows"),
        ("text", "it is no object"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_rows_are_set_aside(layouts: Any, row: Any, reason: str) -> None:
    data = load_samples(layouts.llava(row), max_bad_fraction=0.5)
    (bad,) = data.quarantine.rows
    assert bad.id == "llava_instruct.json, row 2" and reason in bad.reason


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "json.gz", "json"])
def test_other_containers_read_the_same(layouts: Any, ending: str) -> None:
    place = layouts.messages()
    before = read(place)
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    text = json.dumps(rows) if ending.startswith("json.") or ending == "json" else json.dumps(rows[0]) + "\n"
    content = text.encode()
    if ending.endswith("gz"):
        content = gzip.compress(content)
    elif ending.endswith("zst"):
        content = pa.compress(content, codec="zstd", asbytes=True)
    (place / "train.jsonl").unlink()
    (place / f"train.{ending}").write_bytes(content)
    after = read(place, split="train")
    assert [sample.messages for sample in after] == [sample.messages for sample in before]


def test_a_compressed_file_cut_short_is_named(layouts: Any) -> None:
    place = layouts.messages()
    lines = b"".join(
        json.dumps({"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "x"}]}).encode()
        + b"\n"
        for n in range(5000)
    )
    (place / "train.jsonl").unlink()
    (place / "train.jsonl.gz").write_bytes(gzip.compress(lines)[:-500])
    with pytest.raises(DataError, match=r"train\.jsonl\.gz cannot be read to its end"):
        load_samples(place, format="messages")


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"prompt": "What?", "completion": "A dog.", "image": "7.jpg"}, "What?", "A dog."),
        (
            {
                "prompt": [{"role": "user", "content": "What?"}],
                "completion": [{"role": "assistant", "content": "A dog."}],
                "images": ["7.jpg"],
            },
            "What?",
            "A dog.",
        ),
        ({"image": "7.jpg", "question": "What?", "answer": "A dog."}, "What?", "A dog."),
        ({"image": "7.jpg", "caption": "A dog."}, "Describe this image.", "A dog."),
        ({"image": "7.jpg", "caption": ["A dog."]}, "Describe this image.", "A dog."),
        ({"image": "7.jpg", "texts": [{"user": "What?", "assistant": "A dog."}]}, "What?", "A dog."),
    ],
    ids=str,
)
def test_other_columns(layouts: Any, row: dict[str, Any], question: str, answer: str) -> None:
    place = layouts.messages()
    (place / "train.jsonl").write_text(json.dumps(row) + "\n")
    (sample,) = read(place)
    assert (sample.prompt[0].text, sample.target) == (question, answer)
    assert sample.images[0].path == str(place / "7.jpg")
    assert sample.references == (answer,)
