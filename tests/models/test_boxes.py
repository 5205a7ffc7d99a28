"""Boxes in each family's words and back, by its own processor's resize."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmtune.batching.encode import Encoder
from vlmtune.data.boxes import Box, boxes_sample, boxes_text, read_boxes
from vlmtune.data.sample import ImageRef, Message
from vlmtune.errors import EncodingError
from vlmtune.models.boxes import View, read_json_boxes, read_lists, read_locations, read_pairs, tell, understand
from vlmtune.models.families import FAMILIES
from vlmtune.models.loading import load_processor

LABELS = ("dog", "traffic light", "größte Katze")


@pytest.fixture(scope="module")
def processor_of(family_dir):
    return functools.cache(lambda name: load_processor(family_dir(name)))


@st.composite
def pictures(draw):
    """(height, width) of an image, and boxes in it, in pixels."""
    # Odd, and of an aspect ratio that every family takes.
    size = draw(st.integers(8, 800)) * 2 + 1, draw(st.integers(8, 800)) * 2 + 1
    boxes = []
    for _ in range(draw(st.integers(0, 4))):
        sides = []
        for side in size:
            low = draw(st.floats(0, side - 1))
            sides.append((low, draw(st.floats(low + 0.5, side))))
        (top, bottom), (left, right) = sides
        corners = tuple(round(number, 2) for number in (left, top, right, bottom))
        boxes.append(Box(corners, draw(st.sampled_from(LABELS))))
    return size, boxes


@pytest.mark.parametrize("name", FAMILIES)
@given(picture=pictures(), task=st.sampled_from(["detection", "grounding"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_boxes_come_back_within_a_pixel(processor_of, name: str, picture, task) -> None:
    """Of the image or, where the model sees it smaller, of what the model sees; what it does not see is cut off."""
    size, boxes = picture
    family = FAMILIES[name]
    view = family.view(processor_of(name), size)
    text = family.boxes.to_text(boxes, view, task)
    back = family.boxes.from_text(text, view, size)
    assert back is not None and len(back) == len(boxes)
    if name == "internvl":
        # Boxes of one label stand together.
        labels = list(dict.fromkeys(box.label for box in boxes))
        boxes = sorted(boxes, key=lambda box: labels.index(box.label))
    for said, box in zip(back, boxes, strict=True):
        for place, (found, wanted) in enumerate(zip(said.corners, box.corners, strict=True)):
            start, length = (view.left, view.width) if place % 2 == 0 else (view.top, view.height)
            side = size[1 - place % 2]
            visible = min(max(wanted, start, 0), start + length, side)
            seen = view.seen[place % 2]
            # A step of the family's numbers, where that is more than a pixel; rounded to hundredths.
            tolerance = max(1.0, length / (family.boxes.scale or seen)) + 0.01
            assert abs(found - visible) <= tolerance, (text, box)
        # LLaVA answers a phrase by numbers alone.
        if task == "detection" or "llava" not in name:
            assert said.label == box.label


# (family, size (height, width), what it writes for a dog at 22.22, 20, 110, 220 in pixels), by hand:
# 0.1111 of the width tells left from top, and three digits from four.
WRITTEN = {
    "gemma3": ((400, 200), '[{"box_2d": [50, 111, 550, 550], "label": "dog"}]'),
    "gemma4": ((400, 200), '[{"box_2d": [50, 111, 550, 550], "label": "dog"}]'),
    "paligemma": ((400, 200), "<loc0051><loc0114><loc0563><loc0563> dog"),
    "llava_next": ((400, 200), "dog [0.111, 0.05, 0.55, 0.55]"),
    "llava_onevision": ((400, 200), "dog [0.111, 0.05, 0.55, 0.55]"),
    "qwen2_vl": (
        (400, 200),
        "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(111,50),(550,550)<|box_end|>",
    ),
    "qwen3_vl": ((400, 200), '```json\n[\n\t{"bbox_2d": [111, 50, 550, 550], "label": "dog"}\n]\n```'),
    "qwen3_5": ((400, 200), '```json\n[\n\t{"bbox_2d": [111, 50, 550, 550], "label": "dog"}\n]\n```'),
    "internvl": ((400, 200), "<ref>dog</ref><box>[[111, 50, 550, 550]]</box>"),
    "idefics3": ((400, 200), '[{"bbox_2d": [111, 50, 550, 550], "label": "dog"}]'),
    "smolvlm": ((400, 200), '[{"bbox_2d": [111, 50, 550, 550], "label": "dog"}]'),
    "mistral3": ((400, 200), '[{"bbox_2d": [111, 50, 550, 550], "label": "dog"}]'),
    "granite_docling": ((400, 200), '[{"bbox_2d": [111, 50, 550, 550], "label": "dog"}]'),
    # The square in the middle begins 100 pixels down: the box's top lies above it.
    "llava": ((400, 200), "dog [0.111, 0.0, 0.55, 0.6]"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_writes(processor_of, name: str) -> None:
    family, box = FAMILIES[name], Box((22.22, 20, 110, 220), "dog")
    if name == "qwen2_5_vl":
        # In pixels of the resized image: at most 8 x 8 x 20 of them, sides multiples of 8.
        view = family.view(processor_of(name), (400, 200))
        assert view.seen == (24, 48)
        assert '"bbox_2d": [3, 2, 13, 26]' in family.boxes.to_text([box], view, "detection")
        assert understand('[{"bbox_2d": [1, 2, 13, 26]}]', family.boxes, view, (400, 200)) == boxes_text(
            [Box((8.33, 16.67, 108.33, 216.67))]
        )
        return
    size, text = WRITTEN[name]
    assert family.boxes.to_text([box], family.view(processor_of(name), size), "detection") == text


def test_the_view_of_qwen2_5_is_what_its_processor_makes(processor_of) -> None:
    """Pixels of the resized image, read off the patches that the processor really cut."""
    processor, family = processor_of("qwen2_5_vl"), FAMILIES["qwen2_5_vl"]
    patch = processor.image_processor.patch_size
    for height, width in ((31, 47), (17, 160), (200, 21), (301, 299)):
        grid = processor.image_processor([Image.new("RGB", (width, height))], return_tensors="np")["image_grid_thw"][0]
        view = family.view(processor, (height, width))
        assert view.seen == (grid[2] * patch, grid[1] * patch)


@pytest.mark.parametrize("size", [(40, 100), (100, 40), (64, 64), (33, 200)])
def test_the_view_of_llava_is_what_its_processor_leaves(processor_of, size) -> None:
    """A white image with a black frame where the view ends: what the processor leaves has no white outside of it."""
    import numpy as np

    processor, (height, width) = processor_of("llava"), size
    view = FAMILIES["llava"].view(processor, size)
    across = np.tile(np.arange(width) / width * 255, (height, 1)).astype(np.uint8)
    image = Image.fromarray(np.stack([across] * 3, -1))
    options = {"do_normalize": False, "do_rescale": False, "return_tensors": "np"}
    left = processor.image_processor([image], **options)["pixel_values"][0][0]
    assert left[:, 0].mean() / 255 * width == pytest.approx(view.left, abs=width / 25)
    assert left[:, -1].mean() / 255 * width == pytest.approx(view.left + view.width, abs=width / 25)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_box_is_an_answer_too(processor_of, name: str) -> None:
    family = FAMILIES[name]
    view = family.view(processor_of(name), (90, 60))
    text = family.boxes.to_text([], view, "detection")
    assert text.strip() and family.boxes.from_text(text, view, (90, 60)) == []
    assert family.boxes.from_text("There is a dog on the left.", view, (90, 60)) is None


def test_readers_take_what_models_write_beside_their_usual_form() -> None:
    pair = [((1, 2, 3, 4), "dog"), ((5, 6, 7, 8), "cat")]
    # Special tokens are left out when an answer is decoded.
    assert read_pairs("dog(1,2),(3,4)cat(5,6),(7,8)") == pair
    assert read_pairs("<|box_start|>(1,2),(3,4)<|box_end|>") == [((1, 2, 3, 4), "")]
    assert read_lists("dog[[1, 2, 3, 4]]\ncat[[5, 6, 7, 8]]") == pair
    assert read_lists("<ref>dog</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>") == [pair[0], ((5, 6, 7, 8), "dog")]
    assert read_lists("[0.1, 0.2, 0.3, 0.4]") == [((0.1, 0.2, 0.3, 0.4), "")]
    # Cut off by max_new_tokens: what is whole counts.
    cut = '```json\n[\n\t{"bbox_2d": [1, 2, 3, 4], "label": "dog"},\n\t{"bbox_2d": [5, 6,'
    assert read_json_boxes(cut) == pair[:1]
    assert read_json_boxes("The box is [1, 2, 3, 4].") == [((1, 2, 3, 4), "")]
    assert read_json_boxes('{"bbox_2d": [1, 2, 3], "label": "dog"}') is None
    assert read_json_boxes("There is none") is None
    assert read_locations("<loc0001><loc0002><loc0003><loc0004> dog ; <loc0005><loc0006><loc0007><loc0008> cat") == pair


def test_answers_are_cut_to_the_image() -> None:
    codec, view = FAMILIES["qwen3_vl"].boxes, View(0, 0, 100, 50, (100, 50))
    text = understand('[{"bbox_2d": [-50, 500, 2000, 1000], "label": "dog"}]', codec, view, (50, 100))
    assert read_boxes(text) == [Box((0, 25, 100, 50), "dog")]


@pytest.fixture(scope="module")
def dog(tmp_path_factory):
    path = tmp_path_factory.mktemp("dog") / "dog.png"
    Image.new("RGB", (200, 400)).save(path)
    boxes = [Box((10, 20, 110, 220), "dog"), Box((0, 0, 200, 400), "dog", crowd=True)]
    return boxes_sample(
        "7", ImageRef(path=str(path)), boxes, task="detection", ask=["cat", "dog"], size=(200, 400), meta={"split": "a"}
    )


def test_questions_are_in_the_familys_words_unless_chosen(dog) -> None:
    view = View(0, 0, 200, 400, (200, 400))
    told = tell(dog, FAMILIES["paligemma"].boxes, view)
    assert (told.prompt[0].text, told.target) == ("detect cat ; dog", "<loc0051><loc0051><loc0563><loc0563> dog")
    assert told.meta == {"split": "a"} and told.prompt[0].n_images == 1
    assert tell(dog, FAMILIES["gemma3"].boxes, view).prompt == dog.prompt
    everything = dataclasses.replace(dog, meta={"boxes": {"task": "detection", "ask": []}})
    assert tell(everything, FAMILIES["paligemma"].boxes, view).prompt[0].text == "detect objects"
    chosen = dataclasses.replace(dog, meta={"boxes": {"task": "detection"}})
    assert tell(chosen, FAMILIES["paligemma"].boxes, view).prompt == dog.prompt


@pytest.mark.parametrize("name", FAMILIES)
def test_the_encoder_learns_the_familys_words_and_reads_them(processor_of, dog, name: str) -> None:
    processor, family = processor_of(name), FAMILIES[name]
    encoder = Encoder(processor, family)
    encoded = encoder(dog, pixels=False)
    learned = [token for token, flag in zip(encoded.input_ids, encoded.supervised, strict=True) if flag]
    answer = family.boxes.to_text([Box((10, 20, 110, 220), "dog")], family.view(processor, (400, 200)), "detection")
    plain = processor.tokenizer.decode(learned, skip_special_tokens=False)
    assert "".join(answer.split()) in "".join(plain.split())
    # A generated prompt is what training saw before the answer.
    prompt = encoder.prompt(dog, pixels=False).input_ids
    assert encoded.input_ids[: len(prompt)] == prompt
    (box,) = read_boxes(encoder.answer(dog, answer)) or ()
    assert box.label == "dog"
    assert box.corners[2] == pytest.approx(110, abs=200 / 24)


def test_boxes_of_another_image_are_refused(processor_of, dog) -> None:
    encoder = Encoder(processor_of("gemma3"), FAMILIES["gemma3"])
    turned = dataclasses.replace(dog, meta={"boxes": {**dog.meta["boxes"], "size": [400, 200]}})
    with pytest.raises(EncodingError, match=r"of an image of 400 x 200 pixels, but .*dog\.png has 200 x 400"):
        encoder(turned, pixels=False)
    bare = dataclasses.replace(dog, images=(), messages=(Message.make("user", "detect dog"), dog.messages[1]))
    with pytest.raises(EncodingError, match="has boxes and 0 images"):
        encoder(bare, pixels=False)


def test_every_family_says_where_its_convention_is_from() -> None:
    assert all(family.boxes.source for family in FAMILIES.values())
    assert json.loads(FAMILIES["idefics3"].boxes.to_text([], View(0, 0, 1, 1, (1, 1)), "detection")) == []
