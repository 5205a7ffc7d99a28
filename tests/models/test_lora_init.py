"""Adapters that begin with the base's own weights: nothing changes at first, and what is saved is what was trained."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from training_stand_in import shift_trainable

from vlmtune.errors import AdapterError, ConfigError
from vlmtune.models.checkpoint import attach_adapter, load_adapter, save_model_and_processor
from vlmtune.models.loading import load_model_for_training
from vlmtune.models.lora import setup_lora
from vlmtune.models.quantization import get_quantization_config

KINDS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "own ranks": {
        "lora_scopes": ("language", "projector", "vision"),
        "vision_lora_r": 3,
        "vision_lora_alpha": 5,
        "use_rslora": True,
    },
}


def _base(folder: Path, bits: int = 16) -> nn.Module:
    quantization = get_quantization_config(use_4bit=bits == 4)
    return load_model_for_training(folder, torch_dtype="float32", quantization_config=quantization).eval()


def _logits(model: nn.Module) -> torch.Tensor:
    """In training mode: for evaluation, bitsandbytes packs weights anew on the CPU, which tiny ones cannot be."""
    ids = torch.arange(300, 320)[None]
    return model.train()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().detach()


@pytest.fixture(scope="module")
def folder(family_dir) -> Path:
    return family_dir("qwen2_5_vl")


@pytest.fixture(scope="module")
def processor_of(folder):
    from vlmtune.models.loading import load_processor

    return load_processor(folder)


class TestPissa:
    """The base's largest singular values, trained in the adapter, and saved as a change of the published base."""

    def test_begins_as_the_base_with_its_largest_values(self, folder) -> None:
        base, other = _base(folder), _base(folder)
        name = "model.language_model.layers.0.self_attn.q_proj"
        whole = other.get_submodule(name).weight.detach()
        model = setup_lora(base, lora_r=4, lora_alpha=8, lora_init="pissa", lora_dropout=0)
        torch.testing.assert_close(_logits(model), _logits(other), atol=1e-4, rtol=1e-4)
        layer = model.get_base_model().get_submodule(name)
        adapted = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(torch.linalg.svdvals(adapted)[:4], torch.linalg.svdvals(whole)[:4])
        torch.testing.assert_close(layer.get_base_layer().weight + adapted, whole)

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_saved_adapter_is_plain(self, kind, folder, processor_of, tmp_path) -> None:
        model = shift_trainable(
            setup_lora(_base(folder), lora_r=4, lora_init="pissa", lora_dropout=0, **KINDS[kind]), 0.02
        )
        save_model_and_processor(model, processor_of, tmp_path)
        settings = json.loads((tmp_path / "adapter_config.json").read_text())
        assert settings["init_lora_weights"] is True and settings["r"] == 8
        assert json.loads((tmp_path / "vlmtune_origin.json").read_text())["lora_init"] == "pissa"
        for loaded in (attach_adapter(_base(folder), tmp_path), PeftModel.from_pretrained(_base(folder), tmp_path)):
            torch.testing.assert_close(_logits(loaded), _logits(model), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(_logits(model), _logits(_base(folder)), atol=1e-2)

    def test_a_run_goes_on_from_it(self, folder, processor_of, tmp_path) -> None:
        model = shift_trainable(setup_lora(_base(folder), lora_r=4, lora_init="pissa", lora_dropout=0), 0.02)
        save_model_and_processor(model, processor_of, tmp_path / "a")
        again = setup_lora(_base(folder), lora_r=4, lora_init="pissa", lora_dropout=0)
        load_adapter(again, tmp_path / "a")
        own = dict(model.named_parameters())
        assert all(torch.equal(parameter, own[name]) for name, parameter in again.named_parameters())
        save_model_and_processor(again, processor_of, tmp_path / "b")
        first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_and_where_the_decomposition_turned_out_otherwise(self, folder, processor_of, tmp_path) -> None:
        """On other hardware a start may differ; base and adapter together must not."""
        model = shift_trainable(setup_lora(_base(folder), lora_r=4, lora_init="pissa", lora_dropout=0), 0.02)
        save_model_and_processor(model, processor_of, tmp_path)
        other = _base(folder)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if name.endswith("q_proj.weight"):
                    parameter *= 1.01
        again = setup_lora(other, lora_r=4, lora_init="pissa", lora_dropout=0)
        with torch.no_grad():  # what was read of the base is the same, its decomposition is not
            for name, module in again.get_base_model().named_modules():
                if name.endswith("q_proj") and hasattr(module, "lora_A"):
                    start = again._vlmtune_start
                    a, b = (start[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
                    whole = _base(folder).get_submodule(name).weight
                    module.get_base_layer().weight.copy_(whole - module.scaling["default"] * b @ a)
        load_adapter(again, tmp_path)
        torch.testing.assert_close(_logits(again), _logits(model), atol=1e-4, rtol=1e-4)

    def test_a_checkpoint_of_another_kind_of_run(self, folder, processor_of, tmp_path) -> None:
        save_model_and_processor(setup_lora(_base(folder), lora_r=4), processor_of, tmp_path)
        with pytest.raises(AdapterError, match="not written by a run with lora_init pissa"):
            load_adapter(setup_lora(_base(folder), lora_r=4, lora_init="pissa", lora_dropout=0), tmp_path)

    def test_a_rank_above_a_layers_size(self, folder) -> None:
        with pytest.raises(ConfigError, match=r"lora_init pissa takes no rank above the size of a layer.*rank 64"):
            setup_lora(_base(folder), lora_r=64, lora_init="pissa")

    def test_quantised_weights(self, folder) -> None:
        pytest.importorskip("bitsandbytes")
        with pytest.raises(ConfigError, match="pissa needs weights that are not quantised"):
            setup_lora(_base(folder, bits=4), lora_r=4, lora_init="pissa", lora_dropout=0)


class TestLoftq:
    """The adapter makes up for what quantising lost, with the unquantised weights read from the model's files."""

    @pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
    @pytest.mark.parametrize("rslora", [False, True])
    def test_begins_nearer_to_the_whole_model(self, family, rslora, family_dir) -> None:
        pytest.importorskip("bitsandbytes")
        folder = family_dir(family)
        whole = _logits(_base(folder))
        lost = (_logits(_base(folder, 4)) - whole).norm()
        model = setup_lora(_base(folder, 4), lora_r=16, lora_init="loftq", use_rslora=rslora, lora_dropout=0)
        assert (_logits(model) - whole).norm() < 0.7 * lost
        name = "model.language_model.layers.0.self_attn.q_proj"
        layer, weight = model.get_base_model().get_submodule(name), _base(folder).get_submodule(name).weight
        import bitsandbytes.functional as bnb

        packed = layer.get_base_layer().weight
        left = weight - bnb.dequantize_4bit(packed.data, packed.quant_state)
        scale = 32 / (math.sqrt(16) if rslora else 16)
        rest = left - scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        # No matrix of rank 16 comes nearer than the singular values it leaves out (Eckart and Young).
        torch.testing.assert_close(rest.norm(), torch.linalg.svdvals(left)[16:].norm(), rtol=1e-3, atol=1e-5)

    def test_comes_back_on_four_bits_alone(self, folder, processor_of, tmp_path) -> None:
        pytest.importorskip("bitsandbytes")
        model = shift_trainable(setup_lora(_base(folder, 4), lora_r=4, lora_init="loftq", lora_dropout=0), 0.02)
        save_model_and_processor(model, processor_of, tmp_path)
        assert torch.equal(_logits(attach_adapter(_base(folder, 4), tmp_path)), _logits(model))
        with pytest.raises(AdapterError, match=r"began with lora_init loftq.*in 4 bits \(use_4bit: true\)"):
            attach_adapter(_base(folder), tmp_path)

    def test_whole_weights(self, folder) -> None:
        with pytest.raises(ConfigError, match="loftq needs weights in 4 bits"):
            setup_lora(_base(folder), lora_r=4, lora_init="loftq", lora_dropout=0)


def test_an_unknown_start(folder) -> None:
    with pytest.raises(ConfigError, match="lora_init is 'magic'; it takes default, gaussian, pissa, loftq"):
        setup_lora(_base(folder), lora_init="magic")


def test_gaussian_changes_nothing_at_first(folder) -> None:
    model = setup_lora(_base(folder), lora_init="gaussian", lora_dropout=0)
    assert torch.equal(_logits(model), _logits(_base(folder)))
