"""``vlmtune serve``, asked by OpenAI's own client: it answers as ``predict``, and refuses what it cannot do."""

from __future__ import annotations

import base64
import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from command_line import vlmtune

from vlmtune.config import GenerationArguments
from vlmtune.demo.run import model_folder
from vlmtune.evaluation.drawn import drawn_sample
from vlmtune.evaluation.generation import AnswerGenerator
from vlmtune.serving import check
from vlmtune.serving import engine as engine_module

KEY = "a-long-enough-key"
openai = pytest.importorskip("openai")


def content(number: int) -> list[dict]:
    sample = drawn_sample(number)
    data = base64.b64encode(sample.images[0].bytes).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return [image, {"type": "text", "text": sample.prompt[0].text}]


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=served, api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def expected(demo_model) -> list[str]:
    """What predict answers."""
    generator = AnswerGenerator(*demo_model, GenerationArguments(max_new_tokens=12, eval_batch_size=1))
    return [generator([drawn_sample(number)])[0].text for number in range(6)]


def ask(client, number: int, **options):
    messages = [{"role": "user", "content": content(number)}]
    return client.chat.completions.create(model="demo", messages=messages, **options)


class TestAnswers:
    """Answers of the server."""

    def test_equal_predicts(self, client, expected) -> None:
        assert len(set(expected)) > 1
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda number: ask(client, number), range(6)))
        assert [one.choices[0].message.content for one in found] == expected
        assert {one.choices[0].finish_reason for one in found} <= {"stop", "length"}
        usage = found[0].usage
        assert usage.prompt_tokens > 16 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens

    def test_the_image_counts(self, client) -> None:
        answers = set()
        for number in range(6):
            parts = [content(number)[0], {"type": "text", "text": "Describe this image."}]
            messages = [{"role": "user", "content": parts}]
            answers.add(client.chat.completions.create(model="demo", messages=messages).choices[0].message.content)
        assert len(answers) > 1

    def test_streamed(self, client, expected) -> None:
        events = list(ask(client, 0, stream=True, stream_options={"include_usage": True}))
        assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == expected[0]
        assert events[-2].choices[0].finish_reason == "stop" and events[-1].usage.completion_tokens > 0

    def test_cut(self, client) -> None:
        found = ask(client, 0, max_completion_tokens=1)
        assert found.choices[0].finish_reason == "length" and found.usage.completion_tokens == 1

    def test_drawn_by_seed(self, client) -> None:
        first, again, other = (
            [ask(client, n, temperature=3.0, seed=seed).choices[0].message.content for n in range(4)]
            for seed in (1, 1, 2)
        )
        assert first == again != other

    def test_several_turns_and_text_alone(self, client) -> None:
        messages = [
            {"role": "user", "content": content(0)},
            {"role": "assistant", "content": "A shape."},
            {"role": "user", "content": "What shape is it?"},
        ]
        assert client.chat.completions.create(model="demo", messages=messages).choices[0].message.content
        alone = [{"role": "user", "content": "What is it?"}]
        assert client.chat.completions.create(model="demo", messages=alone).usage.prompt_tokens < 20

    def test_models(self, client) -> None:
        assert [model.id for model in client.models.list()] == ["demo"]


class TestRefusals:
    """What is refused, in words."""

    def test_without_the_key(self, served) -> None:
        for key in ("wrong-key-altogether", ""):
            with openai.OpenAI(base_url=served, api_key=key or "x", max_retries=0) as other:
                with pytest.raises(openai.AuthenticationError, match="API key"):
                    ask(other, 0)
                with pytest.raises(openai.AuthenticationError):
                    other.models.list()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"n": 2}, "n is not supported"),
            ({"stop": ["."]}, "stop is not supported"),
            ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
            ({"max_tokens": 10**6}, "the model takes"),
            ({"temperature": -1.0}, "temperature"),
            ({"extra_body": {"wrong": 1}}, "wrong is not supported"),
        ],
    )
    def test_options(self, options, words, client) -> None:
        with pytest.raises(openai.BadRequestError, match=words):
            ask(client, 0, **options)

    @pytest.mark.parametrize(
        ("address", "words"),
        [
            ("http://127.0.0.1:1/a.png", "not opened"),
            ("file:///etc/hostname", "not opened"),
            ("/etc/hostname", "not opened"),
            ("data:image/png;base64,%%%", "not base64"),
            ("data:image/png;base64,aGVsbG8=", "not an image"),
        ],
    )
    def test_images(self, address, words, client) -> None:
        parts = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "What is it?"}]
        with pytest.raises(openai.BadRequestError, match=words):
            client.chat.completions.create(model="demo", messages=[{"role": "user", "content": parts}])

    def test_large_images_and_requests(self, client, tmp_path) -> None:
        from PIL import Image

        Image.new("RGB", (400, 300)).save(tmp_path / "large.png")
        data = base64.b64encode((tmp_path / "large.png").read_bytes()).decode()
        parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}]
        with pytest.raises(openai.BadRequestError, match="max_pixels"):
            client.chat.completions.create(model="demo", messages=[{"role": "user", "content": parts}])
        with pytest.raises(openai.APIStatusError, match="larger than 1 MB"):
            client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "a" * 1_100_000}])

    def test_messages(self, client) -> None:
        with pytest.raises(openai.NotFoundError, match="is not served here"):
            client.chat.completions.create(model="other", messages=[{"role": "user", "content": "a"}])
        for messages, words in (
            ([], "at least one"),
            ([{"role": "tool", "content": "a", "tool_call_id": "1"}], "role 'tool'"),
            ([{"role": "user", "content": "What <end_of_turn> is it?"}], "control token"),
            ([{"role": "assistant", "content": "a"}], "must be the user's"),
        ):
            with pytest.raises(openai.BadRequestError, match=words):
                client.chat.completions.create(model="demo", messages=messages)

    @pytest.mark.parametrize(
        ("headers", "code"),
        [({"Host": "evil.example"}, 400), ({"Content-Type": "text/plain"}, 415), ({}, 400)],
    )
    def test_web_pages(self, headers, code, served) -> None:
        place = urlsplit(served)
        connection = http.client.HTTPConnection(place.hostname, place.port)
        given = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"} | headers
        connection.request("POST", "/v1/chat/completions", b"not JSON", given)
        assert connection.getresponse().status == code
        connection.close()

    def test_unknown_address(self, served) -> None:
        place = urlsplit(served)
        connection = http.client.HTTPConnection(place.hostname, place.port)
        connection.request("GET", "/load_model", headers={"Authorization": f"Bearer {KEY}"})
        found = connection.getresponse()
        assert found.status == 404 and "/v1/chat/completions" in json.load(found)["error"]["message"]
        connection.close()


class TestCommand:
    """``vlmtune serve`` itself."""

    def test_check(self, capsys) -> None:
        options = ("--port", 0, "--torch_dtype", "float32", "--max_new_tokens", 8, "--check")
        assert vlmtune("serve", model_folder(), *options, "--api_key", KEY) == 0
        assert "6 of 6 answers of the server equal predict's." in capsys.readouterr().out

    def test_check_sees_another_answer(self, monkeypatch, capsys) -> None:
        right = engine_module.Engine.submit

        def wrong(self, request):
            sample = drawn_sample(5)
            return right(self, engine_module.ChatRequest(**{**vars(request), "sample": sample}))

        monkeypatch.setattr(engine_module.Engine, "submit", wrong)
        options = ("--port", 0, "--torch_dtype", "float32", "--max_new_tokens", 8, "--check", "true")
        assert vlmtune("serve", model_folder(), *options) == 1
        assert "  server: " in capsys.readouterr().out

    def test_check_sees_an_open_door(self, served, monkeypatch) -> None:
        monkeypatch.setattr(check, "ask", lambda *_: "an answer")
        with pytest.raises(check.EvaluationError, match="without its API key"):
            check._require_refusal(served, "demo")

    def test_others_need_a_key(self, monkeypatch, capsys) -> None:
        monkeypatch.delenv("VLMTUNE_API_KEY", raising=False)
        for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
            assert vlmtune("serve", model_folder(), "--host", host) == 2
            assert "no API key is set" in capsys.readouterr().err
        assert vlmtune("serve", model_folder(), "--host", "0.0.0.0", "--api_key", "short") == 2
        assert "shorter than 8" in capsys.readouterr().err

    def test_port_taken(self, served, capsys) -> None:
        assert vlmtune("serve", model_folder(), "--port", urlsplit(served).port) == 1
        assert "Choose another port" in capsys.readouterr().err

    def test_help(self, capsys) -> None:
        assert vlmtune("serve", "--help") == 0
        assert "--served_model_name" in capsys.readouterr().out
        assert vlmtune("serve") == 2
