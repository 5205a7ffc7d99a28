"""Every fault of an image is named, and look-alikes are found however they were saved."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from vlmtune.data import images
from vlmtune.data.sample import ImageRef
from vlmtune.inspection.duplicates import look_alikes
from vlmtune.inspection.images import FOUND_BY, ImageFacts, inspect_image, inspect_images

Photo = Callable[..., Image.Image]


def saved(image: Image.Image, place: Path, **options: object) -> ImageRef:
    image.save(place, **options)  # type: ignore[arg-type]
    return ImageRef(path=str(place))


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_a_good_image(tmp_path: Path, make_photo: Photo, ending: str) -> None:
    facts = inspect_image(saved(make_photo(1), tmp_path / f"a.{ending}"))
    assert (facts.kind, facts.problem, facts.notes) == ("", "", ())
    assert facts.size == (120, 90) and facts.hashes is not None
    assert facts.key == images.content_hash(ImageRef(path=str(tmp_path / f"a.{ending}")))


@pytest.mark.parametrize("kind", ["missing", "empty", "not an image", "damaged", "too large"])
def test_bad_images(tmp_path: Path, make_photo: Photo, kind: str) -> None:
    place = tmp_path / "a.jpg"
    make_photo(1, (400, 300)).save(place, quality=95)
    if kind == "missing":
        place.unlink()
    elif kind == "empty":
        place.write_bytes(b"")
    elif kind == "not an image":
        place.write_bytes(b"<html>404</html>")
    elif kind == "damaged":
        place.write_bytes(place.read_bytes()[:-400])
    facts = inspect_image(ImageRef(path=str(place)), max_pixels=10_000 if kind == "too large" else None)
    assert facts.kind == kind
    assert facts.problem.startswith(str(place))


@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_file_cut_short_is_found_at_reduced_scale(
    tmp_path: Path, make_photo: Photo, ending: str, share: float
) -> None:
    place = tmp_path / f"a.{ending}"
    make_photo(1, (640, 480)).save(place)
    place.write_bytes(place.read_bytes()[: int(place.stat().st_size * share)])
    ref = ImageRef(path=str(place))
    assert images.check(ref, "full") is not None
    assert inspect_image(ref).kind == "damaged"


def test_the_loaders_own_check_finds_what_the_table_says(tmp_path: Path, make_photo: Photo) -> None:
    good = tmp_path / "good.jpg"
    make_photo(1, (400, 300)).save(good)
    places = {"missing": None, "empty": b"", "not an image": b"text", "damaged": good.read_bytes()[:-300]}
    for kind, content in places.items():
        ref = ImageRef(path=str(tmp_path / f"{kind}.jpg"))
        if content is not None:
            Path(ref.path or "").write_bytes(content)
        found = {how: images.check(ref, how) is not None for how in ("off", "header", "full")}  # type: ignore[arg-type]
        assert found == {how: kind in kinds for how, kinds in FOUND_BY.items()}, kind


def test_unusual_images_are_noted(tmp_path: Path, make_photo: Photo) -> None:
    photo = make_photo(1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    frames = [make_photo(n) for n in (1, 2)]
    wide = np.linspace(0, 65535, 120 * 90).reshape(90, 120).astype(np.uint16)
    cases = {
        "CMYK": saved(photo.convert("CMYK"), tmp_path / "a.jpg"),
        "16 bits": saved(Image.fromarray(wide), tmp_path / "b.png"),
        "transparent": saved(photo.convert("RGBA"), tmp_path / "c.png"),
        "animated": saved(frames[0], tmp_path / "d.gif", save_all=True, append_images=frames[1:]),
        "turned by EXIF": saved(photo, tmp_path / "e.jpg", exif=exif),
        "tiny": saved(photo.resize((20, 40)), tmp_path / "f.jpg"),
        "very long": saved(photo.resize((600, 60)), tmp_path / "g.jpg"),
        "huge": saved(Image.new("L", (6000, 5000)), tmp_path / "h.png"),
    }
    found = {note: inspect_image(ref) for note, ref in cases.items()}
    assert {note: facts.notes for note, facts in found.items()} == {note: (note,) for note in cases}
    assert found["turned by EXIF"].size == (90, 120)


def alike(*refs: ImageRef) -> list[list[int]]:
    return look_alikes([inspect_image(ref) for ref in refs])


def test_the_same_picture_saved_otherwise_looks_alike(tmp_path: Path, make_photo: Photo) -> None:
    photo = make_photo(5, (500, 375))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    same = [
        saved(photo, tmp_path / "a.png"),
        saved(photo, tmp_path / "b.jpg", quality=60),
        saved(photo.resize((250, 188)), tmp_path / "c.jpg"),
        saved(photo.transpose(Image.Transpose.ROTATE_90), tmp_path / "d.jpg", exif=exif),
    ]
    others = [saved(make_photo(seed, (500, 375)), tmp_path / f"{seed}.jpg") for seed in range(6, 10)]
    mirrored = saved(photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT), tmp_path / "m.jpg")
    assert alike(*others[:2], *same, *others[2:], mirrored) == [[2, 3, 4, 5]]


def test_noise_of_a_plain_background_is_no_edge(tmp_path: Path, make_photo: Photo) -> None:
    """A third of the picture is plain sky with a camera's noise, which no two ways of saving keep alike."""

    def with_sky(seed: int) -> Image.Image:
        rng = np.random.default_rng(seed)
        pixels = np.asarray(make_photo(seed, (500, 375))).astype(np.int16) + rng.integers(-12, 12, (375, 500, 3))
        pixels[:150] = 230 + rng.integers(-4, 5, (150, 500, 3))
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))

    refs = []
    for seed in range(12):
        picture = with_sky(seed)
        refs.append(saved(picture, tmp_path / f"{seed}.jpg", quality=92))
        refs.append(saved(picture.resize((640, 480)), tmp_path / f"{seed}b.jpg", quality=60))
    assert sorted(alike(*refs)) == [[n, n + 1] for n in range(0, 24, 2)]


def test_colour_and_plain_pictures(tmp_path: Path, make_photo: Photo) -> None:
    red, blue = (saved(Image.new("RGB", (64, 64), color), tmp_path / f"{color}.png") for color in ("red", "blue"))
    assert alike(red, blue) == []
    copy = saved(Image.new("RGB", (64, 64), "red"), tmp_path / "copy.png")
    assert alike(red, blue, copy) == [[0, 2]]
    photo = make_photo(3)
    channels = photo.split()
    swapped = saved(Image.merge("RGB", (channels[2], channels[1], channels[0])), tmp_path / "swapped.png")
    assert alike(saved(photo, tmp_path / "photo.png"), swapped) == []


def test_many_images_are_compared_as_if_each_with_each() -> None:
    rng = np.random.default_rng(0)
    facts = []
    for number in range(300):
        pair = [int(value) for value in rng.integers(0, 2**63, 2)]
        facts.append(ImageFacts(key=str(number), hashes=(pair[0], pair[1]), colors=bytes(48)))
        if number % 10 == 0:
            # Five bits away, spread over both halves.
            near = (pair[0] ^ 0b10001, pair[1] ^ (1 << 60) ^ (1 << 33) ^ 1)
            facts.append(ImageFacts(key=f"{number}b", hashes=near, colors=bytes(48)))
    groups = look_alikes(facts)
    assert len(groups) == 30 and all(len(group) == 2 and group[1] == group[0] + 1 for group in groups)


def test_several_processes_find_the_same(tmp_path: Path, make_photo: Photo) -> None:
    refs = [saved(make_photo(n, (60, 40)), tmp_path / f"{n}.jpg") for n in range(6)]
    buffer = io.BytesIO()
    make_photo(9).save(buffer, "PNG")
    refs += [ImageRef(path=str(tmp_path / "gone.jpg")), ImageRef(bytes=buffer.getvalue())]
    seen: list[tuple[int, int]] = []
    one = inspect_images(refs, len(refs), processes=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 8) for n in range(1, 9)]
    assert inspect_images(refs, len(refs), processes=2) == one
    assert [facts.kind for facts in one] == [""] * 6 + ["missing", ""]
