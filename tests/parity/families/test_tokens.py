"""What the model is given, and what it learns, is right for every family."""

from __future__ import annotations

import contextlib

import pytest
import torch
from parity.conversations import CONVERSATIONS, can_take, make_sample, official
from PIL import Image

from vlmtune.batching.collator import join_images
from vlmtune.config import GenerationArguments
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.errors import EncodingError
from vlmtune.evaluation.generation import AnswerGenerator

# (height, width) in pixels: odd, very wide, very high, tiny, large.
SIZES = [(31, 47), (17, 160), (200, 21), (5, 6), (64, 64), (33, 32), (301, 299)]


TEXT_HIDDEN = 64


class TestTokens:
    """What the model is given, and what it learns."""

    @pytest.mark.parametrize("name", CONVERSATIONS)
    def test_ids_are_the_processors(self, name, checkpoint, family, encoder, processor, image_folder) -> None:
        sample = make_sample(name, image_folder)
        if not can_take(checkpoint, name):
            with pytest.raises(EncodingError, match=f"'{name}'"):
                encoder(sample)
            return
        expected = official(family, processor, name, image_folder)["input_ids"][0].tolist()
        assert encoder(sample).input_ids == expected
        prompt = official(family, processor, name, image_folder, generate=True)["input_ids"][0].tolist()
        assert encoder.prompt(sample).input_ids == prompt == expected[: len(prompt)]

    @pytest.mark.parametrize("name", CONVERSATIONS)
    def test_answers_and_their_ends_are_supervised(
        self, name, checkpoint, family, encoder, processor, image_folder
    ) -> None:
        if not can_take(checkpoint, name):
            return
        encoded = encoder(make_sample(name, image_folder))
        spans, previous = [], False
        for token, flag in zip(encoded.input_ids, encoded.supervised, strict=True):
            if flag and not previous:
                spans.append([])
            if flag:
                spans[-1].append(token)
            previous = flag
        found = [processor.tokenizer.decode(span).strip() for span in spans]
        assert found == [answer + family.turn_end for _, answer in CONVERSATIONS[name][1]]

    def test_one_bos_where_the_family_has_it(self, family, encoder, processor, image_folder) -> None:
        ids = encoder(make_sample("one image", image_folder)).input_ids
        bos = processor.tokenizer.bos_token_id
        # Granite's is the token that ends a turn.
        found = ids.count(bos) if bos != encoder.turn_end_id else ids.index(bos) == 0
        assert (found if bos is not None else 0) == int(family.bos)

    def test_generation_stops_where_the_published_model_does(self, family, encoder, ours, processor) -> None:
        vocabulary = processor.tokenizer.get_vocab()
        assert encoder.turn_end == family.turn_end == family.terminators[0]
        assert family.turn_end in vocabulary
        stops = AnswerGenerator(ours, processor, GenerationArguments()).terminators
        published = ours.generation_config.eos_token_id
        published = set(published if isinstance(published, list) else [published])
        tokenizer = processor.tokenizer
        assert published <= stops <= published | {tokenizer.eos_token_id, tokenizer.pad_token_id}

    def test_image_token_is_the_models(self, family, ours, processor) -> None:
        token = getattr(ours.config, family.image_token_attribute)
        # Some processors count the tokens around an image's soft tokens as the image's.
        assert token in processor.image_token_ids
        assert type(processor).__name__ == family.processor_class

    @pytest.mark.parametrize("size", SIZES)
    def test_soft_tokens_are_the_features(self, size, family, encoder, ours, tmp_path) -> None:
        height, width = size
        image = Image.effect_noise((width, height), 90).convert("RGB")
        image.save(tmp_path / "a.png")
        sample = Sample(
            "odd",
            (ImageRef(str(tmp_path / "a.png")),),
            (Message.make("user", "What?", images=1), Message.make("assistant", "red")),
        )
        if family.name == "mistral3" and size == (5, 6):
            with pytest.raises(EncodingError, match=r"'odd'.*6 x 5 pixels is too small.*16 pixels"):
                encoder(sample)
            return
        encoded = encoder(sample)
        with torch.no_grad():
            features = ours.get_image_features(**join_images([encoded], family), return_dict=True).pooler_output
        soft = encoded.input_ids.count(getattr(ours.config, family.image_token_attribute))
        assert soft == sum(part.numel() for part in features) // TEXT_HIDDEN
        assert encoder(sample, pixels=False).input_ids == encoded.input_ids
        assert encoder(sample, pixels=False).axes == encoded.axes

    def test_resolution_counts_only_where_the_record_says_so(self, family, encoder, tmp_path) -> None:
        counts = set()
        for height, width in SIZES:
            Image.new("RGB", (width, height), "red").save(tmp_path / "a.png")
            ref = ImageRef(str(tmp_path / "a.png"))
            sample = Sample("a", (ref,), (Message.make("user", "What?", images=1), Message.make("assistant", "red")))
            with contextlib.suppress(EncodingError):
                counts.add(sum(encoder(sample).token_type_ids))
        assert (len(counts) > 1) == family.sized

    def test_turned_photos_count_by_their_upright_size(self, family, encoder, tmp_path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.effect_noise((160, 17), 90).convert("RGB").save(tmp_path / "a.jpg", exif=exif)
        ref = ImageRef(str(tmp_path / "a.jpg"))
        sample = Sample("a", (ref,), (Message.make("user", "What?", images=1), Message.make("assistant", "red")))
        assert encoder(sample, pixels=False).input_ids == encoder(sample).input_ids

    @pytest.mark.parametrize("name", CONVERSATIONS)
    def test_positions_are_the_models(self, name, checkpoint, family, encoder, ours, processor, image_folder) -> None:
        if not can_take(checkpoint, name):
            return
        encoded = encoder(make_sample(name, image_folder))
        assert bool(encoded.axes) == hasattr(ours.model, "get_rope_index")
        if not encoded.axes:
            return
        ids, types = torch.tensor([encoded.input_ids]), torch.tensor([encoded.token_type_ids])
        grids = encoded.image_inputs.get("image_grid_thw")
        expected, _ = ours.model.get_rope_index(ids, image_grid_thw=grids, mm_token_type_ids=types)
        assert torch.equal(torch.tensor(encoded.axes), expected[:, 0])

    @pytest.mark.parametrize("name", ["one image", "three images"])
    def test_the_model_is_given_what_the_processor_gives(
        self, name, checkpoint, family, collator, processor, image_folder
    ) -> None:
        if not can_take(checkpoint, name):
            return
        given = official(family, processor, name, image_folder)
        batch = collator([make_sample(name, image_folder).to_row()])
        assert batch.keys() - {"labels"} == given.keys() - {"labels"}
        assert all(torch.equal(batch[key], torch.as_tensor(given[key])) for key in family.image_inputs)
        if name == "three images":
            by_sample = given["pixel_values"].shape[0] == 1
            assert by_sample == (family.image_axis == 1)
