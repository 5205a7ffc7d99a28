"""Cached features are those of exactly these weights and images; damage and a full disk are handled."""

from __future__ import annotations

import collections
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlmtune.models import features as features_module
from vlmtune.models.families import FAMILIES
from vlmtune.models.features import CacheFullError, FeatureCache, features_key, missing

GEMMA = FAMILIES["gemma3"]


KEY = {"family": "gemma3", "weights": "one"}


# A fresh interpreter would spend seconds on imports.
FORK = multiprocessing.get_context("fork")


def tensor(number: int, size: int = 8) -> torch.Tensor:
    return torch.full((2, size), float(number))


@pytest.fixture
def filled(tmp_path: Path) -> FeatureCache:
    cache = FeatureCache(tmp_path, KEY)
    for number in range(3):
        cache.put(f"image{number}", tensor(number))
    cache.flush()
    return cache


def shards(cache: FeatureCache) -> list[Path]:
    return sorted(cache.folder.glob("shard-*.safetensors"))


class TestRoundTrip:
    """What is put in comes out, in this process and the next."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_exact(self, dtype, tmp_path) -> None:
        cache = FeatureCache(tmp_path, KEY)
        value = torch.randn(4, 6).to(dtype)
        cache.put("a", value)
        assert torch.equal(cache.get("a"), value)
        cache.flush()
        for reader in (cache, FeatureCache(tmp_path, KEY)):
            assert "a" in reader
            assert len(reader) == 1
            assert reader.get("a").dtype == dtype
            assert torch.equal(reader.get("a"), value)

    def test_absent(self, filled) -> None:
        assert "image9" not in filled
        with pytest.raises(KeyError):
            filled.get("image9")
        assert missing(filled, ["b", "image0", "a", "b"]) == ["b", "a"]

    def test_what_is_put_is_a_copy(self, tmp_path) -> None:
        cache, value = FeatureCache(tmp_path, KEY), torch.ones(4, 3, requires_grad=True)
        cache.put("a", value[:2].T)
        with torch.no_grad():
            value.zero_()
        cache.flush()
        assert torch.equal(FeatureCache(tmp_path, KEY).get("a"), torch.ones(3, 2))

    def test_a_second_put_changes_nothing(self, filled) -> None:
        filled.put("image0", tensor(9))
        filled.flush()
        assert len(shards(filled)) == 1
        assert torch.equal(filled.get("image0"), tensor(0))

    def test_full_shards_are_written_at_once(self, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(features_module, "SHARD_BYTES", 100)
        cache = FeatureCache(tmp_path, KEY)
        for number in range(5):
            cache.put(str(number), tensor(number))
        assert [len(FeatureCache(tmp_path, KEY)), len(shards(cache))] == [4, 2]
        cache.flush()
        assert len(shards(cache)) == 3
        assert all(torch.equal(cache.get(str(number)), tensor(number)) for number in range(5))

    def test_an_empty_cache_leaves_no_folder(self, tmp_path) -> None:
        FeatureCache(tmp_path / "root", KEY).flush()
        assert not (tmp_path / "root").exists()

    def test_the_folder_says_whose_it_is(self, filled) -> None:
        assert json.loads((filled.folder / "key.json").read_text()) == KEY

    def test_travels_to_workers(self, filled) -> None:
        filled.get("image0")
        filled.put("pending", tensor(7))
        copied = pickle.loads(pickle.dumps(filled))
        assert torch.equal(copied.get("image1"), tensor(1))
        assert torch.equal(copied.get("pending"), tensor(7))
        with FORK.Pool(1) as pool:
            assert pool.apply(_sum_of, (filled, "image2")) == 32


def _sum_of(cache: FeatureCache, name: str) -> float:
    return float(cache.get(name).sum())


class TestKey:
    """Other weights, settings or formats get another folder."""

    def make(self, model, processor, dtype=torch.float32) -> dict[str, str]:
        return features_key(model, GEMMA, processor, dtype=dtype)

    def test_same_again(self, tiny_model, processor) -> None:
        key = self.make(tiny_model, processor)
        assert key == self.make(tiny_model, processor)
        with torch.no_grad():
            tiny_model.model.language_model.layers[0].mlp.up_proj.weight += 1
        assert self.make(tiny_model, processor) == key

    @pytest.mark.parametrize("place", ["model.vision_tower", "model.multi_modal_projector"])
    def test_one_weight(self, place, tiny_model, processor) -> None:
        for name, parameter in tiny_model.get_submodule(place).named_parameters():
            before = self.make(tiny_model, processor)
            with torch.no_grad():
                parameter.view(-1)[-1] += 1e-3
            after = self.make(tiny_model, processor)
            assert after["weights"] != before["weights"], name
            assert {**after, "weights": ""} == {**before, "weights": ""}

    def test_number_format(self, tiny_model, processor) -> None:
        one = self.make(tiny_model, processor)
        assert self.make(tiny_model, processor, torch.bfloat16) == one | {"dtype": "bfloat16"}
        assert self.make(tiny_model.bfloat16(), processor)["weights"] != one["weights"]

    def test_processor_settings(self, tiny_model, processor, tiny_gemma3_dir) -> None:
        from transformers import AutoProcessor

        other = AutoProcessor.from_pretrained(tiny_gemma3_dir)
        one = self.make(tiny_model, processor)
        assert self.make(tiny_model, other) == one
        other.image_processor.image_mean = [0.4, 0.5, 0.5]
        assert self.make(tiny_model, other)["processor"] != one["processor"]

    def test_folders_are_apart(self, filled, tmp_path) -> None:
        for change in ({"weights": "two"}, {"dtype": "bfloat16"}, {"family": "other"}):
            other = FeatureCache(tmp_path, KEY | change)
            assert len(other) == 0
            assert other.folder != filled.folder


class TestDamage:
    """A shard that is not whole, or not ours, is removed and named; nothing else is."""

    @pytest.mark.parametrize("size", [0, 4, 50, -1])
    def test_truncated(self, size, filled, tmp_path, caplog) -> None:
        filled.put("other", tensor(5))
        filled.flush()
        broken = filled._shards["image0"]
        broken.write_bytes(broken.read_bytes()[:size])
        caplog.set_level(logging.WARNING, "vlmtune.models")
        again = FeatureCache(tmp_path, KEY)
        assert missing(again, ["image0", "image1", "image2", "other"]) == ["image0", "image1", "image2"]
        assert not broken.exists()
        assert len(shards(again)) == 1
        assert broken.name in caplog.text
        again.put("image0", tensor(0))
        again.flush()
        assert torch.equal(FeatureCache(tmp_path, KEY).get("image0"), tensor(0))

    @pytest.mark.parametrize("metadata", [KEY | {"weights": "two"}, None])
    def test_of_other_weights(self, metadata, filled, tmp_path, caplog) -> None:
        stray = filled.folder / "shard-stray.safetensors"
        save_file({"stray": tensor(1)}, stray, metadata=metadata)
        caplog.set_level(logging.WARNING, "vlmtune.models")
        again = FeatureCache(tmp_path, KEY)
        assert "stray" not in again
        assert len(again) == 3
        assert not stray.exists()
        assert "shard-stray" in caplog.text
        assert "other weights" in caplog.text

    def test_one_that_cannot_be_opened_is_kept(self, filled, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args, **options):
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(features_module, "safe_open", refuse)
        assert len(FeatureCache(tmp_path, KEY)) == 0
        monkeypatch.undo()
        assert len(FeatureCache(tmp_path, KEY)) == 3

    def test_killed_in_mid_write(self, filled, tmp_path) -> None:
        """A process killed while it writes leaves no shard, and what it left is cleared away later."""
        process = FORK.Process(target=_die_in_mid_write, args=(str(tmp_path),))
        process.start()
        process.join(60)
        assert process.exitcode == 9
        left = list(filled.folder.glob("*.tmp"))
        assert len(left) == 1
        again = FeatureCache(tmp_path, KEY)
        assert len(again) == 3
        assert len(shards(again)) == 1
        # It could be another writer's that lives.
        assert left[0].exists()
        week_ago = time.time() - 7 * 24 * 3600
        os.utime(left[0], (week_ago, week_ago))
        assert len(FeatureCache(tmp_path, KEY)) == 3
        assert not left[0].exists()


def _die_in_mid_write(root: str) -> None:
    def half(tensors, path, metadata=None):
        Path(path).write_bytes(b"\x10" * 40)
        os._exit(9)

    features_module.save_file = half
    cache = FeatureCache(root, KEY)
    cache.put("late", tensor(1))
    cache.flush()


class TestTwoWriters:
    """Writers at the same time lose nothing and mix nothing."""

    def test_interleaved(self, tmp_path) -> None:
        first, second = FeatureCache(tmp_path, KEY), FeatureCache(tmp_path, KEY)
        for number in range(6):
            (first, second)[number % 2].put(f"image{number}", tensor(number))
            if number % 3 == 2:
                first.flush()
                second.flush()
        # Both computed this one.
        first.put("both", tensor(8))
        second.put("both", tensor(8))
        first.flush()
        second.flush()
        again = FeatureCache(tmp_path, KEY)
        assert len(again) == 7
        assert all(torch.equal(again.get(f"image{number}"), tensor(number)) for number in range(6))
        assert torch.equal(again.get("both"), tensor(8))

    def test_two_processes(self, tmp_path) -> None:
        writers = [FORK.Process(target=_write_many, args=(str(tmp_path), first)) for first in (0, 10)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(60)
        assert [writer.exitcode for writer in writers] == [0, 0]
        again = FeatureCache(tmp_path, KEY)
        assert len(again) == 30
        assert all(torch.equal(again.get(str(number)), tensor(number)) for number in range(30))
        assert not list(again.folder.glob("*.tmp"))


def _write_many(root: str, first: int) -> None:
    cache = FeatureCache(root, KEY)
    for number in range(first, first + 20):
        cache.put(str(number), tensor(number))
        cache.flush()
        FeatureCache(root, KEY)


class TestRoom:
    """The limit and the disk are respected, and the message says what to do."""

    def test_limit_counts_all_caches(self, filled, tmp_path) -> None:
        used = sum(path.stat().st_size for path in shards(filled))
        other = FeatureCache(tmp_path, KEY | {"weights": "two"}, max_gb=(used + 100) / 1e9)
        other.put("a", tensor(1))
        other.flush()
        other.put("b", tensor(1))
        with pytest.raises(CacheFullError, match=r"Raise cache_max_gb, delete folders.* or set cache_image_features"):
            other.flush()
        assert len(FeatureCache(tmp_path, KEY | {"weights": "two"})) == 1

    def test_disk_without_room(self, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = collections.namedtuple("usage", "total used free")
        free = features_module.RESERVE_BYTES + 63
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, free))
        cache = FeatureCache(tmp_path / "not" / "yet", KEY)
        cache.check_room(63)
        cache.put("a", tensor(1))
        with pytest.raises(CacheFullError, match=r"GB free. Name another folder with cache_dir or set cache_image"):
            cache.flush()
        assert not (tmp_path / "not").exists()

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), features_module.SafetensorError("I/O")])
    def test_disk_full_while_writing(self, error, filled, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(tensors, path, metadata=None):
            Path(path).write_bytes(b"half")
            raise error

        monkeypatch.setattr(features_module, "save_file", fail)
        filled.put("late", tensor(1))
        with pytest.raises(CacheFullError, match="Free disk space, name another folder with cache_dir, or set"):
            filled.flush()
        assert not list(filled.folder.glob("*.tmp"))
        assert len(FeatureCache(tmp_path, KEY)) == 3

    def test_folder_that_cannot_be_made(self, tmp_path) -> None:
        (tmp_path / "root").write_text("a file where the folder should be")
        cache = FeatureCache(tmp_path / "root", KEY)
        cache.put("a", tensor(1))
        with pytest.raises(CacheFullError, match="could not be written"):
            cache.flush()
