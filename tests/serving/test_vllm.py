"""vLLM's command line for a model and for an adapter, and a stand-in for the program that is started by it."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from command_line import vlmtune

from vlmtune.config import AdapterArguments, BaseModelArguments, GenerationArguments, QuantizationArguments
from vlmtune.config.serving import ServeArguments
from vlmtune.errors import AdapterError, ConfigError
from vlmtune.models.checkpoint import save_model_and_processor
from vlmtune.models.loading import load_model_for_training, load_processor
from vlmtune.models.lora import setup_lora
from vlmtune.serving.vllm import build_command

# Stands for vLLM: a server of ours with the generation config, key and address that it was given.
STAND_IN = """\
#!{python}
import json, os, sys
from pathlib import Path
options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
assert sys.argv[1] == "serve" and os.environ["VLLM_API_KEY"] == "a-long-enough-key"
generation = json.loads((Path(options["--generation-config"]) / "generation_config.json").read_text())
assert Path(options["--chat-template"]).read_text()
from vlmtune.cli import main
sys.exit(main(["serve", sys.argv[2], "--host", options["--host"], "--port", options["--port"],
    "--torch_dtype", "float32", "--served_model_name", options["--served-model-name"],
    "--api_key", os.environ["VLLM_API_KEY"], "--max_new_tokens", str(generation["max_new_tokens"])]))
"""


def _adapter(base: Path, processor, folder: Path, **options) -> Path:
    model = setup_lora(load_model_for_training(base, torch_dtype=torch.float32), **{"lora_r": 12, **options})
    save_model_and_processor(model, processor, folder)
    return folder


def _command(model: Path, folder: Path, **options) -> list[str]:
    return build_command(
        BaseModelArguments(model_name_or_path=str(model)),
        AdapterArguments(),
        QuantizationArguments(),
        GenerationArguments(),
        ServeArguments(**options),
        "mine",
        folder,
    )


def test_model(tiny_gemma3_dir, processor, tmp_path) -> None:
    command = _command(tiny_gemma3_dir, tmp_path, port=8123, max_images=3)
    assert command[:2] == ["serve", str(tiny_gemma3_dir)] and "--enable-lora" not in command
    options = dict(zip(command[2::2], command[3::2], strict=True))
    assert options["--host"] == "127.0.0.1" and options["--port"] == "8123" and options["--served-model-name"] == "mine"
    assert json.loads(options["--limit-mm-per-prompt"]) == {"image": 3}
    assert Path(options["--chat-template"]).read_text() == processor.chat_template
    generation = json.loads((Path(options["--generation-config"]) / "generation_config.json").read_text())
    ends = processor.tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    assert set(ends) <= set(generation["eos_token_id"]) and generation["temperature"] == 0


def test_adapter(tiny_gemma3_dir, processor, tmp_path) -> None:
    command = _command(_adapter(tiny_gemma3_dir, processor, tmp_path / "adapter"), tmp_path)
    assert command[1] == str(tiny_gemma3_dir)
    assert command[command.index("--lora-modules") + 1] == f"mine={tmp_path / 'adapter'}"
    assert command[command.index("--max-lora-rank") + 1] == "16"
    assert command[command.index("--served-model-name") + 1] == "mine-base"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_scopes": ("language", "vision")}, "LoRA on the vision"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_r": 1024}, "at most rank 512"),
    ],
)
def test_what_it_would_apply_in_part(options, words, tiny_gemma3_dir, processor, tmp_path) -> None:
    with pytest.raises(AdapterError, match=words):
        _command(_adapter(tiny_gemma3_dir, processor, tmp_path / "adapter", **options), tmp_path)


def test_images_of_another_size_than_the_bases(family_dir, tmp_path) -> None:
    """vLLM takes the base's processor, which an adapter's own may differ from."""
    base, adapter = family_dir("qwen3_vl"), tmp_path / "adapter"
    _adapter(base, load_processor(base), adapter)
    assert "--enable-lora" in _command(adapter, tmp_path)
    load_processor(base, image_max_pixels=600).save_pretrained(adapter)
    with pytest.raises(AdapterError, match=r"at another size than its base \(image_max_pixels\)"):
        _command(adapter, tmp_path)


def test_what_it_lacks(tiny_gemma3_dir, tmp_path) -> None:
    for options in ({"max_pixels": 1000}, {"port": 0}):
        with pytest.raises(ConfigError, match="vLLM cannot"):
            _command(tiny_gemma3_dir, tmp_path, **options)


def test_started_and_checked(tiny_gemma3_dir, tmp_path, monkeypatch, capsys) -> None:
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--engine", "vllm", "--port", port, "--api_key", "a-long-enough-key", "--max_new_tokens", 4, "--check")
    monkeypatch.setenv("PATH", "/nowhere")
    assert vlmtune("serve", tiny_gemma3_dir, *options, "--torch_dtype", "float32") == 1
    assert "needs vLLM" in capsys.readouterr().err
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    assert vlmtune("serve", tiny_gemma3_dir, *options, "--torch_dtype", "float32") == 0
    assert "6 of 6 answers" in capsys.readouterr().out
