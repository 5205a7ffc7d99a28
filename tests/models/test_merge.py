"""A merged checkpoint has the base's layout and the adapter's outputs; what cannot be merged is refused by name."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from allocator import peak
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from training_stand_in import shift_trainable

from vlmtune.batching.collator import create_data_collator
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.errors import AdapterError, ModelError
from vlmtune.models import merge as merge_module
from vlmtune.models.checkpoint import attach_adapter, save_model_and_processor, saved_quantization
from vlmtune.models.loading import load_model_for_training
from vlmtune.models.lora import setup_lora
from vlmtune.models.merge import checkpoint_folder, merge_weights, require_mergeable, round_as_quantised
from vlmtune.models.quantization import get_quantization_config

EVERYWHERE = ("language", "projector", "vision")
KINDS = {
    "plain": {"lora_scopes": EVERYWHERE},
    "rslora": {"use_rslora": True, "lora_r": 8},
    "dora": {"use_dora": True, "use_rslora": True, "lora_scopes": EVERYWHERE},
    "bias of adapted layers": {"lora_bias": "lora_only", "lora_scopes": ("vision",)},
    "every bias": {"lora_bias": "all", "lora_scopes": ("language", "vision")},
    "modules in full": {"modules_to_save": ["model.language_model.norm"]},
    "head and embedding, which are tied": {"modules_to_save": ["lm_head"]},
    "a part in full": {"lora_scopes": ("vision",), "train_parts": ("language",)},
    "own ranks": {"lora_scopes": EVERYWHERE, "vision_lora_r": 2, "vision_lora_alpha": 9},
    "pissa": {"lora_init": "pissa", "size": 0.02},
}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def batch(processor, image_folder):
    refs = (ImageRef(path=str(image_folder / "0.jpg")),)
    turns = (Message.make("user", "Describe this image.", images=1), Message.make("assistant", "a red circle"))
    batch = create_data_collator(processor)([Sample("a", refs, turns).to_row()])
    batch.pop("labels")
    return batch


def _base(folder: Path, **options) -> nn.Module:
    return load_model_for_training(folder, torch_dtype="float32", **options).eval()


def _logits(model: nn.Module, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def _adapter(base: Path, processor, folder: Path, *, size: float = 0.1, **options) -> Path:
    """A saved adapter with every trainable weight shifted, in place of training."""
    model = setup_lora(_base(base), **({"lora_r": 4} | options))
    shift_trainable(model, size)
    save_model_and_processor(model, processor, folder)
    return folder


def _merge(base: Path, adapter: Path, output: Path, **options):
    output.mkdir()
    return merge_weights(base, adapter, output, **options)


def _header(file: Path) -> bytes:
    raw = file.read_bytes()
    return raw[: 8 + int.from_bytes(raw[:8], "little")]


@pytest.fixture(scope="module")
def sharded(tiny_gemma3_dir, processor, tmp_path_factory) -> Path:
    """The tiny model in several files; treat as read-only."""
    folder = tmp_path_factory.mktemp("sharded")
    _base(tiny_gemma3_dir).save_pretrained(folder, max_shard_size="200KB")
    processor.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_merged_gives_what_the_adapter_gives(kind, sharded, processor, batch, tmp_path) -> None:
    adapter = _adapter(sharded, processor, tmp_path / "adapter", **KINDS[kind])
    found = _merge(sharded, adapter, tmp_path / "merged")
    adapted = _logits(attach_adapter(_base(sharded), adapter), batch)
    merged = _logits(_base(tmp_path / "merged"), batch)
    assert torch.allclose(merged, adapted, atol=1e-4)
    assert not torch.allclose(merged, _logits(_base(sharded), batch), atol=1e-2)
    # Layout: the same files, and in each the same names, shapes, formats and offsets.
    files = sorted(file.name for file in sharded.glob("*.safetensors*"))
    assert files == sorted(file.name for file in (tmp_path / "merged").glob("*.safetensors*"))
    changed = set()
    for name in files:
        if name.endswith("json"):
            assert (sharded / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
            continue
        assert _header(sharded / name) == _header(tmp_path / "merged" / name)
        old, new = load_file(sharded / name), load_file(tmp_path / "merged" / name)
        changed |= {key for key in old if not torch.equal(old[key], new[key])}
    assert changed == set(found.changed)
    assert (sharded / "config.json").read_bytes() == (tmp_path / "merged" / "config.json").read_bytes()


def test_tied_head_stays_tied(tiny_gemma3_dir, processor, tmp_path) -> None:
    _merge(tiny_gemma3_dir, _adapter(tiny_gemma3_dir, processor, tmp_path / "adapter"), tmp_path / "merged")
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "lm_head" in name]  # noqa: SIM118
    model = _base(tmp_path / "merged")
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_number_format_of_the_base_is_kept(tiny_model, processor, batch, tmp_path) -> None:
    tiny_model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    adapter = _adapter(tmp_path / "base", processor, tmp_path / "adapter")
    found = _merge(tmp_path / "base", adapter, tmp_path / "merged")
    assert found.dtype == torch.bfloat16
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}
    adapted, base = (
        _logits(m, batch) for m in (attach_adapter(_base(tmp_path / "base"), adapter), _base(tmp_path / "base"))
    )
    merged = _logits(_base(tmp_path / "merged"), batch)
    assert 0 < (merged - adapted).norm() < 0.1 * (adapted - base).norm()


class TestMemory:
    """Below twice the largest shard, beside the adapter."""

    def test_one_tensor_at_a_time(self, tmp_path, processor) -> None:
        from vlmtune.demo.build import Sizes, build_model

        sizes = Sizes(text_hidden=256, text_mlp=1024, text_layers=6, head_dim=64, vocab_size=2048,
                      layer_types=("full_attention",) * 6)  # fmt: skip
        model = build_model(processor, sizes)
        model.save_pretrained(tmp_path / "base", max_shard_size="6MB")
        adapter = _adapter(tmp_path / "base", processor, tmp_path / "adapter")
        shards = [file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors")]
        assert len(shards) > 3
        (tmp_path / "merged").mkdir()
        with torch.profiler.profile(profile_memory=True) as profile:
            merge_weights(tmp_path / "base", adapter, tmp_path / "merged")
        most = peak(profile)
        small = (adapter / "adapter_model.safetensors").stat().st_size
        assert 0 < most < 2 * max(shards) + small
        assert most < 0.7 * sum(shards)


class TestRefused:
    """Named before a file is written."""

    def test_a_head_of_its_own_where_the_base_has_one_tensor(self, tiny_gemma3_dir, processor, tmp_path) -> None:
        """As plain PEFT trains it; ours stay one tensor."""
        adapter = tmp_path / "adapter"
        config = LoraConfig(target_modules=r"model\.language_model\..*\.q_proj", modules_to_save=["lm_head"])
        get_peft_model(_base(tiny_gemma3_dir), config).save_pretrained(adapter)
        with pytest.raises(AdapterError, match=r"changes lm_head.weight, which in the base is one tensor with .*embed"):
            require_mergeable(tiny_gemma3_dir, adapter)

    @pytest.mark.parametrize(
        ("setting", "value", "words"),
        [
            ("init_lora_weights", "pissa", "which changed the weights of its base"),
            ("alora_invocation_tokens", [1], "alora_invocation_tokens: it acts on some tokens only"),
            ("trainable_token_indices", [3], "trainable_token_indices: it trains single rows"),
            ("layer_replication", [[0, 2]], "layer_replication: it repeats layers"),
        ],
    )
    def test_kinds(self, setting, value, words, tiny_gemma3_dir, processor, tmp_path) -> None:
        adapter = _adapter(tiny_gemma3_dir, processor, tmp_path / "adapter")
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
        with pytest.raises(AdapterError, match=words):
            require_mergeable(tiny_gemma3_dir, adapter)

    def test_another_kind_of_adapter(self, tiny_gemma3_dir, processor, tmp_path) -> None:
        adapter = _adapter(tiny_gemma3_dir, processor, tmp_path / "adapter")
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "IA3"}))
        with pytest.raises(AdapterError, match="IA3"):
            require_mergeable(tiny_gemma3_dir, adapter)

    def test_an_adapter_that_is_not_whole(self, tiny_gemma3_dir, processor, tmp_path) -> None:
        from safetensors.torch import save_file

        adapter = _adapter(tiny_gemma3_dir, processor, tmp_path / "adapter")
        tensors = load_file(adapter / "adapter_model.safetensors")
        tensors.popitem()
        save_file(tensors, adapter / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match="1 tensors are missing"):
            require_mergeable(tiny_gemma3_dir, adapter)

    def test_damaged_weights(self, tiny_gemma3_dir, processor, tmp_path) -> None:
        adapter = _adapter(tiny_gemma3_dir, processor, tmp_path / "adapter")
        base = Path(shutil.copytree(tiny_gemma3_dir, tmp_path / "base"))
        whole = (base / "model.safetensors").read_bytes()
        (base / "model.safetensors").write_bytes(whole[:-100])
        with pytest.raises(ModelError, match="no whole safetensors file"):
            require_mergeable(base, adapter)
        (base / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"lacks model.safetensors"):
            require_mergeable(base, adapter)

    def test_a_quantised_base(self, tiny_gemma3_dir, processor, tmp_path) -> None:
        adapter = _adapter(tiny_gemma3_dir, processor, tmp_path / "adapter")
        base = Path(shutil.copytree(tiny_gemma3_dir, tmp_path / "base"))
        config = json.loads((base / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (base / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match="is quantised itself"):
            require_mergeable(base, adapter)

    def test_values_beyond_the_number_format(self, tiny_model, processor, tmp_path) -> None:
        tiny_model.to(torch.float16).save_pretrained(tmp_path / "base")
        adapter = _adapter(tmp_path / "base", processor, tmp_path / "adapter", size=1000.0)
        with pytest.raises(AdapterError, match="infinite or no number in F16"):
            _merge(tmp_path / "base", adapter, tmp_path / "merged")

    def test_no_such_model(self) -> None:
        with pytest.raises(ModelError, match="no model"):
            checkpoint_folder("nobody/nothing-here")


@needs_bitsandbytes
class TestQuantised:
    """Onto the quantised weights unpacked, as bitsandbytes itself unpacks them."""

    @pytest.mark.parametrize("bits", [4, 8])
    def test_rounding_is_that_of_the_loaded_model(self, bits, tiny_gemma3_dir) -> None:
        import bitsandbytes.functional as bnb

        config = get_quantization_config(bits == 4, bits == 8, bnb_4bit_compute_dtype="float32")
        quantised = _base(tiny_gemma3_dir, quantization_config=config)
        layer = quantised.get_submodule("model.language_model.layers.1.mlp.down_proj")
        if bits == 4:
            expected = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        else:
            expected = layer.weight.data.float() * layer.weight.SCB[:, None] / 127
        plain = _base(tiny_gemma3_dir).get_submodule("model.language_model.layers.1.mlp.down_proj").weight.detach()
        rounded = round_as_quantised(plain, config)
        assert torch.allclose(rounded.float(), expected.float(), atol=1e-6)
        assert not torch.allclose(rounded.float(), plain, atol=1e-4)

    def test_equals_the_adapter_on_the_quantised_base(self, tiny_gemma3_dir, processor, batch, tmp_path) -> None:
        config = get_quantization_config(True, bnb_4bit_compute_dtype="float32")
        adapter = _adapter(tiny_gemma3_dir, processor, tmp_path / "adapter", lora_target_modules=["q_proj", "v_proj"])
        trained = _logits(attach_adapter(_base(tiny_gemma3_dir, quantization_config=config), adapter), batch)
        _merge(tiny_gemma3_dir, adapter, tmp_path / "unpacked", dequantise=config)
        _merge(tiny_gemma3_dir, adapter, tmp_path / "original")
        unpacked, original = (_logits(_base(tmp_path / name), batch) - trained for name in ("unpacked", "original"))
        # On some CPUs bitsandbytes computes in bfloat16.
        assert unpacked.norm() < 0.2 * original.norm()

    def test_quantisation_is_recorded(self, tiny_gemma3_dir, processor, tmp_path) -> None:
        config = get_quantization_config(True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype="float32")
        model = setup_lora(_base(tiny_gemma3_dir, quantization_config=config), lora_r=2)
        save_model_and_processor(model, processor, tmp_path / "quantised")
        found = saved_quantization(tmp_path / "quantised")
        assert found is not None and found["bnb_4bit_quant_type"] == "fp4"
        again = get_quantization_config(**found)
        assert again.bnb_4bit_compute_dtype == torch.float32
        plain = _adapter(tiny_gemma3_dir, processor, tmp_path / "plain")
        assert saved_quantization(plain) is None


def test_a_change_that_is_lost_is_found(tiny_gemma3_dir, processor, batch, tmp_path, monkeypatch) -> None:
    """The tests above can fail: a merge with a wrong scale differs visibly."""
    adapter = _adapter(tiny_gemma3_dir, processor, tmp_path / "adapter")
    right = merge_module._Plan._merge

    def wrong(self, layer, weight, place):
        return weight + 1.1 * (right(self, layer, weight, place) - weight)

    monkeypatch.setattr(merge_module._Plan, "_merge", wrong)
    _merge(tiny_gemma3_dir, adapter, tmp_path / "merged")
    adapted = _logits(attach_adapter(_base(tiny_gemma3_dir), adapter), batch)
    assert not torch.allclose(_logits(_base(tmp_path / "merged"), batch), adapted, atol=1e-4)
