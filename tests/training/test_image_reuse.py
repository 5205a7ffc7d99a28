"""What goes wrong around shared images and kept features is said clearly, and nothing wrong is trained."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from vlmtune.batching.encode import Encoder
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.errors import ConfigError, ImageError, ModelError
from vlmtune.models import features as features_module
from vlmtune.models.families import FAMILIES
from vlmtune.models.features import FeatureCache
from vlmtune.training import run as run_module
from vlmtune.training.image_reuse import check_row_limits, fill_feature_cache, with_image_keys
from vlmtune.training.run import run_training

GEMMA = FAMILIES["gemma3"]
KEY = {"family": "gemma3", "weights": "one"}


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    for name in ("vlmtune.training", "vlmtune.models"):
        caplog.set_level(logging.INFO, name)
    return caplog


@pytest.fixture
def own_images(caption_folder: Path, tmp_path: Path) -> Path:
    """A copy of the captions and images, free to be changed."""
    return Path(shutil.copytree(caption_folder, tmp_path / "data"))


def first_loss(folder: Path) -> float:
    return json.loads((folder / "log.jsonl").read_text().splitlines()[0])["loss"]


def shards(root: Path) -> list[Path]:
    return sorted(root.glob("*/shard-*.safetensors"))


class TestCacheOfAnotherState:
    """A cache by other weights, a damaged one, and images that changed are found and computed anew."""

    def test_other_weights(self, run_arguments, made_trainers, tiny_model, processor, tmp_path: Path) -> None:
        """A tower with other weights takes nothing from the first one's cache."""
        options = {"cache_dir": str(tmp_path / "features"), "max_steps": 1}
        run_training(*run_arguments(tmp_path / "one", **options))
        with torch.no_grad():
            for parameter in tiny_model.model.vision_tower.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        tiny_model.save_pretrained(tmp_path / "other")
        processor.save_pretrained(tmp_path / "other")
        options |= {"model_name_or_path": str(tmp_path / "other")}
        run_training(*run_arguments(tmp_path / "two", **options))
        run_training(*run_arguments(tmp_path / "computed", cache_image_features="off", **options))
        one, two, computed = (first_loss(tmp_path / name) for name in ("one", "two", "computed"))
        assert two == pytest.approx(computed, rel=1e-5)
        assert two != pytest.approx(one, rel=1e-4)
        folders = [trainer.data_collator.cache.folder for trainer in made_trainers[:2]]
        assert folders[0] != folders[1]
        assert len(shards(tmp_path / "features")) == 2

    def test_truncated_file(self, run_arguments, tmp_path: Path, messages) -> None:
        options = {"cache_dir": str(tmp_path / "features"), "max_steps": 1}
        run_training(*run_arguments(tmp_path / "one", **options))
        (broken,) = shards(tmp_path / "features")
        broken.write_bytes(broken.read_bytes()[:-20])
        messages.clear()
        run_training(*run_arguments(tmp_path / "two", **options))
        assert f"{broken} cannot be used" in messages.text
        assert "it will be computed again" in messages.text
        assert "computed the features of 4 images" in messages.text
        assert first_loss(tmp_path / "two") == pytest.approx(first_loss(tmp_path / "one"), rel=1e-6)

    @pytest.mark.parametrize("action", ["truncated", "deleted"])
    def test_damaged_while_in_use(self, action, tmp_path: Path) -> None:
        writer = FeatureCache(tmp_path, KEY)
        writer.put("image", torch.ones(2, 8))
        writer.flush()
        reader = FeatureCache(tmp_path, KEY)
        (path,) = shards(tmp_path)
        path.unlink() if action == "deleted" else path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(ModelError, match=rf"{path.name} can no longer be read .*Start the run again"):
            reader.get("image")
        assert len(FeatureCache(tmp_path, KEY)) == 0

    def test_changed_between_runs(self, own_images, run_arguments, tmp_path: Path, messages) -> None:
        options = {"dataset_path": str(own_images), "cache_dir": str(tmp_path / "features"), "max_steps": 1}
        run_training(*run_arguments(tmp_path / "one", **options))
        Image.new("RGB", (40, 40), "red").save(own_images / "Images" / "2.jpg")
        messages.clear()
        run_training(*run_arguments(tmp_path / "two", **options))
        run_training(*run_arguments(tmp_path / "computed", cache_image_features="off", **options))
        assert "computed the features of 1 images" in messages.text
        assert first_loss(tmp_path / "two") == pytest.approx(first_loss(tmp_path / "computed"), rel=1e-5)

    def test_changed_while_a_run_reads_it(self, image_folder, processor, tiny_model, tmp_path: Path) -> None:
        """Features of the new content are never kept under the old content's name."""
        folder = Path(shutil.copytree(image_folder, tmp_path / "images"))
        refs = [ImageRef(str(folder / f"{number}.jpg")) for number in range(3)]
        texts = (Message.make("user", "What?", images=1), Message.make("assistant", "red"))
        rows = [Sample(str(number), (ref,), texts).to_row() for number, ref in enumerate(refs)]
        data = with_image_keys(datasets.Dataset.from_list(rows))
        Image.new("RGB", (40, 40), "red").save(folder / "1.jpg")
        cache = FeatureCache(tmp_path / "cache", KEY)
        with pytest.raises(ImageError, match=r"1\.jpg.* has changed since the data was read"):
            fill_feature_cache(cache, tiny_model, Encoder(processor, GEMMA), data)
        assert len(cache) == 0
        assert not shards(tmp_path / "cache")


class TestFullDisk:
    """With auto the run goes on without the cache; with on it stops before it leaves anything."""

    @pytest.fixture(autouse=True)
    def full(self, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = collections.namedtuple("usage", "total used free")
        monkeypatch.setattr(features_module.shutil, "disk_usage", lambda path: usage(10**12, 10**12, 1000))

    def test_auto(self, run_arguments, made_trainers, tmp_path: Path, messages) -> None:
        run_training(*run_arguments(tmp_path / "run", cache_dir=str(tmp_path / "features"), max_steps=1))
        assert made_trainers[0].data_collator.cache is None
        assert "image features are computed in every step" in messages.text
        assert "GB free. Name another folder with cache_dir or set cache_image_features to off" in messages.text
        assert not shards(tmp_path / "features")

    def test_on(self, run_arguments, tmp_path: Path) -> None:
        options = {"cache_dir": str(tmp_path / "features"), "cache_image_features": "on"}
        with pytest.raises(ModelError, match=r"GB free\. Name another folder with cache_dir"):
            run_training(*run_arguments(tmp_path / "run", **options))
        assert not list((tmp_path / "run").iterdir())


class TestRowLimits:
    """``max_texts_per_row`` and ``max_tokens_per_row`` reach the rows, and say so."""

    def test_too_few_tokens_for_one_sample(self, run_arguments, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"max_tokens_per_row is 5, but the longest sample has \d+ tokens"):
            run_training(*run_arguments(tmp_path / "run", max_tokens_per_row=5))
        assert not list((tmp_path / "run").iterdir())

    @pytest.mark.parametrize("name", ["max_texts_per_row", "max_tokens_per_row"])
    def test_below_one_is_refused(self, name, run_arguments, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=f"{name} is 0; it must be at least 1"):
            run_arguments(tmp_path / "run", **{name: 0})

    @pytest.mark.parametrize("limit", [{"max_texts_per_row": 2}, {"max_tokens_per_row": 40}])
    def test_a_group_over_the_limit_is_split(self, limit, run_arguments, made_trainers, tmp_path, messages) -> None:
        options = {"max_steps": 1, "per_device_train_batch_size": 20, "cache_image_features": "off"}
        run_training(*run_arguments(tmp_path / "whole", **options))
        assert "texts than" not in messages.text
        run_training(*run_arguments(tmp_path / "split", **options, **limit))
        ((name, value),) = limit.items()
        assert f"4 of 4 images have more texts than {name} {value} allows in one row" in messages.text
        whole, split = made_trainers
        assert (whole.work.images, whole.work.samples, split.work.samples) == (4, 20, 20)
        assert split.work.images >= 8
        assert first_loss(tmp_path / "split") == pytest.approx(first_loss(tmp_path / "whole"), rel=1e-5)

    def test_options_arrive(self, run_arguments, made_trainers, tmp_path: Path) -> None:
        limits = {"max_texts_per_row": 3, "max_tokens_per_row": 90}
        run_training(*run_arguments(tmp_path / "run", max_steps=1, per_device_train_batch_size=8, **limits))
        collator, sampler = made_trainers[0].data_collator, made_trainers[0].train_sampler
        assert (collator.max_texts_per_row, collator.max_tokens_per_row, sampler.max_texts) == (3, 90, 3)

    def test_separate_rows_take_no_notice(self, run_arguments, made_trainers, tmp_path: Path) -> None:
        options = {"share_images": "off", "max_texts_per_row": 2, "max_tokens_per_row": 5, "max_steps": 1}
        run_training(*run_arguments(tmp_path / "run", **options))
        # Every text is a group of its own.
        assert len(made_trainers[0].train_sampler.starts) == 20 + 1

    def test_counts(self, messages) -> None:
        keys = ["a", "a", "b", "", "", "c", "c", "c"]
        lengths, soft = [10, 12, 30, 40, 40, 10, 10, 10], [8, 8, 8, 0, 0, 8, 8, 8]
        check_row_limits(keys, lengths, soft, max_texts=None, max_tokens=None)
        # Rows take 8 + 2 + 4, 8 + 22 and 8 + 2 + 2 + 2 tokens; texts alone are no group.
        check_row_limits(keys, lengths, soft, max_texts=3, max_tokens=40)
        assert not messages.records
        check_row_limits(keys, lengths, soft, max_texts=2, max_tokens=None)
        assert messages.messages[-1].startswith("1 of 3 images have more texts than max_texts_per_row 2 allows")
        check_row_limits(keys[:2], lengths[:2], soft[:2], max_texts=4, max_tokens=13)
        assert "1 of 1 images" in messages.messages[-1]
        assert "max_texts_per_row 4 and max_tokens_per_row 13" in messages.messages[-1]
        check_row_limits([], [], [], max_texts=1, max_tokens=1)


def test_sharing_asked_of_a_family_that_cannot(
    run_arguments, made_trainers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stops the run before anything is read, with the family's reason; auto trains separate rows."""
    reason = "its prompt attends to the question"
    cannot = dataclasses.replace(GEMMA, name="other", sharing=False, sharing_reason=reason, feature_cache=False)
    monkeypatch.setattr(run_module, "get_family", lambda model, model_type: cannot)
    with pytest.raises(ConfigError, match=rf"share_images is on, but other cannot .*: {reason}\. Set .* auto or off"):
        run_training(*run_arguments(tmp_path / "on", share_images="on"))
    assert not list((tmp_path / "on").iterdir())
    run_training(*run_arguments(tmp_path / "auto", max_steps=1))
    # Every text is a group of its own.
    assert len(made_trainers[0].train_sampler.starts) == 20 + 1
