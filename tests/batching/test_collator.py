"""Rows of a data set to the tensors of a batch (PITFALLS 1, 4, 14)."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
import torch

from vlmtune.batching import encode
from vlmtune.batching.collator import IGNORE_INDEX, BaseVLMDataCollator, SharedImageCollator, create_data_collator, pad
from vlmtune.data.sample import Message, Sample
from vlmtune.errors import ConfigError, ImageError, TooLongError, UnsupportedModelError
from vlmtune.models.families import FAMILIES
from vlmtune.models.features import FeatureCache
from vlmtune.models.loading import load_processor

GEMMA = FAMILIES["gemma3"]


@pytest.fixture
def rows(make_sample) -> list[dict]:
    """Rows of one, no and three images, and two more about the first image."""
    return [
        make_sample("one", [0], [("What?", "red")]).to_row() | {"image_key": "k0"},
        make_sample("none", [], [("What color is red?", "red"), ("And?", "blue")]).to_row() | {"image_key": ""},
        make_sample("three", [1, 2, 1], [("Describe this image.", "a dog")]).to_row() | {"image_key": "k1 k2 k1"},
        make_sample("again", [0], [("Is there a dog?", "no")]).to_row() | {"image_key": "k0"},
        make_sample("last", [0], [("What?", "red dog")]).to_row() | {"image_key": "k0"},
    ]


class TestBase:
    """The batch that any trainer takes."""

    def test_each_row_is_its_sample(self, rows, processor, encoder) -> None:
        batch = BaseVLMDataCollator(processor, GEMMA)(rows)
        pad_id = processor.tokenizer.pad_token_id
        longest = batch["input_ids"].shape[1]
        for index, row in enumerate(rows):
            encoded = encoder(Sample.from_row(row))
            n = len(encoded.input_ids)
            assert batch["input_ids"][index].tolist() == encoded.input_ids + [pad_id] * (longest - n)
            assert batch["attention_mask"][index].tolist() == [1] * n + [0] * (longest - n)
            assert batch["token_type_ids"][index].tolist() == encoded.token_type_ids + [0] * (longest - n)
            labels = [t if s else IGNORE_INDEX for t, s in zip(encoded.input_ids, encoded.supervised, strict=True)]
            assert batch["labels"][index].tolist() == labels + [IGNORE_INDEX] * (longest - n)
        assert longest == batch["attention_mask"].sum(1).max()
        assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels", "pixel_values"}

    def test_images_in_the_order_of_their_places(self, rows, processor, encoder) -> None:
        batch = BaseVLMDataCollator(processor, GEMMA)(rows)
        expected = [encoder(Sample.from_row(row)).image_inputs for row in rows]
        pixels = torch.cat([torch.as_tensor(inputs["pixel_values"]) for inputs in expected if inputs])
        assert torch.equal(batch["pixel_values"], pixels)
        assert len(pixels) == 1 + 3 + 1 + 1
        assert torch.equal(pixels[1], pixels[3])
        assert not torch.equal(pixels[1], pixels[2])
        soft = sum((batch["input_ids"] == token).sum().item() for token in processor.image_token_ids)
        assert soft == batch["token_type_ids"].sum() == len(pixels) * processor.image_seq_length

    def test_texts_alone_have_no_pixels(self, rows, processor) -> None:
        assert "pixel_values" not in BaseVLMDataCollator(processor, GEMMA)(rows[1:2])

    def test_multiple(self, rows, processor) -> None:
        plain = BaseVLMDataCollator(processor, GEMMA)(rows)["input_ids"].shape[1]
        assert plain % 64
        batch = BaseVLMDataCollator(processor, GEMMA, pad_to_multiple_of=64)(rows)
        assert batch["labels"].shape == batch["input_ids"].shape == (5, -(-plain // 64) * 64)

    def test_sample_ids_when_asked(self, rows, processor) -> None:
        batch = BaseVLMDataCollator(processor, GEMMA, return_sample_ids=True)(rows)
        assert batch["sample_ids"] == ["one", "none", "three", "again", "last"]

    def test_options_reach_the_encoder(self, rows, processor) -> None:
        with pytest.raises(TooLongError, match="'one'"):
            BaseVLMDataCollator(processor, GEMMA, max_length=5)(rows)
        with pytest.raises(ImageError, match=r"0\.jpg has .* more than max_pixels 10"):
            BaseVLMDataCollator(processor, GEMMA, max_pixels=10)(rows)

    def test_rows_of_another_form(self, processor) -> None:
        def sample(row) -> Sample:
            return Sample("x", (), (Message.make("user", row["q"]), Message.make("assistant", row["a"])))

        class Own(BaseVLMDataCollator):
            def format_conversation(self, row) -> Sample:
                return sample(row)

        given = [{"q": "What?", "a": "red"}]
        expected = BaseVLMDataCollator(processor, GEMMA)([sample(given[0]).to_row()])
        for collator in (Own(processor, GEMMA), BaseVLMDataCollator(processor, GEMMA, conversation_formatter=sample)):
            assert torch.equal(collator(given)["labels"], expected["labels"])

    def test_made_by_name(self, rows, processor) -> None:
        batch = create_data_collator(processor, model_type="gemma", pad_to_multiple_of=8)(rows)
        assert batch["input_ids"].shape[1] % 8 == 0
        with pytest.raises(UnsupportedModelError, match="gemma"):
            create_data_collator(processor, model_type="gema")

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_processor_of_another_family_is_refused(self, family, family_dir, processor) -> None:
        own = load_processor(family_dir(family))
        for name in (family, *FAMILIES[family].aliases):
            assert create_data_collator(own, model_type=name).family is FAMILIES[family]
        if family != "gemma3":
            with pytest.raises(ConfigError, match=rf"='gemma' .*this is a {type(own).__name__}, of .*{family}"):
                create_data_collator(own)
            with pytest.raises(ConfigError, match=rf"{family}.*this is a Gemma3Processor, of gemma3\."):
                create_data_collator(processor, model_type=family)
        with pytest.raises(ConfigError, match="this is a object, which is of no known family"):
            create_data_collator(object(), model_type=family)

    def test_a_model_takes_it(self, rows, processor, tiny_model) -> None:
        assert tiny_model(**BaseVLMDataCollator(processor, GEMMA)(rows)).loss.isfinite()


class TestPad:
    """Padding on either side."""

    def test_left(self, rows, encoder) -> None:
        samples = [encoder(Sample.from_row(row), pixels=False) for row in rows[:2]]
        batch = pad(samples, pad_token_id=9, side="left", token_type_ids=False)
        longest = max(len(sample.input_ids) for sample in samples)
        for index, sample in enumerate(samples):
            empty = longest - len(sample.input_ids)
            assert batch["input_ids"][index].tolist() == [9] * empty + sample.input_ids
            assert batch["attention_mask"][index].tolist() == [0] * empty + [1] * len(sample.input_ids)
        assert "token_type_ids" not in batch


class TestShared:
    """The batch that computes an image once."""

    def test_an_image_is_decoded_and_given_once(self, rows, processor, encoder, decoded) -> None:
        batch = SharedImageCollator(processor, GEMMA)(rows)
        assert decoded == {"0.jpg": 1, "1.jpg": 2, "2.jpg": 1}
        assert len(batch["pixel_values"]) == 4
        assert "labels" not in batch
        assert "attention_mask" not in batch

    def test_images_in_the_order_of_their_rows(self, rows, processor, encoder) -> None:
        """The longest group comes first, whatever the order given; its images too."""
        batch = SharedImageCollator(processor, GEMMA)(rows)
        by_id = {row["id"]: encoder(Sample.from_row(row)).image_inputs for row in rows}
        order = [name for name in batch["sample_ids"] if name in ("one", "three")]
        pixels = torch.cat([torch.as_tensor(by_id[name]["pixel_values"]) for name in order])
        assert torch.equal(batch["pixel_values"], pixels)
        assert sorted(batch["sample_ids"]) == sorted(row["id"] for row in rows)
        soft = batch["token_type_ids"].sum()
        assert soft == len(pixels) * processor.image_seq_length

    def test_as_many_targets_as_supervised_tokens(self, rows, processor, encoder) -> None:
        batch = SharedImageCollator(processor, GEMMA)(rows)
        supervised = [encoder(Sample.from_row(row), pixels=False) for row in rows]
        assert batch["target_weights"].sum() == sum(sample.n_supervised for sample in supervised)
        expected = Counter(t for s in supervised for t, f in zip(s.input_ids, s.supervised, strict=True) if f)
        found: Counter[int] = Counter()
        for token, weight in zip(batch["target_ids"].tolist(), batch["target_weights"].tolist(), strict=True):
            found[token] += int(weight)
        assert found == expected

    def test_a_token_learned_twice_at_one_place_counts_twice(self, rows, processor) -> None:
        one = SharedImageCollator(processor, GEMMA)(rows[:1])
        two = SharedImageCollator(processor, GEMMA)([rows[0], rows[0] | {"id": "copy"}])
        assert torch.equal(two["input_ids"], one["input_ids"])
        assert torch.equal(two["target_ids"], one["target_ids"])
        assert torch.equal(two["target_weights"], 2 * one["target_weights"])

    def test_without_keys_each_sample_is_alone(self, rows, processor) -> None:
        plain = [{name: value for name, value in row.items() if name != "image_key"} for row in rows]
        batch = SharedImageCollator(processor, GEMMA)(plain)
        assert len(batch["pixel_values"]) == 6

    def test_most_texts(self, rows, processor) -> None:
        assert len(SharedImageCollator(processor, GEMMA, max_texts_per_row=2)(rows)["pixel_values"]) == 5
        assert len(SharedImageCollator(processor, GEMMA, max_tokens_per_row=1)(rows)["pixel_values"]) == 6

    def test_features_from_the_cache(self, rows, processor, image_folder, tmp_path, make_sample) -> None:
        cache = FeatureCache(tmp_path / "cache", {"family": "gemma3"})
        for number in range(3):
            cache.put(f"k{number}", torch.full((4, 8), float(number)))
        shutil.copytree(image_folder, tmp_path / "images")
        collator = SharedImageCollator(processor, GEMMA, cache=cache)
        batch = collator(rows)
        assert "pixel_values" not in batch
        order = [name for name in batch["sample_ids"] if name in ("one", "three")]
        expected = [0.0, 1.0, 2.0, 1.0] if order == ["one", "three"] else [1.0, 2.0, 1.0, 0.0]
        assert batch["image_features"][:, 0, 0].tolist() == expected
        # One that is absent: all are computed.
        unknown = make_sample("new", [5], [("What?", "red")]).to_row() | {"image_key": "k5"}
        batch = collator([*rows, unknown])
        assert "image_features" not in batch
        assert len(batch["pixel_values"]) == 5

    def test_cached_images_are_not_opened(self, rows, processor, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(encode, "decode", lambda *args, **options: 1 / 0)
        cache = FeatureCache(tmp_path, {"family": "gemma3"})
        for number in range(3):
            cache.put(f"k{number}", torch.zeros(4, 8))
        assert len(SharedImageCollator(processor, GEMMA, cache=cache)(rows)["image_features"]) == 4

    def test_texts_alone(self, rows, processor) -> None:
        batch = SharedImageCollator(processor, GEMMA)(rows[1:2])
        assert "pixel_values" not in batch
        assert "image_features" not in batch
