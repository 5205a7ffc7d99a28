"""What is saved comes back exactly, in another process too, and what does not fit is refused (PITFALLS 2, 3, 19)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from training_stand_in import shift_trainable

from vlmtune.batching.collator import create_data_collator
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.errors import AdapterError, ResumeError
from vlmtune.models.checkpoint import (
    ORIGIN_FILE,
    adapter_base,
    attach_adapter,
    is_adapter_dir,
    load_adapter,
    load_full_weights,
    save_model_and_processor,
)
from vlmtune.models.loading import load_model_for_inference, load_model_for_training, load_processor
from vlmtune.models.lora import prepare_full_finetuning, setup_lora
from vlmtune.models.provenance import base_fingerprint

ADAPTER_WEIGHTS = "adapter_model.safetensors"
EVERYWHERE = ("language", "projector", "vision")
# Run in a process of its own: load the folder, write its logits for the batch in batch.pt.
FRESH_PROCESS = """
import sys, torch
from vlmtune.models.loading import load_model_for_inference
torch.set_num_threads(int(sys.argv[3]))
model, _ = load_model_for_inference(sys.argv[1], torch_dtype="float32", device="cpu")
with torch.no_grad():
    torch.save(model(**torch.load(sys.argv[2])).logits, sys.argv[2] + ".logits")
"""


@pytest.fixture
def rows(image_folder):
    refs = tuple(ImageRef(path=str(image_folder / f"{number}.jpg")) for number in (0, 1))
    answer = Message.make("assistant", "a red circle")
    return [
        Sample("a", refs, (Message.make("user", "Describe this image.", images=2), answer)).to_row(),
        Sample("b", (), (Message.make("user", "What color is red?"), answer)).to_row(),
    ]


@pytest.fixture
def batch(processor, rows):
    batch = create_data_collator(processor)(rows)
    batch.pop("labels")
    return batch


def _base(folder: Path) -> nn.Module:
    return load_model_for_training(folder, torch_dtype="float32").eval()


def _logits(model: nn.Module, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def _change_file(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def trained(tiny_gemma3_dir, processor, tmp_path_factory) -> tuple[nn.Module, Path]:
    """An adapter on every part, changed and saved; treat both as read-only."""
    model = shift_trainable(setup_lora(_base(tiny_gemma3_dir), lora_r=4, lora_scopes=EVERYWHERE))
    folder = tmp_path_factory.mktemp("adapter")
    save_model_and_processor(model, processor, folder)
    return model, folder


@pytest.fixture
def adapter(trained, tmp_path) -> Path:
    """A copy of the adapter's folder, free to be damaged."""
    return Path(shutil.copytree(trained[1], tmp_path / "adapter"))


class TestAdapter:
    """Saved and loaded again."""

    def test_fresh_process_gives_the_same_logits(self, trained, batch, tiny_gemma3_dir, tmp_path) -> None:
        model, folder = trained
        torch.save(dict(batch), tmp_path / "batch.pt")
        threads = str(torch.get_num_threads())
        subprocess.run(
            [sys.executable, "-c", FRESH_PROCESS, str(folder), str(tmp_path / "batch.pt"), threads],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"},
            cwd=tmp_path,
            timeout=120,
        )
        own = _logits(model, batch)
        assert torch.equal(torch.load(tmp_path / "batch.pt.logits"), own)
        assert not torch.allclose(own, _logits(_base(tiny_gemma3_dir), batch), atol=1e-2)

    def test_every_kind_comes_back(self, tiny_gemma3_dir, processor, batch, tmp_path) -> None:
        kinds = (
            {"use_dora": True, "use_rslora": True, "lora_scopes": EVERYWHERE},
            {"lora_bias": "lora_only", "lora_scopes": ("vision",)},
            {"lora_bias": "all", "lora_scopes": ("language", "vision")},
            {"modules_to_save": ["model.language_model.norm"]},
        )
        base = _logits(_base(tiny_gemma3_dir), batch)
        for number, options in enumerate(kinds):
            model = shift_trainable(setup_lora(_base(tiny_gemma3_dir), lora_r=2, **options))
            save_model_and_processor(model, processor, tmp_path / str(number))
            loaded = attach_adapter(_base(tiny_gemma3_dir), tmp_path / str(number))
            assert torch.equal(_logits(loaded, batch), _logits(model, batch)), options
            assert not torch.allclose(_logits(loaded, batch), base, atol=1e-2), options

    def test_trainable_or_not(self, trained, tiny_gemma3_dir) -> None:
        model, folder = trained
        wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for trainable in (True, False):
            loaded = attach_adapter(_base(tiny_gemma3_dir), folder, trainable=trainable)
            found = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
            assert found == (wanted if trainable else set())

    def test_layout_of_an_earlier_transformers(self, tiny_gemma3_dir, processor, batch, tmp_path) -> None:
        model = shift_trainable(setup_lora(_base(tiny_gemma3_dir), lora_r=4))
        save_model_and_processor(model, processor, tmp_path)

        def rename(tensors) -> None:
            for name in list(tensors):
                old = name.replace("model.model.language_model.", "model.language_model.model.")
                assert old != name
                tensors[old] = tensors.pop(name)

        _change_file(tmp_path / ADAPTER_WEIGHTS, rename)
        loaded = attach_adapter(_base(tiny_gemma3_dir), tmp_path)
        assert torch.equal(_logits(loaded, batch), _logits(model, batch))

    def test_weights_go_into_a_model_that_is_adapted_already(self, trained, batch, tiny_gemma3_dir) -> None:
        model, folder = trained
        other = setup_lora(_base(tiny_gemma3_dir), lora_r=4, lora_scopes=EVERYWHERE)
        load_adapter(other, folder)
        assert torch.equal(_logits(other, batch), _logits(model, batch))

    def test_folder_holds_what_the_docs_say(self, trained, tiny_gemma3_dir, tiny_model) -> None:
        _, folder = trained
        names = {file.name for file in folder.iterdir()}
        assert {"adapter_config.json", ADAPTER_WEIGHTS, "tokenizer.json", "processor_config.json"} <= names
        assert {"chat_template.jinja", ORIGIN_FILE} <= names
        assert "model.safetensors" not in names
        origin = json.loads((folder / ORIGIN_FILE).read_text())
        assert origin["base_model"] == str(tiny_gemma3_dir)
        assert origin["base_fingerprint"] == base_fingerprint(tiny_model)
        assert {"transformers", "peft", "torch"} <= set(origin["versions"])
        assert is_adapter_dir(folder) and not is_adapter_dir(tiny_gemma3_dir)

    def test_from_its_folder_alone(self, trained, batch, rows) -> None:
        model, folder = trained
        loaded, processor = load_model_for_inference(folder, torch_dtype="float32", device="cpu")
        assert torch.equal(_logits(loaded, batch), _logits(model, batch))
        own = create_data_collator(processor)(rows)
        assert all(torch.equal(own[name], tensor) for name, tensor in batch.items())

    def test_base_model_moved(self, trained, batch, adapter, tiny_gemma3_dir, tmp_path) -> None:
        moved = shutil.copytree(tiny_gemma3_dir, tmp_path / "moved")
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "/gone/model"}))
        with pytest.raises(AdapterError, match=r"/gone/model, which is no longer there.*the adapter as adapter"):
            adapter_base(adapter)
        loaded, _ = load_model_for_inference(moved, adapter=adapter, torch_dtype="float32", device="cpu")
        assert torch.equal(_logits(loaded, batch), _logits(trained[0], batch))

    def test_base_is_named(self, trained, tiny_gemma3_dir) -> None:
        assert adapter_base(trained[1]) == str(tiny_gemma3_dir)

    @pytest.mark.parametrize("text", ["{}", '{"base_model_name_or_path": null}'])
    def test_base_is_not_named(self, text, adapter) -> None:
        (adapter / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterError, match="does not say which model"):
            adapter_base(adapter)

    def test_unreadable_settings(self, adapter, tiny_gemma3_dir) -> None:
        (adapter / "adapter_config.json").write_text("{cut off")
        with pytest.raises(AdapterError, match=r"adapter_config.json.*cannot be read"):
            adapter_base(adapter)
        with pytest.raises(AdapterError, match=r"adapter_config.json.*cannot be read"):
            attach_adapter(_base(tiny_gemma3_dir), adapter)


class TestAdapterThatDoesNotFit:
    """Refused, never half loaded."""

    def test_of_another_model(self, adapter, tiny_gemma3_dir) -> None:
        other = _base(tiny_gemma3_dir)
        with torch.no_grad():
            other.get_input_embeddings().weight.add_(0.5)
        with pytest.raises(AdapterError, match=r"was trained on .*whose weights are others"):
            attach_adapter(other, adapter)

    @pytest.mark.parametrize("part", ["lora_A", "lora_B", "mm_input_projection_weight", "vision_tower"])
    def test_a_missing_tensor(self, part, adapter, tiny_gemma3_dir) -> None:
        _change_file(adapter / ADAPTER_WEIGHTS, lambda t: t.pop(next(name for name in t if part in name)))
        with pytest.raises(AdapterError, match=rf"does not fit the model .*{part}"):
            attach_adapter(_base(tiny_gemma3_dir), adapter)

    def test_a_missing_bias(self, tiny_gemma3_dir, processor, tmp_path) -> None:
        model = setup_lora(_base(tiny_gemma3_dir), lora_scopes=("vision",), lora_bias="all")
        save_model_and_processor(model, processor, tmp_path)
        _change_file(tmp_path / ADAPTER_WEIGHTS, lambda t: t.pop(next(name for name in t if name.endswith("bias"))))
        with pytest.raises(AdapterError, match=r"1 tensors are missing and 0 are left over, such as .*bias"):
            attach_adapter(_base(tiny_gemma3_dir), tmp_path)

    @pytest.mark.parametrize(
        "name",
        [
            "base_model.model.model.language_model.layers.9.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.vision_tower.no_such.weight",
            "something",
        ],
    )
    def test_an_extra_tensor(self, name, adapter, tiny_gemma3_dir) -> None:
        _change_file(adapter / ADAPTER_WEIGHTS, lambda t: t.update({name: torch.ones(4, 64)}))
        with pytest.raises(AdapterError, match="0 tensors are missing and 1 are left over"):
            attach_adapter(_base(tiny_gemma3_dir), adapter)

    def test_names_of_a_foreign_layout(self, adapter, tiny_gemma3_dir) -> None:
        def rename(tensors) -> None:
            for name in list(tensors):
                if "language_model" in name:
                    tensors[name.replace("model.language_model.", "language_model.decoder.")] = tensors.pop(name)

        _change_file(adapter / ADAPTER_WEIGHTS, rename)
        with pytest.raises(AdapterError, match=r"56 tensors are missing and 56 are left over.*transformers .*peft"):
            attach_adapter(_base(tiny_gemma3_dir), adapter)

    def test_another_shape(self, adapter, tiny_gemma3_dir) -> None:
        def cut(tensors) -> None:
            name = next(name for name in tensors if "lora_A" in name)
            tensors[name] = tensors[name][:2].clone()

        _change_file(adapter / ADAPTER_WEIGHTS, cut)
        with pytest.raises(AdapterError, match="does not fit the model"):
            attach_adapter(_base(tiny_gemma3_dir), adapter)

    def test_layers_the_model_has_not(self, adapter, tiny_gemma3_dir) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["query_key_value"]}))
        with pytest.raises(AdapterError, match="does not fit the model"):
            attach_adapter(_base(tiny_gemma3_dir), adapter)

    def test_cut_off_and_absent_weights(self, adapter, tiny_gemma3_dir) -> None:
        file = adapter / ADAPTER_WEIGHTS
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(AdapterError, match=r"adapter_model\.safetensors cannot be read"):
            attach_adapter(_base(tiny_gemma3_dir), adapter)
        file.unlink()
        with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors \(none\)"):
            attach_adapter(_base(tiny_gemma3_dir), adapter)
        (adapter / "adapter_model.bin").write_bytes(b"pickled")
        with pytest.raises(AdapterError, match=r"only adapter_model\.bin, which may run code"):
            attach_adapter(_base(tiny_gemma3_dir), adapter)


class TestProcessor:
    """Every saved folder holds the whole processor."""

    @pytest.mark.parametrize("full", [False, True])
    def test_reloads_to_an_identical_batch(self, full, trained, tiny_model, processor, rows, tmp_path) -> None:
        save_model_and_processor(tiny_model if full else trained[0], processor, tmp_path)
        again = load_processor(tmp_path)
        assert again.chat_template == processor.chat_template
        ours, theirs = create_data_collator(processor)(rows), create_data_collator(again)(rows)
        assert ours.keys() == theirs.keys()
        assert "pixel_values" in ours
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class TestFullModel:
    """All weights, tied head included."""

    @pytest.fixture
    def tuned(self, tiny_gemma3_dir, processor, tmp_path) -> tuple[nn.Module, Path]:
        model = shift_trainable(prepare_full_finetuning(_base(tiny_gemma3_dir), EVERYWHERE))
        save_model_and_processor(model, processor, tmp_path / "full")
        return model, tmp_path / "full"

    def test_save_and_reload(self, tuned, batch, tiny_gemma3_dir) -> None:
        model, folder = tuned
        loaded, _ = load_model_for_inference(folder, torch_dtype="float32", device="cpu")
        assert torch.equal(_logits(loaded, batch), _logits(model, batch))
        assert not torch.allclose(_logits(loaded, batch), _logits(_base(tiny_gemma3_dir), batch), atol=1e-2)
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
        assert not any("lm_head" in name for name in load_file(folder / "model.safetensors"))

    def test_gathered_tensors_are_written(self, tuned, processor, tiny_gemma3_dir, batch, tmp_path) -> None:
        model, _ = tuned
        save_model_and_processor(_base(tiny_gemma3_dir), processor, tmp_path / "other", state_dict=model.state_dict())
        assert torch.equal(_logits(_base(tmp_path / "other"), batch), _logits(model, batch))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_every_tensor_is_restored(self, dtype, tiny_gemma3_dir, processor, tmp_path) -> None:
        model = load_model_for_training(tiny_gemma3_dir, torch_dtype=dtype)
        shift_trainable(prepare_full_finetuning(model, EVERYWHERE))
        save_model_and_processor(model, processor, tmp_path)
        other = load_model_for_training(tiny_gemma3_dir, torch_dtype=dtype)
        prepare_full_finetuning(other, ("projector",))
        flags = {name: parameter.requires_grad for name, parameter in other.named_parameters()}
        same = dict(other.named_parameters())
        changed = [
            name for name, tensor in other.state_dict().items() if not torch.equal(tensor, model.state_dict()[name])
        ]
        assert len(changed) == len([name for name, _ in model.named_parameters(remove_duplicate=False)])
        load_full_weights(other, tmp_path)
        for name, tensor in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name
            assert other.state_dict()[name].dtype == dtype or not tensor.is_floating_point()
        # The optimizer holds the parameters themselves: they must be the same objects, as trainable as before.
        assert all(parameter is same[name] for name, parameter in other.named_parameters())
        assert {name: parameter.requires_grad for name, parameter in other.named_parameters()} == flags
        assert other.lm_head.weight is other.get_input_embeddings().weight
        assert other.name_or_path == str(tiny_gemma3_dir)

    @pytest.mark.parametrize("part", ["vision_tower", "layers.1", "multi_modal_projector", "embed_tokens"])
    def test_a_missing_tensor(self, part, tuned, tiny_gemma3_dir) -> None:
        _, folder = tuned
        _change_file(folder / "model.safetensors", lambda t: t.pop(next(name for name in t if part in name)))
        other = _base(tiny_gemma3_dir)
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(
            ResumeError, match=r"does not hold this model: [12] tensors are missing and 0 are left over"
        ):
            load_full_weights(other, folder)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())

    def test_an_extra_tensor_and_another_shape(self, tuned, tiny_gemma3_dir) -> None:
        _, folder = tuned
        _change_file(folder / "model.safetensors", lambda t: t.update({"model.language_model.extra": torch.ones(2)}))
        with pytest.raises(ResumeError, match="0 tensors are missing and 1 are left over"):
            load_full_weights(_base(tiny_gemma3_dir), folder)

        def cut(tensors) -> None:
            del tensors["model.language_model.extra"]
            name = next(name for name in tensors if "gate_proj" in name)
            tensors[name] = tensors[name][:-1].clone()

        _change_file(folder / "model.safetensors", cut)
        with pytest.raises(ResumeError, match="cannot be loaded"):
            load_full_weights(_base(tiny_gemma3_dir), folder)

    def test_no_weights_there(self, tiny_gemma3_dir, tmp_path) -> None:
        with pytest.raises(ResumeError, match="cannot be loaded"):
            load_full_weights(_base(tiny_gemma3_dir), tmp_path)
