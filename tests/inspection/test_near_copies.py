from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from vlmtune.data.sample import ImageRef
from vlmtune.inspection import near_copies as module
from vlmtune.inspection.near_copies import near_copies


def test_a_photo_saved_anew_is_found(image_folder: Path, tmp_path: Path) -> None:
    training = [ImageRef(str(image_folder / f"{number}.jpg")) for number in range(4)]
    with Image.open(image_folder / "1.jpg") as image:
        image.resize((image.width * 2, image.height * 2)).save(tmp_path / "larger.jpg", quality=70)
    (tmp_path / "equal.jpg").write_bytes((image_folder / "2.jpg").read_bytes())
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    scored = [ImageRef(str(tmp_path / name)) for name in ("larger.jpg", "equal.jpg", "broken.jpg", "gone.jpg")]
    scored += [ImageRef(str(image_folder / "3.jpg")), ImageRef(str(image_folder / "5.jpg"))]
    found = near_copies(training, scored)
    assert found == {"near": 1, "such_as": [(str(tmp_path / "larger.jpg"), str(image_folder / "1.jpg"))]}


def test_too_many_to_look_at(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_IMAGES", 2)
    refs = [ImageRef(str(image_folder / f"{number}.jpg")) for number in range(3)]
    assert near_copies(refs[:2], refs[2:]) == {"skipped": "3 images are more than 2; vlmtune check looks at all"}
