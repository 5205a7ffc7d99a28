"""The commands that look at data, on a folder or file of every format, as people call them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vlmtune.cli import main
from vlmtune.data.formats import FORMATS
from vlmtune.data.loading import load_samples


@pytest.mark.parametrize("name", FORMATS)
def test_check_and_preview_take_every_format(
    layouts: Any, name: str, tiny_gemma3_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(getattr(layouts, name)())
    model = ["--model_name_or_path", str(tiny_gemma3_dir)]
    assert main(["check", place, "--report_dir", str(tmp_path / "check"), "--processes", "1", *model]) == 0
    report = json.loads((tmp_path / "check" / "check.json").read_text())
    splits = FORMATS[name].splits(Path(place))
    rows = load_samples(place, split="train" if "train" in splits else None)
    assert report["numbers"]["training"]["used"] == len(rows.dataset)
    capsys.readouterr()
    page = tmp_path / "page.html"
    assert main(["preview", place, "--rows", "2", "--output", str(page), *model]) == 0
    shown = capsys.readouterr().out
    assert "learned" in shown and rows.dataset[0]["id"] in page.read_text()
    assert re.search(r"<img [^>]*src=.data:image/", page.read_text())
