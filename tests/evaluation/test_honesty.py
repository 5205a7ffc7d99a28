"""The checks answer the same questions with other images, and say what the answers are worth."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from vlmtune.config import GenerationArguments
from vlmtune.data.images import content_hash, decode
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.evaluation.generation import Answer, AnswerGenerator
from vlmtune.evaluation.honesty import (
    MOST_SAMPLES,
    blank_images,
    check_honesty,
    format_honesty,
    shared_images,
    shuffle_images,
)
from vlmtune.evaluation.predictions_file import read_predictions
from vlmtune.evaluation.runner import evaluate

COLORS = ("red", "green", "blue", "teal")


def png(color: str, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def make_samples(count: int = 40, *, colors=COLORS, images: bool = True) -> list[Sample]:
    samples = []
    for number in range(count):
        color = colors[number % len(colors)]
        refs = (ImageRef(bytes=png(color, (8 + number % len(colors), 8))),) if images else ()
        messages = (Message.make("user", f"Color {number}?", images=len(refs)), Message.make("assistant", color))
        samples.append(Sample(str(number), refs, messages, references=(color,)))
    return samples


class Seeing:
    """Names the color of the first image; blind, it says the color that the question's number has."""

    def __init__(self, blind: bool = False) -> None:
        self.blind = blind
        self.options, self.seed = GenerationArguments(), 0
        self.model = torch.nn.Linear(2, 2)
        self.encoder = type("Encoder", (), {"max_pixels": None})()
        self.asked = 0
        torch.nn.init.constant_(self.model.weight, 1.0)
        torch.nn.init.constant_(self.model.bias, 1.0)

    def __call__(self, samples):
        self.asked += len(samples)
        return [Answer(self._say(sample), True, 1, 0.0) for sample in samples]

    def _say(self, sample: Sample) -> str:
        if self.blind or not sample.images:
            return COLORS[int(sample.id) % len(COLORS)]
        pixel = decode(sample.images[0]).getpixel((0, 0))
        known = {Image.new("RGB", (1, 1), color).getpixel((0, 0)): color for color in COLORS}
        return known.get(pixel, "grey")


def check(generator, samples, folder: Path, **options):
    dataset = datasets.Dataset.from_list([sample.to_row() for sample in samples])
    found = evaluate(generator, dataset, ["exact_match"], folder, name="m")
    return check_honesty(generator, samples, found, ["exact_match"], folder, name="m", **options)


class TestImages:
    """Which pictures the questions get."""

    def test_no_question_keeps_its_picture(self) -> None:
        samples = make_samples(40)
        shuffled = shuffle_images(samples)
        for one, other in zip(samples, shuffled, strict=True):
            assert (one.id, one.messages, one.references) == (other.id, other.messages, other.references)
            assert one.images != other.images
        # Questions about one image still share one: an image's prefix is computed once here, too.
        assert len({sample.images for sample in shuffled}) == len({sample.images for sample in samples})
        assert shuffle_images(samples) == shuffled
        assert any(shuffle_images(samples, seed) != shuffled for seed in range(1, 9))

    def test_copies_under_other_names_are_one_image(self, tmp_path: Path) -> None:
        names = []
        for number, color in enumerate(["red", "red", "red", "blue"]):
            names.append(tmp_path / f"{number}.png")
            names[-1].write_bytes(png(color))
        question = (Message.make("user", "?", images=1), Message.make("assistant", "x"))
        samples = [Sample(str(i), (ImageRef(str(name)),), question, ("x",)) for i, name in enumerate(names)]
        for one, other in zip(samples, shuffle_images(samples), strict=True):
            assert content_hash(one.images[0]) != content_hash(other.images[0])
        assert shuffle_images(samples[:3]) is None

    def test_blank_images_keep_their_sizes(self) -> None:
        samples = make_samples(8)
        for one, other in zip(samples, blank_images(samples), strict=True):
            before, after = decode(one.images[0]), decode(other.images[0])
            assert after.size == before.size and after.getcolors() == [(after.width * after.height, (128, 128, 128))]


class TestTrainingImages:
    """Images that are trained on and scored."""

    def test_copies_are_found_whatever_their_names(self, tmp_path: Path) -> None:
        (tmp_path / "copy.png").write_bytes(png("red"))
        training = [ImageRef(str(tmp_path / "copy.png")), ImageRef(str(tmp_path / "gone.png"))]
        found = shared_images(training, make_samples(8))
        assert (found["images"], found["shared"]) == (4, 1)
        assert shared_images([ImageRef(bytes=png("white"))], make_samples(8))["shared"] == 0

    def test_they_are_said(self, tmp_path: Path) -> None:
        found = check(Seeing(), make_samples(8), tmp_path / "a", training=[ImageRef(bytes=png("red"))])
        assert "1 of the 4 images scored are training images too" in format_honesty(found)
        found = check(Seeing(), make_samples(8), tmp_path / "b", training=[])
        assert "None of the 4 images scored is a training image." in format_honesty(found)
        found = check(Seeing(), make_samples(8), tmp_path / "c", training="there is no such folder")
        assert found["training_images"] == {"skipped": "there is no such folder"}

    def test_near_copies_are_said(self, tmp_path: Path) -> None:
        given: list[set[ImageRef]] = []

        def near_copies(training, scored):
            given.append(set(scored))
            return {"near": 2, "such_as": [("a.png", "b.png")]}

        training = [ImageRef(bytes=png("white"))]
        found = check(Seeing(), make_samples(8), tmp_path / "a", training=training, near_copies=near_copies)
        assert len(given[0]) == 4
        assert "2 of the images scored look like a training image, such as a.png like b.png." in format_honesty(found)
        options = {"training": training, "near_copies": lambda *images: {"near": 0, "such_as": []}}
        said = format_honesty(check(Seeing(), make_samples(8), tmp_path / "b", **options))
        assert "None looks like a training image." in said
        options["near_copies"] = lambda *images: {"skipped": "there are too many"}
        found = check(Seeing(), make_samples(8), tmp_path / "c", **options)
        assert "look like those scored: not looked for, there are too many." in format_honesty(found)
        assert json.loads((tmp_path / "c" / "scores.json").read_text())["honesty"]["training_images"]["near_copies"]


class TestResults:
    """What the checks find, and where it is kept."""

    def test_a_model_that_looks(self, tmp_path: Path) -> None:
        found = check(Seeing(), make_samples(), tmp_path)
        entry = found["shuffled"]["metrics"]["exact_match"]
        assert (entry["value"], entry["model"], entry["difference"]) == (0, 1, 1)
        assert found["blank"]["samples"] == 40 and found["blank"]["metrics"]["exact_match"]["value"] == 0
        said = format_honesty(found)
        assert said.count("the model looks at its images") == 2 and "100.0% of the answers ended" in said

    def test_a_model_that_does_not(self, tmp_path: Path) -> None:
        found = check(Seeing(blind=True), make_samples(), tmp_path)
        assert found["shuffled"]["metrics"]["exact_match"]["difference"] == 0
        assert format_honesty(found).count("may not look at its images") == 2

    def test_answers_and_scores_are_kept(self, tmp_path: Path) -> None:
        found = check(Seeing(), make_samples(), tmp_path)
        for name in ("shuffled", "blank"):
            assert [one.id for one in read_predictions(tmp_path / name)] == [str(number) for number in range(40)]
        record = json.loads((tmp_path / "scores.json").read_text())
        assert record["honesty"] == found and record["metrics"]["exact_match"]["value"] == 1
        again = Seeing()
        assert check(again, make_samples(), tmp_path) == found and not again.asked

    def test_equal_questions_about_blank_images_stay_apart(self, tmp_path: Path) -> None:
        """On grey, five questions may become one; each still counts."""
        samples = [
            Sample(str(i), (ImageRef(bytes=png(color)),), make_samples(1)[0].messages, ("red",))
            for i, color in enumerate(COLORS)
        ]
        found = check(Seeing(), samples, tmp_path)
        assert found["blank"]["samples"] == 4

    def test_at_most_some_samples(self, tmp_path: Path) -> None:
        found = check(Seeing(), make_samples(MOST_SAMPLES + 20), tmp_path)
        assert found["shuffled"]["samples"] == found["blank"]["samples"] == MOST_SAMPLES

    def test_without_images(self, tmp_path: Path) -> None:
        found = check(Seeing(), make_samples(8, images=False), tmp_path)
        assert found["shuffled"] == found["blank"] == {"skipped": "no sample has an image"}
        assert "shuffled images: not scored, no sample has an image" in format_honesty(found)

    def test_one_image(self, tmp_path: Path) -> None:
        found = check(Seeing(), make_samples(8, colors=("red",)), tmp_path)
        assert found["shuffled"] == {"skipped": "all samples show the same image"}
        assert found["blank"]["samples"] == 8

    def test_lower_is_better(self) -> None:
        entry = {"value": 0.9, "model": 0.1, "difference": -0.8, "low": -0.9, "high": -0.7, "n": 9, "percent": True}
        found = {"shuffled": {"samples": 9, "metrics": {"wer": entry}}, "ended_by_terminator": 0.5}
        said = format_honesty(found)
        assert "the model looks at its images (wer)" in said and "raise max_new_tokens" in said


def test_the_base_model_is_scored_without_its_adapter(tiny_model, processor, image_folder, tmp_path: Path) -> None:
    from vlmtune.models.lora import setup_lora

    samples = [
        Sample(
            str(i), (ImageRef(str(image_folder / f"{i}.jpg")),),
            (Message.make("user", "What?", images=1), Message.make("assistant", "red")), ("red",),
        )
        for i in range(3)
    ]  # fmt: skip
    options = GenerationArguments(max_new_tokens=2)
    plain = [answer.text for answer in AnswerGenerator(tiny_model, processor, options)(samples)]
    adapted = setup_lora(tiny_model, lora_r=4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=3.0, generator=torch.Generator().manual_seed(0))
    generator = AnswerGenerator(adapted.eval(), processor, options)
    found = check(generator, samples, tmp_path, base="the base")
    assert [one.answer for one in read_predictions(tmp_path / "base")] == plain
    assert [one.answer for one in read_predictions(tmp_path)] != plain
    assert found["base"]["samples"] == 3
    assert [answer.text for answer in generator(samples)] == [one.answer for one in read_predictions(tmp_path)]


@pytest.mark.parametrize("reason", ["compare_to names what to compare with"])
def test_the_base_is_left_out_with_a_line(reason: str, tmp_path: Path) -> None:
    found = check(Seeing(), make_samples(8), tmp_path, base_skipped=reason)
    assert f"base model: not scored, {reason}" in format_honesty(found)
