"""Quantisation holds the language model's weights and nothing else, and QLoRA trains through it (PITFALLS 5, 7)."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from vlmtune.batching.collator import create_data_collator
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.errors import ConfigError, MissingDependencyError, ModelError
from vlmtune.models.checkpoint import attach_adapter, save_model_and_processor
from vlmtune.models.families import FAMILIES
from vlmtune.models.loading import load_model_for_training
from vlmtune.models.lora import setup_lora
from vlmtune.models.provenance import base_fingerprint
from vlmtune.models.quantization import (
    get_quantization_config,
    get_torch_dtype,
    quantised_modules,
    require_language_only,
    unquantised_modules,
)
from vlmtune.models.sizing import count_parameters

GEMMA = FAMILIES["gemma3"]
INSIDE = GEMMA.parts["language"] + "."
LAYERS = 4 * 7  # text layers x (q, k, v, o, gate, up, down)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture
def batch(processor, image_folder):
    """One row with two images and one of text only."""
    refs = tuple(ImageRef(path=str(image_folder / f"{number}.jpg")) for number in (0, 1))
    answer = Message.make("assistant", "a red circle")
    rows = [
        Sample("a", refs, (Message.make("user", "Describe this image.", images=2), answer)).to_row(),
        Sample("b", (), (Message.make("user", "What color is red?"), answer)).to_row(),
    ]
    return create_data_collator(processor)(rows)


def _load(folder, bits: int, **options):
    quantization = get_quantization_config(bits == 4, bits == 8, **options)
    return load_model_for_training(folder, torch_dtype="float32", quantization_config=quantization)


class TestOptions:
    """What is asked for is checked before anything is loaded."""

    def test_nothing_asked_for(self) -> None:
        assert get_quantization_config() is None
        assert get_quantization_config(False, False) is None

    def test_both(self) -> None:
        with pytest.raises(ConfigError, match=r"use_4bit and use_8bit are both on; choose one"):
            get_quantization_config(True, True)

    def test_unknown_type(self) -> None:
        with pytest.raises(ConfigError, match=r"'nf5' is unknown; use nf4 or fp4\. Did you mean 'nf4'"):
            get_quantization_config(True, bnb_4bit_quant_type="nf5")

    def test_unknown_compute_format(self) -> None:
        with pytest.raises(ConfigError, match="'int3' is unknown"):
            get_quantization_config(True, bnb_4bit_compute_dtype="int3")

    @pytest.mark.parametrize("option", ["use_4bit", "use_8bit"])
    def test_bitsandbytes_missing(self, option, monkeypatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
        )
        with pytest.raises(MissingDependencyError, match=rf"{option} needs.*pip install 'vlmtune\[quantization\]'"):
            get_quantization_config(**{option: True})
        assert get_quantization_config() is None

    @needs_bitsandbytes
    def test_options_arrive(self) -> None:
        config = get_quantization_config(
            True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype="bf16", bnb_4bit_use_double_quant=False
        )
        assert (config.load_in_4bit, config.load_in_8bit) == (True, False)
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("fp4", torch.bfloat16)
        assert config.bnb_4bit_use_double_quant is False
        assert get_quantization_config(use_8bit=True).load_in_8bit

    def test_names_of_number_formats(self, monkeypatch) -> None:
        assert get_torch_dtype("bf16") is get_torch_dtype("torch.bfloat16") is torch.bfloat16
        assert get_torch_dtype("fp16") is torch.float16
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert get_torch_dtype("auto") is get_torch_dtype(None) is torch.float32

    def test_names_left_out_are_modules_of_the_model(self, tiny_model) -> None:
        names = unquantised_modules(GEMMA, None)
        assert names == ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
        assert all(tiny_model.get_submodule(name) is not None for name in names)


@needs_bitsandbytes
class TestWhatIsQuantised:
    """Counted in the loaded model."""

    @pytest.mark.parametrize("bits", [4, 8])
    def test_language_layers_and_nothing_else(self, bits, tiny_gemma3_dir) -> None:
        model = _load(tiny_gemma3_dir, bits)
        names = quantised_modules(model)
        assert len(names) == LAYERS
        assert [name for name in names if not name.startswith(INSIDE)] == []
        kind = torch.uint8 if bits == 4 else torch.int8
        assert {model.get_submodule(name).weight.dtype for name in names} == {kind}
        others = {name: p.dtype for name, p in model.named_parameters() if name.removesuffix(".weight") not in names}
        assert set(others.values()) == {torch.float32}

    def test_without_the_list_the_check_would_object(self, tiny_gemma3_dir, monkeypatch) -> None:
        from vlmtune.models import loading

        # The short name, which transformers matches against the beginning of full names only.
        monkeypatch.setattr(loading, "unquantised_modules", lambda *_: ["vision_tower", "lm_head"])
        with pytest.raises(ModelError, match=r"modules outside the language model were quantised.*vision_tower"):
            _load(tiny_gemma3_dir, 4)

    def test_nothing_quantised_is_an_error(self, tiny_model) -> None:
        with pytest.raises(ModelError, match="no module was quantised"):
            require_language_only(tiny_model, GEMMA)

    def test_counts_are_those_of_the_whole_weights(self, tiny_gemma3_dir, tiny_model) -> None:
        quantised, whole = count_parameters(_load(tiny_gemma3_dir, 4)), count_parameters(tiny_model)
        assert {part: entry["total"] for part, entry in quantised.items()} == {
            part: entry["total"] for part, entry in whole.items()
        }
        assert quantised["language"]["bytes"] < whole["language"]["bytes"]
        assert quantised["vision"]["bytes"] == whole["vision"]["bytes"]

    def test_base_keeps_its_fingerprint(self, tiny_gemma3_dir, tiny_model) -> None:
        assert base_fingerprint(_load(tiny_gemma3_dir, 4)) == base_fingerprint(tiny_model)


@needs_bitsandbytes
class TestQLoRA:
    """Adapters learn on top of quantised weights."""

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_every_adapter_gets_a_gradient(self, bits, checkpointing, tiny_gemma3_dir, batch) -> None:
        model = setup_lora(_load(tiny_gemma3_dir, bits), lora_r=4, lora_scopes=("language", "projector", "vision"))
        adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A") and INSIDE in name]
        assert len(adapted) == LAYERS
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        batch = {name: value.to(model.device) for name, value in batch.items()}
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):  # lora_B starts at zero, so lora_A has no gradient in the first step
            optimizer.zero_grad()
            try:
                model(**batch).loss.backward()
            except (NotImplementedError, RuntimeError) as error:
                if bits == 8 and not torch.cuda.is_available():
                    pytest.skip(f"8-bit training does not run on this CPU: {error}")
                raise
            optimizer.step()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0, name
            else:
                assert parameter.grad is None and torch.equal(parameter, before[name]), name

    def test_adapter_trained_in_4_bits_goes_on_the_whole_model(
        self, tiny_gemma3_dir, processor, batch, tmp_path
    ) -> None:
        model = setup_lora(_load(tiny_gemma3_dir, 4), lora_r=4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        save_model_and_processor(model, processor, tmp_path)
        whole = load_model_for_training(tiny_gemma3_dir, torch_dtype="float32").eval()
        batch.pop("labels")
        with torch.no_grad():
            base = whole(**batch).logits
            adapted = attach_adapter(whole, tmp_path).eval()(**batch).logits
            quantised = model.eval()(**{name: v.to(model.device) for name, v in batch.items()}).logits.cpu()
        seen = batch["attention_mask"].bool()
        assert torch.isfinite(adapted).all()
        assert (adapted - base)[seen].norm() > 2 * (adapted - quantised)[seen].norm() > 0
