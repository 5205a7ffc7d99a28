"""Messages as JSON lines: every way to place an image, and every kind of bad line."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmtune.data.formats import messages
from vlmtune.data.loading import load_samples
from vlmtune.data.sample import ImageRef, Part, Sample
from vlmtune.errors import DataError, QuarantineError

Write = Callable[..., Path]

ANSWER = {"role": "assistant", "content": "A dog."}
IMAGE, LEFT, RIGHT = Part("image"), Part("text", "Left "), Part("text", " right")


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def row(content: Any = "<image>What?", **others: Any) -> dict[str, Any]:
    return {"messages": [user(content), ANSWER], **others}


GOOD = row("<image>What?", images=["0.jpg"])


def read(path: Path, **options: Any) -> list[Sample]:
    return [Sample.from_row(row) for row in load_samples(path, **options).dataset]


WHAT = Part("text", "What?")


@pytest.mark.parametrize(
    ("line", "parts", "images"),
    [
        (row("<image>What?", images=["0.jpg"]), (IMAGE, WHAT), ["0.jpg"]),
        (row("<image>\nWhat?", images=["0.jpg"]), (IMAGE, WHAT), ["0.jpg"]),
        (row("What?", images=["0.jpg"]), (IMAGE, WHAT), ["0.jpg"]),
        (row("What?", image="0.jpg"), (IMAGE, WHAT), ["0.jpg"]),
        (row("What?", images="0.jpg"), (IMAGE, WHAT), ["0.jpg"]),
        (row("What?", images=[{"path": "0.jpg"}]), (IMAGE, WHAT), ["0.jpg"]),
        (row("What?", images=["0.jpg", "1.jpg"]), (IMAGE, IMAGE, WHAT), ["0.jpg", "1.jpg"]),
        (row("Left <image> right", images=["0.jpg"]), (LEFT, IMAGE, RIGHT), ["0.jpg"]),
        (row("<image>Left <image>", images=["1.jpg", "0.jpg"]), (IMAGE, LEFT, IMAGE), ["1.jpg", "0.jpg"]),
        (row([{"type": "image"}, {"type": "text", "text": "What?"}], images=["0.jpg"]), (IMAGE, WHAT), ["0.jpg"]),
        (row([{"type": "image", "image": "0.jpg"}, {"type": "text", "text": "What?"}]), (IMAGE, WHAT), ["0.jpg"]),
        (row([{"type": "text", "text": "What?"}, {"type": "image", "path": "0.jpg"}]), (WHAT, IMAGE), ["0.jpg"]),
        (row([{"type": "image", "url": "0.jpg"}]), (IMAGE,), ["0.jpg"]),
        (row([{"type": "image_url", "image_url": {"url": "0.jpg"}}]), (IMAGE,), ["0.jpg"]),
        (
            row([{"type": "image"}, {"type": "image", "image": "2.jpg"}, {"type": "image"}], images=["0.jpg", "1.jpg"]),
            (IMAGE, IMAGE, IMAGE),
            ["0.jpg", "2.jpg", "1.jpg"],
        ),
        (
            row([{"type": "image", "image": "0.jpg"}, {"type": "text", "text": "Is <image> a tag?"}]),
            (IMAGE, Part("text", "Is <image> a tag?")),
            ["0.jpg"],
        ),
        (row("Hello"), (Part("text", "Hello"),), []),
    ],
    ids=str,
)
def test_every_way_to_place_an_image(
    messages_file: Write, line: dict[str, Any], parts: tuple[Part, ...], images: list[str]
) -> None:
    path = messages_file([line])
    (sample,) = read(path)
    assert sample.messages[0].parts == parts
    assert [image.path for image in sample.images] == [str(path.parent / name) for name in images]
    assert sample.target == "A dog."
    assert sample.problem() is None


def test_file_addresses_are_paths(messages_file: Write, tmp_path: Path, image_folder: Path) -> None:
    spaced = tmp_path / "my dog.jpg"
    spaced.write_bytes((image_folder / "0.jpg").read_bytes())
    address = spaced.as_uri()
    assert "%20" in address
    (sample,) = read(messages_file([row([{"type": "image_url", "image_url": {"url": address}}])]))
    assert sample.images == (ImageRef(str(spaced)),)


def test_data_addresses_are_bytes(messages_file: Write, image_folder: Path) -> None:
    content = (image_folder / "0.jpg").read_bytes()
    address = f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
    lines = [row([{"type": "image_url", "image_url": {"url": address}}]), row("<image>Who?", images=[address])]
    first, second = read(messages_file(lines))
    assert first.images == second.images == (ImageRef(bytes=content),)


def test_absolute_paths_and_image_dir(messages_file: Write, image_folder: Path) -> None:
    path = messages_file([row(images=[str(image_folder / "3.jpg")]), row("<image>Who?", images=["4.jpg"])])
    absolute, relative = read(path, image_dir=image_folder)
    assert absolute.images[0].path == str(image_folder / "3.jpg")
    assert relative.images[0].path == str(image_folder / "4.jpg")


def test_conversations_of_several_turns(messages_file: Write) -> None:
    line = {
        "id": "talk",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "human", "content": "<image>What?"},
            {"role": "gpt", "content": "A dog."},
            {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "image"}]},
            {"role": "model", "content": [{"type": "text", "text": "A cat."}]},
        ],
        "images": ["0.jpg", "1.jpg"],
        "references": ["A cat.", "Cat"],
        "meta": {"source": "test"},
    }
    (sample,) = read(messages_file([line]))
    assert sample.id == "talk"
    assert [message.role for message in sample.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message.n_images for message in sample.messages] == [0, 1, 0, 1, 0]
    assert sample.target == "A cat."
    assert sample.references == ("A cat.", "Cat")
    assert sample.meta == {"source": "test"}


@pytest.mark.parametrize(
    ("others", "references"),
    [
        ({}, ("A dog.",)),
        ({"references": []}, ("A dog.",)),
        ({"references": "Dog"}, ("Dog",)),
        ({"references": [1]}, ("1",)),
    ],
    ids=str,
)
def test_references_are_the_answer_unless_given(
    messages_file: Write, others: dict[str, Any], references: tuple[str, ...]
) -> None:
    (sample,) = read(messages_file([GOOD | others]))
    assert sample.references == references


def test_a_question_without_answer_has_no_target(messages_file: Write) -> None:
    (sample,) = read(messages_file([{"messages": [user("<image>What?")], "images": ["0.jpg"]}]))
    assert (sample.target, sample.references) == (None, ())


def test_ids_are_the_rows_own_or_the_line(messages_file: Write) -> None:
    lines = [GOOD, b"", row("<image>Who?", images=["0.jpg"], id=None), row("<image>Where?", images=["0.jpg"], id=7)]
    assert [sample.id for sample in read(messages_file(lines))] == ["1", "3", "7"]


def test_a_folder_names_its_splits(messages_file: Write) -> None:
    folder = messages_file([GOOD], "train").parent
    messages_file([GOOD, row("<image>Who?", images=["1.jpg"])], "test")
    (folder / "log.jsonl").write_text('{"step": 1}\n')
    assert messages.splits(folder) == ("test", "train")
    assert [sample.id for sample in read(folder, split="test")] == ["test/1", "test/2"]
    with pytest.raises(DataError, match="no split 'dev'; it has test, train"):
        load_samples(folder, split="dev")
    with pytest.raises(DataError, match="its rows are not split; leave the split out"):
        load_samples(folder / "train.jsonl", split="train")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row(images=["http://[e.org"]), "neither a path nor an address"),
        (row(images=["data:image/png;base64,@@@"]), "not base64"),
        (row(images=["data:image/png;base64,ä"]), "not base64"),
        (row(images=[3]), "image 3 is not a path"),
        (row(images=[None]), "image None is not a path"),
        (row("<image><image>", images=["0.jpg"]), "more image places than images"),
        (row("<image>What?"), "more image places than images"),
        (row([{"type": "image"}, {"type": "image"}], images=["0.jpg"]), "more image places than images"),
        (
            {"messages": [user("<image>What?"), ANSWER, user("<image>Who?"), ANSWER], "images": ["0.jpg"]},
            "more image places than images",
        ),
        (row("<image>What?", images=["0.jpg", "1.jpg"]), r"1 image\(s\) in 'images' have no place"),
        ({"messages": [{"role": "tool", "content": "x"}, ANSWER]}, r"role 'tool' is unknown \(use system, user"),
        ({"messages": [user("What?"), {"role": "assistant", "content": " "}]}, "empty assistant text"),
        ({"messages": [user("What?"), {"role": "assistant", "content": None}]}, "lacks 'role' or 'content'"),
        ({"messages": [{"content": "What?"}, ANSWER]}, "lacks 'role' or 'content'"),
        ({"messages": ["What?", ANSWER]}, "lacks 'role' or 'content'"),
        ({"messages": []}, "has no messages"),
        ({"messages": [ANSWER, user("What?"), ANSWER]}, "begins with an assistant's turn"),
        ({"messages": [{"role": "system", "content": "Brief."}, ANSWER]}, "begins with an assistant's turn"),
        ({"messages": "What?"}, "no 'messages' list"),
        ({"text": "What?"}, r"its columns \(text\) are not such"),
        (row(5), "content 5 is neither a text nor a list"),
        (row(["What?"]), "'What\\?' is neither text nor image"),
        (row([{"type": "video", "video": "a.mp4"}]), "neither text nor image"),
        (row("What?", references=5), "references are 5"),
        (row("What?", meta="note"), "meta is 'note'"),
        (b"[1, 2]", "it is no object"),
        (b'{"messages": [', "not JSON"),
        (b"What?", "not JSON"),
        (b'{"messages": "caf\xe9"}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_lines_are_set_aside_by_file_and_line(messages_file: Write, bad: Any, reason: str) -> None:
    path = messages_file([GOOD, bad, row("<image>Who?", images=["1.jpg"])])
    data = load_samples(path, max_bad_fraction=0.4)
    assert data.dataset["id"][:] == ["1", "3"]
    (found,) = data.quarantine.rows
    assert found.id == "train.jsonl, line 2"
    with pytest.raises(QuarantineError, match=reason):
        load_samples(path)


def test_repeated_samples_are_set_aside_and_repeated_ids_told_apart(messages_file: Write) -> None:
    """In LLaVA's own files all conversations about an image have one id."""
    others = [row(f"<image>Who {n}?", images=["0.jpg"], id="a") for n in range(3)]
    lines = [GOOD | {"id": "a"}, others[0], GOOD | {"id": "c"}, row("<image>Why?", images=["0.jpg"], id="a#2")]
    data = load_samples(messages_file([*lines, *others[1:]]), max_bad_fraction=0.7)
    assert data.dataset["id"][:] == ["a", "a#3", "a#2", "a#4", "a#5"]
    assert data.dataset.column_names == ["id", "images", "messages", "references", "meta"]
    assert [(bad.id, bad.kind) for bad in data.quarantine.rows] == [("c", "duplicate")]


def test_missing_and_broken_images_are_set_aside(messages_file: Write) -> None:
    address = "data:image/png;base64," + base64.b64encode(b"no image").decode()
    path = messages_file([GOOD, row(images=["0.jpg", "gone.jpg"], id="x") | {"messages": [user("Who?"), ANSWER]}])
    path.write_bytes(path.read_bytes() + messages_file([row(images=[address])], "other").read_bytes())
    data = load_samples(path, max_bad_fraction=0.7)
    assert [(bad.id, bad.kind) for bad in data.quarantine.rows] == [("x", "missing image"), ("3", "unreadable image")]


def test_a_byte_order_mark_and_other_scripts_are_read(messages_file: Write) -> None:
    path = messages_file([row("<image>これは何ですか", images=["0.jpg"])])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (sample,) = read(path)
    assert sample.prompt[0].text == "これは何ですか"
