"""``vlmtune chat``: images by path, turns that build on each other, commands, and mistakes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from command_line import vlmtune

from vlmtune.config import GenerationArguments
from vlmtune.demo.run import model_folder
from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.drawn import drawn_sample
from vlmtune.evaluation.generation import AnswerGenerator
from vlmtune.serving.chat import Chat, _pieces

OPTIONS = GenerationArguments(max_new_tokens=24)


@pytest.fixture
def chat(demo_model) -> Chat:
    return Chat(*demo_model, OPTIONS)


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "a picture.png"
    path.write_bytes(drawn_sample(0).images[0].bytes)
    return path


@pytest.mark.parametrize("form", ["'{}' {}", '"{}" {}', "{} {}"])
def test_image_in_the_line(form, chat, picture, demo_model) -> None:
    path = str(picture) if form[0] != "{" else str(picture).replace(" ", "\\ ")
    said = chat.say(form.format(path, drawn_sample(0).prompt[0].text))
    assert said == AnswerGenerator(*demo_model, OPTIONS)([drawn_sample(0)])[0].text
    assert len(chat.images) == 1 and len(chat.messages) == 2


def test_image_command_and_second_turn(chat, picture) -> None:
    assert "1 image(s)" in chat.say(f"/image {picture}")
    chat.say("What is it?")
    assert chat.messages[0].n_images == 1 and not chat.waiting
    chat.say("What color is it?")
    assert len(chat.messages) == 4 and len(chat.images) == 1
    chat.say("/new")
    assert not chat.messages and not chat.images


def test_a_mistake_leaves_the_conversation(chat, tmp_path) -> None:
    chat.say("What is it?")
    with pytest.raises(VlmtuneError, match="does not exist"):
        chat.say(f"{tmp_path}/gone.png What is it?")
    with pytest.raises(VlmtuneError, match="control token"):
        chat.say("What <end_of_turn>")
    assert len(chat.messages) == 2
    assert "There is no /wrong" in chat.say("/wrong")


def test_pieces() -> None:
    assert _pieces("What is in /a/b.jpg and it's c.png?") == ["What is in", Path("/a/b.jpg"), "and it's c.png?"]
    assert _pieces("one two") == ["one two"]


def test_command(picture, monkeypatch, capsys) -> None:
    lines = f"'{picture}' What colors are there?\n\n/x\n/nowhere/gone.png\n/quit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert vlmtune("chat", model_folder(), "--max_new_tokens", 8, "--torch_dtype", "float32") == 0
    said = capsys.readouterr().out
    assert "There is no /x" in said and "error: /nowhere/gone.png does not exist" in said
    assert said.splitlines()[0]
    assert vlmtune("chat", "--help") == 0
