"""Conversion: every format to every target and back loses nothing; what is left out is named; all or nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmtune.cli import main
from vlmtune.data.conversion import convert as module
from vlmtune.data.conversion.convert import MANIFEST, convert
from vlmtune.data.conversion.targets import TARGETS
from vlmtune.data.formats import FORMATS
from vlmtune.data.images import content_hash
from vlmtune.data.loading import load_samples
from vlmtune.data.recognition import choose_format
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError, OutputError


def facts(place: Path, split: str | None) -> list[tuple[Any, ...]]:
    """Everything of a split's samples, images by their content."""
    samples = (Sample.from_row(row) for row in load_samples(place, split=split, verify_images="full").dataset)
    return [
        (one.id, [content_hash(ref) for ref in one.images], one.messages, one.references, one.meta) for one in samples
    ]


def splits(place: Path) -> list[str | None]:
    return list(choose_format(place).splits(place)) or [None]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_to_every_target_and_back(layouts: Any, name: str, target: str, tmp_path: Path) -> None:
    place = getattr(layouts, name)()
    manifest = convert(place, tmp_path / "out", target)
    found = choose_format(tmp_path / "out")
    assert found.name == {"parquet": "tables"}.get(target, target)
    for split in splits(place):
        assert facts(tmp_path / "out", split or "data" if target == "messages" else split) == facts(place, split)
    counts = list(manifest["splits"].values())
    assert counts and all(one["rows_written"] == one["rows_read"] > 0 for one in counts)
    for file, known in manifest["files"].items():
        content = (tmp_path / "out" / file).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (known["bytes"], known["sha256"])
    assert json.loads((tmp_path / "out" / MANIFEST).read_text()) == manifest
    assert not list(tmp_path.glob(".out-*"))


@pytest.mark.parametrize("target", TARGETS)
def test_a_second_conversion_gives_the_same_bytes(layouts: Any, target: str, tmp_path: Path) -> None:
    place = layouts.coco_captions()
    first, second = (convert(place, tmp_path / name, target)["files"] for name in ("a", "b"))
    assert first == second


@pytest.fixture
def odd(tmp_path: Path, image_folder: Path) -> Path:
    """Rows with what is easily lost: literal marks, spaces, order of parts, Unicode, several images, equal names."""
    place = tmp_path / "odd"
    for folder, number in (("a", 0), ("b", 1)):
        (place / folder).mkdir(parents=True)
        shutil.copy(image_folder / f"{number}.jpg", place / folder / "x.jpg")

    def image(name: str) -> dict[str, str]:
        return {"type": "image", "image": name}

    def text(value: str) -> dict[str, str]:
        return {"type": "text", "text": value}

    answer = {"role": "assistant", "content": " Ja, 猫.\n"}
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "No image."}, answer]},
        {"messages": [{"role": "user", "content": [text("Is <image> a mark?\n"), image("a/x.jpg")]}, answer]},
        {"messages": [{"role": "user", "content": [image("a/x.jpg"), text("or"), image("b/x.jpg")]}, answer]},
        {"messages": [{"role": "user", "content": [image("b/x.jpg"), text("?")]}, answer], "references": ["ja", "Ja"]},
        {"messages": [{"role": "user", "content": [image("b/x.jpg"), text("Unanswered?")]}], "meta": {"k": [1, None]}},
    ]
    (place / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return place


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_easily_lost_is_kept(odd: Path, target: str, tmp_path: Path) -> None:
    manifest = convert(odd, tmp_path / "out", target)
    assert manifest["splits"]["train"]["rows_written"] == 5
    assert facts(tmp_path / "out", "train") == facts(odd, "train")
    for other in TARGETS:
        convert(tmp_path / "out", tmp_path / other, other)
        assert facts(tmp_path / other, "train") == facts(odd, "train")


def test_images_may_stay_where_they_lie(odd: Path, tmp_path: Path) -> None:
    convert(odd, tmp_path / "out", "messages", keep_images=True)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [MANIFEST, "train.jsonl"]
    assert facts(tmp_path / "out", "train") == facts(odd, "train")


@pytest.mark.parametrize(("target", "ending"), [("parquet", "parquet"), ("webdataset", "tar")])
def test_large_data_are_written_in_several_files(layouts: Any, target: str, ending: str, tmp_path: Path) -> None:
    place = layouts.flickr()
    lines = [f"{number}.jpg,Picture {number}." for number in range(8)]
    for number in range(8):
        pixels = Image.effect_noise((900, 900), 90).convert("RGB")
        pixels.save(place / "Images" / f"{number}.jpg", quality=95)
    (place / "captions.txt").write_text("image,caption\n" + "\n".join(lines) + "\n")
    convert(place, tmp_path / "out", target, shard_mb=1)
    files = sorted((tmp_path / "out").glob(f"*.{ending}"))
    assert len(files) > 2 and all(file.stat().st_size < 2_200_000 for file in files)
    assert facts(tmp_path / "out", None) == facts(place, None)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_left_out_is_named(layouts: Any, target: str, tmp_path: Path) -> None:
    place = layouts.flickr()
    good = (place / "Images" / "0.jpg").read_bytes()
    (place / "Images" / "cut.jpg").write_bytes(good[: len(good) // 2])
    with (place / "captions.txt").open("a") as file:
        file.write("gone.jpg,Gone.\ncut.jpg,Cut.\n0.jpg,\n")
    manifest = convert(place, tmp_path / "out", target, max_bad_fraction=0.9)
    counts = manifest["splits"]["data"]
    assert (counts["rows_read"], counts["rows_written"], counts["left_out"]) == (5, 2, 3)
    kinds = {(row["id"], row["kind"]) for row in manifest["left_out"]}
    assert kinds == {
        ("gone.jpg#0", "missing image"),
        ("cut.jpg#0", "unreadable image"),
        ("captions.txt, line 6", "empty caption"),
    }
    with pytest.raises(DataError, match="more than max_bad_fraction"):
        convert(place, tmp_path / "strict", target)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["layouts", "out"]


def test_a_failure_leaves_nothing(layouts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_manifest", broken)
    with pytest.raises(OutputError, match=r"out cannot be written .No space left"):
        convert(layouts.flickr(), tmp_path / "out", "messages")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["layouts"]


def test_nothing_is_overwritten(layouts: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(layouts.flickr(), tmp_path / "out", "messages")
    with pytest.raises(OutputError, match="out exists already"):
        convert(layouts.flickr(), tmp_path / "out", "messages")


def test_a_row_that_would_be_read_back_otherwise_is_left_out(odd: Path, tmp_path: Path, monkeypatch: Any) -> None:
    real = module.make_sample

    def changed(row: Any, *args: Any, **options: Any) -> Sample:
        made = real(row, *args, **options)
        return dataclasses.replace(made, meta={"other": 1}) if made.meta else made

    monkeypatch.setattr(module, "make_sample", changed)
    manifest = convert(odd, tmp_path / "out", "parquet", max_bad_fraction=0.5)
    assert [(row["id"], row["kind"]) for row in manifest["left_out"]] == [("train/5", "cannot be held")]


def test_the_command(layouts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, out = layouts.vqav2(), tmp_path / "out"
    assert main(["convert", str(place), "--to", "webdataset", "--output", str(out), "--split", "val"]) == 0
    assert "val: 2 of 2 rows written, 0 left out" in capsys.readouterr().out
    assert sorted(file.name for file in out.iterdir()) == [MANIFEST, "val-000000.tar"]
    assert main(["convert", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--to messages|parquet|webdataset" in shown and "--image_dir" in shown and "--max_length" not in shown


def test_columns_of_other_names(messages_file: Any, tmp_path: Path) -> None:
    file = messages_file([{"photo": "0.jpg", "ask": "What is this?", "kind": "A dog."}])
    named = ["--dataset_format", "messages", "--columns", "image=photo", "question=ask", "answer=kind"]
    assert main(["convert", str(file), "--to", "parquet", "--output", str(tmp_path / "out"), *named]) == 0
    (sample,) = map(Sample.from_row, load_samples(tmp_path / "out").dataset)
    assert (sample.prompt[0].text, sample.target, len(sample.images)) == ("What is this?", "A dog.", 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "o"], "--to is None"),
        (["--to", "parket", "--output", "o"], "Did you mean 'parquet'"),
        (["--to", "parquet"], "needs --output"),
        (["--to", "parquet", "--output", "o", "--images", "keep"], "goes with --to messages alone"),
        (["--to", "parquet", "--output", "o", "--images", "link"], "takes copy or keep"),
        (["--to", "parquet", "--output", "o", "--shard_mb", "0"], "--shard_mb is '0'"),
        (["--to", "parquet", "--output", "o", "--max_length", "3"], "no option '--max_length'"),
    ],
)
def test_mistakes_in_options(arguments: list[str], said: str, layouts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(layouts.flickr()), *arguments]) == 2
    assert said in capsys.readouterr().err
