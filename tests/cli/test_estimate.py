"""``vlmtune estimate`` from the command line, on a configuration alone."""

from __future__ import annotations

from vlmtune.cli.estimate import estimate


def test_estimate(tiny_gemma3_dir, tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_bytes((tiny_gemma3_dir / "config.json").read_bytes())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: {tmp_path}\ndataset_path: nowhere\nlora_r: 4\nseed: 1\n")
    assert estimate([str(recipe), "--torch_dtype", "float32", "--devices", "2"]) == 0
    text = capsys.readouterr().out
    assert "8 samples of 68 tokens on each of 2 devices (ddp), weights in float32, computed in bfloat16" in text
    for words in ("language", "at the peak", "communication", "141 GB  fits", "QLoRA: language", "2 zero3"):
        assert words in text
    assert estimate([str(recipe), "--gpu_gb", "0.0001"]) == 0
    text = capsys.readouterr().out
    assert "weights in bfloat16" in text and "It does not fit 0.0001 GB" in text
    assert estimate([str(recipe), "--bf16", "false", "--gpu_gb", "8"]) == 0
    text = capsys.readouterr().out
    assert "computed in" not in text and "It fits 8 GB as it is" in text


def test_help(capsys) -> None:
    assert estimate(["--help"]) == 0
    assert "--supervised_tokens N" in capsys.readouterr().out
