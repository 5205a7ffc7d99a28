"""The check as a whole: what it finds, that it refuses what training refuses, and what it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmtune.cli import main
from vlmtune.config import BaseModelArguments, VLMDataArguments
from vlmtune.data.loading import load_train_and_eval
from vlmtune.errors import VlmtuneError
from vlmtune.inspection.doctor import check_data
from vlmtune.inspection.findings import Finding, Report, histogram
from vlmtune.inspection.render import html_page, verdict


def run(place: Path, model: Path | None = None, **options: Any) -> Report:
    data_args = VLMDataArguments(dataset_path=str(place), **options)
    return check_data(data_args, BaseModelArguments(model_name_or_path=str(model)) if model else None)


def found(report: Report, kind: str) -> Finding:
    (finding,) = [finding for finding in report.findings if finding.kind == kind]
    return finding


def kinds(report: Report) -> set[str]:
    return {finding.kind for finding in report.findings}


def test_good_data_have_no_findings(captions: Path) -> None:
    report = run(captions)
    assert report.findings == [] and report.refused == []
    assert report.numbers["training"] == {
        "rows": 20, "set_aside": 0, "used": 20, "images": 10, "texts_per_image": 2.0,
    }  # fmt: skip
    assert report.numbers["images"]["formats"] == {"JPEG": 10}
    assert verdict(report) == "Training would start."


@pytest.mark.parametrize("verify", ["off", "header", "full"])
@pytest.mark.parametrize("fault", ["missing", "empty", "not an image", "damaged", None])
@pytest.mark.parametrize("allowed", [0.05, 0.5])
def test_what_training_refuses_is_refused(captions: Path, verify: Any, fault: str | None, allowed: float) -> None:
    image = captions / "Images" / "3.jpg"
    content = {"empty": b"", "not an image": b"text", "damaged": image.read_bytes()[:-200]}
    if fault == "missing":
        image.unlink()
    elif fault:
        image.write_bytes(content[fault])
    args = VLMDataArguments(dataset_path=str(captions), verify_images=verify, max_bad_fraction=allowed)
    report = check_data(args)
    try:
        data, _ = load_train_and_eval(args)
        paths = [row[0]["path"] for row in data.dataset["images"]]
        # Training starts; it would stop at a bad image that was not found.
        loads = fault is None or str(image) not in paths
    except VlmtuneError:
        loads = False
    assert (not report.refused) == loads
    assert bool(report.findings) == (fault is not None)


def test_bad_rows_are_named(captions: Path) -> None:
    file = captions / "captions.txt"
    file.write_text(file.read_text() + "0.jpg,\n1.jpg,A long caption number 0 of picture 1\n")
    report = run(captions, max_bad_fraction=0.5)
    assert (
        found(report, "empty caption").count == 1
        and "captions.txt, line 22" in found(report, "empty caption").examples[0]
    )
    assert found(report, "duplicate").count == 1
    assert report.numbers["training"]["set_aside"] == 2
    assert not report.refused
    assert run(captions).refused == ["2 of 22 rows cannot be used, more than max_bad_fraction 0.01 allows"]


def test_image_marks_that_are_words(captions: Path) -> None:
    file = captions / "captions.txt"
    file.write_text(file.read_text() + "0.jpg,<image> A picture of many things\n")
    finding = found(run(captions), "image mark in a text")
    assert (finding.level, finding.examples) == ("warning", ("0.jpg#2",))


def test_pictures_on_both_sides(captions: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held out"
    shutil.copytree(captions, held_out)
    for number in range(10):
        image = held_out / "Images" / f"{number}.jpg"
        if number == 0:
            Image.open(captions / "Images" / "0.jpg").resize((100, 75)).save(image)
        elif number > 1:
            Image.open(image).transpose(Image.Transpose.ROTATE_180).save(image)
    report = run(captions, eval_dataset_path=str(held_out))
    finding = found(report, "alike on both sides")
    assert finding.count == 2 and finding.level == "warning"
    assert {example.partition(" = ")[0][-5:] for example in finding.examples} == {"0.jpg", "1.jpg"}
    assert "same image on both sides" not in kinds(report)
    assert found(run(captions, eval_dataset_path=str(captions)), "same image on both sides").count == 10


@pytest.fixture
def questions(tmp_path: Path, make_photo: Callable[..., Image.Image]) -> Callable[..., Path]:
    def make(*rows: tuple[str, str, int], name: str = "questions") -> Path:
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True)
        for number in range(6):
            make_photo(number).save(folder / "images" / f"{number}.png")
        (folder / "questions.json").write_text(json.dumps(rows))
        return folder

    return make


def test_one_answer_for_most(questions: Callable[..., Path]) -> None:
    rows = [(f"is it {n}?", "yes", n % 6) for n in range(8)] + [("is it red?", "no", 0), ("is it blue?", "no", 1)]
    report = run(questions(*rows))
    assert report.answers == [("yes", 8), ("no", 2)]
    assert "80% of the training answers are 'yes'" in found(report, "one answer for most").text
    assert "contradiction" not in kinds(report)


def test_contradictions_and_unseen_answers(questions: Callable[..., Path]) -> None:
    rows = [("is it red?", "yes", 0), ("is it red?", "no", 0), ("is it red?", "no", 1), ("what?", "cat", 2)]
    place = questions(*rows)
    assert found(run(place), "contradiction").count == 1
    assert "'yes' and 'no'" in found(run(place), "contradiction").examples[0]
    held_out = questions(("what?", "dog", 3), ("who?", "Dog.", 4), ("is it red?", "no", 5), name="held out")
    finding = found(run(place, eval_dataset_path=str(held_out)), "unseen answers")
    assert finding.count == 2 and finding.examples == ("dog",)


def test_captions_of_one_image_do_not_contradict(captions: Path) -> None:
    assert "contradiction" not in kinds(run(captions))


@pytest.mark.parametrize(("policy", "refused"), [("error", True), ("drop", False), ("truncate_text", False)])
def test_tokens_and_limits(captions: Path, tiny_gemma3_dir: Path, policy: Any, refused: bool) -> None:
    report = run(captions, tiny_gemma3_dir)
    tokens = report.numbers["training tokens"]
    assert tokens["image_tokens"] == 20 * 4
    assert 0 < tokens["supervised_share"] < 1 and tokens["longer_than_max_length"] == 0
    assert "10 images, 20 texts, 20 of them share an image" in tokens["sharing"] and tokens["sharing_is_used"]
    cut = run(captions, tiny_gemma3_dir, max_length=tokens["longest"] - 3, on_too_long=policy)
    over = cut.numbers["training tokens"]["longer_than_max_length"]
    assert over > 0 and bool(cut.refused) == refused
    finding = found(cut, "cut" if policy == "truncate_text" else "too long")
    assert finding.count == over
    if policy == "truncate_text":
        assert f" {2 * over} of their" in finding.text
        nothing = run(captions, tiny_gemma3_dir, max_length=3, on_too_long=policy)
        assert found(nothing, "nothing left after cutting").count == 20 and nothing.refused


def test_rows_that_cannot_be_encoded(captions: Path, tiny_gemma3_dir: Path) -> None:
    file = captions / "captions.txt"
    file.write_text(file.read_text() + "0.jpg,A <end_of_turn> sign\n")
    report = run(captions, tiny_gemma3_dir)
    assert "control token" in found(report, "cannot be encoded").examples[0]
    assert report.refused == ["1 of 21 training rows cannot be encoded, more than max_bad_fraction 0.01 allows"]


def test_the_page_is_whole_and_escaped(captions: Path) -> None:
    (captions / "Images" / "0.jpg").write_bytes(b"no image")
    (captions / "Images" / "1.jpg").rename(captions / "Images" / "<b>1.jpg")
    Image.open(captions / "Images" / "2.jpg").convert("CMYK").save(captions / "Images" / "2.jpg")
    text = html_page(run(captions, max_bad_fraction=0.3))
    assert "Training would be refused" not in text and "Training would start" in text
    assert "<b>" not in text and "http" not in text.replace("http-equiv", "")
    assert text.count("data:image/jpeg;base64,") == 1
    assert "cannot be shown" in text


def test_the_command(captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["check", str(captions), "--report_dir", str(out)]) == 0
    said = capsys.readouterr().out
    assert "Training would start." in said and str(out / "check.html") in said
    (captions / "Images" / "0.jpg").unlink()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"dataset_path: {captions}\nlearning_rate: 1e-4\n")
    assert main(["check", str(recipe), "--report_dir", str(out)]) == 1
    assert "missing image" in capsys.readouterr().out
    content = json.loads((out / "check.json").read_text())
    assert content["training_would_be_refused"] is True
    assert content["findings"][0]["kind"] == "missing image" and content["findings"][0]["count"] == 2
    assert main(["check", str(recipe), "--processes", "no"]) == 2


def test_histograms_hold_every_value() -> None:
    values = [1] * 50 + list(range(40)) + [5000]
    bars = histogram(values)
    assert sum(count for _, count in bars) == len(values) and len(bars) <= 14
    assert histogram([]) == [] and histogram([7, 7]) == [("7", 2)]
    assert histogram([15] + [375] * 200 + [4500]) == [("15 to 374", 1), ("375", 200), ("376 to 4,500", 1)]
    assert histogram([*range(1000)])[0] == ("0 to 9", 10)


def test_images_in_an_archive_are_checked_in_place(captions: Path, tmp_path: Path) -> None:
    (captions / "Images" / "0.jpg").write_bytes(b"no image")
    plain = check_data(VLMDataArguments(dataset_path=str(captions)))
    shutil.make_archive(str(tmp_path / "photos"), "zip", captions / "Images")
    shutil.rmtree(captions / "Images")
    packed = check_data(VLMDataArguments(dataset_path=str(captions), image_dir=str(tmp_path / "photos.zip")))
    kinds = [[(finding.kind, finding.count) for finding in report.findings] for report in (plain, packed)]
    assert kinds[0] == kinds[1] and ("image not an image", 1) in kinds[0]
    assert "0.jpg" in html_page(packed)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attn_implementation": "flash_attention_2"}, "share_images is on, but attn_implementation flash_attention_2"),
        ({"torch_dtype": "float16"}, "gemma3 cannot be used in float16"),
        ({}, None),
    ],
)
def test_options_of_the_model_that_training_refuses(captions: Path, tiny_gemma3_dir: Path, options, reason) -> None:
    model_args = BaseModelArguments(model_name_or_path=str(tiny_gemma3_dir), **options)
    report = check_data(VLMDataArguments(dataset_path=str(captions), share_images="on"), model_args)
    assert [reason in text for text in report.refused] == ([True] if reason else [])
    assert report.numbers["training tokens"]["sharing_is_used"] == ("attn_implementation" not in options)
