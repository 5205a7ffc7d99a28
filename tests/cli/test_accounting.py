"""Rows in are rows trained on and rows named in the run's record, from the command line to ``left_out.jsonl``."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmtune.cli import main

LONG = "a dog and " * 60
# Texts of four images: whole, the same once more, none, and one above max_length.
TEXTS = [(0, "A dog."), (1, "A cat."), (1, "A cat."), (1, " "), (2, LONG), (2, "A bird."), (3, "Gone.")]
FAULTS = ["same images and texts", "empty", "max_length", "does not exist"]


def messages(place: Path, names: list[str]) -> int:
    lines = [
        json.dumps({"id": "one", "image": names[number], "question": "What is it?", "answer": text})
        for number, text in TEXTS
    ]
    (place / "train.jsonl").write_text("\n".join([*lines, "{broken", '{"image": "0.jpg"}']), encoding="utf-8")
    return len(lines) + 2


def coco_captions(place: Path, names: list[str]) -> int:
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    rows: list[Any] = [{"id": n, "image_id": number, "caption": text} for n, (number, text) in enumerate(TEXTS)]
    rows += [{"image_id": 99, "caption": "Of no image."}, 7]
    (place / "captions_train2017.json").write_text(json.dumps({"images": images, "annotations": rows}))
    return len(rows)


def spreadsheet(place: Path, names: list[str]) -> int:
    with (place / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("image", "question", "answer"), *((names[n], "What is it?", text) for n, text in TEXTS)])
        writer.writerows([("0.jpg", "Which?"), ("0.jpg", "What?", "")])
    return len(TEXTS) + 2


@pytest.mark.parametrize("write", [messages, coco_captions, spreadsheet], ids=lambda write: str(write.__name__))
def test_every_row_is_trained_on_or_in_the_record(
    write: Callable[[Path, list[str]], int], tiny_gemma3_dir: Path, image_folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "data"
    place.mkdir()
    names = [f"{number}.jpg" for number in range(3)] + ["gone.jpg"]
    for name in names[:3]:
        (place / name).write_bytes((image_folder / name).read_bytes())
    rows = write(place, names)
    arguments = [
        *("train", "--dataset_path", str(place), "--model_name_or_path", str(tiny_gemma3_dir)),
        *("--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--use_cpu", "true"),
        *("--max_length", "60", "--on_too_long", "drop", "--max_bad_fraction", "0.9", "--torch_dtype", "float32"),
        *("--dataloader_num_workers", "0", "--warmup_steps", "0", "--report_to", "none"),
    ]
    assert main(arguments) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())["data"]["train"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "left_out.jsonl").read_text().splitlines()]
    assert record["samples"] == 3 and record["samples"] + record["left_out"] == rows
    assert len(lines) == record["left_out"] and all(line["id"] and line["reason"] for line in lines)
    for fault in FAULTS:
        assert any(fault in line["reason"] for line in lines), fault
