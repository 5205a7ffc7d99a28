"""Images in archives: found by name, read in place, and refused where the archive is damaged."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from vlmtune.data import archives
from vlmtune.data.images import check, content_hash, content_of, decode, length_of, upright_size
from vlmtune.data.loading import load_samples
from vlmtune.data.sample import ImageRef, Sample
from vlmtune.errors import DataError, ImageError


@pytest.fixture(params=["tar", "zip stored", "zip deflated"])
def archive(request: pytest.FixtureRequest, tmp_path: Path, image_folder: Path) -> Path:
    """An archive of ``photos/0.jpg`` to ``photos/11.jpg``."""
    kind, _, how = request.param.partition(" ")
    path = tmp_path / f"photos.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as opened:
            opened.add(image_folder, "photos")
    else:
        method = zipfile.ZIP_DEFLATED if how == "deflated" else zipfile.ZIP_STORED
        with zipfile.ZipFile(path, "w", method) as opened:
            for file in sorted(image_folder.iterdir()):
                opened.write(file, f"photos/{file.name}")
    return path


def test_members_are_the_files(archive: Path, image_folder: Path) -> None:
    opened = archives.open_archive(archive)
    for name in ("photos/3.jpg", "3.jpg", "./photos/3.jpg"):
        ref = ImageRef(str(opened[name]))
        file = ImageRef(str(image_folder / "3.jpg"))
        assert content_of(ref) == content_of(file) and content_hash(ref) == content_hash(file)
        assert length_of(ref) == length_of(file) and upright_size(ref) == upright_size(file)
        assert decode(ref).tobytes() == decode(file).tobytes()
        assert check(ref, "off") is None and ref.filename == "3.jpg"
    assert "30.jpg" not in opened


@pytest.mark.parametrize("name", ["flickr", "coco_captions", "llava"])
def test_image_dir_may_be_an_archive(layouts, name: str, tmp_path: Path) -> None:
    place = getattr(layouts, name)()
    folder = {"flickr": "Images", "coco_captions": "train2017", "llava": "."}[name]
    split = "train" if name == "coco_captions" else None
    before = load_samples(place, split=split, verify_images="full").dataset
    shutil.make_archive(str(tmp_path / "photos"), "zip", place / folder)
    for file in list((place / folder).rglob("*.jpg")):
        file.unlink()
    data = load_samples(place, split=split, image_dir=tmp_path / "photos.zip", verify_images="full")
    assert data.dataset["id"][:] == before["id"][:] and not data.quarantine.rows
    refs = [image for row in data.dataset for image in Sample.from_row(row).images]
    assert refs and all("photos.zip#" in ref.name for ref in refs)


def test_a_name_that_an_archive_lacks_is_set_aside(layouts, tmp_path: Path) -> None:
    place = layouts.flickr()
    (place / "captions.txt").write_text("image,caption\n0.jpg,A dog.\n1.jpg,A cat.\n")
    shutil.make_archive(str(tmp_path / "photos"), "zip", place / "Images")
    data = load_samples(place, image_dir=tmp_path / "photos.zip", max_bad_fraction=0.5)
    assert [(row.id, row.kind) for row in data.quarantine.rows] == [("1.jpg#0", "missing image")]
    assert "photos.zip holds no file '1.jpg'" in data.quarantine.rows[0].reason


def test_a_shortened_archive_is_named(archive: Path) -> None:
    ref = ImageRef(str(archives.open_archive(archive)["11.jpg"]))
    with archive.open("r+b") as file:
        file.truncate(archives.parse(ref.name).offset + 10)  # type: ignore[union-attr]
    with pytest.raises(ImageError, match=r"photos\.\w+#photos/11\.jpg@.* cannot be read: the archive ends before it"):
        decode(ref)
    assert "the archive ends" in (check(ref) or "")
    with pytest.raises(DataError, match=r"photos\.\w+ (cannot be read as a|is cut short)"):
        list(archives.tar_members(archive)) if archive.suffix == ".tar" else archives.open_archive(archive)
    archive.unlink()
    assert "does not exist" in (check(ref, "off") or "")
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        content_hash(ref)


def test_what_a_zip_packs_otherwise_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_BZIP2) as opened:
        opened.writestr("0.jpg", b"x" * 100)
    with pytest.raises(ImageError, match=r"0\.jpg is packed by another method than deflate"):
        archives.open_archive(tmp_path / "a.zip")["0.jpg"]


def test_a_zip_bomb_is_not_unfolded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("0.jpg", b"\0" * 1_000_000)
    monkeypatch.setattr(archives, "MOST_BYTES", 10_000)
    with pytest.raises(ImageError, match="has more than 10,000 bytes"):
        decode(ImageRef(str(archives.open_archive(tmp_path / "a.zip")["0.jpg"])))


def test_compressed_and_broken_tars_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with tarfile.open(tmp_path / "a.tar", "w:gz") as opened:
        opened.add(tmp_path / "a.txt", "a.txt")
    with pytest.raises(DataError, match=r"a\.tar cannot be read as a tar archive .*uncompressed first"):
        list(archives.tar_members(tmp_path / "a.tar"))


def test_only_addresses_are_parsed() -> None:
    for path in ("a.jpg", "a.tar", "a#b.jpg", "photos.tar#dog.jpg", "a.rar#b@1+2", "photos.tar#@1+2"):
        assert archives.parse(path) is None
    member = archives.Member("/d/a#b.tar", "x#y@1.jpg", 5, 7, True)
    assert archives.parse(str(member)) == member
