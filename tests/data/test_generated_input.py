"""200 generated files of rows: every line is trained on or named, or the file ends in a named error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmtune.data.loading import load_samples
from vlmtune.errors import VlmtuneError

TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["A dog.", "<image>", "\x00", "\ud800", "猫 и 🐈", "x" * 5000]))
NAMES = st.one_of(
    st.sampled_from(
        [
            "0.jpg",
            "猫.jpg",
            "empty.jpg",
            "cut.jpg",
            "page.jpg",
            "bomb.png",
            "gone.jpg",
            "out.jpg",
            "../outside.jpg",
            "sub/../../outside.jpg",
            "/etc/passwd",
            "http://example.org/a.jpg",
            "data:image/png;base64,!",
            "",
            "a" * 400,
        ]
    ),
    TEXTS,
)
CONTENTS = st.one_of(TEXTS, st.lists(st.one_of(st.none(), st.fixed_dictionaries({"type": TEXTS, "text": TEXTS}))))
ROLES = st.sampled_from(["user", "assistant", "system", "narrator", "", None])
ROWS = st.one_of(
    st.fixed_dictionaries(
        {"messages": st.lists(st.fixed_dictionaries({"role": ROLES, "content": CONTENTS}), max_size=3)},
        optional={"images": st.one_of(st.none(), NAMES, st.lists(NAMES, max_size=3)), "id": TEXTS, "meta": TEXTS},
    ),
    st.fixed_dictionaries({"question": TEXTS, "answer": st.one_of(TEXTS, st.lists(TEXTS), st.none()), "image": NAMES}),
    st.fixed_dictionaries({"image": NAMES, "caption": TEXTS}),
    st.recursive(st.one_of(st.none(), st.booleans(), st.floats(), TEXTS), lambda inner: st.lists(inner, max_size=3)),
)
LINES = st.one_of(
    ROWS.map(lambda row: json.dumps(row).encode()),
    ROWS.map(lambda row: json.dumps(row).encode()[:-2] or b"{"),
    ROWS.map(lambda row: json.dumps(row).encode("utf-16").replace(b"\n", b"")),
    st.sampled_from([b"{broken", b"\xff\xfe\xff", b"[" * 3000, b'{"messages": [[[[]]]]}', b"NaN"]),
)
GOOD = json.dumps(
    {"messages": [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]}
).encode()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A folder of images, good and bad, with one outside of it."""
    root = tmp_path_factory.mktemp("generated")
    folder = root / "data"
    folder.mkdir()
    whole = (image_folder / "0.jpg").read_bytes()
    for name in ("0.jpg", "猫.jpg"):
        (folder / name).write_bytes(whole)
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "page.jpg").write_text("<html>")
    (folder / "empty.jpg").touch()
    size = (60_000).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + size * 2 + b"\x08\x02\0\0\0")
    shutil.copy(image_folder / "1.jpg", root / "outside.jpg")
    (folder / "out.jpg").symlink_to(root / "outside.jpg")
    return folder


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(lines=st.lists(LINES, max_size=6))
def test_rows_in_are_rows_trained_and_rows_named(place: Path, lines: list[bytes]) -> None:
    lines = [line.replace(b"\n", b" ").replace(b"\r", b" ") for line in lines]
    lines = [GOOD, *(line for line in lines if line.strip())]
    (place / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    data = load_samples(place / "train.jsonl", format="messages", max_bad_fraction=1, verify_images="full")
    assert len(data.dataset) + len(data.quarantine) == len(lines)
    assert data.dataset[0]["id"] == "1" and all(row.id and row.kind and row.reason for row in data.quarantine.rows)
    named: list[Any] = [image["path"] for row in data.dataset for image in row["images"] if image["path"]]
    assert all(Path(name).resolve().parent == place.resolve() and "out" not in Path(name).name for name in named)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{}", b"[]", b"\x00" * 100, b"[" * 100_000])
def test_files_without_a_row_are_named_errors(place: Path, content: bytes) -> None:
    (place / "train.jsonl").write_bytes(content)
    for format in ("auto", "messages"):
        with pytest.raises(VlmtuneError, match=r"train\.jsonl"):
            load_samples(place / "train.jsonl", format=format)
