"""Adapters of other tools and other versions of transformers load exactly, or are refused by name (PITFALLS 2)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from training_stand_in import shift_trainable

from vlmtune.errors import AdapterError
from vlmtune.models.checkpoint import attach_adapter
from vlmtune.models.families import FAMILIES
from vlmtune.models.loading import load_model_for_training
from vlmtune.models.lora import linear_layers
from vlmtune.models.merge import merge_weights

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What module names were (huggingface/transformers, before 4.52 and from there to 4.57), the new name first.
LLAVA_BEFORE_452 = [
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head", "language_model.lm_head"),
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
    (r"^model\.multi_modal_projector", "multi_modal_projector"),
]
LLAVA_BEFORE_5 = [(r"^model\.vision_tower\.", "model.vision_tower.vision_model.")]
QWEN_BEFORE_452 = [(r"^model\.language_model\.", "model."), (r"^model\.visual", "visual")]
LAYOUTS = {
    ("gemma3", "4.50"): LLAVA_BEFORE_452,
    ("gemma3", "4.57"): LLAVA_BEFORE_5,
    ("llava", "4.50"): LLAVA_BEFORE_452,
    ("llava", "4.57"): LLAVA_BEFORE_5,
    ("llava_next", "4.50"): LLAVA_BEFORE_452,
    ("paligemma", "4.50"): LLAVA_BEFORE_452,
    ("paligemma", "4.57"): LLAVA_BEFORE_5,
    ("qwen2_vl", "4.50"): QWEN_BEFORE_452,
    ("qwen2_5_vl", "4.50"): QWEN_BEFORE_452,
    ("qwen3_vl", "4.57"): [],
    ("smolvlm", "4.50"): [],
    ("idefics3", "4.50"): [],
    ("internvl", "4.57"): [],
}
NAMES = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


def _old(name: str, layout: list[tuple[str, str]]) -> str:
    for new, old in layout:
        name, found = re.subn(new, old, name, count=1)
        if found:
            break
    return name


# How each tool says which layers it adapted: (family, whole names in the layout of the file) -> target_modules.
TOOLS = {
    "PEFT and TRL, ends of names": lambda place, names: sorted({name.rpartition(".")[2] for name in names}),
    "LLaMA-Factory, whole names": lambda place, names: sorted(names),
    "LLaMA-Factory, regex": lambda place, names: f"^(?!.*(?:visual|vision)).*(?:{NAMES}).*",
    "ms-swift, regex": lambda place, names: rf"^({re.escape(place)}(?=\.).*\.({NAMES}))$",
    "Unsloth, regex": lambda place, names: (
        rf"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?\.(?:{NAMES}))"
        rf"|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:{NAMES}))"
    ),
}


def _says_language_alone(family: str, tool: str) -> bool:
    """Ends of names adapt the tower too where it has layers of these names."""
    targets = FAMILIES[family].lora_targets
    return tool != "PEFT and TRL, ends of names" or set(targets["language"]).isdisjoint(targets["vision"])


CASES = [(*place, tool) for place in LAYOUTS for tool in TOOLS if _says_language_alone(place[0], tool)]


def _base(folder: Path) -> nn.Module:
    return load_model_for_training(folder, torch_dtype="float32").eval()


def _logits(model: nn.Module, pixels: bool = False) -> torch.Tensor:
    ids = torch.arange(300, 320)[None]
    more = {"token_type_ids": torch.zeros_like(ids)} if "Gemma" in type(model.get_base_model()).__name__ else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits


def _rewrite(folder: Path, layout: list[tuple[str, str]], **settings: object) -> None:
    """Give a saved adapter the names of another version of transformers, and a tool's settings."""
    prefix = "base_model.model."
    tensors = load_file(folder / WEIGHTS)
    renamed = {prefix + _old(name.removeprefix(prefix), layout): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / WEIGHTS, metadata={"format": "pt"})
    _settings(folder, **settings)


def _settings(folder: Path, **settings: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | settings))


class TestOtherTools:
    """The same logits as the model that was saved."""

    @pytest.mark.parametrize(("family", "version", "tool"), CASES)
    def test_language_adapters(self, family, version, tool, family_dir, tmp_path) -> None:
        folder, record, layout = family_dir(family), FAMILIES[family], LAYOUTS[family, version]
        place = record.parts["language"]
        base = _base(folder)
        names = linear_layers(base, place, record.lora_targets["language"])
        model = shift_trainable(get_peft_model(base, LoraConfig(r=2, lora_alpha=6, target_modules=sorted(names))))
        model.save_pretrained(tmp_path)
        old = [_old(name, layout) for name in names]
        targets = TOOLS[tool](_old(f"{place}.layers", layout).removesuffix(".layers"), old)
        _rewrite(tmp_path, layout, target_modules=targets)
        loaded = attach_adapter(_base(folder), tmp_path)
        assert torch.equal(_logits(loaded), _logits(model))

    @pytest.mark.parametrize(("family", "version"), LAYOUTS)
    def test_adapters_everywhere_by_the_ends_of_names(self, family, version, family_dir, tmp_path) -> None:
        """What ``target_modules=["q_proj", ...]`` adapts where the tower has layers of these names too."""
        folder, record, layout = family_dir(family), FAMILIES[family], LAYOUTS[family, version]
        ends = sorted({name for scope in ("language", "vision") for name in record.lora_targets[scope]})
        model = shift_trainable(get_peft_model(_base(folder), LoraConfig(r=2, target_modules=ends)))
        model.save_pretrained(tmp_path)
        _rewrite(tmp_path, layout)
        loaded = attach_adapter(_base(folder), tmp_path)
        own = dict(model.named_parameters())
        assert set(own) == {name for name, _ in loaded.named_parameters()}
        assert all(torch.equal(parameter, own[name]) for name, parameter in loaded.named_parameters())

    @pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
    def test_ranks_and_scales_in_old_names(self, family, family_dir, tmp_path) -> None:
        """A scale under a name that has moved must act all the same; PEFT passes over it without a word."""
        folder, layout = family_dir(family), LAYOUTS[family, "4.50"]
        layer = f"{FAMILIES[family].parts['language']}.layers.1"
        patterns = {
            "rank_pattern": {f"{layer}.self_attn.q_proj": 5},
            "alpha_pattern": {f"{layer}.self_attn.q_proj": 40},
        }
        config = LoraConfig(r=2, lora_alpha=4, target_modules=rf"{layer}\.self_attn\.(q_proj|v_proj)", **patterns)
        model = shift_trainable(get_peft_model(_base(folder), config))
        model.save_pretrained(tmp_path)
        old = _old(layer, layout)
        moved = {option: {_old(key, layout): value for key, value in p.items()} for option, p in patterns.items()}
        _rewrite(tmp_path, layout, target_modules=rf"{old}\.self_attn\.(q_proj|v_proj)", **moved)
        loaded = attach_adapter(_base(folder), tmp_path)
        assert torch.equal(_logits(loaded), _logits(model))
        _settings(tmp_path, alpha_pattern={"layers.9.self_attn.q_proj": 40})
        with pytest.raises(AdapterError, match=r"alpha_pattern for layers\.9\.self_attn\.q_proj, which is none of its"):
            attach_adapter(_base(folder), tmp_path)

    @pytest.mark.parametrize("family", ["llava", "paligemma", "qwen2_5_vl"])
    def test_modules_to_save_in_old_names(self, family, family_dir, tmp_path) -> None:
        folder, record, layout = family_dir(family), FAMILIES[family], LAYOUTS[family, "4.50"]
        projector = record.parts["projector"].rpartition(".")[2]
        targets = rf"{record.parts['language']}\..*\.(q_proj|v_proj)"
        model = _base(folder)
        model = shift_trainable(
            get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=[projector]))
        )
        model.save_pretrained(tmp_path)
        old = _old(record.parts["language"] + ".layers", layout)
        _rewrite(tmp_path, layout, target_modules=rf"{old}\..*\.(q_proj|v_proj)")
        loaded = attach_adapter(_base(folder), tmp_path)
        own = dict(model.named_parameters())
        assert all(torch.equal(parameter, own[name]) for name, parameter in loaded.named_parameters())
        assert any("modules_to_save" in name for name in own)

    def test_merging_in_old_names(self, family_dir, tmp_path) -> None:
        folder, layout = family_dir("llava"), LAYOUTS["llava", "4.50"]
        targets = r"model\.language_model\..*\.(q_proj|v_proj)"
        config = LoraConfig(r=2, target_modules=targets, modules_to_save=["multi_modal_projector"])
        model = shift_trainable(get_peft_model(_base(folder), config))
        model.save_pretrained(tmp_path / "adapter")
        _rewrite(tmp_path / "adapter", layout, target_modules=r"language_model\.model\..*\.(q_proj|v_proj)")
        (tmp_path / "merged").mkdir()
        merge_weights(folder, tmp_path / "adapter", tmp_path / "merged")
        merged, whole = dict(_base(tmp_path / "merged").named_parameters()), model.merge_and_unload()
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(merged[name], parameter, msg=name)

    def test_without_an_origin_nothing_is_known_of_the_base(self, family_dir, tmp_path) -> None:
        model = get_peft_model(_base(family_dir("llava")), LoraConfig(r=2, target_modules=["gate_proj"]))
        model.save_pretrained(tmp_path)
        assert torch.equal(_logits(attach_adapter(_base(family_dir("llava")), tmp_path)), _logits(model))

    def test_names_in_memory(self, family_dir, tmp_path) -> None:
        """As a state dict has them that was gathered from shards and saved by hand."""
        model = shift_trainable(
            get_peft_model(_base(family_dir("llava")), LoraConfig(r=2, target_modules=["gate_proj"]))
        )
        model.save_pretrained(tmp_path)
        dumped = {
            re.sub(r"(lora_[AB])\.", r"\1.default.", name): t for name, t in load_file(tmp_path / WEIGHTS).items()
        }
        save_file(dumped, tmp_path / WEIGHTS, metadata={"format": "pt"})
        assert torch.equal(_logits(attach_adapter(_base(family_dir("llava")), tmp_path)), _logits(model))

    def test_dora_rslora_and_biases(self, family_dir, tmp_path) -> None:
        folder = family_dir("llava")
        kind = {"use_dora": True, "use_rslora": True, "bias": "all"}
        targets = r"model\.vision_tower\.encoder\.layers\.0\..*\.(q_proj|fc1)"
        model = shift_trainable(get_peft_model(_base(folder), LoraConfig(r=3, target_modules=targets, **kind)))
        model.save_pretrained(tmp_path)
        old = targets.replace(r"model\.vision_tower", r"vision_tower\.vision_model")
        _rewrite(tmp_path, LLAVA_BEFORE_452, target_modules=old)
        loaded = attach_adapter(_base(folder), tmp_path)
        own = dict(model.named_parameters())
        assert all(torch.equal(parameter, own[name]) for name, parameter in loaded.named_parameters())


class TestRefused:
    """By name, with what to do."""

    @pytest.fixture
    def adapter(self, family_dir, tmp_path) -> Path:
        model = get_peft_model(_base(family_dir("llava")), LoraConfig(r=2, target_modules=["gate_proj", "up_proj"]))
        shift_trainable(model).save_pretrained(tmp_path)
        return tmp_path

    def test_of_another_family(self, adapter, family_dir) -> None:
        with pytest.raises(AdapterError, match=r"does not fit the model .*are missing and .*peft 0\."):
            attach_adapter(_base(family_dir("smolvlm")), adapter)

    def test_another_kind(self, family_dir, tmp_path) -> None:
        config = IA3Config(target_modules=["gate_proj"], feedforward_modules=["gate_proj"])
        get_peft_model(_base(family_dir("llava")), config).save_pretrained(tmp_path)
        with pytest.raises(AdapterError, match="is of the kind IA3; vlmtune takes LoRA"):
            attach_adapter(_base(family_dir("llava")), tmp_path)

    @pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
    def test_a_changed_base(self, start, family_dir, tmp_path) -> None:
        config = LoraConfig(r=2, target_modules=["gate_proj"], init_lora_weights=start)
        get_peft_model(_base(family_dir("llava")), config).save_pretrained(tmp_path)
        with pytest.raises(
            AdapterError, match=rf"'{start}', which changed .* path_initial_model_for_weight_conversion"
        ):
            attach_adapter(_base(family_dir("llava")), tmp_path)

    def test_a_whole_layer_is_missing(self, adapter, family_dir) -> None:
        tensors = load_file(adapter / WEIGHTS)
        kept = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}
        save_file(kept, adapter / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(
            AdapterError, match=r"2 tensors are missing and 0 are left over, such as .*layers\.1\.mlp\.up"
        ):
            attach_adapter(_base(family_dir("llava")), adapter)

    def test_embeddings_beside_the_adapter(self, adapter, family_dir) -> None:
        """TRL and PEFT save them once tokens were added; equal ones say nothing new."""
        tensors = load_file(adapter / WEIGHTS)
        key = "base_model.model.language_model.model.embed_tokens.weight"
        own = _base(family_dir("llava")).get_input_embeddings().weight.detach()
        save_file(tensors | {key: own.bfloat16()}, adapter / WEIGHTS, metadata={"format": "pt"})
        attach_adapter(_base(family_dir("llava")), adapter)
        for other in (own + 0.1, torch.cat([own, own[:2]])):
            save_file(tensors | {key: other}, adapter / WEIGHTS, metadata={"format": "pt"})
            with pytest.raises(
                AdapterError, match=r"holds language_model\.model\.embed_tokens\.weight, .*added tokens"
            ):
                attach_adapter(_base(family_dir("llava")), adapter)
