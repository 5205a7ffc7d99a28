"""Detection and grounding from COCO's and RefCOCO's files to scores and a report, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import vlmtune
from PIL import Image, ImageDraw

from vlmtune.data.boxes import read_boxes
from vlmtune.evaluation.generation import AnswerGenerator

COLORS = ("red", "green", "blue")


def scenes(folder: Path, count: int) -> list[dict[str, Any]]:
    """White pictures of odd sizes with one or two coloured squares each."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        width, height = 61 + 6 * (number % 5), 47 + 8 * (number % 3)
        image = Image.new("RGB", (width, height), "white")
        boxes = []
        for place in range(1 + number % 2):
            color = (number + place) % 3
            left, top = 3 + (7 * number) % 10 + 30 * place, 4 + (5 * number) % 14
            ImageDraw.Draw(image).rectangle((left, top, left + 19, top + 15), COLORS[color])
            boxes.append((color, [left, top, 20, 16]))
        image.save(folder / f"{number}.png")
        rows.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height, "boxes": boxes})
    return rows


@pytest.fixture(scope="module")
def detection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("detection")
    for split, count in (("train", 6), ("val", 4)):
        rows = scenes(root / f"{split}2017", count)
        annotations = [
            {"id": 10 * row["id"] + place, "image_id": row["id"], "category_id": color, "bbox": box, "iscrowd": 0}
            for row in rows
            for place, (color, box) in enumerate(row.pop("boxes"))
        ]
        content = {
            "images": rows,
            "annotations": annotations,
            "categories": [{"id": n, "name": f"{name} square"} for n, name in enumerate(COLORS)],
        }
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def grounding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines as Shikra and InternVL write RefCOCO."""
    root = tmp_path_factory.mktemp("grounding")
    for split, count in (("train", 6), ("test", 4)):
        lines = []
        for row in scenes(root / split, count):
            color, (x, y, width, height) = row["boxes"][0]
            line = {"image": f"{split}/{row['file_name']}", "sent": f"the {COLORS[color]} square"}
            size = {name: row[name] for name in ("width", "height")}
            lines.append(json.dumps(line | {"bbox": [x, y, x + width, y + height]} | size))
        (root / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
@pytest.mark.parametrize("task", ["detection", "grounding"])
def test_from_files_to_a_report(
    request: pytest.FixtureRequest, family_dir, tmp_path: Path, capsys, monkeypatch, family: str, task: str
) -> None:
    if task == "detection":
        pytest.importorskip("pycocotools")
    data, model = request.getfixturevalue(task), family_dir(family)
    monkeypatch.chdir(tmp_path)
    assert vlmtune("check", data, "--model_name_or_path", model, "--report_dir", "check") == 0
    assert vlmtune("preview", data, "--model_name_or_path", model, "--rows", 1, "--output", "preview.html") == 0
    key = "box_2d" if family == "gemma3" else "bbox_2d"
    assert key in capsys.readouterr().out.replace("\n", "").replace(" ", "")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {model}\ndataset_path: {data}\ncache_dir: cache\nmax_steps: 2\nmax_new_tokens: 8\n"
        "per_device_train_batch_size: 2\nlora_r: 4\nlearning_rate: 1e-3\nhonesty: 'off'\n"
    )
    assert vlmtune("train", recipe, "--output_dir", "run") == 0
    capsys.readouterr()
    names = ("map", "map50") if task == "detection" else ("iou", "acc@0.5")
    assert vlmtune("evaluate", recipe, "--adapter", "run", "--evaluation_dir", "own") == 0
    # Untrained, it writes no boxes.
    assert json.loads(Path("own/scores.json").read_text())["metrics"][names[0]]["value"] == 0
    # What it should say is put into its mouth, in the family's own words.
    say_what_is_right(monkeypatch)
    assert vlmtune("evaluate", recipe, "--adapter", "run", "--evaluation_dir", "scores") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in names)
    scores = json.loads(Path("scores/scores.json").read_text())["metrics"]
    # The quantum of Qwen2.5-VL's pixels is that of its small view.
    assert scores[names[1]]["value"] == 1.0
    assert scores[names[0]]["value"] > (0.9 if family == "gemma3" else 0.55)
    for line in Path("scores/predictions.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert key in row["said"] and read_boxes(row["answer"]) and read_boxes(row["references"][0])
    assert vlmtune("report", "scores", "--output", "report.html") == 0
    page = Path("report.html").read_text()
    assert "pixels of the image" in page


def say_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make generation give each sample's own answer as it was learned, to be read back as any other."""

    def right(self: AnswerGenerator, samples: Any) -> list[Any]:
        encoded = [self.encoder.tokens(sample) for sample in samples]
        return [self._answer([i for i, flag in zip(*one, strict=True) if flag], 0.0) for one in encoded]

    monkeypatch.setattr(AnswerGenerator, "_answers", right)
