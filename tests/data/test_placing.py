"""Names in rows that lead out of the data's folder are set aside, whatever way they take."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from vlmtune.data.loading import load_samples


@pytest.fixture
def data(tmp_path: Path, image_folder: Path) -> Path:
    """A folder with ``0.jpg`` and rows to be written; ``outside/1.jpg`` lies beside it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "outside").mkdir()
    shutil.copy(image_folder / "0.jpg", tmp_path / "data")
    shutil.copy(image_folder / "1.jpg", tmp_path / "outside")
    return tmp_path / "data"


def load(data: Path, *names: str, **options: Any) -> tuple[list[str], list[tuple[str, str]]]:
    """Ids of the rows that are read, and what became of the others."""
    rows = [
        {"id": str(number), "messages": [{"role": "user", "content": f"<image>{number}"},
         {"role": "assistant", "content": "A."}], "images": [name]}
        for number, name in enumerate(("0.jpg", *names))
    ]  # fmt: skip
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load_samples(data, max_bad_fraction=0.9, **options)
    return found.dataset["id"][:], [(row.kind, row.reason) for row in found.quarantine.rows]


def test_dots_that_leave_the_folder_are_refused(data: Path) -> None:
    (data / "sub").mkdir()
    ids, bad = load(data, "../outside/1.jpg", "sub/../0.jpg", "sub/../../outside/1.jpg")
    assert ids == ["0", "2"]
    assert [kind for kind, _ in bad] == ["outside the data"] * 2
    assert all(f"at {data.parent}/outside/1.jpg" in reason and "set image_dir" in reason for _, reason in bad)


def test_links_that_leave_the_folder_are_refused(data: Path) -> None:
    (data / "link.jpg").symlink_to(data.parent / "outside" / "1.jpg")
    (data / "inner.jpg").symlink_to(data / "0.jpg")
    (data / "folder").symlink_to(data.parent / "outside")
    ids, bad = load(data, "link.jpg", "inner.jpg", "folder/1.jpg")
    assert ids == ["0", "2"] and [kind for kind, _ in bad] == ["outside the data"] * 2


def test_a_neighbour_whose_name_begins_alike_is_outside(data: Path) -> None:
    (data.parent / "data-2").mkdir()
    shutil.copy(data / "0.jpg", data.parent / "data-2")
    assert load(data, "../data-2/0.jpg")[0] == ["0"]


def test_image_dir_opens_its_own_folder(data: Path) -> None:
    shutil.copy(data / "0.jpg", data.parent / "outside")
    (data.parent / "outside" / "link.jpg").symlink_to(data / "0.jpg")
    ids, bad = load(data, "1.jpg", "link.jpg", "../outside/1.jpg", image_dir=data.parent / "outside")
    assert ids == ["0", "1", "2", "3"] and not bad


def test_a_path_in_full_and_a_linked_data_folder_are_a_persons_own_choice(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(data, str(data.parent / "outside" / "1.jpg"))[0] == ["0", "1"]
    os.symlink(data, data.parent / "linked")  # noqa: PTH211
    assert load(data.parent / "linked", "0.jpg")[0] == ["0", "1"]
    monkeypatch.chdir(data.parent / "outside")
    assert load(Path("../data"), "sub/../0.jpg")[0] == ["0"]


def test_a_mixture_guards_each_of_its_folders(data: Path) -> None:
    (data / "link.jpg").symlink_to(data.parent / "outside" / "1.jpg")
    load(data, "link.jpg")
    (data.parent / "mix.yaml").write_text(f"datasets:\n  - path: {data}\n")
    found = load_samples(data.parent / "mix.yaml", max_bad_fraction=0.9)
    assert [row.kind for row in found.quarantine.rows] == ["outside the data"]


def test_a_null_in_a_name_is_named(data: Path) -> None:
    ids, bad = load(data, "a\0.jpg")
    assert ids == ["0"] and "cannot be a file's name" in bad[0][1]
