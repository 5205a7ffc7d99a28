"""What other programs make of a merged model is said as it is: passed, failed, not installed or not checked."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmtune.errors import ModelError
from vlmtune.models import serve_check
from vlmtune.models.merge import MERGE_FILE
from vlmtune.models.serve_check import CONVERTER, check_serving, format_checks

LAYOUT, GGUF, VLLM = "the base's layout", "the gguf package", "vLLM"
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")


@pytest.fixture
def merged(tiny_gemma3_dir, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    folder = Path(shutil.copytree(tiny_gemma3_dir, tmp_path / "merged"))
    (folder / MERGE_FILE).write_text(json.dumps({"base_model": str(tiny_gemma3_dir)}))
    return folder


def _found(folder: Path) -> dict[str, tuple[str, str]]:
    return {check.name: (check.outcome, check.words) for check in check_serving(folder)}


def _program(folder: Path, script: str) -> None:
    folder.mkdir()
    (folder / CONVERTER).write_text(f"#!/bin/sh\n{script}\n")
    (folder / CONVERTER).chmod(0o755)


@needs_gguf
def test_a_sound_model(merged, tiny_gemma3_dir) -> None:
    found = _found(merged)
    tensors = load_file(tiny_gemma3_dir / "model.safetensors")
    assert found[LAYOUT][0] == "passed" and f"{len(tensors)} tensors" in found[LAYOUT][1]
    spoken = [name for name in tensors if "language_model" in name]
    assert "which come back as they were written" in found[GGUF][1]
    assert found[GGUF][0] == "passed" and f"gemma3 has a place for the language model's {len(spoken)}" in found[GGUF][1]
    (converter,) = (outcome for name, (outcome, _) in found.items() if CONVERTER in name)
    assert converter == "not installed" and found["SGLang, Ollama"][0] == "not checked"
    assert "  not installed  llama.cpp's" in format_checks(check_serving(merged))


@pytest.mark.parametrize("change", ["absent", "added", "format", "config"])
def test_another_layout(change, merged) -> None:
    file, config = merged / "model.safetensors", merged / "config.json"
    tensors = load_file(file)
    if change == "absent":
        tensors.popitem()
    elif change == "added":
        tensors["lm_head.weight"] = next(iter(tensors.values())).clone()
    elif change == "format":
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
    elif change == "config":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"image_token_index": 7}))
    save_file(tensors, file)
    assert _found(merged)[LAYOUT][0] == "failed"


@needs_gguf
def test_a_tensor_that_gguf_has_no_place_for(merged, monkeypatch) -> None:
    names = dict(serve_check._language_names(merged, serve_check.load_config(merged)))
    names["router"] = "model.layers.0.mlp.router.weight"
    monkeypatch.setattr(serve_check, "_language_names", lambda *given: names)
    outcome, words = _found(merged)[GGUF]
    assert outcome == "failed" and "1 tensors, such as model.layers.0.mlp.router.weight" in words


@needs_gguf
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_gguf_reads_is_what_was_written(dtype, tmp_path, monkeypatch) -> None:
    import gguf

    tensor = torch.randn(4, 6).to(dtype)
    save_file({"own": tensor, "other": tensor + 1}, tmp_path / "model.safetensors")
    through = partial(serve_check._through_gguf, tmp_path, {"own": "blk.0.attn_q.weight"}, "gemma3")
    assert list(through()) == [("own", "blk.0.attn_q.weight", True)]
    write = gguf.GGUFWriter.add_tensor
    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", lambda self, name, t, **more: write(self, name, t * 2, **more))
    assert list(through()) == [("own", "blk.0.attn_q.weight", False)]


@needs_gguf
def test_an_architecture_that_gguf_lacks_is_not_called_wrong(merged, monkeypatch) -> None:
    monkeypatch.setitem(serve_check.GGUF_NAMES, "gemma3", "gemma33")
    assert _found(merged)[GGUF] == ("not checked", "it has no architecture of the name gemma33")


def test_the_converter_is_run_for_both_files(merged, tmp_path) -> None:
    _program(tmp_path / "bin", f'echo "$@" >> {tmp_path}/asked')
    found = {name: outcome for name, (outcome, _) in _found(merged).items() if CONVERTER in name}
    assert list(found.values()) == ["passed", "passed"]
    plain, pictures = (tmp_path / "asked").read_text().splitlines()
    assert plain.startswith(f"{merged} --outfile ") and plain.endswith(" --dry-run")
    assert pictures.endswith(" --dry-run --mmproj")


@pytest.mark.parametrize("refused", ["the merged model", "both"])
def test_a_converter_that_refuses(refused, merged, tmp_path) -> None:
    which = "*--mmproj*" if refused == "both" else f"*{merged}*--mmproj*"
    _program(tmp_path / "bin", f'case "$*" in {which}) echo "ValueError: no such tower" >&2; exit 3;; esac')
    found = {name: said for name, said in _found(merged).items() if CONVERTER in name}
    outcome, words = found.pop(f"llama.cpp's {CONVERTER} --mmproj")
    assert outcome == "failed" and words.startswith("it ended with code 3: ValueError: no such tower")
    assert words.endswith("(it refuses the base too)") == (refused == "both")
    assert [outcome for outcome, _ in found.values()] == ["passed"]


class TestVllm:
    """A stand-in for vLLM, which needs a GPU."""

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json" if name == "vllm" else name))

    def test_without_a_gpu_nothing_is_claimed(self, merged, monkeypatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        assert _found(merged)[VLLM][0] == "not checked"

    @pytest.mark.parametrize(("body", "outcome"), [("pass", "passed"), ("raise ValueError('no such model')", "failed")])
    def test_it_loads_the_model_in_a_process_of_its_own(self, body, outcome, merged, tmp_path, monkeypatch) -> None:
        lines = ("class LLM:", "    def __init__(self, model, **options):", f"        {body}")
        (tmp_path / "vllm.py").write_text("\n".join(lines) + "\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        found = _found(merged)[VLLM]
        assert found[0] == outcome and ("no such model" in found[1]) == (outcome == "failed")

    def test_one_that_hangs(self, merged, monkeypatch) -> None:
        def hang(command, **options):
            raise subprocess.TimeoutExpired(command, options["timeout"])

        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr(serve_check.subprocess, "run", hang)
        assert "did not end within" in _found(merged)[VLLM][1]


def test_what_is_no_merged_model(merged, tmp_path) -> None:
    with pytest.raises(ModelError, match="vlmtune merge did not make it"):
        check_serving(tmp_path)
    (merged / MERGE_FILE).write_text(json.dumps({"base_model": str(tmp_path / "gone")}))
    with pytest.raises(ModelError, match="gone"):
        check_serving(merged)


def test_a_file_that_is_cut(merged) -> None:
    file = merged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ModelError, match="no whole safetensors file"):
        check_serving(merged)
