"""A family without a record from the command line: trained, its adapter answered with and merged; or refused."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from command_line import vlmtune
from transformers import AutoConfig

from vlmtune.models.families import REFUSED


@pytest.fixture(scope="module")
def data(image_folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = []
    for number, color in enumerate(("red", "green", "blue", "teal")):
        turns = [("user", "<image>What color is the shape?"), ("assistant", color)]
        messages = [{"role": role, "content": content} for role, content in turns]
        rows.append({"id": color, "images": [str(image_folder / f"{number}.jpg")], "messages": messages})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def train(model: Path, data: Path, output: Path) -> int:
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.01, "torch_dtype": "float32"}
    options |= {"dataloader_num_workers": 0, "use_cpu": True, "disable_tqdm": True, "lora_dropout": 0.0}
    named = {"model_name_or_path": model, "dataset_path": data, "output_dir": output, **options}
    return vlmtune("train", *(part for key, value in named.items() for part in (f"--{key}", value)))


def test_train_predict_and_merge(family_dir, data, image_folder, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    assert train(family_dir("aya_vision"), data, run) == 0
    shown = capsys.readouterr()
    assert "aya_vision is a family that vlmtune does not know: it passed the checks at start" in shown.out + shown.err
    assert json.loads((run / "run.json").read_text())["model"]["family"] == "aya_vision"
    answers = tmp_path / "answers.jsonl"
    options = ("--max_new_tokens", 3, "--torch_dtype", "float32")
    assert vlmtune("predict", run, image_folder, "--output", answers, *options) == 0
    assert len(answers.read_text().splitlines()) == 12
    assert vlmtune("merge", run, tmp_path / "merged") == 0
    again = tmp_path / "again.jsonl"
    assert vlmtune("predict", tmp_path / "merged", image_folder, "--output", again, *options) == 0
    texts = [[json.loads(line)["answer"] for line in file.read_text().splitlines()] for file in (answers, again)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_family_that_is_not_taken(model_type, data, tmp_path, capsys) -> None:
    reason, packages = REFUSED[model_type]
    if packages and all(map(find_spec, packages)):
        pytest.skip(f"it is tried as an unknown family where {' and '.join(packages)} are installed")
    AutoConfig.for_model(model_type).save_pretrained(tmp_path / "model")
    assert train(tmp_path / "model", data, tmp_path / "run") == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert f"is a {model_type} model, which vlmtune does not take: {reason}." in shown
    assert "Choose a model of a known family (gemma3, " in shown
    assert not (tmp_path / "run" / "run.json").exists()


def test_what_cannot_be_described_is_refused_before_training(
    family_dir, data, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REFUSED, "mllama", ("", ()))
    assert train(family_dir("mllama"), data, tmp_path / "run") != 0
    shown = capsys.readouterr()
    assert "makes cross_attention_mask of the text and its images together" in shown.out + shown.err
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_model_that_fails_a_check_at_start_is_refused(family_dir, data, tmp_path, capsys) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    from vlmtune.models.loading import load_processor

    model = AutoModelForImageTextToText.from_pretrained(family_dir("aya_vision"), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.zero_()
    blind = tmp_path / "blind"
    model.save_pretrained(blind)
    load_processor(family_dir("aya_vision")).save_pretrained(blind)
    assert train(blind, data, tmp_path / "run") != 0
    shown = capsys.readouterr()
    assert "another image changes nothing" in " ".join((shown.out + shown.err).split())
    assert not (tmp_path / "run" / "run.json").exists()
