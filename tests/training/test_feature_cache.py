"""The cache of image features is filled once an image before training, and used where features cannot change."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from vlmtune.batching.encode import Encoder
from vlmtune.config import VLMDataArguments
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.errors import ConfigError
from vlmtune.models.families import FAMILIES
from vlmtune.models.features import CacheFullError, FeatureCache, features_key, image_features
from vlmtune.training.image_reuse import fill_feature_cache, open_feature_cache, try_fill, with_image_keys

GEMMA = FAMILIES["gemma3"]
KEY = {"family": "gemma3", "weights": "one"}


def shards(cache: FeatureCache) -> list[Path]:
    return sorted(cache.folder.glob("shard-*.safetensors"))


@pytest.fixture
def copied_images(image_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(image_folder, tmp_path / "images")
    # A second name of one image.
    shutil.copy(image_folder / "0.jpg", tmp_path / "images" / "again.jpg")
    return tmp_path / "images"


def rows_of(folder: Path, *groups: tuple[str, ...]) -> datasets.Dataset:
    rows = []
    for number, names in enumerate(groups):
        refs = tuple(ImageRef(str(folder / f"{name}.jpg")) for name in names)
        messages = (Message.make("user", "What?", images=len(refs)), Message.make("assistant", "red"))
        rows.append(Sample(str(number), refs, messages, ("red",)).to_row())
    return with_image_keys(datasets.Dataset.from_list(rows))


class TestFill:
    """The pass before training computes each image once."""

    @pytest.fixture
    def encoder(self, processor) -> Encoder:
        return Encoder(processor, GEMMA)

    @pytest.fixture
    def data(self, copied_images: Path) -> datasets.Dataset:
        return rows_of(copied_images, ("0",), ("0",), ("1", "2"), (), ("again",), ("2", "3"), ("4",))

    def test_counts(self, data, encoder, tiny_model, tmp_path) -> None:
        cache, shown = FeatureCache(tmp_path / "cache", KEY), []
        assert fill_feature_cache(cache, tiny_model, encoder, data, progress=lambda *n: shown.append(n)) == 5
        assert shown == [(5, 5)]
        assert sorted(cache._shards) == sorted({name for key in data["image_key"] for name in key.split()})
        again = FeatureCache(tmp_path / "cache", KEY)
        no_model = None
        assert fill_feature_cache(again, no_model, encoder, data) == 0
        assert len(shards(again)) == 1

    def test_values(self, data, encoder, tiny_model, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vlmtune.training.image_reuse.IMAGES_AT_ONCE", 2)
        cache = FeatureCache(tmp_path / "cache", KEY)
        fill_feature_cache(cache, tiny_model, encoder, data)
        for key, images in zip(data["image_key"], data["images"], strict=True):
            for name, image in zip(key.split(), images, strict=True):
                pixels = encoder.images(Sample("x", (ImageRef(**image),), ()))["pixel_values"]
                expected = image_features(tiny_model, {"pixel_values": pixels})[0]
                # Rows of other batches are summed in another order.
                torch.testing.assert_close(cache.get(name), expected, rtol=1e-5, atol=1e-5)
        values = [cache.get(name) for name in cache._shards]
        assert not any(torch.equal(one, other) for one in values for other in values if one is not other)

    @pytest.mark.parametrize("world", [2, 3, 7])
    def test_ranks_split_the_work(self, world, data, encoder, tiny_model, tmp_path) -> None:
        caches = [FeatureCache(tmp_path / "cache", KEY) for _ in range(world)]
        counts = [
            fill_feature_cache(cache, tiny_model, encoder, data, rank=rank, world_size=world)
            for rank, cache in enumerate(caches)
        ]
        assert sum(counts) == 5
        assert max(counts) - min(counts) <= 1
        assert sum(len(cache) for cache in caches) == 5
        assert len(FeatureCache(tmp_path / "cache", KEY)) == 5

    def test_room_for_all_is_asked_first(self, data, encoder, tiny_model, tmp_path) -> None:
        one = image_features(tiny_model, encoder.images(Sample("x", (ImageRef(**data[0]["images"][0]),), ())))[0]
        size = one.numel() * one.element_size()
        cache = FeatureCache(tmp_path / "cache", KEY, max_gb=4.5 * size / 1e9)
        with pytest.raises(CacheFullError):
            # A rank's share would fit, all of them do not.
            fill_feature_cache(cache, tiny_model, encoder, data, rank=0, world_size=5)
        assert not (tmp_path / "cache").exists()

    def test_a_changed_file_gets_new_features(self, encoder, tiny_model, copied_images, tmp_path) -> None:
        cache = FeatureCache(tmp_path / "cache", KEY)
        before = rows_of(copied_images, ("5",), ("6",))
        assert fill_feature_cache(cache, tiny_model, encoder, before) == 2
        Image.new("RGB", (40, 40), "red").save(copied_images / "5.jpg")
        after = rows_of(copied_images, ("5",), ("6",))
        assert after["image_key"][1] == before["image_key"][1]
        again = FeatureCache(tmp_path / "cache", KEY)
        assert fill_feature_cache(again, tiny_model, encoder, after) == 1
        old, new = (again.get(rows["image_key"][0]) for rows in (before, after))
        assert not torch.allclose(old, new)


class TestOpening:
    """The cache is used where features cannot change."""

    def arguments(self, tmp_path: Path, choice: str) -> VLMDataArguments:
        return VLMDataArguments(dataset_path="x", cache_image_features=choice, cache_dir=str(tmp_path))

    def test_frozen(self, tiny_model, processor, tmp_path) -> None:
        tiny_model.requires_grad_(False)
        tiny_model.model.language_model.requires_grad_(True)
        cache = open_feature_cache(tiny_model, GEMMA, processor, self.arguments(tmp_path, "on"))
        assert cache.key == features_key(tiny_model, GEMMA, processor, dtype=torch.float32)
        assert open_feature_cache(tiny_model, GEMMA, processor, self.arguments(tmp_path, "off")) is None

    @pytest.mark.parametrize("part", ["vision", "projector"])
    def test_trained(self, part, tiny_model, processor, tmp_path) -> None:
        tiny_model.requires_grad_(False)
        next(tiny_model.get_submodule(GEMMA.parts[part]).parameters()).requires_grad_(True)
        assert open_feature_cache(tiny_model, GEMMA, processor, self.arguments(tmp_path, "auto")) is None
        with pytest.raises(ConfigError, match=f"the {part} part is trained"):
            open_feature_cache(tiny_model, GEMMA, processor, self.arguments(tmp_path, "on"))

    @pytest.mark.parametrize("scopes", [["language"], ["language", "vision"]])
    def test_adapters(self, scopes, tiny_model, processor, tmp_path) -> None:
        from vlmtune.models.lora import setup_lora

        plain = features_key(tiny_model, GEMMA, processor, dtype=torch.float32)
        adapted = setup_lora(tiny_model, lora_r=2, lora_scopes=scopes)
        cache = open_feature_cache(adapted, GEMMA, processor, self.arguments(tmp_path, "auto"))
        if "vision" in scopes:
            assert cache is None
        else:
            assert cache.key == plain

    def test_auto_goes_on_and_on_stops(self, caplog) -> None:
        def fill() -> int:
            raise CacheFullError("full")

        caplog.set_level(logging.WARNING, "vlmtune.training")
        assert try_fill(fill, "auto") is False
        assert "computed in every step: full" in caplog.text
        with pytest.raises(CacheFullError):
            try_fill(fill, "on")
        assert try_fill(lambda: 3, "on") is True
