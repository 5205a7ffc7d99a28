"""A model that cannot be used is refused with what to do about it; one that can is loaded whole (PITFALLS 18, 19)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from vlmtune.errors import AdapterError, ConfigError, ModelError, UnsupportedModelError
from vlmtune.models.checkpoint import save_model_and_processor
from vlmtune.models.families import FAMILIES
from vlmtune.models.loading import (
    load_config,
    load_model_for_inference,
    load_model_for_training,
    load_processor,
    require_dtype,
)
from vlmtune.models.lora import setup_lora

WEIGHTS = "model.safetensors"
SMALL = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@pytest.fixture
def model_copy(tiny_gemma3_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder, free to be damaged."""
    return Path(shutil.copytree(tiny_gemma3_dir, tmp_path / "copy"))


def _change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


class TestWhole:
    """A good folder gives the model it holds."""

    def test_training_model_has_the_tensors_on_disk(self, tiny_gemma3_dir, tiny_model) -> None:
        model = load_model_for_training(tiny_gemma3_dir, torch_dtype="float32")
        assert type(model).__name__ == "Gemma3ForConditionalGeneration"
        expected = tiny_model.state_dict()
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert model.config.get_text_config().use_cache is False
        assert model.config._attn_implementation == "sdpa"

    @pytest.mark.parametrize("name", ["bfloat16", "bf16", "torch.float32", torch.bfloat16])
    def test_number_format(self, name, tiny_gemma3_dir) -> None:
        wanted = torch.float32 if "32" in str(name) else torch.bfloat16
        model = load_model_for_training(tiny_gemma3_dir, torch_dtype=name)
        assert {parameter.dtype for parameter in model.parameters()} == {wanted}

    def test_attention_code_is_chosen(self, tiny_gemma3_dir) -> None:
        model = load_model_for_training(tiny_gemma3_dir, attn_implementation="eager")
        assert model.config._attn_implementation == "eager"

    def test_inference_model_generates(self, tiny_gemma3_dir) -> None:
        model, processor = load_model_for_inference(tiny_gemma3_dir, torch_dtype="float32", device="cpu")
        assert not model.training
        assert model.config.get_text_config().use_cache is True
        inputs = processor(text="What color is red?", return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert generated.shape[1] == inputs["input_ids"].shape[1] + 3

    def test_home_directory_is_expanded(self, tiny_gemma3_dir, monkeypatch) -> None:
        monkeypatch.setenv("HOME", str(tiny_gemma3_dir.parent))
        name = f"~/{tiny_gemma3_dir.name}"
        assert load_config(name).model_type == "gemma3"
        assert load_processor(name).chat_template
        assert load_model_for_training(name).name_or_path == str(tiny_gemma3_dir)

    def test_sharded_weights(self, tiny_model, processor, tmp_path) -> None:
        tiny_model.save_pretrained(tmp_path, max_shard_size="200KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        loaded = load_model_for_training(tmp_path, torch_dtype="float32").state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in tiny_model.state_dict().items())


class TestNoModel:
    """There is no model under that name."""

    @pytest.mark.parametrize("load", [load_config, load_model_for_training, load_model_for_inference])
    @pytest.mark.parametrize("name", ["/no/such/model", "./no_such_model", "no/such/model"])
    def test_no_such_folder(self, name, load) -> None:
        with pytest.raises(ModelError, match=rf"There is no model at {name}.*model_name_or_path.*Hub"):
            load(name)

    def test_hub_name_offline_says_what_to_do(self) -> None:
        with pytest.raises(ModelError, match="no model google/gemma-none") as caught:
            load_model_for_training("google/gemma-none")
        for way_out in ("Check the name", "hf auth login", "offline, name a folder"):
            assert way_out in str(caught.value)

    def test_folder_without_config(self, tmp_path) -> None:
        with pytest.raises(ModelError, match=r"holds no model: it has no config.json"):
            load_config(tmp_path)

    def test_an_adapter_named_as_the_model(self, tmp_path) -> None:
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(ModelError, match=r"no config.json.*It is an adapter; name its base model"):
            load_model_for_training(tmp_path)

    @pytest.mark.parametrize("text", ["{not json", "{}", '{"model_type": "no_such_type"}'])
    def test_unreadable_config(self, text, tmp_path) -> None:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"The configuration of .* cannot be read"):
            load_config(tmp_path)


class TestTextOnly:
    """A language model is refused before its weights are read."""

    @pytest.mark.parametrize(
        ("model_class", "config_class"), [(LlamaForCausalLM, LlamaConfig), (Gemma3ForCausalLM, Gemma3TextConfig)]
    )
    def test_saved_text_model(self, model_class, config_class, tmp_path) -> None:
        model_class(config_class(**SMALL)).save_pretrained(tmp_path)
        with pytest.raises(UnsupportedModelError, match=rf"{tmp_path}.*takes text only.*no vision tower.*gemma3"):
            load_model_for_training(tmp_path)


class TestWeights:
    """Tensors that are absent are never made up."""

    @pytest.mark.parametrize("absent", ["vision_tower", "language_model.*layers.1", "multi_modal_projector"])
    def test_missing_tensor(self, absent, model_copy) -> None:
        removed = []

        def change(tensors) -> None:
            removed.append(next(name for name in tensors if re.search(absent, name)))
            del tensors[removed[0]]

        _change_weights(model_copy, change)
        with pytest.raises(ModelError, match=rf"lacks 1 of the tensors.*{absent}.*Download or copy the model again"):
            load_model_for_training(model_copy)

    def test_tensor_of_another_shape(self, model_copy) -> None:
        def change(tensors) -> None:
            name = next(name for name in tensors if name.endswith("q_proj.weight"))
            tensors[name] = tensors[name][:-1].clone()

        _change_weights(model_copy, change)
        with pytest.raises(ModelError, match="cannot be loaded"):
            load_model_for_training(model_copy)

    @pytest.mark.parametrize("attention", ["flash_attention_2", "nonsense"])
    def test_attention_code_that_is_not_there(self, attention, model_copy) -> None:
        with pytest.raises(ConfigError, match=rf"attn_implementation {attention} cannot be used"):
            load_model_for_training(model_copy, attn_implementation=attention)

    def test_cut_off_file(self, model_copy) -> None:
        content = (model_copy / WEIGHTS).read_bytes()
        (model_copy / WEIGHTS).write_bytes(content[: len(content) // 2])
        with pytest.raises(ModelError, match=r"The weights of .* cannot be loaded.*whole"):
            load_model_for_training(model_copy)

    def test_no_weights_and_pickled_weights(self, model_copy) -> None:
        tensors = load_file(model_copy / WEIGHTS)
        (model_copy / WEIGHTS).unlink()
        with pytest.raises(ModelError, match="safetensors"):
            load_model_for_training(model_copy)
        torch.save(tensors, model_copy / "pytorch_model.bin")
        with pytest.raises(ModelError, match="safetensors"):
            load_model_for_training(model_copy)


class TestProcessor:
    """Tokenizer, image processor and chat template are all needed."""

    def test_absent(self, model_copy) -> None:
        for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (model_copy / name).unlink()
        with pytest.raises(ModelError, match=r"processor of .* cannot be loaded.*copy them from the original model"):
            load_processor(model_copy)

    def test_tokenizer_beside_the_model(self, model_copy) -> None:
        (model_copy / "processor_config.json").unlink()
        with pytest.raises(ModelError, match=r"processor of .* cannot be loaded.*preprocessor_config.json"):
            load_processor(model_copy)

    def test_tokenizer_only(self, processor, tmp_path) -> None:
        processor.tokenizer.save_pretrained(tmp_path)
        file = tmp_path / "tokenizer_config.json"
        config = json.loads(file.read_text())
        del config["processor_class"]
        file.write_text(json.dumps(config))
        with pytest.raises(ModelError, match=r"tokenizer but no image processor.*preprocessor_config.json"):
            load_processor(tmp_path)

    def test_no_chat_template(self, model_copy) -> None:
        (model_copy / "chat_template.jinja").unlink()
        with pytest.raises(ModelError, match=r"no chat template.*chat_template.jinja"):
            load_processor(model_copy)


class TestNumberFormat:
    """Gemma-3 in float16 overflows (PITFALLS 18)."""

    @pytest.mark.parametrize("name", ["float16", "fp16", "torch.float16", torch.float16])
    @pytest.mark.parametrize("load", [load_model_for_training, load_model_for_inference])
    def test_float16_is_refused(self, name, load, tiny_gemma3_dir) -> None:
        with pytest.raises(ConfigError, match=r"gemma3 cannot be used in float16: .*65,504.*bfloat16"):
            load(tiny_gemma3_dir, torch_dtype=name)

    def test_unknown_format(self, tiny_gemma3_dir) -> None:
        with pytest.raises(ConfigError, match=r"'bflot16' is unknown.*Did you mean 'bfloat16'"):
            load_model_for_training(tiny_gemma3_dir, torch_dtype="bflot16")

    def test_others_are_allowed(self) -> None:
        require_dtype(FAMILIES["gemma3"], torch.bfloat16)
        require_dtype(FAMILIES["gemma3"], torch.float32)


class TestInferenceWithAdapter:
    """Base model, adapter and processor find each other."""

    @pytest.fixture
    def adapter(self, tiny_gemma3_dir, processor, tmp_path) -> Path:
        model = setup_lora(load_model_for_training(tiny_gemma3_dir, torch_dtype="float32"), lora_r=2)
        save_model_and_processor(model, processor, tmp_path / "adapter")
        return tmp_path / "adapter"

    def test_base_and_adapter_named(self, adapter, tiny_gemma3_dir) -> None:
        model, _ = load_model_for_inference(tiny_gemma3_dir, adapter=adapter, device="cpu")
        assert "default" in model.peft_config
        assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)

    def test_processor_of_the_adapter_is_used(self, adapter, tiny_gemma3_dir) -> None:
        template = adapter / "chat_template.jinja"
        template.write_text(template.read_text() + "{# the adapter's own #}")
        _, own = load_model_for_inference(tiny_gemma3_dir, adapter=adapter, device="cpu")
        assert "the adapter's own" in own.chat_template
        (adapter / "processor_config.json").unlink()
        _, of_base = load_model_for_inference(tiny_gemma3_dir, adapter=adapter, device="cpu")
        assert "the adapter's own" not in of_base.chat_template

    def test_processor_comes_from_the_same_revision(self, tiny_gemma3_dir, monkeypatch) -> None:
        from vlmtune.models import loading

        asked = {}
        original = loading.load_processor
        monkeypatch.setattr(
            loading, "load_processor", lambda name, **options: asked.update(options) or original(name, **options)
        )
        load_model_for_inference(tiny_gemma3_dir, revision="v1", trust_remote_code=True, device="cpu")
        assert asked == {"revision": "v1", "trust_remote_code": True, "image_max_pixels": None}

    def test_adapter_twice_is_refused(self, adapter) -> None:
        with pytest.raises(AdapterError, match="is an adapter itself"):
            load_model_for_inference(adapter, adapter=adapter)

    def test_no_adapter_there(self, tiny_gemma3_dir, tmp_path) -> None:
        with pytest.raises(AdapterError, match=r"no adapter folder.*adapter_config.json"):
            load_model_for_inference(tiny_gemma3_dir, adapter=tmp_path)

    def test_base_folder_gone(self, adapter) -> None:
        file = adapter / "adapter_config.json"
        config = json.loads(file.read_text()) | {"base_model_name_or_path": "/moved/away"}
        file.write_text(json.dumps(config))
        with pytest.raises(AdapterError, match=r"trained on /moved/away, which is no longer there.*new place"):
            load_model_for_inference(adapter)
