"""``vlmtune merge`` from the command line: kept when it equals the adapter, else nothing is left in place."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_line import vlmtune
from training_stand_in import shift_trainable

from vlmtune.config.merge import MergeArguments
from vlmtune.evaluation import merging
from vlmtune.evaluation.card import CARD
from vlmtune.models import merge as merge_module
from vlmtune.models.checkpoint import save_model_and_processor
from vlmtune.models.loading import load_model_for_inference, load_model_for_training
from vlmtune.models.lora import setup_lora
from vlmtune.models.quantization import get_quantization_config


def _adapter(base: Path, processor, folder: Path, *, size: float = 0.1, quantization=None, **options) -> Path:
    model = load_model_for_training(base, torch_dtype="float32", quantization_config=quantization)
    model = setup_lora(model, lora_r=4, **options)
    shift_trainable(model, size)
    save_model_and_processor(model, processor, folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_gemma3_dir, processor, tmp_path_factory) -> Path:
    """A saved adapter; treat as read-only."""
    return _adapter(tiny_gemma3_dir, processor, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def scaled(monkeypatch):
    """Plant a wrong merge: the adapter's change times a factor."""

    def plant(factor: float) -> None:
        right = merge_module._Plan._merge

        def wrong(self, layer, weight, place):
            return weight.float() + factor * (right(self, layer, weight, place) - weight.float())

        monkeypatch.setattr(merge_module._Plan, "_merge", wrong)

    return plant


def _names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_merge(adapter, tiny_gemma3_dir, tmp_path, capsys) -> None:
    output = tmp_path / "new" / "merged"
    assert vlmtune("merge", adapter, output, "--samples", 2, "--max_new_tokens", 6) == 0
    text = capsys.readouterr().out
    assert "drift 0.0" in text and "strength 1.0000" in text and "2 of 2 greedy answers equal" in text
    assert _names(output.parent) == {"merged"}
    # Everything that the base has, and what vlmtune knows of it.
    assert _names(output) == _names(tiny_gemma3_dir) | {merging.MERGE_FILE, CARD}
    record = json.loads((output / merging.MERGE_FILE).read_text())
    assert record["base_model"] == str(tiny_gemma3_dir) and record["changed_tensors"] == 28
    (drift,) = record["drift"].values()
    assert drift["drift"] < 1e-4 and drift["changes"] > 0.01
    card = (output / CARD).read_text()
    assert card.startswith("---\n") and "# merged" in card and "Drift from the adapter on the original base" in card
    model, processor = load_model_for_inference(output, torch_dtype="float32")
    known = {processor.tokenizer.convert_tokens_to_ids(name) for name in ("<eos>", "<end_of_turn>")}
    assert set(model.generation_config.eos_token_id) == known
    assert processor.chat_template


def test_terminators_are_added(adapter, tiny_gemma3_dir, processor, tmp_path) -> None:
    base = Path(shutil.copytree(tiny_gemma3_dir, tmp_path / "base"))
    file = base / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 1}))
    options = ("--base_model", base, "--samples", 1, "--max_new_tokens", 2)
    assert vlmtune("merge", adapter, tmp_path / "merged", *options) == 0
    ends = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert processor.tokenizer.convert_tokens_to_ids("<end_of_turn>") in ends and 1 in ends
    file.unlink()
    assert vlmtune("merge", adapter, tmp_path / "again", *options) == 0
    assert len(json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"]) == 2


def test_check_serving(adapter, tiny_gemma3_dir, tmp_path, capsys) -> None:
    merged = tmp_path / "merged"
    assert vlmtune("merge", adapter, merged, "--samples", 1, "--max_new_tokens", 2, "--check_serving") == 0
    text = capsys.readouterr().out
    assert f"What other programs make of {merged}:\n  passed         the base's layout: " in text
    assert "not checked    SGLang, Ollama" in text
    # Of what is merged already, with its base elsewhere; a refusal is the command's.
    assert vlmtune("merge", merged, "--check_serving") == 0
    base = Path(shutil.copytree(tiny_gemma3_dir, tmp_path / "base"))
    config = base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"image_token_index": 7}))
    assert vlmtune("merge", merged, "--check_serving", "--base_model", base) == 1
    assert "Failed: the base's layout. The merged model was kept." in capsys.readouterr().out
    assert merged.is_dir()
    assert vlmtune("merge", adapter, "--check_serving") == 1
    assert "vlmtune merge did not make it" in capsys.readouterr().err


def test_on_given_data(adapter, image_folder, tmp_path, capsys) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"<image>Question {n}?"}, {"role": "assistant", "content": "yes"}],
         "images": [f"{n}.jpg"]}
        for n in range(3)
    ]  # fmt: skip
    data = image_folder / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    options = ("--dataset_path", data, "--samples", 3, "--max_new_tokens", 2)
    assert vlmtune("merge", adapter, tmp_path / "merged", *options) == 0
    assert "of 3 greedy answers" in capsys.readouterr().out


class TestRefused:
    """What is not right is not left in place."""

    @pytest.mark.parametrize("factor", [1.1, 0.9, -1.0, 0.0])
    def test_a_planted_wrong_merge(self, factor, scaled, adapter, tmp_path, capsys) -> None:
        scaled(factor)
        assert vlmtune("merge", adapter, tmp_path / "merged", "--samples", 1, "--max_new_tokens", 2) == 1
        assert "drifts from the adapter" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.1, 1), (0.9, 1)])
    def test_in_16_bits(self, factor, code, scaled, tiny_model, processor, tmp_path, capsys) -> None:
        base = tmp_path / "base"
        tiny_model.to(torch.bfloat16).save_pretrained(base)
        processor.save_pretrained(base)
        # A small change: rounding alone makes a drift near a tenth of it.
        adapter = _adapter(base, processor, tmp_path / "adapter", size=0.03)
        scaled(factor)
        assert vlmtune("merge", adapter, tmp_path / "merged", "--max_new_tokens", 4) == code
        said = capsys.readouterr()
        print(said.out, said.err)
        assert (tmp_path / "merged").exists() == (code == 0)

    def test_a_processor_that_differs(self, adapter, tmp_path, monkeypatch, capsys) -> None:
        write = merging._write_generation_config

        def spoil(base, folder, processor) -> None:
            write(base, folder, processor)
            processor.image_processor.image_mean = [0.1, 0.1, 0.1]

        monkeypatch.setattr(merging, "_write_generation_config", spoil)
        assert vlmtune("merge", adapter, tmp_path / "merged", "--samples", 1, "--max_new_tokens", 2) == 1
        assert "processor gives other pixel_values" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("x")])
    def test_interrupted(self, error, adapter, tmp_path, monkeypatch, capsys) -> None:
        copy = merge_module._copy_other_files

        def stop(*arguments) -> None:
            copy(*arguments)
            assert list(tmp_path.glob(".merged.merging-*/model/*.safetensors"))
            raise error

        monkeypatch.setattr(merge_module, "_copy_other_files", stop)
        arguments = ("merge", adapter, tmp_path / "merged", "--samples", 1, "--max_new_tokens", 2)
        if isinstance(error, RuntimeError):
            with pytest.raises(RuntimeError):
                vlmtune(*arguments)
        else:
            assert vlmtune(*arguments) == (130 if isinstance(error, KeyboardInterrupt) else 1)
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    @pytest.mark.parametrize("moment", ["", "/model/*.safetensors", "/model/chat_template.jinja"])
    def test_killed(self, moment, adapter, tmp_path, caplog) -> None:
        """By ``kill -9``: the output is not there, and the next merge names what lies beside it."""
        command = [sys.executable, "-m", "vlmtune.cli", "merge", adapter, tmp_path / "merged", "--samples", "1"]
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not list(tmp_path.glob(f".merged.merging-*{moment}")):
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        process.wait()
        (left,) = tmp_path.iterdir()
        assert left.name.startswith(".merged.merging-")
        result = merging.merge(
            MergeArguments(adapter=str(adapter), output_dir=str(tmp_path / "merged"), samples=1, max_new_tokens=2)
        )
        assert result.output_dir == tmp_path / "merged" and left.name in caplog.text

    def test_something_is_there(self, adapter, tmp_path, capsys) -> None:
        (tmp_path / "merged").mkdir()
        (tmp_path / "merged" / "mine.txt").write_text("kept")
        assert vlmtune("merge", adapter, tmp_path / "merged") == 1
        assert "nothing in it will be overwritten" in capsys.readouterr().err
        assert (tmp_path / "merged" / "mine.txt").read_text() == "kept"
        assert vlmtune("merge", adapter, tmp_path / "merged" / "mine.txt") == 1
        assert (tmp_path / "merged" / "mine.txt").read_text() == "kept"

    def test_arguments(self, adapter, tiny_gemma3_dir, tmp_path, capsys) -> None:
        assert vlmtune("merge") == vlmtune("merge", adapter) == vlmtune("merge", "--samples", 3) == 2
        assert vlmtune("merge", adapter, tmp_path / "merged", "--sampels", 3) == 2
        assert vlmtune("merge", tiny_gemma3_dir, tmp_path / "merged") == 1
        assert vlmtune("merge", adapter, tmp_path / "merged", "--merge_onto", "dequantised") == 1
        said = capsys.readouterr().err
        for words in ("needs an adapter and a folder", "samples", "is no adapter folder", "nothing to dequantise"):
            assert words in said
        assert not (tmp_path / "merged").exists()

    def test_help(self, capsys) -> None:
        assert vlmtune("merge", "--help") == 0
        text = capsys.readouterr().out
        assert "vlmtune merge ADAPTER OUTPUT_DIR" in text and "--merge_onto original|dequantised" in text


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("way", ["original", "dequantised"])
def test_qlora_shows_the_drift_of_both(way, tiny_gemma3_dir, processor, tmp_path, capsys) -> None:
    config = get_quantization_config(True, bnb_4bit_compute_dtype="float32")
    adapter = _adapter(tiny_gemma3_dir, processor, tmp_path / "adapter", quantization=config)
    options = ("--merge_onto", way, "--samples", 2, "--max_new_tokens", 4)
    assert vlmtune("merge", adapter, tmp_path / "merged", *options) == 0
    text = capsys.readouterr().out
    assert text.count("  drift ") == 3
    drifts = json.loads((tmp_path / "merged" / merging.MERGE_FILE).read_text())["drift"]
    original, unpacked = (
        next(found for name, found in drifts.items() if name.startswith(f"{kind} weights"))
        for kind in ("original", "dequantised")
    )
    assert unpacked["drift"] < 0.5 * original["drift"]
    plain, _ = load_model_for_inference(tiny_gemma3_dir, torch_dtype="float32")
    merged, _ = load_model_for_inference(tmp_path / "merged", torch_dtype="float32")
    # A linear layer whose adapter is zero would be the base's own on the original weights; the head is on both.
    assert torch.equal(plain.lm_head.weight, merged.lm_head.weight)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_what_began_with_loftq_goes_onto_the_weights_it_made_up_for(
    tiny_gemma3_dir, processor, tmp_path, capsys
) -> None:
    config = get_quantization_config(True, bnb_4bit_compute_dtype="float32")
    adapter = _adapter(tiny_gemma3_dir, processor, tmp_path / "adapter", quantization=config, lora_init="loftq")
    options = ("--samples", 2, "--max_new_tokens", 4)
    assert vlmtune("merge", adapter, tmp_path / "merged", *options) == 1
    assert "Set merge_onto to dequantised" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert vlmtune("merge", adapter, tmp_path / "merged", *options, "--merge_onto", "dequantised") == 0
    drifts = json.loads((tmp_path / "merged" / merging.MERGE_FILE).read_text())["drift"]
    assert [name.partition(" ")[0] for name in drifts] == ["dequantised"]
